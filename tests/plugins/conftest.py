"""A character model that trains in seconds on text that comes with Python: what the tests of elastic layers share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace

import paretoc as pc
import pytest
import torch
from paretoc.compiler.calibrate import gather
from paretoc.compiler.canonical import canonicalize
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT, WIDTH, HIDDEN, DEPTH, HELD_OUT = 6, 32, 64, 3, 2048


class FeedForward(nn.Module):
    """Pre-norm and residual; ReLU, or gated by SiLU."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return x + self.down(F.relu(self.up(z)) if self.gate is None else F.silu(self.gate(z)) * self.up(z))


class Characters(nn.Module):
    """The last `CONTEXT` characters `[…, CONTEXT]` → logits of the next `[…, V]`."""

    def __init__(self, gated: bool = False, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 8)
        self.first = nn.Linear(8 * CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(FeedForward(gated) for _ in range(depth)))
        self.head = nn.Linear(WIDTH, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.first(self.embedding(ids).flatten(-2))))


@cache
def text() -> tuple[Tensor, Tensor]:
    """Contexts `[N, CONTEXT]` and next characters of the Python manual; the last `HELD_OUT` are held out."""
    from pydoc_data.topics import topics

    whole = "".join(topics.values()).lower()[:200_000]
    known = sorted(set(whole), key=whole.count, reverse=True)[:63]
    codes = torch.tensor([known.index(c) if c in known else 63 for c in whole])
    windows = codes.unfold(0, CONTEXT + 1, 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    return windows[:, :-1], windows[:, -1]


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = text()
    chosen = torch.randint(len(x) - HELD_OUT, (size,), generator=generator)
    return x[chosen], y[chosen]


At = Callable[[nn.Module, float], AbstractContextManager[None]]


def _plainly(model: nn.Module, width: float) -> AbstractContextManager[None]:
    return nullcontext()


@cache
def train(seed: int, widths: tuple[float, ...] = (1.0,), at: At = _plainly) -> Characters:
    """300 steps of 128 characters, in each the sum of the losses at some widths, within `at(model, width)`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Characters()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / 300)
        x, y = batch(128, generator)
        optimiser.zero_grad()
        for width in widths:
            with at(model, width):
                F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval()


def losses(model: nn.Module, *steps: pc.Pass, calibration: int = 512) -> list[Tensor]:
    """The loss of each held-out character `[HELD_OUT]` after each of some passes; the model is captured once."""
    x, y = text()
    captured = pc.capture(model, x[:4])
    canonicalize(captured)
    found = []
    for step in steps:
        program = captured.clone()
        batches = [[x[:calibration]]]
        step.apply(program, pc.Context(gather(program, step.needs(program), batches), batches=batches))
        found.append(F.cross_entropy(program(x[-HELD_OUT:]), y[-HELD_OUT:], reduction="none"))
    return found


def better(first: Tensor, second: Tensor) -> bool:
    """Whether the first losses are smaller by more than two standard errors of the paired difference."""
    gap = first - second
    return bool(gap.mean() < -2 * gap.std() / len(gap) ** 0.5)


@pytest.fixture(scope="session")
def characters() -> SimpleNamespace:
    return SimpleNamespace(Model=Characters, text=text, train=train, losses=losses, better=better, hidden=HIDDEN)
