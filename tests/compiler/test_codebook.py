"""Codebooks: k-means and look-ups against slow textbook versions, published constants, and what they cost."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler import encodings
from paretoc.compiler.capture import capture
from paretoc.compiler.encodings import NF4, NM, Additive, Affine, Codebook, Encoding, parse_encoding, unpack
from paretoc.compiler.encodings import additive as vectors
from paretoc.compiler.encodings.codebook import kmeans, nearest
from paretoc.compiler.errors import ConformanceError, OptionError
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import weight_sites
from paretoc.testing import check_encoding
from scipy.stats import norm
from torch import nn

quick = settings(max_examples=40, deadline=None)
SCALARS = [
    Codebook(4),
    Codebook(3, 32),
    Codebook(2, -1),
    Codebook(4, 0, "row", "none"),
    Codebook(1, 0, "tensor", "none"),
    Codebook(8, 16, "row", "float16"),
    NF4(64),
    NF4(0, "float16"),
    NF4(32, "e8m0-ceil"),
]
ADDITIVES = [Additive(), Additive(2, 4, 4), Additive(1, 10, 2, "float32"), Additive(3, 3, 16)]


def relative_error(encoding: Encoding, weight: torch.Tensor) -> float:
    decoded = encoding.decode(encoding.encode(weight), tuple(weight.shape))
    return float((decoded - weight).square().sum() / weight.square().sum())


# -- the contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [*SCALARS, *ADDITIVES, NM(2, 4, Codebook(3)), NM(2, 4, NF4(16))], ids=str)
def test_it_keeps_the_contract(encoding):
    exact = (isinstance(encoding, NF4) and encoding.scale == "float32") or getattr(encoding, "scale", "") == "none"
    shapes = [(6, 64), (3, 16, 3, 3), (5, 7)]
    check_encoding(encoding, shapes=shapes, idempotent=1e-6 if exact else None)


@pytest.mark.parametrize("encoding", [Codebook(3, 0, "row", "none"), Additive(2, 4, 8)], ids=str)
def test_standard_onnx_holds_it(encoding):
    check_encoding(encoding, shapes=[(6, 64)], idempotent=None, targets=["onnx"])


def test_the_contract_would_notice_a_wrong_table(monkeypatch):
    monkeypatch.setattr("paretoc.compiler.encodings.codebook._NF4", encodings.codebook._NF4[::-1])
    with pytest.raises(ConformanceError):
        check_encoding(NF4(64))


@pytest.mark.parametrize("encoding", [*SCALARS, *ADDITIVES], ids=str)
def test_its_text_reads_back(encoding):
    assert parse_encoding(str(encoding)) == encoding


# -- NF4 -----------------------------------------------------------------------------------------------


def test_the_table_of_nf4_is_that_of_the_paper():
    """Appendix E: quantiles at even steps from 1 − (1/32 + 1/30) / 2 to one half, eight of them positive."""
    most = 1 - (1 / 32 + 1 / 30) / 2
    above = norm.ppf(np.linspace(most, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(most, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([below, [0.0], above])) / above.max()
    np.testing.assert_allclose(encodings.codebook._NF4, table, atol=3e-7)  # published as rounded float32 sums
    assert encodings.codebook._NF4[7] == 0


@pytest.mark.parametrize(("shape", "group"), [((3, 12), 4), ((3, 12), 0), ((2, 3, 2, 2), 0), ((3, 5), -1)], ids=str)
def test_nf4_equals_a_slow_one(shape, group):
    weight, encoding = torch.randn(shape), NF4(group)
    arrays = encoding.encode(weight)
    decoded = []
    for values in weight.reshape(-1, weight.numel() if group == -1 else group or weight[0].numel()).numpy():
        peak = np.abs(values).max()
        entries = np.float32(encodings.codebook._NF4) * peak
        decoded += [entries[np.abs(entries - value).argmin()] for value in values]
    np.testing.assert_allclose(encoding.decode(arrays, shape).flatten(), decoded, rtol=1e-6)


def test_nf4_is_better_than_integers_on_normal_weights():
    """Equal bits, both with the range of the group."""
    weight = torch.randn(64, 512)
    assert relative_error(NF4(64), weight) < 0.8 * relative_error(Affine(4, 64), weight)


# -- k-means of scalars --------------------------------------------------------------------------------


def best_partition(values: list[float], weights: list[float], levels: int) -> float:
    """The least weighted error over every way to cut the sorted values into `levels` runs."""
    pairs = sorted(zip(values, weights, strict=True))
    least = np.inf
    for cuts in combinations(range(1, len(pairs)), levels - 1):
        error = 0.0
        for start, stop in zip((0, *cuts), (*cuts, len(pairs)), strict=True):
            x, w = np.array(pairs[start:stop]).T
            error += float((w * (x - (w * x).sum() / w.sum()) ** 2).sum())
        least = min(least, error)
    return least


def error_of(table: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> float:
    gaps = (values.double().unsqueeze(-1) - table.double()).square().amin(-1)
    return float((weights * gaps).sum())


def test_the_slow_partition_is_right_on_a_case_done_by_hand():
    assert best_partition([0, 1, 10, 12], [1, 1, 1, 1], 2) == 2.5
    assert best_partition([0, 1, 10, 12], [1, 3, 1, 1], 2) == 2.75


@quick
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 5)), min_size=5, max_size=9, unique_by=lambda pair: pair[0])
)
def test_kmeans_is_stationary_and_near_the_best_partition(pairs):
    values, weights = (torch.tensor(column).float().unsqueeze(0) for column in zip(*pairs, strict=True))
    table = kmeans(values, weights, 4)
    assert (table.diff() >= 0).all()
    codes = nearest(values, table[0])
    for code in codes.unique():  # every entry is the weighted mean of what it stands for
        own = codes[0] == code
        mean = (weights[0, own] * values[0, own]).sum() / weights[0, own].sum()
        torch.testing.assert_close(table[0, code], mean, rtol=1e-5, atol=1e-5)
    even = torch.linspace(float(values.min()), float(values.max()), 4)
    best = best_partition(values[0].tolist(), weights[0].tolist(), 4)
    error = error_of(table, values, weights)
    assert best - 1e-3 <= error <= error_of(even, values, weights) + 1e-3


def test_a_weight_of_three_is_the_value_three_times():
    values, weights = torch.randn(1, 200), torch.randint(1, 4, (1, 200))
    repeated = values.repeat_interleave(weights[0], 1)
    weighted, plain = kmeans(values, weights.float(), 8), kmeans(repeated, torch.ones_like(repeated), 8)
    torch.testing.assert_close(weighted, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weighted, kmeans(values, torch.ones_like(values), 8), atol=1e-3)


def test_separated_clusters_are_found():
    values = torch.cat([torch.randn(40) * 0.01 + centre for centre in (-7.0, -1.0, 0.0, 30.0)]).unsqueeze(0)
    table = kmeans(values, torch.ones_like(values), 4)
    torch.testing.assert_close(table[0], torch.tensor([-7.0, -1.0, 0.0, 30.0]), rtol=0, atol=0.02)


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_the_error_on_a_gaussian_is_that_of_max(bits, distortion):
    """Max 1960, "Quantizing for minimum distortion", table I."""
    weight = torch.randn(1, 1 << 17)
    assert relative_error(Codebook(bits, scale="none"), weight) == pytest.approx(distortion, rel=0.02)


HEAVY = {
    "student t": lambda shape: torch.distributions.StudentT(3.0).sample(shape),
    "laplace": lambda shape: torch.distributions.Laplace(0.0, 1.0).sample(shape),
    "cubes": lambda shape: torch.randn(shape) ** 3,
    "one outlier": lambda shape: torch.randn(shape).index_fill(1, torch.tensor([3]), 30.0),
}


@pytest.mark.parametrize("draw", HEAVY.values(), ids=HEAVY)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_is_never_worse_than_a_uniform_grid(bits, draw):
    weight = draw((8, 512))
    uniform = min(relative_error(Affine(bits, 0, symmetric), weight) for symmetric in (True, False))
    assert relative_error(Codebook(bits, 0, "row", "none"), weight) < uniform
    assert relative_error(Codebook(bits, 32), weight) < relative_error(Affine(bits, 32), weight)


@pytest.mark.parametrize("encoding", [Codebook(2, 0, "row", "none"), Codebook(2, scale="none")], ids=str)
def test_few_values_are_stored_exactly(encoding):
    weight = torch.tensor([-3.1, 0.0, 1e-3, 40.0])[torch.randint(0, 4, (5, 33))]
    assert torch.equal(encoding.decode(encoding.encode(weight), (5, 33)), weight)
    third = Codebook(1, 0, encoding.per, "none")
    assert not torch.equal(third.decode(third.encode(weight), (5, 33)), weight)


def test_a_table_for_each_row_is_that_of_the_row_alone():
    weight, encoding = torch.randn(4, 64) * torch.tensor([[1.0], [5.0], [0.1], [2.0]]), Codebook(3, 16, "row")
    arrays = encoding.encode(weight)
    assert arrays["table"].shape == (4, 8)
    for row in range(4):
        alone = encoding.encode(weight[row : row + 1])
        assert all(torch.equal(array[row : row + 1], alone[name]) for name, array in arrays.items())


def test_errors_are_weighed_by_the_square_of_their_scales():
    """Two rows under one table: the one with the larger scale decides."""
    weight = torch.stack([torch.tensor([1.0, 0.4, 0.4, 0.4]) * 100, torch.tensor([1.0, 0.6, 0.6, 0.6])])
    table = Codebook(1).encode(weight)["table"]
    assert table.min() == pytest.approx(0.4, abs=1e-3)


@quick
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8, unique=True), st.lists(st.integers(-25, 25), min_size=1))
def test_nearest_equals_brute_force(entries, values):
    """Distances are whole or half here: ties are common, and go down."""
    table, values = torch.tensor(sorted(entries)).float(), torch.tensor(values).float() / 2
    slow = [min(range(len(table)), key=lambda i, v=v: (abs(table[i] - v), i)) for v in values]
    assert nearest(values, table).tolist() == slow


# -- look-ups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_decoding_is_the_definition(bits, per, columns):
    """scale · table[code], one code after the other; and what fitters see of the arrays says the same."""
    encoding, shape = Codebook(bits, 0, per), (3, columns)
    arrays = encoding.encode(torch.randn(shape))
    decoded = encoding.decode(arrays, shape)
    codes, table = unpack(arrays["codes"], bits, columns), arrays["table"]
    for row in range(3):
        own = table[row if per == "row" else 0] * arrays["scale"][row]
        assert decoded[row].tolist() == [own[code].item() for code in codes[row]]
    loaded = encoding.load(arrays, shape)
    assert torch.equal(encoding.dequantize(loaded[0].float(), loaded[1]).reshape(shape), decoded)
    again = encoding.store(encoding.quantize(encoding.grouped(decoded), loaded[1]), loaded[1], shape)
    assert all(torch.equal(again[name], array) for name, array in arrays.items())


@pytest.mark.parametrize(
    ("encoding", "shape", "count"),
    [
        (NF4(64), (4, 128), 4 * 64 + 4 * 2 * 4),
        (Codebook(4), (4, 128), 4 * 64 + 4 * 4 + 16 * 4),
        (Codebook(3, 32, "row", "float16"), (4, 96), 4 * 36 + 4 * 3 * 2 + 4 * 8 * 4),
        (Codebook(2, scale="none"), (3, 5), 3 * 2 + 4 * 4),
        (Additive(2, 8, 8), (4, 64), 4 * 16 + 2 * 256 * 8 * 2 + 4 * 2),
        (Additive(1, 12, 4, "float32"), (4, 64), 4 * 16 + 4 * 8 + 4096 * 4 * 2 + 4 * 4),
        (Additive(1, 16, 8), (4, 64), 4 * 8 * 2 + 65536 * 8 * 2 + 4 * 2),
    ],
    ids=str,
)
def test_bytes_counted_by_hand(encoding, shape, count):
    assert encoding.nbytes(shape) == count


class Table(nn.Module):
    """An embedding, and a linear of the same weight size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 64)
        self.linear = nn.Linear(64, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids))


