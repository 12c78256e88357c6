"""Ŵ[o, g·d … (g+1)·d] = s_o · Σ_m C_m[code_{o,g,m}]: d weights at once are a sum of entries of M codebooks.

Additive quantisation as in AQLM (Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive
Quantization", section 3). M·bits/d bits a weight, besides codebooks and scales. Lossy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Encoding, Fit, Shape
from .packing import pack, packed_size, unpack
from .scales import SCALES, check_reach

_DIMS = (2, 3, 4, 5, 6, 7, 8, 16)
_ROUNDS = 20
#: vectors that k-means looks at for each entry, and the most distances that one round computes and holds
_PER_ENTRY, _DISTANCES, _CHUNK = 256, 1 << 27, 1 << 24
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Additive(Encoding):
    """The weight as a matrix `[O, K]` (trailing axes flattened into `K`), cut along `K` into G groups of `dim`.

    Stored: `codes` uint8 `[O, ceil(M·G·bits/8)]`, packed, the codes of one codebook after those of the other; above
    8 bits `codes` `[O, M·G]` holds the low 8 and `codes_high` the others, packed. `codebooks` float16
    `[M, 2^bits, dim]`; `scale` `[O, 1]`, float16 or float32. `encode` takes the root mean square of a row as its
    scale and finds one codebook after the other by k-means of what is left, from a seeded start.
    """

    codebooks: int = 1
    bits: int = 8
    dim: int = 8
    scale: str = "float16"
    summary: ClassVar[str] = "additive codebooks"

    def __post_init__(self) -> None:
        if not 1 <= self.codebooks <= 8:
            raise OptionError(
                f"Additive has 1 to 8 codebooks, not {self.codebooks}",
                where="Additive(codebooks=…)",
                fix="use 1 or 2",
            )
        if not 2 <= self.bits <= 16:
            raise OptionError(
                f"Additive has codes of 2 to 16 bits, not {self.bits}", where="Additive(bits=…)", fix="use 8"
            )
        if self.dim not in _DIMS:
            raise OptionError(
                f"Additive stores 2 to 8 weights at once, or 16, not {self.dim}", where="Additive(dim=…)", fix="use 8"
            )
        if self.scale not in ("float16", "float32"):
            raise OptionError(
                f"Additive has no scale format {self.scale!r}",
                where="Additive(scale=…)",
                fix="use 'float16' or 'float32'",
            )

    @property
    def entries(self) -> int:
        """L, the entries of a codebook."""
        return 1 << self.bits

    def groups(self, shape: Shape) -> int:
        """G, the groups of a row."""
        columns = prod(shape[1:])
        if columns % self.dim:
            divisors = [d for d in _DIMS if columns % d == 0]
            raise OptionError(
                f"groups of {self.dim} do not divide the input width {columns}",
                where=f"a weight of shape {list(shape)}",
                fix=f"use dim={' or '.join(map(str, divisors))}" if divisors else "leave this site out with ignore=",
            )
        return columns // self.dim

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, count = shape[0], self.codebooks * self.groups(shape)
        arrays: dict[str, tuple[Shape, torch.dtype]] = {
            "codes": ((rows, packed_size(count, min(self.bits, 8))), torch.uint8)
        }
        if self.bits > 8:
            arrays["codes_high"] = ((rows, packed_size(count, self.bits - 8)), torch.uint8)
        arrays["codebooks"] = ((self.codebooks, self.entries, self.dim), torch.float16)
        return arrays | SCALES[self.scale].layout(rows, 1)

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        check_reach(self, weight.abs().max().float(), self.round_scale)

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        if fit is not None:
            return fit(self, weight)
        matrix = weight.float().reshape(weight.shape[0], -1).contiguous()
        scale = self.round_scale(matrix.double().square().mean(1, keepdim=True).sqrt().float())
        rest = (matrix / scale).reshape(-1, self.dim)
        codes, codebooks = [], []
        for m in range(self.codebooks):
            codebooks.append(round_half(kmeans(rest, self.entries, seed=m)))
            codes.append(nearest(rest, codebooks[-1]))
            rest = rest - codebooks[-1][codes[-1]]
        stacked = torch.stack([c.reshape(len(matrix), -1) for c in codes], dim=1)
        return self.store(stacked, torch.stack(codebooks), scale)

    def round_scale(self, ideal: Tensor) -> Tensor:
        """Ideal scales `[O, 1]` → what can be stored; a row of zeros gets 1."""
        return SCALES[self.scale].round(torch.where(ideal > 0, ideal, 1.0), 1.0)["scale"]

    def store(self, codes: Tensor, codebooks: Tensor, scale: Tensor) -> Arrays:
        """Codes, integers `[O, M, G]`, codebooks `[M, L, dim]` and scales `[O, 1]` → the stored arrays."""
        flat = codes.flatten(1)
        arrays = {"codes": pack(flat & 0xFF, min(self.bits, 8))}
        if self.bits > 8:
            arrays["codes_high"] = pack(flat >> 8, self.bits - 8)
        arrays["codebooks"] = round_half(codebooks).half().contiguous()
        return arrays | SCALES[self.scale].pack({"scale": scale})

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Stored arrays → codes, int32 `[O, M, G]`, codebooks `[M, L, dim]` and scales `[O, 1]`, float32."""
        groups = self.groups(shape)
        count = self.codebooks * groups
        codes = unpack(arrays["codes"], min(self.bits, 8), count)
        if self.bits > 8:
            codes = codes + unpack(arrays["codes_high"], self.bits - 8, count) * 256
        codes = codes.reshape(shape[0], self.codebooks, groups)
        return codes, arrays["codebooks"].float(), SCALES[self.scale].unpack(arrays)["scale"]

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        codes, codebooks, scale = self.load(arrays, shape)
        return (look_up(codes, codebooks) * scale).reshape(shape)


