"""What a pass may ask of calibration data: a value at a node, reduced over all batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """A reduction over the value of one node. Subclass with `start`, `update` and `finish`.

    Two statistics that compare equal are gathered once. The engine never keeps the values themselves.
    """

    node: str

    def start(self) -> Any:
        return None

    def update(self, state: Any, value: Tensor) -> Any:
        raise NotImplementedError

    def finish(self, state: Any) -> Any:
        return state


@dataclass(frozen=True)
class MinMax(Statistic):
    """(min, max) over everything, float32 `[2]`."""

    def update(self, state: Any, value: Tensor) -> Any:
        low, high = torch.aminmax(value.detach().float())
        if state is None:
            return torch.stack([low, high])
        return torch.stack([torch.minimum(state[0], low), torch.maximum(state[1], high)])
