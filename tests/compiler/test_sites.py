"""Sites: what the graph means, by hand and in transformers models, attention fused and in the open form."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.capture import capture
from paretoc.compiler.program import example_shape, module_path
from paretoc.compiler.sites import (
    attention_sites,
    blocks,
    class_token,
    feed_forward_sites,
    protected_tokens,
    residual_adds,
    walk_inputs,
    weight_sites,
)
from torch import Tensor, nn
from torch.nn import functional as F

VISION = ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]


def _canonical(model: nn.Module, *example: Tensor):
    program = capture(model.eval(), example)
    canonicalize(program)
    return program


# -- weights ---------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)
        self.free = nn.Linear(8, 8, bias=False)
        self.layer_norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(5, 5, 1)
        self.group_norm = nn.GroupNorm(1, 5)
        self.batch_norm = nn.BatchNorm1d(5)
        self.rms_norm = nn.RMSNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer_norm(self.free(self.linear(self.words(ids))))
        return self.rms_norm(self.batch_norm(torch.relu(self.group_norm(self.conv(x)))))


def test_every_kind_of_weight_site():
    program = capture(Zoo().eval(), torch.randint(0, 9, (2, 5)), ({0: torch.export.Dim.AUTO},))
    sites = weight_sites(program)
    found = [(s.kind, s.path, s.module_class) for s in sites]
    assert found == [
        ("embedding", "words", "Embedding"),
        ("linear", "linear", "Linear"),
        ("linear", "free", "Linear"),
        ("norm", "layer_norm", "LayerNorm"),
        ("conv", "conv", "Conv1d"),
        ("norm", "group_norm", "GroupNorm"),
        ("norm", "batch_norm", "BatchNorm1d"),
        ("norm", "rms_norm", "RMSNorm"),
    ]
    by_path = {s.path: s for s in sites}
    assert by_path["words"].shape == (9, 8)
    assert by_path["words"].input is program.placeholders[0]
    assert by_path["linear"].input is by_path["words"].node
    assert by_path["linear"].bias.target == "linear.bias"
    assert by_path["free"].bias is None
    assert by_path["conv"].bias.target == "conv.bias"
    assert by_path["words"].bias is None
    assert by_path["linear"].describe().startswith("linear 'linear', node linear (aten.linear.default) in linear from")


def test_a_product_of_two_activations_is_no_weight_site():
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.linear(x, y)

    assert weight_sites(capture(Product(), (torch.randn(2, 4), torch.randn(3, 4)))) == []


class General(nn.Module):
    """The convolution operator that does every kind."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.weight, self.transposed = nn.Parameter(torch.randn(8, 4, 3, 3)), transposed

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, self.weight, None, [1, 1], [1, 1], [1, 1], self.transposed, [0, 0], 1)


def test_a_transposed_convolution_is_no_weight_site():
    assert [site.kind for site in weight_sites(_canonical(General(False), torch.randn(2, 4, 6, 6)))] == ["conv"]
    assert weight_sites(_canonical(General(True), torch.randn(2, 8, 6, 6))) == []


def test_an_encoded_weight_is_the_same_site(models):
    from paretoc.compiler.encodings import Affine

    program = capture(models.Mlp(), torch.randn(2, 16))
    before = [(s.kind, s.path, s.shape) for s in weight_sites(program)]
    for site in weight_sites(program):
        program.encode(site.weight, Affine(4), Affine(4).encode(program.weight_value(site.weight)))
    program.refresh()
    assert [(s.kind, s.path, s.shape) for s in weight_sites(program)] == before


def test_a_tied_weight_is_two_sites(models):
    sites = weight_sites(capture(models.TiedLanguageModel(), torch.randint(0, 48, (2, 5))))
    assert [s.kind for s in sites] == ["embedding", "linear", "linear"]
    assert sites[0].weight is sites[2].weight
    assert sites[0].path == sites[2].path


# -- attention -------------------------------------------------------------------------------------------


