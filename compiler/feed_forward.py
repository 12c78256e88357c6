"""The hidden axis of a feed-forward layer, and the base of passes that act on it.

    y = W₂·act(W₁·x + b₁) + b₂        y = W₂·(act(W_g·x) ⊙ W_u·x)

The hidden channels may be reordered and left out as long as W₁ (W_g, W_u) and W₂ agree: `axes` finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from .axes import Axis, find_axes
from .errors import PassError
from .importance import measure
from .passes import Context, Phase, SitePass
from .program import Program, operands
from .registry import registry
from .sites import FeedForwardSite, feed_forward_sites


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward layer and its hidden axis of F channels; `path` is that of its last linear layer."""

    site: FeedForwardSite
    axis: Axis
    path: str

    @property
    def input(self) -> fx.Node:
        """x `[…, C]`."""
        return operands(self.site.up)[0]  # type: ignore[no-any-return]

    @property
    def hidden(self) -> fx.Node:
        """What W₂ multiplies `[…, F]`."""
        return operands(self.site.down)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class FeedForwardPass(SitePass):
    """A pass over feed-forward layers: those whose last linear layer `targets` and `ignore` choose."""

    phase: ClassVar[Phase] = Phase.WIDTH

    def layers(self, program: Program) -> tuple[list[FeedForward], dict[str, str]]:
        """The layers in graph order, each axis once, and why others are left. Raises PassError when none remains."""
        chosen = {site.node: site.path for site in self.sites(program)}
        axes = find_axes(program)
        found: dict[Axis, FeedForward] = {}
        skipped: dict[str, str] = {}
        for site in feed_forward_sites(program):
            if (path := chosen.get(site.down)) is None:
                continue
            hidden = operands(site.down)[0]
            held = axes.at(hidden, -1)
            if len(held) != 1 or held[0].size != hidden.meta["val"].shape[-1]:
                skipped[path] = "its hidden channels are no axis of their own"
            elif (pin := held[0].why("slice")) is not None:
                skipped[path] = pin.why
            else:
                found.setdefault(held[0], FeedForward(site, held[0], path))
        if not found:
            reasons = "; ".join(f"{path}: {why}" for path, why in skipped.items())
            raise PassError(
                f"there is no feed-forward layer to act on{': ' * bool(reasons)}{reasons}",
                where=f"pass {self.name!r}",
                fix="a linear layer, an activation and a linear layer make one; check targets= and ignore=",
            )
        return list(found.values()), skipped


def sorted_channels(layers: Sequence[FeedForward], criterion: str, ctx: Context) -> list[Tensor]:
    """The hidden channels of each layer, int64 `[F]`, the most important first."""
    scores = measure([layer.axis for layer in layers], registry().criterion(criterion), ctx.batches, ctx.track)
    return [scores[layer.axis].argsort(descending=True, stable=True) for layer in layers]
