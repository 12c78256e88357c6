"""A weight as the matrix W `[O, K]` that multiplies its inputs, and how the scales of an encoding lie on its columns.

What the fitters that weigh errors by the inputs share. K counts kernel positions too, for a convolution as in
`Window.columns`. Under an N:M pattern the channels come last, as they are packed, and a group of `n` stored values
lies on `m` columns.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...compiler.encodings import NM, Arrays, Encoding, Parameters, Scaled, innermost
from ...compiler.protocols import Evidence, found
from ...compiler.statistics import Hessian, Sample


def refusal(fitter: str, encoding: Encoding) -> str | None:
    """Why a fitter that works on columns cannot fit an encoding, or None."""
    values = encoding.values if isinstance(encoding, NM) else encoding
    if not isinstance(values, Scaled):
        return f"fitter {fitter!r} rounds under the scales of groups; {encoding} has none"
    if isinstance(encoding, NM) and values.group > 0 and values.group % encoding.n:
        return (
            f"fitter {fitter!r} needs scales that lie on whole columns; "
            f"a group of {values.group} values is no multiple of the {encoding.n} kept of {encoding.m}"
        )
    return None


class Matrix:
    """`dense` float32 `[O, K]`; `mask` bool `[O, K]`, True where a weight is kept, or None; `values` the encoding of
    what is kept, under parameters `[R, G]`, one of the G for every `group` columns."""

    def __init__(self, encoding: Encoding, weight: Tensor) -> None:
        self.encoding, self.weight = encoding, weight
        values = innermost(encoding)
        assert isinstance(values, Scaled)
        self.values: Scaled = values
        self.dense = self.rows(weight.float())
        self.mask = self.rows(encoding.mask(weight)) if isinstance(encoding, NM) else None
        kept = self.packed(self.dense)
        shape = tuple(weight.shape) if self.mask is None else tuple(kept.shape)
        self.grid = self.values.grid(shape)
        self.group = self.dense.shape[1] // self.grid[1]

    def rows(self, weight: Tensor) -> Tensor:
        return (weight.movedim(1, -1) if isinstance(self.encoding, NM) else weight).reshape(len(weight), -1)

    def packed(self, dense: Tensor) -> Tensor:
        """Any `[O, K]` → its kept entries `[O, K·n/m]`."""
        return dense if self.mask is None else dense[self.mask].reshape(len(dense), -1)

    def spread(self, packed: Tensor) -> Tensor:
        """Kept entries, in any shape → `[O, K]`, zeros elsewhere."""
        flat = packed.reshape(len(self.dense), -1)
        return flat if self.mask is None else torch.zeros_like(self.dense).masked_scatter(self.mask, flat)

    @cached_property
    def grouped(self) -> Tensor:
        """The kept weights as the encoding groups them `[R, G, n]`."""
        return self.packed(self.dense).reshape(self.grid)

    @property
    def whole(self) -> bool:
        """Whether the parameters of all groups are found together: no group comes after another has been rounded."""
        return self.grid[0] == 1 or self.grid[1] == 1 or not self.values.local

    @cached_property
    def order(self) -> Tensor:
        """The columns of W among the inputs `[K]`."""
        return self.rows(torch.arange(self.dense.shape[1]).reshape(1, *self.weight.shape[1:]))[0]

    def grams(self, evidence: Evidence) -> list[tuple[slice, Tensor]]:
        """The rows of W that read the same inputs, and Σ xᵀx of those `[K, K]`: several for a grouped convolution."""
        grams = found(evidence, Hessian)
        return self._parts(list(grams if self.mask is None else grams[:, self.order][:, :, self.order]))

    def samples(self, evidence: Evidence) -> list[tuple[slice, Tensor]]:
        """The rows of W that read the same inputs, and some of those `[N, K]`."""
        return self._parts([sample[:, self.order] for sample in found(evidence, Sample)])

    def _parts(self, inputs: list[Tensor]) -> list[tuple[slice, Tensor]]:
        rows = len(self.dense) // len(inputs)
        return [(slice(i * rows, (i + 1) * rows), part) for i, part in enumerate(inputs)]

    def store(self, codes: Tensor, parameters: Parameters) -> Arrays:
        """Codes of all columns `[O, K]`, under parameters `[R, G]` → the stored arrays."""
        packed = self.packed(codes).reshape(self.grid)
        return self.encoding.encode(self.weight, lambda values, kept: _store(values, packed, parameters, kept))


def _store(values: Any, codes: Tensor, parameters: Parameters, kept: Tensor) -> Arrays:
    arrays: Arrays = values.store(codes, parameters, tuple(kept.shape))
    return arrays
