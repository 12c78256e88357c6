"""Ranges of activations: each against a slow search over the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.errors import OptionError
from paretoc.compiler.statistics import Histogram
from paretoc.passes.ranges import divergence, mirrored, parse_range
from torch import Tensor

NAMES = ["minmax", "percentile", "percentile(95)", "mse", "entropy"]


def histogram(x: Tensor, bins: int = 8192) -> tuple[Tensor, Tensor]:
    statistic = Histogram("x", bins)
    return statistic.finish(statistic.update(None, x))


def found(name: str, x: Tensor) -> tuple[float, float]:
    return tuple(parse_range(name)(*histogram(x)).tolist())


def squared_error(x: Tensor, low: float, high: float) -> float:
    """Of the values themselves under 256 codes, by NumPy."""
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    values = x.double().numpy()
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float((((codes - zero) * scale - values) ** 2).sum())


def heavy(count: int = 20_000) -> Tensor:
    """Mostly normal, one in a thousand twenty times as wide, positive more often than negative."""
    x = torch.randn(count) * torch.where(torch.rand(count) < 1e-3, 20.0, 1.0)
    return torch.where(x < 0, x / 3, x)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.sampled_from(NAMES))
def test_every_range_contains_zero_and_nothing_beyond_the_values(values, name):
    low, high = found(name, torch.tensor(values))
    assert min(0.0, *values) <= low <= 0 <= high <= max(0.0, *values)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40))
def test_a_mirrored_histogram_counts_both_signs(values):
    x = torch.tensor(values)
    counts, edges = mirrored(*histogram(x, bins=64))
    assert edges.equal(-edges.flip(0)) and counts.equal(counts.flip(0)) and (counts >= 0).all()
    assert float(counts.sum()) == pytest.approx(2 * int((x != 0).sum()))
    assert float(edges[-1]) == float(x.abs().max()) and len(edges) > 1
    for edge in edges:  # as many below an edge of a bin as there are values, but for the bins that it cuts
        least, most = ((torch.cat([x, -x]) < edge + side * float(edges.diff().max())).sum() for side in (-1, 1))
        below = float(counts[edges[1:] <= edge].sum())
        assert float(least) - 2 * int((x == 0).sum()) <= below + 1e-6 and below <= float(most) + 1e-6


def test_minmax_is_exact():
    x = heavy()
    assert found("minmax", x) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("percent", [99.9, 99, 80])
def test_a_percentile_leaves_out_as_many_at_either_end(percent):
    x = heavy()
    x[::3] = 0  # does not count
    low, high = found(f"percentile({percent})", x)
    want = (x != 0).sum() * (100 - percent) / 200
    for outside in (x < low, x > high):
        assert abs(outside.sum() - want) <= 1 + 0.02 * want


@pytest.mark.parametrize("positive", [False, True])
def test_mse_is_the_best_of_a_search_over_both_ends(positive):
    x = heavy().clamp(min=0) if positive else heavy()
    low, high = found("minmax", x)
    shares = [i / 24 for i in range(1, 25)]
    best = min(squared_error(x, a * low, b * high) for a in (shares if low else [1]) for b in shares)
    got = squared_error(x, *found("mse", x))
    assert got <= 1.01 * best
    assert got < squared_error(x, low, high)
    assert squared_error(x, *found("percentile(99)", x)) > 2 * best  # the check rejects another range


def test_what_is_evenly_spread_is_not_clipped():
    x = torch.linspace(-1, 3, 10_000)
    for name in ("mse", "entropy"):
        np.testing.assert_allclose(found(name, x), (-1, 3), rtol=0.02)


def slow_divergence(counts: list[float], start: int, stop: int, levels: int = 256) -> float:
    """TensorRT's calibration, a bin at a time."""
    p = list(counts[start:stop])
    p[0] += sum(counts[:start])
    p[-1] += sum(counts[stop:])
    q = [0.0] * len(p)
    for level in range(levels):
        members = [i for i in range(len(p)) if i * levels // len(p) == level]
        filled = [i for i in members if p[i] > 0]
        for i in filled:
            q[i] = sum(counts[start + j] for j in members) / len(filled)
    total, coded = sum(p), sum(q)
    return sum(a / total * math.log(a / total / (b / coded)) if b else math.inf for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize(("start", "stop"), [(0, 900), (0, 600), (200, 900), (150, 700), (100, 431)])
def test_the_divergence_equals_a_slow_loop(start, stop):
    counts = torch.randint(0, 5, (900,)).double()
    counts[690:] = 0
    counts[-1] = 3
    want = slow_divergence(counts.tolist(), start, stop)
    assert divergence(counts, start, stop) == pytest.approx(want)
    assert divergence(counts, start, stop - 9) != pytest.approx(want)


def test_the_entropy_range_has_the_least_divergence():
    x = heavy()
    counts, edges = histogram(x)
    low, high = found("entropy", x)
    assert high < 0.7 * float(x.max())

    def at(bound: float) -> float:
        start, stop = (int(torch.searchsorted(edges, b)) for b in (-bound, bound))
        return divergence(counts, start, min(stop, len(counts)))

    reach = max(-low, high)
    assert at(reach) <= min(at(float(x.abs().max()) * i / 128) for i in range(40, 129))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("mode", "there is no range 'mode'"),
        ("mse(2)", "'mse(2)' is not a range"),
        ("percentile(0)", "'percentile(0)' is not a range"),
        ("percentile(101)", "'percentile(101)' is not a range"),
        ("percentile(all)", "'percentile(all)' is not a range"),
        ("percentile(99", "'percentile(99' is not a range"),
    ],
)
def test_what_is_not_a_range_is_refused(refused, text, sentence):
    refused(OptionError, sentence, lambda: parse_range(text))
