"""Depth pruning: a block that does nothing is found and leaves no trace, criteria, budgets, refusals, round trips."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import paretoc as pc
import pytest
import torch
import transformers as hf
from paretoc import testing
from paretoc.compiler.calibrate import gather
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.cost import cost
from paretoc.compiler.errors import CalibrationError, OptionError, PassError
from paretoc.compiler.program import Program
from paretoc.compiler.residuals import Influence, residual_blocks, without
from paretoc.compiler.sensitivity import relative_error
from paretoc.passes.prune_depth import PruneDepth
from torch import Tensor, nn
from torch.nn import functional as F

LLAMA = hf.LlamaConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=50, max_position_embeddings=32,
)  # fmt: skip
TOKENS = {"input_ids": torch.randint(0, 50, (2, 5))}
#: name → the weights that make the branches of layer 1 zero, with the last paths of both, and the layer
PLANTED = {
    "llama": (("self_attn.o_proj.weight", "mlp.down_proj.weight"), "model.layers.1"),
    "bert": (("attention.output.dense.weight", "output.dense.weight"), "bert.encoder.layer.1"),
    "vit": (("attention.out.weight", "mlp.down.weight"), "blocks.1"),
}


class Convolutions(nn.Module):
    """Two residual blocks between which the image shrinks: a convolution stands beside the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.body, self.beside = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = F.relu(self.body(x) + self.beside(x))
        return self.head(x.mean((2, 3)))


def program_of(model: nn.Module, example: Any) -> Program:
    program = pc.capture(model.eval(), example)
    canonicalize(program)
    return program


@pytest.fixture(scope="module")
def whole(models: Any) -> dict[str, tuple[nn.Module, Program]]:
    torch.manual_seed(0)
    made = {
        "llama": (hf.LlamaForCausalLM(LLAMA), TOKENS),
        "bert": (models.hugging_face("BertForMaskedLM", num_hidden_layers=3), models.sentences()),
        "vit": (models.Vit(), torch.randn(4, 16, 12)),
    }
    return {name: (model, program_of(model, example)) for name, (model, example) in made.items()}


def planted(whole: Any, name: str, branches: tuple[int, ...] = (0, 1)) -> Program:
    """A copy in which branches of layer 1 add nothing."""
    program = whole[name][1].clone()
    weights, layer = PLANTED[name]
    for branch in branches:
        for kind in ("weight", "bias"):
            zero = f"{layer}.{weights[branch].removesuffix('weight')}{kind}"
            if zero in program.weights():
                program.set(zero, torch.zeros_like(program.get(zero)))
    return program


def apply(program: Program, *options: Any, **named: Any) -> pc.PassResult:
    return PruneDepth(*options, **named).apply(program, pc.Context(target="eager", batches=[program.example]))


