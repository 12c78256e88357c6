"""x → codes and scales: the activation quantisers of the dialect, without the multiplication back.

`quantize_tokens`: one scale for each token, over the last axis, or for each group of it; scale = max|x| / top, code =
x / scale rounded to an integer (a half to even) or to E4M3 or E5M2. A layer norm or an RMS norm in front is computed on
the way: x is read once, the normalised value never written. `quantize_range`: unsigned codes under a given scale and
zero point of the whole tensor, stored less 2^(bits−1), so that they are int8. `round_tokens` and `round_range` give
scale · code instead, for what reads numbers: an attention, a convolution.

x `[…, K]` float16, bfloat16 or float32, any strides. Codes are those of the dialect, bit for bit; behind a norm a code
may differ by one step, where the sums of the norm round otherwise.
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
def quantize_tokens_kernel(
    x, weight, bias, codes, scales, K, stride_m, stride_k, eps,
    NORM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row of x `[M, K]` → codes `[M, K]`, scales `[M, ⌈K/GROUP⌉]`; without scales, their product. MANTISSA −1:
    integers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    values = tl.load(x + row * stride_m + columns * stride_k, mask=inside, other=0.0).to(tl.float32)
    if NORM != "none":
        if NORM == "layer":
            values = tl.where(inside, values - tl.sum(values) / K, 0.0)
        values *= tl.rsqrt(tl.sum(values * values) / K + eps)
        if weight is not None:
            values *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        values = values.to(x.dtype.element_ty).to(tl.float32)
    groups = tl.reshape(values, (BLOCK_K // GROUP, GROUP))
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(groups), axis=1), 1e-8), TOP)
    shrunk = tl.clamp(tl.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape)), -TOP, TOP)
    shrunk = round_half_even(shrunk) if MANTISSA < 0 else round_float(shrunk, MANTISSA, LEAST)
    if scales is None:
        shrunk *= scale[:, None]
    else:
        places = tl.arange(0, BLOCK_K // GROUP)
        count = tl.cdiv(K, GROUP)
        tl.store(scales + row * count + places, scale, mask=places < count)
    tl.store(codes + row * K + columns, tl.reshape(shrunk, (BLOCK_K,)).to(codes.dtype.element_ty), mask=inside)


@triton.jit
def quantize_range_kernel(
    x, scale, zero, codes, count, LEVELS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x `[count]`, scale and zero of the whole tensor → codes `[count]` less (LEVELS + 1) / 2, or with ROUND what they
    stand for."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + places, mask=places < count, other=0.0).to(tl.float32)
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
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """x `[…, K]` → codes `[…, K]`, int8 or a float8, and scales `[M, K/group]`, float32; a group of 0 is all of K.

    `norm`: "none", "layer" or "rms". Groups are powers of two that divide K.
    """
    codes, scales = _outputs(x, code, group)
    _launch_tokens(x, codes, scales, code, group, norm, weight, bias, eps)
    return codes, scales


@quantize_tokens.register_fake
def _(
    x: Tensor,
    code: str,
    group: int = 0,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, code, group)


@kernel_op("round_tokens")
def round_tokens(x: Tensor, code: str, group: int = 0) -> Tensor:
    """Like `paretoc::fake_quantize_dynamic` for each token, or each group of it: contiguous, in the type of x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_tokens(x, out, None, code, group, "none", None, None, 0.0)
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
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    check_dtype(x)
    K = int(x.shape[-1])
    rows = x.reshape(-1, K)
    top, mantissa, least = _number(code)
    block = triton.next_power_of_2(K)
    launch(
        quantize_tokens_kernel,
        (rows.shape[0],),
        x=rows,
        weight=weight,
        bias=bias,
        codes=out,
        scales=scales,
        K=K,
        stride_m=rows.stride(0),
        stride_k=rows.stride(1),
        eps=eps,
        NORM=norm,
        TOP=top,
        MANTISSA=mantissa,
        LEAST=least,
        GROUP=group or block,
        BLOCK_K=block,
        num_warps=min(max(block // 1024, 1), 16),
    )


def _number(code: str) -> tuple[float, int, int]:
    """The largest code, mantissa bits (−1: an integer) and the exponent of the smallest normal number."""
    if code in INTEGERS:
        return float((1 << INTEGERS[code] - 1) - 1), -1, 0
    limits = torch.finfo(FLOATS[code])
    return limits.max, -round(math.log2(limits.eps)), round(math.log2(limits.smallest_normal))


def _outputs(x: Tensor, code: str, group: int) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=FLOATS.get(code, torch.int8), device=x.device)
    K = int(x.shape[-1])
    return codes, torch.empty((x.numel() // K, K // (group or K)), dtype=torch.float32, device=x.device)


@kernel_op("quantize_range")
def quantize_range(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x `[…]`, scale float32 `[]`, zero `[]` in 0 … 2^bits − 1 → int8 `[…]`: the unsigned codes less 2^(bits−1)."""
    return _launch_range(x, scale, zero, bits, torch.int8)


@quantize_range.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@kernel_op("round_range")
def round_range(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Like `paretoc::fake_quantize`, in codes of so many bits: contiguous, in the type of x."""
    return _launch_range(x, scale, zero, bits, x.dtype)


@round_range.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch_range(x: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    check_dtype(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    count = x.numel()
    arguments = {"x": x.reshape(-1), "scale": scale, "zero": zero, "codes": out, "count": count, "BLOCK": _BLOCK}
    levels, rounds = (1 << bits) - 1, dtype == x.dtype
    launch(quantize_range_kernel, (cdiv(count, _BLOCK),), **arguments, LEVELS=levels, ROUND=rounds)
    return out


@torch.library.custom_op("paretoc_triton::tensor_range", mutates_args=())
def tensor_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x → scale `[]` and zero point `[]`, float32, of unsigned codes of so many bits: plain PyTorch."""
    return activations.tensor_range(x.float(), (1 << bits) - 1)


@tensor_range.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    empty = torch.empty((), dtype=torch.float32, device=x.device)
    return empty, empty.clone()
