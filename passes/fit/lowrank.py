"""min tr((E − U·V)·H·(E − U·V)ᵀ), E = W − Ŵ, H = Σ xᵀx: the low-rank correction that the inputs ask for.

Zhang et al. 2024, "QERA: an Analytical Framework for Quantization Error Reconstruction" (QERA-exact): with H = R·Rᵀ,
U·V is the truncated singular value decomposition of E·R, times R⁻¹. The first part of the sum is fitted before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.cholesky import inverse_factor
from ...compiler.encodings import Arrays, Encoding, LowRank, Sum
from ...compiler.encodings.residual import factors
from ...compiler.protocols import NO_EVIDENCE, Evidence, Fitter, found
from ...compiler.registry import registry
from ...compiler.sites import Site
from ...compiler.statistics import Hessian, Statistic


@dataclass(frozen=True)
class LowRankFit:
    """For `Sum(…, LowRank(…))`. `first` is the fitter of the first part, by name and options; `damp` the share of the
    mean of diag(H) that is added to it. A grouped convolution has the mean of its Hessians."""

    name: ClassVar[str] = "lowrank"
    data_free: ClassVar[bool] = False

    first: str = "mse"
    damp: float = 0.01

    def fitter(self) -> Fitter:
        return registry().fitter(self.first)

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(encoding, Sum) and isinstance(encoding.second, LowRank):
            return self.fitter().refuse(encoding.first)
        return f"fitter 'lowrank' corrects by a product of thin matrices; {encoding} has none"

    def needs(self, site: Site) -> list[Statistic]:
        needs = self.fitter().needs(site)
        return needs if any(isinstance(s, Hessian) for s in needs) else [*needs, Hessian(site.input.name, site.window)]

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        assert isinstance(encoding, Sum) and isinstance(encoding.second, LowRank)
        first = self.fitter().fit(encoding.first, weight, evidence)
        rest = encoding.rest(weight, first).double().reshape(len(weight), -1)
        u, v = weighed_factors(rest, found(evidence, Hessian).double().mean(0), encoding.second.rank, self.damp)
        return encoding.join(first, encoding.second.store(u, v))


def weighed_factors(matrix: Tensor, hessian: Tensor, rank: int, damp: float) -> tuple[Tensor, Tensor]:
    """M `[O, K]`, H `[K, K]`, both float64 → u `[O, rank]`, v `[rank, K]`, whose product is nearest to M under H."""
    white, upper = whitened(matrix, hessian, damp)
    u, v = factors(white, rank)
    return u, v @ upper


def whitened(matrix: Tensor, hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """M `[O, K]`, H `[K, K]`, both float64 → M·R `[O, K]` and R⁻¹ `[K, K]`, R·Rᵀ = H / mean(diag H) + damp·I."""
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(hessian.dtype).tiny)  # so that u and v are of one size
    damped = hessian / mean
    damped.diagonal().add_(damp)
    upper = inverse_factor(damped, 0.0)[0].flip(0, 1)
    return torch.linalg.solve_triangular(upper, matrix, upper=True, left=False), upper
