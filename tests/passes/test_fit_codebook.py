"""Fitters of codebooks and of low-rank corrections: against dense least squares, brute force, and rounding."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import paretoc as pc
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import NF4, NM, Additive, Affine, Codebook, LowRank, Sum
from paretoc.compiler.encodings.additive import look_up
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.protocols import Fitter, refusal
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import weight_sites
from paretoc.compiler.statistics import Hessian, Window
from paretoc.passes.fit import AdditiveFit, Gptq, KMeans, LowRankFit, Mse, Rtn
from paretoc.passes.fit.additive import Answer, Problem, damped, fit_codebooks, fit_scales, search_codes
from paretoc.passes.fit.lowrank import weighed_factors
from torch import Tensor, nn

quick = settings(max_examples=25, deadline=None)


def correlated(samples: int, width: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions hold most."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 4, width, generator=generator)
    few, noise = (torch.randn(samples, size, generator=generator) for size in (width // 4, width))
    return few @ mixing + 0.5 * noise


def evidence_of(inputs: Tensor) -> dict[type, Tensor]:
    return {Hessian: (inputs.T @ inputs).double().unsqueeze(0)}


def output_error(encoding, arrays, weight: Tensor, inputs: Tensor) -> float:
    """Of the layer's output, relative."""
    matrix = weight.reshape(len(weight), -1)
    rest = encoding.decode(arrays, tuple(weight.shape)).reshape(matrix.shape) - matrix
    return float((inputs @ rest.T).square().sum() / (inputs @ matrix.T).square().sum())


def weight_error(encoding, arrays, weight: Tensor) -> float:
    return float((encoding.decode(arrays, tuple(weight.shape)) - weight).double().square().sum())


# -- kmeans --------------------------------------------------------------------------------------------


@quick
@given(
    bits=st.integers(1, 4),
    group=st.sampled_from([-1, 0, 4]),
    values=st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16),
)
def test_kmeans_is_never_worse_than_encoding(bits, group, values):
    weight, encoding = torch.tensor(values).reshape(2, 8), Codebook(bits, group)
    plain = weight_error(encoding, encoding.encode(weight), weight)
    fitted = weight_error(encoding, KMeans().fit(encoding, weight), weight)
    assert fitted <= plain * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("encoding", [Codebook(3, 16), Codebook(2, 0), Codebook(3, 16, "row", "float16")], ids=str)
def test_scales_by_least_squares_pay(encoding):
    weight = torch.randn(16, 128) ** 3
    plain, searched, fitted = (
        weight_error(encoding, fitter.fit(encoding, weight), weight) for fitter in (Rtn(), Mse(), KMeans())
    )
    assert fitted < 0.97 * plain
    assert fitted < searched


def test_the_hessian_weighs_the_weights():
    """Two kinds of inputs, the loud ones see only small weights: the table moves to them."""
    weight = torch.randn(8, 64)
    weight[:, ::2] *= 0.1
    inputs = torch.randn(300, 64)
    inputs[:, ::2] *= 30
    encoding, evidence = Codebook(2, scale="none"), evidence_of(inputs)
    plain, aware = KMeans().fit(encoding, weight, evidence), KMeans(hessian=True).fit(encoding, weight, evidence)
    assert output_error(encoding, aware, weight, inputs) < 0.3 * output_error(encoding, plain, weight, inputs)
    assert weight_error(encoding, aware, weight) > weight_error(encoding, plain, weight)


def test_weighing_by_equal_inputs_changes_nothing():
    weight, encoding = torch.randn(4, 32), Codebook(3, 8)
    same = {Hessian: 4 * torch.eye(32, dtype=torch.float64)[None]}
    plain, aware = KMeans().fit(encoding, weight), KMeans(hessian=True).fit(encoding, weight, same)
    assert all(torch.equal(plain[name], aware[name]) for name in plain)


def test_kmeans_fits_what_a_sparsity_pattern_keeps():
    weight, encoding = torch.randn(8, 64) ** 3, NM(2, 4, Codebook(3))
    arrays = KMeans().fit(encoding, weight)
    kept = weight[encoding.mask(weight)].reshape(8, 32)
    want = KMeans().fit(Codebook(3), kept)
    assert all(torch.equal(arrays[f"values.{name}"], want[name]) for name in want)
    assert KMeans(hessian=True).fit(encoding, weight, evidence_of(torch.randn(100, 64))).keys() == arrays.keys()


