"""w = scale · element(code): weights in groups, each under one scale. What the range-searching fitters understand.

An encoding of this kind says how a group becomes codes under given parameters; which parameters, and which of the
nearby codes, is the business of a fitter.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod

import torch
from torch import Tensor

from ..errors import OptionError, did_you_mean
from .base import Arrays, Encoding, Fit, Shape
from .scales import SCALES, Parameters, check_reach


class Scaled(Encoding):
    """The weight seen as a matrix `[O, I]` (trailing axes flattened into `I`), in groups along `I`.

    `group` is the number of consecutive weights that share a scale; 0: one scale per output channel, −1: one per
    tensor. `scale` names how scales are stored, see `scales.py`. Subclasses are frozen dataclasses with these
    fields. Parameters are tensors `[R, G]`, one number a group, "scale" among them.
    """

    group: int
    scale: str

    def check_options(self) -> None:
        """What `__post_init__` of every subclass checks."""
        name = type(self).__name__
        if self.group < -1:
            raise OptionError(
                f"group={self.group} is not a group size",
                where=f"{name}(group=…)",
                fix="use a positive size, 0 for one scale per channel, or -1 for one per tensor",
            )
        if self.scale not in SCALES:
            raise OptionError(
                f"there is no scale format {self.scale!r}",
                where=f"{name}(scale=…)",
                fix=did_you_mean(self.scale, SCALES),
            )

    @property
    def local(self) -> bool:
        """Whether the parameters of a group depend on that group alone."""
        return SCALES[self.scale].local

    @abstractmethod
    def parameters(self, grouped: Tensor, shrink: Tensor | float = 1.0) -> Parameters:
        """Parameters `[R, G]` for the range of each group of `[R, G, n]` times `shrink` (clip search)."""

    @abstractmethod
    def quantize(self, grouped: Tensor, parameters: Parameters) -> Tensor:
        """Nearest codes, as floats `[R, G, n]`. What a code is, is the encoding's own affair."""

    @abstractmethod
    def dequantize(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """Codes → weights `[R, G, n]`."""

    @abstractmethod
    def store(self, codes: Tensor, parameters: Parameters, shape: Shape) -> Arrays:
        """Codes and parameters → the stored arrays."""

    @abstractmethod
    def load(self, arrays: Arrays, shape: Shape) -> tuple[Tensor, Parameters]:
        """The stored arrays → codes `[R, G, n]` and parameters."""

    def grid(self, shape: Shape) -> tuple[int, int, int]:
        """(R, G, n): how the scales see a tensor of this shape."""
        rows, columns = shape[0], prod(shape[1:])
        if self.group == -1:
            return 1, 1, rows * columns
        if self.group == 0:
            return rows, 1, columns
        if columns % self.group:
            divisors = [d for d in (16, 32, 64, 128, 256) if columns % d == 0]
            fault = "does not divide" if self.group < columns else "is larger than"
            raise OptionError(
                f"group size {self.group} {fault} the input width {columns}",
                where=f"a weight of shape {list(shape)}",
                fix=f"use {' or '.join(map(str, divisors))}" if divisors else "use group=0 (one scale per channel)",
            )
        return rows, columns // self.group, self.group

    def grouped(self, weight: Tensor) -> Tensor:
        """W → float32 `[R, G, n]`."""
        return weight.float().reshape(self.grid(tuple(weight.shape)))

    def round_scale(self, peak: Tensor, top: float, shrink: Tensor | float = 1.0) -> Parameters:
        """Peaks `[R, G]` of the groups, what they shall be divided by, and clip search's share of them → the scales
        that this format holds; a group of zeros has some scale too."""
        return SCALES[self.scale].round(peak, top, shrink)

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        groups = self.grouped(weight).flatten(0, 1)
        largest = groups[groups.abs().amax(-1).argmax()].reshape(1, 1, -1)
        check_reach(self, largest, lambda group: self.parameters(group)["scale"])

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        if fit is not None:
            return fit(self, weight)
        grouped = self.grouped(weight)
        parameters = self.parameters(grouped)
        return self.store(self.quantize(grouped, parameters), parameters, tuple(weight.shape))

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        codes, parameters = self.load(arrays, shape)
        codes = codes.to(torch.float32)  # of a large weight each copy counts
        return self.dequantize(codes, parameters).reshape(shape)