FORMS = [(VISION[0], "sdpa"), (VISION[0], "eager"), (VISION[1], "sdpa")]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_attention_of_a_vision_transformer(captured, name, form):
    _, program = captured(name, attn_implementation=form)
    sites = attention_sites(program)
    tokens = 18 if name.startswith("DeiT") else 17
    assert len(sites) == 3
    for index, site in enumerate(sites):
        assert site.fused is (form == "sdpa")
        assert site.mask is None
        assert not site.causal
        assert site.scale == pytest.approx(1 / sqrt(8))
        assert f".{index}." in site.path
        for operand in (site.query, site.key, site.value):
            assert example_shape(operand) == (2, 4, tokens, 8)
        roles = [_projection(operand) for operand in (site.query, site.key, site.value)]
        assert [r.split(".")[-1][0] for r in roles] == ["q", "k", "v"], roles


def _projection(node) -> str:
    """The path of the linear layer behind an attention operand."""
    for parent in walk_inputs(node):
        if parent.target is torch.ops.aten.linear.default:
            return module_path(parent)
    raise AssertionError(f"no linear behind {node}")


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_attention_of_bert_has_its_mask(captured, form):
    _, program = captured("BertForSequenceClassification", attn_implementation=form, num_hidden_layers=1)
    (site,) = attention_sites(program)
    assert site.mask is not None
    assert site.fused is (form == "sdpa")
    assert site.path == "bert.encoder.layer.0.attention.self"
    assert [_projection(o).split(".")[-1] for o in (site.query, site.key, site.value)] == [
        "query",
        "key",
        "value",
    ]


def test_attention_is_found_before_canonicalization_too(models):
    model = models.hugging_face("ViTForImageClassification", attn_implementation="eager", num_hidden_layers=1)
    program = capture(model, models.images())
    assert len(attention_sites(program)) == 1


