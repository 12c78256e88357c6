"""w → at most n non-zeros in every m consecutive weights of the input axis; the kept ones packed, under any encoding.

Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3. The kept weights are those of largest
magnitude (the lower index on a tie), unless the tensor already has the pattern, which is then kept as it is.
For a convolution `[O, I, kh, kw]` the groups run along `I`, as the hardware wants them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from math import comb, prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Encoding, Fit, Shape
from .dense import Dense
from .packing import pack, packed_size, unpack


@cache
def _patterns(n: int, m: int) -> Tensor:
    return torch.tensor(list(combinations(range(m), n)))


@dataclass(frozen=True)
class NM(Encoding):
    """`values` holds the kept weights `[O, I·n/m]`; the pattern of each group is one packed index.

    Stored: the arrays of `values`, named `values.*`, and `indices` uint8: ceil(log2 C(m, n)) bits per group, the
    rank of the kept positions in lexicographic order.
    """

    n: int = 2
    m: int = 4
    values: Encoding = field(default_factory=Dense)
    summary: ClassVar[str] = "n:m sparse"

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= 16 or comb(self.m, self.n) > 256 * 64:
            raise OptionError(
                f"{self.n}:{self.m} is not a sparsity pattern",
                where="NM(n, m)",
                fix="use 0 < n < m <= 16, for example 2:4",
            )
        if isinstance(self.values, NM):
            raise OptionError("NM does not nest in NM", where="NM(values=…)", fix="use one pattern")

    @property
    def index_bits(self) -> int:
        return max(1, (comb(self.m, self.n) - 1).bit_length())

    def _rows(self, shape: Shape) -> tuple[int, int]:
        rows, width = shape[0] * prod(shape[2:]), shape[1] if len(shape) > 1 else 0
        if len(shape) < 2 or width % self.m:
            raise OptionError(
                f"{self.n}:{self.m} needs an input width divisible by {self.m}, this one is {width}",
                where=f"a weight of shape {list(shape)}",
                fix="leave this site out with ignore=, or use a pattern that divides it",
            )
        return rows, width

    def _value_shape(self, shape: Shape) -> Shape:
        return (shape[0], prod(shape[1:]) * self.n // self.m)

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, width = self._rows(shape)
        arrays = {f"values.{k}": v for k, v in self.values.layout(self._value_shape(shape)).items()}
        low, high = self._split_bits()
        groups = width // self.m
        arrays["indices"] = ((rows, packed_size(groups, low)), torch.uint8)
        if high:
            arrays["indices_high"] = ((rows, packed_size(groups, high)), torch.uint8)
        return arrays

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        self.values.check(self._packed(weight, self.kept(weight)))

    def _packed(self, weight: Tensor, kept: Tensor) -> Tensor:
        """The kept weights `[O, I·n/m]`."""
        return self._channels_last(weight).gather(-1, kept).reshape(self._value_shape(tuple(weight.shape)))

    def _split_bits(self) -> tuple[int, int]:
        return min(self.index_bits, 8), max(self.index_bits - 8, 0)

    def patterns(self) -> Tensor:
        """All kept-position tuples, int64 `[C(m, n), n]`, in lexicographic order."""
        return _patterns(self.n, self.m)

    def _channels_last(self, weight: Tensor) -> Tensor:
        """`[O, I, …]` → rows of groups `[O·…, I/m, m]`."""
        rows, _ = self._rows(tuple(weight.shape))
        return weight.movedim(1, -1).reshape(rows, -1, self.m)

    def _channels_first(self, groups: Tensor, shape: Shape) -> Tensor:
        return groups.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def kept(self, weight: Tensor) -> Tensor:
        """Kept positions, ascending, int64 `[rows, groups, n]`: the n largest magnitudes of each group."""
        order = torch.sort(self._channels_last(weight).abs(), dim=-1, descending=True, stable=True).indices
        return order[..., : self.n].sort(-1).values

    def mask(self, weight: Tensor) -> Tensor:
        """True where a weight is kept, in the shape of the weight."""
        kept = self.kept(weight)
        mask = torch.zeros(*kept.shape[:-1], self.m, dtype=torch.bool).scatter_(-1, kept, True)
        return self._channels_first(mask, tuple(weight.shape))

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        kept = self.kept(weight)
        arrays = {f"values.{k}": v for k, v in self.values.encode(self._packed(weight, kept), fit).items()}
        return arrays | self._pack_indices(kept)

    def _pack_indices(self, kept: Tensor) -> Arrays:
        base = self.m ** torch.arange(self.n - 1, -1, -1)
        keys = (self.patterns() * base).sum(-1)
        ranks = torch.searchsorted(keys, (kept * base).sum(-1))
        low, high = self._split_bits()
        arrays = {"indices": pack(ranks & 0xFF, low)}
        if high:
            arrays["indices_high"] = pack(ranks >> 8, high)
        return arrays

    def _positions(self, arrays: Arrays, groups: int) -> Tensor:
        low, high = self._split_bits()
        ranks = unpack(arrays["indices"], low, groups)
        if high:
            ranks = ranks + unpack(arrays["indices_high"], high, groups) * 256
        return self.patterns().to(ranks.device)[ranks.long()]

    def inner(self, arrays: Arrays) -> Arrays:
        """The arrays of the nested encoding."""
        return {k.removeprefix("values."): v for k, v in arrays.items() if k.startswith("values.")}

    def scatter(self, values: Tensor, arrays: Arrays, shape: Shape) -> Tensor:
        """Packed per-weight values (codes or numbers) `[O, I·n/m]` → the dense tensor, zeros between them."""
        rows, width = self._rows(shape)
        kept = self._positions(arrays, width // self.m)
        packed = values.reshape(kept.shape)
        dense = torch.zeros(rows, width // self.m, self.m, dtype=values.dtype, device=values.device)
        return self._channels_first(dense.scatter(-1, kept, packed), shape)

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        values = self.values.decode(self.inner(arrays), self._value_shape(shape))
        return self.scatter(values, arrays, shape)