def look_up(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Codes `[O, M, G]`, codebooks `[M, L, d]` → the rows `[O, G·d]` they stand for, not yet scaled."""
    parts = (book.index_select(0, codes[:, m].flatten()) for m, book in enumerate(codebooks.unbind()))
    return reduce(torch.add, parts).reshape(len(codes), -1)


def round_half(codebooks: Tensor) -> Tensor:
    """The nearest float16, within its range."""
    return codebooks.clamp(-_HALF_MAX, _HALF_MAX).half().float()


def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """The index of the nearest entry of a codebook `[L, d]` for each vector `[N, d]`, int64 `[N]`."""
    return torch.cat([_distances(part, book).argmin(1) for part in torch.split(vectors, _chunk(book))])


def _chunk(book: Tensor) -> int:
    return max(1, _CHUNK // len(book))


def _distances(vectors: Tensor, book: Tensor) -> Tensor:
    """‖vector − entry‖² `[N, L]`, less ‖vector‖²."""
    return torch.addmm(book.square().sum(1), vectors, book.T, alpha=-2)


def kmeans(vectors: Tensor, count: int, seed: int) -> Tensor:
    """k-means of vectors `[N, d]` → `[count, d]`: Lloyd's algorithm from a sample of them.

    An entry that no vector chooses moves to the vector that is farthest from its own. Of very many vectors a
    sample is clustered.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(_PER_ENTRY * count, max(count, _DISTANCES // count))
    sample = vectors[torch.randperm(len(vectors), generator=generator)[:size]]
    book = torch.zeros(count, vectors.shape[1])
    book[: len(sample)] = sample[:count]
    for _ in range(_ROUNDS):
        codes = nearest(sample, book)
        sizes = torch.bincount(codes, minlength=count)
        moved = torch.zeros_like(book).index_add_(0, codes, sample) / sizes.clamp(min=1).unsqueeze(1)
        empty = (sizes == 0).nonzero().flatten()
        errors = (sample - book[codes]).square().sum(1)
        farthest = errors.topk(min(len(empty), len(sample))).indices
        moved[empty[: len(farthest)]] = sample[farthest]
        if torch.equal(moved, book):
            break
        book = moved
    return book