class Open(nn.Module):
    """Attention in the open form, written as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.bias = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kt = k.permute(0, 1, 3, 2) if self.how == "permute" else k.transpose(-2, -1)
        if self.how == "scaled query":
            return torch.softmax((q * 0.5) @ kt, -1) @ v
        if self.how == "no transposition":
            return torch.softmax(q @ k, -1) @ v
        if self.how == "another function":
            return torch.sigmoid(q @ kt) @ v
        if self.how == "a function between":
            return torch.softmax(torch.tanh(q @ kt), -1) @ v
        if self.how == "no product behind":
            return torch.softmax(q @ kt, -1) + 1
        logits = (q @ kt) / 2
        if self.how == "mask":
            logits = logits * 3 + self.bias
        return torch.softmax(logits, -1) @ v


@pytest.mark.parametrize(("how", "scale"), [("plain", 0.5), ("permute", 0.5), ("mask", 1.5), ("scaled query", 1.0)])
def test_the_open_form_by_hand(how, scale):
    q, k, v = (torch.randn(2, 2, 6, 6) for _ in range(3))  # keys as wide as tokens: shapes do not tell them apart
    (site,) = attention_sites(_canonical(Open(how), q, k, v))
    assert site.scale == scale  # a factor on the query stays in the query
    assert (site.key.name, site.value.name) == ("k", "v")
    assert (site.query.name == "q") is (how != "scaled query")
    assert (site.mask is not None) is (how == "mask")
    assert not site.fused


@pytest.mark.parametrize("how", ["no transposition", "another function", "a function between", "no product behind"])
def test_what_is_no_attention(how):
    q, k, v = (torch.randn(2, 2, 6, 6) for _ in range(3))
    assert attention_sites(_canonical(Open(how), q, k, v)) == []


def test_fused_attention_with_its_options():
    class Fused(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            first = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return first + F.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.25)

    causal, masked = attention_sites(_canonical(Fused(), torch.randn(2, 2, 5, 4), torch.randn(2, 1, 5, 5)))
    assert (causal.causal, causal.mask, causal.scale) == (True, None, 0.5)
    assert (masked.causal, masked.mask.name, masked.scale) == (False, "mask", 0.25)


# -- blocks, feed-forward, residual stream ---------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), [*FORMS, ("BertForSequenceClassification", "sdpa")])
def test_a_block_ends_in_the_residual_add_of_its_attention(captured, name, form):
    options = {"num_hidden_layers": 1} if name.startswith("Bert") else {}
    _, program = captured(name, attn_implementation=form, **options)
    found = blocks(program)
    assert [b.attention for b in found] == attention_sites(program)
    order = list(program.graph.nodes)
    for block in found:
        assert block.residual.target is torch.ops.aten.add.Tensor
        assert example_shape(block.residual)[-1] == 32
        later = [
            u for u in order if u.target is torch.ops.aten.gelu.default and order.index(u) > order.index(block.residual)
        ]
        assert later, "the feed-forward comes behind the add"
        before = [n for n in walk_inputs(block.residual) if n.target is torch.ops.aten.gelu.default]
        assert len(before) == found.index(block)


def test_blocks_of_a_fused_projection(models):
    program = _canonical(models.Vit(depth=2), torch.randn(2, 16, 12))
    found = blocks(program)
    assert [b.attention.path for b in found] == ["blocks.0.attention", "blocks.1.attention"]
    assert [module_path(b.residual) for b in found] == ["blocks.0", "blocks.1"]


def test_an_attention_without_a_residual_is_no_block():
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x) * 2

    program = _canonical(Plain(), torch.randn(2, 2, 5, 4))
    assert len(attention_sites(program)) == 1
    assert blocks(program) == []


def test_feed_forward_plain_and_gated(models):
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    (site,) = feed_forward_sites(_canonical(Gated(), torch.randn(2, 8)))
    assert [module_path(n) for n in (site.up, site.activation, site.down)] == ["gate", "", "down"]
    sites = feed_forward_sites(_canonical(models.Vit(depth=2), torch.randn(2, 16, 12)))
    assert [(module_path(s.up), s.path) for s in sites] == [
        ("blocks.0.mlp.up", "blocks.0.mlp.down"),
        ("blocks.1.mlp.up", "blocks.1.mlp.down"),
    ]


def test_feed_forwards_of_hugging_face_models(captured):
    for name, count in (("ViTForImageClassification", 3), ("DeiTForImageClassificationWithTeacher", 3)):
        _, program = captured(name)
        assert len(feed_forward_sites(program)) == count
    _, program = captured("BertForSequenceClassification", num_hidden_layers=1)
    assert len(feed_forward_sites(program)) == 1


def test_residual_adds(models):
    program = _canonical(models.Vit(depth=2), torch.randn(2, 16, 12))
    adds = residual_adds(program)
    assert [module_path(n) for n in adds] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert residual_adds(_canonical(models.Mlp(), torch.randn(2, 16))) == []


# -- class tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [(VISION[0], 1), (VISION[1], 2)])
def test_learned_tokens_of_vision_transformers(captured, name, count):
    _, program = captured(name)
    assert protected_tokens(program) == count
    assert class_token(program).target is torch.ops.aten.cat.default


@pytest.mark.parametrize(("pool", "count"), [("class", 1), ("mean", 0)])
def test_learned_tokens_by_hand(models, pool, count):
    program = _canonical(models.Vit(pool=pool, depth=1, tokens=16), torch.randn(2, 16, 12))
    assert protected_tokens(program) == count
    assert (class_token(program) is None) is (count == 0)


def test_registers_count_and_other_cats_do_not():
    class Registers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.registers = nn.Parameter(torch.randn(1, 3, 4))

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            B = x.shape[0]
            x = torch.cat([self.token.expand(B, -1, -1), self.registers.repeat(B, 1, 1), x], dim=1)
            return torch.cat([x, other], dim=1)

    assert protected_tokens(_canonical(Registers(), torch.randn(2, 5, 4), torch.randn(2, 2, 4))) == 4

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.token.expand(x.shape[0], -1, -1)], dim=1)

    assert protected_tokens(_canonical(Behind(), torch.randn(2, 5, 4))) == 0


def test_walk_inputs_gives_every_ancestor_once(models):
    program = _canonical(models.Mlp(), torch.randn(2, 16))
    seen = list(walk_inputs(program.outputs[0]))
    assert len(seen) == len(set(seen))
    assert {n for n in program.graph.nodes if n.op != "output"} == {*seen, program.outputs[0]}