@pytest.mark.parametrize("encoding", [Codebook(4), NF4(32), Additive(1, 8, 4)], ids=str)
def test_onnx_runtime_equals_the_reference_and_the_file_keeps_codes_packed(encoding):
    program = capture(Table().eval(), torch.arange(12).reshape(2, 6))
    for site in weight_sites(program):
        program.encode(site.weight, encoding, encoding.encode(program.weight_value(site.weight)))
    program.refresh()
    executable = registry().backend("onnxruntime").lower(program, {"seed": 0})
    ids = torch.arange(40).flip(0).reshape(5, 8)
    torch.testing.assert_close(executable.run([ids])[0], program.run([ids])[0], rtol=0, atol=1e-5)
    assert executable.stored_bytes() < 2 * encoding.nbytes((40, 64)) + 5000  # look-up tables, biases, shapes


# -- Additive ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "shape"), [(Additive(2, 3, 4), (3, 16)), (Additive(1, 9, 2), (2, 4, 3)), (Additive(3, 2, 8), (2, 24))]
)
def test_additive_decoding_is_the_definition(encoding, shape):
    arrays = encoding.encode(torch.randn(shape))
    low = unpack(arrays["codes"], min(encoding.bits, 8), encoding.codebooks * encoding.groups(shape))
    high = unpack(arrays["codes_high"], 1, low.shape[1]) if encoding.bits == 9 else torch.zeros_like(low)
    codes = (low + 256 * high).reshape(shape[0], encoding.codebooks, -1)
    decoded = encoding.decode(arrays, shape).reshape(shape[0], -1)
    for o in range(shape[0]):
        for g in range(encoding.groups(shape)):
            total = sum(arrays["codebooks"][m, codes[o, m, g]].float() for m in range(encoding.codebooks))
            expected = total * arrays["scale"][o].float()
            torch.testing.assert_close(decoded[o, g * encoding.dim : (g + 1) * encoding.dim], expected)


