"""x → codes and scales: the activation quantisers of the dialect, without the multiplication back.

`quantize_tokens`: one scale for each token, over the last axis, or for each group of it; scale = max|x| / top, code =
x / scale rounded to an integer (a half to even) or to E4M3 or E5M2. `quantize_range`: unsigned codes under a given
scale and zero point of the whole tensor, stored less 2^(bits−1), so that they are int8. What stands in front is
computed on the way, so that x is read once and what is quantised never written: a norm of the last axis, for tokens,
or an activation, which may be multiplied by `gate`: silu(x) · gate. `round_tokens` and `round_range` give scale · code
instead, for what reads numbers: an attention, a convolution.

x `[…, K]` float16, bfloat16 or float32, any strides. Codes are those of the dialect, bit for bit; behind a norm or an
activation a code may differ by one step, where these round otherwise.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....compiler.dialect import activations
from ....compiler.dialect.activations import FLOATS, INTEGERS
from .launch import cdiv, check_dtype, kernel_op, launch

#: the longest row that is held in registers
MAX_WIDTH = 1 << 15
_BLOCK = 1024


@triton.jit
def round_half_even(x):
    """To the nearest integer, |x| < 2^22: adding 1.5 · 2^23 leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_float(x, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """To the nearest number with so many mantissa bits, 2^LEAST the smallest that is no subnormal; a half to even.

    A cast rounds alike on a GPU, but Triton's interpreter truncates.
    """
    binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.maximum(binade, 2.0**LEAST) * 2.0**-MANTISSA
    return round_half_even(x / unit) * unit


@triton.jit
def codes_of(values, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """Rows of float32 → codes, still float32, and the scale of each row. MANTISSA −1: integers."""
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=1), 1e-8), TOP)
    shrunk = tl.clamp(tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), -TOP, TOP)
    codes = round_half_even(shrunk) if MANTISSA < 0 else round_float(shrunk, MANTISSA, LEAST)
    return codes, scale


@triton.jit
def activated(values, ACTIVATION: tl.constexpr):
    """The activation of float32 values."""
    if ACTIVATION == "silu":
        values = values * tl.sigmoid(values)
    elif ACTIVATION == "gelu":
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # ½(1 + tanh(u)) = sigmoid(2u)
        values = values * tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    elif ACTIVATION == "relu":
        values = tl.maximum(values, 0.0)
    return values


