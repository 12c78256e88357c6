"""y[m, n] = sx[m] · sw[n] · Σ_k (cx[m, k] − zx) · cw[n, k] + b[n]: both factors in 8 bits. W8A8, W4A8, W4A4, FP8.

cx `[M, K]` int8 or a float8, contiguous, with contiguous scales sx `[M, K/group]`, or `[]` and, for a range of the
whole tensor, a zero point zx `[]`; W `[N, K]` as described in `weights`: integers of up to 8 bits, or the same float8;
b `[N]` or none; y in the floating type asked for. Integer sums are exact within a group of either, int32, then scaled
into float32 sums; a zero point costs the row sums of the weights, found on the way. Like `weight_only`, (W·cxᵀ)ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ....compiler.dialect.activations import FLOATS
from .launch import INTERPRETED, Tiling, cdiv, kernel_op, launch, sum_parts, tiling
from .plan import REFERENCE, TUNINGS, Plan, plan, tokens_class
from .weights import (
    Format,
    code_tile,
    corrected,
    correction_arguments,
    correction_tile,
    decoded,
    scale_tile,
    weight_arguments,
    weight_format,
    zero_tile,
)

#: the fewest columns that 8-bit tensor cores multiply at once
_LEAST_K = 32
#: mantissa bits of the float8 types
_MANTISSA = {"e4m3": 3, "e5m2": 2}


@triton.jit
def quantized_matmul_kernel(
    x, x_scale, x_zero, bias, out, low, up, codes, scale, second, zero, table, indices, patterns,
    M, N, K, rank, groups, stride_x_scale, stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    KEPT: tl.constexpr, OF: tl.constexpr, RANK_BITS: tl.constexpr, BOOKS: tl.constexpr, DIM: tl.constexpr,
    X_OFFSET: tl.constexpr, X_GROUP: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x `[M, K]` → out `[M, N]`, or with SPLIT > 1 the partial sums `[SPLIT, M, N]`, float32, without bias."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    places = x + tokens.to(tl.int64)[None, :] * K
    GROUPED: tl.constexpr = GROUP > 0 or X_GROUP > 0
    EXACT: tl.constexpr = ELEMENT == "integer" and not GROUPED
    x_scale += tokens * stride_x_scale
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if EXACT else tl.float32)
    row_sums = tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        group = start // GROUP if GROUP > 0 else 0
        weights = code_tile(codes, rows, start, N, stride_codes, row_bytes, BITS, BLOCK_K)
        if ELEMENT == "float":
            weights = weights.to(x.dtype.element_ty, bitcast=True)
        elif ZERO == "none":
            weights = (weights.to(tl.int16) - OFFSET).to(tl.int8)
        else:
            points = zero_tile(zero, rows, group, N, groups, stride_zero, ZERO, BITS, 1)
            weights = (weights.to(tl.int16) - points.to(tl.int16)).to(tl.int8)
        inside = (columns < K)[:, None] & (tokens < M)[None, :]
        values = tl.load(places + columns[:, None], mask=inside, other=0.0 if ELEMENT == "float" else 0)
        factor = 1.0
        if GROUP > 0:
            factor = scale_tile(scale, second, rows, group, N, groups, stride_scale, SCALE, 1)
        if X_GROUP > 0:
            factor *= tl.load(x_scale + start // X_GROUP, mask=tokens < M, other=0.0)[None, :]
        if EXACT:
            sums = tl.dot(weights, values, sums, out_dtype=tl.int32)
        elif ELEMENT == "integer":
            sums += tl.dot(weights, values, out_dtype=tl.int32).to(tl.float32) * factor
        elif GROUPED:
            sums += tl.dot(weights, values) * factor
        else:  # the tensor cores of sm_90 add float8 products with 14 bits: no more than a block of them
            sums = tl.dot(weights, values, sums, max_num_imprecise_acc=BLOCK_K)
        if x_zero is not None:
            kept = tl.where((columns < K)[None, :], weights.to(tl.int32), 0)
            row_sums += tl.sum(kept, axis=1, keep_dims=True).to(tl.float32) * factor
    total = sums.to(tl.float32)
    if x_zero is not None:
        total -= row_sums * (tl.load(x_zero).to(tl.float32) - X_OFFSET)
    if GROUP == 0:
        total *= scale_tile(scale, second, rows, 0, N, 1, stride_scale, SCALE, 1)
    if X_GROUP == 0:
        total *= tl.load(x_scale, mask=tokens < M, other=0.0)[None, :]
    if low is not None and part == 0:
        total += correction_tile(low, up, tokens, rows, M, N, rank, RANK, WIDEN)
    if SPLIT == 1 and bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    target = out + (part * M + tokens).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


def quantized_format(encoding: str, code: str, x_group: int = 0) -> Format | str:
    """The format of weights that multiply activations of this code, with a scale for each `x_group` of K or for all of
    it, in 8 bits; or a sentence why they do not."""
    fmt = weight_format(encoding)
    if isinstance(fmt, str):
        return fmt
    if fmt.sparse:
        return f"the weights are {fmt.kept}:{fmt.of} sparse"
    group = min((g for g in (fmt.group, x_group) if g), default=_LEAST_K)
    if group < _LEAST_K:
        return f"8-bit tensor cores multiply {_LEAST_K} columns at once, more than a group of {group}"
    if x_group & (x_group - 1):
        return f"groups of {x_group} are no power of two"
    if code in FLOATS:
        same = fmt.element == "float" and fmt.bits == 8 and fmt.mantissa == _MANTISSA[code]
        return fmt if same else f"the weights are not {code}, like the activations"
    if fmt.element != "integer" or fmt.zero == "float":
        return "the weights are no integers, as the activations are"
    return "8-bit weights less their zero point need 9 bits" if fmt.zero != "none" and fmt.bits == 8 else fmt


def product_plan(
    M: int, N: int, K: int, encoding: str, x_dtype: torch.dtype, x_group: int, dtype: torch.dtype, rank: int = 0
) -> Plan:
    """What may run a product."""
    return _plan(tokens_class(M), N, K, encoding, x_dtype, x_group, dtype, rank)


@cache
def _plan(
    M: int, N: int, K: int, encoding: str, x_dtype: torch.dtype, x_group: int, dtype: torch.dtype, rank: int
) -> Plan:
    fmt = weight_format(encoding)
    assert isinstance(fmt, Format)
    kinds = (encoding, x_dtype, x_group, dtype, *([f"rank {rank}"] if rank else []))
    group = min((g for g in (fmt.group, x_group) if g), default=0)
    return plan("quantized_linear", M, N, K, kinds, tilings(M, N, K, group))


def tilings(M: int, N: int, K: int, group: int) -> list[Tiling]:
    """The blocks for a class of shapes, M the largest of it: no block of K lies in two groups."""
    block_k = min(group or 128, 128)
    if M <= 16:
        blocks = [(16, 64, 4, 3), (16, 32, 4, 4), (16, 128, 8, 3), (16, 32, 4, 2)]
    elif M <= 64:
        blocks = [(64, 64, 4, 3), (64, 128, 8, 3), (32, 64, 4, 2)]
    elif group:  # two sums, of the group and of all: larger blocks run out of registers
        blocks = [(128, 64, 4, 3), (64, 128, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2)]
    else:
        blocks = [(128, 128, 8, 3), (128, 256, 8, 3), (128, 64, 4, 3), (64, 64, 4, 2)]
    return [tiling("8-bit matmul", M, N, K, m, n, block_k, warps, stages) for m, n, warps, stages in blocks]


@kernel_op("quantized_linear")
def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    x_bits: int,
    arrays: Sequence[Tensor],
    encoding: str,
    out_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Codes `[…, K]` and scales as `quantize` made them, of `x_bits` where they have a zero point → `[…, N]`;
    low and up as in `weight_only_linear`, in `dtype`."""
    K, N = int(x.shape[-1]), out_features
    tokens = x.reshape(-1, K)
    M = tokens.shape[0]
    x_group = x_group_of(x_scale, K)
    weight = weight_arguments(arrays, encoding, (N, K)) | correction_arguments(low, up)

    def run(tile: Tiling) -> Tensor:
        if tile == REFERENCE:
            values = dequantized(tokens, x_scale, x_zero, x_bits)
            return corrected(linear(values.to(dtype), decoded(arrays, encoding, (N, K), dtype), bias), low, up)
        out = torch.empty((tile.split, M, N), dtype=torch.float32 if tile.split > 1 else dtype, device=x.device)
        launch(
            quantized_matmul_kernel,
            (cdiv(N, tile.block_n), cdiv(M, tile.block_m), tile.split),
            x=tokens,
            x_scale=x_scale,
            x_zero=x_zero,
            bias=bias,
            out=out,
            M=M,
            N=N,
            K=K,
            stride_x_scale=x_scale.shape[1] if x_scale.ndim else 0,
            X_OFFSET=1 << x_bits - 1,
            X_GROUP=x_group,
            WIDEN=INTERPRETED and dtype == torch.bfloat16,
            **weight,
            **tile.constants,
        )
        return sum_parts(out, bias, dtype)

    y = TUNINGS.run(product_plan(M, N, K, encoding, x.dtype, x_group, dtype, weight["rank"]), tokens, run)
    return y.reshape(*x.shape[:-1], N)


def x_group_of(x_scale: Tensor, K: int) -> int:
    """The channels under one scale; 0 where it holds for all of them."""
    return K // x_scale.shape[1] if x_scale.ndim and x_scale.shape[1] > 1 else 0


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes `[M, K]` → float32."""
    if zero is not None:
        return (codes.float() + (1 << bits - 1) - zero) * scale
    groups: Tensor = codes.float().reshape(len(codes), scale.shape[1], -1) * scale.unsqueeze(2)
    return groups.flatten(1)


@quantized_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    x_bits: int,
    arrays: Sequence[Tensor],
    encoding: str,
    out_features: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    return torch.empty((*x.shape[:-1], out_features), dtype=dtype, device=x.device)
