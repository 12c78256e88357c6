"""PowerQuant against its equation, its oracle on known distributions, and as a pass on models."""

from __future__ import annotations

import numpy as np
import paretoc as pc
import paretoc.testing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.plugins import Power, PowerQuant
from paretoc.plugins.powerquant import search_exponent
from scipy import stats

BITS = range(2, 9)


def round_trip(encoding: pc.Encoding, weight: torch.Tensor) -> torch.Tensor:
    return encoding.decode(encoding.encode(weight), tuple(weight.shape))


def slow_power(weight: torch.Tensor, bits: int, exponent: float) -> torch.Tensor:
    """The equation, one weight at a time, in double precision."""
    largest, rows = 2 ** (bits - 1) - 1, []
    for row in weight.double().flatten(1).tolist():
        peak = max(abs(w) for w in row) or 1.0
        codes = [round(largest * (abs(w) / peak) ** exponent) for w in row]
        values = [peak * (q / largest) ** (1 / exponent) for q in codes]
        rows.append([v if w > 0 else -v for v, w in zip(values, row, strict=True)])
    return torch.tensor(rows, dtype=torch.float64).reshape(weight.shape)


def drawn_evenly(distribution: stats.rv_continuous, count: int = 2**18) -> torch.Tensor:
    """One channel of weights: the quantiles of a distribution at the centres of `count` equal steps."""
    return torch.tensor(distribution.ppf((np.arange(count) + 0.5) / count), dtype=torch.float32).unsqueeze(0)


def squared_error(weight: torch.Tensor, bits: int, exponent: float) -> float:
    return float((round_trip(Power(bits, exponent), weight) - weight).double().square().mean())


# -- the encoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [Power(), Power(2, 1.0), Power(8, 0.1), pc.NM(2, 4, Power(3, 0.4))], ids=str)
def test_it_conforms(encoding):
    pc.testing.check_encoding(encoding)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("exponent", [0.1, 0.37, 0.5, 1.0])
def test_it_is_the_equation(bits, exponent):
    weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(bits))
    torch.testing.assert_close(
        round_trip(Power(bits, exponent), weight).double(),
        slow_power(weight, bits, exponent),
        rtol=1e-6,  # float32 against float64
        atol=0,
    )


@pytest.mark.parametrize("bits", BITS)
def test_exponent_one_is_the_uniform_code(bits):
    weight = torch.randn(7, 33)
    expected = round_trip(pc.Affine(bits=bits), weight)
    torch.testing.assert_close(round_trip(Power(bits, 1.0), weight), expected, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.1, 1.0), st.integers(-40, 40), st.integers(0, 99))
def test_it_is_odd_and_scales_with_the_weight(bits, exponent, power, seed):
    weight, encoding = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)), Power(bits, exponent)
    plain = round_trip(encoding, weight)
    assert torch.equal(round_trip(encoding, -weight), -plain)
    assert torch.equal(round_trip(encoding, weight * 2.0**power), plain * 2.0**power)


def test_the_stored_bytes_are_the_packed_codes_and_one_scale_a_channel():
    assert Power(3).nbytes((6, 5, 3)) == 6 * 6 + 6 * 4
    assert Power(4).nbytes((64, 256)) == 64 * 128 + 64 * 4


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Power(bits=1), "Power has 2 to 8 bits, not 1"),
        (lambda: Power(bits=9), "Power has 2 to 8 bits, not 9"),
        (lambda: Power(exponent=0.0), "the exponent 0.0 is out of range"),
        (lambda: Power(exponent=1.5), "the exponent 1.5 is out of range"),
        (lambda: Power(exponent=float("nan")), "the exponent nan is out of range"),
        (lambda: PowerQuant(bits=16), "Power has 2 to 8 bits, not 16"),
        (lambda: PowerQuant(exponent=0), "the exponent 0 is out of range"),
    ],
)
def test_bad_options_are_refused(refused, make, sentence):
    refused(pc.OptionError, sentence, make)


# -- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "exponent", "ratio"),
    [(stats.norm(), 0.62, 0.64), (stats.laplace(), 0.50, 0.37), (stats.t(4), 0.35, 0.17)],
    ids=["Gaussian", "Laplace", "Student-t4"],
)
def test_the_oracle_at_four_bits(distribution, exponent, ratio):
    """Optimal exponent and squared error relative to uniform codes, each ± 0.03."""
    weight = drawn_evenly(distribution)
    found = search_exponent([weight], bits=4)
    assert found == pytest.approx(exponent, abs=0.03)
    improvement = squared_error(weight, 4, found) / squared_error(weight, 4, 1.0)
    assert improvement == pytest.approx(ratio, abs=0.03)


