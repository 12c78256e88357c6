"""Statistics against the values themselves, in as many batches as one likes."""

from __future__ import annotations

import re

import numpy as np
import paretoc as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.sites import attention_of, attention_sites, weight_sites
from paretoc.compiler.statistics import (
    AttentionReceived,
    ChannelMax,
    ChannelMean,
    Hessian,
    Histogram,
    Sample,
    SharesHistogram,
    Statistic,
    WeightedHessian,
    WeightedHistogram,
    Window,
    column_energy,
)
from torch import Tensor
from torch.nn import functional as F


def reduced(statistic: Statistic, *batches: tuple[Tensor, ...]) -> Tensor:
    state = statistic.start()
    for batch in batches:
        state = statistic.update(state, *batch)
    return statistic.finish(state)


X = [torch.randn(2, 5, 8), torch.randn(3, 4, 8), torch.randn(1, 1, 8)]
ROWS = torch.cat([x.reshape(-1, 8) for x in X])


def test_sums_do_not_depend_on_the_batches():
    want = (ROWS.double().T @ ROWS.double())[None]
    torch.testing.assert_close(reduced(Hessian("x"), *((x,) for x in X)), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reduced(ChannelMean("x"), *((x,) for x in X)), ROWS.abs().mean(0))
    assert torch.equal(reduced(ChannelMax("x"), *((x,) for x in X)), ROWS.abs().amax(0))


def test_two_uses_of_a_weight_add_up():
    one, two = (reduced(Hessian("x"), (x,)) for x in X[:2])
    assert torch.equal(Hessian("x").combine([one, two]), one + two)


def test_a_sample_takes_rows_evenly_and_stops():
    rows = torch.arange(100.0).reshape(100, 1)
    got = reduced(Sample("x", rows=10, per_batch=4), (rows,), (rows + 1000,), (rows + 2000,), (rows + 3000,))
    assert got.flatten().tolist() == [0, 33, 66, 99, 1000, 1033, 1066, 1099, 2000, 2099]


def test_a_convolution_has_one_gram_matrix_for_each_group():
    window, x = Window((3, 2), (2, 1), (1, 0), (1, 2), 2), torch.randn(2, 4, 7, 8)
    patches = F.unfold(x, (3, 2), (1, 2), (1, 0), (2, 1)).movedim(1, 2).flatten(0, 1).double()
    want = torch.stack([part.T @ part for part in patches.chunk(2, 1)])
    torch.testing.assert_close(reduced(Hessian("x", window), (x,)), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(window.columns(x), torch.stack(patches.chunk(2, 1)).float())


# -- histograms ------------------------------------------------------------------------------------------

numbers = st.one_of(st.floats(-(2.0**-10), 2.0**-10, width=32), st.floats(-1e4, 1e4, width=32), st.just(0.0))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(numbers, min_size=1, max_size=12), min_size=1, max_size=5))
def test_a_histogram_does_not_depend_on_the_batches(batches):
    statistic, everything = Histogram("x", bins=16), [x for batch in batches for x in batch]
    counts, edges = reduced(statistic, *((torch.tensor(batch),) for batch in batches))
    for order in (everything, everything[::-1]):
        again = reduced(statistic, (torch.tensor(order),))
        assert all(torch.equal(a, b) for a, b in zip((counts, edges), again, strict=True))
    assert len(counts) <= 16
    assert (edges[0], edges[-1]) == (min(0.0, *everything), max(0.0, *everything))
    assert 0 in edges
    want = np.histogram([x for x in everything if x], edges.numpy())[0]
    assert counts.tolist() == want.tolist()


def test_the_bins_of_a_histogram_are_as_narrow_as_they_may_be():
    x = torch.linspace(-1, 2.9, 1000)
    counts, edges = reduced(Histogram("x", bins=64), (x,))
    assert 32 <= len(counts) <= 64
    np.testing.assert_array_equal(np.diff(edges)[1:-1], 2**-4)
    wide = reduced(Histogram("x", bins=64), (x,), (100 * x,))[1]
    np.testing.assert_array_equal(np.diff(wide)[1:-1], 2**3)


def test_what_is_not_finite_has_no_place_in_a_histogram():
    counts, edges = reduced(Histogram("x"), (torch.tensor([1.0, torch.inf, -torch.inf, torch.nan]),))
    assert counts.sum() == 1
    assert edges[-1] == 1


