"""Width pruning: exact where what leaves is zero, refit against least squares, budgets, refusals, round trips."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import paretoc as pc
import pytest
import torch
import transformers as hf
from paretoc import testing
from paretoc.compiler.axes import find_axes
from paretoc.compiler.axis_kinds import axis_kinds
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.cost import cost
from paretoc.compiler.errors import CalibrationError, OptionError, PassError
from paretoc.compiler.importance import Obs
from paretoc.compiler.program import Program
from paretoc.compiler.refit import refit
from paretoc.passes import prune_width
from paretoc.passes.prune_width import PruneWidth
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Convolutions with a residual sum and a concatenation: what is read is [stem, stem + body, grown]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.down = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.grown = nn.Conv2d(8, 4, 1)
        self.read = nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = x + self.down(torch.sigmoid(self.up(x)))
        return self.read(torch.cat([x, y, self.grown(F.relu(y))], 1)).mean((2, 3))


class Grouped(nn.Module):
    """A convolution in 4 groups, then a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.grouped = nn.Conv2d(16, 24, 3, groups=4)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.read = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.depthwise(F.relu(self.grouped(F.relu(self.first(x)))))).mean((2, 3))


def llama(**options: Any) -> nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(**small, intermediate_size=48, vocab_size=50, max_position_embeddings=32, **options)
    return hf.LlamaForCausalLM(config)


