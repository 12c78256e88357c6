"""target="triton" as users meet it: what gets a kernel, that it computes the reference, what is said when not."""

from __future__ import annotations

import sys
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton import Triton
from paretoc.backends.triton.executable import TritonExecutable, place
from paretoc.backends.triton.lower import lower
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two projections of one normalised input, which nothing else reads."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(64)
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def compiled() -> Any:
    """The program of a small model after a pass; each made once."""
    made: dict[Any, pc.Program] = {}

    def get(step: str, norm: type[nn.Module] = nn.LayerNorm, dtype: torch.dtype = torch.float32) -> pc.Program:
        if (step, norm, dtype) not in made:
            torch.manual_seed(0)
            model = Block(norm).eval().to(dtype)
            options = {"target": "eager", "verify": False, "calibration": [(X.to(dtype),)]}
            made[step, norm, dtype] = pc.compile(model, [step], example_inputs=(X.to(dtype),), **options).program
        return made[step, norm, dtype]

    return get


def kernels(executable: TritonExecutable) -> list[str]:
    """The kernels of the lowered graph, in order."""
    targets = [str(n.target) for n in executable.lowered.graph.nodes if n.op == "call_function"]
    return [t.removeprefix("paretoc_triton.").removesuffix(".default") for t in targets if "paretoc" in t]


WEIGHT_ONLY = ["weight_only_linear"] * 3
TOKENS = ["quantize_tokens", *["quantized_linear"] * 2, "quantize_tokens", "quantized_linear"]
RANGES = ["tensor_range", "quantize_range", *["quantized_linear"] * 2, "tensor_range", "quantize_range"]
STATIC = ["quantize_range", *["quantized_linear"] * 2, "quantize_range", "quantized_linear"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("quantize:W4A16", WEIGHT_ONLY),
        ("quantize:W2A16", WEIGHT_ONLY),
        ("quantize:W8A16", WEIGHT_ONLY),
        ("quantize:MXFP4", WEIGHT_ONLY),
        ("quantize:NVFP4", WEIGHT_ONLY),
        ("quantize:W4A16,weights=NF4(32),fitter=rtn", WEIGHT_ONLY),
        ("quantize:W4A16,weights=Codebook(4),fitter=rtn", WEIGHT_ONLY),
        ("quantize:W4A16,weights=Additive(2),fitter=rtn", WEIGHT_ONLY),
        ("quantize:W4A16,weights=NM(2,4,values=Affine(4,16)),fitter=rtn", WEIGHT_ONLY),
        ("quantize:W8A8", STATIC),
        ("quantize:W8A8-dynamic", [*RANGES, "quantized_linear"]),
        ("quantize:W8A8-dynamic,granularity=token", TOKENS),
        ("quantize:W4A8,granularity=token", TOKENS),
        ("quantize:W4A8", TOKENS),
        ("quantize:FP8", TOKENS),
    ],
)
def test_every_scheme_runs_on_its_kernels_and_equals_the_reference(compiled, near, step, expected):
    program = compiled(step)
    executable = Triton().lower(program, {})
    assert kernels(executable) == expected
    (y,), (reference,) = executable.run([X]), program.run([X])
    near(y, reference, 1e-5 * reference.abs().max())
    rows = [row for row in executable.explain() if row.encoding != "dense"]
    assert [row.site for row in rows] == ["gate", "up", "down"]
    assert all("matmul" in row.kernel and not row.accelerated and row.note == "interpreted, for tests" for row in rows)


class SpeltOut(nn.Module):
    """An RMS norm as transformers write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_that_is_spelt_out_joins_too(compiled, near, dtype):
    program = compiled("quantize:FP8", SpeltOut, dtype)
    executable = Triton().lower(program, {})
    assert kernels(executable) == TOKENS
    assert not any("rsqrt" in str(n.target) for n in executable.lowered.graph.nodes)
    x = X.to(dtype)
    (y,), (reference,) = executable.run([x]), program.run([x])
    near(y, reference, (1e-5 if dtype == torch.float32 else 2e-2) * reference.abs().max())  # a code is another


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_joins_the_quantiser_behind_it(compiled, norm):
    executable = Triton().lower(compiled("quantize:FP8", norm), {})
    targets = [str(n.target) for n in executable.lowered.graph.nodes]
    assert not any(target.startswith(("aten.layer_norm", "aten.rms_norm")) for target in targets)


def test_a_norm_that_others_read_stays(compiled):
    program = compiled("quantize:W8A8-dynamic,granularity=token").clone()
    norm = program.calls(torch.ops.aten.layer_norm.default)[0]
    with program.graph.inserting_after(norm):
        program.output.args = ((*program.outputs, norm),)
    targets = [str(n.target) for n in Triton().lower(program, {}).lowered.graph.nodes]
    assert "aten.layer_norm.default" in targets


@pytest.mark.parametrize("step", ["quantize:W8A8", "quantize:FP8"])
def test_an_activation_joins_the_quantiser_behind_it(compiled, step):
    executable = Triton().lower(compiled(step), {})
    targets = [str(n.target) for n in executable.lowered.graph.nodes]
    assert not {"aten.silu.default", "aten.mul.Tensor"} & set(targets)


class FeedForward(nn.Module):
    """An activation of its own, its product with what is not of its shape, and one that is read twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        if self.kind == "tanh":
            return self.down(F.gelu(h, approximate="tanh"))
        if self.kind == "right":
            return self.down(h * F.relu(x))
        if self.kind == "broadcast":
            return self.down(F.silu(h) * h[:, :1])
        h = F.gelu(h)
        return self.down(h) + h[:, :8]


