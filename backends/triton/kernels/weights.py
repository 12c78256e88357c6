"""ŵ = scale · (code − zero), scale · float(code) or scale · Σ table[code]: a tile of an encoded weight, in registers.

What the matmul kernels share. A weight W `[N, K]` lies in memory as its encoding stores it: `codes` uint8
`[N, ⌈K·bits/8⌉]`, low bits first; a scale for each row or for each `group` of K; for some, a zero point with each
scale. Of an n:m sparse weight all this describes what is kept, `[N, K·n/m]`, and `indices` uint8 `[N, ⌈K/m·b/8⌉]` holds
b bits for each m: the rank of the kept places, for 2:4 among (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3). Nothing
is repacked when a program is lowered: a kernel reads the bytes that the artifact holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....compiler.dialect.weights import reference_decode
from ....compiler.encodings import NF4, NM, Additive, Affine, Codebook, Dense, Encoding, Float, parse_encoding
from ....compiler.encodings.codebook import LookUp
from .launch import padded

#: sizes of codes of which a byte holds a whole number
_BITS = (2, 4, 8)
#: the most numbers of additive codebooks, of 2 bytes, that are kept in shared memory
_TABLE = 1 << 14
#: the columns of a low-rank factor that are held at once
_RANK = 64
#: the exponent bits and the mantissa bits of float16, through which floats are decoded
_EXPONENT, _MANTISSA = 5, 10


@dataclass(frozen=True)
class Format:
    """How the kernels read an encoding: the compile-time constants of `weight_tile`.

    `element` is "integer", "float", "table", "additive" or "dense" (numbers as they are). `offset` is what a symmetric
    integer was stored with; `mantissa` and `bias` are those of a float. `group` is the number of weights along K under
    one scale, 0 for a whole row; `scale` "number", "e8m0", "shift", "e4m3" (times one number for the tensor) or "none";
    `zero` "none", "integer" (packed like the codes) or "float"; `per_row` says that each row has a table. Of each `of`
    weights `kept` are stored, their places in `rank_bits`. An additive code chooses `dim` weights at once from each of
    `books` tables.
    """

    element: str
    bits: int
    group: int = 0
    scale: str = "number"
    zero: str = "none"
    offset: int = 0
    mantissa: int = 0
    bias: int = 0
    per_row: bool = False
    kept: int = 1
    of: int = 1
    rank_bits: int = 0
    books: int = 1
    dim: int = 1

    @property
    def sparse(self) -> bool:
        return self.kept < self.of

    @property
    def constants(self) -> dict[str, Any]:
        return {name.upper(): value for name, value in vars(self).items()}


@cache
def weight_format(text: str) -> Format | str:
    """The format of an encoding given by its text, or a sentence why no kernel reads it."""
    encoding = parse_encoding(text)
    if isinstance(encoding, NM):
        n, m, bits = encoding.n, encoding.m, encoding.index_bits
        if n & (n - 1) or m & (m - 1) or bits > 8 or isinstance(encoding.values, (NF4, Additive)):
            return f"no Triton kernel reads {n}:{m} of {type(encoding.values).__name__}"
        inner = weight_format(str(encoding.values))
        return inner if isinstance(inner, str) else replace(inner, kept=n, of=m, rank_bits=bits)
    if isinstance(encoding, Dense):
        return Format("dense", 8, scale="none")
    if isinstance(encoding, Additive):
        return _additive(encoding)
    if not isinstance(encoding, (Affine, Float, NF4, Codebook)):
        return f"no Triton kernel reads {type(encoding).__name__}"
    if encoding.bits not in _BITS:
        return f"codes of {encoding.bits} bits do not fill a byte"
    group = max(encoding.group, 0)
    if group & (group - 1):
        return f"groups of {group} are no power of two"
    scale = "number" if encoding.scale in ("float32", "float16") else encoding.scale.removesuffix("-ceil")
    if isinstance(encoding, Affine):
        zero = "none" if encoding.symmetric else encoding.zero
        return Format("integer", encoding.bits, group, scale, zero, encoding.offset if encoding.symmetric else 0)
    if isinstance(encoding, Float):
        if encoding.exponent > _EXPONENT or encoding.mantissa > _MANTISSA:
            return f"float16 does not hold every number of {encoding.format}"
        return Format("float", encoding.bits, group, scale, mantissa=encoding.mantissa, bias=encoding.bias)
    return Format("table", encoding.bits, group, scale, per_row=getattr(encoding, "per", "tensor") == "row")


def _additive(encoding: Additive) -> Format | str:
    if encoding.bits != 8 or encoding.dim & (encoding.dim - 1) or encoding.codebooks & (encoding.codebooks - 1):
        return f"no Triton kernel reads {encoding.codebooks} codebooks of {encoding.bits} bits × {encoding.dim} weights"
    if encoding.codebooks * encoding.entries * encoding.dim > _TABLE:
        return f"{encoding.codebooks} codebooks of {encoding.dim} weights do not fit beside the tiles in shared memory"
    return Format("additive", 8, books=encoding.codebooks, dim=encoding.dim)


def fixed_arrays(encoding: Encoding, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an operator takes beside the stored arrays of a weight: the table, or the patterns, that its encoding fixes.

    `patterns` int32 `[C(m, n)]`: a bit for each kept place. One place needs none, and those of 2:4 are in the kernel.
    """
    if isinstance(encoding, LookUp) and "table" not in stored:
        return {"table": encoding.stored_table(stored)}
    if isinstance(encoding, NM) and encoding.n > 1 and (encoding.n, encoding.m) != (2, 4):
        return {"patterns": (1 << encoding.patterns()).sum(1, dtype=torch.int32)}
    return {}


