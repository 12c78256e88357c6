"""Streams without their mean: the same function, cheaper norms; what is refused and why; when it runs by itself."""

from __future__ import annotations

import onnx
import paretoc as pc
import pytest
import torch
import transformers
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.norms import norms
from paretoc.compiler.passes import Context
from paretoc.compiler.streams import center
from torch import Tensor, nn

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 40, "use_cache": False}
IDS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(0))


class PreNorm(nn.Module):
    """Two feed-forward branches on a stream; `last`: what is returned of it."""

    def __init__(self, last: str = "norm", norm: type[nn.Module] = nn.LayerNorm, bias: bool = True) -> None:
        super().__init__()
        self.last = last
        self.embed = nn.Linear(8, 16)
        self.norms = nn.ModuleList(norm(16) for _ in range(3))
        self.ups = nn.ModuleList(nn.Linear(16, 24, bias=bias) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 16) for _ in range(2))
        self.head = nn.Linear(16, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=False):
            x = x + down(up(norm(x)).relu())
        return {"norm": lambda: self.head(self.norms[-1](x)), "returned": lambda: self.norms[-1](x), "raw": lambda: x}[
            self.last
        ]()


def rough(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of norms and biases that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def captured(model: nn.Module, example: Tensor):
    program = pc.capture(model, example)
    canonicalize(program)
    return program


X = torch.randn(3, 7, 8)


def distance(before, after) -> float:
    pairs = zip(before.run(before.example), after.run(after.example), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("bias", [True, False], ids=["with biases", "without"])
def test_the_function_stays_the_same_and_the_mean_is_gone(bias: bool) -> None:
    before = captured(rough(PreNorm(bias=bias)), X)
    after = before.clone()
    result = pc.CenterStream().apply(after, Context())
    assert distance(before, after) < 1e-5
    assert result.metrics == {"norms": 3} and len(result.matched) == 3
    assert [norm.centred for norm in norms(after)] == [False] * 3
    state = after.state_dict()
    for name in ("embed", "downs.0", "downs.1"):
        assert float(state[f"{name}.weight"].mean(0).abs().max()) < 1e-6, name
        assert abs(float(state[f"{name}.bias"].mean())) < 1e-6, name
    assert not any(name.startswith("norms") and name.endswith("bias") for name in state)


def test_a_mean_left_in_a_writer_is_caught() -> None:
    """The check above sees it: an RMS norm of a stream with a mean is another function."""
    before = captured(rough(PreNorm()), X)
    after = before.clone()
    center(after)
    after.set("downs.0.bias", after.get("downs.0.bias") + 0.1)
    with_mean = before.clone()
    with_mean.set("downs.0.bias", with_mean.get("downs.0.bias") + 0.1)
    assert distance(with_mean, after) > 1e-3


def test_a_norm_whose_output_is_returned_keeps_its_bias() -> None:
    before = captured(rough(PreNorm("returned")), X)
    after = before.clone()
    done = center(after)
    assert distance(before, after) < 1e-5
    assert [norm.centred for norm in norms(after)] == [False, False, True]
    assert len(done.left) == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (PreNorm("raw"), "no residual stream can be centred"),
        (PreNorm(norm=nn.RMSNorm), "subtracts no mean"),
        (nn.Sequential(nn.Linear(8, 4)), "the model has no residual stream"),
    ],
    ids=["returned", "no mean", "no norm"],
)
def test_other_models_are_refused(model: nn.Module, reason: str) -> None:
    program = captured(model.eval(), X)
    before = program.clone()
    with pytest.raises(pc.PassError, match=reason):
        pc.CenterStream().apply(program, Context())
    assert distance(before, program) == 0


def test_post_norm_streams_are_refused(captured_bert) -> None:
    with pytest.raises(pc.PassError, match="post-norm"):
        pc.CenterStream().apply(captured_bert, Context())


@pytest.fixture
def captured_bert(models):
    model = models.hugging_face("BertModel", num_hidden_layers=1).eval()
    program = pc.capture(model, {"input_ids": IDS[:, :8] % 20})
    canonicalize(program)
    return program