@pytest.mark.parametrize("bits", BITS)
def test_no_exponent_of_a_grid_is_better(bits):
    weights = [drawn_evenly(stats.laplace(), 2**14), drawn_evenly(stats.norm(), 2**14)]

    def error(exponent: float) -> float:
        return sum(float((round_trip(Power(bits, exponent), w) - w).norm()) for w in weights)

    best = min(error(exponent) for exponent in np.linspace(0.1, 1.0, 46))
    assert error(search_exponent(weights, bits)) <= 1.005 * best  # the error has steps between grid points


def test_a_network_of_zeros_has_an_exponent():
    assert 0.1 <= search_exponent([torch.zeros(3, 4)], bits=4) <= 1.0


# -- the pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [PowerQuant(), PowerQuant(bits=3, exponent=0.5)], ids=PowerQuant.describe)
def test_the_pass_conforms(transform):
    pc.testing.check_pass(transform)


def heavy_tailed(model: torch.nn.Module) -> torch.nn.Module:
    """Weights like those of trained models: most small, few large."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * parameter.abs() / parameter.abs().max())
    return model.eval()


def test_every_weight_is_stored_under_one_exponent(reference, models):
    model = heavy_tailed(models.Cnn())
    compiled = reference(model, ["powerquant:bits=4"], torch.randn(2, 4, 6, 6))
    encodings = {row.site: pc.parse_encoding(row.encoding) for row in compiled.explain().rows}
    assert set(encodings) == {"stem", "depthwise", "head"}
    assert len(set(encodings.values())) == 1
    exponent = encodings["head"].exponent
    assert 0.1 < exponent < 1
    assert compiled.report(latency=False).passes[-1]["metrics"] == {"exponent": exponent}


def test_the_model_computes_with_the_decoded_weights(reference, models):
    model, x = heavy_tailed(models.Mlp()), torch.randn(5, 16)
    compiled = reference(model, [PowerQuant(bits=5, exponent=0.4)], x)
    found = compiled(x)
    with torch.no_grad():
        for name in ("up.weight", "down.weight"):
            weight = model.get_parameter(name)
            weight.copy_(slow_power(weight, 5, 0.4))
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)  # float32 sums


def test_the_size_is_that_of_the_codes_and_scales(reference, models):
    compiled = reference(models.Mlp(16, 32, 8), ["powerquant:3"], torch.randn(2, 16))
    weights = 32 * 6 + 32 * 4 + 8 * 12 + 8 * 4
    assert compiled.report(latency=False).compiled.bytes == weights + 4 * (32 + 8)


def test_sparse_weights_keep_their_pattern(reference, models):
    compiled = reference(models.Mlp(), ["prune_nm:2:4", "powerquant:bits=4"], torch.randn(2, 16))
    for site, row in zip(("up", "down"), compiled.explain().rows, strict=True):
        encoding = pc.parse_encoding(row.encoding)
        assert (row.site, encoding.n, encoding.m) == (site, 2, 4)
        assert isinstance(encoding.values, Power)


def test_a_weight_that_is_also_an_embedding_is_left(reference, models):
    ids = torch.randint(0, 48, (2, 7))
    compiled = reference(models.TiedLanguageModel(), ["powerquant"], ids)
    entry = compiled.report(latency=False).passes[-1]
    assert entry["matched"] == ["middle"]
    assert list(entry["skipped"].values()) == ["its weight is also read by aten.embedding.default"]


def test_what_is_encoded_already_is_left_and_nothing_to_do_is_refused(reference, models, refused):
    model, x = models.Mlp(), torch.randn(2, 16)
    compiled = reference(model, [pc.Quantize(scheme="W8A16", targets="up"), "powerquant"], x)
    assert "already stored as Affine" in compiled.report(latency=False).passes[-1]["skipped"]["up"]
    refused(
        pc.PassError,
        "no weight can be encoded: up: already stored as Affine",
        lambda: reference(model, ["quantize:W8A16", "powerquant"], x),
    )


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_onnx_runtime_equals_eager_and_keeps_the_codes(target, reference, models, tmp_path):
    model, x = heavy_tailed(models.Mlp(256, 512, 256)), torch.randn(3, 256)
    eager = reference(model, ["powerquant:bits=3"], x)
    compiled = pc.compile(model, ["powerquant:bits=3"], example_inputs=x, target=target)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-6)  # float32 sums
    compiled.export_onnx(tmp_path / "model.onnx")
    weights = 2 * 256 * 512
    graph = 20_000  # bytes of biases, scales, tables, nodes and names
    assert (tmp_path / "model.onnx").stat().st_size < weights * 3 / 8 + graph < weights * 4 / 8