X, IMAGES = torch.randn(4, 4), torch.randn(4, 3, 6, 6)
TOKENS = {"input_ids": torch.randint(0, 50, (2, 5))}
#: name → (model, example, kinds of axes that lose channels, layers that read them)
GROUPS: dict[str, tuple[Callable[[Any], nn.Module], Any, tuple[str, ...], set[str]]] = {
    "hidden and concatenated": (lambda _: Residual(), IMAGES, ("hidden",), {"up", "down", "grown", "read"}),
    "residual": (lambda _: Residual(), IMAGES, ("stream",), {"stem", "up", "down", "grown", "read"}),
    "grouped and depthwise": (lambda _: Grouped(), IMAGES, ("hidden",), {"first", "grouped", "depthwise", "read"}),
    "heads": (
        *(lambda models: models.Vit(depth=1, heads=4), torch.randn(2, 16, 12), ("heads", "head_width")),
        {"blocks.0.attention.qkv", "blocks.0.attention.out"},
    ),
    "grouped queries": (
        *(lambda _: llama(), TOKENS, ("heads", "hidden")),
        {f"model.layers.0.{n}_proj" for n in (*(f"self_attn.{n}" for n in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")},
    ),
    "tied": (
        lambda models: models.TiedLanguageModel(words=50),
        TOKENS["input_ids"],
        ("hidden",),
        {"middle", "lm_head"},
    ),
}


def program_of(model: nn.Module, example: Any) -> Program:
    program = pc.capture(model.eval(), example)
    canonicalize(program)
    return program


@cache
def _llama_program() -> Program:
    return program_of(llama(), TOKENS)


def llama_program() -> Program:
    """Captured once; the weights of a copy are its own."""
    return _llama_program().clone()


def apply(program: Program, transform: PruneWidth, batches: list[list[Tensor]] | None = None) -> Any:
    return transform.apply(program, pc.Context(target="eager", batches=batches or [program.example]))


@pytest.mark.parametrize("name", GROUPS)
def test_channels_that_are_zero_leave_without_a_trace(models: Any, name: str) -> None:
    make, example, kinds, layers = GROUPS[name]
    program = llama_program() if name == "grouped queries" else program_of(make(models), example)
    untouched = program.run(program.example)
    found = axis_kinds(find_axes(program))
    for axis in (a for a, kind in found.items() if kind in kinds and a.free("zero")):
        gone = torch.randperm(axis.size)[: axis.size // 2]
        for use in axis.uses:
            where = torch.isin(use.channels, gone).nonzero().flatten()
            program.set(use.parameter, program.get(use.parameter).detach().index_fill(use.dim, where, 0.0))
    want, before = program.run(program.example), cost(program)
    assert not torch.allclose(want[0], untouched[0], atol=1e-3), "nothing was set to zero"
    result = apply(program, PruneWidth(0.5, criterion="magnitude", refit=False, round_to=1, axes=kinds))
    torch.testing.assert_close(program.run(program.example), want, rtol=1e-5, atol=1e-5)
    assert set(result.matched) == layers
    assert cost(program).parameters < 0.8 * before.parameters


def test_refit_is_least_squares() -> None:
    x, a = torch.randn(200, 12).double() @ torch.randn(12, 12).double(), torch.randn(5, 12).double()
    kept = torch.tensor([0, 2, 3, 7, 11])
    want = torch.linalg.lstsq(x[:, kept], x @ a.T).solution.T
    got = refit(a, x.T @ x, kept, damp=0.0)
    torch.testing.assert_close(got[:, kept], want, rtol=1e-6, atol=1e-8)
    assert got.count_nonzero() == 25
    held = refit(a, x.T @ x, kept, damp=1e9)
    torch.testing.assert_close(held[:, kept], a[:, kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_refitted_to_its_own_outputs(bias: bool) -> None:
    """With the means of what leaves in the bias, where there is one."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4, bias=bias))
    batches = [torch.randn(64, 6) + 1 for _ in range(4)]
    with torch.no_grad():
        y, hidden = model(torch.cat(batches)).double(), torch.cat([model[:2](x) for x in batches]).double()
    program = program_of(model, batches[0])
    apply(program, PruneWidth(0.5, damp=0.0), [[x] for x in batches])
    kept = [int((model[0].bias == b).nonzero()) for b in program.get("0.bias")]
    left = torch.cat([hidden[:, kept], torch.ones(256, int(bias)).double()], 1)
    want = left @ torch.linalg.lstsq(left, y).solution
    got = torch.cat([program.run([x])[0] for x in batches])
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert kept == sorted(kept) and len(kept) == 8


@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_a_budget_is_met(budget: str) -> None:
    program = program_of(Residual(), IMAGES)
    before = getattr(cost(program), budget)
    apply(program, PruneWidth(**{budget: 0.8}, round_to=1))
    left = getattr(cost(program), budget) / before
    assert 0.75 < left <= 0.8


def test_a_budget_falls_where_it_hurts_least() -> None:
    """Of two layers of one size the one whose channels are copies of each other gives more."""
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    with torch.no_grad():
        model[3].weight[:], model[3].bias[:] = model[3].weight[:4].repeat(8, 1), model[3].bias[:4].repeat(8)
    program = program_of(model, torch.randn(4, 8))
    batches = [[torch.randn(64, 8)] for _ in range(2)]
    apply(program, PruneWidth(macs=0.6, round_to=1, targets=("0", "3")), batches)
    assert len(program.get("3.bias")) < 8 < 24 < len(program.get("0.bias"))


def test_a_latency_is_met(monkeypatch: Any, refused: Any) -> None:
    """On a clock that counts multiply–accumulates: what the search and the report see is what is left at the end."""
    timed: list[float] = []

    class Clock:
        def __init__(self, program: Program, *_: Any) -> None:
            self.whole = cost(program).macs

        def __call__(self, form: Program) -> float:
            timed.append(cost(form).macs / self.whole)
            return timed[-1]

    monkeypatch.setattr(prune_width, "Clock", Clock)
    program = program_of(Residual(), IMAGES)
    before = cost(program).macs
    short = PruneWidth(latency=0.1, criterion=Obs(), round_to=1)
    refused(OptionError, "0.1 of the latency cannot be reached: 0.", lambda: apply(program, short))
    timed.clear()
    result = apply(program, PruneWidth(latency=0.8, criterion=Obs(), round_to=1))
    left = cost(program).macs / before
    assert 0.76 < left <= 0.8 and len(timed) <= 6
    assert result.metrics["latency"] == result.metrics["macs"] == pytest.approx(left)


def test_a_budget_that_cannot_be_met_says_what_can(refused: Any) -> None:
    program = program_of(Residual(), IMAGES)
    transform = PruneWidth(macs=0.1, criterion="magnitude", refit=False, round_to=1)
    error = refused(OptionError, "0.1 of the macs cannot be reached: 0.", lambda: apply(program, transform))
    least = float(error.what.split()[-4])
    apply(program, PruneWidth(macs=least * 1.001, criterion="magnitude", refit=False, round_to=1))
    assert program.get("up.weight").shape == (1, 8, 3, 3)


def test_widths_are_multiples() -> None:
    program = program_of(nn.Sequential(nn.Linear(4, 44), nn.ReLU(), nn.Linear(44, 20), nn.ReLU(), nn.Linear(20, 3)), X)
    apply(program, PruneWidth(0.5, criterion="magnitude", refit=False))  # the targets' default is 8
    assert [len(program.get(f"{i}.bias")) for i in (0, 2)] == [24, 8]
    program = llama_program()
    apply(program, PruneWidth(0.6, criterion="magnitude", refit=False))
    # a key of width 8 with its two queries is a step by itself
    assert program.get("model.layers.0.self_attn.q_proj.weight").shape == (16, 32)
    assert program.get("model.layers.0.self_attn.k_proj.weight").shape == (8, 32)
    assert program.get("model.layers.0.mlp.down_proj.weight").shape == (32, 32)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prune_width", "nothing says how much is to go"),
        ("prune_width:0.5,macs=0.5", "ratio and macs says how much is to go"),
        ("prune_width:1.5", "ratio=1.5 is not valid"),
        ("prune_width:0.5,axes=neurons", "axes=('neurons',) is not valid"),
        ("prune_width:0.5,round_to=0", "round_to=0 is not valid"),
        ("prune_width:0.5,criterion=hesian", "there is no criterion called 'hesian'"),
    ],
)
def test_options_are_checked(refused: Any, text: str, sentence: str) -> None:
    refused(OptionError, sentence, lambda: pc.compile(nn.Linear(2, 2), [text]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"targets": "1", "axes": "stream"}, "1.weight.0 of 3 channels: it is an output of the model"),
        (
            {"targets": "0", "axes": "heads"},
            "0.weight.0 of 44 channels is of the kind 'hidden', which axes= leaves out",
        ),
        ({"round_to": 64}, "0.weight.0 of 44 channels has no 64 channels besides those that leave"),
    ],
)
def test_what_may_not_leave_is_said(refused: Any, options: Any, sentence: str) -> None:
    program = program_of(nn.Sequential(nn.Linear(4, 44), nn.Linear(44, 3)), X)
    transform = PruneWidth(0.5, criterion="magnitude", refit=False, **options)
    before = {name: value.shape for name, value in program.weights().items()}
    error = refused(PassError, sentence, lambda: apply(program, transform))
    assert "paretoc axes MODEL" in error.fix
    assert {name: value.shape for name, value in program.weights().items()} == before


def test_heads_that_are_rotated_keep_their_width(refused: Any) -> None:
    program = llama_program()
    transform = PruneWidth(0.5, criterion="magnitude", refit=False, axes="head_width", targets="*.q_proj")
    refused(PassError, "is a constant of the model, outside its weights", lambda: apply(program, transform))


def test_data_are_asked_for_where_they_are_needed(refused: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    refused(
        CalibrationError, "needs calibration data", lambda: pc.compile(model, ["prune_width:0.5"], example_inputs=X)
    )
    compiled = pc.compile(model, ["prune_width:0.5,criterion=magnitude,refit=false"], example_inputs=X, target="eager")
    assert compiled.state_dict()["0.weight"].shape == (8, 4)


def test_a_trained_net_keeps_more_with_refit_than_without_and_at_random() -> None:
    """Mean over three nets that have learned a smooth function."""
    x = torch.linspace(-3, 3, 256)[:, None] @ torch.ones(1, 2) + 0.3 * torch.randn(256, 2)
    y = torch.stack([x[:, 0].sin() * x[:, 1], (x.sum(1)).cos()], 1)
    errors: dict[str, float] = {}
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        program = program_of(model, x)
        for name, criterion, fitted in (
            *(("refit", "hessian", True), ("none", "hessian", False)),
            *(("random refit", f"random(seed={seed})", True), ("random", f"random(seed={seed})", False)),
        ):
            narrow = program.clone()
            apply(narrow, PruneWidth(0.5, criterion=criterion, refit=fitted), [[x]])
            errors[name] = errors.get(name, 0.0) + float(F.mse_loss(narrow.run([x])[0], model(x).detach()))
    assert errors["refit"] < 0.5 * min(errors["none"], errors["random refit"])
    assert errors["none"] < errors["random"] and errors["random refit"] < errors["random"]


def test_a_pruned_model_is_saved_exported_and_the_same_each_time(tmp_path: Any) -> None:
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    one, two = Residual().eval(), Residual().eval()
    two.load_state_dict(one.state_dict())
    compiled, again = (
        pc.compile(model, ["prune_width:macs=0.7,round_to=2"], calibration=batches) for model in (one, two)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(compiled.state_dict().values(), again.state_dict().values(), strict=True)
    )
    compiled.save(tmp_path / "saved")
    torch.testing.assert_close(pc.load(tmp_path / "saved")(IMAGES), compiled(IMAGES), rtol=0, atol=0)
    compiled.export_onnx(tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    np.testing.assert_allclose(got, compiled.program(IMAGES).numpy(), rtol=1e-4, atol=1e-5)


def test_the_pruned_module_trains_and_is_compiled_again() -> None:
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    compiled = pc.compile(Residual().eval(), ["prune_width:0.5,round_to=2"], calibration=batches, target="eager")
    net = compiled.module()
    torch.testing.assert_close(net(IMAGES), compiled(IMAGES))
    assert {n: p.shape for n, p in net.named_parameters()} == {n: t.shape for n, t in compiled.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(IMAGES), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = pc.compile(net, [], example_inputs=IMAGES, target="eager")
    torch.testing.assert_close(trained(IMAGES), net(IMAGES).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(compiled.state_dict()["up.weight"], net.state_dict()["up.weight"])  # it has its own


BERT = hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50)


@pytest.mark.parametrize(
    ("make", "recipe", "fields"),
    [
        (llama, "prune_width:0.5,axes=[hidden,heads]", (24, 2, 1)),
        (lambda: hf.BertForMaskedLM(BERT), "prune_width:0.5,targets=*.intermediate.dense", (32, 4, None)),
    ],
)
def test_weights_return_to_transformers(make: Any, recipe: str, fields: Any) -> None:
    model = make().eval()
    compiled = pc.compile(model, [recipe], calibration=[TOKENS], target="eager")
    small = pc.rebuild(model, compiled.state_dict())
    torch.testing.assert_close(small(**TOKENS).logits, compiled(**TOKENS).logits, rtol=1e-5, atol=1e-5)
    config = small.config
    got = (config.intermediate_size, config.num_attention_heads, getattr(config, "num_key_value_heads", None))
    assert got == fields and model.config.intermediate_size == 2 * got[0]


def test_what_a_config_cannot_say_is_refused(refused: Any) -> None:
    model = hf.BertForMaskedLM(BERT).eval()
    state = dict(model.state_dict())
    heads = {n: v[: len(v) // 2] for n, v in state.items() if ".query." in n}
    refused(PassError, "BertConfig has no head_dim", lambda: pc.rebuild(model, state | heads))
    refused(PassError, "'folded' of the program", lambda: pc.rebuild(model, state | {"folded": torch.ones(1)}))


def test_conformance() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    testing.check_pass(PruneWidth(0.5), model, X)
