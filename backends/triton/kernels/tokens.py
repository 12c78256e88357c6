"""Token merging: the best partner of each token, its score never written, and the weighted means.

The operators are those of `paretoc.compiler.dialect.tokens` (Bolya et al. 2023, "Token Merging: Your ViT But Faster",
section 3). Matching: metric `[B, T, D]`, any strides; a block of A meets all of B in tiles, whose cosines
a·b / (|a|·|b|) live in registers, and keeps the largest. Choosing the r best pairs is a sort of `[B, A]` numbers, left
to PyTorch. Merging: a program for each output token reads it and what moves to it, in order, so that equal inputs give
equal outputs; x' `[B, T−r, C]` and size' `[B, T−r, 1]` are written once.

Sums are float32: a pair whose score ties with another up to rounding may be chosen instead of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....compiler.dialect.tokens import check_match, select_pairs
from .launch import INTERPRETED, cdiv, check_dtype, kernel_op, launch

_BLOCK = 64
#: the smallest norm that is divided by, as in `torch.nn.functional.normalize`
_EPS = 1e-12


@triton.jit
def match_kernel(
    metric, best, partner, A, B, D, first_a, first_b, stride_b, stride_t, stride_d, EPS: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens first_a, first_a + 2, … (A of them) and first_b, first_b + 2, … (B) → best, partner `[batch, A]`."""
    batch = tl.program_id(1)
    source = metric + batch.to(tl.int64) * stride_b
    rows = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    top = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_A,), tl.int32)
    norms = tl.zeros((BLOCK_A,), tl.float32)
    for start in range(0, B, BLOCK_B):
        columns = start + tl.arange(0, BLOCK_B)
        products = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        lengths = tl.zeros((BLOCK_B,), tl.float32)
        norms = tl.zeros((BLOCK_A,), tl.float32)
        for d in range(0, D, BLOCK_D):
            depth = d + tl.arange(0, BLOCK_D)
            a = tl.load(
                source + (first_a + 2 * rows)[:, None] * stride_t + depth[None, :] * stride_d,
                mask=(rows < A)[:, None] & (depth < D)[None, :],
                other=0.0,
            )
            b = tl.load(
                source + (first_b + 2 * columns)[None, :] * stride_t + depth[:, None] * stride_d,
                mask=(columns < B)[None, :] & (depth < D)[:, None],
                other=0.0,
            )
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            products = tl.dot(a, b, products, input_precision="tf32x3")
            norms += tl.sum(a.to(tl.float32) * a.to(tl.float32), axis=1)
            lengths += tl.sum(b.to(tl.float32) * b.to(tl.float32), axis=0)
        scores = products / tl.maximum(tl.sqrt(lengths), EPS)[None, :]
        scores = tl.where((columns < B)[None, :], scores, float("-inf"))
        block_top = tl.max(scores, axis=1)
        block_where = start + tl.argmax(scores, axis=1)
        where = tl.where(block_top > top, block_where, where)
        top = tl.maximum(block_top, top)
    top /= tl.maximum(tl.sqrt(norms), EPS)
    tl.store(best + batch * A + rows, top, mask=rows < A)
    tl.store(partner + batch * A + rows, where.to(tl.int64), mask=rows < A)


@triton.jit
def merge_kernel(
    x, size, unmerged, source, destination, out, out_size, kept, r, C,
    stride_b, stride_t, stride_c, size_b, size_t, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One output token: one of the `kept` of A as it is, or one of B with those that move to it."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    x += batch * stride_b + columns * stride_c
    size += batch * size_b
    place = batch * tl.num_programs(0) + token
    if token < kept:
        read = 2 * tl.load(unmerged + batch * kept + token)
        total = tl.load(size + read * size_t).to(tl.float32)
        mean = tl.load(x + read * stride_t, mask=columns < C, other=0.0).to(tl.float32)
    else:
        read = 2 * (token - kept).to(tl.int64) + 1
        total = tl.load(size + read * size_t).to(tl.float32)
        mean = tl.load(x + read * stride_t, mask=columns < C, other=0.0).to(tl.float32) * total
        for i in range(r):
            if tl.load(destination + batch * r + i) == token - kept:
                read = 2 * tl.load(source + batch * r + i)
                weight = tl.load(size + read * size_t).to(tl.float32)
                mean += tl.load(x + read * stride_t, mask=columns < C, other=0.0).to(tl.float32) * weight
                total += weight
        mean /= total
    tl.store(out + place * C + columns, mean.to(out.dtype.element_ty), mask=columns < C)
    tl.store(out_size + place, total.to(out_size.dtype.element_ty))


@kernel_op("bipartite_match")
def bipartite_match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like `paretoc::bipartite_match`."""
    check_dtype(metric)
    batch, T, D = *metric.shape[:2], int(metric.shape[2])
    check_match(T, r, protected)
    in_a, in_b = (protected + 1) // 2, protected // 2
    A, B = (T + 1) // 2 - in_a, T // 2 - in_b
    best = torch.empty((batch, A), dtype=torch.float32, device=metric.device)
    partner = torch.empty((batch, A), dtype=torch.int64, device=metric.device)
    launch(
        match_kernel,
        (cdiv(A, _BLOCK), batch),
        metric=metric,
        best=best,
        partner=partner,
        A=A,
        B=B,
        D=D,
        first_a=2 * in_a,
        first_b=2 * in_b + 1,
        stride_b=metric.stride(0),
        stride_t=metric.stride(1),
        stride_d=metric.stride(2),
        EPS=_EPS,
        WIDEN=INTERPRETED and metric.dtype == torch.bfloat16,
        BLOCK_A=_BLOCK,
        BLOCK_B=_BLOCK,
        BLOCK_D=min(max(triton.next_power_of_2(D), 16), _BLOCK),
    )
    return select_pairs(best, partner, r, protected)


@bipartite_match.register_fake
def _(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.paretoc.bipartite_match(metric, r, protected)
    return result


@kernel_op("merge_tokens")
def merge_tokens(
    x: Tensor, size: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    """Like `paretoc::merge_tokens`."""
    check_dtype(x)
    batch, T, C = *x.shape[:2], int(x.shape[2])
    kept, r = unmerged.shape[1], source.shape[1]
    out, out_size = x.new_empty(batch, T - r, C), size.new_empty(batch, T - r, 1)
    block = triton.next_power_of_2(C)
    launch(
        merge_kernel,
        (T - r, batch),
        x=x,
        size=size,
        unmerged=unmerged.contiguous(),
        source=source.contiguous(),
        destination=destination.contiguous(),
        out=out,
        out_size=out_size,
        kept=kept,
        r=r,
        C=C,
        stride_b=x.stride(0),
        stride_t=x.stride(1),
        stride_c=x.stride(2),
        size_b=size.stride(0),
        size_t=size.stride(1),
        BLOCK_C=block,
        num_warps=min(max(block // 512, 1), 8),
    )
    return out, out_size


@merge_tokens.register_fake
def _(x: Tensor, size: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.paretoc.merge_tokens(x, size, unmerged, source, destination)
    return result
