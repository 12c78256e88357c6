"""w → scale · (code − zero), codes of 2–8 bits, one scale per tensor, channel or group of the input axis.

Symmetric: scale = max|w| / (2^(b−1) − 1), codes −Q…Q (the extra negative level is left out, so that a code and its
negation both exist). Asymmetric: the range is widened to contain 0, which is then stored exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Encoding, Fit, Shape
from .packing import pack, packed_size, unpack


@dataclass(frozen=True)
class Affine(Encoding):
    """Uniform integer codes over the weight seen as a matrix `[O, I]` (trailing axes flattened into `I`).

    `group` is the number of consecutive weights along `I` that share a scale; 0 means one scale per output channel,
    −1 one scale per tensor. Stored: `codes` uint8 `[O, ceil(I·bits/8)]` offset-binary when symmetric, `scale`
    float32 `[O, G]` (or `[1, 1]`), and when asymmetric `zero` uint8 `[O, ceil(G·bits/8)]`, packed like the codes.
    """

    bits: int = 8
    group: int = 0
    symmetric: bool = True
    summary: ClassVar[str] = "integer"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError(f"Affine has 2 to 8 bits, not {self.bits}", where="Affine(bits=…)", fix="use 2 … 8")
        if self.group < -1:
            raise OptionError(
                f"group={self.group} is not a group size",
                where="Affine(group=…)",
                fix="use a positive size, 0 for one scale per channel, or -1 for one per tensor",
            )

    @property
    def levels(self) -> int:
        """The largest code when asymmetric, the largest magnitude Q when symmetric."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def offset(self) -> int:
        """What is added to a symmetric code before it is packed."""
        return 1 << (self.bits - 1)

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        """(rows, groups, weights per group): how the scales see a tensor of this shape."""
        rows, columns = shape[0], prod(shape[1:])
        if self.group == -1:
            return 1, 1, rows * columns
        if self.group == 0:
            return rows, 1, columns
        if columns % self.group:
            divisors = [d for d in (16, 32, 64, 128, 256) if columns % d == 0]
            raise OptionError(
                f"group size {self.group} does not divide the input width {columns}",
                where=f"a weight of shape {list(shape)}",
                fix=f"use {' or '.join(map(str, divisors))}" if divisors else "use group=0 (one scale per channel)",
            )
        return rows, columns // self.group, self.group

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, groups, _ = self.grid(shape)
        columns = prod(shape[1:])
        arrays: dict[str, tuple[Shape, torch.dtype]] = {
            "codes": ((shape[0], packed_size(columns, self.bits)), torch.uint8),
            "scale": ((rows, groups), torch.float32),
        }
        if not self.symmetric:
            arrays["zero"] = ((rows, packed_size(groups, self.bits)), torch.uint8)
        return arrays

    def parameters(self, weight: Tensor, shrink: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero point `[rows, groups]` for the range of each group times `shrink` (clip search)."""
        grouped = weight.float().reshape(self.grid(tuple(weight.shape)))
        if self.symmetric:
            peak = grouped.abs().amax(-1) * shrink
            scale = torch.where(peak > 0, peak, torch.full_like(peak, self.levels)) / self.levels
            return scale, torch.zeros_like(scale)
        low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
        flat = low == high
        low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
        scale = (high - low) / self.levels
        return scale, torch.round(-low / scale)

    def quantize(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes (float, unpacked) `[rows, groups, n]` under the given scales."""
        grouped = weight.float().reshape(self.grid(tuple(weight.shape)))
        low = -self.levels if self.symmetric else 0
        return (torch.round(grouped / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp(low, self.levels)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)

    def store(self, codes: Tensor, scale: Tensor, zero: Tensor, shape: Shape) -> Arrays:
        """Unpacked codes and their scales → the stored arrays."""
        flat = codes.reshape(shape[0], -1) + (self.offset if self.symmetric else 0)
        arrays = {"codes": pack(flat.to(torch.uint8), self.bits), "scale": scale.float().contiguous()}
        if not self.symmetric:
            arrays["zero"] = pack(zero.to(torch.uint8), self.bits)
        return arrays

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        if fit is not None:
            return fit(self, weight)
        scale, zero = self.parameters(weight)
        return self.store(self.quantize(weight, scale, zero), scale, zero, tuple(weight.shape))

    def codes(self, arrays: Arrays, shape: Shape) -> Tensor:
        """The signed (symmetric) or unsigned integer codes `[O, I]`, int32."""
        codes = unpack(arrays["codes"], self.bits, prod(shape[1:]))
        return codes - self.offset if self.symmetric else codes

    def zeros(self, arrays: Arrays, shape: Shape) -> Tensor:
        """The zero points `[rows, groups]`, int32."""
        return unpack(arrays["zero"], self.bits, self.grid(shape)[1])

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        grouped = self.codes(arrays, shape).to(torch.float32).reshape(self.grid(shape))
        if not self.symmetric:
            grouped = grouped - self.zeros(arrays, shape).to(torch.float32).unsqueeze(-1)
        return (grouped * arrays["scale"].unsqueeze(-1)).reshape(shape)
