"""NUPES against PowerQuant and brute force, and as a pass on models."""

from __future__ import annotations

from itertools import product

import paretoc as pc
import paretoc.testing
import pytest
import torch
from paretoc.compiler.registry import registry
from paretoc.plugins import Nupes, NupesFit, Power
from paretoc.plugins.descent import Layer
from paretoc.plugins.powerquant import search_exponent
from scipy import stats


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Student-t₄ weights."""
    return torch.tensor(stats.t(4).rvs((rows, columns), random_state=seed), dtype=torch.float32) * 0.05


def correlated(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs `[N, K]` of which few directions carry most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(1, 0.02, columns).unsqueeze(1)
    noise = torch.randn(count, columns, generator=generator)
    return torch.randn(count, columns, generator=generator) @ mix / columns**0.5 + 0.1 * noise


def evidence(x: torch.Tensor) -> dict[type[pc.Statistic], torch.Tensor]:
    return {pc.Hessian: (x.double().T @ x.double()).unsqueeze(0)}


def output_error(encoding: pc.Encoding, arrays: pc.Arrays, weight: torch.Tensor, x: torch.Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖², from the outputs themselves."""
    decoded = encoding.decode(arrays, tuple(weight.shape)).double()
    return float((x.double() @ (weight.double() - decoded).T).square().sum() / (x @ weight.T).double().square().sum())


# -- the fitter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_paper(bits, seed):
    """NUPES < PowerQuant < uniform codes in the error of the output; unseen inputs too."""
    weight, x, unseen = heavy_tailed(48, 96, seed), correlated(768, 96, seed), correlated(2000, 96, seed)[768:]
    power, uniform = Power(bits, search_exponent([weight], bits)), Power(bits, 1.0)
    learned, arrays = NupesFit().adapt(power, weight, evidence(x))
    for inputs in (x, unseen):
        nupes = output_error(learned, arrays, weight, inputs)
        powerquant = output_error(power, power.encode(weight), weight, inputs)
        assert nupes < 0.45 * powerquant
        assert powerquant < 0.8 * output_error(uniform, uniform.encode(weight), weight, inputs)


def test_codes_reach_beyond_the_two_nearest():
    """What rounding up or down cannot do."""
    weight, x = heavy_tailed(48, 96), correlated(768, 96)
    power = Power(4, search_exponent([weight], 4))
    arrays = NupesFit().fit(power, weight, evidence(x))
    moved = pc.unpack(arrays["codes"], 4, 96) - power.quantize(weight)[0]
    assert int(moved.abs().max()) > 1


def test_every_code_is_the_best_while_the_others_stay():
    """Brute force over the codes of single weights finds nothing better."""
    weight, x, power = heavy_tailed(3, 12), correlated(80, 12), Power(3, 0.6)
    fitter = NupesFit(rounds=50, tolerance=0, damp=0)
    arrays = fitter.fit(power, weight, evidence(x))
    codes, best = pc.unpack(arrays["codes"], 3, 12), output_error(power, arrays, weight, x)
    for row, column, code in product(range(3), range(12), range(7)):
        tried = codes.clone()
        tried[row, column] = code
        assert output_error(power, arrays | {"codes": pc.pack(tried, 3)}, weight, x) >= best * (1 - 1e-6)


def test_a_sweep_over_blocks_is_one_column_after_the_other():
    """270 columns, more than two blocks, against the update written out."""
    weight, x = heavy_tailed(3, 270).double(), correlated(400, 270).double()
    layer, slow = Layer(weight, evidence(x)), weight.clone()
    for j in range(270):
        slow[:, j] -= (slow - weight) @ (x.T @ x)[:, j] / (x[:, j] @ x[:, j])
        slow[:, j] = (slow[:, j] * 20).round() / 20
    found = layer.sweep(layer.weight, lambda _, target: (target * 20).round() / 20)
    torch.testing.assert_close(layer.rows(found), slow, rtol=0, atol=1e-9)


@pytest.mark.parametrize("exponent", [0.15, 0.9])
def test_a_bad_exponent_is_left(exponent):
    weight, x, start = heavy_tailed(48, 96), correlated(768, 96), Power(4, exponent)
    learned, arrays = NupesFit().adapt(start, weight, evidence(x))
    assert abs(learned.exponent - 0.5) < abs(exponent - 0.5)
    kept = output_error(start, NupesFit().fit(start, weight, evidence(x)), weight, x)
    assert output_error(learned, arrays, weight, x) < 0.8 * kept


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("case", ["zeros", "exact", "no inputs", "one input", "bfloat16"])
def test_it_is_never_worse_than_powerquant(bits, case):
    weight, x, power = heavy_tailed(5, 24), correlated(40, 24), Power(bits, 0.5)
    if case == "zeros":
        weight[1:3] = 0
    elif case == "exact":
        weight = power.decode(power.encode(weight), (5, 24))
    elif case == "no inputs":
        x = torch.zeros(4, 24)
    elif case == "one input":
        x = x[:1]
    elif case == "bfloat16":
        weight = weight.bfloat16()
    learned, arrays = NupesFit().adapt(power, weight, evidence(x))
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == learned.layout((5, 24))
    found, plain = (
        (x.double() @ (e.decode(a, (5, 24)).double() - weight.double()).T).square().sum()
        for e, a in ((learned, arrays), (power, power.encode(weight)))
    )
    assert torch.isfinite(found)
    assert found <= plain * (1 + 1e-9)


