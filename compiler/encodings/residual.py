"""W → A + U·V: what one encoding leaves of a weight is stored by another, often as a product of two thin matrices.

Low-rank compensation of the quantisation error: Yao et al. 2023, "ZeroQuant-V2", section 5 (LoRC). U and V come from
the singular value decomposition of the error, each with the square root of the singular values. Lossy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import OptionError
from .affine import Affine
from .base import Arrays, Encoding, Fit, Shape
from .dense import Dense

T = TypeVar("T")


@dataclass(frozen=True)
class LowRank(Encoding):
    """The weight as a matrix `[O, I]` (trailing axes flattened into `I`): u·v, its best approximation of that rank.

    Stored: `u` `[O, rank]` and `v` `[rank, I]` in `dtype`: float32, float16 or bfloat16.
    """

    rank: int = 8
    dtype: str = "float16"
    summary: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OptionError(f"{self.rank} is not a rank", where="LowRank(rank=…)", fix="use 1 or more, usually 8")
        Dense(self.dtype)  # refuses a dtype that cannot be stored

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, columns = shape[0], prod(shape[1:])
        if self.rank > min(rows, columns):
            raise OptionError(
                f"a matrix of {rows} × {columns} has no rank {self.rank}",
                where=f"a weight of shape {list(shape)}",
                fix=f"use a rank of at most {min(rows, columns)}, or leave this site out with ignore=",
            )
        shapes = {"u": (rows, self.rank), "v": (self.rank, columns)}
        return {name: Dense(self.dtype).layout(factor)["values"] for name, factor in shapes.items()}

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        # no entry of u or v exceeds the root of the largest singular value, nor that the root of the norm
        bound, limit = float(weight.double().norm().sqrt()), torch.finfo(getattr(torch, self.dtype)).max
        limit = min(limit, 2.0**63)  # the product of two is finite
        if not bound <= limit:
            raise OptionError(
                f"factors in {self.dtype} end at {limit:g}, those of this weight may reach {bound:.3g}",
                where=f"a weight of shape {list(weight.shape)}",
                fix="use LowRank(dtype='float32')",
            )

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        if fit is not None:
            return fit(self, weight)
        u, v = factors(weight.double().reshape(weight.shape[0], -1), self.rank)
        return self.store(u, v)

    def store(self, u: Tensor, v: Tensor) -> Arrays:
        """Factors of any floating type → the stored arrays."""
        return {name: Dense(self.dtype).encode(factor)["values"] for name, factor in (("u", u), ("v", v))}

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        return (arrays["u"].float() @ arrays["v"].float()).reshape(shape)


@dataclass(frozen=True)
class Sum(Encoding):
    """`first` holds the weight, `second` what `first` leaves: `Sum(Affine(4, 32), LowRank(8))`.

    A fitter fits `first`. Stored: the arrays of both, named `first.*` and `second.*`.
    """

    first: Encoding = field(default_factory=lambda: Affine(4, 32))
    second: Encoding = field(default_factory=LowRank)
    summary: ClassVar[str] = "sum"

    @property
    def values(self) -> Encoding:
        """Where `innermost`, and so a fitter, finds the numbers."""
        return self.first

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return self.join(self.first.layout(shape), self.second.layout(shape))

    def check(self, weight: Tensor) -> None:
        self.first.check(weight)
        self.second.check(weight)

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        return self.complete(weight, self.first.encode(weight, fit))

    def complete(self, weight: Tensor, first: Arrays) -> Arrays:
        """The arrays of `first`, whoever has chosen them → all arrays."""
        return self.join(first, self.second.encode(self.rest(weight, first)))

    def rest(self, weight: Tensor, first: Arrays) -> Tensor:
        """What the arrays of `first` leave of a weight, float32."""
        return weight.float() - self.first.decode(first, tuple(weight.shape))

    @staticmethod
    def join(first: dict[str, T], second: dict[str, T]) -> dict[str, T]:
        """What belongs to the two encodings, under the names of this one."""
        named = {f"first.{name}": value for name, value in first.items()}
        return named | {f"second.{name}": value for name, value in second.items()}

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        parts = (
            encoding.decode({k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)}, shape)
            for encoding, p in ((self.first, "first."), (self.second, "second."))
        )
        first, second = parts
        return first + second


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """M `[O, I]`, float64 → u `[O, rank]` and v `[rank, I]`, whose product is the best approximation of that rank.

    Of the singular value decomposition u has √σ times the left vectors and v √σ times the right ones. It is found
    from the eigenvectors of the smaller of M·Mᵀ and Mᵀ·M: six times as fast, and float64 holds the squares.
    """
    if len(matrix) > matrix.shape[1]:
        v, u = factors(matrix.T, rank)
        return u.T, v.T
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:].flip(-1)
    right = left.T @ matrix  # σ times the right vectors
    root = right.norm(dim=-1).sqrt()
    return left * root, right / torch.where(root > 0, root, 1.0).unsqueeze(-1)


def energies(matrix: Tensor) -> Tensor:
    """M `[O, I]`, float64 → its squared singular values, largest first; a rank loses the sum of those behind it."""
    thin = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    squares: Tensor = torch.linalg.eigvalsh(thin @ thin.T)
    return squares.clamp(min=0).flip(0)
