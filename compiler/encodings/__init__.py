"""Weight encodings: how a tensor is stored. Each is a frozen dataclass; they nest; `str()` is their text form."""

from ..hookspecs import hook
from .affine import Affine
from .base import Arrays, Encoding, Fit, innermost, parse_encoding, register_encoding, registered_encodings
from .dense import Dense
from .nm import NM
from .packing import pack, packed_size, unpack
from .scaled import Scaled
from .scales import SCALES, Parameters

__all__ = [
    "NM",
    "SCALES",
    "Affine",
    "Arrays",
    "Dense",
    "Encoding",
    "Fit",
    "Parameters",
    "Scaled",
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
    return [Dense, Affine, NM]


for _cls in paretoc_encodings():
    register_encoding(_cls)
