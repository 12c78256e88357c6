"""W_l[i] → s_l·g(p)·Z[(h(p) + i mod c) mod m], p = i div c: all weights are read from one array Z of m numbers.

Desai & Shrivastava 2024, "In Defense of Parameter Sharing for Model-Compression" (STABLE-RPS): i counts through all
layers, and c = m folds them over Z, so that all numbers of Z are read equally often and, with m = n, the model is what
it was. Chunks c < m at hashed places are ROAST (Desai, Zhou & Shrivastava 2023, "Hardware-aware compression with random
operation access specific tile hashing"), c = 1 is HashedNet. s_l = 1 / √fan-in; h and the sign g are hashed from p.

A piece of Z is a slice: no index is stored. For a model that was trained so, `stable_rps` finds its Z exactly; for any
other it is the Z of least squares, which loses most of the model. FLOPs stay.

Trained from scratch, an MLP on scikit-learn's digits with 1690 numbers for 84 480 weights classifies 97.5 ± 0.1 % of
the test images, a dense net of 1690 weights 94.8 ± 0.2, magnitude pruning to as many with retraining 91.1 ± 1.5 (three
seeds, benchmarks/sharing.py); at 10 × all three lie within two standard errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar

import torch
from torch import Tensor

from ..compiler.encodings import Arrays, Encoding, Fit
from ..compiler.errors import OptionError
from ..compiler.passes import Context, PassResult, Phase
from ..compiler.program import Program, operands
from ..compiler.reencode import EncodePass
from .hashing import PRIME, coefficients

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Folded(Encoding):
    """`scale` times signed pieces of an array of `slots` numbers, which other weights may read too.

    The first number of the weight is number `offset` of all that read the array; a new piece begins at every multiple
    of `chunk` (0: of `slots`). Stored: `values` float32 `[slots]`.
    """

    slots: int = 256
    offset: int = 0
    scale: float = 1.0
    chunk: int = 0
    seed: int = 0
    summary: ClassVar[str] = "folded"

    def __post_init__(self) -> None:
        where = "Folded(…)"
        if self.slots < 1 or self.offset < 0:
            raise OptionError(
                f"slots={self.slots}, offset={self.offset} is no place",
                where=where,
                fix="use 1 slot or more, from 0 on",
            )
        if not 0 <= self.chunk <= self.slots:
            raise OptionError(f"pieces of {self.chunk} do not fit {self.slots} slots", where=where, fix="use 0 … slots")
        if not 0 < self.scale < float("inf"):
            raise OptionError(f"{self.scale} is not a scale", where=where, fix="use a positive number")

    def pieces(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(first slot, length, sign) of the pieces that hold `count` weights; one may go on at slot 0."""
        a, b, c = coefficients(self.seed)
        chunk, place, end = self.chunk or self.slots, self.offset, self.offset + count
        while place < end:
            piece, inside = divmod(place, chunk)
            length = min(chunk - inside, end - place)
            hashed = (a * piece + b * piece * piece + c) % PRIME
            yield (hashed + inside) % self.slots, length, 1 - 2 * (hashed // self.slots % 2)
            place += length

    def places(self, count: int) -> tuple[Tensor, Tensor]:
        """The slot that each of `count` weights reads, int64, and its sign times the scale, float64."""
        a, b, c = coefficients(self.seed)
        place = torch.arange(self.offset, self.offset + count)
        piece, inside = place // (self.chunk or self.slots), place % (self.chunk or self.slots)
        hashed = (a * piece % PRIME + b * (piece * piece % PRIME) + c) % PRIME  # of 64 bits none is lost
        return (hashed + inside) % self.slots, (1 - 2 * (hashed // self.slots % 2)) * torch.tensor(
            self.scale, dtype=torch.float64
        )

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"values": ((self.slots,), torch.float32)}

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        return fold([weight], [self]) if fit is None else fit(self, weight)

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        ring = torch.cat([arrays["values"], arrays["values"]])
        pieces = [ring[first : first + n] * (sign * self.scale) for first, n, sign in self.pieces(prod(shape))]
        return torch.cat(pieces).reshape(shape)


def fold(weights: Sequence[Tensor], encodings: Sequence[Folded]) -> Arrays:
    """The one array that weights read: Z_j = Σ s·g·W / Σ s², which is least squares, over all that read slot j."""
    total = torch.zeros(2, encodings[0].slots, dtype=torch.float64)
    for weight, encoding in zip(weights, encodings, strict=True):
        index, scale = encoding.places(weight.numel())
        total.index_add_(1, index, torch.stack([scale * weight.detach().double().flatten(), scale.square()]))
    return {"values": (total[0] / torch.where(total[1] > 0, total[1], 1.0)).float()}


def plan(
    shapes: Mapping[str, Shape], compression: float, chunk: int = 0, seed: int = 0, spread: float = 1.0
) -> dict[str, Folded]:
    """How weights of these shapes, one behind the other, share an array of 1/`compression` as many numbers.

    To train: draw Z uniformly from −spread … spread, which gives PyTorch's own first weights, and let each weight be
    `decode({"values": Z}, shape)`. A spread near 1 / √fan-in makes steps in Z as large as those in a weight would be;
    with any, under SGD, divide the gradient of Z by `gradient_scale`.
    """
    counts = [prod(shape) for shape in shapes.values()]
    slots = max(ceil(sum(counts) / compression), 1)
    return {
        name: Folded(slots, sum(counts[:i]), prod(shape[1:]) ** -0.5 / spread, min(chunk, slots), seed)
        for i, (name, shape) in enumerate(shapes.items())
    }


def gradient_scale(encodings: Mapping[str, Folded], shapes: Mapping[str, Shape]) -> Tensor:
    """K_j = (Σ s)² / count over the weights that read slot j, float32 `[slots]`: by this much a step in Z_j moves the
    model further than a step in a weight."""
    sums = torch.zeros(2, next(iter(encodings.values())).slots, dtype=torch.float64)
    for name, encoding in encodings.items():
        index, scale = encoding.places(prod(shapes[name]))
        sums.index_add_(1, index, torch.stack([scale.abs(), torch.ones_like(scale)]))
    return (sums[0].square() / (sums[1] + 1e-3) + 1e-6).float()


@dataclass(frozen=True)
class StableRps(EncodePass):
    """Let the weights of all sites, in graph order, read one array of 1/`compression` as many numbers. `chunk` 0 folds.

    Weights that something else reads too, or that are encoded already, are left and listed.
    """

    name: ClassVar[str] = "stable_rps"
    phase: ClassVar[Phase] = Phase.SHARE
    positional: ClassVar[str | None] = "compression"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding")

    compression: float = 10.0
    chunk: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compression >= 1 or self.chunk < 0:
            raise OptionError(
                f"compression={self.compression}, chunk={self.chunk} is not valid",
                where="pass 'stable_rps'",
                fix="use a compression of 1 or more, and a chunk of 0 or more",
            )

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        weights = {site.weight: program.weight_value(site.weight) for site in self.distinct(program, result)}
        shapes = {node.name: tuple(value.shape) for node, value in weights.items()}
        encodings = plan(shapes, self.compression, self.chunk, self.seed)
        arrays = fold(list(weights.values()), list(encodings.values()))
        decodes = [program.encode(node, encodings[node.name], arrays) for node in weights]
        shared = program.attribute(f"{self.name}.values", arrays["values"], before=operands(min(decodes))[0][0])
        lost = whole = 0.0
        for decode, weight in zip(decodes, weights.values(), strict=True):
            decode.update_arg(0, [shared])
            lost += float((program.weight_value(decode) - weight).double().square().sum())
            whole += float(weight.double().square().sum())
        result.metrics = {"slots": len(arrays["values"]), "relative error": (lost / whole) ** 0.5 if whole else 0.0}
        program.refresh()
        return result
