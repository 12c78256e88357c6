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
    """Quantise with a range found at run time; `code` is int2 … int8.

    granularity "tensor": unsigned, asymmetric, one range, with int8 exactly ONNX DynamicQuantizeLinear.
    granularity "token": symmetric, scale = max|x| / (2^(b−1) − 1) over the last axis.
    """
    return reference_fake_quantize_dynamic(x, granularity, code)


def bits_of(code: str) -> int:
    """The width of an integer code."""
    if code.removeprefix("int") not in "2345678" or not code.startswith("int"):
        raise ValueError(f"{code!r} is not an activation code; there are int2 … int8")
    return int(code.removeprefix("int"))


def reference_fake_quantize_dynamic(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    values, bits = x.float(), bits_of(code)
    if granularity == "token":
        levels = (1 << bits - 1) - 1
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-8) / levels
        return (torch.round(values / scale).clamp(-levels, levels) * scale).to(x.dtype)
    low, high, levels = values.amin().clamp(max=0), values.amax().clamp(min=0), (1 << bits) - 1
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
