"""A latency is met on a clock that is no straight line, in few measurements, and by programs that really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paretoc as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoc.compiler import widths
from paretoc.compiler.cost import Latency
from paretoc.compiler.errors import OptionError
from paretoc.compiler.widths import Clock, within_latency
from torch import nn

SHARE = st.floats(0.05, 1.0)


def search(latency: float, clock: Callable[[float], float], forms: list[float]) -> tuple[float, float, list[float]]:
    """(share found, what it took, shares measured), among forms with these shares of the multiply–accumulates."""
    timed: list[float] = []

    def time(form: float) -> float:
        timed.append(form)
        return clock(form)

    def spend(share: float) -> float:
        return max(form for form in forms if form <= share)

    return *within_latency(latency, spend, forms[0], forms[0], time, lambda items, _: items), timed


CLOCKS: dict[str, Callable[[float], float]] = {
    "a line": lambda m: m,
    "a part that stays": lambda m: 0.3 + 0.7 * m,
    "bent down": lambda m: m**0.5,
    "bent up": lambda m: m**2,
    "steps": lambda m: -(-m * 8 // 1) / 8,
}


@pytest.mark.parametrize("name", CLOCKS)
@given(latency=SHARE, forms=st.lists(SHARE, min_size=1, max_size=40, unique=True))
def test_no_form_that_takes_too_long_is_found(name: str, latency: float, forms: list[float]) -> None:
    clock, forms = CLOCKS[name], sorted(forms)
    if clock(forms[0]) > latency:
        with pytest.raises(OptionError, match=f"cannot be reached: {clock(forms[0]):.3g} is the least"):
            search(latency, clock, forms)
        return
    found, taken, timed = search(latency, clock, forms)
    assert taken == clock(found) <= latency
    assert len(timed) == len(set(timed)) <= 6


@pytest.mark.parametrize("latency", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("name", ["a line", "a part that stays", "bent down", "bent up"])
def test_what_is_found_is_near_the_best(name: str, latency: float) -> None:
    clock, forms = CLOCKS[name], [0.05 + i / 1000 for i in range(951)]
    _, taken, timed = search(latency, clock, forms)
    assert latency - taken < 0.04, timed


def test_the_best_of_few_forms_is_found() -> None:
    """Nothing lies between the third and the fourth: neither is measured twice."""
    forms = [0.2, 0.4, 0.6, 0.8, 1.0]
    found, _, timed = search(0.75, lambda m: m, forms)
    assert found == 0.6 and set(timed) == {0.2, 0.6, 0.8}


def test_the_search_ends_where_a_form_misses_by_a_rounding() -> None:
    found, _, timed = search(0.5, lambda m: {0.2: 0.2, 0.6: 0.5 + 2e-16}[m], [0.2, 0.6])
    assert found == 0.2 and timed == [0.2, 0.6]


def test_the_clock_compares_lowered_programs_in_turns(monkeypatch: Any) -> None:
    """The median of the form over that of the whole, both run on the inputs of the user."""
    models = [nn.Linear(6, 4).eval(), nn.Linear(6, 4).eval()]
    whole, form = (pc.capture(model, torch.randn(3, 6)) for model in models)
    ran: dict[str, torch.Tensor] = {}

    def measure(calls: Any, **_: Any) -> dict[str, Latency]:
        ran.update({name: call()[0] for name, call in calls.items()})
        return {"whole": Latency(8.0, 1.0, 5), "form": Latency(6.0, 3.0, 5)}

    monkeypatch.setattr(widths, "measure", measure)
    assert Clock(whole, "eager", 0)(form) == 0.75
    for name, model in zip(("whole", "form"), models, strict=True):
        torch.testing.assert_close(ran[name], model(whole.users_example()[0]).detach())
