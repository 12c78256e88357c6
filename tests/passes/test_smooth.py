"""Smoothing: the same function, the published scales, what is left alone and why."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.compiler.calibrate import gather
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.errors import CalibrationError, OptionError, PassError
from paretoc.compiler.passes import Context
from paretoc.compiler.sites import weight_sites
from paretoc.passes import PruneNM, Quantize, Rotate, Smooth
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, INNER = 16, 24


class Layer(nn.Module):
    """norm → (q, k, v) → grouped attention → o; norm → gated feed-forward; a head on ReLU features."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = (nn.Linear(*s) for s in ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH)))
        self.hidden, self.head = nn.Linear(WIDTH, 12), nn.Linear(12, 5)
        for each in (self.norm1, self.norm2):
            nn.init.uniform_(each.weight, 0.2, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (p(n).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        n = self.norm2(x)
        x = x + self.down(F.silu(self.gate(n)) * self.up(n))
        return self.head(F.relu(self.hidden(x.mean(1))))


@pytest.fixture(scope="module")
def layer():
    """(model, program, 3 batches)"""
    torch.manual_seed(0)
    model = Layer().eval()
    batches = [torch.randn(2, 7, WIDTH) * torch.linspace(0.1, 5, WIDTH) for _ in range(3)]
    program = pc.capture(model, batches[0])
    canonicalize(program)
    return model, program, batches


def smoothed(program, batches, **options):
    after, step = program.clone(), Smooth(**options)
    statistics = gather(after, step.needs(after), [[b] for b in batches])
    return after, step.apply(after, Context(statistics))


def distance(before, after, inputs) -> float:
    want, got = before.run(inputs)[0], after.run(inputs)[0]
    return float((want - got).abs().max() / want.abs().max())


def seen(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The rows that every linear reads, by PyTorch hooks."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0].detach()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([r.reshape(-1, r.shape[-1]) for r in parts]).double() for name, parts in rows.items()}


GROUPS = {"norm1": "qkv", "norm2": ["gate", "up"], "v": ["o"], "up": ["down"], "hidden": ["head"]}


def textbook(model: nn.Module, batches: list[Tensor], alpha: float) -> dict[str, Tensor]:
    """Equation 4, group by group in the order of the graph; v feeds two heads of o."""
    rows, scales = seen(model, batches), {}
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    for source in ("norm1", "v", "norm2", "up", "hidden"):
        readers = list(GROUPS[source])
        activations = torch.stack([rows[r].abs().amax(0) for r in readers]).amax(0)
        columns = torch.stack([weights[f"{r}.weight"].abs().amax(0) for r in readers]).amax(0)
        if source == "v":
            activations, columns = (t.reshape(2, 2, 4).amax(1).flatten() for t in (activations, columns))
        scales[source] = activations**alpha / columns ** (1 - alpha)
        for name in readers:
            by = scales[source].reshape(2, 1, 4).expand(2, 2, 4).flatten() if source == "v" else scales[source]
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * by
        for leaf in ("weight", "bias"):
            if (name := f"{source}.{leaf}") in weights:
                tall = weights[name].ndim == 2
                weights[name] = weights[name] / (scales[source].unsqueeze(1) if tall else scales[source])
    return weights


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_against_the_textbook(layer, alpha):
    model, program, batches = layer
    after, result = smoothed(program, batches, alpha=alpha)
    assert distance(program, after, [batches[0]]) < 1e-5
    want = textbook(model, batches, alpha)
    for name, weight in after.weights().items():
        torch.testing.assert_close(weight.double(), want[name], rtol=1e-4, atol=1e-7, msg=name)
    assert result.metrics == {"axes": 5, "channels": 2 * WIDTH + WIDTH // 2 + INNER + 12}
    assert set(result.skipped) == {"hidden"}
    assert result.skipped["hidden"] == "it is an input of the model (node x)"


def test_the_comparison_rejects_scales_that_are_not_undone(monkeypatch, layer):
    _, program, batches = layer
    monkeypatch.setattr("paretoc.passes.smooth.scale", _half)
    after, _ = smoothed(program, batches)
    assert distance(program, after, [batches[0]]) > 1e-2


def _half(edits, axis, factors):
    for use in axis.uses:
        if not use.sums:
            edits[use.operand] = (edits[use.operand].movedim(use.dim, -1) * use.spread(factors)).movedim(-1, use.dim)


@pytest.mark.parametrize("weights", [None, "Affine(bits=3, group=8)"])
def test_awq_against_a_slow_search(layer, weights):
    model, program, batches = layer
    after, _ = smoothed(program, batches, rule="awq", weights=weights, targets=("q", "k", "v"))
    assert distance(program, after, [batches[0]]) < 1e-5
    rows = seen(model, batches)
    encoding = Affine(4, 16, symmetric=False) if weights is None else Affine(3, 8)

    def loss(scale: Tensor) -> float:
        total = 0.0
        for name in "qkv":
            weight = model.get_parameter(f"{name}.weight").detach().double()
            scaled = (weight * scale).float()
            stored = encoding.decode(encoding.encode(scaled), tuple(scaled.shape)).double()
            total += float((rows[name] / scale @ stored.T - rows[name] @ weight.T).square().sum())
        return total

    candidates = []
    for step in range(20):
        scale = rows["q"].abs().mean(0).clamp(min=1e-4) ** (step / 20)
        candidates.append(scale / (scale.max() * scale.min()).sqrt())
    best = min(candidates, key=loss)
    found = (program.get("norm1.weight") / after.get("norm1.weight")).detach()
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-6)
    assert loss(best) < loss(torch.ones(WIDTH))
    assert float(found.max() / found.min()) > 1.5


def test_an_encoding_that_does_not_fit_is_named(layer, refused):
    _, program, batches = layer
    sentence = "group size 8 does not divide the input width 12"
    error = refused(OptionError, sentence, lambda: smoothed(program, batches, rule="awq", weights="Affine(3, 8)"))
    assert error.where.startswith("pass 'smooth', node linear_8 (aten.linear.default) in head from ")


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_give_their_bias_too(norm):
    model, x = Layer(norm).eval(), torch.randn(2, 7, WIDTH)
    for each in (model.norm1, model.norm2):
        if norm is nn.LayerNorm:
            nn.init.normal_(each.bias)
    program = pc.capture(model, x)
    canonicalize(program)
    after, _ = smoothed(program, [x], alpha=0.7)
    assert distance(program, after, [x]) < 1e-5
    if norm is nn.LayerNorm:
        scale = program.get("norm1.weight") / after.get("norm1.weight")
        torch.testing.assert_close(after.get("norm1.bias") * scale, program.get("norm1.bias"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel"])
def test_transformers(captured, name):
    _, program = captured(name)
    after, step = program.clone(), Smooth()
    result = step.apply(after, Context(gather(after, step.needs(after), [program.example])))
    for want, got in zip(program.run(program.example), after.run(program.example), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if name == "BertModel":  # post-norm: the stream keeps what a norm gives
        assert [path.rpartition("attention.")[2] for path in result.matched] == ["output.dense"] * 2
        reasons = {path.rpartition("layer.1.")[2]: reason for path, reason in result.skipped.items()}
        assert reasons["attention.self.query"].startswith("a norm reads it (node layer_norm")
        assert reasons["output.dense"] == "aten.gelu.default does not commute with it (node gelu_1)"
    else:
        assert len(result.matched) == 3 * 5 + 1
        assert all("fc2" in path for path in result.skipped)


def test_it_may_follow_a_rotation(layer):
    """The norms have no weight then: they get one."""
    _, program, batches = layer
    turned = program.clone()
    Rotate(stream=False).apply(turned, Context())
    model = nn.Sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 4)).eval()
    x = torch.randn(3, 6)
    before = pc.capture(model, x)
    canonicalize(before)
    after = before.clone()
    Rotate().apply(after, Context())
    assert "1.weight" not in after.weights()
    after, result = smoothed(after, [x])
    assert result.matched == ["2"]
    assert after.get("1.weight").shape == (16,)
    assert distance(before, after, [x]) < 1e-5
    assert distance(program, smoothed(turned, batches)[0], [batches[0]]) < 1e-5


def test_channels_that_calibration_never_saw_stay(layer):
    _, program, batches = layer
    dead = [b * (torch.arange(WIDTH) > 3) for b in batches]
    after, _ = smoothed(program, dead, targets=("q", "k", "v"))
    ratio = program.get("norm1.weight") / after.get("norm1.weight")
    assert (ratio[:4] == 1).all()
    assert (ratio[4:] != 1).all()
    assert distance(program, after, [batches[0]]) < 1e-5


def test_the_pattern_of_a_pruned_weight_survives(layer):
    _, program, batches = layer
    pruned = program.clone()
    PruneNM().apply(pruned, Context())
    after, _ = smoothed(pruned, batches, alpha=0.9)
    assert distance(pruned, after, [batches[0]]) < 1e-5
    for before, now in zip(weight_sites(pruned), weight_sites(after), strict=True):
        encoding = after.encoding(now.weight)
        assert encoding == pruned.encoding(before.weight)
        if isinstance(encoding, NM):
            assert torch.equal(after.weight_value(now.weight) != 0, pruned.weight_value(before.weight) != 0)


# -- where nothing takes the factors -------------------------------------------------------------------------


class PostNorm(nn.Module):
    """A norm that a residual sum reads too; GELU: nothing before these layers commutes with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        nn.init.uniform_(self.norm.weight, 0.2, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return self.norm(n + self.down(F.gelu(self.left(n)) + self.right(n).sigmoid()))


@pytest.fixture
def post_norm():
    """(model, program, 3 batches)"""
    model = PostNorm().eval()
    batches = [torch.randn(2, 7, WIDTH) for _ in range(3)]
    program = pc.capture(model, batches[0])
    canonicalize(program)
    return model, program, batches


def multiplications(program) -> list[torch.fx.Node]:
    return program.calls(torch.ops.aten.mul.Tensor)


def test_a_multiplication_is_inserted_where_nothing_takes_the_factors(post_norm):
    model, program, batches = post_norm
    with pytest.raises(PassError, match="insert=true"):
        smoothed(program, batches, alpha=0.7)
    after, result = smoothed(program, batches, alpha=0.7, insert=True)
    assert distance(program, after, [batches[0]]) < 1e-5
    assert result.matched == ["left", "right", "down"]
    assert result.skipped == {}
    assert result.metrics == {"axes": 2, "channels": WIDTH + INNER}
    rows = seen(model, batches)
    for readers in (["left", "right"], ["down"]):
        columns = torch.stack([model.get_submodule(r).weight.detach().abs().amax(0) for r in readers]).amax(0)
        scales = rows[readers[0]].abs().amax(0) ** 0.7 / columns**0.3
        for reader in readers:
            want = model.get_submodule(reader).weight.detach() * scales
            torch.testing.assert_close(after.get(f"{reader}.weight").double(), want.double(), rtol=1e-4, atol=1e-7)
    # one for both readers of the norm, and none on the way to the residual sum
    assert [len(node.users) for node in multiplications(after)] == [2, 1]
    assert torch.equal(after.get("norm.weight"), program.get("norm.weight"))
    assert distance(program, after, [10 * batches[1]]) < 1e-5


def test_a_forgotten_multiplication_does_not_pass(monkeypatch, post_norm):
    _, program, batches = post_norm
    monkeypatch.setattr("paretoc.passes.smooth._multiply", lambda *_: None)
    after, _ = smoothed(program, batches, insert=True)
    assert distance(program, after, [batches[0]]) > 1e-2


def test_what_a_norm_can_take_is_not_inserted(layer):
    _, program, batches = layer
    after, result = smoothed(program, batches, insert=True)
    before = smoothed(program, batches)[0]
    assert result.skipped == {}  # the input of the model too
    assert len(multiplications(after)) == len(multiplications(before)) + 1
    assert distance(program, after, [batches[0]]) < 1e-5


def test_two_passes_insert_two_multiplications_behind_one_value(post_norm):
    _, program, batches = post_norm
    after, _ = smoothed(program, batches, alpha=0.8, insert=True, targets=("left",))
    after, _ = smoothed(after, batches, alpha=0.3, insert=True, targets=("right",))
    assert distance(program, after, [batches[0]]) < 1e-5
    one, other = (after.get(node.args[1].target) for node in multiplications(after))
    assert not torch.allclose(one, other)


def test_awq_may_insert_too(post_norm):
    _, program, batches = post_norm
    after, result = smoothed(program, batches, rule="awq", insert=True)
    assert distance(program, after, [batches[0]]) < 1e-5
    assert result.matched == ["left", "right", "down"]


def test_stored_weights_keep_their_inputs(post_norm):
    _, program, batches = post_norm
    stored = program.clone()
    Quantize("W8A16", targets=("left",)).apply(stored, Context())
    after, result = smoothed(stored, batches, insert=True)
    assert result.skipped["left"].startswith("its weight is already stored as")
    assert result.matched == ["right", "down"]
    assert distance(stored, after, [batches[0]]) < 1e-5


def test_inserted_factors_halve_the_error_of_static_quantisation(reference):
    """Channels of very different sizes behind GELU and behind a norm that the stream keeps."""
    model = PostNorm().eval()
    with torch.no_grad():
        model.left.weight[:2] *= 30
        model.norm.weight[3] = 40
    x = torch.randn(64, WIDTH)
    errors = {}
    for passes in (["quantize:W8A8"], ["smooth:0.7,insert=true", "quantize:W8A8"]):
        compiled = reference(model, passes, x, calibration=[x])
        want = model(x).detach()
        errors[len(passes)] = float((compiled(x) - want).norm() / want.norm())
    assert errors[2] < 0.5 * errors[1]


# -- what is left alone --------------------------------------------------------------------------------------


def test_what_the_user_leaves_out_keeps_its_group(layer):
    _, program, batches = layer
    after, result = smoothed(program, batches, ignore=("k",))
    assert not {"q", "k", "v"} & set(result.matched)
    assert result.skipped["q"] == result.skipped["v"]
    assert result.skipped["q"].startswith("'k' reads it too and is left out")
    assert torch.equal(after.get("norm1.weight"), program.get("norm1.weight"))
    assert not torch.equal(after.get("norm2.weight"), program.get("norm2.weight"))


def test_quantised_and_shared_weights_are_left(layer):
    _, program, batches = layer
    quantised = program.clone()
    Quantize("W8A16", targets=("gate",)).apply(quantised, Context())
    _, result = smoothed(quantised, batches)
    assert result.skipped["up"].startswith("its weight is already stored as Affine(bits=8, group=0)")
    assert "down" in result.matched

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(self.norm(self.layer(self.norm(x)))))

    x = torch.randn(3, 8)
    shared = pc.capture(Twice().eval(), x)
    canonicalize(shared)
    with pytest.raises(PassError, match="its weight is shared with other layers"):
        smoothed(shared, [x])


def test_a_model_without_such_inputs(models, reference, refused):
    sentence = "no input can be scaled: up: it is an input of the model (node x); down: aten.gelu.default does not "
    refused(
        PassError,
        sentence,
        lambda: reference(models.Mlp(), ["smooth"], torch.randn(2, 16), calibration=[torch.randn(2, 16)]),
    )


def test_a_model_without_linears(reference, refused):
    x = torch.randn(2, 3, 8, 8)
    sentence = "no input can be scaled: the model has no linear layer"
    refused(PassError, sentence, lambda: reference(nn.Conv2d(3, 4, 3), ["smooth"], x, calibration=[x]))


def test_it_needs_calibration_data(reference, refused):
    sentence = "the pass 'smooth:0.5' needs calibration data"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    refused(CalibrationError, sentence, lambda: reference(model, ["smooth"], torch.randn(2, 4)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 1.5}, "alpha=1.5 is not a share"),
        ({"rule": "smooth"}, "there is no rule 'smooth'"),
        ({"weights": "Afine(4)"}, "no encoding is called 'Afine'"),
    ],
)
def test_wrong_options(options, sentence, refused):
    refused(OptionError, sentence, lambda: Smooth(**options))


def test_the_contract_of_a_pass():
    from paretoc.testing import check_pass

    check_pass(Smooth(rule="awq"))