@pytest.mark.parametrize("criterion", ["influence", "error"])
@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("name", PLANTED)
def test_a_branch_that_adds_nothing_leaves_without_a_trace(whole: Any, name: str, branch: int, criterion: str) -> None:
    program = planted(whole, name, (branch,))
    want, before = program.run(program.example), cost(program)
    (weights, layer), names = PLANTED[name], set(program.weights())
    result = apply(program, 1, unit="branch", criterion=criterion)
    assert f"{layer}.{weights[branch]}" in {f"{path}.weight" for path in result.matched}
    assert f"{layer}.{weights[1 - branch]}" in program.weights()
    left = {name.rpartition(".")[0] for name in names - set(program.weights())}
    assert {path for path in left if "norm" not in path} == set(result.matched)
    assert cost(program).macs < before.macs and cost(program).parameters < before.parameters
    torch.testing.assert_close(program.run(program.example), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_layer_that_adds_nothing_leaves_without_a_trace(whole: Any, name: str) -> None:
    """Of a post-norm model its norms leave too: exact only where they change nothing."""
    program = planted(whole, name)
    want = program.run(program.example)
    result = apply(program, 1)
    assert result.matched and all(path.startswith(PLANTED[name][1]) for path in result.matched)
    assert not any(weight.startswith(f"{PLANTED[name][1]}.") for weight in program.weights())
    torch.testing.assert_close(program.run(program.example), want, rtol=1e-5, atol=1e-5)


def test_the_norms_of_a_post_norm_layer_leave_with_it(whole: Any) -> None:
    """What is left is the model that was built with fewer layers."""
    model, program = whole["bert"][0], whole["bert"][1].clone()
    apply(program, targets="*.layer.1.*")
    small = hf.BertForMaskedLM(hf.BertConfig(**{**model.config.to_dict(), "num_hidden_layers": 2})).eval()
    state = {n: v for n, v in model.state_dict().items() if ".layer.1." not in n}
    small.load_state_dict({n.replace(".layer.2.", ".layer.1."): v for n, v in state.items()})
    want = small(input_ids=program.example[0], attention_mask=program.example[1]).logits.detach()
    torch.testing.assert_close(program.run(program.example)[0], want, rtol=1e-5, atol=1e-5)


def test_influence_is_that_of_the_paper(whole: Any) -> None:
    """1 − cos between what goes into a layer and what comes out, from the hidden states of the model itself."""
    model, program = whole["llama"][0], whole["llama"][1].clone()
    states = model.model(**TOKENS, output_hidden_states=True).hidden_states
    # the last of them has passed the final norm, which the block has not
    ends = [*states[:3], model.model.layers[2](states[2], position_embeddings=_angles(model, states[2]))]
    influence = [float(1 - F.cosine_similarity(a, b, dim=-1).detach().mean()) for a, b in pairwise(ends)]
    wanted = [Influence(b.source.name, b.result.name) for b in residual_blocks(program, "layer")[0]]
    halves = [[ids] for ids in program.example[0].split(1)]
    found = gather(program, wanted, halves)
    assert [found[need] for need in wanted] == pytest.approx(influence, rel=1e-4)
    first, second, _ = sorted(range(3), key=influence.__getitem__)
    gone = [path.split(".")[2] for path in apply(program, 2).matched]
    assert list(dict.fromkeys(gone)) == [str(first), str(second)]


def _angles(model: Any, x: Tensor) -> Any:
    return model.model.rotary_emb(x, torch.arange(x.shape[1])[None])


def test_error_is_measured_anew_after_each_block(whole: Any) -> None:
    """Against a search that tries every one each time."""
    program = whole["vit"][1].clone()
    blocks, _ = residual_blocks(program, "branch")
    gone: list[Any] = []
    for _ in range(3):
        left = [block for block in blocks if block not in gone]
        gone.append(min(left, key=lambda b: relative_error(program, without(program, [*gone, b]), [program.example])))
    result = apply(program, 3, unit="branch", criterion="error")
    assert result.matched == [path for block in gone for path in block.paths]


def test_under_a_budget_a_block_is_charged_what_it_adds_for_what_it_saves(whole: Any, monkeypatch: Any) -> None:
    """Errors that add up, of blocks with a known price for each unit of cost."""
    program = whole["vit"][1].clone()
    blocks, _ = residual_blocks(program, "branch")
    prices = dict(zip([block.path for block in blocks], (0.9, 1.0, 1.2, 4.0, 5.0, 6.0), strict=True))
    losses = {block.path: prices[block.path] * saved for block, saved in zip(blocks, _costs(program), strict=True)}

    def error(_: Program, trial: Program, __: Any) -> float:
        read = {str(node.target) for node in trial.graph.nodes if node.op == "get_attr"}
        return float(sum(loss for path, loss in losses.items() if f"{path}.weight" not in read) ** 0.5)

    monkeypatch.setattr("paretoc.passes.prune_depth.relative_error", error)
    result = apply(program, macs=0.6, unit="branch", criterion="error")
    assert [path for path in result.matched if path in prices] == sorted(prices, key=prices.__getitem__)[:3]


@pytest.mark.parametrize("unit", ["branch", "layer"])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_a_budget_is_met(whole: Any, budget: str, unit: str) -> None:
    program = whole["vit"][1].clone()
    before = getattr(cost(program), budget)
    result = apply(program, **{budget: 0.8}, unit=unit)
    left = getattr(cost(program), budget) / before
    assert 0.5 < left <= 0.8
    assert result.metrics[budget] == pytest.approx(left, rel=1e-3)


def test_a_budget_that_cannot_be_met_says_what_can(whole: Any, refused: Any) -> None:
    program = whole["vit"][1].clone()
    whole_macs = cost(program).macs
    error = refused(OptionError, "0.01 of the macs cannot be reached: 0.", lambda: apply(program, macs=0.01))
    least = float(error.what.split()[-4])
    assert cost(program).macs == whole_macs
    result = apply(program, macs=least * 1.01)
    assert result.metrics["blocks"] == 3 and cost(program).macs / whole_macs == pytest.approx(least, rel=0.01)


def test_a_latency_is_met(whole: Any, refused: Any, monkeypatch: Any) -> None:
    """On a clock that counts multiply–accumulates and a part that never leaves."""
    program = whole["llama"][1].clone()
    macs, timed = cost(program).macs, []

    class Clock:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, form: Program) -> float:
            timed.append(0.2 + 0.8 * cost(form).macs / macs)
            return timed[-1]

    monkeypatch.setattr("paretoc.passes.prune_depth.Clock", Clock)
    refused(OptionError, "0.2 of the latency cannot be reached: 0.", lambda: apply(program, latency=0.2, unit="branch"))
    timed.clear()
    result = apply(program, latency=0.75, unit="branch")
    assert len(timed) <= 6 and result.metrics["latency"] in timed
    assert result.metrics["latency"] == pytest.approx(0.2 + 0.8 * result.metrics["macs"])
    assert result.metrics["macs"] == pytest.approx(cost(program).macs / macs)
    one_more = 0.8 * max(b / macs for b in _costs(whole["llama"][1]))
    assert 0.75 - one_more < result.metrics["latency"] <= 0.75


