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
def fake_quantize_dynamic(x: Tensor, granularity: str) -> Tensor:
    """Quantise with a range found at run time, 8 bit.

    granularity "tensor": unsigned, asymmetric, one range, exactly ONNX DynamicQuantizeLinear.
    granularity "token": symmetric, scale = max|x| / 127 over the last axis.
    """
    return reference_fake_quantize_dynamic(x, granularity)


def reference_fake_quantize_dynamic(x: Tensor, granularity: str) -> Tensor:
    values = x.float()
    if granularity == "token":
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return (torch.round(values / scale).clamp(-127, 127) * scale).to(x.dtype)
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round((-low / scale).clamp(0, 255))
    codes = (torch.round(values / scale) + zero).clamp(0, 255)
    return ((codes - zero) * scale).to(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake_quantize_dynamic.register_fake
def _(x: Tensor, granularity: str) -> Tensor:
    return torch.empty_like(x)