@pytest.mark.parametrize(
    ("kind", "left"),
    [("tanh", None), ("right", None), ("broadcast", "aten.silu.default"), ("twice", "aten.gelu.default")],
)
@pytest.mark.parametrize("step", ["quantize:W8A8", "quantize:W8A8-dynamic,granularity=token"])
def test_only_what_nothing_else_reads_joins_a_quantiser(near, kind, left, step):
    torch.manual_seed(0)
    model, x = FeedForward(kind).eval(), torch.randn(6, 32)
    options = {"example_inputs": (x,), "calibration": [(x,)], "target": "eager", "verify": False}
    program = pc.compile(model, [step], **options).program
    executable = Triton().lower(program, {})
    acts = {"aten.silu.default", "aten.gelu.default", "aten.relu.default"}
    targets = {str(n.target) for n in executable.lowered.graph.nodes}
    assert acts & targets == ({left} if left else set())
    (y,), (reference,) = executable.run([x]), program.run([x])
    near(y, reference, 1e-4 * reference.abs().max())


def test_a_gpu_without_float8_rounds_before_and_says_so(compiled, near):
    program = compiled("quantize:FP8")
    old = program.clone()
    choices = lower(old, (8, 0))
    assert {c.note for c in choices.values() if c.plan} == {"activations rounded before: this GPU has no e4m3"}
    (y,), (reference,) = old.run([X]), program.run([X])
    near(y, reference, 1e-5 * reference.abs().max())


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("quantize:W4A8,group_size=16", "8-bit tensor cores multiply 32 columns at once, more than a group of 16"),
        ("quantize:W4A8,granularity=token,weights=NF4(32),fitter=rtn", "the weights are no integers"),
    ],
)
def test_activations_that_cannot_stay_codes_are_rounded_before_which_is_said(compiled, near, step, reason):
    program = compiled(step)
    executable = Triton().lower(program, {})
    found = kernels(executable)
    assert found.count("weight_only_linear") == 3 and found.count("round_tokens") == 2
    (y,), (reference,) = executable.run([X]), program.run([X])
    near(y, reference, 1e-5 * reference.abs().max())
    notes = [row.note for row in executable.explain() if row.encoding not in ("dense", "")]
    assert all(note.startswith(f"activations rounded before: {reason}") for note in notes)


@pytest.mark.parametrize(("batch", "kernel"), [(1, "gemv"), (2, "skinny matmul")])
def test_explain_names_the_kernel_of_the_users_example(models, batch, kernel):
    x = torch.randn(batch, 64)
    options = {"example_inputs": (x,), "target": "triton", "verify": False}
    compiled = pc.compile(models.Mlp(64, 32, 32).eval(), ["quantize:W4A16,fitter=rtn"], **options)
    assert all(row.kernel.startswith(kernel) for row in compiled.explain().rows)


def test_what_an_attention_without_kernel_reads_is_rounded_in_one(models, near, monkeypatch):
    monkeypatch.setattr("paretoc.backends.triton.kernels.attention.MAX_WIDTH", 4)
    x = torch.randn(2, 16, 12)
    options = {"example_inputs": (x,), "target": "eager", "verify": False}
    program = pc.compile(models.Vit(depth=1).eval(), ["quantize_cache:int4"], **options).program
    executable = Triton().lower(program, {})
    assert kernels(executable) == ["round_tokens", "round_tokens"]
    assert torch.equal(executable.run([x])[0], program.run([x])[0])
    rows = [row.kernel for row in executable.explain() if "round" in row.kernel]
    assert rows == ["paretoc_triton.round_tokens.default"] * 2


def test_what_no_kernel_rounds_stays_and_says_why(models):
    x = torch.randn(2, 16, 12)
    options = {"example_inputs": (x,), "target": "eager", "verify": False}
    program = pc.compile(models.Vit(depth=1).eval(), ["quantize_cache:uint4"], **options).program
    executable = Triton().lower(program, {})
    assert torch.equal(executable.run([x])[0], program.run([x])[0])
    rows = [row for row in executable.explain() if "fake_quantize" in row.kernel]
    assert [row.note for row in rows] == ["no kernel for uint4, which is asymmetric"] * 2


def test_what_no_kernel_reads_runs_the_reference_and_says_why(compiled):
    program = compiled("quantize:W3A16")
    executable = Triton().lower(program, {})
    assert torch.equal(executable.run([X])[0], program.run([X])[0])
    rows = [row for row in executable.explain() if row.encoding != "dense"]
    assert all(row.note == "codes of 3 bits do not fill a byte" and "decode" in row.kernel for row in rows)


