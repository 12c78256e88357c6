"""`compile` from end to end on the reference backend: the steps, the report, determinism, and errors."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import paretoc as pc
import pytest
import torch
from paretoc.compiler.driver import Progress
from paretoc.compiler.errors import CalibrationError, OptionError
from paretoc.compiler.passes import Context, Pass, PassResult, Phase
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import BATCH_NORM
from paretoc.compiler.verify import encodings_by_weight
from torch import nn

X = torch.randn(4, 16)


@dataclass(frozen=True)
class Spy(Pass):
    """Writes down what the driver gives it."""

    name: ClassVar[str] = "spy"
    seen: ClassVar[list[tuple[Context, float]]] = []

    def apply(self, program, ctx: Context) -> PassResult:
        Spy.seen.append((ctx, float(torch.rand(()))))
        return PassResult(warnings=["looked"])


@pytest.fixture
def spy():
    Spy.seen.clear()
    return Spy()


# -- the steps -------------------------------------------------------------------------------------------


def test_no_passes_is_the_model_canonical(models, reference):
    model = models.Cnn().eval()
    compiled = reference(model, [], torch.randn(2, 4, 8, 8))
    x = torch.randn(5, 4, 8, 8)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert compiled.program.calls(*BATCH_NORM) == []
    assert len(compiled.original.calls(*BATCH_NORM)) == 3


@pytest.mark.parametrize(
    ("passes", "ran"),
    [
        ([], ["canonicalize"]),
        (["quantize:W8A16"], ["canonicalize", "quantize"]),
        (["canonicalize", "quantize:W8A16"], ["canonicalize", "quantize"]),
        ([{"merge_models": {}}, "prune_nm"], ["merge_models", "canonicalize", "prune_nm"]),
    ],
    ids=str,
)
def test_canonicalization_runs_once_in_its_place(models, reference, passes, ran):
    model = models.Mlp()
    if ran[0] == "merge_models":
        passes = [pc.MergeModels(models=(models.Mlp(),)), *passes[1:]]
    report = reference(model, passes, X).report(latency=False)
    assert [entry["name"] for entry in report.passes] == ran


def test_a_pass_gets_its_context(models, reference, spy):
    with ThreadPoolExecutor(1) as executor:
        reference(models.Mlp(), [spy], X, seed=7, executor=executor)
    context, _ = Spy.seen[0]
    assert (context.seed, context.target, context.executor) == (7, "eager", executor)
    assert context.statistics == {}


def test_the_seed_fixes_random_numbers_and_leaves_the_users_alone(models, reference, spy):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    for seed in (0, 0, 1):
        reference(models.Mlp(), [spy], X, seed=seed)
        torch.set_rng_state(before)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = [value for _, value in Spy.seen]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_random_state_of_the_user_does_not_move(models, reference, spy):
    model = models.Mlp()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    reference(model, [spy], X)
    assert torch.equal(torch.rand(3), want)


def test_plugins_observe_every_pass(models, reference):
    seen = []

    class Watcher:
        @pc.hook
        def before_pass(self, transform, program):
            seen.append(("before", transform.name, len(program.weights())))

        @pc.hook
        def after_pass(self, transform, program, result):
            seen.append(("after", transform.name, len(result.matched)))

    watcher = Watcher()
    registry().manager.register(watcher)
    try:
        reference(models.Mlp(), ["quantize:W8A16"], X)
    finally:
        registry().manager.unregister(watcher)
    assert seen == [
        ("before", "canonicalize", 4),
        ("after", "canonicalize", 0),
        ("before", "quantize", 4),
        ("after", "quantize", 2),
    ]


# -- the compiled model ----------------------------------------------------------------------------------


class Pair(torch.nn.Module):
    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor, shift: torch.Tensor | None = None):
        y = self.mlp(x) if shift is None else self.mlp(x) + shift
        return {"y": y, "parts": (y[:, :2], None)}


def test_a_compiled_model_is_a_drop_in_replacement(models, reference):
    model = Pair(models.Mlp())
    compiled = reference(model, ["quantize:W8A16"], {"x": X[:1], "shift": torch.randn(1, 8)})
    shift = torch.randn(4, 8)
    want = model(X, shift)
    for got in (compiled(X, shift), compiled(x=X, shift=shift), compiled(X, shift=shift)):
        assert list(got) == ["y", "parts"]
        assert type(got["parts"]) is tuple
        assert got["parts"][1] is None
        torch.testing.assert_close(got["y"], want["y"], rtol=0.05, atol=0.05)  # eight-bit weights
        assert not torch.equal(got["y"], want["y"])
    refusal = pytest.raises(OptionError, match="the call does not match the captured one: missing \\['shift'\\]")
    with refusal:
        compiled(X)


def test_example_inputs_are_taken_from_the_calibration_data(models, reference):
    for data in ([X], [(X,)], [[X]], [{"x": X}], iter([X, X]), lambda model: model(X)):
        compiled = reference(models.Mlp(), ["quantize:W8A8"], None, calibration=data)
        assert compiled(X[:1]).shape == (1, 8)


class Scaled(nn.Module):
    """One argument by position, one by keyword."""

    def forward(self, x, *, scale: float = 2.0):
        return x * scale


class Total(nn.Module):
    """Any number of arguments by position."""

    def forward(self, *parts):
        return sum(parts)


def test_the_label_of_a_batch_is_no_example(models, reference):
    for batch in ((X, torch.arange(4)), [X, torch.arange(4)]):
        compiled = reference(models.Mlp(), ["quantize:W8A8"], None, calibration=[batch])
        assert compiled(X[:1]).shape == (1, 8)
    for batch in ((X, torch.arange(4)), ((X, torch.arange(4)), {"scale": 2.0})):
        compiled = reference(Scaled(), [], None, calibration=[batch])
        assert compiled.original.interface.parameters == ("x", "scale")
        assert len(compiled.original.example) == 1


def test_a_model_of_any_number_of_inputs_has_no_label(reference):
    compiled = reference(Total(), [], None, calibration=[(X, X + 1, X + 2)])
    torch.testing.assert_close(compiled(X, X, X), 3 * X)


def test_calibration_data_of_what_is_no_model_names_the_model(refused):
    refused(pc.CaptureError, "cannot capture a int", lambda: pc.compile(3, calibration=[(X, X)]))


def test_the_report(models, reference):
    compiled = reference(
        models.Mlp(), ["prune_nm:2:4", "quantize:W8A16"], X, metric=lambda model: float(model(X).sum())
    )
    report = compiled.report(latency=False)
    assert report.original.bytes == 4 * (16 * 32 + 32 + 32 * 8 + 8)
    assert report.compiled.bytes < report.original.bytes / 2.5
    assert [entry["text"] for entry in report.passes] == ["canonicalize", "prune_nm:2:4", "quantize:W8A16"]
    assert report.passes[1]["matched"] == ["up", "down"]
    sizes = [entry["size_bytes"] for entry in report.passes]
    assert sizes[0] > sizes[1] > sizes[2] == report.compiled.bytes
    assert report.passes[0]["relative_error"] == pytest.approx(0, abs=1e-6)
    assert report.fidelity.worst == report.passes[2]["relative_error"] > 0
    assert (report.fidelity.samples, report.fidelity.data) == (4, "the example inputs")
    assert report.metric["original"] != report.metric["compiled"]
    assert report.latency == {}


def test_fidelity_is_measured_on_the_calibration_data(models, reference):
    compiled = reference(models.Mlp(), ["quantize:W8A8"], X, calibration=[torch.randn(5, 16)] * 20)
    fidelity = compiled.report(latency=False).fidelity
    assert (fidelity.samples, fidelity.data) == (40, "the calibration data")  # eight batches of five
    assert set(fidelity.sites) == {"up", "down"}


def test_latency_is_measured_when_asked_for(models, reference):
    compiled = reference(models.Mlp(), [], X)
    assert compiled.report(latency=False).latency == {}
    latency = compiled.report().latency
    assert set(latency) == {"compiled", "original", "pytorch"}
    assert all(0 < item.minimum <= item.median for item in latency.values())
    assert compiled.report() is compiled.report()


def test_explain_names_every_site(models, reference):
    explanation = reference(models.Mlp(), ["quantize:W4A16,group_size=8,targets=up"], X).explain()
    assert explanation.target == "eager"
    assert [(r.site, r.encoding, r.accelerated) for r in explanation.rows] == [
        ("up", "Affine(bits=4, group=8)", False),
        ("down", "dense", False),
    ]
    assert "decode" in explanation.rows[0].kernel
    assert "decode" not in explanation.rows[1].kernel


# -- errors ----------------------------------------------------------------------------------------------


def test_errors_of_options(models, refused):
    model = models.Mlp()
    error = refused(OptionError, "there is no target called 'egaer'", lambda: pc.compile(model, target="egaer"))
    assert error.fix == "did you mean 'eager'?"
    refused(OptionError, "tune= is not supported yet", lambda: pc.compile(model, target="eager", tune=3))
    refused(OptionError, "there is no pass called 'prune'", lambda: pc.compile(model, "prune", target="eager"))


@pytest.mark.parametrize("scheme", ["W8A8"])
def test_a_pass_that_needs_data_says_so(models, reference, refused, scheme):
    sentence = f"the pass 'quantize:{scheme}' needs calibration data"
    refused(CalibrationError, sentence, lambda: reference(models.Mlp(), [f"quantize:{scheme}"], X))


@pytest.mark.parametrize("data", [[], (), lambda model: None])
@pytest.mark.parametrize("example", [X, None], ids=["with an example", "without"])
def test_empty_calibration_data_is_refused(models, reference, refused, data, example):
    call = lambda: reference(models.Mlp(), ["quantize:W8A8"], example, calibration=data)  # noqa: E731
    if callable(data) and example is None:
        refused(OptionError, "the model is not captured yet", lambda: call().report())
    else:
        refused(CalibrationError, "the calibration data is empty", call)


def test_calibration_data_of_another_shape_is_refused(models, reference, refused):
    call = lambda: reference(models.Mlp(), ["quantize:W8A8"], X, calibration=[torch.randn(2, 15)])  # noqa: E731
    error = refused(CalibrationError, "input 'x' has shape [2, 15]", call)
    assert error.where == "calibration batch 0"


def test_an_error_at_the_first_call_leaves_the_model_to_try_again(models, reference):
    compiled = reference(models.Mlp(), [], None)
    with pytest.raises(pc.CaptureError):
        compiled(torch.randn(2, 15))
    assert compiled(X).shape == (4, 8)


# -- determinism -----------------------------------------------------------------------------------------

PASSES = ["prune_nm:2:4", "quantize:W8A8,embeddings=true"]


def _stored(compiled) -> dict[str, bytes]:
    return {n: t.detach().contiguous().numpy().tobytes() for n, t in compiled.program.weights().items()}


def test_compiling_twice_stores_the_same_bytes(models, reference):
    model = models.Cnn().eval()
    x = torch.randn(3, 4, 8, 8)
    runs = [reference(model, PASSES, x, calibration=[x]) for _ in range(2)]
    torch.manual_seed(99)  # the user's own random state does not matter
    with ThreadPoolExecutor(2) as executor:
        runs.append(reference(model, PASSES, x, calibration=[x], executor=executor))
    stored = [_stored(r) for r in runs]
    assert stored[0] == stored[1] == stored[2]
    assert [str(r.program.graph) for r in runs][1:] == [str(runs[0].program.graph)] * 2
    assert any(encodings_by_weight(runs[0].program).values())
    other = reference(model, PASSES, x, calibration=[x * 1.01])
    assert _stored(other) != stored[0]


SCRIPT = """
import hashlib, torch, paretoc as pc
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 8)).eval()
x = torch.randn(4, 16)
passes = ["prune_nm:2:4", "quantize:W8A8"]
compiled = pc.compile(model, passes, example_inputs=x, calibration=[x], target="eager")
digest = hashlib.sha256(str(compiled.program.graph).encode())
for name, tensor in compiled.program.weights().items():
    digest.update(name.encode() + tensor.detach().numpy().tobytes())
digest = digest.hexdigest()
"""


def test_a_fresh_process_stores_the_same_bytes():
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT + "print(digest)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    here: dict[str, str] = {}
    exec(SCRIPT, here)
    assert done.stdout.strip() == here["digest"]


# -- progress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [None, False])
def test_silence_when_piped_or_told_so(models, reference, capsys, wanted):
    reference(models.Mlp(), ["quantize:W8A8"], X, calibration=[X], progress=wanted)
    assert capsys.readouterr() == ("", "")


def test_a_bar_when_told_so(capsys):
    with Progress(True) as progress:
        assert list(progress.track([1, 2], "counting")) == [1, 2]
        assert progress.bar is not None
    assert capsys.readouterr().out == ""  # a bar is written to the error stream only
    with Progress(False) as progress:
        assert progress.track([1, 2], "counting") == [1, 2]


def test_phases_of_the_built_in_passes():
    phases = {
        name: registry().pass_class(name).phase for name in ("merge_models", "canonicalize", "prune_nm", "quantize")
    }
    assert phases == {
        "merge_models": Phase.COMBINE,
        "canonicalize": Phase.CANONICALIZE,
        "prune_nm": Phase.SPARSIFY,
        "quantize": Phase.QUANTIZE,
    }