def test_codes_above_eight_bits_survive():
    encoding, shape = Additive(2, 11, 4), (5, 24)
    codes = torch.randint(0, 2048, (5, 2, 6))
    arrays = encoding.store(codes, torch.randn(2, 2048, 4), torch.rand(5, 1) + 0.5)
    assert torch.equal(encoding.load(arrays, shape)[0].long(), codes)
    assert {name: (tuple(a.shape), a.dtype) for name, a in arrays.items()} == encoding.layout(shape)


def test_a_further_codebook_stores_what_is_left():
    weight = torch.randn(32, 64)
    one, two, three = (relative_error(Additive(count, 6, 8), weight) for count in (1, 2, 3))
    assert three < 0.6 * two < 0.6 * 0.6 * one


def test_vectors_that_repeat_are_stored_as_they_are():
    book = torch.randn(16, 4)
    weight = book[torch.randint(0, 16, (8, 10))].reshape(8, 40)
    # at most 80 different vectors once the rows are scaled; codebooks are rounded to float16
    assert relative_error(Additive(1, 7, 4, "float32"), weight) < 1e-6
    assert relative_error(Additive(1, 5, 4, "float32"), weight) > 1e-4


def test_kmeans_of_vectors_is_stationary():
    """Every entry is the mean of the vectors that choose it, and no vector has a nearer one."""
    data = torch.randn(300, 3)
    book = vectors.kmeans(data, 8, seed=0)
    codes = torch.cdist(data, book).argmin(1)
    assert torch.equal(codes, vectors.nearest(data, book))
    for _ in range(200):  # a slow one, from there: it has little left to do
        book2 = torch.stack([data[codes == c].mean(0) for c in range(8)])
        codes = torch.cdist(data, book2).argmin(1)
    before, after = (torch.cdist(data, b).amin(1).square().sum() for b in (book, book2))
    assert before <= 1.05 * after
    assert torch.cdist(data, data[:8]).amin(1).square().sum() > 1.2 * after  # where it started


