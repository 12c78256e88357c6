"""w → scale · q with q of `bits` bits, read with `read` of them: rnd(q / 2^Δ) · scale · 2^Δ, Δ = bits − read.

Huang et al. 2025, "Nearly Lossless Adaptive Bit Switching" (double rounding): q = clip(rnd(w / scale)), then
q_l = clip(rnd(q / 2^Δ)), each clipped to −2^(b−1) … 2^(b−1) − 1 and rounded half to even. One stored master serves
every width. Lossy; at the best scale the squared error of 2 and 4 bits is that of rounding once, within 1 %.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .affine import Affine
from .base import Arrays, Shape
from .scaled import Scaled
from .scales import Parameters


@dataclass(frozen=True)
class Nested(Scaled):
    """Integers of `bits` bits of which `decode` reads the upper `read`. Stored: what `Affine(bits, group)` stores.

    `read` chooses the model, not what is stored: `at(width)` reads the same arrays at another width. Where scales
    are chosen, `read` says for which width: the largest weight of a group becomes its largest code.
    """

    bits: int = 8
    read: int = 4
    group: int = 0
    scale: str = "float32"
    summary: ClassVar[str] = "nested integer"

    def __post_init__(self) -> None:
        if not 2 <= self.read <= self.bits <= 8:
            raise OptionError(
                f"{self.read} bits cannot be read from {self.bits}",
                where="Nested(bits=…, read=…)",
                fix="use 2 <= read <= bits <= 8",
            )
        self.check_options()

    @property
    def master(self) -> Affine:
        """How the codes are stored, and what they decode to when all bits are read."""
        return Affine(self.bits, self.group, scale=self.scale)

    @property
    def step(self) -> int:
        """2^Δ, how many codes of the master lie between two that are read."""
        return 1 << self.bits - self.read

    def at(self, read: int) -> Nested:
        """The encoding that reads the same arrays with `read` bits."""
        return replace(self, read=read)

    def narrow(self, arrays: Arrays, shape: Shape) -> tuple[Affine, Arrays]:
        """The `read` bits alone, as an encoding and its arrays for a tensor of this shape: they decode to the same."""
        codes, parameters = self.load(arrays, shape)
        encoding = Affine(self.read, self.group, scale=self.scale)
        # all that has the unit of a weight, not how often it is halved
        wider = {name: value * self.step if name != "shift" else value for name, value in parameters.items()}
        return encoding, encoding.store(self._read(codes.float()), wider, shape)

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return self.master.layout(shape)

    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        largest = ((1 << self.read - 1) - 1) * self.step
        if self.scale == "e8m0-ceil" and self.step > 1:
            largest += 1  # scales are up to twice as large: the half of a step that is left would be read as zero
        return self.round_scale(grouped.abs().amax(-1), largest, shrink)

    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        """Codes of the master."""
        return _clip(torch.round(grouped / parameters["scale"].unsqueeze(-1)), self.bits)

    def _read(self, codes: Tensor) -> Tensor:
        return _clip(torch.round(codes / self.step), self.read)

    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return self._read(codes) * (parameters["scale"] * self.step).unsqueeze(-1)

    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        return self.master.store(codes, parameters, shape)

    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        return self.master.load(arrays, shape)


def _clip(codes: Tensor, bits: int) -> Tensor:
    return codes.clamp(-(1 << bits - 1), (1 << bits - 1) - 1)
