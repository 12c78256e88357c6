"""What a pass may ask of calibration data: values at nodes, reduced over all batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Statistic:
    """A reduction over the value of one node, or of the several that `nodes` names. Subclass with `start`, `update`
    and `finish`.

    Two statistics that compare equal are gathered once. The engine never keeps the values themselves.
    """

    node: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes whose values `update` is given, in this order."""
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


@dataclass(frozen=True)
class MinMax(Statistic):
    """(min, max) over everything, float32 `[2]`."""

    def update(self, state: Any, *values: Tensor) -> Any:
        low, high = torch.aminmax(values[0].detach().float())
        if state is None:
            return torch.stack([low, high])
        return torch.stack([torch.minimum(state[0], low), torch.maximum(state[1], high)])


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
        size, stride, padding, dilation = self.size, self.stride, self.padding, self.dilation
        if len(size) == 1:  # a line is a picture of height one
            x, size, stride, padding, dilation = x.unsqueeze(2), (1, *size), (1, *stride), (0, *padding), (1, *dilation)
        patches = F.unfold(x, size, dilation, padding, stride)
        batch, width, count = patches.shape
        grouped = patches.reshape(batch, self.groups, width // self.groups, count)
        return grouped.permute(1, 0, 3, 2).reshape(self.groups, batch * count, -1)


def rows_of(x: Tensor, window: Window | None) -> Tensor:
    """An activation → the rows a weight matrix multiplies `[groups, N, K]`; a linear has one group."""
    return x.reshape(1, -1, x.shape[-1]) if window is None else window.columns(x)


@dataclass(frozen=True)
class Hessian(Statistic):
    """Σ xᵀx over the rows that a weight multiplies, float64 `[groups, K, K]`: half the Hessian of the squared error
    of the layer's output."""

    window: Window | None = None

    def update(self, state: Any, *values: Tensor) -> Any:
        rows = self.rows(*values)
        # float32 products, float64 sums: exact enough for a batch, and several times faster
        gram = (rows.transpose(1, 2) @ rows).double()
        return gram if state is None else state + gram

    def rows(self, *values: Tensor) -> Tensor:
        return rows_of(values[0].detach().float(), self.window)

    def combine(self, results: Sequence[Any]) -> Any:
        return sum(results[1:], results[0])


@dataclass(frozen=True)
class ChannelMean(Statistic):
    """mean|x| of each input channel (last axis), float32 `[K]`."""

    def update(self, state: Any, *values: Tensor) -> Any:
        rows = values[0].detach().float().reshape(-1, values[0].shape[-1])
        total, count = state or (torch.zeros(rows.shape[1], dtype=torch.float64), 0)
        return total + rows.abs().sum(0, dtype=torch.float64), count + len(rows)

    def finish(self, state: Any) -> Any:
        total, count = state
        return (total / count).float()

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