def test_a_shared_table_is_stored_twice_only_when_asked() -> None:
    config = transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
    before = captured(rough(transformers.GPT2LMHeadModel(config)), IDS)
    same = before.clone()
    assert not center(same, untie=False).norms and distance(before, same) == 0
    after = before.clone()
    result = pc.CenterStream().apply(after, Context())
    assert distance(before, after) < 1e-4
    assert any("wte" in warning and "of its own" in warning for warning in result.warnings)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (pc.Quantize("W8A16", targets=("downs.0",)), "already stored as Affine"),
        (pc.PruneNM("2:4", targets=("downs.0",)), "the pattern of its zeros would not survive"),
    ],
)
def test_stored_weights_are_left_alone(step: pc.Pass, reason: str) -> None:
    program = captured(rough(PreNorm()), X)
    step.apply(program, Context())
    before = program.clone()
    done = center(program)
    assert not done.norms and reason in next(iter(done.left.values())).why
    assert distance(before, program) == 0


def test_n_m_zeros_would_be_lost() -> None:
    with pytest.raises(pc.ScheduleError, match="cannot be combined"):
        pc.compile(PreNorm(), ["prune_nm:2:4", "center_stream"], example_inputs=X)


# -- by itself -------------------------------------------------------------------------------------------


def names(passes: list[str], target: str = "onnxruntime", model: nn.Module | None = None) -> list[str]:
    compiled = pc.compile(model or rough(PreNorm()), passes, example_inputs=X, target=target, calibration=[X])
    return [record.name for record in compiled._compiled().records]


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (["quantize:W8A8"], ["canonicalize", "center_stream", "quantize"]),
        (["smooth", "quantize:W8A8"], ["canonicalize", "center_stream", "smooth", "quantize"]),
        (["center_stream", "quantize:W8A8"], ["canonicalize", "center_stream", "quantize"]),
        (["low_rank:0.5", "quantize:W8A8"], ["canonicalize", "low_rank", "center_stream", "quantize"]),
        (["prune_nm:2:4", "quantize:W8A8"], ["canonicalize", "prune_nm", "quantize"]),
        ([], ["canonicalize"]),
    ],
    ids=["alone", "before smooth", "asked for", "after others", "not with zeros", "nothing is rounded"],
)
def test_it_runs_by_itself_before_weights_are_rounded(passes: list[str], expected: list[str]) -> None:
    assert names(passes) == expected


def test_where_it_does_not_apply_nothing_is_said() -> None:
    assert names(["quantize:W8A8"], model=PreNorm("raw").eval()) == ["canonicalize", "quantize"]
    assert names(["quantize:W8A8"], target="eager") == ["canonicalize", "quantize"]


def test_a_pass_that_breaks_by_itself_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pc.CenterStream, "apply", lambda *_: 1 / 0)
    with pytest.raises(pc.PassError, match="ZeroDivisionError"):
        names(["quantize:W8A8"])


def test_an_error_of_a_pass_that_was_asked_for_is_raised() -> None:
    with pytest.raises(pc.PassError, match="centred"):
        pc.compile(PreNorm("raw").eval(), ["center_stream"], example_inputs=X)


@pytest.mark.parametrize("passes", [[], ["quantize:W8A8-dynamic"]])
def test_norms_and_sums_are_one_kernel_on_onnx_runtime(passes: list[str], tmp_path) -> None:
    """Without passes too: then the program keeps its weights, and only what is lowered is centred."""
    model = rough(PreNorm())
    compiled = pc.compile(model, passes, example_inputs=X)
    compiled.export_onnx(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 and kinds.count("RMSNormalization") == 1
    assert "LayerNormalization" not in kinds
    if not passes:
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-5)
        assert torch.equal(compiled.state_dict()["norms.0.bias"], model.norms[0].bias)


def test_standard_onnx_keeps_layer_norms(tmp_path) -> None:
    """Of an opset that has no RMS norm."""
    pc.compile(rough(PreNorm()), ["quantize:W8A8"], example_inputs=X, calibration=[X], target="onnx").export_onnx(
        tmp_path / "model.onnx"
    )
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("LayerNormalization") == 3
