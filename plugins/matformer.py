"""W₂·act(W₁·x) → W₂[:, :m]·act(W₁[:m]·x): every feed-forward layer keeps its first m of F hidden channels.

Devvrit et al. 2023, "MatFormer: Nested Transformer for Elastic Inference", section 3. Trained so that each of the
widths F/8, F/4, F/2, F is a model (`narrowed` does that to a PyTorch model), any choice of widths is one: Mix'n'Match
takes widths that do not fall with depth, as close to each other as they can be. Extraction is exact.
A model that was not trained so can be sorted first, its most important channels in front: exact at full width, lossy
below. Models of several widths, saved together by `paretoc.save`, are stored as one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compiler.axis_moves import slice_all
from ..compiler.errors import OptionError
from ..compiler.feed_forward import FeedForward, FeedForwardPass, sorted_channels
from ..compiler.passes import Context, PassResult
from ..compiler.program import Program
from ..compiler.registry import registry

GRANULARITIES = (0.125, 0.25, 0.5, 1.0)
#: `order` of a model whose first channels were trained to be the ones that stay
TRAINED = "trained"


@dataclass(frozen=True)
class MatFormer(FeedForwardPass):
    """Widths are shares of F. `width` is one of `granularities` for all layers, or a mean that two neighbouring ones
    mix to; `widths` gives that of each layer in graph order. `order` is "trained", or the criterion by which channels
    are sorted: "activation", "magnitude", …; `round_to` is the multiple of channels that widths are rounded to.
    """

    name: ClassVar[str] = "matformer"
    positional: ClassVar[str | None] = "width"

    width: float = 0.5
    widths: tuple[float, ...] = ()
    order: str = TRAINED
    granularities: tuple[float, ...] = GRANULARITIES
    round_to: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("widths", "granularities"):
            object.__setattr__(self, option, tuple(getattr(self, option)))
        if self.order != TRAINED:
            registry().criterion(self.order)
        steps = self.granularities
        if not steps or list(steps) != sorted(set(steps)) or not 0 < steps[0] <= steps[-1] <= 1 or self.round_to < 1:
            raise OptionError(
                f"the granularities {list(steps)} in multiples of {self.round_to} are no widths",
                where="pass 'matformer'",
                fix="give rising shares, 0 < … ≤ 1, and a multiple of 1 or more",
            )
        if not (all(0 < w <= 1 for w in self.widths) if self.widths else steps[0] <= self.width <= steps[-1]):
            raise OptionError(
                f"the width {list(self.widths) or self.width} is out of range",
                where="pass 'matformer'",
                fix=f"use {steps[0]:g} … {steps[-1]:g}; widths= takes any share above 0 for each layer",
            )

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # depends on the order
        return self.order != TRAINED and not registry().criterion(self.order).data_free

    def apply(self, program: Program, ctx: Context) -> PassResult:
        layers, skipped = self.layers(program)
        sizes = [layer.axis.size for layer in layers]
        kept = [max(self.round_to, round(w * size / self.round_to) * self.round_to) for w, size in self._plan(sizes)]
        orders = self._orders(layers, ctx)
        slice_all(program, {x.axis: order[:m] for x, order, m in zip(layers, orders, kept, strict=True)})
        shares = [m / size for m, size in zip(kept, sizes, strict=True)]
        metrics = {"least width": min(shares), "mean width": sum(kept) / sum(sizes), "largest width": max(shares)}
        return PassResult([layer.path for layer in layers], skipped, metrics)

    def _plan(self, sizes: Sequence[int]) -> Iterator[tuple[float, int]]:
        """Each layer's width and F."""
        if self.widths and len(self.widths) != len(sizes):
            raise OptionError(
                f"{len(self.widths)} widths for {len(sizes)} feed-forward layers",
                where="pass 'matformer'",
                fix="give one for each of the layers that targets= and ignore= choose",
            )
        return zip(self.widths or mix_and_match(self.width, self.granularities, sizes), sizes, strict=True)

    def _orders(self, layers: Sequence[FeedForward], ctx: Context) -> list[Tensor]:
        """The channels of each layer in the order in which they stay."""
        if self.order == TRAINED:
            return [torch.arange(layer.axis.size) for layer in layers]
        return sorted_channels(layers, self.order, ctx)


def mix_and_match(width: float, granularities: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """The two granularities next to a mean width: the smaller one for the first layers, the larger one for as many of
    the last as the mean allows, layers weighed by their size F (section 3.3: the least slope)."""
    low = max(g for g in granularities if g <= width)
    high = min((g for g in granularities if g > width), default=low)
    left = (width - low) * sum(sizes) * (1 + 1e-9)
    widths = [low] * len(sizes)
    for layer in reversed(range(len(sizes))):
        left -= (high - low) * sizes[layer]
        if left < 0:
            break
        widths[layer] = high
    return widths


@contextmanager
def narrowed(model: nn.Module, widths: float | Sequence[float], layers: str) -> Iterator[None]:
    """Within it, a PyTorch model computes with the first channels only of what its linear layers named by the glob
    `layers` ("*.down_proj") read: `widths` is one share for all of them, or one for each, in order.

    For training: in each step the loss at one width drawn at random (the paper), or the sum over several.
    """
    chosen = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and fnmatch.fnmatchcase(name, layers)]
    shares = [widths] * len(chosen) if isinstance(widths, (int, float)) else list(widths)
    if not chosen or len(shares) != len(chosen):
        raise OptionError(
            f"{layers!r} names {len(chosen)} linear layers, and there are {len(shares)} widths",
            where="narrowed",
            fix="give a glob on the names of the layers that read the hidden channels, and a width for each",
        )
    with ExitStack() as stack:
        for layer, share in zip(chosen, shares, strict=True):
            stack.callback(layer.register_forward_pre_hook(_first(round(share * layer.in_features))).remove)
        yield


def _first(count: int) -> Any:
    """A hook that lets the first channels of an input through."""

    def mask(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        return x * (torch.arange(x.shape[-1], device=x.device) < count).to(x.dtype)

    return mask
