"""w → encode(w) under the range, shrunk per group, that minimises Σ|ŵ − w|^p. Data-free.

The clip search of GPTQ's reference quantiser (Frantar et al. 2023), which uses p = 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.encodings import Arrays, Encoding, Scaled, innermost
from ...compiler.protocols import DataFree

#: ranges tried, as fractions of the full one
_SHRINKS = [1 - i / 50 for i in range(31)]


def best_shrink(encoding: Scaled, grouped: Tensor, norm: float = 2.0, importance: Tensor | None = None) -> Tensor:
    """The share of its range `[R, G]` under which each group of `[R, G, n]` loses least; `importance` weighs
    the weights."""
    best_error = torch.full(grouped.shape[:-1], torch.inf)
    best = torch.ones_like(best_error)
    for shrink in _SHRINKS:
        parameters = encoding.parameters(grouped, shrink)
        error = encoding.dequantize(encoding.quantize(grouped, parameters), parameters).sub_(grouped).abs_().pow_(norm)
        total = (error if importance is None else error * importance).sum(-1)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        best = torch.where(better, shrink, best)
    return best


@dataclass(frozen=True)
class Mse(DataFree):
    """Clip search over 31 ranges from 100 % down to 40 % of each group's own."""

    name: ClassVar[str] = "mse"
    norm: float = 2.0

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(innermost(encoding), Scaled):
            return None
        return f"fitter 'mse' searches the ranges of scales; {encoding} has none"

    def fit_values(self, encoding: Encoding, weight: Tensor) -> Arrays:
        assert isinstance(encoding, Scaled)
        grouped = encoding.grouped(weight)
        parameters = encoding.parameters(grouped, best_shrink(encoding, grouped, self.norm))
        return encoding.store(encoding.quantize(grouped, parameters), parameters, tuple(weight.shape))
