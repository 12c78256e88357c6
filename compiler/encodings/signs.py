"""w → scale · sign(w), 1 bit; and w → scale · {−1, 0, 1}, 1.6 bits.

Binary: scale = mean|w|, which for these codes is the least-squares one (Rastegari et al. 2016, "XNOR-Net", section
3.1). Zero has the sign +1.
Ternary: scale = the mean of |w| where |w| > Δ = 0.7 · mean|w| (Li et al. 2016, "Ternary Weight Networks", section
2.2). The paper has −1 and 1 just there, here they are where |w| > scale / 2, the nearest codes: what lies between the
two thresholds is stored better. Five codes are the digits of a byte, 3⁵ = 243.
Lossy. Squared error over that of zeros, Gaussian weights: 1 − 2/π = 0.363 and 0.191.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from .base import Arrays, Shape
from .packing import pack, packed_size, unpack
from .scaled import Scaled
from .scales import SCALES, Parameters

_THRESHOLD = 0.7
#: ternary codes in a byte
_TRITS = 5


@dataclass(frozen=True)
class Binary(Scaled):
    """±scale. Stored: `codes` uint8 `[O, ceil(I/8)]`, a bit for each weight, 1 for +1; and the scales.

    A clip search tries smaller scales.
    """

    group: int = 0
    scale: str = "float32"
    summary: ClassVar[str] = "binary"

    def __post_init__(self) -> None:
        self.check_options()

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, groups, _ = self.grid(shape)
        codes = (shape[0], packed_size(prod(shape[1:]), 1))
        return {"codes": (codes, torch.uint8)} | SCALES[self.scale].layout(rows, groups)

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        return self.round_scale(_mean(grouped.abs()), 1.0, shrink)

    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        return torch.where(grouped < 0, -1.0, 1.0)

    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes * parameters["scale"].unsqueeze(-1)

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        return {"codes": pack((codes > 0).reshape(shape[0], -1), 1)} | SCALES[self.scale].pack(parameters)

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        bits = unpack(arrays["codes"], 1, prod(shape[1:]))
        return (2 * bits - 1).reshape(self.grid(shape)), SCALES[self.scale].unpack(arrays)


@dataclass(frozen=True)
class Ternary(Scaled):
    """−scale, 0 or scale. Stored: `codes` uint8 `[O, ceil(I/5)]`, Σ (code + 1)·3^place of five weights; and the
    scales.

    A clip search tries larger thresholds, Δ / share, each with the scale that fits it.
    """

    group: int = 0
    scale: str = "float32"
    summary: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        self.check_options()

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, groups, _ = self.grid(shape)
        codes = (shape[0], -(-prod(shape[1:]) // _TRITS))
        return {"codes": (codes, torch.uint8)} | SCALES[self.scale].layout(rows, groups)

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        size = grouped.abs()
        scale, tried = (_mean_above(size, _THRESHOLD * _mean(size) / share) for share in (1.0, shrink))
        return self.round_scale(scale, 1.0, torch.where(scale > 0, tried / scale, 1.0))

    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        return torch.round(grouped / parameters["scale"].unsqueeze(-1)).clamp(-1, 1)

    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return codes * parameters["scale"].unsqueeze(-1)

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        digits = (codes + 1).int().reshape(shape[0], -1)
        digits = torch.nn.functional.pad(digits, (0, -digits.shape[1] % _TRITS)).reshape(shape[0], -1, _TRITS)
        packed = (digits * 3 ** torch.arange(_TRITS, device=codes.device)).sum(-1).to(torch.uint8)
        return {"codes": packed} | SCALES[self.scale].pack(parameters)

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        packed = arrays["codes"]
        table = [[byte // 3**place % 3 - 1 for place in range(_TRITS)] for byte in range(256)]
        codes = torch.tensor(table, dtype=torch.int32, device=packed.device).index_select(0, packed.flatten().int())
        codes = codes.reshape(shape[0], -1)[:, : prod(shape[1:])]
        return codes.reshape(self.grid(shape)), SCALES[self.scale].unpack(arrays)


def _mean(size: Tensor) -> Tensor:
    """The mean of `[R, G, n]` over n; of equal numbers it is that number, which float32 sums do not promise."""
    return size.mean(-1, dtype=torch.float64).float()


def _mean_above(size: Tensor, threshold: Tensor) -> Tensor:
    """The mean of the sizes `[R, G, n]` above a threshold `[R, G]`; 0 of none."""
    above = size > threshold.unsqueeze(-1)
    return ((size * above).sum(-1, dtype=torch.float64) / above.sum(-1).clamp(min=1)).float()
