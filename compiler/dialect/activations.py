"""Activation quantisers: x → the nearest representable x.

`fake_quantize` is static (the range was measured by calibration), `fake_quantize_dynamic` finds the range of each
call: of the whole tensor (ONNX DynamicQuantizeLinear), of each token (last axis) or of each group of its channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("paretoc::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x → scale · (clamp(round(x / scale) + zero, 0, 255) − zero), per tensor, unsigned 8 bit.

    `scale` float32 `[]`, `zero` uint8 `[]`. Rounds half to even, like ONNX QuantizeLinear.
    """
    return reference_fake_quantize(x, scale, zero)


def reference_fake_quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    offset = zero.to(torch.float32)
    codes = (torch.round(x.float() / scale) + offset).clamp(0, 255)
    return ((codes - offset) * scale).to(x.dtype)


def affine_parameters(low: Tensor, high: Tensor, levels: int = 255) -> tuple[Tensor, Tensor]:
    """Ranges, widened to contain 0 → scale and zero point, float32, of codes 0 … levels that store 0 exactly."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round((-low / scale).clamp(0, levels))


@torch.library.custom_op("paretoc::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    """Quantise with a range found at run time; `code` is int2 … int8, uint2 … uint8, e4m3 or e5m2.

    granularity "tensor": one range; integers unsigned and asymmetric, with int8 exactly ONNX DynamicQuantizeLinear.
    granularity "token": over the last axis; int… symmetric, scale = max|x| / the largest code, as with floating codes,
    uint… asymmetric, so that what lies on one side of zero (the output of a GELU) has all codes there.
    granularity "group32": the same for each 32 consecutive channels of a token; another number likewise.
    """
    return reference_fake_quantize_dynamic(x, granularity, code)


#: floating-point codes → their PyTorch type
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
#: integer codes that are asymmetric for each token too
UNSIGNED = {f"u{code}": bits for code, bits in INTEGERS.items()}
CODES = (*INTEGERS, *UNSIGNED, *FLOATS)


def group_of(granularity: str) -> int:
    """ "group32" → 32; 0 for other granularities."""
    return int(granularity.removeprefix("group")) if granularity.startswith("group") else 0


def reference_fake_quantize_dynamic(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    if size := group_of(granularity):
        return reference_fake_quantize_dynamic(x.reshape(*x.shape[:-1], -1, size), "token", code).flatten(-2)
    values = x.float()
    if code not in CODES:
        raise ValueError(f"{code!r} is not an activation code; there are {', '.join(CODES)}")
    if code in FLOATS or (granularity == "token" and code in INTEGERS):
        peak = values.abs().amax(-1, keepdim=True) if granularity == "token" else values.abs().amax()
        top = torch.finfo(FLOATS[code]).max if code in FLOATS else (1 << INTEGERS[code] - 1) - 1
        scale = peak.clamp(min=1e-8) / top
        shrunk = (values / scale).clamp(-top, top)
        rounded = shrunk.to(FLOATS[code]).float() if code in FLOATS else torch.round(shrunk)
        return (rounded * scale).to(x.dtype)
    levels = (1 << (INTEGERS | UNSIGNED)[code]) - 1
    scale, zero = tensor_range(values, levels, granularity == "token")
    codes = (torch.round(values / scale) + zero).clamp(0, levels)
    return ((codes - zero) * scale).to(x.dtype)


def tensor_range(values: Tensor, levels: int, token: bool = False) -> tuple[Tensor, Tensor]:
    """The parameters of the range of all values, float32 `[]`, or of each token `[…, 1]`."""
    low, high = (values.amin(-1, True), values.amax(-1, True)) if token else (values.amin(), values.amax())
    return affine_parameters(low, high, levels)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_dynamic.register_fake
def _(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    return torch.empty_like(x)


@fake_quantize.register_autograd
def _(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Straight through."""
    return gradient, None, None


@fake_quantize_dynamic.register_autograd
def _(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    """Straight through: nothing is clipped."""
    return gradient, None, None


#: the operators above: what rounds a value and keeps its shape
ROUNDING = (torch.ops.paretoc.fake_quantize.default, torch.ops.paretoc.fake_quantize_dynamic.default)
