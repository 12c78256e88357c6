"""GPTQ: the sweep against a textbook with explicit inverses, its layouts against each other, and what it gains."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import paretoc as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.cholesky import inverse_factor
from paretoc.compiler.encodings import NF4, NM, Additive, Affine, Binary, Codebook, Dense, Float, Nested, Ternary
from paretoc.compiler.errors import CalibrationError, OptionError, PassError
from paretoc.compiler.protocols import Fitter
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import weight_sites
from paretoc.compiler.statistics import Hessian, WeightedHessian, Window
from paretoc.passes.fit import Gptq, Rtn
from paretoc.passes.fit.obs import sweep
from torch import Tensor, nn
from torch.nn import functional as F

quick = settings(max_examples=25, deadline=None)


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs `[N, K]` that go together, some much larger than others."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.7 * torch.randn(width, width, generator=make) / width**0.5
    return torch.randn(rows, width, generator=make) * torch.randn(width, generator=make).exp() @ mix


def gram(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def evidence(*inputs: Tensor) -> dict:
    return {Hessian: torch.stack([gram(x) for x in inputs])}


def output_error(encoding, arrays, weight: Tensor, x: Tensor) -> float:
    """‖x(Ŵ − W)ᵀ‖² / ‖xWᵀ‖²."""
    difference = (encoding.decode(arrays, tuple(weight.shape)) - weight).reshape(len(weight), -1)
    return float((x @ difference.T).square().sum() / (x @ weight.reshape(len(weight), -1).T).square().sum())


def textbook(weight, hessian, fix, *, order=None, mask=None, enter=lambda j, w: None, damp=0.01) -> Tensor:
    """Optimal Brain Surgeon, equation by equation: H⁻¹ of the columns that are left is inverted anew for each."""
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    weight, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    left = list(range(weight.shape[1])) if order is None else order.tolist()
    while left:
        j = left[0]
        enter(j, weight)
        inverse = torch.linalg.inv(hessian[left][:, left])
        result[:, j] = fix(j, weight[:, j])
        if mask is not None:
            result[:, j] *= mask[:, j]
        error = (weight[:, j] - result[:, j]) / inverse[0, 0]
        weight[:, left] -= torch.outer(error, inverse[0])
        left.pop(0)
    return result


# -- the sweep -------------------------------------------------------------------------------------------


def swept(weight, hessian, fix, *, order=None, **options):
    factor, _ = inverse_factor(hessian if order is None else hessian[order][:, order], 0.01)
    return sweep(weight, factor, fix, order=order, **options)


@quick
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    width=st.integers(1, 20),
    block=st.integers(1, 24),
    group=st.sampled_from([1, 2, 5]),
    ordered=st.booleans(),
    masked=st.booleans(),
)
def test_the_sweep_equals_the_textbook(seed, rows, width, block, group, ordered, masked):
    torch.manual_seed(seed)
    weight, hessian = torch.randn(rows, width).double(), gram(torch.randn(width + 3, width))
    order = torch.randperm(width) if ordered else None
    mask = torch.rand(rows, width) < 0.5 if masked else None
    fix = lambda j, w: (w / (0.3 + j % 3)).round() * (0.3 + j % 3)  # noqa: E731
    got = swept(weight, hessian, fix, mask=mask, group=group, order=order, block=block)
    want = textbook(weight, hessian, fix, order=order, mask=mask)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_comparison_notices_a_wrong_order_and_a_missing_error():
    weight, hessian = torch.randn(3, 8).double(), gram(correlated(20, 8))
    fix = lambda j, w: w.round()  # noqa: E731
    got = swept(weight, hessian, fix)
    assert (got - textbook(weight, hessian, fix, order=torch.arange(8).flip(0))).abs().max() > 0.1
    assert (got - weight.round()).abs().max() > 0.1
    assert (got - textbook(weight, hessian, fix, damp=0.5)).abs().max() > 0.1


@pytest.mark.parametrize(("group", "block"), [(2, 1), (2, 5), (3, 3), (4, 12), (6, 4), (12, 5)])
def test_a_group_is_entered_with_all_errors_so_far(group, block):
    weight, hessian = torch.randn(3, 12).double(), gram(correlated(30, 12))
    scales: list[Tensor] = []

    def fix(j: int, w: Tensor) -> Tensor:
        return (w / scales[-1]).round() * scales[-1]

    def enter(j: int, w: Tensor) -> None:
        if j % group == 0:
            scales.append(w[:, j : j + group].abs().amax(1) / 3)

    want = textbook(weight, hessian, fix, enter=enter)
    want_scales, scales = scales, []
    pivots = []

    def entered(j: int, w: Tensor, pivot: Tensor) -> None:
        scales.append(w.abs().amax(1) / 3)
        pivots.append(pivot)

    got = swept(weight, hessian, fix, enter=entered, group=group, block=block)
    torch.testing.assert_close(torch.stack(scales), torch.stack(want_scales), rtol=0, atol=1e-9)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    factor, _ = inverse_factor(hessian, 0.01)
    assert torch.equal(torch.cat(pivots), factor.diagonal().flip(0))


def test_entering_a_group_may_choose_its_mask():
    weight, hessian = torch.randn(3, 12).double(), gram(correlated(30, 12))
    mask = torch.rand(3, 12) < 0.5
    keep = lambda j, w: w  # noqa: E731
    got = swept(weight, hessian, keep, enter=lambda j, w, u: mask[:, j : j + 4], group=4, block=8)
    torch.testing.assert_close(got, textbook(weight, hessian, keep, mask=mask), rtol=0, atol=1e-6)
    assert torch.equal(got != 0, mask)


def test_pruning_by_the_sweep_is_nearer_than_zeroing():
    x = correlated(400, 32)
    weight, mask = torch.randn(8, 32).double(), torch.rand(8, 32) < 0.5
    pruned = swept(weight, gram(x), lambda j, w: w, mask=mask)
    kept, zeroed = ((x.double() @ (w - weight).T).square().sum() for w in (pruned, weight * mask))
    assert kept < 0.7 * zeroed


@quick
@given(seed=st.integers(0, 10**6), width=st.integers(1, 12), damp=st.sampled_from([0.0, 0.01, 1.0]))
def test_the_factor_is_that_of_the_inverse(seed, width, damp):
    torch.manual_seed(seed)
    hessian = gram(torch.randn(width + 4, width))
    factor, damping = inverse_factor(hessian, damp)
    upper = factor.flip(0, 1)
    assert torch.equal(upper, upper.triu())
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(width)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(width).double(), rtol=0, atol=1e-6)


def test_a_singular_hessian_is_damped_until_it_is_not():
    hessian = gram(torch.randn(3, 10))
    factor, damping = inverse_factor(hessian, 0.0)
    assert 0 < damping < 1e-3
    assert torch.isfinite(factor).all()
    assert inverse_factor(hessian, 0.01)[1] == 0.01
    assert inverse_factor(gram(torch.randn(12, 10)), 0.0)[1] == 0.0


def test_a_hessian_that_is_not_finite_is_refused(refused):
    hessian = gram(torch.randn(8, 4))
    hessian[1, 2] = torch.nan
    refused(PassError, "the Hessian of the calibration data is not finite", lambda: inverse_factor(hessian, 0.01))


def test_inputs_that_are_always_zero_are_rounded_and_move_nothing():
    x = correlated(50, 10)
    dead = torch.tensor([0, 4, 9])
    x[:, dead] = 0
    live = [j for j in range(10) if j not in dead]
    weight = torch.randn(4, 10).double()
    got = swept(weight, gram(x), lambda j, w: w.round())
    assert torch.equal(got[:, dead], weight[:, dead].round())
    want = textbook(weight[:, live], gram(x[:, live]), lambda j, w: w.round())
    torch.testing.assert_close(got[:, live], want, rtol=0, atol=1e-6)
    assert inverse_factor(gram(x), 0.0)[1] == 0.0  # they do not make the Hessian singular
    nothing = swept(weight, torch.zeros(10, 10), lambda j, w: w.round())
    assert torch.equal(nothing, weight.round())


# -- the fitter: encodings -------------------------------------------------------------------------------


class Textbook:
    """GPTQ for integer codes, one number after the other: scales, clip search and codes written out."""

    def __init__(self, encoding: Affine, fitter: Gptq) -> None:
        self.encoding, self.fitter = encoding, fitter

    def fit(self, weight: Tensor, hessian: Tensor, mask: Tensor | None = None) -> Tensor:
        width = weight.shape[1]
        size = width if self.encoding.group <= 0 else self.encoding.group
        if mask is not None:
            size = size * width // int(mask[0].sum()) if self.encoding.group > 0 else width
        ranges: dict[int, list[tuple[float, float]]] = {}

        def find(start: int, current: Tensor) -> None:
            kept = torch.ones_like(current, dtype=torch.bool) if mask is None else mask
            parts = [row[start : start + size][k[start : start + size]] for row, k in zip(current, kept, strict=True)]
            ranges[start // size] = [self.range(part.float()) for part in parts]

        def enter(j: int, current: Tensor) -> None:
            if not static and j % size == 0:
                find(j, current)

        def fix(j: int, column: Tensor) -> Tensor:
            return torch.tensor([self.round(w, *r) for w, r in zip(column.tolist(), ranges[j // size], strict=True)])

        static = self.fitter.act_order or self.fitter.static_groups
        if static:
            for start in range(0, width, size):
                find(start, weight.double())
        order = hessian.diagonal().argsort(descending=True) if self.fitter.act_order else None
        return textbook(weight, hessian, fix, order=order, mask=mask, enter=enter, damp=self.fitter.damp)

    def range(self, group: Tensor) -> tuple[float, float]:
        """(scale, zero) of a group: of the full range, or of the best of 31."""
        shrinks = [1.0] if self.fitter.norm is None else [1 - i / 50 for i in range(31)]
        tried = []
        for shrink in shrinks:
            if self.encoding.symmetric:
                scale, zero = float(group.abs().max()) * shrink / self.encoding.levels, 0.0
            else:
                low, high = min(0.0, float(group.min())) * shrink, max(0.0, float(group.max())) * shrink
                scale = (high - low) / self.encoding.levels
                zero = float(round(-low / scale))
            error = sum(abs(self.round(w, scale, zero) - w) ** (self.fitter.norm or 2) for w in group.tolist())
            tried.append((error, scale, zero))
        _, scale, zero = min(tried, key=lambda t: t[0])
        return scale, zero

    def round(self, weight: float, scale: float, zero: float) -> float:
        least = -self.encoding.levels if self.encoding.symmetric else 0
        return (min(max(round(weight / scale) + zero, least), self.encoding.levels) - zero) * scale


FITTERS = [
    Gptq(norm=None),
    Gptq(),
    Gptq(norm=2.0, damp=0.1, block=5),
    Gptq(act_order=True),
    Gptq(static_groups=True, norm=None),
]


@pytest.mark.parametrize("fitter", FITTERS, ids=str)
@pytest.mark.parametrize("encoding", [Affine(4), Affine(3, 6), Affine(3, 12, False), Affine(2, 0, False)], ids=str)
def test_gptq_equals_the_textbook(encoding, fitter):
    weight, x = torch.randn(3, 24), correlated(60, 24)
    got = encoding.decode(fitter.fit(encoding, weight, evidence(x)), (3, 24))
    want = Textbook(encoding, fitter).fit(weight, gram(x))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    assert not torch.allclose(got, encoding.decode(Rtn().fit(encoding, weight), (3, 24)), atol=1e-3)


@pytest.mark.parametrize("fitter", [Gptq(), Gptq(act_order=True), Gptq(norm=None)], ids=str)
@pytest.mark.parametrize("values", [Affine(4), Affine(3, 6), Affine(4, 4, False)], ids=str)
@pytest.mark.parametrize("pruned_before", [False, True])
def test_an_n_m_pattern_is_kept_and_its_values_equal_the_textbook(values, fitter, pruned_before):
    weight, x, encoding = torch.randn(3, 24), correlated(60, 24), NM(2, 4, values)
    mask = encoding.mask(weight)
    weight = weight * mask if pruned_before else weight
    arrays = fitter.fit(encoding, weight, evidence(x))
    got = encoding.decode(arrays, (3, 24))
    assert torch.equal(arrays["indices"], encoding.encode(weight)["indices"])
    assert not got[~mask].any()
    want = Textbook(values, fitter).fit(weight, gram(x), mask)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


ENCODINGS = [
    Affine(4, 16),
    Affine(3, -1),
    Affine(2, 16, False),
    Affine(4, 16, False, "float"),
    Affine(4, 16, scale="float16"),
    Affine(4, 16, scale="e8m0"),
    Affine(4, 16, scale="shift"),
    Affine(4, 16, scale="e4m3"),
    NM(2, 4, Affine(4, 8)),
    NM(1, 4, Affine(4, -1)),
    NM(2, 4, Affine(4, 8, scale="e4m3")),
    Float("e2m1", 16),
    Float("e2m1", 16, "e4m3"),
    Float("e2m1", 32, "e8m0"),
    Float("e2m1", 32, "shift"),
    Float("e4m3"),
    NM(2, 4, Float("e2m1", 16)),
    NF4(16),
    Codebook(3, 16),
    Codebook(2, per="row", scale="none"),
    Nested(8, 3, 16),
    Ternary(16),
    Binary(16),
]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_gptq_keeps_the_layout_and_beats_rounding(encoding):
    weight, x = torch.randn(16, 64), correlated(300, 64)
    for fitter in (Gptq(), Gptq(act_order=True), Gptq(clip_by_cost=True)):
        arrays = fitter.fit(encoding, weight, evidence(x))
        assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == encoding.layout((16, 64))
        rounded = output_error(encoding, Rtn().fit(encoding, weight), weight, x)
        assert output_error(encoding, arrays, weight, x) < 0.9 * rounded


def test_weights_of_low_precision_are_fitted_as_their_float32():
    weight, x, encoding = torch.randn(4, 16).bfloat16(), correlated(40, 16), Affine(4, 8)
    got, want = (Gptq().fit(encoding, w, evidence(x)) for w in (weight, weight.float()))
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_costs_in_the_clip_search_pay_in_small_groups():
    x, weight, encoding = correlated(600, 128), torch.randn(64, 128), Affine(3, 16)
    plain, costs = (
        output_error(encoding, Gptq(norm=2.0, clip_by_cost=c).fit(encoding, weight, evidence(x)), weight, x)
        for c in (False, True)
    )
    assert costs < plain


# -- convolutions ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": ((6, 4, 3, 3), Window((3, 3), (1, 1), (1, 1), (1, 1))),
    "stride, padding, dilation": ((6, 4, 2, 3), Window((2, 3), (2, 1), (0, 2), (1, 2))),
    "two groups": ((6, 2, 3, 3), Window((3, 3), (1, 1), (1, 1), (1, 1), 2)),
    "depthwise": ((4, 1, 3, 3), Window((3, 3), (1, 1), (0, 0), (1, 1), 4)),
}


@pytest.mark.parametrize("encoding", [Affine(4), Affine(3, 3), Affine(4, -1), Affine(4, 0, False)], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_a_linear_on_unfolded_inputs(case, encoding):
    shape, window = case
    weight, x = torch.randn(shape), torch.randn(3, 4, 7, 8) + torch.randn(3, 4, 1, 1)
    hessian = Hessian("x", window)
    arrays = Gptq(act_order=True).fit(encoding, weight, {Hessian: hessian.update(None, x)})
    patches = F.unfold(x, window.size, window.dilation, window.padding, window.stride).movedim(1, 2).flatten(0, 1)
    got = encoding.decode(arrays, shape).flatten(1)
    rows = shape[0] // window.groups
    if encoding.group == -1 and window.groups > 1:  # one scale for all: the parts cannot be fitted by themselves
        scale = Gptq().fit(encoding, weight.flatten(1), evidence(patches[:, : weight[0].numel()]))["scale"]
        assert torch.equal(arrays["scale"], scale)
        return
    for part, inputs in enumerate(patches.chunk(window.groups, 1)):
        own = weight.flatten(1)[part * rows : (part + 1) * rows]
        want = encoding.decode(Gptq(act_order=True).fit(encoding, own, evidence(inputs)), tuple(own.shape))
        # Gram matrices summed in float32 here and float64 there
        torch.testing.assert_close(got[part * rows : (part + 1) * rows], want, rtol=0, atol=1e-5)


def test_windows_of_one_and_three_axes_multiply_like_the_convolution():
    for rank, convolve in ((1, F.conv1d), (3, F.conv3d)):
        window = Window((3, 2, 2)[:rank], (2, 1, 1)[:rank], (1, 0, 1)[:rank], (1, 2, 1)[:rank], 2)
        x, weight = torch.randn(2, 4, *(9, 8, 7)[:rank]), torch.randn(6, 2, *window.size)
        want = convolve(x, weight, None, window.stride, window.padding, window.dilation, 2)
        got = window.columns(x) @ weight.reshape(2, 3, -1).mT  # [groups, N, O/groups]
        got = got.movedim(0, 1).reshape(2, -1, 6).movedim(2, 1).reshape(want.shape)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_sparse_convolution_keeps_its_channels_together():
    weight, x, encoding = torch.randn(6, 8, 3, 3), torch.randn(2, 8, 9, 9) + 1, NM(2, 4, Affine(4, 4))
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    arrays = Gptq().fit(encoding, weight, {Hessian: Hessian("x", window).update(None, x)})
    got = encoding.decode(arrays, tuple(weight.shape))
    # the same as a linear whose inputs have the channels last
    patches = F.unfold(x, (3, 3), 1, 1).unflatten(1, (8, 9)).transpose(1, 2).flatten(1, 2).movedim(1, 2).flatten(0, 1)
    flat = weight.movedim(1, -1).reshape(6, -1)
    want = encoding.decode(Gptq().fit(encoding, flat, evidence(patches)), tuple(flat.shape))
    torch.testing.assert_close(got.movedim(1, -1).reshape(6, -1), want, rtol=0, atol=1e-5)


# -- importance ------------------------------------------------------------------------------------------


def test_weighted_tokens_gain_and_the_others_lose():
    mixed = torch.randn(512, 64) @ (torch.randn(64, 64) + 4 * torch.eye(64))
    x, weight, encoding = mixed, torch.randn(64, 64), Affine(3)
    important = torch.arange(512) < 40
    importance = torch.where(important, 1.0, 0.005)
    hessian = WeightedHessian("x", importance=None)
    weighted = {WeightedHessian: hessian.update(None, x.unsqueeze(0), importance.unsqueeze(0))}
    want = gram(x * importance.sqrt().unsqueeze(1))
    torch.testing.assert_close(weighted[WeightedHessian][0], want, rtol=1e-4, atol=0.1)
    uniform, rsq = (Gptq().fit(encoding, weight, e) for e in (evidence(x), weighted))
    on = lambda arrays, rows: output_error(encoding, arrays, weight, rows)  # noqa: E731
    assert on(rsq, x[important]) < 0.7 * on(uniform, x[important])
    assert on(uniform, x[important]) < 0.7 * on(encoding.encode(weight), x[important])
    assert on(rsq, x) > 1.1 * on(uniform, x)


def test_tokens_are_weighed_by_the_attention_of_their_own_layer(models):
    model = models.Vit(depth=2, pool="class").eval()
    program = pc.capture(model, torch.randn(2, 16, 12))
    fitter = Gptq(importance="attention", r_min=0.1)
    needs = {site.path: fitter.needs(site) for site in weight_sites(program) if site.kind == "linear"}
    fused = program.calls(torch.ops.aten.scaled_dot_product_attention.default)
    for block, attention in enumerate(fused):
        for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"):
            (statistic,) = needs[f"blocks.{block}.{part}"]
            assert isinstance(statistic, WeightedHessian)
            assert statistic.importance.nodes == (attention.args[0].name, attention.args[1].name)
            assert statistic.importance.least == 0.1
    for path in ("embed", "head"):  # patches without the class token, and the class token alone
        assert [type(s) for s in needs[path]] == [Hessian]
    assert {type(s) for site in weight_sites(program) if site.kind == "linear" for s in Gptq().needs(site)} == {Hessian}


# -- through compile -------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_gptq_lowers_the_error_of_a_compiled_model(reference):
    model, x = Deep(), correlated(512, 64)
    data = [x[:200], x[200:400]]
    fresh = x[400:]
    error = {}
    want = model(fresh).detach()
    for text in ("fitter=rtn", "fitter=gptq", "fitter=gptq,sequential=false", "fitter=gptq(act_order=True)"):
        compiled = reference(model, [f"quantize:W3A16,{text}"], x[:2], calibration=data)
        error[text] = float((compiled(fresh) - want).square().mean())
    assert error["fitter=gptq"] < 0.6 * error["fitter=rtn"]
    assert error["fitter=gptq,sequential=false"] < 0.7 * error["fitter=rtn"]
    assert error["fitter=gptq,sequential=false"] != error["fitter=gptq"]
    assert error["fitter=gptq(act_order=True)"] < 0.6 * error["fitter=rtn"]


@pytest.mark.parametrize("sequential", [True, False])
def test_a_compiled_model_holds_what_the_fitter_gives_by_hand(reference, sequential):
    model, x = Deep(), correlated(200, 64)
    passes = [f"quantize:W4A16,fitter=gptq,sequential={str(sequential).lower()}"]
    compiled = reference(model, passes, x[:2], calibration=[x[:120], x[120:]])
    hidden, encoding = x, Affine(4, 32)
    sites = [s for s in weight_sites(compiled.program) if s.kind == "linear"]
    for layer, site in zip(model.layers, sites, strict=True):
        want = encoding.decode(Gptq().fit(encoding, layer.weight.detach(), evidence(hidden)), (64, 64))
        # H is summed in float32 there: few codes may differ, none by more than a step
        got = compiled.program.weight_value(site.weight)
        assert float(((got - want).abs() > 1e-5).double().mean()) < 0.01
        hidden = torch.relu(F.linear(hidden, got if sequential else layer.weight, layer.bias)).detach()


def test_sparse_convolutions_go_through_compile(models, reference):
    model, x = models.Cnn(), torch.randn(8, 4, 8, 8)
    pruned = reference(model, ["prune_nm:2:4"], x)(x)
    error = {}
    for fitter in ("rtn", "gptq"):
        passes = ["prune_nm:2:4", pc.Quantize("W8A16", weights=Affine(3), fitter=fitter)]
        compiled = reference(model, passes, x, calibration=[x])
        error[fitter] = float((compiled(x) - pruned).square().mean())
        stored = [str(compiled.program.encoding(site.weight)) for site in weight_sites(compiled.program)]
        assert stored == [str(NM(2, 4, Affine(3))), str(Affine(3)), str(NM(2, 4, Affine(3)))]  # the middle is depthwise
    assert error["gptq"] < 0.8 * error["rtn"]


def test_attention_importance_goes_through_compile(models, reference):
    model, x = models.Vit(depth=1), torch.randn(8, 16, 12)
    fitters = ("gptq", "gptq(importance='attention')")
    calls = [f"quantize:W4A16,group_size=4,fitter={fitter}" for fitter in fitters]
    compiled = [reference(model, [call], x, calibration=[x[:5], x[5:]]) for call in calls]
    plain, weighted = (c.program.weights() for c in compiled)
    different = {name for name in plain if name.endswith("codes") and not torch.equal(plain[name], weighted[name])}
    codes = {name for name in plain if name.endswith("codes")}
    assert different == codes - {"embed.weight.codes"}  # the head reads what the layers before make of the data
    # the class token of ten images does not fill the space: that is a warning of its own
    given = [c.report(latency=False).passes[-1]["warnings"] for c in compiled]
    warnings = [[w for w in each if "singular" not in w] for each in given]
    sentence = "what it reads are no tokens of an attention: all count alike"
    assert warnings == [[], [f"embed: {sentence}", f"head: {sentence}"]]


def test_a_run_that_was_killed_weighs_tokens_as_it_would_have(models, reference, tmp_path):
    """The importance of a layer is that before any of it was rounded, also when its first weights come from disk."""
    model, x = models.Vit(depth=1), torch.randn(4, 16, 12)

    def stored(directory) -> dict[str, Tensor]:
        fitter = Gptq(importance="attention")
        step = pc.Quantize("W4A16", weights=Affine(2), targets=("blocks.*",), fitter=fitter, checkpoint=directory)
        return reference(model, [step], x, calibration=[x], verify=False).program.weights()

    whole = stored(str(tmp_path))
    files = sorted(tmp_path.iterdir(), key=lambda f: f.stat().st_mtime_ns)
    assert len(files) == 4
    files[-1].unlink()
    again = stored(str(tmp_path))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_without_calibration_it_says_what_it_needs(reference, refused):
    call = lambda: reference(Deep(), ["quantize:W4A16,fitter=gptq"], torch.randn(2, 64))  # noqa: E731
    error = refused(CalibrationError, "the pass 'quantize:W4A16,fitter=gptq' needs calibration data", call)
    assert error.fix.startswith("pass calibration=[batch, …] to compile")


@pytest.mark.parametrize("executor", [None, ThreadPoolExecutor(2)], ids=["here", "threads"])
def test_a_singular_hessian_is_a_warning_of_the_pass(reference, executor):
    x = torch.randn(3, 64)
    bad, good = (
        reference(Deep(), ["quantize:W4A16,fitter=gptq"], x, calibration=[data], executor=executor)
        for data in (x, torch.randn(300, 64))
    )
    warnings = bad.report(latency=False).passes[-1]["warnings"]
    assert [w.split(":")[0] for w in warnings] == ["layers.0", "layers.1", "layers.2"]
    assert "the Hessian of its inputs is singular" in warnings[0]
    assert good.report(latency=False).passes[-1]["warnings"] == []
    assert torch.isfinite(bad(x)).all()


def test_outside_of_a_pass_the_warning_is_an_ordinary_one():
    with pytest.warns(UserWarning, match="of the mean of the diagonal of the Hessian was added to it"):
        Gptq(damp=0.0).fit(Affine(4), torch.randn(2, 8), evidence(torch.randn(3, 8)))


# -- refusals --------------------------------------------------------------------------------------------


def test_what_has_no_groups_on_columns_is_refused():
    assert [Gptq().refuse(e) for e in (Affine(4), NM(2, 4, Affine(4, 8)), NM(2, 4, Affine(4)))] == [None] * 3
    sentence = "fitter 'gptq' rounds under the scales of groups; Dense(dtype='float32') has none"
    assert Gptq().refuse(Dense()) == sentence
    for encoding in (NM(2, 4), Additive(), NM(2, 4, Additive())):
        assert Gptq().refuse(encoding).endswith("has none")
    assert Gptq().refuse(NM(3, 4, Affine(4, 8))) == (
        "fitter 'gptq' needs scales that lie on whole columns; a group of 8 values is no multiple of the 3 kept of 4"
    )


def test_a_pattern_found_in_the_model_is_refused_with_its_site(reference, refused):
    passes = ["prune_nm:3:4", "quantize:W4A16,group_size=16,fitter=gptq"]
    call = lambda: reference(Deep(), passes, torch.randn(2, 64), calibration=[torch.randn(2, 64)])  # noqa: E731
    error = refused(OptionError, "a group of 16 values is no multiple of the 3 kept of 4", call)
    assert "site linear 'layers.0'" in error.where


def test_evidence_that_is_missing_is_named(refused):
    refused(PassError, "the fitter was given no Hessian", lambda: Gptq().fit(Affine(4), torch.randn(2, 8)))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"damp": -0.1}, "damp=-0.1 is not valid"),
        ({"block": 0}, "block=0 is not valid"),
        ({"norm": 0.0}, "norm=0.0 is not valid"),
        ({"importance": "entropy"}, "importance='entropy' is not valid"),
        ({"r_min": 0.0}, "r_min=0.0 is not valid"),
    ],
)
def test_options_are_checked(refused, options, sentence):
    refused(OptionError, sentence, lambda: Gptq(**options))


def test_it_is_registered():
    assert registry().fitter("gptq") == Gptq()
    assert registry().fitter("gptq(act_order=True, norm=None)") == Gptq(act_order=True, norm=None)
    assert isinstance(Gptq(), Fitter)
