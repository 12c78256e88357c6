"""Weight encodings: how a tensor is stored. Each is a frozen dataclass; they nest; `str()` is their text form."""

from ..hookspecs import hook
from .additive import Additive
from .affine import Affine
from .base import Arrays, Encoding, Fit, innermost, parse_encoding, register_encoding, registered_encodings
from .codebook import NF4, Codebook
from .dense import Dense
from .float import Float
from .nested import Nested
from .nm import NM
from .packing import pack, packed_size, unpack
from .residual import LowRank, Sum
from .scaled import Scaled
from .scales import SCALES, Parameters
from .signs import Binary, Ternary

__all__ = [
    "NF4",
    "NM",
    "SCALES",
    "Additive",
    "Affine",
    "Arrays",
    "Binary",
    "Codebook",
    "Dense",
    "Encoding",
    "Fit",
    "Float",
    "LowRank",
    "Nested",
    "Parameters",
    "Scaled",
    "Sum",
    "Ternary",
    "innermost",
    "pack",
    "packed_size",
    "parse_encoding",
    "register_encoding",
    "registered_encodings",
    "unpack",
]


@hook
def paretoc_encodings() -> list[type[Encoding]]:
    """The built-in encodings, registered through the same hook as everyone else's."""
    return [Dense, Affine, NM, Float, Binary, Ternary, Nested, Codebook, NF4, Additive, LowRank, Sum]


for _cls in paretoc_encodings():
    register_encoding(_cls)
