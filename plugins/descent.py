"""min tr((W − Ŵ)·H·(W − Ŵ)ᵀ), H = Σ xᵀx, one column of Ŵ after the other, all else fixed: exact, column by column.

What the plugins that learn codes from calibration data share. A change that moves column j of Ŵ to v costs
H_jj·(v − t)², t = ŵ_j − (Ŵ − W)·H_j / H_jj: whatever values a weight may take, the best is the nearest to t.
Behdin et al. 2023, "QuantEase", do so for uniform codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..compiler.protocols import Evidence, found
from ..compiler.statistics import Hessian

#: column j and the targets of its weights `[g, o]` → the values that they take `[g, o]`
Choose = Callable[[int, Tensor], Tensor]
#: columns that are updated one by one; the others follow by a matrix product
_BLOCK = 128


class Layer:
    """`weight` float64 `[g, K, o]`, columns first, and for each of the g groups of a convolution H `[g, K, K]`.

    `damp` is the share of the mean of diag(H) that is added to it, so that inputs never seen count a little.
    """

    def __init__(self, weight: Tensor, evidence: Evidence, damp: float = 0.0) -> None:
        hessian: Tensor = found(evidence, Hessian).double()
        self.weight = weight.double().reshape(len(hessian), -1, hessian.shape[-1]).mT.contiguous()
        mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        self.hessian = hessian + damp * mean * torch.eye(hessian.shape[-1], dtype=hessian.dtype)

    def columns(self, rows: Tensor) -> Tensor:
        """`[O, …]` → `[g, K, o]`, or `[g, 1, o]` of one number a row."""
        return rows.reshape(*self.weight.shape[::2], -1).mT.contiguous()

    def rows(self, columns: Tensor) -> Tensor:
        """`[g, K, o]` → `[O, K]`."""
        return columns.mT.reshape(-1, columns.shape[1])

    @property
    def curvature(self) -> Tensor:
        """H_jj at every weight `[g, K, o]`."""
        return self.hessian.diagonal(dim1=1, dim2=2).unsqueeze(2).expand_as(self.weight)

    def slope(self, values: Tensor) -> Tensor:
        """(Ŵ − W)·H `[g, K, o]`, half the gradient."""
        return self.hessian @ (values - self.weight)

    def error(self, values: Tensor) -> float:
        return float((self.slope(values) * (values - self.weight)).sum())

    def sweep(self, values: Tensor, choose: Choose) -> Tensor:
        """Every column once. An input that was always zero tells nothing: its target is the weight itself."""
        values, slope = values.clone(), self.slope(values)
        for start in range(0, values.shape[1], _BLOCK):
            stop = min(start + _BLOCK, values.shape[1])
            before, local = values[:, start:stop].clone(), slope[:, start:stop].clone()
            for j in range(start, stop):
                curvature = self.hessian[:, j, j, None]
                target = torch.where(curvature > 0, values[:, j] - local[:, j - start] / curvature, self.weight[:, j])
                chosen = choose(j, target)
                local.addcmul_(self.hessian[:, start:stop, j, None], (chosen - values[:, j]).unsqueeze(1))
                values[:, j] = chosen
            slope.baddbmm_(self.hessian[:, :, start:stop], values[:, start:stop] - before)
        return values

    def steps(self, slope: Tensor, direction: Tensor, part: Tensor, parts: int) -> Tensor:
        """How far it is best to go along a direction `[g, K, o]`: a number for each part of the rows, `part` `[O]`."""
        down, curvature = (
            torch.zeros(parts, dtype=slope.dtype).index_add_(0, part, (direction * x).sum(1).flatten())
            for x in (-slope, self.hessian @ direction)
        )
        return torch.where(curvature > 0, down / curvature, 0.0)
