"""How the scales of groups are stored. A format rounds ideal scales `[R, G]` to ones it can hold, and packs those.

| name | stored | source |
|---|---|---|
| float32, float16 | a number for each group | |
| e8m0 | an exponent for each group, 2^(⌊log2 max⌋ − ⌊log2 top⌋) | OCP Microscaling Formats 1.0, section 6 |
| e8m0-ceil | an exponent for each group, rounded up: nothing is clipped | ZeroQuant-FP (Wu et al. 2023), M1 |
| shift | a number for each row, divided by 2^n for each group | ZeroQuant-FP, M2, n rounded down: nothing is clipped |
| e4m3 | an E4M3 number for each group, times one for the tensor | NVFP4 |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Arrays, Shape

Parameters = dict[str, Tensor]
_E4M3_MAX = 448.0
#: 2^−n with a larger n would leave the range in which E2M1 · 2^−n is an exact E4M3 number
_LARGEST_SHIFT = 8


@dataclass(frozen=True)
class Number:
    """The scale itself, in `dtype`."""

    dtype: torch.dtype
    #: a group's stored scale depends on that group alone
    local: bool = True

    def round(self, ideal: Tensor, top: float) -> Parameters:
        """Ideal scales `[R, G]` > 0 → "scale", the ones that are stored; `top` is the largest element times which
        a scale gives the largest weight of its group."""
        range = torch.finfo(self.dtype)
        least = range.smallest_normal * range.eps  # the smallest subnormal: a scale is never zero
        return {"scale": ideal.clamp(least, range.max).to(self.dtype).float()}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, groups), self.dtype)}

    def pack(self, parameters: Parameters) -> Arrays:
        return {"scale": parameters["scale"].to(self.dtype).contiguous()}

    def unpack(self, arrays: Arrays) -> Parameters:
        return {"scale": arrays["scale"].float()}


@dataclass(frozen=True)
class Exponent:
    """A power of two, stored as E8M0: one byte, biased by 127."""

    ceil: bool
    local: bool = True

    def round(self, ideal: Tensor, top: float) -> Parameters:
        if self.ceil:
            mantissa, exponent = torch.frexp(ideal)  # ideal = mantissa · 2^exponent, 0.5 <= mantissa < 1
            exponent = exponent - (mantissa == 0.5).int()
        else:
            floor = torch.frexp(torch.tensor(top)).exponent
            exponent = torch.frexp(ideal * top).exponent - floor
        return {"scale": torch.ldexp(torch.ones_like(ideal), exponent.clamp(-126, 127))}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, groups), torch.uint8)}

    def pack(self, parameters: Parameters) -> Arrays:
        return {"scale": (torch.frexp(parameters["scale"]).exponent - 1 + 127).to(torch.uint8).contiguous()}

    def unpack(self, arrays: Arrays) -> Parameters:
        return {"scale": torch.exp2(arrays["scale"].float() - 127)}


@dataclass(frozen=True)
class Shift:
    """The largest scale of a row, halved n times for each group."""

    local: bool = False

    def round(self, ideal: Tensor, top: float) -> Parameters:
        peak = ideal.amax(1, keepdim=True)
        exponent = torch.frexp(peak / ideal).exponent
        shift = (exponent - 1).clamp(0, _LARGEST_SHIFT)
        return {"scale": torch.ldexp(peak.expand_as(ideal), -shift), "shift": shift}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, 1), torch.float32), "shift": ((rows, groups), torch.uint8)}

    def pack(self, parameters: Parameters) -> Arrays:
        shift = parameters["shift"]
        peak = torch.ldexp(parameters["scale"], shift).amax(1, keepdim=True)
        return {"scale": peak.contiguous(), "shift": shift.to(torch.uint8).contiguous()}

    def unpack(self, arrays: Arrays) -> Parameters:
        shift = arrays["shift"].float()
        return {"scale": arrays["scale"] * torch.exp2(-shift), "shift": shift.int()}


@dataclass(frozen=True)
class Nested:
    """E4M3 for each group, times one float32 for the tensor, chosen so that the largest is 448."""

    local: bool = False

    def round(self, ideal: Tensor, top: float) -> Parameters:
        outer = ideal.max() / _E4M3_MAX
        inner = (ideal / outer).clamp(2.0**-9, _E4M3_MAX).to(torch.float8_e4m3fn).float()
        return {"scale": inner * outer, "outer": outer.expand_as(ideal)}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, groups), torch.float8_e4m3fn), "outer": ((1, 1), torch.float32)}

    def pack(self, parameters: Parameters) -> Arrays:
        outer = parameters["outer"][:1, :1].contiguous()
        return {"scale": (parameters["scale"] / outer).to(torch.float8_e4m3fn).contiguous(), "outer": outer}

    def unpack(self, arrays: Arrays) -> Parameters:
        inner = arrays["scale"].float()
        return {"scale": inner * arrays["outer"], "outer": arrays["outer"].expand_as(inner)}


SCALES: dict[str, Number | Exponent | Shift | Nested] = {
    "float32": Number(torch.float32),
    "float16": Number(torch.float16),
    "e8m0": Exponent(ceil=False),
    "e8m0-ceil": Exponent(ceil=True),
    "shift": Shift(),
    "e4m3": Nested(),
}