def _costs(program: Program) -> list[int]:
    blocks, _ = residual_blocks(program, "branch")
    return [cost(program).macs - cost(without(program, [block])).macs for block in blocks]


def test_a_block_that_changes_the_shape_is_refused(refused: Any) -> None:
    program = program_of(Convolutions(), torch.randn(2, 3, 8, 8))
    result = apply(program, 1, unit="branch")
    assert result.matched == ["first", "second"]
    assert result.skipped == {"beside": "what goes in stands on neither side of its sum"}
    assert {"body.weight", "beside.weight"} < set(program.weights())
    refused(PassError, "no branch may leave: beside: what goes in", lambda: apply(program, 1, unit="branch"))
    refused(
        PassError,
        "second: it is in no numbered list",
        lambda: apply(program_of(Convolutions(), torch.randn(2, 3, 8, 8)), 1),
    )


def test_a_value_that_is_read_elsewhere_keeps_its_block(refused: Any) -> None:
    """Keys and values that are outputs: the cache of a language model."""

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(2))
            self.stem = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            seen = self.layers[0][0](x)
            x = x + self.layers[0][2](F.gelu(seen))
            return x + self.layers[1](x), seen

    program = program_of(Watched(), torch.randn(3, 4))
    result = apply(program, 1, unit="branch")
    assert result.matched == ["layers.1.0", "layers.1.2"]
    assert "read by node output" in result.skipped["layers.0.2"]
    refused(PassError, "layers.0.2: what it computes inside is read by", lambda: apply(program, 1, unit="branch"))


def test_an_input_that_only_a_block_reads_stays_an_input() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            x = self.stem(x)
            return self.out(x + self.up(x) * gate)

    model, call = Gated(), (torch.randn(3, 4), torch.randn(3, 4))
    compiled = pc.compile(model.eval(), ["prune_depth:targets=up,unit=branch"], example_inputs=call)
    want = model.out(model.stem(call[0])).detach()
    torch.testing.assert_close(compiled(*call), want, rtol=1e-5, atol=1e-5)


def test_a_decoder_with_its_cache_keeps_its_attention(refused: Any) -> None:
    """Keys and values are outputs; sums of sizes, and of the two halves of a rotation, are no blocks."""
    decoder = pc.CausalLM(hf.LlamaForCausalLM(LLAMA).eval())
    compiled = pc.compile(decoder, [], target="eager", verify=False)
    refusals = residual_blocks(compiled.program, "branch")[1]
    assert set(refusals) == {f"model.layers.{i}.self_attn.o_proj" for i in range(3)}
    refused(PassError, "o_proj: what it computes inside is read by node output", lambda: apply(compiled.program, 1))


