"""What a user meets who asks for something that cannot be: three lines, or a warning in the report."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.compiler.cholesky import singular
from paretoc.compiler.errors import CalibrationError, CaptureError, OptionError, PassError
from paretoc.compiler.registry import registry
from torch import nn


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).eval()


X = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "recipe", ["quantize:W8A8", *(f"quantize:W4A16,fitter={name}" for name in ("gptq", "awq", "adaround"))]
)
def test_calibration_is_missing(reference, model, refused, recipe):
    error = refused(CalibrationError, "needs calibration data", lambda: reference(model, [recipe], X[:2]))
    assert "pass calibration=" in error.fix
    reference(model, [recipe], X[:2], calibration=[X])


def test_every_fitter_that_needs_data_says_so_before_it_is_run(reference, model):
    takes = {"additive": "Additive(1, 4, 4)", "lowrank": "Sum(Affine(4), LowRank(2))", "nupes": "Power(4)"}
    takes["jlcm"] = "ClusteredCodebook(3, 4)"
    for name, fitter in registry().fitters.items():
        if not fitter.data_free:
            step = pc.Quantize("W4A16", weights=takes.get(name, "Affine(4, 32)"), fitter=name)
            with pytest.raises(CalibrationError, match="needs calibration data"):
                reference(model, [step], X[:2])


@pytest.mark.parametrize(("tokens", "warned"), [(20, ["0", "2"]), (50, ["0"]), (300, [])])
def test_a_singular_hessian_is_damped_and_reported(reference, model, tokens, warned):
    """64 inputs of the first layer, 32 of the second."""
    compiled = reference(model, ["quantize:W4A16,fitter=gptq"], X[:2], calibration=[X[:tokens]])
    warnings = compiled.report(latency=False).passes[-1]["warnings"]
    sentence = "the Hessian of its inputs is singular: some follow from others"
    assert [text.split("; ")[0] for text in warnings] == [f"{site}: {sentence}" for site in warned]
    assert torch.isfinite(compiled(X)).all()


@pytest.mark.parametrize(
    "step",
    [
        "quantize:W4A16,fitter=adaround(iterations=2)",
        pc.Quantize("W4A16", weights="Sum(Affine(4), LowRank(2))", fitter="lowrank"),
        pc.Quantize("W4A16", weights="Additive(1, 4, 4)", fitter="additive"),
        "nupes:bits=4",
    ],
    ids=["adaround", "lowrank", "additive", "nupes"],
)
def test_every_fitter_reports_a_singular_hessian(reference, model, step):
    warnings = [
        reference(model, [step], X[:2], calibration=[X[:tokens]]).report(latency=False).passes[-1]["warnings"]
        for tokens in (20, 300)
    ]
    assert [sum("is singular" in text for text in each) for each in warnings] == [2, 0]


def test_calibration_data_that_are_no_numbers(reference, model, refused):
    bad = X[:20].clone()
    bad[3, 4] = torch.nan
    call = lambda: reference(model, ["quantize:W8A8"], X[:2], calibration=[X[:20], bad])  # noqa: E731
    assert "calibration batch 1" in refused(CalibrationError, "holds NaN", call).where


@pytest.mark.parametrize("step", ["quantize:W4A16,fitter=gptq", "low_rank:0.5"])
def test_inputs_that_overflow_name_the_layer(reference, model, refused, step):
    call = lambda: reference(model, [step], X[:2], calibration=[X * 1e30])  # noqa: E731
    error = refused(PassError, "Hessian of the calibration data holds NaN or infinity", call)
    assert "node" in error.where and "overflow" in error.fix


def test_what_is_singular():
    x = X * torch.logspace(-3, 3, 64)  # the sizes of the inputs do not matter
    dependent, dead = x.clone(), x.clone()
    dependent[:, 5] = x[:, 1] - x[:, 9]
    dead[:, [0, 7]] = 0  # nor do inputs that are always zero
    found = {name: singular((v.T @ v).double()) for name, v in {"x": x, "few": x[:63], "dead": dead}.items()}
    assert found == {"x": False, "few": True, "dead": False}
    assert singular(dependent.double().T @ dependent.double())


def test_eight_bit_floats_cannot_reach_a_weight(reference, model, refused):
    step = pc.Quantize("FP8", weights="Float('e4m3', 0, 'float16')")
    reference(model, [step], X[:2])
    model[2].weight.data *= 1e12
    sentence = "no scale of Float(format='e4m3', group=0, scale='float16') fits weights up to 1."
    error = refused(OptionError, sentence, lambda: reference(model, [step], X[:2]))
    assert "site linear '2'" in error.where and error.fix.startswith("use scale='float32'")
    reference(model, ["quantize:FP8"], X[:2])  # as this has


def test_eight_bit_floats_follow_activations_of_any_size(reference):
    layer = nn.Linear(64, 32, bias=False)
    compiled = reference(layer, ["quantize:FP8"], X[:2])
    for size in (1e-6, 1.0, 1e30):
        expected = (X * size).double() @ layer.weight.detach().double().T
        assert float((compiled(X * size) - expected).norm()) < 0.1 * float(expected.norm()), size


def test_weights_that_are_no_numbers(reference, model, refused):
    model[0].weight.data[1, 2] = torch.nan
    refused(CaptureError, "NaN or infinite", lambda: reference(model, ["quantize:FP8"], X[:2]))


def test_a_group_larger_than_the_layer(reference, model, refused):
    call = lambda: reference(model, ["quantize:W4A16,group_size=128"], X[:2])  # noqa: E731
    error = refused(OptionError, "group size 128 is larger than the input width 64", call)
    assert "site linear '0'" in error.where and error.fix.startswith("use 16 or 32 or 64")
    call = lambda: reference(model, ["quantize:W4A16,group_size=24"], X[:2])  # noqa: E731
    refused(OptionError, "group size 24 does not divide the input width 64", call)
