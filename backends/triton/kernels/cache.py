"""K, V → codes and back, for each token and head: what a key-value cache holds; and keys moved to other positions.

    code = round(x / scale), scale = max|x| / top;   rerotated key = R(δ)·key, so that R(p + δ)·k = R(δ)·R(p)·k

The codes are those of `paretoc::fake_quantize_dynamic(x, "token", code)`, which `quantize_cache` writes in front of an
attention. Rotary embedding: Su et al. 2021, "RoFormer", section 3.4; after tokens were dropped or inserted the keys
behind them turn by the difference of the positions, the values stay. One kernel reads numbers or codes, turns them or
not, and writes numbers or codes: a cache of codes is rerotated without a dense copy.

x `[B, G, T, D]` float16, bfloat16 or float32, any strides with a contiguous last axis; codes contiguous, int8
`[B, G, T, D]`, float8, or for integers of 4 bits and less two in a byte, low bits first, code + 8, uint8
`[B, G, T, D/2]`; scales float32 `[B, G, T]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....compiler.dialect.activations import FLOATS, INTEGERS
from .launch import cdiv, check_dtype, kernel_op, launch
from .quantize import codes_of, number
from .weights import unpack

#: the rows of one program hold so many numbers
_NUMBERS = 4096


@triton.jit
def cache_tile(source, places, live, D, PACKED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of codes or numbers `[ROWS, BLOCK_D]`, float32, from the given places on; 0 outside."""
    if PACKED:
        octets = tl.arange(0, BLOCK_D // 2)
        inside = live[:, None] & (octets < D // 2)[None, :]
        packed = tl.load(source + places[:, None] + octets[None, :], mask=inside, other=136)
        tile = unpack(packed, 4).to(tl.float32) - 8.0
    else:
        columns = tl.arange(0, BLOCK_D)
        inside = live[:, None] & (columns < D)[None, :]
        tile = tl.load(source + places[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    return tile


@triton.jit
def cache_kernel(
    x, scales_in, out, scales_out, cosine, sine, rows, T, D, heads, half,
    stride_b, stride_h, stride_t, stride_angle_b, TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
    PACKED: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows (batch, head, token) of x → out, contiguous; with scales, codes. cosine, sine `[1 or B, T, half]`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    token, head, batch = row % T, row // T % heads, row // T // heads
    places = batch.to(tl.int64) * stride_b + head * stride_h + token.to(tl.int64) * stride_t
    values = cache_tile(x, places, live, D, PACKED and scales_in is not None, BLOCK_D)
    if scales_in is not None:
        values *= tl.load(scales_in + row, mask=live, other=0.0)[:, None]
    columns = tl.arange(0, BLOCK_D)
    if cosine is not None:
        if INTERLEAVED:
            pair, partner, first = columns // 2, columns ^ 1, columns % 2 == 0
        else:
            first = columns < half
            pair = tl.where(first, columns, columns - half)
            partner = tl.where(columns < 2 * half, tl.where(first, columns + half, columns - half), columns)
        turns = live[:, None] & (columns < 2 * half)[None, :]
        angle = (batch * stride_angle_b + token * half)[:, None] + pair[None, :]
        other = tl.gather(values, tl.broadcast_to(partner[None, :], values.shape), 1)
        other = tl.where(first[None, :], -other, other)
        values = values * tl.load(cosine + angle, mask=turns, other=1.0)
        values += other * tl.load(sine + angle, mask=turns, other=0.0)
    target = row.to(tl.int64)
    inside = live[:, None] & (columns < D)[None, :]
    if scales_out is None:
        tl.store(out + target[:, None] * D + columns[None, :], values.to(out.dtype.element_ty), mask=inside)
    else:
        codes, scale = codes_of(values, TOP, MANTISSA, LEAST)
        tl.store(scales_out + row, scale, mask=live)
        if PACKED:
            low, high = tl.split((codes + 8.0).to(tl.uint8).reshape(ROWS, BLOCK_D // 2, 2))
            octets = tl.arange(0, BLOCK_D // 2)
            inside = live[:, None] & (octets < D // 2)[None, :]
            tl.store(out + target[:, None] * (D // 2) + octets[None, :], low | (high << 4), mask=inside)
        else:
            tl.store(out + target[:, None] * D + columns[None, :], codes.to(out.dtype.element_ty), mask=inside)


def packed(code: str) -> bool:
    """Whether two codes share a byte."""
    return INTEGERS.get(code, 8) <= 4


def width(codes: Tensor, code: str) -> int:
    """The numbers D that a row of codes stands for."""
    return int(codes.shape[-1]) * (2 if packed(code) else 1)


@kernel_op("quantize_cache")
def quantize_cache(x: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """x → codes and scales; `code` int2 … int8, e4m3 or e5m2. With 4 bits and less D is even."""
    check_dtype(x)
    codes, scales = _empty(x, code)
    _launch(x, None, codes, scales, code)
    return codes, scales


@quantize_cache.register_fake
def _(x: Tensor, code: str) -> tuple[Tensor, Tensor]:
    return _empty(x, code)


@kernel_op("decode_cache")
def decode_cache(codes: Tensor, scales: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    """Codes and scales → scale · code `[B, G, T, D]`, contiguous, in the type asked for."""
    out = torch.empty((*scales.shape, width(codes, code)), dtype=dtype, device=codes.device)
    _launch(codes, scales, out, None, code)
    return out


@decode_cache.register_fake
def _(codes: Tensor, scales: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    return torch.empty((*scales.shape, width(codes, code)), dtype=dtype, device=codes.device)


@kernel_op("rerotate")
def rerotate(keys: Tensor, shift: Tensor, frequencies: Tensor, interleaved: bool = False) -> Tensor:
    """Rotated keys `[B, G, T, D]` → the same keys `shift` positions further on, contiguous.

    shift `[T]` or `[B, T]`, integers; frequencies `[R/2]` in radians a position: the first R of D channels turn, pairs
    (i, i + R/2), or (2i, 2i + 1) where they are interleaved.
    """
    check_dtype(keys)
    out = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    _launch(keys, None, out, None, "int8", _angles(shift, frequencies), interleaved)
    return out


@rerotate.register_fake
def _(keys: Tensor, shift: Tensor, frequencies: Tensor, interleaved: bool = False) -> Tensor:
    return torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)


@kernel_op("rerotate_codes")
def rerotate_codes(
    codes: Tensor, scales: Tensor, code: str, shift: Tensor, frequencies: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Like `rerotate`, of keys in codes: rounded anew, under new scales."""
    out, new = torch.empty_like(codes), torch.empty_like(scales)
    _launch(codes, scales, out, new, code, _angles(shift, frequencies), interleaved)
    return out, new


@rerotate_codes.register_fake
def _(
    codes: Tensor, scales: Tensor, code: str, shift: Tensor, frequencies: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codes), torch.empty_like(scales)


def _angles(shift: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[1 or B, T, R/2]`, float32; the angles are float64, since positions are large."""
    angles = shift.double().reshape(-1, shift.shape[-1], 1) * frequencies.double()
    return angles.cos().float(), angles.sin().float()


def _launch(
    x: Tensor,
    scales_in: Tensor | None,
    out: Tensor,
    scales_out: Tensor | None,
    code: str,
    angles: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> None:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, T = (int(size) if not isinstance(size, torch.SymInt) else size for size in x.shape[:3])
    D = width(x, code) if scales_in is not None else int(x.shape[3])
    cosine, sine = angles or (None, None)
    top, mantissa, least = number(code)
    block = max(triton.next_power_of_2(D), 2)
    lines = max(_NUMBERS // block, 1)
    launch(
        cache_kernel,
        (cdiv(batch * heads * T, lines),),
        x=x,
        scales_in=scales_in,
        out=out,
        scales_out=scales_out,
        cosine=cosine,
        sine=sine,
        rows=batch * heads * T,
        T=T,
        D=D,
        heads=heads,
        half=0 if cosine is None else cosine.shape[-1],
        stride_b=x.stride(0),
        stride_h=x.stride(1),
        stride_t=x.stride(2),
        stride_angle_b=0 if cosine is None or cosine.shape[0] == 1 else cosine.stride(0),
        TOP=top,
        MANTISSA=mantissa,
        LEAST=least,
        PACKED=packed(code),
        INTERLEAVED=interleaved,
        ROWS=lines,
        BLOCK_D=block,
    )


def _empty(x: Tensor, code: str) -> tuple[Tensor, Tensor]:
    dtype = torch.uint8 if packed(code) else FLOATS.get(code, torch.int8)
    last = x.shape[-1] // (2 if packed(code) else 1)
    codes = torch.empty((*x.shape[:-1], last), dtype=dtype, device=x.device)
    return codes, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
