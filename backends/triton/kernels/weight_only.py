"""y = x·Ŵᵀ + (x·Vᵀ)·Uᵀ + b, Ŵ decoded on the way: W8A16, W4A16, W2A16, MXFP4, NVFP4, FP8, NF4, n:m, codebooks.

x `[…, K]` float16, bfloat16 or float32, any strides; W `[N, K]` as described in `weights`; b `[N]` or none; y as x.
The low-rank correction is optional: the thin x·Vᵀ comes ready, the rest is added to the sums before they are written.
Sums are float32, as in the reference `linear(x, decode(…), b)`. One token is a matrix-vector product: bound by the
bytes of W, it multiplies without tensor cores, every thread adding up its own columns until the end. More tokens go
through tensor cores as (Ŵ·xᵀ)ᵀ, so that few tokens fill the short side of an instruction and the decoded weights are
its register operand; Ŵ is rounded to the type of x first, as the reference does. float32 is three tf32 products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from .launch import INTERPRETED, Tiling, cdiv, check_dtype, kernel_op, launch, sum_parts, tiling
from .plan import REFERENCE, TUNINGS, Plan, plan, tokens_class
from .weights import (
    Format,
    corrected,
    correction_arguments,
    correction_tile,
    decoded,
    scale_tile,
    table_tile,
    weight_arguments,
    weight_format,
    weight_tile,
)


@triton.jit
def gemv_kernel(
    x, bias, out, low, up, codes, scale, second, zero, table, indices, patterns,
    N, K, rank, groups, stride_k, stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    KEPT: tl.constexpr, OF: tl.constexpr, RANK_BITS: tl.constexpr, BOOKS: tl.constexpr, DIM: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x `[K]` → out `[N]`, or with SPLIT > 1 the partial sums `[SPLIT, N]`, float32, without bias."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    if ELEMENT == "table" or ELEMENT == "additive":
        table = table_tile(table, rows, N, BITS, PER_ROW, BOOKS, DIM)
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
        weights = weight_tile(
            codes, scale, second, zero, table, indices, patterns, rows, start, N, K, groups,
            stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
            ELEMENT, BITS, GROUP, SCALE, ZERO, OFFSET, MANTISSA, BIAS, PER_ROW, KEPT, OF, RANK_BITS, BOOKS, DIM,
            BLOCK_K,
        )  # fmt: skip
        columns = start + tl.arange(0, BLOCK_K)
        values = tl.load(x + columns * stride_k, mask=columns < K, other=0.0)
        sums += weights * values.to(tl.float32)[None, :]
    total = tl.sum(sums, axis=1)
    if GROUP == 0 and SCALE != "none":
        total *= tl.sum(scale_tile(scale, second, rows, 0, N, 1, stride_scale, SCALE, 1), axis=1)
    if low is not None and part == 0:
        for start in tl.range(0, rank, RANK, num_stages=1):
            ranks = start + tl.arange(0, RANK)
            places = up + rows.to(tl.int64)[:, None] * rank + ranks[None, :]
            factors = tl.load(places, mask=(rows < N)[:, None] & (ranks < rank)[None, :], other=0.0)
            thin = tl.load(low + ranks, mask=ranks < rank, other=0.0).to(tl.float32)
            total += tl.sum(factors.to(tl.float32) * thin[None, :], axis=1)
    if SPLIT == 1 and bias is not None:
        total += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + part * N + rows, total.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def matmul_kernel(
    x, bias, out, low, up, codes, scale, second, zero, table, indices, patterns,
    M, N, K, rank, groups, stride_m, stride_k, stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    KEPT: tl.constexpr, OF: tl.constexpr, RANK_BITS: tl.constexpr, BOOKS: tl.constexpr, DIM: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """x `[M, K]` → out `[M, N]`, or with SPLIT > 1 the partial sums `[SPLIT, M, N]`, float32, without bias."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    places = x + tokens.to(tl.int64)[None, :] * stride_m
    if ELEMENT == "table" or ELEMENT == "additive":
        table = table_tile(table, rows, N, BITS, PER_ROW, BOOKS, DIM)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(part * BLOCK_K, K, SPLIT * BLOCK_K):
        weights = weight_tile(
            codes, scale, second, zero, table, indices, patterns, rows, start, N, K, groups,
            stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
            ELEMENT, BITS, GROUP, SCALE, ZERO, OFFSET, MANTISSA, BIAS, PER_ROW, KEPT, OF, RANK_BITS, BOOKS, DIM,
            BLOCK_K,
        )  # fmt: skip
        columns = start + tl.arange(0, BLOCK_K)
        inside = (columns < K)[:, None] & (tokens < M)[None, :]
        values = tl.load(places + columns[:, None] * stride_k, mask=inside, other=0.0)
        weights = weights.to(x.dtype.element_ty)
        if WIDEN:
            weights, values = weights.to(tl.float32), values.to(tl.float32)
        sums = tl.dot(weights, values, sums, input_precision="tf32x3")
    if GROUP == 0 and SCALE != "none":
        sums *= scale_tile(scale, second, rows, 0, N, 1, stride_scale, SCALE, 1)
    if low is not None and part == 0:
        sums += correction_tile(low, up, tokens, rows, M, N, rank, RANK, WIDEN)
    if SPLIT == 1 and bias is not None:
        sums += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    target = out + (part * M + tokens).to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(target, sums.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (tokens < M)[None, :])


