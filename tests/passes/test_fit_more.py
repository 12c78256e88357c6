"""HQQ, AWQ's clip search and AdaRound: each against a slow implementation, what it gains, what it refuses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import NM, Affine, Codebook, Dense, Float
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.protocols import Fitter
from paretoc.compiler.registry import registry
from paretoc.compiler.statistics import Hessian, Sample, Window
from paretoc.passes import Quantize
from paretoc.passes.fit import AdaRound, Awq, Gptq, Hqq, Mse, Rtn
from paretoc.passes.fit.adaround import _Problem
from paretoc.passes.fit.matrix import Matrix
from torch import Tensor

quick = settings(max_examples=20, deadline=None)
FLOAT_ZERO = Affine(4, 16, symmetric=False, zero="float")


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs `[N, K]` that go together, some much larger than others."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.7 * torch.randn(width, width, generator=make) / width**0.5
    return torch.randn(rows, width, generator=make) * torch.randn(width, generator=make).exp() @ mix


def evidence(*inputs: Tensor) -> dict:
    return {
        Hessian: torch.stack([x.double().T @ x.double() for x in inputs]),
        Sample: torch.stack(inputs),
    }


def output_error(encoding, arrays, weight: Tensor, x: Tensor) -> float:
    """‖x(Ŵ − W)ᵀ‖²."""
    difference = (encoding.decode(arrays, tuple(weight.shape)) - weight).reshape(len(weight), -1)
    return float((x @ difference.T).double().square().sum())


# -- HQQ -------------------------------------------------------------------------------------------------


def slow_hqq(group: np.ndarray, bits: int, fitter: Hqq) -> tuple[np.ndarray, list[float]]:
    """(Ŵ of the best zero point, the p-norms on the way) of one group, a number at a time, in float64."""
    low, high, top = group.min(), group.max(), 2**bits - 1
    scale = np.float64(np.float32((high - low) / np.float32(top)))
    zero, beta = -low / scale, fitter.beta
    tried: list[tuple[float, np.ndarray]] = []
    for _ in range(fitter.iterations + 1):
        codes = [min(max(round(w / scale + zero), 0), top) for w in group]
        decoded = np.array([scale * (q - zero) for q in codes])
        tried.append((float(sum(abs(w - d) ** fitter.norm for w, d in zip(group, decoded, strict=True))), decoded))
        moved = []
        for w, q, d in zip(group, codes, decoded, strict=True):
            error = (w - d) / scale
            size = abs(error)
            outlier = np.sign(error) * max(size - (size ** (fitter.norm - 1) / beta if size else np.inf), 0)
            moved.append(q - (w / scale - outlier))
        zero, beta = float(np.mean(moved)), beta * fitter.growth
    return min(tried, key=lambda t: t[0])[1], [t[0] for t in tried]


@pytest.mark.parametrize("fitter", [Hqq(), Hqq(norm=0.5, beta=3.0, growth=1.1, iterations=7)], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_equals_a_slow_loop(bits, fitter):
    weight, encoding = torch.randn(3, 32) ** 3 * 0.03, Affine(bits, 16, symmetric=False, zero="float")
    got = encoding.decode(fitter.fit(encoding, weight), (3, 32)).reshape(-1, 16)
    moved = 0
    for row, group in zip(got, weight.reshape(-1, 16).double().numpy(), strict=True):
        want, norms = slow_hqq(group, bits, fitter)
        np.testing.assert_allclose(row.numpy(), want, rtol=0, atol=1e-6 * float(np.abs(group).max()))
        moved += min(norms) < norms[0]
    assert moved >= 2


def p_norm(encoding, fitter, weight: Tensor) -> Tensor:
    """Σ|w − ŵ|^0.7 of each group."""
    error = encoding.decode(fitter.fit(encoding, weight), tuple(weight.shape)) - weight
    return error.double().abs().pow(0.7).reshape(encoding.grid(tuple(weight.shape))).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 0.03, 1e3])
def test_hqq_lowers_the_norm_of_every_group_at_every_magnitude(scale):
    weight = torch.distributions.Laplace(0.0, scale).sample((32, 64))
    hqq, rtn = (p_norm(FLOAT_ZERO, fitter, weight) for fitter in (Hqq(), Rtn()))
    assert (hqq <= rtn).all()
    assert hqq.sum() < 0.97 * rtn.sum()


@quick
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16),
    bits=st.integers(1, 8),
    group=st.sampled_from([-1, 0, 4]),
)
def test_hqq_is_never_worse_than_rounding(values, bits, group):
    weight, encoding = torch.tensor(values).reshape(2, 8), Affine(bits, group, symmetric=False, zero="float")
    hqq, rtn = (p_norm(encoding, fitter, weight) for fitter in (Hqq(), Rtn()))
    assert torch.isfinite(hqq).all()
    # compared in float64, chosen in float32
    assert (hqq <= rtn * (1 + 1e-3) + 1e-3 * weight.abs().max().double() ** 0.7).all()


def test_hqq_refuses_zero_points_that_are_whole():
    assert Hqq().refuse(FLOAT_ZERO) is None
    assert Hqq().refuse(NM(2, 4, FLOAT_ZERO)) is None
    sentence = "fitter 'hqq' moves zero points by parts of a step; {} has none that are not whole"
    for encoding in (Affine(4), Affine(4, 16, symmetric=False), Dense()):
        assert Hqq().refuse(encoding) == sentence.format(encoding)


def test_hqq_through_compile(models, reference, refused):
    model, x = models.Mlp(32, 64, 32), torch.randn(4, 32)
    compiled = reference(model, [Quantize("W4A16", fitter="hqq", weights=FLOAT_ZERO)], x)
    want = FLOAT_ZERO.decode(Hqq().fit(FLOAT_ZERO, model.up.weight.detach()), (64, 32))
    up = next(n for n in compiled.program.calls(torch.ops.paretoc.decode.default) if n.meta["parameter"] == "up.weight")
    assert torch.equal(compiled.program.weight_value(up), want)
    refused(OptionError, "moves zero points", lambda: reference(model, ["quantize:W4A16,fitter=hqq"], x))


# -- AWQ's clip search -----------------------------------------------------------------------------------


def slow_clip(encoding: Affine, weight: Tensor, x: Tensor) -> Tensor:
    """For each row and group the best of ten ranges, by the outputs it gives on x."""
    size = encoding.group or weight.shape[1]
    result = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            own, inputs = weight[row, start : start + size], x[:, start : start + size].double()
            tried = []
            for i in range(10):
                limit = float(own.abs().max()) * (1 - i / 20)
                scale = limit / encoding.levels
                codes = (own.double() / scale).round().clamp(-encoding.levels, encoding.levels)
                tried.append((float((inputs @ (codes * scale - own)).square().sum()), codes * scale))
            result[row, start : start + size] = min(tried, key=lambda t: t[0])[1]
    return result


@pytest.mark.parametrize("encoding", [Affine(3), Affine(4, 8), Affine(2, 16)], ids=str)
def test_awq_equals_a_slow_search(encoding):
    weight, x = torch.randn(5, 32), correlated(100, 32)
    got = encoding.decode(Awq().fit(encoding, weight, evidence(x)), (5, 32))
    torch.testing.assert_close(got, slow_clip(encoding, weight, x), rtol=0, atol=1e-5)
    assert not torch.allclose(got, encoding.decode(Mse().fit(encoding, weight), (5, 32)), atol=1e-3)


AWQ_ENCODINGS = [Affine(3), Affine(3, -1), Affine(3, 16, False), Affine(3, 16, scale="e4m3"), NM(2, 4, Affine(3, 8))]
AWQ_ENCODINGS += [Float("e2m1"), Float("e2m1", 16, "e4m3"), Codebook(3, 16)]


@pytest.mark.parametrize("encoding", AWQ_ENCODINGS, ids=str)
def test_awq_keeps_the_layout_and_beats_rounding(encoding):
    weight, x = torch.randn(16, 64), correlated(300, 64)
    arrays = Awq().fit(encoding, weight, evidence(x))
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == encoding.layout((16, 64))
    # of the pruned weight under a pattern: the pruning is not the fitter's
    target = weight * encoding.mask(weight) if isinstance(encoding, NM) else weight
    rounded = output_error(encoding, Rtn().fit(encoding, weight), target, x)
    assert output_error(encoding, arrays, target, x) < 0.9 * rounded


def test_awq_on_a_grouped_convolution_is_awq_on_each_part():
    weight, x, encoding = torch.randn(6, 2, 3, 3), torch.randn(2, 4, 6, 6), Affine(3, 9)
    columns = Window((3, 3), (1, 1), (1, 1), (1, 1), 2).columns(x)
    got = encoding.decode(Awq().fit(encoding, weight, {Sample: columns}), (6, 2, 3, 3)).flatten(1)
    for part, inputs in enumerate(columns):
        own = weight.flatten(1)[3 * part : 3 * part + 3]
        want = encoding.decode(Awq().fit(encoding, own, evidence(inputs)), (3, 18))
        torch.testing.assert_close(got[3 * part : 3 * part + 3], want)


def test_awq_on_a_sparse_convolution_has_the_channels_last():
    weight, x, encoding = torch.randn(3, 8, 3, 3), torch.randn(2, 8, 6, 6), NM(2, 4, Affine(3, 4))
    columns = Window((3, 3), (1, 1), (1, 1), (1, 1)).columns(x) * torch.randn(72).exp()
    got = encoding.decode(Awq().fit(encoding, weight, {Sample: columns}), (3, 8, 3, 3))
    flat = weight.movedim(1, -1).reshape(3, 72)
    inputs = columns[0].unflatten(1, (8, 9)).transpose(1, 2).flatten(1)
    want = encoding.decode(Awq().fit(encoding, flat, evidence(inputs)), (3, 72))
    torch.testing.assert_close(got.movedim(1, -1).reshape(3, 72), want)


def test_awq_through_compile(models, reference):
    model, x = models.Mlp(64, 128, 64), correlated(256, 64)
    want, error = model(x).detach(), {}
    for fitter in ("rtn", "awq"):
        compiled = reference(model, [f"quantize:W3A16,fitter={fitter}"], x[:2], calibration=[x[:128], x[128:]])
        error[fitter] = float((compiled(x) - want).square().mean())
    assert error["awq"] < 0.9 * error["rtn"]


# -- AdaRound --------------------------------------------------------------------------------------------

ADAROUND_ENCODINGS = [
    Affine(3),
    Affine(2, 8, False),
    Affine(3, 8, False, "float"),
    Affine(3, -1),
    Affine(4, 8, scale="e4m3"),
    NM(2, 4, Affine(3, 8)),
]


@pytest.mark.parametrize("encoding", ADAROUND_ENCODINGS, ids=str)
def test_adaround_keeps_the_layout_and_beats_rounding(encoding):
    weight, x = torch.randn(16, 32), correlated(200, 32)
    found = evidence(x)
    arrays = AdaRound(iterations=300).fit(encoding, weight, found)
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == encoding.layout((16, 32))
    rounded = output_error(encoding, Mse().fit(encoding, weight), weight, x)
    assert output_error(encoding, arrays, weight, x) < 0.8 * rounded


def test_every_code_is_one_of_the_two_next_to_the_weight():
    weight, encoding = torch.randn(8, 32), Affine(4, 8)
    problem = _Problem(Matrix(encoding, weight), evidence(correlated(200, 32)))
    learned = AdaRound(iterations=300)._learned(problem)
    inside = problem.codes.abs() < encoding.levels
    up = (learned - problem.floor)[inside]
    assert set(up.tolist()) == {0.0, 1.0}
    assert ((learned - problem.codes).abs() > 0.5)[inside].any()  # some go to the farther one


def test_the_gradient_is_that_of_the_loss():
    weight, encoding = torch.randn(4, 16), NM(2, 4, Affine(3, 4, False))
    matrix = Matrix(encoding, weight)
    problem = _Problem(matrix, evidence(correlated(50, 16)))
    codes = (problem.floor + torch.rand(problem.floor.shape)).requires_grad_()
    problem.error(problem.weights(codes)).sum().backward()
    got = problem.gradient(codes.detach()) * problem.curvature * problem.scale
    torch.testing.assert_close(got, codes.grad, rtol=1e-4, atol=1e-4)


def test_adaround_finds_almost_the_best_of_all_roundings():
    """Its place among the 2⁸ roundings of a row, against that of rounding to nearest."""
    places: dict[str, list[int]] = {"learned": [], "nearest": []}
    for seed in range(6):
        torch.manual_seed(seed)
        problem = _Problem(Matrix(Affine(3), torch.randn(1, 8)), evidence(correlated(40, 8, seed)))
        loss = lambda codes: float(problem.error(problem.weights(codes)).sum())  # noqa: B023, E731
        every = torch.tensor([loss(problem.floor + torch.tensor(up)) for up in product((0.0, 1.0), repeat=8)])
        for name, codes in (("learned", AdaRound()._learned(problem)), ("nearest", problem.nearest())):
            places[name].append(int((every < loss(codes) * (1 - 1e-6)).sum()))
    assert places["learned"].count(0) >= 2
    assert sum(places["learned"]) / 6 < 10 < 25 < sum(places["nearest"]) / 6


@quick
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 6),
    group=st.sampled_from([-1, 0, 4]),
    symmetric=st.booleans(),
    rows=st.integers(1, 20),
)
def test_adaround_is_never_worse_than_rounding(seed, bits, group, symmetric, rows):
    torch.manual_seed(seed)
    weight, x, encoding = torch.randn(4, 8), torch.randn(rows, 8), Affine(bits, group, symmetric)
    x[:, 3] = 0  # an input that the data never shows
    learned, rounded = (
        output_error(encoding, fitter.fit(encoding, weight, evidence(x)), weight, x)
        for fitter in (AdaRound(iterations=20), Rtn())
    )
    assert learned <= rounded * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("encoding", [Affine(3), Affine(2, 16, False)], ids=str)
def test_adaround_beats_gptq_at_few_bits_without_outlier_channels(encoding):
    weight, x = torch.randn(32, 64), (torch.randn(400, 64) @ torch.randn(64, 64) / 8).relu()
    error = {f: output_error(encoding, f.fit(encoding, weight, evidence(x)), weight, x) for f in (AdaRound(), Gptq())}
    assert error[AdaRound()] < 0.95 * error[Gptq()]


def test_adaround_is_deterministic():
    weight, found = torch.randn(8, 16), evidence(correlated(60, 16))
    torch.manual_seed(1)
    first = AdaRound(iterations=50).fit(Affine(4), weight, found)
    torch.manual_seed(2)
    again = AdaRound(iterations=50).fit(Affine(4), weight, found)
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_adaround_through_compile(models, reference):
    model, x = models.Mlp(32, 64, 32), correlated(256, 32)
    want, error = model(x).detach(), {}
    for fitter in ("mse", "adaround(iterations=200)"):
        compiled = reference(model, [f"quantize:W3A16,fitter={fitter}"], x[:2], calibration=[x[:128], x[128:]])
        error[fitter] = float((compiled(x) - want).square().mean())
    assert error["adaround(iterations=200)"] < 0.6 * error["mse"]


# -- all of them -----------------------------------------------------------------------------------------


def test_what_they_cannot_fit_is_refused():
    for fitter in (Awq(), AdaRound()):
        assert fitter.refuse(Affine(4, 16)) is None
        assert fitter.refuse(NM(2, 4, Affine(4, 8))) is None
        sentence = f"fitter {fitter.name!r} rounds under the scales of groups; Dense(dtype='float32') has none"
        assert fitter.refuse(Dense()) == sentence
        assert fitter.refuse(NM(2, 4)).endswith("has none")
        assert "is no multiple of the 3 kept of 4" in fitter.refuse(NM(3, 4, Affine(4, 8)))


def test_adaround_is_for_whole_numbers():
    sentence = "fitter 'adaround' rounds to integers; {} has none"
    for encoding in (Float("e2m1"), NM(2, 4, Float("e2m1"))):
        assert AdaRound().refuse(encoding) == sentence.format(encoding)


def test_evidence_that_is_missing_is_named(refused):
    weight = torch.randn(2, 8)
    refused(PassError, "the fitter was given no Sample", lambda: Awq().fit(Affine(4), weight))
    refused(PassError, "the fitter was given no Hessian", lambda: AdaRound().fit(Affine(4), weight))


@pytest.mark.parametrize("option", ["iterations", "rate", "regularization"])
def test_options_are_checked(refused, option):
    refused(OptionError, f"{option}=0 is not valid", lambda: AdaRound(**{option: 0}))


@pytest.mark.parametrize("fitter", [Hqq(), Awq(), AdaRound()], ids=lambda f: f.name)
def test_they_are_registered(fitter):
    assert registry().fitter(fitter.name) == fitter
    assert isinstance(fitter, Fitter)