def test_error_feedback_works_under_one_table():
    """GPTQ: what one code of a table loses, the next make up for."""
    weight, inputs = torch.randn(32, 64), correlated(400, 64)
    for encoding in (Codebook(3), Codebook(3, 16), Codebook(3, 16, "row"), NF4(16)):
        arrays = Gptq().fit(encoding, weight, evidence_of(inputs))
        rounded = encoding.encode(weight)
        gained = output_error(encoding, arrays, weight, inputs) / output_error(encoding, rounded, weight, inputs)
        assert gained < 0.6, encoding


# -- additive: its parts -------------------------------------------------------------------------------


def problem_of(rows: int, width: int, groups: int = 1, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    inputs = [correlated(80, width, seed + g) for g in range(groups)]
    return Problem(weight, torch.stack([x.T @ x / 80 for x in inputs]))


def answer_of(problem: Problem, encoding: Additive) -> Answer:
    codes, books, scale = encoding.load(encoding.encode(problem.weight), tuple(problem.weight.shape))
    return Answer(codes.long(), books, scale * (1 + 0.2 * torch.rand(scale.shape)))


def slow_error(problem: Problem, answer: Answer) -> float:
    """Row by row, each under the H of its group, in float64."""
    total, per_group = 0.0, len(problem.weight) // len(problem.hessian)
    for o, row in enumerate(problem.weight.double()):
        values = sum(answer.books[m].double()[code] for m, code in enumerate(answer.codes[o])).reshape(-1)
        rest = row - answer.scale[o].double() * values
        total += float(rest @ problem.hessian[o // per_group].double() @ rest)
    return total


@pytest.mark.parametrize("groups", [1, 2])
def test_the_error_equals_a_slow_one(groups):
    problem = problem_of(6, 12, groups)
    answer = answer_of(problem, Additive(2, 3, 4))
    assert problem.error(answer) == pytest.approx(slow_error(problem, answer), rel=1e-5)
    other = Answer(answer.codes.roll(1, 0), answer.books, answer.scale)
    assert problem.error(other) != pytest.approx(slow_error(problem, answer), rel=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_scales_are_least_squares(groups):
    problem = problem_of(6, 12, groups)
    answer = answer_of(problem, Additive(1, 3, 4))
    fitted = fit_scales(problem, answer)
    for o in range(6):
        root = torch.linalg.cholesky(problem.hessian[o // (6 // groups)].double())
        values = (answer.rows[o].double() @ root).unsqueeze(1)
        expected = torch.linalg.lstsq(values, problem.weight[o].double() @ root).solution
        torch.testing.assert_close(fitted.scale[o].double(), expected, rtol=1e-4, atol=1e-5)
    assert problem.error(fitted) < problem.error(answer)


def dense_least_squares(problem: Problem, answer: Answer) -> float:
    """The error of the best codebooks, by a dense design matrix: one unknown for each number in them."""
    design, target = [], []
    count, entries, width = answer.books.shape
    per_group = len(problem.weight) // len(problem.hessian)
    for o, row in enumerate(problem.weight.double().numpy()):
        root = np.linalg.cholesky(problem.hessian[o // per_group].double().numpy())
        places = np.zeros((len(row), count * entries * width))
        for m, g in product(range(count), range(answer.codes.shape[2])):
            for i in range(width):
                places[g * width + i, (m * entries + int(answer.codes[o, m, g])) * width + i] += float(answer.scale[o])
        design.append(root.T @ places)
        target.append(root.T @ row)
    a, b = np.concatenate(design), np.concatenate(target)
    return float(np.square(a @ np.linalg.lstsq(a, b, rcond=None)[0] - b).sum())


@pytest.mark.parametrize(("groups", "encoding"), [(1, Additive(1, 2, 4)), (2, Additive(2, 2, 2))])
def test_codebooks_are_least_squares(groups, encoding):
    problem = problem_of(10, 12, groups)
    answer = answer_of(problem, encoding)
    best = dense_least_squares(problem, answer)
    errors = [problem.error(fit_codebooks(problem, answer, steps)) for steps in (1, 4, 16)]
    assert problem.error(answer) > errors[0] > errors[1] >= errors[2] * (1 - 1e-4)
    assert errors[2] == pytest.approx(best, rel=1e-3)
    assert errors[0] > 1.01 * best  # a single step is not enough: the reference says more than "smaller"


def brute_force(problem: Problem, answer: Answer) -> list[float]:
    """The least error of each row over every code of the only group of weights."""
    count, entries, _ = answer.books.shape
    choices = torch.tensor(list(product(range(entries), repeat=count)))
    values = look_up(choices.unsqueeze(2), answer.books)
    errors = []
    for row, scale in zip(problem.weight, answer.scale, strict=True):
        rest = row - scale * values
        errors.append(float(((rest @ problem.hessian[0]) * rest).sum(1).min()))
    return errors


def test_a_full_beam_finds_the_best_codes():
    problem = problem_of(12, 4)
    answer = Answer(torch.randint(0, 8, (12, 2, 1)), torch.randn(2, 8, 4), torch.rand(12, 1) + 0.5)
    found = search_codes(problem, answer, beam=8)
    best = brute_force(problem, answer)
    assert problem.error(found) == pytest.approx(sum(best), rel=1e-4)
    greedy = problem.error(search_codes(problem, answer, beam=1))
    assert sum(best) * (1 + 1e-4) < greedy <= problem.error(answer)


@quick
@given(st.integers(0, 1000), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(1, 3))
def test_no_step_makes_the_error_larger(seed, beam, groups, count):
    problem = problem_of(8, 12, groups, seed)
    answer = answer_of(problem, Additive(count, 2, 4))
    errors = [problem.error(answer)]
    for _ in range(2):
        for step in (lambda a: fit_codebooks(problem, a, 3), lambda a: fit_scales(problem, a)):
            answer = step(answer)
            errors.append(problem.error(answer))
        answer = search_codes(problem, answer, beam)
        errors.append(problem.error(answer))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors)), errors


def test_rows_may_be_searched_in_chunks(monkeypatch):
    problem = problem_of(12, 8, 2)
    answer = answer_of(problem, Additive(2, 3, 4))
    whole = search_codes(problem, answer, 2)
    monkeypatch.setattr("paretoc.passes.fit.additive._CHUNK", 100)
    assert torch.equal(search_codes(problem, answer, 2).codes, whole.codes)


def test_damping_makes_the_mean_of_the_diagonal_one():
    hessian = damped(torch.diag(torch.tensor([1.0, 3.0, 0.0])).double()[None], 0.5)
    torch.testing.assert_close(hessian[0].diagonal(), torch.tensor([0.75, 2.25, 0.0]) + 0.5)
    assert torch.isfinite(damped(torch.zeros(1, 3, 3), 0.01)).all()


# -- additive: the whole -------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [Additive(1, 6, 8), Additive(2, 4, 4), Additive(1, 5, 4, "float32")], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_calibration_is_better_than_where_it_starts(encoding, seed):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(seed))
    inputs = correlated(300, 64, seed)
    unseen = correlated(900, 64, seed)[300:]
    start = encoding.encode(weight)
    arrays = AdditiveFit().fit(encoding, weight, evidence_of(inputs))
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == encoding.layout((48, 64))
    for x in (inputs, unseen):
        assert output_error(encoding, arrays, weight, x) < 0.5 * output_error(encoding, start, weight, x)
    again = AdditiveFit().fit(encoding, weight, evidence_of(inputs))
    assert all(torch.equal(arrays[name], again[name]) for name in arrays)


def test_a_wider_beam_is_better():
    weight, inputs, encoding = torch.randn(64, 64), correlated(300, 64), Additive(3, 4, 8)
    narrow, wide = (
        output_error(encoding, AdditiveFit(beam=beam).fit(encoding, weight, evidence_of(inputs)), weight, inputs)
        for beam in (1, 8)
    )
    assert wide < narrow


def test_grouped_convolutions_have_a_hessian_for_each_group():
    weight, x = torch.randn(8, 4, 3), torch.randn(16, 8, 20)
    window = Window((3,), (1,), (1,), (1,), groups=2)
    hessian = Hessian("x", window).update(None, x)
    encoding, evidence = Additive(1, 4, 4), {Hessian: hessian}
    columns = window.columns(x)

    def error(arrays):
        rest = (encoding.decode(arrays, (8, 4, 3)) - weight).reshape(2, 4, 12)
        return float((columns @ rest.mT).square().sum())

    fitted = AdditiveFit().fit(encoding, weight, evidence)
    swapped = AdditiveFit().fit(encoding, weight, {Hessian: hessian.flip(0)})
    assert error(fitted) < error(swapped)
    assert error(fitted) < 0.9 * error(encoding.encode(weight))
    weighed = KMeans(hessian=True).fit(Codebook(2), weight, evidence)
    assert {k: (tuple(v.shape), v.dtype) for k, v in weighed.items()} == Codebook(2).layout((8, 4, 3))


# -- lowrank -------------------------------------------------------------------------------------------


def test_weighed_factors_are_those_of_the_paper():
    """QERA-exact, with the symmetric root of H; and no other matrix of that rank does better."""
    generator = torch.Generator().manual_seed(0)
    matrix, inputs = torch.randn(10, 16, generator=generator).double(), correlated(200, 16).double()
    hessian = inputs.T @ inputs
    u, v = weighed_factors(matrix, hessian, 3, damp=0.0)
    root = torch.from_numpy(scipy.linalg.sqrtm(hessian.numpy()).real)
    left, sigma, right = torch.linalg.svd(matrix @ root, full_matrices=False)
    expected = left[:, :3] * sigma[:3] @ right[:3] @ torch.linalg.inv(root)
    torch.testing.assert_close(u @ v, expected, rtol=1e-6, atol=1e-8)

    def error(product: Tensor) -> float:
        return float((inputs @ (matrix - product).T).square().sum())

    plain = weighed_factors(matrix, torch.eye(16, dtype=torch.float64), 3, damp=0.0)
    assert error(u @ v) < error(plain[0] @ plain[1])
    torch.testing.assert_close(plain[0] @ plain[1], _truncated(matrix, 3))


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * sigma[:rank] @ right[:rank]


@pytest.mark.parametrize("first", ["mse", "gptq"])
def test_the_inputs_choose_the_correction(first):
    weight, inputs, encoding = torch.randn(32, 64), correlated(400, 64), Sum(Affine(3, 32), LowRank(8))
    evidence, fitter = evidence_of(inputs), registry().fitter(first)
    plain = encoding.complete(weight, fitter.fit(encoding.first, weight, evidence))
    aware = LowRankFit(first).fit(encoding, weight, evidence)
    assert all(torch.equal(plain[name], aware[name]) for name in plain if name.startswith("first."))
    without = output_error(encoding.first, fitter.fit(encoding.first, weight, evidence), weight, inputs)
    errors = [output_error(encoding, arrays, weight, inputs) for arrays in (aware, plain)]
    assert errors[0] < 0.8 * errors[1] < 0.8 * without


def test_lowrank_needs_what_its_first_needs(models):
    program = pc.capture(models.Mlp().eval(), torch.randn(2, 16))
    site = weight_sites(program)[0]
    assert LowRankFit().needs(site) == [Hessian(site.input.name)]
    assert LowRankFit("gptq").needs(site) == Gptq().needs(site)
    weighted = LowRankFit("awq").needs(site)
    assert [type(s).__name__ for s in weighted] == ["Sample", "Hessian"]


# -- what goes together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "fitter", "sentence"),
    [
        ("Affine(4, 32)", "kmeans", "fitter 'kmeans' learns the tables of a Codebook"),
        ("NF4()", "kmeans", "fitter 'kmeans' learns the tables of a Codebook"),
        ("Codebook(4)", "additive", "fitter 'additive' learns additive codebooks"),
        ("NM(2, 4, Additive(1, 8, 4))", "additive", "fitter 'additive' learns additive codebooks"),
        ("Additive()", "kmeans", "fitter 'kmeans' learns the tables of a Codebook"),
        ("Additive()", "mse", "fitter 'mse' searches the ranges of scales"),
        ("Additive()", "gptq", "fitter 'gptq' rounds under the scales of groups"),
        ("Codebook(4)", "adaround", "fitter 'adaround' rounds to integers"),
        ("Codebook(4)", "hqq", "fitter 'hqq' moves zero points"),
        ("Affine(4, 32)", "lowrank", "fitter 'lowrank' corrects by a product of thin matrices"),
        ("Sum(Affine(4), Affine(4))", "lowrank", "fitter 'lowrank' corrects by a product of thin matrices"),
        ("Sum(Additive(), LowRank(8))", "lowrank", "fitter 'mse' searches the ranges of scales"),
        ("Sum(Affine(4), LowRank(8))", "kmeans", "fitter 'kmeans' learns the tables of a Codebook"),
    ],
)
def test_pairs_that_cannot_work_are_refused_at_construction(refused, weights, fitter, sentence):
    refused(OptionError, sentence, lambda: pc.Quantize("W4A16", weights=weights, fitter=fitter))


@pytest.mark.parametrize(
    ("encoding", "fitter"),
    [
        (Codebook(4), KMeans()),
        (NM(2, 4, Codebook(4)), KMeans(hessian=True)),
        (Additive(), AdditiveFit()),
        (Sum(Additive(), LowRank(4)), AdditiveFit()),
        (Sum(Codebook(2), LowRank(4)), KMeans()),
        (Sum(Codebook(2), LowRank(4)), LowRankFit("kmeans")),
        (Sum(Additive(), LowRank(4)), LowRankFit("additive")),
    ],
)
def test_pairs_that_work(encoding, fitter):
    assert isinstance(fitter, Fitter)
    assert refusal(fitter, encoding) is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: KMeans(rounds=0), "rounds=0 is not valid"),
        (lambda: AdditiveFit(beam=0), "beam=0 is not valid"),
        (lambda: AdditiveFit(damp=-1), "damp=-1 is not valid"),
        (lambda: registry().fitter("additive(beams=2)"), "the fitter 'additive' has no option 'beams'"),
    ],
)
def test_refusals(refused, make, sentence):
    refused(OptionError, sentence, make)


@pytest.mark.parametrize(
    ("fitter", "encoding"),
    [
        (KMeans(hessian=True), Codebook(2)),
        (AdditiveFit(), Additive(1, 2, 4)),
        (LowRankFit(), Sum(Affine(4), LowRank(1))),
    ],
)
def test_missing_evidence_is_named(refused, fitter, encoding):
    refused(PassError, "the fitter was given no Hessian", lambda: fitter.fit(encoding, torch.randn(4, 8)))


def test_the_fitters_are_registered():
    assert registry().fitter("kmeans") == KMeans()
    assert registry().fitter("kmeans(hessian=True)") == KMeans(hessian=True)
    assert not KMeans(hessian=True).data_free
    assert registry().fitter("additive(beam=4)") == AdditiveFit(beam=4)
    assert registry().fitter("lowrank(first='gptq')") == LowRankFit("gptq")


@pytest.mark.parametrize(
    ("weights", "fitter"),
    [
        ("Codebook(3, 16)", "kmeans(hessian=True)"),
        ("Additive(1, 6, 8)", "additive"),
        ("Sum(Affine(3, 16), LowRank(4))", "lowrank(first='gptq')"),
    ],
)
def test_it_runs_in_a_compilation(reference, weights, fitter):
    """Fitted to calibration data in the graph, on ONNX Runtime: as the reference, and better than rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    x = correlated(256, 64).reshape(8, 32, 64) / 4
    call = {"example_inputs": x[:2], "calibration": list(x.split(2))}
    compiled = pc.compile(model, [pc.Quantize("W4A16", weights=weights, fitter=fitter)], **call)
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=0, atol=1e-4)
    rounded = reference(model, [pc.Quantize("W4A16", weights=weights, fitter="rtn")], x[:2])
    fitted, plain = (float((y - model(x)).detach().square().sum()) for y in (compiled(x), rounded(x)))
    assert fitted < 0.9 * plain
