"""w → scale · v, v the nearest number of 1 sign bit, E exponent bits and M mantissa bits: "e2m1", "e4m3", …

A code is sign | e | m, and v = ±2^(max(e, 1) − bias − M) · (m + 2^M · [e > 0]), bias = 2^(E−1) − 1: IEEE 754 with its
subnormals. Half-way between two numbers the one with the even code is taken, and beyond the largest, the largest.

| format | largest | source |
|---|---|---|
| e4m3 | 448; the last code is NaN | OCP 8-bit Floating Point 1.0 (E4M3FN) |
| e5m2, e5m10, e8m7, any e8 | 57344, 65504, 3.39e38; e = 2^E − 1 is infinity and NaN | E5M2, IEEE 754, bfloat16 |
| e2m1, e3m2, e2m3 and others | every code is a number | OCP Microscaling Formats 1.0, section 5.3 |

| scheme | encoding |
|---|---|
| MXFP8, MXFP6, MXFP4, MXINT8 | Float("e4m3", 32, "e8m0"), …, Affine(8, 32, scale="e8m0") |
| NVFP4 | Float("e2m1", 16, "e4m3") |
| ZeroQuant-FP, M1 and M2 | Float("e2m1", 256, "e8m0-ceil") and Float("e2m1", 256, "shift") |

Lossy. Squared error over that of zeros, Gaussian weights in groups of 256: e2m1 0.0124, 4-bit integers 0.0160, e3m0
0.0378; of e2m1 with M2 0.0142, with M1 0.0180.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Shape
from .packing import pack, packed_size, unpack
from .scaled import Scaled
from .scales import SCALES, Parameters, look_up

#: what float32 stores: exponents are biased by 127, and stand above 23 bits of mantissa
_BIAS, _MANTISSA = 127, 23
#: the exponent of the largest weight, where the format has larger ones: its scale is then no subnormal float32
_HIGHEST = 16


@dataclass(frozen=True)
class Float(Scaled):
    """Floating-point elements of 3–16 bits over the weight seen as a matrix `[O, I]` (trailing axes flattened).

    `format` is "eEmM" with 1–8 exponent bits, any other an OptionError; `group` and `scale` are those of every
    `Scaled` encoding. Stored: `codes` uint8 `[O, ceil(I·bits/8)]`, packed; with more than 8 bits the low bytes
    `codes` `[O, I]` and the bits above `codes_high` `[O, ceil(I·(bits−8)/8)]`; and the scales as `scale` says.
    """

    format: str = "e2m1"
    group: int = 0
    scale: str = "float32"
    summary: ClassVar[str] = "floating point"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"e[1-8]m(\d|1\d)", self.format) or not 3 <= self.bits <= 16:
            raise OptionError(
                f"there is no floating-point format {self.format!r}",
                where="Float(format=…)",
                fix="write it like 'e4m3': 1 to 8 exponent bits, 3 to 16 bits with the sign",
            )
        self.check_options()

    @property
    def exponent(self) -> int:
        """E, the number of exponent bits."""
        return int(self.format[1])

    @property
    def mantissa(self) -> int:
        """M, the number of mantissa bits."""
        return int(self.format[3:])

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << self.exponent - 1) - 1

    @property
    def largest_code(self) -> int:
        """The code of the largest number; those above are infinity and NaN, and never stored."""
        codes = 1 << self.bits - 1
        if self.format == "e4m3":
            return codes - 2
        # nor has float32, with 8 exponent bits, numbers where e = 255
        reserved = self.format in ("e5m2", "e5m10") or self.exponent == 8
        return codes - 1 - (reserved << self.mantissa)

    def number(self, code: int) -> float:
        """What a code stands for."""
        sign, rest = divmod(code, 1 << self.bits - 1)
        e, m = divmod(rest, 1 << self.mantissa)
        magnitude = (m + (e > 0) * 2.0**self.mantissa) * 2.0 ** (max(e, 1) - self.bias - self.mantissa)
        return -magnitude if sign else magnitude

    @property
    def largest(self) -> float:
        return self.number(self.largest_code)

    @property
    def top(self) -> float:
        """The number that the largest weight of a group becomes: the largest there is, of a moderate exponent."""
        return min(self.largest, 2.0**_HIGHEST * (2 - 2.0**-self.mantissa))

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, groups, _ = self.grid(shape)
        arrays = {
            name: ((shape[0], packed_size(prod(shape[1:]), bits)), torch.uint8) for name, bits in self._parts().items()
        }
        return arrays | SCALES[self.scale].layout(rows, groups)

    def _parts(self) -> dict[str, int]:
        """The arrays that codes are split into, low bits first, and how many bits are in each."""
        return {"codes": self.bits} if self.bits <= 8 else {"codes": 8, "codes_high": self.bits - 8}

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        return self.round_scale(grouped.abs().amax(-1), self.top, shrink)

    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        """The nearest numbers of the format, float32 `[R, G, n]`: here they are the codes."""
        x = (grouped / parameters["scale"].unsqueeze(-1)).float().clamp(-self.largest, self.largest)
        unit, binade = self._binade(x)
        steps = x / unit
        if self.mantissa:
            return torch.round(steps) * unit
        # one number a binade, so that every other one has an even code: where it is the lower, 1.5 steps become 1
        lower = torch.copysign((binade & 1).float(), x)
        return (torch.round(steps - lower) + lower) * unit

    def _binade(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The distance of neighbours at x, and how many binades x is above the lowest, int32; both exact."""
        least = _BIAS + 1 - self.bias
        exponent = (x.view(torch.int32) >> _MANTISSA & 0xFF).clamp(min=least)
        return (exponent << _MANTISSA).view(torch.float32) * 2.0**-self.mantissa, exponent - least

    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes * parameters["scale"].unsqueeze(-1)

    def patterns(self, numbers: Tensor) -> Tensor:
        """Numbers of the format, float32 → their codes, int32."""
        unit, binade = self._binade(numbers)
        return (
            (numbers.abs() / unit).int()
            + (binade << self.mantissa)
            + (torch.signbit(numbers).int() << self.exponent + self.mantissa)
        )

    def numbers(self, patterns: Tensor) -> Tensor:
        """Codes, int32 → the numbers, float32: looked up, or of many bits the start of the binade is, and its unit."""
        codes = range(1 << self.bits)
        if self.bits <= 9:
            return look_up([self.number(code) for code in codes], patterns)
        size = 1 << self.mantissa
        binade = torch.floor(patterns.float() / size).int()
        first, second = (look_up([self.number(code) for code in codes[m::size]], binade) for m in (0, 1))
        return first + (patterns - binade * size) * (second - first)

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        patterns = self.patterns(codes.float().reshape(shape[0], -1))
        arrays = {}
        for name, bits in self._parts().items():
            arrays[name] = pack(patterns & (1 << bits) - 1, bits)
            patterns = patterns >> bits
        return arrays | SCALES[self.scale].pack(parameters)

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        count = prod(shape[1:])
        parts = [unpack(arrays[name], bits, count) for name, bits in self._parts().items()]
        patterns = parts[0] if len(parts) == 1 else parts[0] + parts[1] * 256
        return self.numbers(patterns).reshape(self.grid(shape)), SCALES[self.scale].unpack(arrays)