@cache
def _names(text: str, shape: tuple[int, int]) -> tuple[str, ...]:
    """The names of an operator's arrays."""
    encoding = parse_encoding(text)
    stored = {name: torch.empty(0) for name in encoding.layout(shape)}
    return (*stored, *fixed_arrays(encoding, stored))


def weight_arguments(arrays: Sequence[Tensor], text: str, shape: tuple[int, int]) -> dict[str, Any]:
    """The arrays of an encoding → the weight's arguments to a kernel. A row stride is 0 where all rows share one.

    The last axis of every array must be contiguous.
    """
    fmt = weight_format(text)
    assert isinstance(fmt, Format)
    named = {name.removeprefix("values."): a for name, a in zip(_names(text, shape), arrays, strict=True)}
    codes, indices = named.get("codes", named.get("values")), named.get("indices")
    scale, zero, table = named.get("scale"), named.get("zero"), named.get("table", named.get("codebooks"))
    assert codes is not None
    width = shape[1] // fmt.of * fmt.kept
    return {
        "codes": codes,
        "indices": indices,
        "scale": scale,
        "second": named.get("shift", named.get("outer")),
        "zero": zero,
        "table": table,
        "patterns": named.get("patterns"),
        "stride_codes": codes.stride(0),
        "stride_indices": _row_stride(indices),
        "stride_scale": _row_stride(scale),
        "stride_zero": _row_stride(zero),
        "row_bytes": codes.shape[1],
        "groups": width // fmt.group if fmt.group else 1,
        **fmt.constants,
    }


