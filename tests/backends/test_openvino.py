"""target="openvino": sessions of OpenVINO, and what `explain()` says of its kernels."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import paretoc as pc
import pytest
import torch
from paretoc.backends import OpenVino
from paretoc.backends.onnxruntime import kernels, kernels_openvino, probe, runtime_openvino, speeds
from paretoc.backends.onnxruntime.executable import PROFILED_CALLS, OnnxExecutable
from paretoc.backends.onnxruntime.runtime_openvino import OpenVinoSession, Ran
from paretoc.backends.onnxruntime.speeds import shipped
from torch import nn

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install paretoc[openvino]")
TARGETS = ("openvino", "openvino-bf16")


class Net(nn.Module):
    """An embedding, a residual attention, convolutions and a head: one of each kind of site."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.first, self.second = nn.Conv1d(32, 32, 3, padding=1), nn.Conv1d(32, 32, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        y = self.norm(x)
        parts = (layer(y).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        z = self.second(self.first(x.transpose(1, 2)).relu())
        return self.head(z.mean(-1)), x


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IDS = (torch.arange(2 * 9).reshape(2, 9) * 7) % 50
SITES = {"query", "key", "value", "out", "up", "down", "first", "second", "head"}


def build(net: Net, recipe: list[str], target: str = "openvino") -> pc.CompiledModel:
    return pc.compile(net, recipe, example_inputs=IDS, calibration=[IDS], target=target, verify=False)


def executable(compiled: pc.CompiledModel) -> OnnxExecutable:
    found = compiled._compiled().executable
    assert isinstance(found, OnnxExecutable)
    return found


def sizes(session: Any) -> list[int | None]:
    """Of the first input; None where any size fits."""
    assert isinstance(session, OpenVinoSession)
    return [None if axis.is_dynamic else axis.get_length() for axis in session.compiled.inputs[0].partial_shape]


def profiled(compiled: pc.CompiledModel) -> list[Ran]:
    """The kernels that run the model."""
    ran = executable(compiled)
    return ran.runtime.start(ran._start(fitted=True), profiled=True).profile(ran._example(), PROFILED_CALLS)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


RECIPES = [
    [],
    ["quantize:W8A8,embeddings=true"],
    ["quantize:W8A8-dynamic"],
    ["quantize:W8A8-dynamic,granularity=token"],
    ["quantize:W8A16"],
    ["quantize:W4A16,group_size=16"],
    ["quantize:W4A8,group_size=16"],
    ["quantize:W8A8,attention=true"],
    ["quantize:W8A8,attention=scores"],
    ["prune_nm:2:4", "quantize:W8A8"],
]


@pytest.mark.parametrize("recipe", RECIPES, ids=" + ".join)
def test_equals_the_eager_reference(net: Net, recipe: list[str]) -> None:
    compiled = build(net, recipe)
    assert isinstance(executable(compiled).session, OpenVinoSession)
    for batch in (1, 5):
        ids = (torch.arange(batch * 9).reshape(batch, 9) * 3) % 50
        for got, want in zip(compiled(ids), compiled.program(ids), strict=True):
            assert got.shape == want.shape
            # float32 sums in another order; a rounding that falls the other way is a step of 1/255
            assert relative(got, want) < (2e-2 if "A8" in str(recipe) else 1e-5)


def test_calls_of_the_examples_size_run_a_session_for_that_size(net: Net, tmp_path: Path) -> None:
    compiled = build(net, [])
    compiled.save(tmp_path / "kept")
    loaded = pc.load(tmp_path / "kept")
    for model, ran in ((compiled, executable(compiled)), (loaded, loaded.executable)):
        want = net(IDS)[1].detach()
        assert not {"session", "_fitted"} & vars(ran).keys()
        assert relative(model(IDS)[1], want) < 1e-5
        assert sizes(ran._fitted) == [2, 9] and "session" not in vars(ran)
        other = torch.arange(9).reshape(1, 9)
        assert relative(model(other)[1], net(other)[1].detach()) < 1e-5
        assert sizes(ran.session) == [None, None]
    plain = build(net, [], "onnxruntime")
    plain(IDS)
    assert "_fitted" not in vars(executable(plain)), "ONNX Runtime's own kernels gain nothing by it"


def test_a_batch_of_one_is_the_size_of_an_example_of_one(net: Net) -> None:
    """The capture repeats it to keep the axis open: the session must not be for two."""
    compiled = pc.compile(net, [], example_inputs=IDS[:1], target="openvino", verify=False)
    assert relative(compiled(IDS[:1])[1], net(IDS[:1])[1].detach()) < 1e-5
    assert sizes(executable(compiled)._fitted) == [1, 9]


def test_the_comparison_sees_other_weights(net: Net) -> None:
    torch.manual_seed(1)
    compiled, other = build(net, []), build(Net().eval(), [])
    assert relative(compiled(IDS)[1], other.program(IDS)[1]) > 0.5


def test_floating_operators_round_to_bf16_only_where_it_was_asked_for(net: Net) -> None:
    exact, rounded = (build(net, [], target) for target in TARGETS)
    want = exact.program(IDS)[1]
    assert relative(exact(IDS)[1], want) < 1e-5
    assert relative(rounded(IDS)[1], want) < 1e-2, "bf16 has 8 bits, of which sums average the errors out"
    assert executable(rounded).runtime == runtime_openvino.OpenVino("bf16")
    assert "compute in bf16" in str(rounded.report()) and "compute in bf16" not in str(exact.report())


@pytest.mark.parametrize(("flags", "warned"), [("fpu avx2", True), ("fpu avx512_vnni", False), ("avx2", False)])
def test_a_report_says_where_products_overflow(net: Net, flags: str, warned: bool, monkeypatch) -> None:
    monkeypatch.setattr(speeds, "cpu_flags", lambda: frozenset(flags.split()))
    assert ("overflow" in str(build(net, []).report(latency=False))) is warned


@pytest.mark.parametrize(("flags", "used"), [("fpu avx2", "f32"), ("fpu avx512_bf16", "bf16"), ("avx2", "bf16")])
def test_a_cpu_without_bf16_is_not_asked_for_it(net: Net, flags: str, used: str, monkeypatch) -> None:
    monkeypatch.setattr(runtime_openvino, "cpu_flags", lambda: frozenset(flags.split()))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(openvino.Core, "compile_model", lambda self, model, device, settings: asked.update(settings))
    monkeypatch.setattr(runtime_openvino, "OpenVinoSession", lambda compiled: compiled)
    ran = executable(build(net, [], "openvino-bf16"))
    ran.runtime.start(ran._start())
    assert asked["INFERENCE_PRECISION_HINT"] == used


def test_every_site_is_found_and_static_ones_run_on_integers(net: Net) -> None:
    rows = {row.site: row for row in build(net, ["quantize:W8A8,embeddings=true"]).explain().rows}
    assert rows.keys() == SITES | {"embed"}
    assert all(row.accelerated and row.milliseconds is not None and not row.note for row in rows.values())
    assert all(row.kernel.lower().endswith(("i8)", "u8)")) for row in rows.values())


def test_a_site_that_is_not_accelerated_is_said_to_be_so(net: Net) -> None:
    rows = {row.site: row for row in build(net, ["quantize:W8A8-dynamic"]).explain().rows}
    for site in ("first", "second"):
        assert not rows[site].accelerated and "known beforehand" in rows[site].note
    assert "folded" not in "".join(row.kernel for row in rows.values())
    dense = {row.site: row for row in build(net, []).explain().rows}
    assert dense.keys() == SITES | {"embed"} and not any(row.accelerated for row in dense.values())
    assert all(row.kernel.endswith("f32)") and not row.note for row in dense.values())


def _explained(*ran: Ran) -> Any:
    """The row of a site, given the kernels that ran."""
    placed = kernels.Placed("up", "Affine(8)", "linear", "static", 1000, 1000)
    nodes = ('["up"] m = MatMul(x, w)', '["sum"] s = Add(m, b)', "y = Gelu(s)")
    graph = onnx.parser.parse_graph(
        "g (float[2,4] x, float[4,4] w, float[4] b) => (float[2,4] y) {" + "\n".join(nodes) + "}"
    )
    return kernels_openvino.explain_openvino(ran, [placed], ir.from_proto(graph), shipped("OpenVINO-f32"))[0]


OTHER = Ran("other", "FullyConnected", "jit_I8", 1.0, ("other",), ("other.weight.codes",))


@pytest.mark.parametrize("name", ["up", "sum", "y", "y_original", "up/DequantizationMultiply"])
def test_a_kernel_is_found_by_what_it_runs(name: str) -> None:
    for ran in (Ran(name, "FullyConnected", "brgemm_I8", 2.0), Ran("", "MatMul", "I8", 2.0, ("", name))):
        row = _explained(OTHER, ran)
        assert (row.kernel, row.accelerated, row.milliseconds) == (f"{ran.operator} ({ran.executed})", True, 2.0)


def test_a_kernel_is_found_by_the_weight_it_reads() -> None:
    ran = Ran("Multiply_6277", "FullyConnected", "brgemm_I8", 2.0, ("Multiply_6277",), ("scale", "up.weight.codes"))
    assert _explained(Ran("up", "MatMul", "f32", 1.0), OTHER, ran).kernel == "FullyConnected (brgemm_I8)"


def test_what_ran_elsewhere_is_not_taken_for_the_site() -> None:
    assert "no kernel" in _explained(Ran("sum", "Add", "jit_I8", 1.0, ("up",), ("up.weight.codes",)), OTHER).note
    row = _explained(Ran("up", "FullyConnected", "jit_avx512_f32"))
    assert not row.accelerated and "not accelerated" in row.note


class Rectified(nn.Module):
    """No biases, and codes behind the ReLU have the zero 0: OpenVINO takes the scale of the last product behind the
    residual sum, and invents a name for what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def test_a_product_without_its_name_is_explained() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32)
    compiled = pc.compile(
        Rectified().eval(), ["quantize:W8A8"], example_inputs=x, calibration=[x], target="openvino", verify=False
    )
    named = {name.partition("/")[0] for ran in profiled(compiled) for name in (ran.name, *ran.nodes)}
    assert "up" in named and "down" not in named
    rows = compiled.explain().rows
    assert [row.site for row in rows] == ["up", "down"] and all(row.accelerated and not row.note for row in rows)


def test_saved_and_loaded_it_runs_on_openvino_again(net: Net, tmp_path: Path) -> None:
    for target in TARGETS:
        compiled = build(net, ["quantize:W8A8"], target)
        compiled.save(tmp_path / target)
        loaded = pc.load(tmp_path / target)
        assert loaded.executable.runtime == executable(compiled).runtime
        for got, want in zip(loaded(IDS), compiled(IDS), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_file_holds_standard_operators_and_runs_anywhere(net: Net, tmp_path: Path) -> None:
    compiled = build(net, ["quantize:W8A8"])
    compiled.export_onnx(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert {entry.domain for entry in model.opset_import} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"ids": IDS.numpy()})
    for got, want in zip(found, compiled(IDS), strict=True):
        assert np.linalg.norm(got - want.numpy()) < 1e-2 * np.linalg.norm(want.numpy())


def test_a_language_model_generates_the_same_tokens() -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=60, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 60, (2, 7))
    compiled = pc.compile(pc.CausalLM(model), [], target="openvino", verify=False)
    got = compiled.generate(ids, max_new_tokens=8, eos_token_id=[])
    want = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=2, eos_token_id=[])
    assert torch.equal(got, want)


def test_without_openvino_it_says_what_to_install(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = build(net, [])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(pc.LoweringError, match="not installed") as caught:
        compiled(IDS)
    assert "paretoc[openvino]" in str(caught.value)


def test_inputs_that_do_not_fit_are_refused(net: Net) -> None:
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    compiled = pc.compile(fixed, [], example_inputs=torch.randn(2, 3, 4), target="openvino", verify=False)
    assert compiled(torch.randn(5, 3, 4)).shape == (5, 3)
    with pytest.raises(pc.OptionError, match=r"do not fit the compiled model: .*input.*2\.3\.5"):
        compiled(torch.randn(2, 3, 5))


def test_a_model_that_openvino_refuses_is_named(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = build(net, [])
    monkeypatch.setattr(OnnxExecutable, "_content", lambda self: b"no model")
    with pytest.raises(pc.LoweringError, match=r"OpenVINO 2.* refuses the model: \S+") as caught:
        compiled(IDS)
    assert "src/" not in str(caught.value).splitlines()[0] and "update OpenVINO" in str(caught.value)


def test_the_callers_threads_keep_their_denormals(net: Net) -> None:
    """Sessions flush them to zero; what factors matrices elsewhere needs them."""
    compiled, least = build(net, []), torch.tensor(5e-324, dtype=torch.float64)
    compiled(IDS), compiled(IDS[:1]), compiled.explain()
    assert least * 1.0 > 0


def test_outputs_are_the_callers_own_and_threads_do_not_meet(net: Net) -> None:
    compiled = build(net, ["quantize:W8A8"])
    calls = [(torch.arange(18).reshape(2, 9) * step) % 50 for step in range(1, 17)]
    want = [compiled(ids)[0].clone() for ids in calls]
    first = compiled(calls[0])[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: compiled(ids)[0], calls))
    for got, expected in zip([first, *found], [want[0], *want], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_what_rounds_is_computed_by_the_product_before_it(net: Net) -> None:
    """GELU and the rounding behind it belong to the kernel of `up`."""
    compiled = build(net, ["quantize:W8A8"])
    model = executable(compiled).model
    assert model is not None
    (down,) = (n for n in model.graph if n.name == "down")
    rounding = down.inputs[0].producer().inputs[0].producer()
    assert rounding.op_type == "QuantizeLinear"
    (up,) = (ran for ran in profiled(compiled) if "up.weight.codes.axis1" in ran.constants)
    assert rounding.name in up.nodes


@pytest.mark.parametrize(("attention", "integers"), [("false", False), ("scores", True)])
def test_scores_are_computed_on_integers_inside_the_attention(net: Net, attention: str, integers: bool) -> None:
    (fused,) = (
        ran for ran in profiled(build(net, [f"quantize:W8A8,attention={attention}"])) if "oftmax" in str(ran.nodes)
    )
    assert fused.operator == "Subgraph" and sum("MatMul" in name for name in fused.nodes) >= 1
    assert fused.executed.lower().endswith("i8") is integers


def test_calibration_measures_the_standard_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOC_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_WIDTH", 64)
    monkeypatch.setattr(probe, "_LAYERS", 1)
    kept = OpenVino("bf16").calibrate()
    assert kept.speeds.keys() == {"ShiftedMatMul", "RoundedMatMul", "IntegerMatMul", "StoredMatMul"}
    assert all(speed > 0 for row in kept.speeds.values() for speed in row.values())
    assert kept.kept.name.endswith("-bf16.json")
