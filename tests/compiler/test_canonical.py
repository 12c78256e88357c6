"""Canonical form: each rule alone, what it leaves alone, and that the numbers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from paretoc.compiler.canonical import canonicalize, fold_batch_norms, fold_constants
from paretoc.compiler.capture import capture
from paretoc.compiler.sites import BATCH_NORM, attention_sites
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


def _capture(forward, *example: Tensor, parameters: dict[str, Tensor] | None = None, buffers=None):
    """A program from a function of (self, *inputs)."""
    model = nn.Module()
    for name, value in (parameters or {}).items():
        model.register_parameter(name, nn.Parameter(value))
    for name, value in (buffers or {}).items():
        model.register_buffer(name, value)
    kind = type("Model", (nn.Module,), {"forward": forward})
    model.__class__ = kind
    return capture(model.eval(), example)


def _targets(program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function" and "sym_size" not in str(n.target)]


def _canonical_same(program, *inputs: Tensor, rtol: float = 0, atol: float = 0) -> dict[str, int]:
    """Canonicalise, with the outputs unchanged (bit for bit unless a tolerance is given)."""
    want = [t.clone() for t in program.run(inputs)]
    counts = canonicalize(program)
    for got, reference in zip(program.run(inputs), want, strict=True):
        torch.testing.assert_close(got, reference, rtol=rtol, atol=atol)
    return counts


def test_the_comparison_rejects_a_rewrite_that_changes_numbers(monkeypatch):
    program = _capture(lambda self, x: x * 2, torch.randn(2, 3))

    def wrong(program):
        program.calls(aten.mul.Tensor)[0].update_arg(1, 3)
        program.refresh()
        return {}

    monkeypatch.setitem(globals(), "canonicalize", wrong)
    with pytest.raises(AssertionError):
        _canonical_same(program, torch.randn(2, 3))


# -- what does nothing goes ------------------------------------------------------------------------------


def _dropout(self, x):
    return F.dropout(x, 0.5, self.training) + 1


def _copies(self, x):
    return x.clone().detach().contiguous() + 1


def _casts(self, x):
    return x.to(torch.float32).float() + 1


def _views(self, x):
    return x.view(x.shape[0], 6).reshape(-1, 6).expand(x.shape[0], 6) + 1


def _slices(self, x):
    return x[:, :, ...][0:] + 1


@pytest.mark.parametrize("forward", [_dropout, _copies, _casts, _views, _slices])
def test_what_does_nothing_is_removed(forward):
    x = torch.randn(3, 6)
    program = _capture(forward, x)
    _canonical_same(program, x)
    assert _targets(program) == ["aten.add.Tensor"]


def test_assertions_are_removed():
    program = _capture(lambda self, x: x.to(torch.int64).to(torch.float32) + 1, torch.randn(2, 3))
    assert any("_assert" in t for t in _targets(program))
    counts = _canonical_same(program, torch.randn(3, 3))
    assert counts["assertions"] >= 1
    assert not any("_assert" in t for t in _targets(program))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.to(torch.float16) + 1,
        lambda self, x: x.view(-1, 3) + 1,
        lambda self, x: x[:, 1:] + 1,
        lambda self, x: x.expand(4, -1, -1) + 1,
        lambda self, x: x[:, ::2] + 1,
    ],
    ids=["another dtype", "another shape", "a part", "more elements", "a step"],
)
def test_what_does_something_is_kept(forward):
    x = torch.randn(3, 6)
    program = _capture(forward, x)
    _canonical_same(program, x)
    assert len(_targets(program)) >= 2


def test_a_copy_that_a_view_relied_on_may_go():
    x = torch.randn(3, 4, 5)
    program = _capture(lambda self, x: x.transpose(1, 2).contiguous().view(x.shape[0], 20), x)
    counts = _canonical_same(program, x)
    assert counts["copies"] == 1
    assert _targets(program) == ["aten.transpose.int", "aten.reshape.default"]


# -- constants -------------------------------------------------------------------------------------------


def test_a_constant_subgraph_is_evaluated_once():
    def forward(self, x):
        mask = torch.arange(6).unsqueeze(0) >= self.limit
        return x * mask.float() + torch.ones(6)

    program = _capture(forward, torch.randn(3, 6), buffers={"limit": torch.tensor(2)})
    x = torch.randn(4, 6)
    counts = _canonical_same(program, x)
    assert counts["constants"] >= 3
    assert _targets(program) == ["aten.mul.Tensor", "aten.add.Tensor"]
    stored = [t.tolist() for name, t in program.weights().items() if name.startswith("constants.")]
    assert stored == [[[0, 0, 1, 1, 1, 1]], [1] * 6]


def test_parameters_randomness_and_large_results_are_not_folded():
    def forward(self, x):
        noise = torch.rand(4) * 0
        return x + self.weight * 2 + torch.zeros(1 << 17).sum() + noise.sum()

    program = _capture(forward, torch.randn(3, 4), parameters={"weight": torch.ones(4)})
    fold_constants(program)
    program.refresh()
    kept = _targets(program)
    assert "aten.rand.default" in kept
    assert "aten.zeros.default" in kept
    assert "weight" in program.weights()


def test_a_parameter_keeps_its_own_name(models):
    program = capture(models.Mlp(), torch.randn(2, 16))
    canonicalize(program)
    assert set(program.weights()) == {"up.weight", "up.bias", "down.weight", "down.bias"}


# -- masks that hide nothing -----------------------------------------------------------------------------


def _attention(mask):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(self, x))

    return forward


def _true(self, x):
    return (torch.arange(5) >= 0)[None, None, None].expand(x.shape[0], 1, 5, 5)


def _zero(self, x):
    return torch.where(_true(self, x), torch.zeros(()), -1e9)


@pytest.mark.parametrize("mask", [_true, _zero], ids=["boolean", "additive"])
def test_an_open_mask_is_dropped(mask):
    x = torch.randn(2, 2, 5, 4)
    program = _capture(_attention(mask), x)
    counts = _canonical_same(program, x, rtol=1e-5, atol=1e-6)  # another kernel sums in another order
    assert counts["masks"] == 1
    assert [s.mask for s in attention_sites(program)] == [None]
    assert _targets(program) == ["aten.scaled_dot_product_attention.default"]


@pytest.mark.parametrize(
    "mask",
    [
        lambda self, x: (torch.arange(5) > 0)[None, None, None].expand(x.shape[0], 1, 5, 5),
        lambda self, x: torch.where((torch.arange(5) > 0)[None, None, None], torch.zeros(()), -1e9),
        lambda self, x: torch.zeros(1, 1, 5, 5) - 1.0,
        lambda self, x: self.bias,
    ],
    ids=["boolean", "additive", "uniform but not zero", "learned"],
)
def test_a_mask_that_hides_something_is_kept(mask):
    x = torch.randn(2, 2, 5, 4)
    program = _capture(_attention(mask), x, parameters={"bias": torch.zeros(1, 1, 5, 5)})
    counts = _canonical_same(program, x)
    assert "masks" not in counts
    assert attention_sites(program)[0].mask is not None


def test_adding_zero_is_dropped_only_where_the_shape_stays():
    program = _capture(lambda self, x: x + torch.zeros(6), torch.randn(3, 6))
    _canonical_same(program, torch.randn(2, 6))
    assert _targets(program) == []
    program = _capture(lambda self, x: x + torch.zeros(5, 1), torch.randn(3, 6)[:, None])
    _canonical_same(program, torch.randn(2, 1, 6))
    assert _targets(program) == ["aten.add.Tensor"]


def test_the_mask_of_a_hugging_face_vit_is_dropped(models):
    model = models.hugging_face("ViTForImageClassification", num_hidden_layers=1)
    program = capture(model, models.images(1))
    assert attention_sites(program)[0].mask is not None
    canonicalize(program)
    assert attention_sites(program)[0].mask is None
    call = models.images(3)
    torch.testing.assert_close(program(**call).logits, model(**call).logits, rtol=1e-5, atol=1e-5)


# -- batch norms -----------------------------------------------------------------------------------------


def _folds(model: nn.Module, *example: Tensor) -> int:
    """How many batch norms fold, with the outputs kept and the original left alone."""
    program = capture(model, example)
    before = copy.deepcopy(model.state_dict())
    x = [torch.randn(5, *e.shape[1:]) for e in example]
    want = model(*x)
    count = fold_batch_norms(program)
    program.refresh()
    torch.testing.assert_close(program(*x), want, rtol=1e-5, atol=1e-5)  # float32 rounding of the new weights
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
    assert (
        len(program.calls(*BATCH_NORM))
        == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) - count
    )
    return count


def test_convolution_depthwise_and_linear_take_their_norm_in(models):
    model = models.Cnn().eval()
    assert _folds(model, torch.randn(2, 4, 8, 8)) == 3
    program = capture(model, torch.randn(2, 4, 8, 8))
    counts = canonicalize(program)
    assert counts["batch_norms"] == 3
    assert set(program.weights()) == {f"{n}.{k}" for n in ("stem", "depthwise", "head") for k in ("weight", "bias")}


@pytest.mark.parametrize(("bias", "affine"), [(True, False), (False, True)], ids=["bias", "affine"])
@pytest.mark.parametrize(
    ("convolution", "norm", "example"),
    [
        (lambda b: nn.Conv1d(4, 6, 3, bias=b), nn.BatchNorm1d, (4, 9)),
        (lambda b: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=b), nn.BatchNorm2d, (4, 7, 7)),
        (lambda b: nn.Conv3d(4, 6, 2, bias=b), nn.BatchNorm3d, (4, 4, 4, 4)),
        (lambda b: nn.Linear(4, 6, bias=b), nn.BatchNorm1d, (4,)),
    ],
    ids=["conv1d", "grouped strided conv2d", "conv3d", "linear"],
)
def test_every_kind_of_producer(models, convolution, norm, example, bias, affine):
    model = nn.Sequential(convolution(bias), norm(6, affine=affine))
    if affine:
        models.trained_norms(model)
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    assert _folds(model.eval(), torch.randn(3, *example)) == 1


class Branches(nn.Module):
    """What must not fold, by name."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        transposed = how == "transposed convolution"
        self.conv = nn.ConvTranspose2d(4, 4, 1) if transposed else nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.norm, self.norm1 = nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "two consumers":
            x = self.conv(x)
            return self.norm(x) + x
        if self.how == "an activation between":
            return self.norm(torch.relu(self.conv(x)))
        if self.how == "a shared convolution":
            return self.norm(self.conv(x)) + self.conv(x * 2)
        if self.how == "linear over tokens":
            return self.norm1(self.linear(x.flatten(2)))
        return self.norm(self.conv(x))


