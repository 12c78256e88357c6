"""Adaptive computation: each form computes what its definition says, labels are the cheapest, tokens differ."""

from __future__ import annotations

import itertools
import math

import paretoc as pc
import paretoc.testing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoc.plugins import AdaptiveComputation
from paretoc.plugins.adaptive_computation import Learners, cheapest
from torch import Tensor, nn
from torch.nn import functional as F


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 64, (*shape, 6), generator=torch.Generator().manual_seed(sum(shape)))


def quick(form: str = "ranked", budget: float = 0.5) -> AdaptiveComputation:
    return AdaptiveComputation(budget, form=form, steps=20, rows=256)


Weights = dict[str, Tensor]


def logits(weights: Weights, z: Tensor) -> Tensor:
    first, second = ([weights[f"layers.0.down.gate.{i}.{key}"] for key in ("weight", "bias")] for i in (0, 1))
    return F.linear(F.gelu(F.linear(z, *first)), *second)


def masked(weights: Weights, z: Tensor, shares: list[float]) -> Tensor:
    """Each token by itself, the learners 1 … k one after the other."""
    up, bias, down = (weights[f"layers.0.{key}"] for key in ("up.weight", "up.bias", "down.weight"))
    rows = []
    for token, k in zip(z, logits(weights, z).argmax(1) + 1, strict=True):
        out = weights["layers.0.down.bias"]
        for part in (slice(16 * n, 16 * (n + 1)) for n in range(k)):
            out = out + down[:, part] @ torch.relu(up[part] @ token + bias[part])
        rows.append(out)
    return torch.stack(rows)


def ranked(weights: Weights, z: Tensor, shares: list[float]) -> Tensor:
    """Each further part adds to the tokens of the largest expected k."""
    order = (logits(weights, z).softmax(1) @ torch.arange(1.0, 5.0)).argsort(descending=True)
    out = weights["layers.0.down.learners.0.bias"]
    for number, share in enumerate(dict.fromkeys(round(1024 * share) / 1024 for share in shares if share)):
        up, bias, down = (weights[f"layers.0.{key.format(number)}"] for key in _PARTS)
        runs = torch.isin(torch.arange(len(z)), order[: math.ceil(len(z) * share)])
        out = out + torch.relu(z @ up.T + bias) @ down.T * runs[:, None]
    return out


_PARTS = ("up.learners.{}.weight", "up.learners.{}.bias", "down.learners.{}.weight")


@pytest.mark.parametrize("form", [masked, ranked])
def test_a_form_computes_what_it_says(characters, monkeypatch, form):
    """On ONNX Runtime, for calls of other sizes than the example."""
    model, seen = characters.Model(depth=1).eval(), []
    original = Learners.report
    monkeypatch.setattr(Learners, "report", lambda self, *rest: seen.append(self.shares) or original(self, *rest))
    calibration = characters.text()[0][:256].reshape(16, 16, 6)
    compiled = pc.compile(model, [quick(form.__name__)], calibration=[calibration])
    weights, (shares,) = compiled.program.weights(), seen
    assert sum(shares) == pytest.approx(2, abs=0.02) and shares == sorted(shares, reverse=True)

    def expected(x: Tensor) -> Tensor:
        h = model.first(model.embedding(x).flatten(-2)).flatten(0, -2)
        return model.head(h + form(weights, model.layers[0].norm(h), shares)).reshape(*x.shape[:-1], -1)

    for x in (ids(1, 1), ids(2, 7)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected(x), rtol=0, atol=1e-4)
    assert (compiled(ids(2, 7)) - model(ids(2, 7))).abs().max() > 1e-2, "half of the learners cannot be all of them"
    report = compiled.report(latency=False).to_dict()
    share = report["compiled"]["macs"] / report["original"]["macs"]
    assert share < 0.9 if form is ranked else share > 1
    assert ("layers.0.up.weight" in weights) is (form is masked), "what nothing reads any more is gone"


