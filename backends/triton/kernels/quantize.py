"""x → codes and scales: the activation quantisers of the dialect, without the multiplication back.

`quantize_tokens`: one scale for each token, over the last axis; scale = max|x| / top, code = x / scale rounded to an
integer (a half to even) or to E4M3 or E5M2. A layer norm or an RMS norm in front is computed on the way: x is read
once, the normalised value never written. `quantize_range`: unsigned codes under a given scale and zero point of the
whole tensor, stored less 2^(bits−1), so that they are int8.

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
from .launch import cdiv, check_dtype, launch

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
    NORM: tl.constexpr, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row of x `[M, K]` → codes `[M, K]`, scales `[M]`; MANTISSA −1: integers."""
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
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values)), 1e-8), TOP)
    shrunk = tl.clamp(tl.div_rn(values, scale), -TOP, TOP)
    shrunk = round_half_even(shrunk) if MANTISSA < 0 else round_float(shrunk, MANTISSA, LEAST)
    tl.store(codes + row * K + columns, shrunk.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def quantize_range_kernel(x, scale, zero, codes, count, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """x `[count]`, scale and zero of the whole tensor → codes `[count]` less (LEVELS + 1) / 2."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + places, mask=places < count, other=0.0).to(tl.float32)
    # clamped first: far outside the range, rounding would need more bits than float32 has
    steps = tl.clamp(tl.div_rn(values, tl.load(scale)), -2.0 * LEVELS, 2.0 * LEVELS)
    shifted = tl.clamp(round_half_even(steps) + tl.load(zero).to(tl.float32), 0.0, LEVELS)
    tl.store(codes + places, (shifted - (LEVELS + 1) // 2).to(tl.int8), mask=places < count)


@torch.library.triton_op("paretoc_triton::quantize_tokens", mutates_args=())
def quantize_tokens(
    x: Tensor, code: str, norm: str = "none", weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x `[…, K]` → codes `[…, K]`, int8 or a float8, and scales `[M]`, float32. `norm`: "none", "layer" or "rms"."""
    check_dtype(x)
    codes, scales = _outputs(x, code)
    K = x.shape[-1]
    rows = x.reshape(-1, K)
    top, mantissa, least = _number(code)
    block = triton.next_power_of_2(K)
    launch(
        quantize_tokens_kernel,
        (rows.shape[0],),
        x=rows,
        weight=weight,
        bias=bias,
        codes=codes,
        scales=scales,
        K=K,
        stride_m=rows.stride(0),
        stride_k=rows.stride(1),
        eps=eps,
        NORM=norm,
        TOP=top,
        MANTISSA=mantissa,
        LEAST=least,
        BLOCK_K=block,
        num_warps=min(max(block // 1024, 1), 16),
    )
    return codes, scales


@quantize_tokens.register_fake
def _(
    x: Tensor, code: str, norm: str = "none", weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    return _outputs(x, code)


def _number(code: str) -> tuple[float, int, int]:
    """The largest code, mantissa bits (−1: an integer) and the exponent of the smallest normal number."""
    if code in INTEGERS:
        return float((1 << INTEGERS[code] - 1) - 1), -1, 0
    limits = torch.finfo(FLOATS[code])
    return limits.max, -round(math.log2(limits.eps)), round(math.log2(limits.smallest_normal))


def _outputs(x: Tensor, code: str) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=FLOATS.get(code, torch.int8), device=x.device)
    return codes, torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)


@torch.library.triton_op("paretoc_triton::quantize_range", mutates_args=())
def quantize_range(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x `[…]`, scale float32 `[]`, zero `[]` in 0 … 2^bits − 1 → int8 `[…]`: the unsigned codes less 2^(bits−1)."""
    check_dtype(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    count = x.numel()
    grid = (cdiv(count, _BLOCK),)
    arguments = {"x": x.reshape(-1), "scale": scale, "zero": zero, "codes": codes, "count": count}
    launch(quantize_range_kernel, grid, **arguments, LEVELS=(1 << bits) - 1, BLOCK=_BLOCK)
    return codes


@quantize_range.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.custom_op("paretoc_triton::tensor_range", mutates_args=())
def tensor_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """x → scale `[]` and zero point `[]`, float32, of unsigned codes of so many bits: plain PyTorch."""
    return activations.tensor_range(x.float(), (1 << bits) - 1)


@tensor_range.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    empty = torch.empty((), dtype=torch.float32, device=x.device)
    return empty, empty.clone()
