"""min_c ‖x·(W − Q(clip(W, c)))ᵀ‖² for each group of columns by itself: ranges cut where the inputs do not mind.

The clip search of Lin et al. 2023, "AWQ: Activation-aware Weight Quantization": c = max·(1 − i/20), i < 10, on a
sample of the inputs. The other half of AWQ, scaling channels by their activations, is a transformation of the model.
AWQ leaves out the projections of queries and keys; so does `ignore=`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.encodings import Arrays, Encoding
from ...compiler.protocols import NO_EVIDENCE, Evidence
from ...compiler.sites import Site
from ...compiler.statistics import Sample, Statistic
from .matrix import Matrix, refusal

_SHRINKS = [1 - i / 20 for i in range(10)]


@dataclass(frozen=True)
class Awq:
    """Clip search over 10 ranges from 100 % down to 55 %, weighed by `rows` inputs."""

    name: ClassVar[str] = "awq"
    data_free: ClassVar[bool] = False

    rows: int = 512

    def refuse(self, encoding: Encoding) -> str | None:
        return refusal(self.name, encoding)

    def needs(self, site: Site) -> list[Statistic]:
        return [Sample(site.input.name, self.rows, site.window)]

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        matrix = Matrix(encoding, weight)
        samples = matrix.samples(evidence)
        values, grouped = matrix.values, matrix.grouped
        least = torch.full(matrix.grid[:2], torch.inf)
        best = torch.ones_like(least)
        for shrink in _SHRINKS:
            parameters = values.parameters(grouped, shrink)
            difference = values.dequantize(values.quantize(grouped, parameters), parameters) - grouped
            error = _output_error(matrix, matrix.spread(difference), samples)
            best, least = torch.where(error < least, shrink, best), torch.minimum(error, least)
        parameters = values.parameters(grouped, best)
        return matrix.store(matrix.spread(values.quantize(grouped, parameters)), parameters)


def _output_error(matrix: Matrix, difference: Tensor, samples: list[tuple[slice, Tensor]]) -> Tensor:
    """Δ `[O, K]` → Σ over the sample of (x·Δᵀ)², over the columns of one group each `[R, G]`."""
    errors = []
    for rows, sample in samples:
        inputs = sample.reshape(len(sample), -1, matrix.group).transpose(0, 1)  # [G, N, n]
        delta = difference[rows].reshape(-1, inputs.shape[0], matrix.group).transpose(0, 1)  # [G, O, n]
        errors.append(((delta @ (inputs.mT @ inputs)) * delta).sum(-1).T)
    error = torch.cat(errors)
    return error if matrix.grid[0] > 1 else error.sum(0, keepdim=True)
