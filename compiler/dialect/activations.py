"""Activation quantisers: x → the nearest representable x.

`fake_quantize` is static (the range was measured by calibration), `fake_quantize_dynamic` finds the range of each
call: of the whole tensor (ONNX DynamicQuantizeLinear) or of each token (last axis).
"""

from __future__ import annotations

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


@torch.library.custom_op("paretoc::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    """Quantise with a range found at run time; `code` is int2 … int8, e4m3 or e5m2.

    granularity "tensor": one range; integers unsigned and asymmetric, with int8 exactly ONNX DynamicQuantizeLinear.
    granularity "token": symmetric, over the last axis; scale = max|x| / the largest code, as with floating codes.
    """
    return reference_fake_quantize_dynamic(x, granularity, code)


#: floating-point codes → their PyTorch type
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}


def reference_fake_quantize_dynamic(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    values = x.float()
    if code not in FLOATS and code not in INTEGERS:
        raise ValueError(f"{code!r} is not an activation code; there are {', '.join([*INTEGERS, *FLOATS])}")
    if granularity == "token" or code in FLOATS:
        peak = values.abs().amax(-1, keepdim=True) if granularity == "token" else values.abs().amax()
        top = torch.finfo(FLOATS[code]).max if code in FLOATS else (1 << INTEGERS[code] - 1) - 1
        scale = peak.clamp(min=1e-8) / top
        shrunk = (values / scale).clamp(-top, top)
        rounded = shrunk.to(FLOATS[code]).float() if code in FLOATS else torch.round(shrunk)
        return (rounded * scale).to(x.dtype)
    low, high, levels = values.amin().clamp(max=0), values.amax().clamp(min=0), (1 << INTEGERS[code]) - 1
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round((-low / scale).clamp(0, levels))
    codes = (torch.round(values / scale) + zero).clamp(0, levels)
    return ((codes - zero) * scale).to(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_dynamic.register_fake
def _(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    return torch.empty_like(x)
