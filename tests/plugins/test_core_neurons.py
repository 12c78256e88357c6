"""Core neurons: the counts are those of the definition, the slice is theirs, and the order of the paper holds."""

from __future__ import annotations

import math
from itertools import pairwise

import paretoc as pc
import paretoc.testing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoc.plugins import CoreNeurons, MatFormer
from paretoc.plugins.core_neurons import CoreCount
from torch import Tensor


def textbook(tokens: list[list[float]], share: float, absolute: bool) -> list[int]:
    """The definition, one token and one channel at a time."""
    counts = [0] * len(tokens[0])
    for token in tokens:
        values = [abs(a) if absolute else a for a in token]
        positive = sorted((n for n, a in enumerate(values) if a > 0), key=lambda n: -values[n])
        for n in positive[: math.ceil(share * len(positive))]:
            counts[n] += 1
    return counts


@given(st.integers(0, 99), st.sampled_from([0.125, 0.25, 0.5, 1.0]), st.booleans())
def test_counts_are_the_definition(seed, share, absolute):
    a = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)).round(decimals=3)
    a[0], a[1] = 0.0, -1.0  # tokens without a positive channel
    statistic = CoreCount("a", share, absolute)
    state = statistic.update(statistic.update(statistic.start(), a[:2]), a[2:].reshape(5, 1, 9))
    assert statistic.finish(state).tolist() == textbook(a.tolist(), share, absolute)


def test_the_slice_holds_the_channels_that_count_most(reference, characters):
    model, x = characters.Model(gated=True).eval(), torch.randint(0, 64, (50, 6))
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.down.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[0]}))
        for index, layer in enumerate(model.layers)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    compiled = reference(model, ["core_neurons:0.25"], x, calibration=[x])
    for index, layer in enumerate(model.layers):
        counts = textbook(seen[index].tolist(), 0.2, False)
        core = sorted(sorted(range(64), key=lambda n: (-counts[n], n))[:16])
        for kind, dim in (("up", 0), ("gate", 0), ("down", 1)):
            whole = getattr(layer, kind).weight
            kept = compiled.program.weights()[f"layers.{index}.{kind}.weight"]
            assert torch.equal(kept, whole.index_select(dim, torch.tensor(core)))
            assert not torch.equal(kept, whole.index_select(dim, torch.arange(16)))


def test_it_conforms(characters):
    x = torch.randint(0, 64, (8, 6))
    pc.testing.check_pass(CoreNeurons(), characters.Model(depth=1).eval(), x)


def test_it_runs_on_onnx_runtime(characters):
    model, x = characters.Model(depth=1).eval(), torch.randint(0, 64, (8, 6))
    compiled = pc.compile(model, ["core_neurons:0.5"], calibration=[x])
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=0, atol=1e-5)
    report = compiled.report(latency=False).to_dict()
    assert report["compiled"]["macs"] < 0.85 * report["original"]["macs"]


def test_the_core_is_better_than_chance_and_more_of_it_better_than_less(characters):
    """Three seeds of a ReLU network, together; β = 0.4 against three random choices, then 0.2, 0.6 and 0.8."""
    chance = [MatFormer(0.4, order=f"random(seed={draw})", granularities=(0.4,)) for draw in range(3)]
    found = [
        characters.losses(characters.train(seed), *chance, *map(CoreNeurons, (0.2, 0.4, 0.6, 0.8))) for seed in range(3)
    ]
    random = torch.cat([torch.stack(losses[:3]).mean(0) for losses in found])
    cores = [torch.cat(losses) for losses in list(zip(*found, strict=True))[3:]]
    means = [round(float(x.mean()), 4) for x in (random, *cores)]
    assert characters.better(cores[1], random), means
    assert all(characters.better(more, less) for less, more in pairwise(cores)), means


@pytest.mark.parametrize("step", ["core_neurons:0", "core_neurons:1.5", "core_neurons:0.5,share=0"])
def test_refusals(refused, step):
    refused(pc.OptionError, "is out of range", lambda: pc.compile(torch.nn.Identity(), [step]))


def test_it_needs_data(refused, characters):
    x = torch.randint(0, 64, (2, 6))
    refused(
        pc.CalibrationError,
        "needs calibration data",
        lambda: pc.compile(characters.Model().eval(), ["core_neurons"], example_inputs=x),
    )
