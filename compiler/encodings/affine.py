"""w → scale · (code − zero), codes of 1–8 bits, one scale per tensor, channel or group of the input axis.

Symmetric: scale = max|w| / (2^(b−1) − 1), codes −Q…Q (the extra negative level is left out, so that a code and its
negation both exist). Asymmetric: the range is widened to contain 0, which is then stored exactly; with a floating
zero point it is the range itself, and of one bit the range between the means below and above the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Shape
from .packing import pack, packed_size, unpack
from .scaled import Scaled
from .scales import SCALES, Parameters


@dataclass(frozen=True)
class Affine(Scaled):
    """Uniform integer codes over the weight seen as a matrix `[O, I]` (trailing axes flattened into `I`).

    `group` is the number of consecutive weights along `I` that share a scale; 0 means one scale per output channel,
    −1 one scale per tensor. `zero`, of asymmetric codes, is "integer" or "float". Stored: `codes` uint8
    `[O, ceil(I·bits/8)]`, offset-binary when symmetric; the scales as `scale` says, by default `scale` float32
    `[R, G]`; when asymmetric `zero`, uint8 `[R, ceil(G·bits/8)]` packed like the codes, or float32 `[R, G]`.
    """

    bits: int = 8
    group: int = 0
    symmetric: bool = True
    zero: str = "integer"
    scale: str = "float32"
    summary: ClassVar[str] = "integer"

    def __post_init__(self) -> None:
        if not (2 if self.symmetric else 1) <= self.bits <= 8:
            raise OptionError(
                f"Affine has 2 to 8 bits, or 1 when asymmetric, not {self.bits}",
                where="Affine(bits=…)",
                fix="use 2 … 8; for 1 bit, Binary()",
            )
        if self.zero not in ("integer", "float"):
            raise OptionError(
                f"zero={self.zero!r} is not known", where="Affine(zero=…)", fix="use 'integer' or 'float'"
            )
        self.check_options()

    @property
    def levels(self) -> int:
        """The largest code when asymmetric, the largest magnitude Q when symmetric."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def offset(self) -> int:
        """What is added to a symmetric code before it is packed."""
        return 1 << (self.bits - 1)

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, groups, _ = self.grid(shape)
        columns = packed_size(prod(shape[1:]), self.bits)
        arrays = {"codes": ((shape[0], columns), torch.uint8)} | SCALES[self.scale].layout(rows, groups)
        if not self.symmetric and self.zero == "float":
            arrays["zero"] = ((rows, groups), torch.float32)
        elif not self.symmetric:
            arrays["zero"] = ((rows, packed_size(groups, self.bits)), torch.uint8)
        return arrays

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        if self.symmetric:
            return self.round_scale(grouped.abs().amax(-1), self.levels, shrink)
        low, high = grouped.amin(-1), grouped.amax(-1)
        if self.zero == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
        elif self.bits == 1:
            low, high = _halves(grouped)
        # a group of one value, under a floating zero point, is its own range
        peak = torch.where(low == high, low.abs(), high - low)
        parameters = self.round_scale(peak, self.levels, shrink)
        return parameters | {"zero": self._zero(-low * shrink / parameters["scale"])}

    def _zero(self, exact: Tensor) -> Tensor:
        return exact if self.zero == "float" else torch.round(exact).clamp(0, self.levels)

    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        codes = grouped / parameters["scale"].unsqueeze(-1)
        if self.symmetric:
            return torch.round(codes).clamp(-self.levels, self.levels)
        zero = parameters["zero"].unsqueeze(-1)
        # an integer zero point is added after rounding: ONNX QuantizeLinear does, and a half rounds alike everywhere
        codes = torch.round(codes + zero) if self.zero == "float" else torch.round(codes) + zero
        return codes.clamp(0, self.levels)

    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        if not self.symmetric:
            codes = codes - parameters["zero"].unsqueeze(-1)
        return codes * parameters["scale"].unsqueeze(-1)

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        flat = codes.reshape(shape[0], -1)
        # modulo 256 in one byte: of a large weight each copy counts
        unsigned = flat.to(torch.int8).view(torch.uint8) + self.offset if self.symmetric else flat.to(torch.uint8)
        arrays = {"codes": pack(unsigned, self.bits)} | SCALES[self.scale].pack(parameters)
        if not self.symmetric:
            zero = parameters["zero"]
            arrays["zero"] = zero.contiguous() if self.zero == "float" else pack(zero.to(torch.uint8), self.bits)
        return arrays

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        codes = unpack(arrays["codes"], self.bits, prod(shape[1:]))
        codes = (codes - self.offset if self.symmetric else codes).reshape(self.grid(shape))
        parameters = SCALES[self.scale].unpack(arrays)
        if not self.symmetric:
            zero = arrays["zero"]
            parameters["zero"] = (
                zero if self.zero == "float" else unpack(zero, self.bits, self.grid(shape)[1]).to(torch.float32)
            )
        return codes, parameters


def _halves(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the values up to the mean of each group of `[R, G, n]`, and of those above it."""
    values = grouped.double()
    above = values > values.mean(-1, keepdim=True)
    high, low = ((values * side).sum(-1) / side.sum(-1).clamp(min=1) for side in (above, ~above))
    return low.float(), torch.where(above.any(-1), high, low).float()
