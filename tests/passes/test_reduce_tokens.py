"""Token reduction against slow implementations of ToMe and EViT, and everything that forbids it.

The references below run the same weights one sequence, one block and one token at a time, from the papers' equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from paretoc.compiler.calibrate import Observer
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.capture import capture
from paretoc.compiler.cost import cost
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.passes import Context, Pass, PassResult
from paretoc.compiler.program import Program
from paretoc.compiler.sites import attention_sites
from paretoc.passes import MergeTokens, PruneTokens, ReduceTokens
from paretoc.passes.token_rules import Keep, Merge
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
ops = torch.ops.paretoc


# -- slow references -------------------------------------------------------------------------------------


@dataclass
class Layer:
    """The parts of one pre-norm block: x + out(attention(norm1(x))), then x + mlp(norm2(x))."""

    norm1: nn.Module
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    out: nn.Module
    norm2: nn.Module
    mlp: Callable[[Tensor], Tensor]


@dataclass
class Parts:
    """A vision transformer taken apart. `finish(x, size)` pools and classifies one sequence `[T, C]`."""

    start: Callable[[Tensor], Tensor]
    layers: list[Layer]
    heads: int
    protected: int
    finish: Callable[[Tensor, Tensor], Tensor]


def parts_of(model: nn.Module) -> Parts:
    return _hand_written(model) if hasattr(model, "pool") else _hugging_face(model)


def _hand_written(model: nn.Module) -> Parts:
    def start(patches: Tensor) -> Tensor:
        x = model.embed(patches)
        if model.token is not None:
            x = torch.cat([model.token.expand(len(x), -1, -1), x], 1)
        return x + model.position

    def finish(x: Tensor, size: Tensor) -> Tensor:
        x = model.norm(x)
        return model.head(x[0] if model.token is not None else (x * size[:, None]).sum(0) / size.sum())

    layers = [
        Layer(b.norm1, lambda x, b=b: b.attention.qkv(x).chunk(3, -1), b.attention.out, b.norm2, b.mlp)
        for b in model.blocks
    ]
    return Parts(start, layers, model.blocks[0].attention.heads, int(model.token is not None), finish)


def _hugging_face(model: nn.Module) -> Parts:
    base = getattr(model, "vit", None) or model.deit

    def layer(block: nn.Module) -> Layer:
        a = block.attention
        return Layer(
            block.layernorm_before,
            lambda x: (a.q_proj(x), a.k_proj(x), a.v_proj(x)),
            a.o_proj,
            block.layernorm_after,
            block.mlp,
        )

    def finish(x: Tensor, size: Tensor) -> Tensor:
        x = base.layernorm(x)
        if hasattr(model, "distillation_classifier"):
            return (model.cls_classifier(x[0]) + model.distillation_classifier(x[1])) / 2
        return model.classifier(x[0])

    protected = 2 if hasattr(base.embeddings, "distillation_token") else 1
    return Parts(base.embeddings, [layer(b) for b in base.layers], base.config.num_attention_heads, protected, finish)


def attention(layer: Layer, x: Tensor, heads: int, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence `[T, C]`, bias `[T]` on its keys → (branch `[T, C]`, keys `[T, C]`, probabilities `[H, T, T]`)."""
    queries, keys, values = layer.qkv(layer.norm1(x))
    width = keys.shape[1] // heads
    outputs, tables = [], []
    for h in range(heads):
        q, k, v = (t[:, h * width : (h + 1) * width] for t in (queries, keys, values))
        table = torch.softmax(q @ k.T / width**0.5 + bias, -1)
        outputs.append(table @ v)
        tables.append(table)
    return layer.out(torch.cat(outputs, -1)), keys, torch.stack(tables)


