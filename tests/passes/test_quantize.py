"""Quantisation: each scheme equals a model with fake-quantised weights and inputs; what is chosen and refused."""

from __future__ import annotations

import copy

import paretoc as pc
import pytest
import torch
from paretoc.compiler.attention import operand_places
from paretoc.compiler.encodings import Affine
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.passes import Context
from paretoc.compiler.sites import attention_sites, weight_sites
from paretoc.compiler.statistics import Histogram, Statistic, WeightedHistogram
from paretoc.passes import Quantize
from paretoc.passes.fit import Mse, Rtn
from paretoc.passes.ranges import parse_range
from torch import Tensor, nn

ops = torch.ops.paretoc
X = torch.randn(6, 16)
IDS = torch.randint(0, 48, (2, 5))


def _decoded(weight: Tensor, encoding: Affine, fitter=None) -> Tensor:
    """What is left of a weight, straight from the encoding."""
    shape = tuple(weight.shape)
    return encoding.decode((fitter or Mse()).fit(encoding, weight.detach()), shape)


def _replaced(model: nn.Module, encoding: Affine, fitter=None) -> nn.Module:
    """The model with every weight matrix replaced by its decoded self."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data = _decoded(module.weight, encoding, fitter)
    return twin


def static_quantisers(compiled, source: str) -> list[torch.fx.Node]:
    """The static quantisers of one activation."""
    return [n for n in compiled.program.calls(ops.fake_quantize.default) if n.args[0].name == source]


def gather_one(statistic: Statistic, batches: list[Tensor], *weights: Tensor):
    state = statistic.start()
    for batch in batches:
        state = statistic.update(state, batch, *weights)
    return statistic.finish(state)


def _encodings(compiled) -> dict[str, str]:
    program = compiled.program
    return {s.path: str(program.encoding(s.weight)) for s in weight_sites(program) if s.kind != "norm"}


# -- weights ---------------------------------------------------------------------------------------------

WEIGHT_ONLY = {
    "quantize:W8A16": (Affine(8), Mse()),
    "quantize:W8A16,fitter=rtn,symmetric=false": (Affine(8, 0, False), Rtn()),
    "quantize:W4A16": (Affine(4, 32), Mse()),
    "quantize:W4A16,group_size=64,fitter=rtn": (Affine(4, 64), Rtn()),
    "quantize:W4A16,symmetric=false": (Affine(4, 32, False), Mse()),
}


@pytest.mark.parametrize("text", WEIGHT_ONLY)
def test_weights_are_those_of_the_encoding(models, reference, text):
    encoding, fitter = WEIGHT_ONLY[text]
    model = models.Mlp(64, 128, 64)
    x = torch.randn(5, 64)
    compiled = reference(model, [text], x)
    assert set(_encodings(compiled).values()) == {str(encoding)}
    twin = _replaced(model, encoding, fitter)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_convolutions_are_quantised_per_channel(models, reference):
    model = models.Cnn().eval()
    x = torch.randn(3, 4, 8, 8)
    compiled = reference(model, ["quantize:W8A16,fitter=rtn"], x)
    assert list(_encodings(compiled)) == ["stem", "depthwise", "head"]
    program = reference(model, [], x).program  # the batch norms are folded before the weights are rounded
    for before, after in zip(weight_sites(program), weight_sites(compiled.program), strict=True):
        want = _decoded(program.weight_value(before.weight), Affine(8), Rtn())
        assert torch.equal(compiled.program.weight_value(after.weight), want)


def test_the_bytes_are_those_of_the_codes(models, reference):
    compiled = reference(models.Mlp(64, 128, 64), ["quantize:W4A16"], torch.randn(2, 64))
    stored = compiled.program.weights()
    assert stored["up.weight.codes"].shape == (128, 32)
    assert stored["up.weight.scale"].shape == (128, 2)
    expected = 2 * (64 * 128 // 2 + 64 * 128 // 32 * 4) + 4 * (128 + 64)
    assert compiled.report(latency=False).compiled.bytes == expected


# -- activations -----------------------------------------------------------------------------------------


class Manual(nn.Module):
    """An Mlp whose inputs to each linear go through a function."""

    def __init__(self, mlp: nn.Module, *inputs) -> None:
        super().__init__()
        self.mlp, self.inputs = mlp, inputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.mlp.up(self.inputs[0](x)))
        return self.mlp.down(self.inputs[1](hidden))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_dynamic_activations(models, reference, granularity):
    model = models.Mlp()
    compiled = reference(model, [f"quantize:W8A8-dynamic,granularity={granularity}"], X)
    twin = Manual(_replaced(model, Affine(8)), *[lambda t: ops.fake_quantize_dynamic(t, granularity)] * 2)
    x = torch.randn(3, 16)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-6)
    kinds = [n.args[1] for n in compiled.program.calls(ops.fake_quantize_dynamic.default)]
    assert kinds == [granularity] * 2


def test_static_activations_use_the_calibrated_range(models, reference):
    model = models.Mlp()
    data = [torch.randn(4, 16), torch.randn(4, 16) * 2]
    compiled = reference(model, ["quantize:W8A8,range=minmax"], X, calibration=data)
    replaced = _replaced(model, Affine(8))
    everything = torch.cat(data)
    hidden = torch.nn.functional.gelu(model.up(everything))  # ranges come from the model before quantisation

    def static(values: Tensor):
        low, high = float(values.min().clamp(max=0)), float(values.max().clamp(min=0))
        scale = torch.tensor((high - low) / 255)
        zero = torch.tensor(round(-low / float(scale))).byte()
        return lambda t: ops.fake_quantize(t, scale, zero)

    twin = Manual(replaced, static(everything), static(hidden.detach()))
    x = torch.randn(3, 16) * 3  # beyond the range: clipped
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    nodes = compiled.program.calls(ops.fake_quantize.default)
    assert [compiled.program.get(n.args[2].target).dtype for n in nodes] == [torch.uint8] * 2


def test_positive_activations_use_all_codes(reference):
    model = nn.Sequential(nn.Linear(16, 8))
    data = X.abs() + 1
    compiled = reference(model, ["quantize:W8A8,range=minmax"], X, calibration=[data])
    (node,) = compiled.program.calls(ops.fake_quantize.default)
    scale, zero = (compiled.program.get(a.target) for a in node.args[1:])
    assert int(zero) == 0
    assert float(scale) == pytest.approx(float(data.max()) / 255)  # zero is in the range, so that it is exact


def test_constant_zero_activations_do_not_divide_by_zero(reference):
    compiled = reference(nn.Sequential(nn.Linear(16, 8)), ["quantize:W8A8"], X, calibration=[torch.zeros(2, 16)])
    assert torch.isfinite(compiled(X)).all()


def test_one_quantiser_serves_every_reader_of_an_activation(captured):
    _, program = captured("BertForSequenceClassification", num_hidden_layers=1)
    Quantize(scheme="W8A8-dynamic").apply(program, Context())
    quantisers = program.calls(ops.fake_quantize_dynamic.default)
    linears = [s for s in weight_sites(program) if s.kind == "linear"]
    assert len(linears) == 8  # q, k, v, attention out, up, down, pooler, classifier
    assert len(quantisers) == 6
    assert max(len(q.users) for q in quantisers) == 3
    assert {s.input for s in linears} == set(quantisers)


def test_weight_only_schemes_leave_activations_alone(models, reference):
    compiled = reference(models.Mlp(), ["quantize:W8A16"], X)
    assert compiled.program.calls(ops.fake_quantize.default, ops.fake_quantize_dynamic.default) == []


def test_ranges_come_from_the_histogram_that_calibration_gathers(models, reference):
    data = [torch.randn(64, 16) * torch.where(torch.rand(64, 1) < 0.02, 10.0, 1.0) for _ in range(3)]
    scales, model = {}, models.Mlp()
    with torch.no_grad():
        model.up.weight[:, :8] *= 3
    for text in ("minmax", "mse", "entropy", "percentile(99)"):
        compiled = reference(model, [f"quantize:W8A8,range={text}"], X, calibration=data)
        found = gather_one(Histogram("x"), data)
        if text == "mse":  # it counts errors as `up` sees them
            found = gather_one(WeightedHistogram("x", weights=("w",)), data, model.up.weight)
        low, high = parse_range(text)(*found)
        (scales[text],) = {float(compiled.program.get(n.args[1].target)) for n in static_quantisers(compiled, "x")}
        assert scales[text] == pytest.approx(float(high - low) / 255)
    assert scales["percentile(99)"] < 0.9 * scales["minmax"]
    default = reference(model, ["quantize:W8A8"], X, calibration=data)
    assert float(default.program.get(static_quantisers(default, "x")[0].args[1].target)) == scales["mse"]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_range_covers_the_channels_that_count(reference, kind):
    """Channel 2 is twenty times as wide: clipped when its weights are small, covered when they are not."""
    x = torch.randn(64, 8, 6, 6)
    x[:, 2] *= 20
    x = x if kind == "conv" else x.movedim(1, -1).reshape(-1, 8)
    model = nn.Sequential(nn.Conv2d(8, 4, 3) if kind == "conv" else nn.Linear(8, 4))
    weight, scales = model[0].weight, []
    original = weight.detach().clone()
    for factor in (1e-3, 1.0):
        with torch.no_grad():
            weight[:, 2] = factor * original[:, 2]
        compiled = reference(model, ["quantize:W8A8"], x, calibration=[x])
        (quantiser,) = compiled.program.calls(ops.fake_quantize.default)
        scales.append(float(compiled.program.get(quantiser.args[1].target)))
    assert scales[0] < 0.5 * scales[1]


def test_two_passes_may_read_one_activation_under_two_ranges(models):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    data = [torch.randn(64, 16) * torch.where(torch.rand(64, 1) < 0.02, 10.0, 1.0)]
    passes = ["quantize:W8A8,range=minmax,targets=left", "quantize:W8A8,range=percentile(95),targets=right"]
    model, x = Two().eval(), data[0]
    eager, compiled = (pc.compile(model, passes, example_inputs=x, calibration=data, target=t) for t in TARGETS)
    assert len({float(eager.program.get(n.args[1].target)) for n in static_quantisers(eager, "x")}) == 2
    for got, want, exact in zip(compiled(x), eager(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(want, exact, rtol=1e-3, atol=1e-3)


def test_a_convolution_knows_no_tokens(models, reference):
    compiled = reference(models.Cnn().eval(), ["quantize:W4A8,group_size=8"], torch.randn(2, 4, 8, 8))
    kinds = {n.args[0].name: n.args[1] for n in compiled.program.calls(ops.fake_quantize_dynamic.default)}
    assert list(kinds.values()) == ["tensor", "tensor", "group8"]
    stored = {"stem": Affine(4), "depthwise": Affine(4), "head": Affine(4, 8)}
    assert _encodings(compiled) == {path: str(encoding) for path, encoding in stored.items()}


def test_groups_of_activations_are_those_of_the_weights(reference):
    layer, x = nn.Sequential(nn.Linear(64, 16)).eval(), torch.randn(3, 64)
    with pytest.raises(pc.OptionError, match="needs weights in groups"):
        pc.Quantize("W8A8-dynamic", granularity="group")
    for call, groups in (("W4A8", 32), ("W4A8,group_size=16", 16)):
        (node,) = reference(layer, [f"quantize:{call}"], x).program.calls(ops.fake_quantize_dynamic.default)
        assert node.args[1] == f"group{groups}"


# -- attention -------------------------------------------------------------------------------------------

TARGETS = ("eager", "onnxruntime")
UNIT = (torch.tensor(1 / 255), torch.tensor(0).byte())


def rounded_attention(layer: nn.Module, x: Tensor, rounding) -> Tensor:
    """`models.Attention` by hand; `rounding` names what it is given."""
    B, T, C = x.shape
    heads = layer.qkv(rounding("x", x)).reshape(B, T, 3, layer.heads, C // layer.heads).permute(2, 0, 3, 1, 4)
    q, k, v = (rounding(name, value) for name, value in zip("qkv", heads, strict=True))
    p = rounding("p", (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
    return layer.out(rounding("o", (p @ v).transpose(1, 2).reshape(B, T, C)))


@pytest.mark.parametrize(("attention", "rounded"), [("true", "qkvp"), ("scores", "qk")])
@pytest.mark.parametrize("scheme", ["W8A8,range=minmax", "W8A8-dynamic", "W8A8-dynamic,granularity=token"])
def test_what_an_attention_multiplies_is_rounded(models, reference, scheme, attention, rounded):
    """Of scores alone in a static range that is symmetric about zero."""
    model = models.Attention(16, 2)
    data = [torch.randn(2, 7, 16) for _ in range(2)]
    compiled = reference(model, [f"quantize:{scheme},attention={attention}"], data[0], calibration=data)
    seen: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        return value

    def rounding(name: str, value: Tensor) -> Tensor:
        if name in "qkvp" and name not in rounded:
            return value
        if name == "p" and "token" in scheme:
            return ops.fake_quantize(value, *UNIT)
        if "dynamic" in scheme:
            return ops.fake_quantize_dynamic(value, "token" if "token" in scheme else "tensor")
        low, high = min(0.0, float(seen[name].min())), max(0.0, float(seen[name].max()))
        if attention == "scores" and name in rounded:
            step = max(-low, high) / 127
            return (value / step).round().clamp(-128, 127) * step
        scale = (high - low) / 255
        return ops.fake_quantize(value, torch.tensor(scale), torch.tensor(round(-low / scale)).byte())

    with torch.no_grad():
        rounded_attention(model, torch.cat(data), see)
        want = rounded_attention(_replaced(model, Affine(8)), data[1], rounding)
        for left_out in rounded:
            keep = lambda name, value: value if name == left_out else rounding(name, value)  # noqa: B023, E731
            other = rounded_attention(_replaced(model, Affine(8)), data[1], keep)
            assert not torch.allclose(other, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(data[1]), want, rtol=1e-4, atol=1e-5)
    if scheme.startswith("W8A8,") and attention == "scores":
        zeros = [int(compiled.program.get(n.args[2].target)) for n in compiled.program.calls(ops.fake_quantize.default)]
        assert zeros.count(128) == 2, "of queries and keys"


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_an_attention_whose_scores_are_rounded_stays_fused(captured, how):
    _, program = captured("BertForSequenceClassification", attn_implementation=how)
    before = [site.fused for site in attention_sites(program)]
    step = pc.Quantize("W8A8-dynamic", attention="scores")
    assert step.apply(program, Context()).skipped == {}
    sites = attention_sites(program)
    assert [site.fused for site in sites] == before and before[0] is (how == "sdpa")
    for site in sites:
        rounded = [
            reader.args[index].target is ops.fake_quantize_dynamic.default for reader, index in operand_places(site)
        ]
        assert rounded == [True, True, False]
    _, program = captured("BertForSequenceClassification", attn_implementation=how)
    first, again = (pc.Quantize("W8A8-dynamic", attention="scores", targets=(f"*.0.*.{n}",)) for n in ("query", "key"))
    assert first.apply(program, Context()).skipped == {}
    assert list(again.apply(program, Context()).skipped.values()) == ["its products are quantised already"]


def test_rounded_attention_on_onnx_runtime(models):
    model, data = models.Attention(16, 2).eval(), [torch.randn(2, 7, 16)]
    passes = ["quantize:W8A8,attention=true"]
    made = [pc.compile(model, passes, example_inputs=data[0], calibration=data, target=t) for t in TARGETS]
    want, got = (compiled(data[0]) for compiled in made)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)  # a product at the edge of a code may fall over it
    assert float((want - model(data[0]).detach()).abs().max()) > 2e-3


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_attention_of_the_chosen_layers_only(captured, how):
    _, program = captured("BertForSequenceClassification", attn_implementation=how)
    step = pc.Quantize("W8A8-dynamic", attention=True, targets=("*layer.1.*",))
    step.apply(program, Context())
    first, second = attention_sites(program)
    assert (first.fused, second.fused) == (how == "sdpa", False)
    assert second.node.args[0].target is ops.fake_quantize_dynamic.default
    again = pc.Quantize("W8A8-dynamic", attention=True, ignore=("*layer.1.*", "*pooler*", "classifier"))
    result = again.apply(program, Context())
    assert result.skipped == {}
    assert all(site.node.args[0].target is ops.fake_quantize_dynamic.default for site in attention_sites(program))


def test_attention_that_cannot_be_rounded_is_named(models, reference, refused):
    scheme, x = "quantize:W8A8-dynamic,attention=true", torch.randn(2, 7, 16)
    compiled = reference(models.Block(16, 2), [f"{scheme},targets=*.qkv", f"{scheme},targets=*.out"], x)
    assert compiled.report(latency=False).passes[-1]["skipped"] == {"attention": "its products are quantised already"}
    sentence = "attention=True, and no attention belongs to the chosen sites"
    refused(PassError, sentence, lambda: reference(models.Mlp(), [scheme], X))
    for options, sentence in (
        ({"scheme": "W8A16", "attention": True}, "attention=True does not apply to W8A16"),
        ({"scheme": "W8A8", "attention": "keys"}, "attention=keys is not known"),
        ({"scheme": "FP8", "attention": True}, "attention=True does not apply to FP8"),
        ({"attention": True, "max_drop": 0.1}, "max_drop= gives back layers"),
        ({"range": "mse"}, "range=mse does not apply to W8A8-dynamic"),
        ({"scheme": "W8A8", "range": "best"}, "there is no range 'best'"),
        ({"scheme": "W8A8", "granularity": "token"}, "granularity=token does not apply to W8A8"),
    ):
        refused(OptionError, sentence, lambda options=options: Quantize(**options))


# -- embeddings and tied weights -------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(48, 32)
        self.out = nn.Linear(32, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids).mean(1))


@pytest.mark.parametrize("scheme", ["W8A8-dynamic", "W8A16", "W4A16"])
def test_embeddings_on_request(reference, scheme):
    model = Words()
    plain = reference(model, [f"quantize:{scheme}"], IDS)
    assert _encodings(plain)["words"] == "None"
    compiled = reference(model, [f"quantize:{scheme},embeddings=true"], IDS)
    assert _encodings(compiled)["words"] == str(Affine(8))
    assert compiled.program.weights()["words.weight.scale"].shape == (48, 1)  # one scale a row
    (site,) = [s for s in weight_sites(compiled.program) if s.kind == "embedding"]
    assert torch.equal(compiled.program.weight_value(site.weight), _decoded(model.words.weight, Affine(8)))
    assert site.input.op == "placeholder"  # ids are not quantised


def test_a_tied_weight_is_left_alone_without_embeddings(models, reference):
    compiled = reference(models.TiedLanguageModel(), ["quantize:W8A16"], IDS)
    entry = compiled.report(latency=False).passes[-1]
    assert entry["matched"] == ["middle"]
    (reason,) = entry["skipped"].values()
    assert reason == "its weight is also an embedding table; use embeddings=true to quantise it"


@pytest.mark.parametrize("scheme", ["W8A8-dynamic", "W8A16", "W4A16"])
def test_a_tied_weight_is_stored_once(models, reference, scheme):
    model = models.TiedLanguageModel()
    compiled = reference(model, [f"quantize:{scheme},embeddings=true"], IDS)
    decodes = compiled.program.calls(ops.decode.default)
    assert len(decodes) == 2
    tied = max(decodes, key=lambda d: len(d.users))
    assert {u.target for u in tied.users} == {torch.ops.aten.embedding.default, torch.ops.aten.linear.default}
    table = _decoded(model.embedding.weight, Affine(8))
    assert torch.equal(compiled.program.weight_value(tied), table)
    if scheme == "W8A16":
        middle = _decoded(model.middle.weight, Affine(8))
        hidden = torch.tanh(table[IDS] @ middle.T + model.middle.bias)
        torch.testing.assert_close(compiled(IDS), hidden @ table.T, rtol=1e-4, atol=1e-5)


# -- which sites -----------------------------------------------------------------------------------------


def test_targets_and_ignore(models, reference):
    compiled = reference(
        models.Vit(depth=2), ["quantize:W8A16,targets=[*.mlp.*,head],ignore=re:1.mlp"], torch.randn(2, 16, 12)
    )
    chosen = [path for path, encoding in _encodings(compiled).items() if encoding != "None"]
    assert chosen == ["blocks.0.mlp.up", "blocks.0.mlp.down", "head"]
    assert compiled.report(latency=False).passes[-1]["matched"] == chosen


def test_two_schemes_for_two_parts(models, reference):
    passes = ["quantize:W4A16,group_size=16,targets=up", "quantize:W8A8-dynamic,targets=down"]
    compiled = reference(models.Mlp(), passes, X)
    assert _encodings(compiled) == {"up": str(Affine(4, 16)), "down": str(Affine(8))}
    assert len(compiled.program.calls(ops.fake_quantize_dynamic.default)) == 1


def test_what_is_already_quantised_is_left_alone(models, reference):
    compiled = reference(models.Mlp(), ["quantize:W4A16,group_size=16,targets=up", "quantize:W8A16"], X)
    assert _encodings(compiled) == {"up": str(Affine(4, 16)), "down": str(Affine(8))}
    skipped = compiled.report(latency=False).passes[-1]["skipped"]
    assert skipped == {"up": f"already stored as {Affine(4, 16)}"}


def test_convolutions_are_not_for_w4a16(models, reference):
    compiled = reference(models.Cnn().eval(), ["quantize:W4A16,group_size=8"], torch.randn(2, 4, 8, 8))
    assert [p for p, e in _encodings(compiled).items() if e != "None"] == ["head"]


# -- errors ----------------------------------------------------------------------------------------------


def test_a_group_that_does_not_divide_names_the_site(models, reference, refused):
    sentence = "group size 32 is larger than the input width 16"
    error = refused(OptionError, sentence, lambda: reference(models.Mlp(), ["quantize:W4A16"], X))
    assert error.where.startswith("pass 'quantize', site linear 'up', node linear")
    assert error.fix.startswith("use 16")


def test_a_group_that_does_not_divide_the_kept_values_names_the_site(models, reference, refused):
    passes = ["prune_nm:2:4", "quantize:W4A16,group_size=16"]
    sentence = "group size 16 is larger than the input width 8"
    error = refused(OptionError, sentence, lambda: reference(models.Mlp(), passes, X))
    assert "site linear 'up'" in error.where


def test_quantising_everything_twice_is_an_error(models, reference, refused):
    sentence = "no weight can be encoded: up: already stored as Affine(bits=8, group=0)"
    refused(PassError, sentence, lambda: reference(models.Mlp(), ["quantize:W8A16", "quantize:W8A16"], X))


def test_a_model_without_weights_is_an_error(reference, refused):
    refused(PassError, "no weight can be encoded", lambda: reference(nn.Sequential(nn.Tanh()), ["quantize:W8A16"], X))


def test_a_pattern_that_matches_nothing_lists_near_misses(models, reference, refused):
    call = lambda: reference(models.Mlp(), ["quantize:W8A16,ignore=*.downn"], X)  # noqa: E731
    error = refused(OptionError, "the pattern '*.downn' matches none of the 2 linear/conv sites", call)
    assert error.where == "pass 'quantize'"
    assert error.fix == "did you mean down?"
