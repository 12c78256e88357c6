"""Large models: beside the weights, what is alive is what is stored and what one layer takes to fit.

Counted, not measured: the bytes of all tensors that operators return and that something still holds.
"""

from __future__ import annotations

import weakref
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.compiler import verify
from paretoc.compiler.calibrate import steps
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.passes import Context
from paretoc.compiler.program import Program
from paretoc.passes import Quantize
from paretoc.passes.fit import Gptq
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WIDTH, DEPTH = 64, 24
WEIGHTS = 4 * WIDTH * WIDTH * DEPTH
BATCHES = [[torch.randn(32, WIDTH)] for _ in range(2)]
#: bytes of what one layer returns for one batch
VALUE = 4 * 32 * WIDTH


class Live(TorchDispatchMode):
    """Counts the bytes of the memory behind living tensors, without that of `known` ones."""

    def __init__(self, known: Program) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known.weights().values()}
        self.holders: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if type(value) is Tensor and value.device.type == "cpu" and not getattr(value, "seen", False):
                value.seen = True  # type: ignore[attr-defined]
                memory = value.untyped_storage()
                if memory.data_ptr() not in self.known:
                    self._hold(memory.data_ptr(), memory.nbytes(), 1)
                    weakref.finalize(value, self._hold, memory.data_ptr(), memory.nbytes(), -1)
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, place: int, size: int, change: int) -> None:
        before = self.holders.get(place, 0)
        self.holders[place] = before + change
        self.now += size * ((before + change > 0) - (before > 0))


@pytest.fixture(scope="module")
def deep() -> Program:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)]
    program = pc.capture(nn.Sequential(*layers).eval(), BATCHES[0][0])
    canonicalize(program)
    return program


def quantised(program: Program, fitter: Any) -> tuple[Program, int]:
    """The program, quantised, and the bytes that this took at its peak."""
    program = program.clone()
    with Live(program) as live:
        Quantize("W4A16", fitter=fitter).apply(program, Context(batches=BATCHES))
    return program, live.peak


def test_fitting_takes_what_is_stored_and_little_more(deep):
    program, peak = quantised(deep, Gptq(norm=None))
    stored = sum(t.nbytes for t in program.weights().values())
    assert stored == 0.15625 * WEIGHTS
    assert stored < peak < stored + 0.6 * WEIGHTS


def test_a_copy_of_the_weights_would_be_noticed(deep):
    kept = []

    class Keeps(Gptq):
        def fit(self, encoding: Any, weight: Tensor, *evidence: Any) -> Any:
            kept.append(weight * 1)
            return super().fit(encoding, weight, *evidence)

    assert quantised(deep, Keeps(norm=None))[1] > WEIGHTS


def test_comparing_two_programs_holds_one_place_of_each(deep):
    program = deep.clone()
    with Live(program) as live:
        verify.measure(deep, program, BATCHES, "data")
    assert live.peak < 16 * VALUE
    with Live(program) as live, torch.no_grad():
        list(steps(deep, BATCHES[0]))
    assert live.peak > 32 * VALUE  # what was compared like this
