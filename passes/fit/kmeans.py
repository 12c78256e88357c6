"""min Σ h·(w − s·table[code])² over codes, table and scales by turns: k-means, with scales where there are some.

Han et al. 2016, "Deep Compression", section 3 (h = 1); with `hessian` h is Σx² of the weight's input, the diagonal of
the Hessian of the layer's output, in the manner of SqueezeLLM (Kim et al. 2024, section 4.1), which weighs by the
Fisher information. Scales are least squares under the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.encodings import NM, Arrays, Codebook, Encoding, Parameters
from ...compiler.errors import OptionError
from ...compiler.protocols import NO_EVIDENCE, Evidence
from ...compiler.sites import Site
from ...compiler.statistics import Hessian, Statistic
from .matrix import Matrix


@dataclass(frozen=True)
class KMeans:
    """Tables and scales of a `Codebook`, never worse than what its `encode` finds.

    It alternates until the error shrinks by less than `tolerance`, at most `rounds` times. `hessian=True` weighs the
    weights by calibration data.
    """

    name: ClassVar[str] = "kmeans"

    hessian: bool = False
    rounds: int = 20
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise OptionError(f"rounds={self.rounds} is not valid", where="fitter 'kmeans'", fix="use 1 or more")

    @property
    def data_free(self) -> bool:
        return not self.hessian

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(encoding.values if isinstance(encoding, NM) else encoding, Codebook):
            return None
        return f"fitter 'kmeans' learns the tables of a Codebook; {encoding} has none"

    def needs(self, site: Site) -> list[Statistic]:
        return [Hessian(site.input.name, site.window)] if self.hessian else []

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        matrix = Matrix(encoding, weight)
        importance = torch.ones(matrix.grid)
        if self.hessian:
            costs = [gram.diagonal().float().expand_as(matrix.dense[r]) for r, gram in matrix.grams(evidence)]
            importance = matrix.packed(torch.cat(costs)).reshape(matrix.grid)
        assert isinstance(matrix.values, Codebook)
        codes, parameters = self._search(matrix.values, matrix.grouped, importance)
        return matrix.store(matrix.spread(codes), parameters)

    def _search(self, values: Codebook, grouped: Tensor, importance: Tensor) -> tuple[Tensor, Parameters]:
        """Codes `[R, G, n]` and parameters."""
        best = _Trial(values, grouped, importance, values.scales(grouped))
        for _ in range(0 if values.unscaled else self.rounds):
            trial = _Trial(values, grouped, importance, best.better_scales())
            if not trial.error < best.error * (1 - self.tolerance):
                break
            best = trial
        return best.codes, best.parameters


class _Trial:
    """The table that is best under some scales, the nearest codes, and Σ importance · (w − ŵ)²."""

    def __init__(self, values: Codebook, grouped: Tensor, importance: Tensor, scales: Parameters) -> None:
        self.values, self.grouped, self.importance = values, grouped, importance
        self.parameters = scales | values.learn(grouped, scales["scale"], importance)
        self.codes = values.quantize(grouped, self.parameters)
        rest = values.dequantize(self.codes, self.parameters).double() - grouped
        self.error = float((importance * rest.square()).sum())

    def better_scales(self) -> Parameters:
        """Least squares under the codes."""
        elements = self.values.elements(self.codes, self.parameters)
        over, under = ((self.importance * elements * x).sum(-1) for x in (self.grouped, elements))
        return self.values.round_scale(torch.where(over > 0, over / under, self.parameters["scale"]), 1.0)