def test_a_histogram_counts_values_by_their_weight_in_what_reads_them():
    weights = torch.randn(6, 8) * torch.tensor([1.0] * 7 + [30.0]), torch.randn(3, 8)
    statistic = WeightedHistogram("x", bins=64, weights=("v", "w"))
    counts, edges = reduced(statistic, *((x, *weights) for x in X))
    energy = torch.cat(weights).square().sum(0)
    often = (energy / energy.max() * 2**16).round().expand_as(ROWS)
    want = np.histogram(ROWS, edges.numpy(), weights=often.numpy())[0]
    np.testing.assert_array_equal(counts, want)
    assert statistic.nodes == ("x", "v", "w")
    again = reduced(statistic, *((x[:1], *weights) for x in X), *((x[1:], *weights) for x in X if len(x) > 1))
    assert all(torch.equal(a, b) for a, b in zip(again, (counts, edges), strict=True))
    nothing = reduced(statistic, *((x, *(0 * w for w in weights)) for x in X))
    plain = reduced(Histogram("x", bins=64), *((x,) for x in X))
    assert all(torch.equal(a, b) for a, b in zip(nothing, plain, strict=True))
    assert not torch.equal(counts, plain[0])


@pytest.mark.parametrize("layer", ["linear", "conv1d", "grouped", "depthwise"])
def test_the_energy_of_a_channel_is_what_one_makes_of_it(layer):
    """A one in channel c, and nothing else, gives outputs whose squares sum to it."""
    if layer == "linear":
        weight = torch.randn(5, 6)
        got = [F.linear(row, weight) for row in torch.eye(6)]
        x = torch.zeros(2, 3, 6)
    elif layer == "conv1d":
        weight, x = torch.randn(5, 6, 3), torch.zeros(2, 6, 9)
        got = [F.conv1d(row[:, None], weight, padding=2) for row in torch.eye(6)]
    else:
        groups = {"grouped": 2, "depthwise": 6}[layer]
        weight, x = torch.randn(12, 6 // groups, 3, 2), torch.zeros(2, 6, 4, 5)
        got = [F.conv2d(row[:, None, None], weight, padding=(2, 1), groups=groups) for row in torch.eye(6)]
    energy = column_energy(x, weight)
    torch.testing.assert_close(energy.flatten().float(), torch.stack([g.square().sum() for g in got]))
    channel = x.ndim - energy.ndim
    assert energy.expand_as(x).shape == x.shape
    assert energy.shape[0] == x.shape[channel] == 6


def test_a_convolution_unfolds_a_few_images_at_a_time(monkeypatch):
    window, x = Window((3, 3), (1, 1), (1, 1), (1, 1)), torch.randn(7, 4, 8, 8)
    whole, seen = reduced(Hessian("x", window), (x,)), []
    columns = Window.columns
    monkeypatch.setattr(Window, "columns", lambda self, part: seen.append(len(part)) or columns(self, part))
    monkeypatch.setattr("paretoc.compiler.statistics._UNFOLDED", 2 * 4 * 8 * 8 * 9)
    torch.testing.assert_close(reduced(Hessian("x", window), (x,)), whole, rtol=1e-5, atol=1e-4)
    assert seen == [2, 2, 2, 1]


# -- importance of tokens --------------------------------------------------------------------------------


def slow_importance(q: Tensor, k: Tensor, scale: float, least: float, allowed: Tensor | None = None) -> Tensor:
    """RSQ's attention concentration, a query at a time, in float64."""
    result = []
    for b in range(q.shape[0]):
        received = torch.zeros(k.shape[2], dtype=torch.float64)
        for h in range(q.shape[1]):
            keys = k[b, h * k.shape[1] // q.shape[1]].double()
            for t in range(q.shape[2]):
                logits = keys @ q[b, h, t].double() * scale
                if allowed is not None:
                    logits[~allowed[b, t]] = -torch.inf
                if (logits > -torch.inf).any():
                    received += logits.softmax(0)
        share = (received - received.min()) / (received.max() - received.min())
        importance = least + (1 - least) * share
        result.append(importance / importance.mean())
    return torch.stack(result)


@pytest.mark.parametrize("case", ["plain", "causal", "grouped keys", "boolean mask", "added mask"])
def test_attention_received_equals_a_slow_loop(case):
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2 if case == "grouped keys" else 4, 6, 8)
    allowed = {
        "causal": torch.ones(6, 6).tril().bool().expand(2, 6, 6),
        "boolean mask": (torch.rand(2, 6, 6) < 0.7) | torch.eye(6).bool(),
        "added mask": (torch.arange(6) < torch.tensor([6, 3])[:, None])[:, None].expand(2, 6, 6),
    }.get(case)
    mask = None if allowed is None or case == "causal" else allowed[:, None]
    if case == "added mask":
        mask = torch.where(allowed[:, None], 0.0, torch.finfo(torch.float32).min)
    derived = AttentionReceived("q", "k", "m" if mask is not None else None, 0.5, case == "causal", 0.01)
    assert derived.nodes == (("q", "k", "m") if mask is not None else ("q", "k"))
    got = derived.compute(q, k, *([mask] if mask is not None else []))
    torch.testing.assert_close(got.double(), slow_importance(q, k, 0.5, 0.01, allowed), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.mean(1), torch.ones(2))


def test_tokens_that_all_receive_the_same_are_worth_the_same():
    got = AttentionReceived("q", "k").compute(torch.zeros(2, 3, 5, 4), torch.randn(2, 3, 5, 4))
    torch.testing.assert_close(got, torch.ones(2, 5), rtol=0.05, atol=0)


def test_a_query_that_sees_nothing_gives_nothing():
    q, k, allowed = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.ones(1, 1, 4, 4).bool()
    allowed[..., 2:, :] = False
    got = AttentionReceived("q", "k", "m", 0.5, False, 0.01).compute(q, k, allowed)
    torch.testing.assert_close(got.double(), slow_importance(q, k, 0.5, 0.01, allowed[0]), rtol=1e-4, atol=1e-5)


def test_a_weighted_hessian_counts_every_row_as_often_as_it_is_worth():
    derived = AttentionReceived("q", "k")
    statistic = WeightedHessian("x", importance=derived)
    assert statistic.nodes == ("x", derived)
    worth = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 1.0]])
    x = torch.randn(2, 3, 8)
    repeated = x.reshape(-1, 8).repeat_interleave(worth.flatten().long(), 0)
    want = reduced(Hessian("x"), (repeated,))
    torch.testing.assert_close(reduced(statistic, (x, worth)), want, rtol=1e-5, atol=1e-5)