def product_plan(M: int, N: int, K: int, encoding: str, dtype: torch.dtype, rank: int = 0) -> Plan:
    """What may run a product."""
    return _plan(tokens_class(M), N, K, encoding, dtype, rank)


@cache
def _plan(M: int, N: int, K: int, encoding: str, dtype: torch.dtype, rank: int) -> Plan:
    fmt = weight_format(encoding)
    assert isinstance(fmt, Format)
    kinds = (encoding, dtype, *([f"rank {rank}"] if rank else []))
    return plan("weight_only_linear", M, N, K, kinds, tilings(M, N, K, fmt))


def tilings(M: int, N: int, K: int, fmt: Format) -> list[Tiling]:
    """The kernels and their blocks for a class of shapes, M the largest of it."""
    if M == 1:
        # 256 bytes of each row, 16 a thread; codes for several weights are so few that the sums bound the block
        block_k = fmt.of // fmt.kept * min(fmt.dim, 4) * 2048 // fmt.bits
        blocks = [(1, 8, block_k, 4, 3), (1, 4, block_k, 4, 3), (1, 8, block_k // 2, 4, 3), (1, 4, block_k // 2, 2, 2)]
    elif M <= 16:
        blocks = [(16, 32, 128, 4, 3), (16, 64, 128, 4, 4), (16, 16, 256, 4, 3), (16, 32, 64, 4, 2)]
    elif M <= 64:
        blocks = [(64, 64, 64, 4, 3), (64, 128, 64, 8, 3), (32, 64, 64, 4, 2)]
    else:
        blocks = [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 32, 4, 2)]
    kernel = "gemv" if M == 1 else "skinny matmul" if M <= 16 else "matmul"
    least = 8 * fmt.of if fmt.sparse else 1  # eight ranks fill whole bytes
    return [tiling(kernel, M, N, K, m, n, max(k, least), *launch) for m, n, k, *launch in blocks]


@kernel_op("weight_only_linear")
def weight_only_linear(
    x: Tensor,
    arrays: Sequence[Tensor],
    encoding: str,
    out_features: int,
    bias: Tensor | None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """x `[…, K]` → `[…, N]`; `arrays` and `encoding` are those of `paretoc::decode`; low `[…, rank]` = x·Vᵀ and
    up `[N, rank]` = U, in the type of x, contiguous."""
    check_dtype(x)
    K = int(x.shape[-1])  # with the blocks, no size that `torch.compile` may leave open
    tokens = x.reshape(-1, K)
    M, N = tokens.shape[0], out_features
    weight = weight_arguments(arrays, encoding, (N, K)) | correction_arguments(low, up)

    def run(tile: Tiling) -> Tensor:
        if tile == REFERENCE:
            return corrected(linear(tokens, decoded(arrays, encoding, (N, K), x.dtype), bias), low, up)
        out = x.new_empty((tile.split, M, N), dtype=torch.float32 if tile.split > 1 else x.dtype)
        arguments = {"x": tokens, "bias": bias, "out": out, "N": N, "K": K, "stride_k": tokens.stride(1)}
        arguments |= weight | tile.constants
        if M == 1:
            del arguments["BLOCK_M"]
            launch(gemv_kernel, (cdiv(N, tile.block_n), tile.split), **arguments)
        else:
            grid = (cdiv(N, tile.block_n), cdiv(M, tile.block_m), tile.split)
            # the interpreter would multiply the bit patterns of bfloat16
            widen = INTERPRETED and x.dtype == torch.bfloat16
            launch(matmul_kernel, grid, **arguments, M=M, stride_m=tokens.stride(0), WIDEN=widen)
        return sum_parts(out, bias, x.dtype)

    y = TUNINGS.run(product_plan(M, N, K, encoding, x.dtype, weight["rank"]), x, run)
    return y.reshape(*x.shape[:-1], N)


@weight_only_linear.register_fake
def _(
    x: Tensor,
    arrays: Sequence[Tensor],
    encoding: str,
    out_features: int,
    bias: Tensor | None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