@pytest.mark.parametrize("read", ["between", "beside"])
def test_a_layer_of_which_a_part_is_read_elsewhere_is_refused(read: str) -> None:
    """What stands between its branches is an output, or a layer of it runs for something else too."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            x = x + torch.tanh(self.a(x))
            other = other + x if read == "between" else self.b(other).exp()
            return x + torch.tanh(self.b(x)), other.mean(0, keepdim=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layers = nn.Linear(4, 4), nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x, other = self.stem(x), self.stem(x).mean(0, keepdim=True)
            for layer in self.layers:
                x, other = layer(x, other)
            return x, other

    program = program_of(Net(), torch.randn(3, 4))
    blocks, refused = residual_blocks(program, "layer")
    reason = "what it computes inside is read by" if read == "between" else "b is not between its input and its output"
    assert not blocks and all(reason in refused[f"layers.{i}"] for i in range(2)), refused
    assert {block.path for block in residual_blocks(program, "branch")[0]} >= {"layers.0.a", "layers.1.a"}


def test_shared_layers_are_no_layers_but_branches(models: Any) -> None:
    config = {"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    albert = hf.AlbertModel(hf.AlbertConfig(**config, intermediate_size=48, vocab_size=50), add_pooling_layer=False)
    program = program_of(albert, models.sentences(mask=False))
    blocks, refused = residual_blocks(program, "layer")
    assert not blocks and set(refused.values()) == {"it runs several times"}
    assert len(residual_blocks(program, "branch")[0]) == 6


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prune_depth", "nothing says how much is to go"),
        ("prune_depth:1,macs=0.5", "blocks and macs says how much is to go"),
        ("prune_depth:0", "blocks=0 is not valid"),
        ("prune_depth:latency=1.5", "latency=1.5 is not valid"),
        ("prune_depth:1,criterion=hessian", "criterion='hessian' is not valid"),
        ("prune_depth:1,unit=head", "unit='head' is not valid"),
    ],
)
def test_options_are_checked(refused: Any, text: str, sentence: str) -> None:
    refused(OptionError, sentence, lambda: pc.compile(nn.Linear(2, 2), [text]))


def test_more_blocks_than_there_are(whole: Any, refused: Any) -> None:
    refused(OptionError, "blocks=4 cannot leave: 3 may", lambda: apply(whole["vit"][1].clone(), 4))
    refused(
        OptionError, "blocks=2 cannot leave: 1 may", lambda: apply(whole["vit"][1].clone(), 2, targets="blocks.0.*")
    )
    left = apply(whole["vit"][1].clone(), 2, ignore="*.1.mlp.*").matched
    assert not any(path.startswith("blocks.1.") for path in left)


def test_blocks_by_name_need_no_data(models: Any, refused: Any) -> None:
    model, x = models.Vit(), torch.randn(2, 16, 12)
    refused(CalibrationError, "needs calibration data", lambda: pc.compile(model, ["prune_depth:1"], example_inputs=x))
    by_name = "prune_depth:targets=*.attention.*,unit=branch,ignore=blocks.0.*"
    compiled = pc.compile(model.eval(), [by_name], example_inputs=x, target="eager")
    assert {name.split(".")[1] for name in compiled.state_dict() if ".attention." in name} == {"0"}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_weights_return_to_transformers(whole: Any, models: Any, name: str) -> None:
    model = whole[name][0]
    call = TOKENS if name == "llama" else models.sentences()
    compiled = pc.compile(model, ["prune_depth:targets=re:layers?.1."], example_inputs=call, target="eager")
    small = pc.rebuild(model, compiled.state_dict())
    assert small.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 3
    torch.testing.assert_close(small(**call).logits, compiled(**call).logits, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_layer_is_no_config(whole: Any, refused: Any) -> None:
    model = whole["bert"][0]
    program = whole["bert"][1].clone()
    apply(program, targets="*.layer.1.attention.*", unit="branch")
    refused(PassError, "left, and not the whole of its layer", lambda: pc.rebuild(model, program.state_dict()))


def test_a_layer_in_only_one_of_two_stacks_is_no_config(refused: Any) -> None:
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=30, decoder_start_token_id=0)
    )
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("encoder.block.1.")}
    refused(PassError, "T5Config does not say that", lambda: pc.rebuild(model, state))


def test_a_pruned_model_is_saved_and_runs_on_onnxruntime(models: Any, tmp_path: Any) -> None:
    x = torch.randn(2, 16, 12)
    compiled = pc.compile(models.Vit().eval(), ["prune_depth:1"], calibration=[x, torch.randn(2, 16, 12)])
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=1e-4, atol=1e-5)
    compiled.save(tmp_path / "saved")
    torch.testing.assert_close(pc.load(tmp_path / "saved")(x), compiled(x), rtol=0, atol=0)


def test_conformance(models: Any) -> None:
    testing.check_pass(PruneDepth(1), models.Vit(), torch.randn(2, 16, 12))