@triton.jit
def quantize_tokens_kernel(
    x, gate, weight, bias, codes, scales, K, stride_m, stride_k, stride_gate_m, stride_gate_k, eps,
    FRONT: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row of x `[M, K]` → codes `[M, K]`, scales `[M, ⌈K/GROUP⌉]`; without scales, their product."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    values = tl.load(x + row * stride_m + columns * stride_k, mask=inside, other=0.0).to(tl.float32)
    if FRONT == "layer" or FRONT == "rms":
        if FRONT == "layer":
            values = tl.where(inside, values - tl.sum(values) / K, 0.0)
        values *= tl.rsqrt(tl.sum(values * values) / K + eps)
        if weight is not None:
            values *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        values = activated(values, FRONT)
    values = values.to(x.dtype.element_ty).to(tl.float32)
    if gate is not None:
        values *= tl.load(gate + row * stride_gate_m + columns * stride_gate_k, mask=inside, other=0.0).to(tl.float32)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    shrunk, scale = codes_of(tl.reshape(values, (BLOCK_K // GROUP, GROUP)), TOP, MANTISSA, LEAST)
    if scales is None:
        shrunk *= scale[:, None]
    else:
        places = tl.arange(0, BLOCK_K // GROUP)
        count = tl.cdiv(K, GROUP)
        tl.store(scales + row * count + places, scale, mask=places < count)
    tl.store(codes + row * K + columns, tl.reshape(shrunk, (BLOCK_K,)).to(codes.dtype.element_ty), mask=inside)


@triton.jit
def quantize_range_kernel(
    x, gate, scale, zero, codes, count,
    FRONT: tl.constexpr, LEVELS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x `[count]`, scale and zero of the whole tensor → codes `[count]` less (LEVELS + 1) / 2, or with ROUND what they
    stand for."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = activated(tl.load(x + places, mask=places < count, other=0.0).to(tl.float32), FRONT)
    values = values.to(x.dtype.element_ty).to(tl.float32)
    if gate is not None:
        values *= tl.load(gate + places, mask=places < count, other=0.0).to(tl.float32)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    # clamped first: far outside the range, rounding would need more bits than float32 has
    steps = tl.clamp(tl.div_rn(values, tl.load(scale)), -2.0 * LEVELS, 2.0 * LEVELS)
    offset = tl.load(zero).to(tl.float32)
    shifted = tl.clamp(round_half_even(steps) + offset, 0.0, LEVELS)
    shifted = (shifted - offset) * tl.load(scale) if ROUND else shifted - (LEVELS + 1) // 2
    tl.store(codes + places, shifted.to(codes.dtype.element_ty), mask=places < count)


@kernel_op("quantize_tokens")
def quantize_tokens(
    x: Tensor,
    code: str,
    group: int = 0,
    front: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x `[…, K]` → codes `[…, K]`, int8 or a float8, and scales `[M, K/group]`, float32; a group of 0 is all of K.

    `front`: "none", a norm "layer" or "rms", or an activation "silu", "gelu", "gelu_tanh" or "relu"; `gate` like x.
    Groups are powers of two that divide K.
    """
    codes, scales = outputs(x, code, group)
    _launch_tokens(x, codes, scales, code, group, front, weight, bias, eps, gate)
    return codes, scales


@quantize_tokens.register_fake
def _(
    x: Tensor,
    code: str,
    group: int = 0,
    front: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return outputs(x, code, group)


@kernel_op("round_tokens")
def round_tokens(x: Tensor, code: str, group: int = 0) -> Tensor:
    """Like `paretoc::fake_quantize_dynamic` for each token, or each group of it: contiguous, in the type of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_tokens(x, out, None, code, group)
    return out


@round_tokens.register_fake
def _(x: Tensor, code: str, group: int = 0) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_tokens(
    x: Tensor,
    out: Tensor,
    scales: Tensor | None,
    code: str,
    group: int,
    front: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
) -> None:
    check_dtype(x)
    K = int(x.shape[-1])
    rows = x.reshape(-1, K)
    gates = None if gate is None else gate.reshape(-1, K)
    top, mantissa, least = number(code)
    block = triton.next_power_of_2(K)
    launch(
        quantize_tokens_kernel,
        (rows.shape[0],),
        x=rows,
        gate=gates,
        weight=weight,
        bias=bias,
        codes=out,
        scales=scales,
        K=K,
        stride_m=rows.stride(0),
        stride_k=rows.stride(1),
        stride_gate_m=0 if gates is None else gates.stride(0),
        stride_gate_k=0 if gates is None else gates.stride(1),
        eps=eps,
        FRONT=front,
        TOP=top,
        MANTISSA=mantissa,
        LEAST=least,
        GROUP=group or block,
        BLOCK_K=block,
        num_warps=min(max(block // 1024, 1), 16),
    )


def number(code: str) -> tuple[float, int, int]:
    """The largest code, mantissa bits (−1: an integer) and the exponent of the smallest normal number."""
    if code in INTEGERS:
        return float((1 << INTEGERS[code] - 1) - 1), -1, 0
    limits = torch.finfo(FLOATS[code])
    return limits.max, -round(math.log2(limits.eps)), round(math.log2(limits.smallest_normal))


def outputs(x: Tensor, code: str, group: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=FLOATS.get(code, torch.int8), device=x.device)
    K = int(x.shape[-1])
    return codes, torch.empty((x.numel() // K, K // (group or K)), dtype=torch.float32, device=x.device)


@kernel_op("quantize_range")
def quantize_range(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, front: str = "none", gate: Tensor | None = None
) -> Tensor:
    """x `[…]`, scale float32 `[]`, zero `[]` in 0 … 2^bits − 1 → int8 `[…]`: the unsigned codes less 2^(bits−1).

    `front`: "none" or an activation, as in `quantize_tokens`; `gate` like x.
    """
    return _launch_range(x, scale, zero, bits, torch.int8, front, gate)


@quantize_range.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int, front: str = "none", gate: Tensor | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@kernel_op("round_range")
def round_range(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Like `paretoc::fake_quantize`, in codes of so many bits: contiguous, in the type of x."""
    return _launch_range(x, scale, zero, bits, x.dtype)


@round_range.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_range(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    dtype: torch.dtype,
    front: str = "none",
    gate: Tensor | None = None,
) -> Tensor:
    check_dtype(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    count = x.numel()
    launch(
        quantize_range_kernel,
        (cdiv(count, _BLOCK),),
        x=x.reshape(-1),
        gate=None if gate is None else gate.reshape(-1),
        scale=scale,
        zero=zero,
        codes=out,
        count=count,
        FRONT=front,
        LEVELS=(1 << bits) - 1,
        ROUND=dtype == x.dtype,
        BLOCK=_BLOCK,
    )
    return out


@torch.library.custom_op("paretoc_triton::tensor_range", mutates_args=())
def tensor_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x → scale `[]` and zero point `[]`, float32, of unsigned codes of so many bits: plain PyTorch."""
    return activations.tensor_range(x.float(), (1 << bits) - 1)


@tensor_range.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    empty = torch.empty((), dtype=torch.float32, device=x.device)
    return empty, empty.clone()
