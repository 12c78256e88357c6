"""What a pass may ask of calibration data: values at nodes, reduced over all batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cholesky import singular


@dataclass(frozen=True)
class Derived:
    """A value computed from those at the nodes it names. Subclass with `nodes` and `compute`.

    It is computed once for each batch, when a statistic first asks for it, and kept while weights are rewritten.
    """

    @property
    def nodes(self) -> tuple[str, ...]:
        raise NotImplementedError

    def compute(self, *values: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Statistic:
    """A reduction over the value of one node, or of the several that `nodes` names. Subclass with `start`, `update`
    and `finish`.

    Two statistics that compare equal are gathered once. The engine never keeps the values themselves.
    """

    node: str

    @property
    def nodes(self) -> tuple[str | Derived, ...]:
        """What `update` is given, in this order: values at nodes, and values derived from such."""
        return (self.node,)

    def start(self) -> Any:
        return None

    def update(self, state: Any, *values: Tensor) -> Any:
        raise NotImplementedError

    def finish(self, state: Any) -> Any:
        return state

    def combine(self, results: Sequence[Any]) -> Any:
        """One result from those of several nodes: a weight that several sites share meets all their inputs."""
        if len(results) > 1:
            raise NotImplementedError(f"{type(self).__name__} of several nodes")
        return results[0]

    def doubt(self, found: Any) -> str | None:
        """Why what was found says less than it should, for the warnings of a pass; None when all is well."""
        return None


@dataclass(frozen=True)
class MinMax(Statistic):
    """(min, max) over everything, float32 `[2]`."""

    def update(self, state: Any, *values: Tensor) -> Any:
        low, high = torch.aminmax(values[0].detach().float())
        if state is None:
            return torch.stack([low, high])
        return torch.stack([torch.minimum(state[0], low), torch.maximum(state[1], high)])


@dataclass(frozen=True)
class Histogram(Statistic):
    """How many values lie where: (counts float64 `[N]`, edges float64 `[N + 1]`), N ≤ `bins`, 0 among the edges.

    One pass, fixed memory, and exactly the same for any split into batches: the width of a bin is the least power of
    two under which `bins` of them cover all values; where the range outgrows them, neighbours merge. The outermost
    edges are the least and the greatest value, or 0. What is 0 is not counted: every code holds it exactly, however
    much of it there is. What is not finite is not counted either.
    """

    bins: int = 8192

    def update(self, state: Any, *values: Tensor) -> Any:
        return self._count(state, values[0].detach().float())

    def _count(self, state: Any, x: Tensor, importance: Tensor | None = None) -> Any:
        """Each value counts once, or as often as `importance` says, whole numbers that broadcast to x."""
        counted = (x != 0) & x.isfinite()
        often = None if importance is None else importance.expand_as(x)[counted]
        x = x[counted]
        low, high, counts, exponent = state or (0.0, 0.0, torch.zeros(1, dtype=torch.float64), _LEAST_EXPONENT)
        first = math.floor(low / 2.0**exponent)
        if len(x):
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        wider = self._exponent(low, high, exponent)
        start, stop = (math.floor(bound / 2.0**wider) for bound in (low, high))
        merged = torch.zeros(stop - start + 1, dtype=torch.float64)
        merged.index_add_(0, (torch.arange(first, first + len(counts)) >> wider - exponent) - start, counts)
        merged += torch.bincount((x.double() * 2.0**-wider).floor().long() - start, often, minlength=len(merged))
        return low, high, merged, wider

    def _exponent(self, low: float, high: float, least: int) -> int:
        """The least power of two that is the width of few enough bins."""
        exponent = max(least, math.floor(math.log2((high - low) / self.bins)) if high > low else least)
        while math.floor(high / 2.0**exponent) - math.floor(low / 2.0**exponent) >= self.bins:
            exponent += 1
        return exponent

    def finish(self, state: Any) -> tuple[Tensor, Tensor]:
        low, high, counts, exponent = state
        start = math.floor(low / 2.0**exponent)
        edges = torch.arange(start, start + len(counts) + 1, dtype=torch.float64) * 2.0**exponent
        edges[0], edges[-1] = low, high
        return counts, edges


#: of the smallest normal float32
_LEAST_EXPONENT = -126


@dataclass(frozen=True)
class WeightedHistogram(Histogram):
    """A histogram in which a value counts as much as a change of it does in what layers make of it: Σ‖W_:c‖² over the
    channel's columns of their `weights`, in 2⁻¹⁶ of the largest so that sums stay exact."""

    weights: tuple[str, ...] = field(kw_only=True)

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node, *self.weights)

    def update(self, state: Any, *values: Tensor) -> Any:
        x = values[0].detach().float()
        counted, importance = state or (None, self._importance(x, values[1:]))
        return self._count(counted, x, importance), importance

    def _importance(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        energies = [column_energy(x, weight.detach()) for weight in weights]
        energy = sum(energies[1:], energies[0])
        most = energy.max()
        return (energy / most * 2**16).round() if most > 0 else torch.ones_like(energy)

    def finish(self, state: Any) -> tuple[Tensor, Tensor]:
        return super().finish(state[0])


def column_energy(x: Tensor, weight: Tensor) -> Tensor:
    """‖W_:c‖² for every channel c of what a linear or convolution reads, float64, to be broadcast over x `[…, C, …]`.
    A weight is `[O, C/groups, …]`."""
    places = weight.ndim - 2
    groups = x.shape[x.ndim - 1 - places] // weight.shape[1]
    squares = weight.double().square().reshape(*weight.shape[:2], -1).sum(-1)
    return squares.reshape(groups, -1, weight.shape[1]).sum(1).reshape(-1, *[1] * places)


@dataclass(frozen=True)
class Window:
    """How a convolution slides over its input: one number for each spatial axis."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def columns(self, x: Tensor) -> Tensor:
        """x `[B, C, …]` → what each kernel position multiplies `[groups, positions, C/groups · kernel]`."""
        rank = len(self.size)
        patches = F.pad(x, [p for width in reversed(self.padding) for p in (width, width)])
        for axis, (size, stride, dilation) in enumerate(zip(self.size, self.stride, self.dilation, strict=True), 2):
            patches = patches.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # [B, C, positions…, kernel…] → channels and kernel last, as in a weight [O, C/groups, kernel…]
        patches = patches.reshape(x.shape[0], self.groups, -1, *patches.shape[2:]).movedim(2, rank + 2)
        return patches.movedim(1, 0).flatten(rank + 2).flatten(1, rank + 1)


def rows_of(x: Tensor, window: Window | None) -> Tensor:
    """An activation → the rows a weight matrix multiplies `[groups, N, K]`; a linear has one group."""
    return x.reshape(1, -1, x.shape[-1]) if window is None else window.columns(x)


#: numbers in the rows of a convolution that stand in memory at once
_UNFOLDED = 1 << 24


@dataclass(frozen=True)
class Hessian(Statistic):
    """Σ xᵀx over the rows that a weight multiplies, float64 `[groups, K, K]`: half the Hessian of the squared error
    of the layer's output. `ones` adds a last column of ones to the rows, which a bias multiplies."""

    window: Window | None = None
    ones: bool = False

    def update(self, state: Any, *values: Tensor) -> Any:
        for part in zip(*self._parts(values), strict=True):
            rows = self.rows(*part)
            # float32 products, float64 sums: exact enough for a batch, and several times faster
            gram = rows.transpose(1, 2) @ rows
            state = gram.double() if state is None else state.add_(gram)
        return state

    def _parts(self, values: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The batch, for a convolution in parts: each pixel is in as many rows as the kernel has positions."""
        if self.window is None:
            return [[v] for v in values]
        unfolded = math.prod(values[0].shape[1:]) * math.prod(self.window.size)
        return [torch.split(v, max(_UNFOLDED // max(unfolded, 1), 1)) for v in values]

    def rows(self, *values: Tensor) -> Tensor:
        rows = rows_of(values[0].detach().float(), self.window)
        return F.pad(rows, (0, 1), value=1.0) if self.ones else rows

    def combine(self, results: Sequence[Any]) -> Any:
        return sum(results[1:], results[0])

    def doubt(self, found: Any) -> str | None:
        if not any(map(singular, found)):
            return None
        return "the Hessian of its inputs is singular: some follow from others; use more calibration data"


@dataclass(frozen=True)
class WeightedHessian(Hessian):
    """Σ r·xᵀx over the rows that a weight multiplies, r `[B, T]` the importance of each token."""

    importance: Derived = field(kw_only=True)

    @property
    def nodes(self) -> tuple[str | Derived, ...]:
        return (self.node, self.importance)

    def rows(self, *values: Tensor) -> Tensor:
        return super().rows(values[0]) * values[1].detach().float().sqrt().reshape(1, -1, 1)


def attention_shares(
    query: Tensor, key: Tensor, mask: Tensor | None = None, *, scale: float, causal: bool
) -> Iterator[Tensor]:
    """softmax(q·kᵀ·scale + mask) of each sequence, float32 `[H, T, S]`: all of a batch may take more memory than its
    activations. q `[B, H, T, D]`, k `[B, H or fewer, S, D]`; a query that may attend to nothing gives nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # grouped queries share a key
    masks = [] if mask is None else [mask.broadcast_to(*query.shape[:-1], key.shape[-2])]
    for one, other, *allowed in zip(query.float(), key.float(), *masks, strict=True):
        logits = one @ other.mT * scale
        for shown in allowed:
            logits = logits.masked_fill(~shown, -torch.inf) if shown.dtype == torch.bool else logits + shown
        if causal:
            logits = logits.masked_fill(torch.ones(logits.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        yield logits.softmax(-1).nan_to_num()


@dataclass(frozen=True)
class SharesHistogram(Histogram):
    """The histogram of what an attention gives each key: of `attention_shares`, whose queries are `node`."""

    key: str = ""
    mask: str | None = None
    scale: float = 1.0
    causal: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node, self.key, *([self.mask] if self.mask else []))

    def update(self, state: Any, *values: Tensor) -> Any:
        for shares in attention_shares(*values, scale=self.scale, causal=self.causal):
            state = super().update(state, shares)
        return state


@dataclass(frozen=True)
class AttentionReceived(Derived):
    """How much attention each token receives from all queries of all heads, float32 `[B, T]`.

    In every sequence scaled linearly to `least` … 1, then to mean 1. RSQ (Sung et al. 2025), section 4.3: "attention
    concentration". `query`, `key` and `mask` name the nodes of an attention, q `[B, H, T, D]`.
    """

    query: str
    key: str
    mask: str | None = None
    scale: float = 1.0
    causal: bool = False
    least: float = 0.005

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.query, self.key, *([self.mask] if self.mask else []))

    def compute(self, *values: Tensor) -> Tensor:
        shares = attention_shares(*values, scale=self.scale, causal=self.causal)
        received = torch.stack([share.sum((0, 1)) for share in shares])
        low, high = received.aminmax(dim=-1, keepdim=True)
        # a spread below a thousandth is rounding: it is not stretched
        spread = torch.maximum(high - low, high / 1000).clamp(min=torch.finfo(received.dtype).tiny)
        share = (received - low) / spread
        importance = self.least + (1 - self.least) * share
        return importance / importance.mean(-1, keepdim=True)


@dataclass(frozen=True)
class ChannelMean(Statistic):
    """mean|x| of each input channel (last axis), float32 `[K]`; with a window, of each column of a convolution, of
    several groups `[groups, K]`."""

    window: Window | None = None

    def update(self, state: Any, *values: Tensor) -> Any:
        sizes = rows_of(values[0].detach().float(), self.window).abs()
        total, count = state or (torch.zeros(len(sizes), sizes.shape[2], dtype=torch.float64), 0)
        return total + sizes.sum(1, dtype=torch.float64), count + sizes.shape[1]

    def finish(self, state: Any) -> Any:
        total, count = state
        return (total / count).float().squeeze(0)

    def combine(self, results: Sequence[Any]) -> Any:
        return torch.stack(list(results)).mean(0)


@dataclass(frozen=True)
class ChannelMax(Statistic):
    """max|x| of each input channel (last axis), float32 `[K]`."""

    def update(self, state: Any, *values: Tensor) -> Any:
        peak = values[0].detach().float().reshape(-1, values[0].shape[-1]).abs().amax(0)
        return peak if state is None else torch.maximum(state, peak)

    def combine(self, results: Sequence[Any]) -> Any:
        return torch.stack(list(results)).amax(0)


@dataclass(frozen=True)
class Sample(Statistic):
    """The first `rows` rows that a weight multiplies, float32 `[groups, N, K]`, taken evenly from each batch."""

    rows: int = 512
    window: Window | None = None
    per_batch: int = 64

    def update(self, state: Any, *values: Tensor) -> Any:
        rows = rows_of(values[0].detach().float(), self.window)
        held = 0 if state is None else state.shape[1]
        count = min(self.per_batch, self.rows - held, rows.shape[1])
        if count <= 0:
            return state
        chosen = rows[:, torch.linspace(0, rows.shape[1] - 1, count).long()].clone()
        return chosen if state is None else torch.cat([state, chosen], dim=1)

    def combine(self, results: Sequence[Any]) -> Any:
        return torch.cat(list(results), dim=1)
