"""A feed-forward layer keeps the hidden channels that most tokens activate strongly.

Wang et al. 2024, "CoreInfer", its core neurons, which are the neuron half of Wang et al. 2025, "CoreMatching"; over
calibration data instead of one prompt. a is what the last linear layer of a feed-forward layer reads for one token:

    C(a) = the top ρ of the positive channels of a        core = the top β of all channels by Σ_tokens [n ∈ C(a)]

The layer becomes β times as wide, on every target. Lossy: better than channels at random on a small ReLU network, no
better on stories260k, a gated Llama of 260 K parameters, where the channels of largest "activation" lose less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiler.axis_moves import slice_all
from ..compiler.errors import OptionError
from ..compiler.feed_forward import FeedForwardPass
from ..compiler.passes import Context, PassResult
from ..compiler.program import Program
from ..compiler.statistics import Statistic


@dataclass(frozen=True)
class CoreCount(Statistic):
    """In how many tokens each channel is among the top `share` of the positive ones, int64 `[F]`.

    `absolute` ranks by |a|, all channels: behind a product, as in gated layers, a sign means little.
    """

    share: float = 0.2
    absolute: bool = False

    def update(self, state: Any, *values: Tensor) -> Any:
        a = values[0].detach().float().reshape(-1, values[0].shape[-1])
        a = a.abs() if self.absolute else a
        active = a > 0
        limit = torch.ceil(self.share * active.sum(1, keepdim=True))
        rank = a.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count = (active & (rank < limit)).sum(0)
        return count if state is None else state + count


@dataclass(frozen=True)
class CoreNeurons(FeedForwardPass):
    """`keep` is β, the share of the channels that stay, `share` is ρ (the release's defaults); see `CoreCount` for
    `absolute`. Channels that are counted alike are kept in order."""

    name: ClassVar[str] = "core_neurons"
    positional: ClassVar[str | None] = "keep"
    needs_calibration: ClassVar[bool] = True

    keep: float = 0.4
    share: float = 0.2
    absolute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.keep <= 1 and 0 < self.share <= 1):
            raise OptionError(
                f"keep={self.keep} of the channels by share={self.share} of each token is out of range",
                where="pass 'core_neurons'",
                fix="use shares above 0, at most 1",
            )

    def needs(self, program: Program) -> list[Statistic]:
        return [self._count(layer.hidden.name) for layer in self.layers(program)[0]]

    def apply(self, program: Program, ctx: Context) -> PassResult:
        layers, skipped = self.layers(program)
        kept = {}
        for layer in layers:
            count = ctx.statistic(self._count(layer.hidden.name))
            size = max(1, round(self.keep * layer.axis.size))
            kept[layer.axis] = count.argsort(descending=True, stable=True)[:size].sort().values
        slice_all(program, kept)
        return PassResult([layer.path for layer in layers], skipped)

    def _count(self, node: str) -> CoreCount:
        return CoreCount(node, self.share, self.absolute)
