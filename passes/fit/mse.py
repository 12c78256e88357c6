"""w → encode(w) under the range, shrunk per group, that minimises Σ(ŵ − w)². Data-free.

The clip search of GPTQ's reference quantiser (Frantar et al. 2023), with a squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compiler.encodings import Affine, Arrays, Encoding

#: ranges tried, as fractions of the full one
_SHRINKS = [1 - i / 50 for i in range(31)]


@dataclass(frozen=True)
class Mse:
    """Clip search over 31 ranges from 100 % down to 40 % of each group's own."""

    name: str = "mse"

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(encoding, Affine):
            return None
        return f"fitter 'mse' searches integer ranges; {encoding} has none"

    def fit(self, encoding: Encoding, weight: Tensor) -> Arrays:
        assert isinstance(encoding, Affine)
        shape = tuple(weight.shape)
        grouped = weight.float().reshape(encoding.grid(shape))
        best_scale, best_zero = encoding.parameters(weight)
        best_error = torch.full_like(best_scale, float("inf"))
        for shrink in _SHRINKS:
            scale, zero = encoding.parameters(weight, shrink)
            codes = encoding.quantize(weight, scale, zero)
            error = (encoding.dequantize(codes, scale, zero) - grouped).square_().sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        codes = encoding.quantize(weight, best_scale, best_zero)
        return encoding.store(codes, best_scale, best_zero, shape)