def test_no_entry_of_a_codebook_is_left_unused():
    data = torch.cat([torch.zeros(500, 4), torch.randn(60, 4)])  # most samples are alike
    book = vectors.kmeans(data, 32, seed=0)
    used = vectors.nearest(data, book).unique()
    assert len(used) >= 30


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Codebook(9), "Codebook has 1 to 8 bits, not 9"),
        (lambda: Codebook(0), "Codebook has 1 to 8 bits, not 0"),
        (lambda: Codebook(4, per="rows"), "per='rows' is not known"),
        (lambda: Codebook(4, 32, scale="none"), "group=32 needs a scale for each group, scale='none' has none"),
        (lambda: Codebook(4, -1, "row"), "one scale a tensor adds nothing to one table a row"),
        (lambda: Codebook(4, -2), "group=-2 is not a group size"),
        (lambda: Codebook(4, scale="float64"), "there is no scale format 'float64'"),
        (lambda: NF4(scale="none"), "there is no scale format 'none'"),
        (lambda: NF4(64).check(torch.empty(8, 96)), "group size 64 does not divide the input width 96"),
        (lambda: Additive(0), "Additive has 1 to 8 codebooks, not 0"),
        (lambda: Additive(bits=1), "Additive has codes of 2 to 16 bits, not 1"),
        (lambda: Additive(bits=17), "Additive has codes of 2 to 16 bits, not 17"),
        (lambda: Additive(dim=9), "Additive stores 2 to 8 weights at once, or 16, not 9"),
        (lambda: Additive(scale="e8m0"), "Additive has no scale format 'e8m0'"),
        (lambda: Additive(dim=8).check(torch.empty(4, 12)), "groups of 8 do not divide the input width 12"),
    ],
)
def test_refusals(refused, make, sentence):
    refused(OptionError, sentence, make)


def test_a_refusal_names_what_would_work(refused):
    error = refused(OptionError, "do not divide", lambda: Additive(dim=8).check(torch.empty(4, 12)))
    assert error.fix == "use dim=2 or 3 or 4 or 6"
    error = refused(OptionError, "do not divide", lambda: Additive(dim=8).check(torch.empty(4, 13)))
    assert error.fix == "leave this site out with ignore="
