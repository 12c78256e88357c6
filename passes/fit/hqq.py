"""min_z Σ |W − s·(q − z)|^p, q = round(W/s + z), p = 0.7 < 1: few weights may err much, so that most err little.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": E takes up large errors, by turns
E = shrink(W − Ŵ), the generalised soft threshold sgn(x)·max(|x| − |x|^(p−1)/β, 0), and z = mean(q − (W − E)/s). Only
the zero points move. Errors are measured in steps s here: the published β = 10 then means the same at every
magnitude, where on raw weights of 0.03 it shrinks every error to nothing. Data-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.encodings import Affine, Arrays, Encoding, Parameters, innermost
from ...compiler.protocols import DataFree


@dataclass(frozen=True)
class Hqq(DataFree):
    """Floating zero points by half-quadratic splitting; each group keeps the best of `iterations`.

    `norm` is p, `beta` the weight of the splitting, `growth` its growth in each iteration.
    """

    name: ClassVar[str] = "hqq"

    norm: float = 0.7
    iterations: int = 20
    beta: float = 10.0
    growth: float = 1.01

    def refuse(self, encoding: Encoding) -> str | None:
        values = innermost(encoding)
        if isinstance(values, Affine) and not values.symmetric and values.zero == "float":
            return None
        # with integer zero points nothing was gained in any of six trials: rounding undoes the move
        return f"fitter 'hqq' moves zero points by parts of a step; {encoding} has none that are not whole"

    def fit_values(self, encoding: Encoding, weight: Tensor) -> Arrays:
        assert isinstance(encoding, Affine)
        grouped = encoding.grouped(weight)
        parameters = self._search(encoding, grouped, encoding.parameters(grouped))
        return encoding.store(encoding.quantize(grouped, parameters), parameters, tuple(weight.shape))

    def _search(self, encoding: Affine, grouped: Tensor, parameters: Parameters) -> Parameters:
        steps = grouped / parameters["scale"].unsqueeze(-1)
        zero, beta = parameters["zero"], self.beta
        best, least = zero, torch.full_like(zero, torch.inf)
        for _ in range(self.iterations + 1):
            codes = encoding.quantize(grouped, parameters | {"zero": zero})
            error = steps - (codes - zero.unsqueeze(-1))
            total = error.abs().pow(self.norm).sum(-1)
            best, least = torch.where(total < least, zero, best), torch.minimum(total, least)
            zero = (codes - steps + self._shrunk(error, beta)).mean(-1)
            beta *= self.growth
        return parameters | {"zero": best}

    def _shrunk(self, error: Tensor, beta: float) -> Tensor:
        size = error.abs()
        return error.sign() * (size - size.clamp(min=1e-12).pow(self.norm - 1) / beta).relu()