HOWS = [
    "two consumers",
    "an activation between",
    "a shared convolution",
    "linear over tokens",
    "transposed convolution",
]


@pytest.mark.parametrize("how", HOWS)
def test_what_must_not_fold_does_not(models, how):
    model = Branches(how)
    models.trained_norms(model)
    model.norm1 = model.norm1 if how == "linear over tokens" else nn.Identity()
    model.norm = nn.Identity() if how == "linear over tokens" else model.norm
    assert _folds(model.eval(), torch.randn(2, 4, 2, 2)) == 0


def test_a_norm_that_shares_its_own_weights_folds_into_each_convolution(models):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.norm(self.b(x))

    model = Shared()
    models.trained_norms(model)
    program = capture(model.eval(), torch.randn(2, 4, 3, 3))
    x = torch.randn(3, 4, 3, 3)
    assert fold_batch_norms(program) == 2
    program.refresh()
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


# -- as a whole ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mlp", "Cnn", "Vit", "TiedLanguageModel"])
def test_canonicalizing_twice_changes_nothing_more(models, name):
    example = {
        "Mlp": torch.randn(2, 16),
        "Cnn": torch.randn(2, 4, 8, 8),
        "Vit": torch.randn(2, 16, 12),
        "TiedLanguageModel": torch.randint(0, 48, (2, 5)),
    }[name]
    program = capture(getattr(models, name)().eval(), example)
    canonicalize(program)
    text = str(program.graph)
    assert canonicalize(program) == {}
    assert str(program.graph) == text


def test_bert_keeps_its_numbers(models, captured):
    model, program = captured("BertForSequenceClassification", num_hidden_layers=1)
    for shape in ((1, 5), (3, 9)):
        call = models.sentences(*shape)
        torch.testing.assert_close(program(**call).logits, model(**call).logits, rtol=1e-5, atol=1e-5)
    assert canonicalize(program) == {}