def decoded(arrays: Sequence[Tensor], text: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight `[N, K]` that the arrays stand for, as the reference has it."""
    stored = len(parse_encoding(text).layout(shape))
    return reference_decode(arrays[:stored], text, shape, dtype)


def _row_stride(array: Tensor | None) -> int:
    return 0 if array is None or array.shape[0] == 1 else array.stride(0)


def correction_arguments(low: Tensor | None, up: Tensor | None) -> dict[str, Any]:
    """The arguments of `correction_tile`: both factors, or neither."""
    if low is None or up is None:
        return {"low": None, "up": None, "rank": 0, "RANK": _RANK}
    rank = int(up.shape[1])
    return {"low": low.reshape(-1, rank), "up": up, "rank": rank, "RANK": min(padded(rank), _RANK)}


def corrected(y: Tensor, low: Tensor | None, up: Tensor | None) -> Tensor:
    """y `[M, N]` + low·upᵀ, as the reference has it."""
    return y if low is None or up is None else y + low.reshape(-1, up.shape[1]) @ up.T


@triton.jit
def unpack(packed, BITS: tl.constexpr):
    """uint8 `[R, b]` → codes `[R, b·8/BITS]`, low bits first."""
    if BITS == 4:
        packed = tl.interleave(packed & 15, packed >> 4)
    elif BITS == 2:
        even = tl.interleave(packed & 3, (packed >> 4) & 3)
        packed = tl.interleave(even, tl.interleave((packed >> 2) & 3, packed >> 6))
    return packed


@triton.jit
def power_of_two(exponent):
    """2^exponent, float32, of int32 −127 … 127, by its bits: −127 is subnormal."""
    return tl.where(exponent > -127, (exponent + 127) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(code):
    """E4M3 numbers without sign, from their codes: the bits of a float16 whose exponent is 8 less."""
    return (code.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def scale_tile(scale, second, rows, group, N, groups, stride_scale, SCALE: tl.constexpr, COUNT: tl.constexpr):
    """Scales `[BLOCK_N, COUNT]`, float32, of the given rows and the groups from `group` on; 0 outside."""
    columns = group + tl.arange(0, COUNT)
    inside = (rows < N)[:, None] & (columns < groups)[None, :]
    rows = rows.to(tl.int64)[:, None]
    if SCALE == "shift":
        shift = tl.load(second + rows * groups + columns[None, :], mask=inside, other=0)
        tile = tl.load(scale + rows, mask=inside, other=0.0) * power_of_two(-shift.to(tl.int32))
    else:
        tile = tl.load(scale + rows * stride_scale + columns[None, :], mask=inside, other=0)
        if SCALE == "e8m0":
            tile = power_of_two(tile.to(tl.int32) - 127)
        elif SCALE == "e4m3":
            tile = e4m3(tile) * tl.load(second)
        else:
            tile = tile.to(tl.float32)
    return tile


@triton.jit
def zero_tile(zero, rows, group, N, groups, stride_zero, ZERO: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Zero points `[BLOCK_N, COUNT]`, float32 or int32, like `scale_tile`."""
    columns = group + tl.arange(0, COUNT)
    inside = (rows < N)[:, None] & (columns < groups)[None, :]
    rows = rows.to(tl.int64)[:, None]
    if ZERO == "float":
        tile = tl.load(zero + rows * stride_zero + columns[None, :], mask=inside, other=0.0)
    else:
        packed = tl.load(zero + rows * stride_zero + (columns * BITS // 8)[None, :], mask=inside, other=0)
        tile = (packed.to(tl.int32) >> (columns * BITS % 8)[None, :]) & ((1 << BITS) - 1)
    return tile


@triton.jit
def code_tile(
    codes, rows, start, N, stride_codes, row_bytes, BITS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Codes `[BLOCK_N, BLOCK_K]`, uint8, of the given rows, from column `start` on; 0 outside."""
    octets = start * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)
    inside = (rows < N)[:, None] & (octets < row_bytes)[None, :]
    return unpack(tl.load(codes + rows.to(tl.int64)[:, None] * stride_codes + octets[None, :], inside, 0), BITS)


@triton.jit
def table_tile(table, rows, N, BITS: tl.constexpr, PER_ROW: tl.constexpr, BOOKS: tl.constexpr, DIM: tl.constexpr):
    """The table `[2^BITS]`, or those of the given rows or all codebooks in a line: read once, then looked up in shared
    memory."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    entries = tl.arange(0, BOOKS * DIM << BITS)
    if PER_ROW:
        places = (rows.to(tl.int64) << BITS)[:, None] + entries[None, :]
        tile = tl.load(table + places, mask=(rows < N)[:, None], other=0.0).reshape(BLOCK_N << BITS)
    else:
        tile = tl.load(table + entries)
    return tile


@triton.jit
def by_group(tile, parameters, SUBTRACT: tl.constexpr):
    """A tile `[BLOCK_N, BLOCK_K]`, times (or minus) the parameter of its group `[BLOCK_N, COUNT]`."""
    BLOCK_N: tl.constexpr = tile.shape[0]
    BLOCK_K: tl.constexpr = tile.shape[1]
    COUNT: tl.constexpr = parameters.shape[1]
    tile = tile.reshape(BLOCK_N, COUNT, BLOCK_K // COUNT)
    tile = tile - parameters[:, :, None] if SUBTRACT else tile * parameters[:, :, None]
    return tile.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def entry_tile(table, codes, book, DIM: tl.constexpr):
    """Codes `[BLOCK_N, COUNT]` of 8 bits → the entries of one codebook, float32 `[BLOCK_N, COUNT·DIM]`."""
    BLOCK_N: tl.constexpr = codes.shape[0]
    SIZE: tl.constexpr = codes.shape[1] * DIM
    places = (codes.to(tl.int32) + book * 256)[:, :, None] * DIM + tl.arange(0, DIM)[None, None, :]
    return tl.gather(table, places.reshape(BLOCK_N * SIZE), 0).reshape(BLOCK_N, SIZE).to(tl.float32)


@triton.jit
def stored_tile(
    codes, scale, second, zero, table, rows, start, N, groups,
    stride_codes, stride_scale, stride_zero, row_bytes,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr, BOOKS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stored weights `[BLOCK_N, BLOCK_K]`, float32, of the given rows, from column `start` (a multiple of BLOCK_K) on.

    A scale that holds for a whole row is left to the caller. `table` is what `table_tile` returned. BLOCK_K and GROUP
    are powers of two. Outside the weight the tile is finite.
    """
    COUNT: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 and GROUP < BLOCK_K else 1
    group = start // GROUP if GROUP > 0 else 0
    tile = code_tile(codes, rows, start // DIM, N, stride_codes, row_bytes, BITS, BLOCK_K // DIM)
    if ELEMENT == "additive":
        values = entry_tile(table, tile, 0, DIM)
        for book in tl.static_range(1, BOOKS):
            first = start // DIM + book * (row_bytes // BOOKS)  # the codes of one codebook after those of the other
            tile = code_tile(codes, rows, first, N, stride_codes, row_bytes, BITS, BLOCK_K // DIM)
            values += entry_tile(table, tile, book, DIM)
    elif ELEMENT == "dense":
        values = tile.to(tl.float32)
    elif ELEMENT == "float":
        code = tile.to(tl.int16)
        sign = (code >> (BITS - 1)) << 15
        rest = (code & ((1 << (BITS - 1)) - 1)) << (10 - MANTISSA)
        values = (sign | rest).to(tl.float16, bitcast=True).to(tl.float32) * (2.0 ** (15 - BIAS))
    elif ELEMENT == "table":
        BLOCK_N: tl.constexpr = tile.shape[0]
        places = tile.to(tl.int32)
        if PER_ROW:
            places += tl.arange(0, BLOCK_N)[:, None] << BITS
        values = tl.gather(table, places.reshape(BLOCK_N * BLOCK_K), 0).reshape(BLOCK_N, BLOCK_K)
    else:
        values = tile.to(tl.float32)
        if ZERO == "none":
            values -= OFFSET
        else:
            points = zero_tile(zero, rows, group, N, groups, stride_zero, ZERO, BITS, COUNT)
            values = by_group(values, points.to(tl.float32), True)
    if GROUP > 0 and SCALE != "none":
        scales = scale_tile(scale, second, rows, group, N, groups, stride_scale, SCALE, COUNT)
        values = by_group(values, scales, False)
    return values


@triton.jit
def rank_tile(indices, rows, start, N, stride_indices, row_bytes, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Ranks `[BLOCK_N, COUNT]` of the kept places, int32, from group `start` of a row on: eight in BITS bytes."""
    BLOCK_N: tl.constexpr = rows.shape[0]
    octets = start // 8 * BITS + tl.arange(0, COUNT // 8) * BITS
    places = indices + rows.to(tl.int64)[:, None] * stride_indices + octets[None, :]
    word = tl.zeros((BLOCK_N, COUNT // 8), tl.int32 if BITS <= 4 else tl.int64)
    for i in tl.static_range(BITS):
        inside = (rows < N)[:, None] & (octets + i < row_bytes)[None, :]
        word |= tl.load(places + i, mask=inside, other=0).to(word.dtype) << (8 * i)
    ranks = (word[:, :, None] >> (BITS * tl.arange(0, 8)).to(word.dtype)[None, None, :]) & ((1 << BITS) - 1)
    return ranks.reshape(BLOCK_N, COUNT).to(tl.int32)


@triton.jit
def spread_pairs(kept, ranks):
    """Kept weights `[BLOCK_N, 2·COUNT]` and the ranks of their pairs `[BLOCK_N, COUNT]` → `[BLOCK_N, 4·COUNT]`."""
    BLOCK_N: tl.constexpr = ranks.shape[0]
    COUNT: tl.constexpr = ranks.shape[1]
    first, second = tl.split(kept.reshape(BLOCK_N, COUNT, 2))
    low = tl.where(ranks < 3, 0, tl.where(ranks < 5, 1, 2))
    high = tl.where(ranks < 3, ranks + 1, tl.where(ranks < 5, ranks - 1, 3))
    zeros = tl.zeros_like(first)
    w0 = tl.where(low == 0, first, zeros)
    w1 = tl.where(low == 1, first, tl.where(high == 1, second, zeros))
    w2 = tl.where(low == 2, first, tl.where(high == 2, second, zeros))
    w3 = tl.where(high == 3, second, zeros)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def spread(kept, ranks, patterns, KEPT: tl.constexpr, OF: tl.constexpr):
    """Kept weights `[BLOCK_N, KEPT·COUNT]` and the ranks of their places `[BLOCK_N, COUNT]` → `[BLOCK_N, OF·COUNT]`."""
    BLOCK_N: tl.constexpr = ranks.shape[0]
    COUNT: tl.constexpr = ranks.shape[1]
    places = tl.arange(0, OF)[None, None, :]
    if KEPT == 1:
        tile = tl.where(ranks[:, :, None] == places, kept[:, :, None], 0.0).reshape(BLOCK_N, COUNT * OF)
    elif KEPT == 2 and OF == 4:
        tile = spread_pairs(kept, ranks)
    else:
        bits = tl.load(patterns + ranks)[:, :, None]
        before = bits & ((1 << places) - 1)
        before = (before & 0x5555) + ((before >> 1) & 0x5555)  # how many bits are set
        before = (before & 0x3333) + ((before >> 2) & 0x3333)
        before = (before & 0x0F0F) + ((before >> 4) & 0x0F0F)
        before = (before & 0xFF) + (before >> 8)
        sources = tl.minimum(before, KEPT - 1) + KEPT * tl.arange(0, COUNT)[None, :, None]
        found = tl.gather(kept, sources.reshape(BLOCK_N, COUNT * OF), 1).reshape(BLOCK_N, COUNT, OF)
        tile = tl.where(((bits >> places) & 1) == 1, found, 0.0).reshape(BLOCK_N, COUNT * OF)
    return tile


@triton.jit
def weight_tile(
    codes, scale, second, zero, table, indices, patterns, rows, start, N, K, groups,
    stride_codes, stride_scale, stride_zero, stride_indices, row_bytes,
    ELEMENT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr,
    OFFSET: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    KEPT: tl.constexpr, OF: tl.constexpr, RANK_BITS: tl.constexpr, BOOKS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights `[BLOCK_N, BLOCK_K]`: what `stored_tile` reads, with the zeros of a sparse weight between."""
    tile = stored_tile(
        codes, scale, second, zero, table, rows, start // OF * KEPT, N, groups,
        stride_codes, stride_scale, stride_zero, row_bytes,
        ELEMENT, BITS, GROUP, SCALE, ZERO, OFFSET, MANTISSA, BIAS, PER_ROW, BOOKS, DIM, BLOCK_K // OF * KEPT,
    )  # fmt: skip
    if KEPT < OF:
        rank_bytes = (K // OF * RANK_BITS + 7) // 8
        ranks = rank_tile(indices, rows, start // OF, N, stride_indices, rank_bytes, RANK_BITS, BLOCK_K // OF)
        tile = spread(tile, ranks, patterns, KEPT, OF)
    return tile


@triton.jit
def correction_tile(low, up, tokens, rows, M, N, rank, RANK: tl.constexpr, WIDEN: tl.constexpr):
    """Of a low-rank correction U·V beside a weight, its product up·lowᵀ `[BLOCK_N, BLOCK_M]`, float32.

    low `[M, rank]` = x·Vᵀ, contiguous, and up `[N, rank]` = U, contiguous, both in the type of x.
    """
    BLOCK_N: tl.constexpr = rows.shape[0]
    BLOCK_M: tl.constexpr = tokens.shape[0]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, rank, RANK, num_stages=1):
        ranks = start + tl.arange(0, RANK)
        inside = (ranks < rank)[None, :]
        left = tl.load(
            up + rows.to(tl.int64)[:, None] * rank + ranks[None, :], mask=(rows < N)[:, None] & inside, other=0.0
        )
        right = tl.load(
            low + tokens.to(tl.int64)[:, None] * rank + ranks[None, :], mask=(tokens < M)[:, None] & inside, other=0.0
        )
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="tf32x3")
    return sums
