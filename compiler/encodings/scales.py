"""How the scales of groups are stored. A format rounds ideal scales `[R, G]` to ones it can hold, and packs those.

The ideal scale of a group is peak / top: its largest magnitude, over the element that this shall become.
Formats that share something between groups take it from the peaks, so that a search tries each group by itself.

| name | stored | source |
|---|---|---|
| float32, float16 | a number for each group | |
| e8m0 | an exponent for each group, 2^(⌊log2 peak⌋ − ⌊log2 top⌋) | OCP Microscaling Formats 1.0, section 6.3 |
| e8m0-ceil | an exponent for each group, 2^⌈log2 (peak/top)⌉: nothing is clipped | ZeroQuant-FP (Wu et al. 2023), M1 |
| shift | a number for each row, over 2^n for each group, n rounded down: nothing is clipped | ZeroQuant-FP, M2 |
| e4m3 | an E4M3 number for each group, times one for the tensor, max / (448 · top) | NVFP4 (arXiv:2509.25149, app. B) |

With e8m0, elements above `top` are clamped: max|w| / scale is anything below 2^(⌊log2 top⌋ + 1). Integer elements
count as they are, so MXINT8, whose standard writes them as multiples of 2^−6, has here an exponent that is 6 less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Encoding, Shape

Parameters = dict[str, Tensor]
#: the positive numbers of E4M3 (torch.float8_e4m3fn), by code; the next code is NaN
_E4M3: list[float] = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
#: the exponents of E8M0; its code 255, NaN, is never written
_LEAST, _LARGEST, _BIAS = -127, 127, 127
#: 2^−n with a larger n would leave the range in which E2M1 · 2^−n is an exact E4M3 number
_LARGEST_SHIFT = 8
#: the largest weight of a tensor: above, the difference of two may overflow; below, float32 is subnormal, as good as 0
_TOO_LARGE, _AS_ZERO = 2.0**126, 2.0**-126


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for whole exponents −127 … 127, exact on every backend."""
    return look_up([2.0**e for e in range(_LEAST, _LARGEST + 1)], exponent.int() - _LEAST)


def look_up(values: list[float], places: Tensor) -> Tensor:
    """The values, float32, at int32 places of any shape: exports as one Gather."""
    table = torch.tensor(values, device=places.device)
    return table.index_select(0, places.flatten()).reshape(places.shape)


@dataclass(frozen=True)
class Number:
    """The scale itself, in `dtype`."""

    dtype: torch.dtype
    #: a group's stored scale depends on that group alone
    local: bool = True

    def round(self, peak: Tensor, top: float, shrink: Tensor | float = 1.0) -> Parameters:
        """Peaks `[R, G]` ≥ 0 → "scale", the ones that are stored, each near peak · shrink / top.

        A scale is never zero: a group of zeros has the least there is.
        """
        range = torch.finfo(self.dtype)
        least = range.smallest_normal * range.eps  # the smallest subnormal
        return {"scale": (peak * shrink / top).clamp(least, range.max).to(self.dtype).float()}

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

    def round(self, peak: Tensor, top: float, shrink: Tensor | float = 1.0) -> Parameters:
        # x = mantissa · 2^exponent, 0.5 <= mantissa < 1
        if self.ceil:
            mantissa, exponent = torch.frexp(peak * shrink / top)
            exponent = exponent - (mantissa == 0.5).int()
        else:
            exponent = torch.frexp(peak * shrink).exponent - math.frexp(top)[1]
        exponent = torch.where(peak > 0, exponent, _LEAST)
        return {"scale": power_of_two(exponent.clamp(_LEAST, _LARGEST))}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, groups), torch.uint8)}

    def pack(self, parameters: Parameters) -> Arrays:
        exponent = torch.frexp(parameters["scale"]).exponent - 1
        return {"scale": (exponent + _BIAS).to(torch.uint8).contiguous()}

    def unpack(self, arrays: Arrays) -> Parameters:
        return {"scale": power_of_two(arrays["scale"].int() - _BIAS)}


