"""softmax(q·kᵀ·scale + bias)·v in one pass over the keys: with sizes of merged tokens, or on a cache of codes.

Dao 2023, "FlashAttention-2", section 3.1: a block of queries meets the keys block by block and keeps the running
maximum and sum of each row, so that no score is written. The bias may be one number a key, as the logarithm of the
number of tokens that were merged into it (Bolya et al. 2023, "Token Merging", equation 3), or a mask. Keys and values
may be codes of `cache`, decoded in registers: a key's scale multiplies its scores. Where queries are few, several
programs share the keys of each (split-K), and the heads that read the same keys are the rows of one block.

Sums are float32; probabilities are rounded to the type of q before they meet the values, float32 is three tf32
products. A query that may attend to nothing gets zeros, as in PyTorch. `causal`: query i sees the keys up to i.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .cache import cache_tile, decode_cache, packed
from .launch import INTERPRETED, Tiling, cdiv, check_dtype, kernel_op, launch, padded
from .plan import REFERENCE, TUNINGS, Plan, plan, tokens_class

#: the widest head: a block of keys and one of values fit beside the sums
MAX_WIDTH = 256


@triton.jit
def attention_kernel(
    query, key, value, bias, out, sums_of, key_scale, value_scale, starts, key_starts, M, N, D, repeats, scale,
    query_b, query_h, query_m, key_b, key_h, key_n, value_b, value_h, value_n, bias_b, bias_h, bias_m, bias_n,
    out_b, out_h, out_m, out_part, scale_b, scale_h,
    CAUSAL: tl.constexpr, PER_KEY: tl.constexpr, PACKED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence → their rows of out, or with SPLIT > 1 of its part of the keys, and
    `sums_of` `[SPLIT, batch, heads, M]`: the logarithm of its sum of exponentials. With starts, sequences lie one
    behind the other and M, N are the longest. The last axis of everything is contiguous but that of the bias."""
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    block, part = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if starts is not None:
        first, first_key = tl.load(starts + batch), tl.load(key_starts + batch)
        M, N = tl.load(starts + batch + 1) - first, tl.load(key_starts + batch + 1) - first_key
        query += first.to(tl.int64) * query_m
        out += first.to(tl.int64) * out_m
        key += first_key.to(tl.int64) * key_n
        value += first_key.to(tl.int64) * value_n
        if bias is not None:
            bias += first_key.to(tl.int64) * bias_n
        batch = batch * 0
    depth = tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (depth < D)[None, :]
    places = rows.to(tl.int64)[:, None]
    queries = tl.load(query + batch * query_b + head * query_h + places * query_m + depth[None, :], inside, 0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    key += batch * key_b + head // repeats * key_h
    value += batch * value_b + head // repeats * value_h
    if bias is not None:
        bias += batch * bias_b + head * bias_h
    if key_scale is not None:
        key_scale += batch * scale_b + head // repeats * scale_h
        value_scale += batch * scale_b + head // repeats * scale_h
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(N, (block + 1) * BLOCK_M) if CAUSAL else N
    for start in range(part * BLOCK_N, end, SPLIT * BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        live = columns < N
        if key_scale is not None:
            keys = cache_tile(key, columns.to(tl.int64) * key_n, live, D, PACKED, BLOCK_D).to(queries.dtype)
            values = cache_tile(value, columns.to(tl.int64) * value_n, live, D, PACKED, BLOCK_D)
            values = (values * tl.load(value_scale + columns, live, 0.0)[:, None]).to(query.dtype.element_ty)
        else:
            held = live[:, None] & (depth < D)[None, :]
            keys = tl.load(key + columns.to(tl.int64)[:, None] * key_n + depth[None, :], held, 0.0)
            values = tl.load(value + columns.to(tl.int64)[:, None] * value_n + depth[None, :], held, 0.0)
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * scale
        if key_scale is not None:
            scores *= tl.load(key_scale + columns, live, 0.0)[None, :]
        seen = live[None, :] & (rows[:, None] >= columns[None, :]) if CAUSAL else live[None, :]
        if bias is not None:
            if PER_KEY:
                added = tl.load(bias + columns * bias_n, live, 0)[None, :]
            else:
                added = tl.load(
                    bias + places * bias_m + columns[None, :] * bias_n, (rows < M)[:, None] & live[None, :], 0
                )
            if bias.dtype.element_ty == tl.uint8:
                seen = seen & (added != 0)
            else:
                scores += added.to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(largest > float("-inf"), largest, 0.0)
        weights = tl.exp2((scores - finite[:, None]) * 1.4426950408889634)
        shrink = tl.exp2((top - finite) * 1.4426950408889634)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="tf32x3")
        top = largest
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    target = out + part.to(tl.int64) * out_part + batch * out_b + head * out_h + places * out_m + depth[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    if SPLIT > 1:
        place = (part * tl.num_programs(2) + batch) * tl.num_programs(1) + head
        tl.store(sums_of + place * M + rows, top + tl.log(tl.maximum(total, 1e-37)), mask=rows < M)


def attention_plan(M: int, N: int, D: int, dtype: torch.dtype, code: str = "", bias: str = "") -> Plan:
    """What may run an attention of M queries and N keys. `code`: "", that of a cache, or "packed"; `bias`: "",
    "per key" or "mask"."""
    return _plan(tokens_class(M), tokens_class(N), D, dtype, code, bias)


@cache
def _plan(M: int, N: int, D: int, dtype: torch.dtype, code: str, bias: str) -> Plan:
    kinds = (dtype, *filter(None, (code, bias)))
    return plan("attention", M, N, D, kinds, tilings(M, N, D, dtype))


def tilings(M: int, N: int, D: int, dtype: torch.dtype) -> list[Tiling]:
    """The blocks of queries and of keys for a class of shapes, M and N the largest of it."""
    if D > MAX_WIDTH:
        return []
    if M <= 16:
        parts = [(min(cdiv(N, 256), 64), 4, 3), (min(cdiv(N, 1024), 16), 4, 3), (1, 4, 2)]
        return [Tiling("attention", 16, 64, padded(D), *part) for part in dict.fromkeys(parts)]
    if D > 128 or dtype == torch.float32:
        blocks = [(64, 32, 4, 2), (32, 32, 4, 2)]
    else:
        blocks = [(128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 2)]
    return [Tiling("attention", m, n, padded(D), 1, warps, stages) for m, n, warps, stages in blocks]


@kernel_op("attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    code: str = "",
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """query `[B, H, M, D]`, key and value `[B, G, N, D]`, G a divisor of H → `[B, H, M, D]`, tokens before heads in
    memory; or key and value as `quantize_cache` made them, with their scales `[B, G, N]`.

    bias is added to the scores, or bool (false: not seen), in a shape that broadcasts to `[B, H, M, N]`.
    """
    check_dtype(query)
    (batch, heads, M, D), (groups, N) = query.shape, key.shape[1:3]
    per_key = bias is None or bias.ndim < 2 or bias.shape[-2] == 1
    # the query heads of one key head become its rows: the keys are read once
    joined = M == 1 and not causal and (bias is None or bias.ndim < 3 or bias.shape[-3] == 1)
    queries = query.reshape(batch, groups, -1, D) if joined else query
    added = None if bias is None else bias.expand(*queries.shape[:3], N)

    def run(tile: Tiling) -> Tensor:
        if tile == REFERENCE:
            keys, values = key, value
            if key_scale is not None and value_scale is not None:
                keys = decode_cache(key, key_scale, code, query.dtype)
                values = decode_cache(value, value_scale, code, query.dtype)
            return reference(query, keys, values, bias, causal, scale)
        dtype = torch.float32 if tile.split > 1 else query.dtype
        out = torch.empty((tile.split, batch, M, heads, D), dtype=dtype, device=query.device)
        parts = out.reshape(tile.split, *queries.shape) if joined else out.transpose(2, 3)
        sums = torch.empty(parts.shape[:-1], dtype=torch.float32, device=query.device)
        scales = (key_scale, value_scale)
        _launch(queries, key, value, added, parts, sums, causal, scale, tile, per_key, N, code, scales)
        if tile.split == 1:
            return out[0].transpose(1, 2)
        weights = torch.softmax(sums, 0).nan_to_num(0.0).unsqueeze(-1)  # none where no part has a key
        total = (parts * weights).sum(0).to(query.dtype).reshape(query.shape)
        return total.transpose(1, 2).contiguous().transpose(1, 2)

    kind = "" if bias is None else "per key" if per_key else "mask"
    return TUNINGS.run(attention_plan(M, N, int(D), query.dtype, code, kind), query, run)


@attention.register_fake
def _(query: Tensor, *others: Any, **more: Any) -> Tensor:
    batch, heads, M, D = query.shape
    return query.new_empty(batch, M, heads, D).transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """What PyTorch has; tokens before heads in memory."""
    if causal and bias is not None:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        bias = bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    grouped = k.shape[1] < q.shape[1]
    causal = causal and bias is None
    y = scaled_dot_product_attention(q, k, v, bias, 0.0, causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@kernel_op("packed_attention")
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Sequences of any lengths, one behind the other: query `[ΣM, H, D]`, key and value `[ΣN, G, D]` → `[ΣM, H, D]`.

    starts and key_starts int32 `[B + 1]`: where the sequences begin, and the end; `longest` the most queries of one.
    bias `[ΣN]`: one number a key, float.
    """
    check_dtype(query)
    added = None if bias is None else bias.expand(1, query.shape[1], 1, -1)

    def run(tile: Tiling) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        q, k, v, y = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value, out))
        ends = (starts, key_starts, longest)
        _launch(q, k, v, added, y.unsqueeze(0), None, causal, scale, tile, True, 0, starts=ends)
        return out

    kind = "" if bias is None else "per key"
    known = attention_plan(longest, 1, int(query.shape[2]), query.dtype, "packed", kind)
    return TUNINGS.run(Plan(known.key, known.tilings[:-1]), query, run)  # PyTorch has nothing to fall back on


@packed_attention.register_fake
def _(query: Tensor, *others: Any, **more: Any) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sums: Tensor | None,
    causal: bool,
    scale: float,
    tile: Tiling,
    per_key: bool,
    N: int,
    code: str = "",
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    starts: tuple[Tensor, Tensor, int] | None = None,
) -> None:
    """out is `[SPLIT, B, H, M, D]`, whatever its strides."""
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    if bias is not None and bias.dtype == torch.bool:
        bias = bias.view(torch.uint8)
    first, first_key, M = starts or (None, None, query.shape[2])
    places = {
        "query": query.stride()[:3],
        "key": key.stride()[:3],
        "value": value.stride()[:3],
        "bias": (0, 0, 0, 0) if bias is None else bias.stride(),
        "out": out.stride()[1:4],
    }
    names = {"query": "bhm", "key": "bhn", "value": "bhn", "bias": "bhmn", "out": "bhm"}
    strides = {f"{t}_{axis}": step for t, axes in names.items() for axis, step in zip(axes, places[t], strict=True)}
    launch(
        attention_kernel,
        (cdiv(M, tile.block_m) * tile.split, query.shape[1], query.shape[0] if first is None else first.shape[0] - 1),
        query=query,
        key=key,
        value=value,
        bias=bias,
        out=out,
        sums_of=sums,
        key_scale=scales[0],
        value_scale=scales[1],
        starts=first,
        key_starts=first_key,
        M=M,
        N=N,
        D=int(query.shape[3]),
        repeats=query.shape[1] // key.shape[1],
        scale=scale,
        **strides,
        out_part=out.stride(0),
        scale_b=0 if scales[0] is None else scales[0].stride(0),
        scale_h=0 if scales[0] is None else scales[0].stride(1),
        CAUSAL=causal,
        PER_KEY=per_key,
        PACKED=code != "" and packed(code),
        BLOCK_D=tile.block_k,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SPLIT=tile.split,
        WIDEN=INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