@pytest.mark.parametrize("gated", [False, True])
def test_all_learners_are_the_layer(characters, gated):
    """Before they are distilled; and fewer are the slice of it."""
    model, x = characters.Model(gated).eval(), ids(4)
    program = pc.capture(model, x)
    pass_ = AdaptiveComputation()
    layer = pass_.layers(program)[0][1]
    learners, z = Learners(program, layer, 4), torch.randn(9, 32)
    block = model.layers[1]
    hidden = F.relu(block.up(z)) if block.gate is None else F.silu(block.gate(z)) * block.up(z)
    for k, out in enumerate(learners.outputs(z), start=1):
        expected = hidden[:, : 16 * k] @ block.down.weight[:, : 16 * k].T + block.down.bias
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(learners.errors(z, block.down(hidden))[-1], torch.zeros(9), rtol=0, atol=1e-9)


@given(st.integers(0, 10_000), st.floats(1 / 3, 1.0))
def test_labels_are_the_cheapest(seed, budget):
    """No other choice for four tokens of three learners that runs as few of them has a smaller error."""
    errors = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).sort(0, descending=True).values.double()
    labels = cheapest(errors, budget)
    spent = int((labels + 1).sum())
    assert budget * 12 - 2 < spent <= budget * 12 + 1e-6, "a token that goes on runs at most two learners more"
    tokens = torch.arange(4)
    least = float(errors[labels, tokens].sum())
    for other in itertools.product(range(3), repeat=4):
        if sum(other) + 4 <= spent:
            assert float(errors[torch.tensor(other), tokens].sum()) >= least - 1e-9


def test_it_is_better_than_the_same_for_all_tokens(characters):
    """Two seeds; half of the learners on average, or the first half of them for every token."""
    options = {"steps": 80, "rows": 512}
    for seed in range(2):
        steps = [AdaptiveComputation(0.5, form=form, **options) for form in ("ranked", "uniform")]
        adaptive, uniform = characters.losses(characters.train(seed), *steps, calibration=512)
        assert characters.better(adaptive, uniform), f"seed {seed}: {adaptive.mean():.4f} against {uniform.mean():.4f}"


def test_the_report_tells_what_distillation_and_the_gate_bring(characters):
    """Of a layer whose inputs differ in what they need."""
    model = characters.train(0)
    program = pc.capture(model, ids(4))
    step = AdaptiveComputation(0.5, steps=100)
    learners = Learners(program, step.layers(program)[0][0], 4)
    with torch.no_grad():
        h = model.first(model.embedding(characters.text()[0][:1024]).flatten(1))
        z = model.layers[0].norm(h)
        found = step.train(learners, z, model.layers[0](h) - h, seed=0)
    adaptive, uniform, raw = list(found.values())[:3]
    assert adaptive < uniform < raw
    assert found["share of learners"] == pytest.approx(0.5, abs=0.1)  # of rows that the gate was not trained on


def test_it_conforms(characters):
    pc.testing.check_pass(quick(), characters.Model(depth=1).eval(), ids(32))


REFUSED = {
    "adaptive_computation:0.1": "a budget of 0.1 of 4 learners",
    "adaptive_computation:0.5,form=lazy": "there is no form 'lazy'",
    "adaptive_computation:0.5,learners=1": "of 1 learners",
}


@pytest.mark.parametrize("step", REFUSED)
def test_refusals(refused, step):
    refused(pc.OptionError, REFUSED[step], lambda: pc.compile(nn.Identity(), [step]))


def test_what_it_cannot_act_on_is_left_and_listed(reference, refused):
    narrow = [nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8)]
    twice = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)]
    model = nn.Sequential(*narrow, *twice, *twice, nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(64, 8)
    compiled = reference(model, [quick()], x, calibration=[x])
    result = compiled.report(latency=False).to_dict()["passes"][-1]
    assert result["matched"] == ["11"]
    reasons = {"it has 3 hidden channels for 4 learners", "something else reads its weights too"}
    assert set(result["skipped"].values()) == reasons
    few = [torch.randn(9, 8)]
    refused(pc.CalibrationError, "'11' saw 9 tokens, too few", lambda: reference(model, [quick()], x, calibration=few))