@dataclass(frozen=True)
class Shift:
    """The largest scale of a row, halved n times for each group."""

    local: bool = False

    def round(self, peak: Tensor, top: float, shrink: Tensor | float = 1.0) -> Parameters:
        largest = peak.amax(1, keepdim=True)
        # not a number in a row of zeros, infinite for a group of zeros in another
        ratio = (largest / (peak * shrink)).nan_to_num(1.0).clamp(1, 2.0**_LARGEST_SHIFT)
        shift = torch.frexp(ratio).exponent - 1
        scale = (largest / top).clamp(min=torch.finfo(torch.float32).tiny)
        return {"scale": scale * power_of_two(-shift), "shift": shift}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, 1), torch.float32), "shift": ((rows, groups), torch.uint8)}

    def pack(self, parameters: Parameters) -> Arrays:
        shift = parameters["shift"]
        largest = (parameters["scale"] * power_of_two(shift)).amax(1, keepdim=True)
        return {"scale": largest.contiguous(), "shift": shift.to(torch.uint8).contiguous()}

    def unpack(self, arrays: Arrays) -> Parameters:
        shift = arrays["shift"].int()
        return {"scale": arrays["scale"] * power_of_two(-shift), "shift": shift}


@dataclass(frozen=True)
class TwoLevel:
    """E4M3 for each group, stored as its byte, times one float32 for the tensor, so that the largest is 448."""

    local: bool = False

    def round(self, peak: Tensor, top: float, shrink: Tensor | float = 1.0) -> Parameters:
        outer = (peak.max() / (top * _E4M3[-1])).clamp(min=torch.finfo(torch.float32).tiny)
        inner = (peak * shrink / (top * outer)).clamp(_E4M3[1], _E4M3[-1]).to(torch.float8_e4m3fn).float()
        return {"scale": inner * outer, "outer": outer.expand_as(inner)}

    def layout(self, rows: int, groups: int) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"scale": ((rows, groups), torch.uint8), "outer": ((1, 1), torch.float32)}

    def pack(self, parameters: Parameters) -> Arrays:
        outer = parameters["outer"][:1, :1].contiguous()
        inner = (parameters["scale"] / outer).to(torch.float8_e4m3fn).contiguous()
        return {"scale": inner.view(torch.uint8), "outer": outer}

    def unpack(self, arrays: Arrays) -> Parameters:
        inner = look_up(_E4M3, arrays["scale"].int())
        return {"scale": inner * arrays["outer"], "outer": arrays["outer"].expand_as(inner)}


SCALES: dict[str, Number | Exponent | Shift | TwoLevel] = {
    "float32": Number(torch.float32),
    "float16": Number(torch.float16),
    "e8m0": Exponent(ceil=False),
    "e8m0-ceil": Exponent(ceil=True),
    "shift": Shift(),
    "e4m3": TwoLevel(),
}


def check_reach(encoding: Encoding, weights: Tensor, scale_of: Callable[[Tensor], Tensor]) -> None:
    """Raise OptionError unless weights that share a scale, float32, get the right one, within one half of it.

    The right one is what they would have at a size near 1, where every format is at its best.
    """
    peak = float(weights.abs().max())
    if peak < _AS_ZERO:
        return
    finite = peak <= _TOO_LARGE  # not a number is not, either
    unit = 2.0 ** -math.frexp(peak)[1] if finite else 1.0
    ratio = float(scale_of(weights)) / float(scale_of((weights.double() * unit).float())) * unit if finite else 0.0
    if not 0.5 <= ratio <= 1.5:
        raise OptionError(
            f"no scale of {encoding} fits weights up to {peak:.3g}",
            where=f"the largest of {weights.numel()} weights that share a scale",
            fix="use scale='float32', which reaches from 1e-38 to 8e37",
        )
