"""y[m, n] = sx[m] · sw[n] · Σ_k (cx[m, k] − zx) · cw[n, k] + b[n]: both factors in 8 bits. W8A8, W4A8, W4A4, FP8.

cx `[M, K]` int8 or a float8, contiguous, with scales sx `[M]` or `[]` and, for a range of the whole tensor, a zero
point zx `[]`; W `[N, K]` as described in `weights`: integers of up to 8 bits, or the same float8; b `[N]` or none; y in
the floating type asked for. Integer sums are exact within a group of weights, int32, then scaled into float32 sums; a
zero point costs the row sums of the weights, found on the way. Like `weight_only`, (W·cxᵀ)ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....compiler.dialect.activations import FLOATS
from .launch import Tiling, cdiv, launch, split_k, sum_parts
from .weights import Format, code_tile, scale_tile, weight_arguments, weight_format, zero_tile

#: the fewest columns that 8-bit tensor cores multiply at once
_LEAST_K = 32
#: mantissa bits of the float8 types
_MANTISSA = {"e4m3": 3, "e5m2": 2}


@triton.jit
def quantized_matmul_kernel(
    x, x_scale, x_zero, bias, out, codes, scale, second, zero, table, indices,
    M, N, K, groups, stride_x_scale, stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr, SPARSE: tl.constexpr,
    BOOKS: tl.constexpr, DIM: tl.constexpr, X_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x `[M, K]` → out `[M, N]`, or with SPLIT > 1 the partial sums `[SPLIT, M, N]`, float32, without bias."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    places = x + tokens.to(tl.int64)[None, :] * K
    EXACT: tl.constexpr = GROUP == 0 and ELEMENT == "integer"
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
        if EXACT:
            sums = tl.dot(weights, values, sums, out_dtype=tl.int32)
        elif ELEMENT == "integer":
            sums += tl.dot(weights, values, out_dtype=tl.int32).to(tl.float32) * factor
        elif GROUP > 0:
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
    total *= tl.load(x_scale + tokens * stride_x_scale, mask=tokens < M, other=0.0)[None, :]
    if SPLIT == 1 and bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    target = out + (part * M + tokens).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


def quantized_format(encoding: str, code: str) -> Format | str:
    """The format of weights that multiply activations of this code in 8 bits, or a sentence why they do not."""
    fmt = weight_format(encoding)
    if isinstance(fmt, str):
        return fmt
    if fmt.sparse:
        return "the weights are 2:4 sparse"
    if 0 < fmt.group < _LEAST_K:
        return f"8-bit tensor cores multiply {_LEAST_K} columns at once, more than a group of {fmt.group}"
    if code in FLOATS:
        same = fmt.element == "float" and fmt.bits == 8 and fmt.mantissa == _MANTISSA[code]
        return fmt if same else f"the weights are not {code}, like the activations"
    if fmt.element != "integer" or fmt.zero == "float":
        return "the weights are no integers, as the activations are"
    return "8-bit weights less their zero point need 9 bits" if fmt.zero != "none" and fmt.bits == 8 else fmt


def tiling(M: int, N: int, K: int, fmt: Format) -> Tiling:
    """The blocks for a class of shapes: no block of K lies in two groups."""
    block_k = min(fmt.group or 128, 128)
    if M <= 64:
        block_m = 16 if M <= 16 else 64
        return Tiling("8-bit matmul", block_m, 64, block_k, split_k(cdiv(N, 64), cdiv(K, block_k)))
    return Tiling("8-bit matmul", 128, 128, block_k, num_warps=8)


@torch.library.triton_op("paretoc_triton::quantized_linear", mutates_args=())
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
) -> Tensor:
    """Codes `[…, K]` and scales as `quantize` made them, of `x_bits` where they have a zero point → `[…, N]`."""
    K, N = x.shape[-1], out_features
    tokens = x.reshape(-1, K)
    M = tokens.shape[0]
    fmt = weight_format(encoding)
    assert isinstance(fmt, Format)
    tile = tiling(M, N, K, fmt)
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
        stride_x_scale=0 if x_scale.numel() == 1 else 1,
        X_OFFSET=1 << x_bits - 1,
        **weight_arguments(arrays, encoding, (N, K)),
        **tile.constants,
    )
    return sum_parts(out, bias, dtype).reshape(*x.shape[:-1], N)


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
) -> Tensor:
    return torch.empty((*x.shape[:-1], out_features), dtype=dtype, device=x.device)
