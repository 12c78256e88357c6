"""MatFormer: a submodel is the slice a textbook cuts, the plan keeps the rule, one file serves every width."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import onnx
import paretoc as pc
import paretoc.testing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoc.plugins import MatFormer
from paretoc.plugins.matformer import GRANULARITIES, mix_and_match, narrowed
from torch import Tensor, nn

DEPTH, HIDDEN = 3, 64


def cut(model: nn.Module, counts: list[int]) -> nn.Module:
    """The textbook: layers with the first rows of W₁ and the first columns of W₂."""
    model = copy.deepcopy(model)
    for layer, count in zip(model.layers, counts, strict=True):
        for made in filter(None, (layer.up, layer.gate)):
            made.weight = nn.Parameter(made.weight[:count])
            made.bias = None if made.bias is None else nn.Parameter(made.bias[:count])
        layer.down.weight = nn.Parameter(layer.down.weight[:, :count])
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 64, (*shape, 6))


@pytest.fixture(params=[False, True], ids=["plain", "gated"])
def model(request, characters) -> nn.Module:
    return characters.Model(request.param).eval()


@pytest.fixture(scope="module")
def nested(characters) -> nn.Module:
    """Trained with the sum of the losses at all four widths, as the release of MatFormer-OLMo trains."""
    return characters.train(0, widths=GRANULARITIES, at=lambda model, width: narrowed(model, width, "*.down"))


def test_it_conforms(characters):
    pc.testing.check_pass(MatFormer(0.25), characters.Model(depth=1).eval(), ids(4))


@pytest.mark.parametrize(
    ("step", "counts"),
    [("matformer:0.25", [16] * 3), ("matformer:widths=[0.125,0.5,1]", [8, 32, 64])],
)
def test_a_submodel_is_the_textbook_slice(reference, model, step, counts):
    x = ids(5)
    compiled = reference(model, [step], x)
    torch.testing.assert_close(compiled(x), cut(model, counts)(x), rtol=0, atol=1e-5)  # sums in another order
    assert (compiled(x) - cut(model, [n + 1 for n in counts[:2]] + counts[2:])(x)).abs().max() > 1e-3
    weights = compiled.program.weights()
    assert [weights[f"layers.{i}.down.weight"].shape[1] for i in range(DEPTH)] == counts


def test_sorting_alone_changes_the_order_and_nothing_else(reference, model):
    x = ids(64)
    compiled = reference(model, ["matformer:1.0,order=activation"], x, calibration=[x])
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
    weights = compiled.program.weights()["layers.0.down.weight"]
    assert not torch.equal(weights, model.layers[0].down.weight)
    assert torch.equal(weights.sort(1).values, model.layers[0].down.weight.sort(1).values)


def test_widths_are_rounded(reference, characters):
    compiled = reference(characters.Model(), ["matformer:widths=[0.01,0.3,0.95],round_to=8"], ids(2))
    weights = compiled.program.weights()
    assert [len(weights[f"layers.{i}.up.weight"]) for i in range(DEPTH)] == [8, 16, 64]


@pytest.mark.parametrize("widths", [0.25, [0.125, 0.5, 1.0]])
def test_narrowed_training_sees_the_submodel(model, widths):
    x, counts = ids(5), [round(w * HIDDEN) for w in (widths if isinstance(widths, list) else [widths] * DEPTH)]
    with narrowed(model, widths, "*.down"):
        out = model(x)
    torch.testing.assert_close(out, cut(model, counts)(x), rtol=0, atol=1e-5)
    out.sum().backward()
    for layer, count in zip(model.layers, counts, strict=True):
        assert (layer.up.weight.grad[count:] == 0).all() and (layer.up.weight.grad[:count] != 0).any()
    assert not torch.equal(model(x), out), "the hooks must be gone"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.floats(0.125, 1))
def test_the_plan_is_the_least_slope(sizes, width):
    widths = mix_and_match(width, GRANULARITIES, sizes)
    spent, budget = sum(w * s for w, s in zip(widths, sizes, strict=True)), width * sum(sizes)
    assert widths == sorted(widths), "widths may not fall with depth"
    low, high = widths[0], widths[-1]
    assert low == high or GRANULARITIES.index(high) - GRANULARITIES.index(low) == 1, "neighbours only"
    assert spent <= budget * (1 + 1e-6)
    wider = min((g for g in GRANULARITIES if g > width), default=1.0)
    narrow = [size for size, w in zip(sizes, widths, strict=True) if w < wider]
    assert not narrow or spent + (wider - low) * narrow[-1] > budget * (1 - 1e-6), "one more layer would fit"


def test_one_file_of_weights_serves_every_width(tmp_path: Path, characters):
    """Rows of W₁ and W₂ in both layouts: with three axes a linear layer is a MatMul, with two a Gemm."""
    model, x = characters.Model(gated=True, depth=1).eval(), ids(2, 3)
    models = {w: pc.compile(model, [f"matformer:{w}"], example_inputs=x) for w in (0.25, 1.0)}
    pc.save(models, tmp_path / "nested")
    models[1.0].save(tmp_path / "single")
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("nested", "single")]
    assert sizes[0] <= sizes[1] + 64, "the narrow model must be part of the wide one's bytes"
    for width, compiled in models.items():
        loaded = pc.load(tmp_path / "nested", width)
        assert torch.equal(loaded(x), compiled(x))
        assert loaded.explain().rows[0].site == compiled.explain().rows[0].site
    narrow = onnx.load(tmp_path / "nested" / "model-0.25.onnx", load_external_data=False)
    outside = [t for t in narrow.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(int(e.value) for t in outside for e in t.external_data if e.key == "length") < 0.6 * sizes[0]


# -- what the paper claims, reduced ---------------------------------------------------------------------------


def test_the_loss_falls_with_the_width_and_mixing_interpolates(nested, characters):
    """300 steps of 128 characters, the sum of the four losses in each; 2048 characters held out."""
    plan = [*GRANULARITIES, *(low + (high - low) / 3 for low, high in pairwise(GRANULARITIES))]
    found = characters.losses(nested, *map(MatFormer, plan))
    means = [round(float(x.mean()), 4) for x in found]
    for (narrow, wide), mixed in zip(pairwise(found[:4]), found[4:], strict=True):
        assert characters.better(wide, narrow), means
        assert wide.mean() < mixed.mean() < narrow.mean(), means  # the last of the three layers has the greater width


def test_a_model_trained_at_one_width_is_no_matformer(nested, characters):
    (plain,), (trained,) = (characters.losses(m, MatFormer(0.125)) for m in (characters.train(0), nested))
    assert trained.mean() < plain.mean() - 0.3


def test_sorted_is_better_than_raw(characters):
    """Three seeds, models that were trained at full width only; half of the channels stay."""
    for seed in range(3):
        ordered, raw = characters.losses(characters.train(seed), MatFormer(0.5, order="activation"), MatFormer(0.5))
        assert characters.better(ordered, raw), f"seed {seed}: {ordered.mean():.4f} against {raw.mean():.4f}"
        assert not characters.better(raw, ordered)


REFUSED = {
    "matformer:0.05": "the width 0.05 is out of range",
    "matformer:widths=[0.5,2]": "the width [0.5, 2.0] is out of range",
    "matformer:granularities=[0.5,0.25]": "the granularities [0.5, 0.25]",
    "matformer:order=beauty": "beauty",
}


@pytest.mark.parametrize("step", REFUSED)
def test_refusals(refused, step):
    refused(pc.OptionError, REFUSED[step], lambda: pc.compile(nn.Identity(), [step]))


def test_refusals_that_need_the_model(refused, reference, characters):
    model = characters.Model()
    refused(
        pc.OptionError,
        "2 widths for 3 feed-forward layers",
        lambda: reference(model, ["matformer:widths=[0.5,1]"], ids(2)),
    )
    flat = nn.Sequential(nn.Linear(64, 10))
    refused(pc.PassError, "there is no feed-forward layer", lambda: reference(flat, ["matformer"], torch.randn(2, 64)))
    refused(pc.OptionError, "names 0 linear layers", lambda: narrowed(model, 0.5, "*.nothing").__enter__())