def tome(x: Tensor, size: Tensor, keys: Tensor, heads: int, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """Merge the r most similar pairs of one sequence; protected tokens stay in front, in order."""
    if r == 0:
        return x, size
    metric = keys.reshape(len(keys), heads, -1).mean(1)
    edges = []
    for i in range(protected + protected % 2, len(x), 2):
        others = range(protected + (protected + 1) % 2, len(x), 2)
        similar = [(float(F.cosine_similarity(metric[i], metric[j], dim=0)), j) for j in others]
        best = max(similar, key=lambda s: s[0])
        edges.append((*best, i))
    gone = {i: j for _, j, i in sorted(edges, key=lambda e: -e[0])[:r]}
    evens, odds = ([t for t in range(parity, len(x), 2) if t not in gone] for parity in (0, 1))
    order = [*range(protected), *(t for t in (*evens, *odds) if t >= protected)]
    rows, sizes = [], []
    for t in order:
        group = [t, *(i for i, j in gone.items() if j == t)]
        total = sum(size[g] for g in group)
        rows.append(sum(x[g] * size[g] for g in group) / total)
        sizes.append(total)
    return torch.stack(rows), torch.stack(sizes)


@torch.no_grad()
def slow_tome(model: nn.Module, images: Tensor, plan: list[int], *, proportional: bool = True) -> Tensor:
    """A vision transformer with Token Merging: r of each layer from `plan`."""
    parts, results = parts_of(model), []
    for x in parts.start(images):
        size = torch.ones(len(x))
        for layer, r in zip(parts.layers, plan, strict=True):
            branch, keys, _ = attention(layer, x, parts.heads, size.log() if proportional else torch.zeros(len(x)))
            x, size = tome(x + branch, size, keys, parts.heads, r, parts.protected)
            x = x + layer.mlp(layer.norm2(x))
        results.append(parts.finish(x, size))
    return torch.stack(results)


@torch.no_grad()
def slow_evit(model: nn.Module, images: Tensor, plan: list[float], *, fuse: bool) -> Tensor:
    """A vision transformer that keeps a share of its tokens, by class attention, at each layer with a share < 1."""
    parts, results = parts_of(model), []
    for x in parts.start(images):
        for layer, share in zip(parts.layers, plan, strict=True):
            branch, _, tables = attention(layer, x, parts.heads, torch.zeros(len(x)))
            x = x + branch
            if share < 1:
                scores = tables[:, 0].mean(0)
                free = range(parts.protected, len(x))
                count = -int(-share * len(free) // 1)
                best = sorted(sorted(free, key=lambda t: -float(scores[t]))[:count])
                rows = [x[t] for t in (*range(parts.protected), *best)]
                if fuse:
                    rows.append(sum(scores[t] * x[t] for t in free if t not in best))
                x = torch.stack(rows)
            x = x + layer.mlp(layer.norm2(x))
        results.append(parts.finish(x, torch.ones(len(x))))
    return torch.stack(results)


@torch.no_grad()
def masked_evit(model: nn.Module, images: Tensor, plan: list[float]) -> Tensor:
    """The same without removing anything: all tokens stay, and the dropped ones are masked as keys."""
    parts, results = parts_of(model), []
    for x in parts.start(images):
        hidden = torch.zeros(len(x), dtype=torch.bool)
        for layer, share in zip(parts.layers, plan, strict=True):
            bias = torch.zeros(len(x)).masked_fill(hidden, float("-inf"))
            branch, _, tables = attention(layer, x, parts.heads, bias)
            x = x + branch
            if share < 1:
                scores = tables[:, 0].mean(0)
                free = [t for t in range(parts.protected, len(x)) if not hidden[t]]
                count = -int(-share * len(free) // 1)
                for t in sorted(free, key=lambda t: -float(scores[t]))[count:]:
                    hidden[t] = True
            x = x + layer.mlp(layer.norm2(x))
        results.append(parts.finish(x, torch.ones(len(x))))
    return torch.stack(results)


# -- models ----------------------------------------------------------------------------------------------

VIT = "ViTForImageClassification"
DEIT = "DeiTForImageClassificationWithTeacher"
OPEN = "ViT in the open form of attention"
NAMES = [VIT, DEIT, "mean", "class"]


@dataclass
class Network:
    """A model, its canonical program, and a maker of its input."""

    model: nn.Module
    program: Program
    images: Callable[[int], Tensor]


@pytest.fixture(scope="module")
def network(models, captured) -> Callable[[str], Network]:
    made: dict[str, Network] = {}

    def get(name: str) -> Network:
        if name not in made:
            torch.manual_seed(1)
            if name in ("mean", "class"):
                model = models.Vit(pool=name).eval()
                program = capture(model, torch.randn(2, 16, 12))
                canonicalize(program)
                made[name] = Network(model, program, lambda batch: torch.randn(batch, 16, 12))
            else:
                options = {"attn_implementation": "eager"} if name == OPEN else {}
                model, program = captured(VIT if name == OPEN else name, **options)
                made[name] = Network(model, program, lambda batch: torch.randn(batch, 3, 32, 32))
        return made[name]

    return get


@pytest.fixture(scope="module")
def reduced(network) -> Callable[[str, Pass], tuple[Program, PassResult]]:
    """The program of a network after one pass; each is made once."""
    made: dict[tuple[str, Pass], tuple[Program, PassResult]] = {}

    def get(name: str, step: Pass) -> tuple[Program, PassResult]:
        if (name, step) not in made:
            program = network(name).program.clone()
            made[name, step] = program, step.apply(program, Context())
        return made[name, step]

    return get


def logits(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_references_are_the_model_when_nothing_is_removed(network, name):
    model = network(name).model
    x = network(name).images(2)
    want = logits(model(x))
    torch.testing.assert_close(slow_tome(model, x, [0, 0, 0]), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slow_evit(model, x, [1, 1, 1], fuse=True), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked_evit(model, x, [1, 1, 1]), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(slow_tome(model, x, [2, 2, 2]), want, rtol=1e-4, atol=1e-5)


# -- merging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "r"),
    [*((name, 2) for name in (*NAMES, OPEN)), (VIT, (4, 0, 3)), ("mean", (4, 0, 3)), ("mean", (3, 0, 0))],
    ids=str,
)
def test_merging_equals_a_slow_tome(network, reduced, name, r):
    model, (program, _) = network(name).model, reduced(name, MergeTokens(r))
    plan = [r] * 3 if isinstance(r, int) else list(r)
    for batch in (1, 3):
        x = network(name).images(batch)
        want = slow_tome(model, x, plan)
        torch.testing.assert_close(logits(program(x)), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits(program(x)), logits(model(x)), rtol=1e-3, atol=1e-3)


def test_the_open_form_of_attention_stays_open(reduced):
    program, _ = reduced(OPEN, MergeTokens(2))
    assert [site.fused for site in attention_sites(program)] == [False] * 3


def test_both_outputs_of_the_distilled_model_read_their_own_token(network, reduced):
    program, _ = reduced(DEIT, MergeTokens(4))
    x = network(DEIT).images(2)
    before = program(x)
    again = program.clone()
    again.set("distillation_classifier.bias", again.get("distillation_classifier.bias") + 3)
    after = again(x)
    torch.testing.assert_close(after.distillation_logits, before.distillation_logits + 3, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.cls_logits, before.cls_logits)


@pytest.mark.parametrize("step", [MergeTokens(0), MergeTokens((0, 0, 0)), PruneTokens(1.0)], ids=lambda s: s.describe())
@pytest.mark.parametrize("name", [VIT, "class"])
def test_removing_nothing_is_bit_identical(network, reduced, name, step):
    plain, (program, result) = network(name).program, reduced(name, step)
    x = network(name).images(3)
    assert torch.equal(logits(program(x)), logits(plain(x)))
    assert str(program.graph) == str(plain.graph)
    assert result.matched == []


@pytest.mark.parametrize(("name", "protected"), [("mean", 0), ("class", 1)])
def test_merging_equal_tokens_changes_nothing(network, reduced, name, protected):
    plain, (program, _) = network(name).program.clone(), reduced(name, MergeTokens(4))
    program = program.clone()
    position = plain.get("position").detach().clone()
    position[:, protected:] = 0
    for either in (plain, program):
        either.set("position", position)
    x = torch.randn(2, 1, 12).expand(2, 16, 12).contiguous()
    torch.testing.assert_close(program(x), plain(x), rtol=1e-5, atol=1e-6)  # sums in another order
    other = torch.randn(2, 16, 12)
    assert not torch.allclose(program(other), plain(other), rtol=1e-3, atol=1e-3)


def _observed(program: Program, *inputs: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        Observer(program.module, seen.__setitem__).run(*inputs)
    return seen


@pytest.mark.parametrize(("name", "tokens", "protected"), [("mean", 16, 0), ("class", 17, 1), (DEIT, 18, 2)])
def test_sizes_add_up_and_protected_tokens_stay(network, reduced, name, tokens, protected):
    program, _ = reduced(name, MergeTokens(4))
    seen = _observed(program, network(name).images(3))
    merges = program.calls(ops.merge_tokens.default)
    assert len(merges) == 3
    for node in merges:
        before, (after, size) = seen[node.args[0].name], seen[node.name]
        assert size.sum(1).flatten().tolist() == [tokens] * 3
        assert (size >= 1).all()
        assert after.shape[1] == before.shape[1] - 4
        streams = [u for u in node.users if u.args[1] == 0]
        reordered = [u for u in streams[0].users if u.target is aten.index_select.default]
        assert len(reordered) == (protected > 1)
        after = seen[reordered[0].name] if reordered else after
        assert torch.equal(after[:, :protected], before[:, :protected])


def test_a_token_mean_is_weighted_by_size(network, reduced):
    program, _ = reduced("mean", MergeTokens(4))
    left = [n for n in program.calls(aten.mean.dim) if n.args[0].meta["val"].ndim == 3]
    assert left == []  # what remains are the means of the keys over the heads
    assert len(program.calls(aten.mean.dim)) == 3


class PooledPatches(nn.Module):
    """The mean over the patches behind the class token, as masked autoencoders pool."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, patches: Tensor) -> Tensor:
        vit = self.vit
        x = vit.embed(patches)
        x = torch.cat([vit.token.expand(x.shape[0], -1, -1), x], dim=1) + vit.position
        for block in vit.blocks:
            x = block(x)
        return vit.head(vit.norm(x)[:, 1:].mean(dim=1, keepdim=True))


def test_a_mean_behind_the_class_token_is_weighted_by_size(models, reference):
    model = PooledPatches(models.Vit(pool="class")).eval()
    compiled = reference(model, ["merge_tokens:r=4"], torch.randn(2, 16, 12))
    parts = parts_of(model.vit)
    vit = model.vit
    patches = lambda x, s: (vit.norm(x)[1:] * s[1:, None]).sum(0, keepdim=True) / s[1:].sum()  # noqa: E731
    parts.finish = lambda x, s: vit.head(patches(x, s))
    x = torch.randn(3, 16, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "parts_of", lambda _: parts)
        want = slow_tome(vit, x, [4, 4, 4])
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-5)


def test_attention_is_proportional(network, reduced):
    program, _ = reduced("class", MergeTokens(4))
    x = network("class").images(3)
    without = slow_tome(network("class").model, x, [4, 4, 4], proportional=False)
    assert not torch.allclose(program(x), without, rtol=1e-3, atol=1e-4)


# -- schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "tokens"),
    [
        (MergeTokens(2), (17, 15, 13)),
        (MergeTokens(8), (17, 9, 5)),
        (MergeTokens(100), (17, 9, 5)),
        (MergeTokens((3, 1)), (17, 14, 13)),
        (MergeTokens((0, 5, 1, 9)), (17, 17, 12)),
        (MergeTokens(4, layers=(1,)), (17, 17, 13)),
        (MergeTokens(3, schedule="decreasing"), (17, 11, 8)),
        (ReduceTokens("merge", keep=0.75), (17, 13, 10)),
        (PruneTokens(0.5), (17, 9, 5)),
        (PruneTokens(0.5, fuse=True), (17, 10, 7)),
        (PruneTokens(0.7, layers=(0,)), (17, 13, 13)),
        (ReduceTokens("keep", r=5), (17, 12, 7)),
        (PruneTokens(0.01), (17, 2, 2)),
    ],
    ids=lambda v: v.describe() if isinstance(v, Pass) else "",
)
def test_token_counts(network, reduced, step, tokens):
    program, result = reduced("class", step)
    assert cost(program).tokens == tokens
    assert result.metrics["tokens at first"] == 17
    assert result.metrics["tokens at last"] <= tokens[-1]
    assert torch.isfinite(program(network("class").images(3))).all()


@pytest.mark.parametrize(
    ("tokens", "depth", "r", "last"),
    [
        (197, 12, 13, 41),
        (197, 12, 16, 11),
        (197, 24, 7, 29),
        (197, 24, 8, 7),
        (577, 24, 23, 25),
    ],
)
def test_published_token_counts(tokens, depth, r, last):
    """Bolya et al. 2023, table of off-the-shelf models: what is left behind the last layer."""
    for _ in range(depth):
        tokens -= min(r, Merge().limit(tokens, 1))
    assert tokens == last


def test_the_limits_of_the_rules():
    assert [Merge().limit(t, 0) for t in (1, 2, 3, 8, 9)] == [0, 1, 1, 4, 4]
    assert [Merge().limit(t, 1) for t in (1, 2, 3, 8, 9)] == [0, 0, 1, 3, 4]
    assert [Merge().limit(t, 2) for t in (3, 4, 8, 9)] == [0, 1, 3, 3]
    assert [Keep().limit(t, 1) for t in (2, 3, 9)] == [0, 1, 7]


# -- what it saves ---------------------------------------------------------------------------------------


def _macs(counts: list[int], width: int, expansion: int) -> int:
    """Of one sequence through the blocks: attention sees counts[l] tokens, the feed-forward counts[l + 1]."""
    return sum(4 * a * width**2 + 2 * a**2 * width + 2 * expansion * b * width**2 for a, b in pairwise(counts))


def test_macs_fall_as_the_formula_says(network, reduced):
    original, compiled = cost(network("mean").program), cost(reduced("mean", MergeTokens(4))[0])
    ends = 16 * 12 * 16 + 16 * 5  # the embedding and the classifier
    assert original.macs == 2 * (_macs([16] * 4, 16, 2) + ends)
    assert compiled.macs == 2 * (_macs([16, 12, 8, 4], 16, 2) + ends)
    assert (compiled.parameters, compiled.bytes) == (original.parameters, original.bytes)


@pytest.mark.parametrize(
    ("depth", "width", "tokens", "r", "ratio"),
    [
        (12, 384, 197, 13, 0.58),
        (12, 768, 197, 13, 0.59),
        (12, 768, 197, 16, 0.50),
        (24, 1024, 197, 7, 0.56),
        (24, 1024, 197, 8, 0.50),
        (24, 1024, 577, 23, 0.50),
    ],
)
def test_the_formula_gives_the_known_ratios(depth, width, tokens, r, ratio):
    counts = [tokens]
    for _ in range(depth):
        counts.append(counts[-1] - min(r, Merge().limit(counts[-1], 1)))
    assert _macs(counts, width, 4) / _macs([tokens] * (depth + 1), width, 4) == pytest.approx(ratio, abs=0.006)


def test_pruning_costs_one_more_row_of_attention(reduced):
    program, _ = reduced("class", PruneTokens(0.5, layers=(1,)))
    ends = 16 * 12 * 16 + 16 * 5
    assert cost(program).macs == 2 * (_macs([17, 17, 9, 9], 16, 2) + ends + 17 * 16)


# -- pruning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "fuse"), [(0.3, False), (0.6, True)])
@pytest.mark.parametrize("name", [VIT, OPEN, DEIT, "class"])
def test_pruning_equals_a_slow_evit(network, reduced, name, keep, fuse):
    program, _ = reduced(name, PruneTokens(keep, fuse=fuse, layers=(0, 2)))
    for batch in (1, 3):
        x = network(name).images(batch)
        want = slow_evit(network(name).model, x, [keep, 1, keep], fuse=fuse)
        torch.testing.assert_close(logits(program(x)), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [VIT, DEIT, "class"])
def test_pruning_equals_masking(network, reduced, name):
    model, (program, _) = network(name).model, reduced(name, PruneTokens(0.6, layers=(0, 1)))
    x = network(name).images(3)
    want = masked_evit(model, x, [0.6, 0.6, 1])
    torch.testing.assert_close(logits(program(x)), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(program(x)), logits(model(x)), rtol=1e-3, atol=1e-3)


# -- with other passes -----------------------------------------------------------------------------------


def test_merging_then_pruning_weights_then_quantising(network, reference):
    model, images = network("class").model, network("class").images
    passes = ["merge_tokens:r=2", "prune_nm:2:4", "quantize:W8A8"]
    compiled = reference(model, passes, images(1), calibration=[images(4)])  # ranges of the shorter stream
    assert compiled(images(5)).shape == (5, 5)
    report = compiled.report(latency=False)
    assert report.compiled.tokens == (17, 15, 13)
    assert len(report.passes[-1]["matched"]) == 14  # four linears a block, the embedding and the head


# -- what forbids it -------------------------------------------------------------------------------------


def _refused(refused, model, example, sentence: str, step: Pass | None = None, dynamic_shapes=None):
    program = capture(model.eval(), example, dynamic_shapes)
    canonicalize(program)
    return refused(PassError, sentence, lambda: (step or MergeTokens(2)).apply(program, Context()))


def test_windows_are_refused(models, refused):
    model = models.hugging_face(
        "SwinForImageClassification",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1],
        num_heads=[2],
        window_size=4,
        num_labels=5,
    )
    error = _refused(refused, model, models.images(), "attention sees 16 tokens where the stream has shape")
    assert "swin.encoder.layers.0.blocks.0" in error.where


def test_a_model_that_returns_its_tokens_is_refused(models, refused):
    program = capture(models.hugging_face("ViTModel", num_hidden_layers=1), models.images())
    canonicalize(program)
    kept = program.clone()
    MergeTokens(0).apply(kept, Context())
    assert kept(**models.images()).last_hidden_state.shape == (2, 17, 32)
    sentence = "output 0 has the token axis"
    error = refused(PassError, sentence, lambda: MergeTokens(2).apply(program, Context()))
    assert error.fix == "return pooled features only"


def test_an_open_sequence_is_refused(captured, refused):
    _, program = captured("BertForSequenceClassification", num_hidden_layers=1)
    error = refused(PassError, "the number of tokens is not fixed", lambda: MergeTokens(2).apply(program, Context()))
    assert "dynamic_shapes=" in error.fix


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (True, "the attention has a mask over the tokens"),
        (False, "aten.select.int picks tokens by position"),  # the first word is no learned token
    ],
    ids=["with a mask", "without"],
)
def test_bert_of_a_fixed_length_is_refused(models, refused, mask, sentence):
    model = models.hugging_face("BertForSequenceClassification", num_hidden_layers=1)
    call = models.sentences(2, 8, mask=mask)
    open_batch = {name: {0: torch.export.Dim.AUTO} for name in call}
    error = _refused(refused, model, call, sentence, dynamic_shapes=open_batch)
    assert "bert." in error.where


def test_a_model_without_attention_is_refused(models, refused):
    _refused(refused, models.Mlp(), torch.randn(2, 16), "the model has no attention block")


def test_pruning_needs_a_class_token(network, refused):
    model, images = network("mean").model, network("mean").images
    sentence = "the model has no class token whose attention could rank the others"
    error = _refused(refused, model, images(2), sentence, PruneTokens(0.5))
    assert error.fix == "use merge_tokens"


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (MergeTokens(2), PruneTokens(0.5), "sees 15 tokens and the first one sees 17"),
        (PruneTokens(0.5), MergeTokens(2), "this attention sees 9 tokens and the first one sees 17"),
        (
            MergeTokens(2, layers=(2,)),
            MergeTokens(2),
            "paretoc.bipartite_match.default is not known to act on each token",
        ),
    ],
    ids=["merge, prune", "prune, merge", "behind the last block"],
)
def test_reducing_twice_is_refused(reduced, refused, first, second, sentence):
    program = reduced("class", first)[0].clone()
    refused(PassError, sentence, lambda: second.apply(program, Context()))


class Odd(nn.Module):
    """One attention block, and behind it one thing that needs every token."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)
        self.position = nn.Parameter(torch.randn(1, 16, 8))
        self.late = nn.Parameter(torch.randn(1, 16, 8))
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.along = nn.Linear(16, 16)
        self.flat = nn.Linear(128, 5)

    def block(self, x: Tensor) -> Tensor:
        x = x + self.position
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "no head axis":
            return x + self.out(torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v))
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.how == "causal").squeeze(1))

    def forward(self, patches: Tensor) -> Tensor:
        x = self.block(patches)
        if self.how == "a late position table":
            x = x + self.late
        elif self.how == "a convolution over tokens":
            x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        elif self.how == "a projection along tokens":
            x = x + self.along(x.transpose(1, 2)).transpose(1, 2)
        elif self.how == "flattened tokens":
            return self.flat(x.flatten(1))
        elif self.how == "one token by position":
            return self.head(x[:, 3])
        elif self.how == "half of the tokens":
            return self.head(x[:, :8].mean(1))
        elif self.how == "a mean over everything":
            return x.mean((1, 2))
        elif self.how == "a softmax over tokens":
            x = x * torch.softmax(x, 1)
        elif self.how == "a product over tokens":
            x = x.transpose(1, 2) @ x
        elif self.how == "a maximum over tokens":
            return self.head(x.amax(1))
        return self.head(x.mean(1))


FORBIDDEN = {
    "a late position table": "which still has all 16 tokens",
    "a convolution over tokens": "aten.conv1d.default is not known to act on each token by itself",
    "a projection along tokens": "tokens lie on the axis that it sums over",
    "flattened tokens": "mixes tokens with another axis",
    "one token by position": "aten.select.int picks tokens by position",
    "half of the tokens": "aten.slice.Tensor picks tokens by position",
    "a mean over everything": "tokens are averaged together with another axis",
    "a softmax over tokens": "it normalises over the tokens",
    "a product over tokens": "it sums over the tokens",
    "a maximum over tokens": "aten.amax.default is not known to act on each token by itself",
}


@pytest.mark.parametrize("how", FORBIDDEN)
def test_what_needs_every_token_is_named(refused, how):
    error = _refused(refused, Odd(how), torch.randn(2, 16, 8), FORBIDDEN[how])
    assert error.what.startswith("the token axis may not shrink: ")
    assert "test_reduce_tokens.py:" in error.where


def test_the_same_model_without_that_is_accepted(reference):
    x = torch.randn(2, 16, 8)
    assert reference(Odd("nothing"), ["merge_tokens:r=2"], x)(x).shape == (2, 5)


class Siamese(nn.Module):
    """Two inputs through one encoder: the layers of the second do not follow those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Odd("nothing")

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.encoder(left) - self.encoder(right)


def test_two_encoders_are_refused(refused):
    sentence = "the keys of this attention do not come from the attention block before it"
    _refused(refused, Siamese(), (torch.randn(2, 16, 8), torch.randn(2, 16, 8)), sentence)


def test_causal_attention_is_refused(refused):
    error = _refused(refused, Odd("causal"), torch.randn(2, 16, 8), "the attention is causal")
    assert "bidirectional" in error.fix


def test_attention_without_a_head_axis_is_refused(refused):
    _refused(refused, Odd("no head axis"), torch.randn(2, 16, 8), "the keys of the attention have shape")


@pytest.mark.parametrize("step", [MergeTokens(2, layers=(0, 3)), PruneTokens(0.5, layers=(3,))], ids=lambda s: s.name)
def test_a_layer_that_does_not_exist_is_refused(network, refused, step):
    program = network("class").program.clone()
    error = refused(OptionError, "layer 3 does not exist", lambda: step.apply(program, Context()))
    assert error.fix == "use layers 0 to 2"


def test_a_rule_that_does_not_exist_is_refused(network, refused):
    program = network("class").program.clone()
    step = ReduceTokens("merges", r=2)
    refused(OptionError, "there is no token rule called 'merges'", lambda: step.apply(program, Context()))


def test_the_sites_of_a_reduction_are_reported(reduced):
    _, result = reduced("class", MergeTokens((2, 0, 1)))
    assert result.matched == ["blocks.0.attention", "blocks.2.attention"]
    assert result.metrics == {"tokens at first": 17.0, "tokens at last": 14.0}