def test_a_grouped_convolution_is_its_groups():
    """Each group of rows has inputs of its own."""
    weight = heavy_tailed(8, 2 * 9).reshape(8, 2, 3, 3)
    inputs = [correlated(200, 18, seed) for seed in range(4)]
    hessian = torch.cat([evidence(x)[pc.Hessian] for x in inputs])
    power = Power(4, 0.5)
    whole = power.decode(NupesFit().fit(power, weight, {pc.Hessian: hessian}), (8, 2, 3, 3))
    for group, x in enumerate(inputs):
        rows = weight[2 * group : 2 * group + 2]
        alone = power.decode(NupesFit(rounds=20, tolerance=0).fit(power, rows, evidence(x)), (2, 2, 3, 3))
        plain = power.decode(power.encode(rows), (2, 2, 3, 3))
        errors = [
            float((x @ (found - rows).flatten(1).T).square().sum())
            for found in (alone, whole[2 * group : 2 * group + 2], plain)
        ]
        assert errors[1] <= errors[0] * 1.05
        assert errors[1] < errors[2]


def test_it_is_a_fitter_by_name_and_refuses_what_it_cannot_fit(refused):
    fitter = registry().fitter("nupes(rounds=3)")
    assert isinstance(fitter, pc.Fitter)
    assert isinstance(fitter, pc.Adaptive)
    assert fitter == NupesFit(rounds=3)
    sentence = "fitter 'nupes' learns the codes of Power; Affine(bits=4, group=32) is none"
    refused(pc.OptionError, sentence, lambda: pc.Quantize("W4A16", fitter="nupes"))
    refused(pc.PassError, "the fitter was given no Hessian", lambda: NupesFit().fit(Power(), heavy_tailed(2, 3)))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NupesFit(rounds=0), "rounds=0 is not valid"),
        (lambda: NupesFit(tolerance=-1), "tolerance=-1 is not valid"),
        (lambda: NupesFit(damp=float("nan")), "damp=nan is not valid"),
        (lambda: Nupes(bits=9), "Power has 2 to 8 bits, not 9"),
        (lambda: Nupes(rounds=0), "rounds=0 is not valid"),
    ],
)
def test_bad_options_are_refused(refused, make, sentence):
    refused(pc.OptionError, sentence, make)


# -- the pass -----------------------------------------------------------------------------------------------


def test_the_pass_conforms(models):
    pc.testing.check_pass(Nupes(bits=3, rounds=1), models.Mlp().eval(), torch.randn(4, 16))


def test_every_weight_has_its_own_exponent(reference, models):
    model, x = models.Mlp(64, 96, 32), correlated(256, 64)
    with torch.no_grad():
        model.down.weight.copy_(heavy_tailed(32, 96))
    compiled = reference(model, ["nupes:bits=3"], x[:4], calibration=[x[:128], x[128:]])
    exponents = {row.site: pc.parse_encoding(row.encoding).exponent for row in compiled.explain().rows}
    assert exponents["down"] < exponents["up"]  # heavy tails against uniform weights
    metrics = compiled.report(latency=False).passes[-1]["metrics"]
    assert (metrics["least exponent"], metrics["largest exponent"]) == (exponents["down"], exponents["up"])
    before = reference(model, ["powerquant:bits=3"], x[:4])
    with torch.no_grad():
        expected = model(x)
        errors = [float((other(x) - expected).square().mean()) for other in (compiled, before)]
    assert errors[0] < 0.5 * errors[1]


def test_convolutions_follow_the_inputs_they_get(reference, models):
    model, x = models.Cnn().eval(), torch.randn(8, 4, 6, 6)
    compiled = reference(model, ["nupes:bits=4"], x, calibration=[x])
    assert {row.site for row in compiled.explain().rows} == {"stem", "depthwise", "head"}
    before = reference(model, ["powerquant:bits=4"], x)
    with torch.no_grad():
        errors = [float((other(x) - model(x)).square().mean()) for other in (compiled, before)]
    assert errors[0] < errors[1]


def test_it_needs_calibration_data(reference, models, refused):
    refused(pc.CalibrationError, "nupes", lambda: reference(models.Mlp(), ["nupes:bits=3"], torch.randn(2, 16)))


def test_sparse_weights_are_left_with_the_reason(reference, models):
    passes = [pc.PruneNM("2:4", targets="up"), "nupes:bits=4,rounds=1"]
    x = torch.randn(8, 16)
    entry = reference(models.Mlp(), passes, x, calibration=[x]).report(latency=False).passes[-1]
    assert entry["matched"] == ["down"]
    assert "fitter 'nupes' learns the codes of Power; NM(n=2, m=4" in entry["skipped"]["up"]


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_onnx_runtime_equals_eager(target, reference, models):
    model, x = models.Mlp(64, 96, 32), correlated(64, 64)
    eager = reference(model, ["nupes:bits=3,rounds=2"], x, calibration=[x])
    compiled = pc.compile(model, ["nupes:bits=3,rounds=2"], example_inputs=x, calibration=[x], target=target)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-6)  # float32 sums


def test_quantize_takes_it_by_name(reference, models):
    x = torch.randn(32, 16)
    compiled = reference(models.Mlp(), [pc.Quantize(weights="Power(4, 0.9)", fitter="nupes")], x, calibration=[x])
    exponents = {pc.parse_encoding(row.encoding).exponent for row in compiled.explain().rows}
    assert len(exponents - {0.9}) == 2