def test_float64_runs_the_reference_and_says_why(compiled):
    program = compiled("quantize:W4A16", dtype=torch.float64)
    executable = Triton().lower(program, {})
    assert torch.equal(executable.run([X.double()])[0], program.run([X.double()])[0])
    assert "no Triton kernel multiplies torch.float64" in {row.note for row in executable.explain()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(compiled, near, dtype):
    program, x = compiled("quantize:W4A16", dtype=dtype), X.to(dtype)
    (y,), (reference,) = Triton().lower(program, {}).run([x]), program.run([x])
    assert y.dtype == dtype
    near(y, reference, 4 * torch.finfo(dtype).eps * reference.abs().max())


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("quantize:W4A16,weights=Sum(Affine(4,32),LowRank(4)),fitter=rtn", WEIGHT_ONLY),
        ("quantize:W4A8,weights=Sum(Affine(4,32),LowRank(4)),fitter=rtn", [*TOKENS, *["round_tokens"] * 2]),
    ],
)
def test_a_low_rank_correction_is_added_by_the_kernel(compiled, near, step, expected):
    program = compiled(step)
    executable = Triton().lower(program, {})
    assert sorted(kernels(executable)) == sorted(expected)
    targets = [str(n.target) for n in executable.lowered.graph.nodes]
    assert targets.count("aten.add.Tensor") == 1  # the residual
    (y,), (reference,) = executable.run([X]), program.run([X])
    near(y, reference, 1e-5 * reference.abs().max())
    notes = [row.note for row in executable.explain() if row.encoding.startswith("Sum")]
    assert notes == ["adds the correction of rank 4; interpreted, for tests"] * 3


def test_a_sum_whose_first_part_has_no_kernel_runs_the_reference(compiled):
    program = compiled("quantize:W4A16,weights=Sum(Affine(3,32),LowRank(4)),fitter=rtn")
    executable = Triton().lower(program, {})
    assert torch.equal(executable.run([X])[0], program.run([X])[0])
    assert "codes of 3 bits do not fill a byte" in {row.note for row in executable.explain()}


def test_token_merging_runs_on_its_kernels_and_equals_the_reference(models, near):
    x = torch.randn(2, 16, 12)
    program = pc.compile(
        models.Vit(pool="class").eval(), ["merge_tokens:r=2"], example_inputs=(x,), target="eager", verify=False
    ).program
    executable = Triton().lower(program, {})
    (y, *_), (reference, *_) = executable.run([x]), program.run([x])
    assert kernels(executable)[:2] == ["bipartite_match", "merge_tokens"]
    near(y, reference, 1e-5 * reference.abs().max())
    rows = [row.kernel for row in executable.explain() if "tokens" in row.kernel or "match" in row.kernel]
    assert rows[:2] == ["paretoc_triton.bipartite_match.default", "paretoc_triton.merge_tokens.default"]


def test_lowering_leaves_the_program_alone(compiled):
    program = compiled("quantize:W4A16")
    before = str(program.graph)
    Triton().lower(program, {})
    assert str(program.graph) == before


class Positions(nn.Module):
    """Makes a tensor of its own, and one on a device that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight + torch.arange(8, device="cpu") + torch.ones(8, dtype=torch.float64).to("cpu")


def test_everything_moves_to_the_device():
    program = pc.capture(Positions(), (torch.randn(2, 8),))
    moved = program.clone()
    place(moved, torch.device("meta"))
    assert moved.run([torch.randn(2, 8, device="meta")])[0].device.type == "meta"
    assert program.run([torch.randn(2, 8)])[0].device.type == "cpu"


def test_an_artifact_loads_and_exports(compiled, near, tmp_path):
    torch.manual_seed(0)
    model = pc.compile(Block().eval(), ["quantize:W4A16"], example_inputs=(X,), target="triton", verify=False)
    model.save(tmp_path / "saved")
    loaded = pc.load(tmp_path / "saved")
    expected = model(X)
    near(loaded(X), expected, 1e-2 * expected.abs().max())  # ONNX Runtime multiplies 4-bit weights by int8
    assert loaded.explain().target == "triton" and "MatMulNBits" in str(loaded.explain().rows)
    model.export_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_a_machine_without_a_gpu_is_refused(refused, compiled, monkeypatch):
    monkeypatch.setattr("paretoc.backends.triton.executable.INTERPRETED", False)
    monkeypatch.setattr("paretoc.backends.triton.executable.InterpretedFunction", type(None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = compiled("quantize:W4A16")
    what = "there is no GPU, and Triton's interpreter was not asked for"
    refused(pc.LoweringError, what, lambda: Triton().lower(program, {}))


def test_a_late_choice_of_the_interpreter_is_refused(refused, compiled, monkeypatch):
    monkeypatch.setattr("paretoc.backends.triton.executable.INTERPRETED", False)
    program = compiled("quantize:W4A16")
    what = "TRITON_INTERPRET was changed after Triton had been imported"
    refused(pc.LoweringError, what, lambda: Triton().lower(program, {}))


def test_a_missing_triton_is_refused(refused, compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    program = compiled("quantize:W4A16")
    refused(pc.LoweringError, "Triton is not installed", lambda: Triton().lower(program, {}))