def test_a_site_belongs_to_the_attention_it_projects_to_or_the_last_before(captured):
    for name, how in (("BertForSequenceClassification", "sdpa"), ("ViTForImageClassification", "eager")):
        _, program = captured(name, attn_implementation=how)
        attentions, seen = [a.node for a in attention_sites(program)], 0
        for site in weight_sites(program):
            layer = re.search(r"layers?\.(\d+)\.", site.path)
            if site.kind == "linear" and layer:
                assert attention_of(site).node is attentions[int(layer[1])], site.path
                seen += 1
        assert seen == 6 * len(attentions)


def test_before_the_first_attention_there_is_none(models):
    program = pc.capture(models.Vit(depth=1).eval(), torch.randn(2, 16, 12))
    of = {s.path: attention_of(s) for s in weight_sites(program) if s.kind == "linear"}
    assert of["embed"] is None
    assert of["head"].node is of["blocks.0.attention.qkv"].node is of["blocks.0.mlp.down"].node
    assert attention_of(weight_sites(pc.capture(models.Mlp(), torch.randn(2, 16)))[0]) is None


@pytest.mark.parametrize("case", ["plain", "causal", "grouped keys", "boolean mask", "added mask"])
def test_the_histogram_of_an_attention_is_that_of_its_probabilities(case):
    """Of those that PyTorch makes, a batch at a time."""
    q, k = torch.randn(3, 4, 6, 8), torch.randn(3, 2 if case == "grouped keys" else 4, 6, 8)
    shown = torch.rand(3, 1, 6, 6) < 0.7
    shown[..., 0] = True
    mask = {"boolean mask": shown, "added mask": torch.where(shown, 0.0, -1.5)}.get(case)
    statistic = SharesHistogram("q", key="k", mask=None if mask is None else "m", scale=0.5, causal=case == "causal")
    assert statistic.nodes == (("q", "k") if mask is None else ("q", "k", "m"))
    logits = q @ k.repeat_interleave(4 // k.shape[1], 1).mT * 0.5
    if mask is not None:
        logits = logits + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask)
    if case == "causal":
        logits = logits + torch.full((6, 6), -torch.inf).triu(1)
    values = (q, k) if mask is None else (q, k, mask)
    parts = [tuple(v[i : i + 1] if v.shape[0] == 3 else v for v in values) for i in range(3)]
    counts, edges = reduced(statistic, *parts)
    expected, borders = reduced(Histogram("p"), (logits.softmax(-1),))
    torch.testing.assert_close(edges, borders, rtol=1e-5, atol=1e-7)
    assert int(counts.sum()) == int(expected.sum()) and float((counts - expected).abs().sum()) <= 4
