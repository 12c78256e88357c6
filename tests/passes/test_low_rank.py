"""Low rank: the factors are those of the papers, the error is the tail, budgets are met, the graph is two layers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import paretoc as pc
import paretoc.testing
import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.cost import cost
from paretoc.compiler.errors import CalibrationError, OptionError, PassError
from paretoc.compiler.sites import weight_sites
from torch import Tensor, nn
from torch.nn import functional as F

METHODS = ("svd", "asvd", "whitened")


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that lie near a few directions, with channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * 20 ** -torch.linspace(0, 1, width)
    sizes = torch.rand(width, generator=generator) * 2
    return torch.randn(rows, width, generator=generator) @ mixing.T * sizes.exp()


def textbook(weight: Tensor, inputs: Tensor, rank: int, method: str, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """(the matrix of that rank, the singular values), as the papers write it, float64."""
    weight, inputs = weight.detach().double(), inputs.double()
    scale = {
        "svd": lambda: torch.eye(inputs.shape[1], dtype=torch.float64),
        "asvd": lambda: (inputs.abs().mean(0) ** alpha).diag(),
        "whitened": lambda: torch.linalg.cholesky(inputs.T @ inputs),
    }[method]()
    left, sigma, right = torch.linalg.svd(weight @ scale, full_matrices=False)
    return left[:, :rank] * sigma[:rank] @ right[:rank] @ torch.linalg.inv(scale), sigma


def program_of(model: nn.Module, x: Tensor) -> pc.Program:
    program = pc.capture(model.eval(), x[:2])
    canonicalize(program)
    return program


def factored(
    program: pc.Program, inputs: Tensor, keep: float | None = None, **options: Any
) -> tuple[pc.Program, pc.PassResult]:
    """What the pass makes of a copy of the program, calibrated in batches of 100, and what it says."""
    program = program.clone()
    batches = [[batch] for batch in inputs.split(100)]
    return program, pc.Factorize(keep, **options).apply(program, pc.Context(batches=batches))


def product(program: pc.Program, name: str) -> Tensor:
    """U·V as stored in place of a weight, float64 `[O, …]`."""
    first, second = (program.get(f"{name}.{i}.weight").double() for i in (0, 1))
    return (second.flatten(1) @ first.flatten(1)).reshape(len(second), *first.shape[1:])


def output_error(weight: Tensor, other: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (weight.detach().double() - other).T).square().sum())


def share(option: str, after: pc.Program, before: pc.Program) -> float:
    """What is left of "parameters" or "macs"."""
    return getattr(cost(after), option) / getattr(cost(before), option)


class Deep(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (24, 40, 32, 12)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


# -- the factors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 48), (48, 20)], ids=str)
def test_the_factors_are_those_of_the_papers(shape):
    model, inputs = nn.Sequential(nn.Linear(shape[1], shape[0])), correlated(300, shape[1])
    program = program_of(model, inputs)
    expected = {method: textbook(model[0].weight, inputs, 6, method)[0] for method in METHODS}
    for method, other in itertools.product(METHODS, METHODS):
        found, _ = factored(program, inputs, method=method, rank=6, damp=0.0)
        equal = torch.allclose(product(found, "0"), expected[other], rtol=1e-4, atol=1e-4)  # a float32 Hessian
        assert equal == (method == other), (method, other)
        sizes = [found.get(f"0.{i}.weight").norm() for i in (0, 1)]
        assert 0.02 < sizes[0] / sizes[1] < 50, "neither factor holds all of the scale"


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_whitened_error_is_the_tail_of_the_singular_values(rank):
    model, inputs = nn.Sequential(nn.Linear(30, 24)), correlated(400, 30)
    program = program_of(model, inputs)
    found, result = factored(program, inputs, rank=rank, damp=0.0)
    assert not result.warnings
    _, sigma = textbook(model[0].weight, inputs, rank, "whitened")
    tail = float(sigma[rank:].square().sum())
    assert output_error(model[0].weight, product(found, "0"), inputs) == pytest.approx(tail, rel=1e-3)
    told = result.metrics["relative error of a layer"]
    assert told**2 == pytest.approx(tail / float(sigma.square().sum()), rel=1e-3)
    plain, _ = factored(program, inputs, rank=rank, method="svd")
    assert output_error(model[0].weight, product(plain, "0"), inputs) > 1.05 * tail


def test_whitened_is_better_than_asvd_than_svd_at_equal_size():
    """On inputs not seen before: log ratios of the errors over five draws, against their standard error."""
    errors = []
    for seed in range(5):
        torch.manual_seed(seed)
        model, inputs = nn.Sequential(nn.Linear(64, 64)), correlated(2000, 64, seed)
        program, (fitted, held_out) = program_of(model, inputs), inputs.split(1000)
        found = [factored(program, fitted, 0.5, method=method, round_to=4)[0] for method in METHODS]
        assert {f.get("0.0.weight").shape for f in found} == {(16, 64)}
        errors.append([output_error(model[0].weight, product(f, "0"), held_out) for f in found])
    ratios = torch.tensor(errors).log().diff(dim=1)  # asvd to svd, whitened to asvd
    assert (ratios.mean(0) + 3 * ratios.std(0) / 5**0.5 < 0).all(), ratios


def test_inputs_that_never_occur_cost_nothing():
    model, inputs = nn.Sequential(nn.Linear(32, 32)), correlated(12, 32)
    inputs[:, ::2] = 0
    program = program_of(model, inputs)
    whole, errors = output_error(model[0].weight, torch.zeros(32, 32), inputs), []
    for rank in (12, 4):  # the inputs have 12 directions
        found, result = factored(program, inputs, rank=rank)
        errors.append(output_error(model[0].weight, product(found, "0"), inputs) / whole)
        assert [text.split(":")[0] for text in result.warnings] == ["0"]  # singular
    assert errors[0] < 1e-3 < errors[1]


# -- the graph --------------------------------------------------------------------------------------------


def test_a_layer_becomes_a_sequential_of_two(reference, models):
    model, x = models.Mlp(64, 128, 64), torch.randn(3, 64)
    compiled = reference(model, ["low_rank:0.5,method=svd"], x)
    twin = copy.deepcopy(model)
    for name in ("up", "down"):
        layer = getattr(model, name)
        rank = compiled.program.get(f"{name}.0.weight").shape[0]
        thin = [nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)]
        setattr(twin, name, nn.Sequential(*thin))
    twin.load_state_dict(compiled.program.weights())
    assert torch.equal(compiled(x), twin(x))
    assert [site.path for site in weight_sites(compiled.program)] == ["up.0", "up.1", "down.0", "down.1"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(12, 16, 5, stride=2, padding=1),
        nn.Conv2d(12, 16, 3, padding=1, dilation=2, bias=False),
        nn.Conv2d(32, 24, 1, stride=2),
        nn.Conv3d(6, 8, 2),
    ],
    ids=str,
)
def test_a_convolution_becomes_a_thin_one_and_one_by_one(layer):
    x = torch.randn(3, layer.in_channels, *[7] * len(layer.kernel_size))
    program = program_of(nn.Sequential(layer), x)
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
    errors = {}
    for method in METHODS:
        found, _ = factored(program, x, rank=4, method=method)
        weight = product(found, "0").float()
        expected = convolution(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)
        torch.testing.assert_close(found.run([x])[0], expected, rtol=1e-4, atol=1e-5)  # float32 sums
        errors[method] = float((expected - layer(x)).detach().norm())
    assert errors["whitened"] < min(errors["svd"], errors["asvd"])


def test_a_weight_with_two_readers_is_factored_once_for_both_inputs(reference):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    model, x = Tied(), torch.randn(200, 16)
    program = program_of(model, x)
    found, _ = factored(program, x, rank=6, damp=0.0, sequential=False)
    (name,) = {n.removesuffix(".0.weight") for n in found.weights() if n.endswith(".0.weight")}
    inputs = torch.cat([x, torch.tanh(model.a(x)).detach()])  # of both readers
    expected, _ = textbook(model.a.weight, inputs, 6, "whitened")
    torch.testing.assert_close(product(found, name), expected, rtol=1e-4, atol=1e-4)
    weight = expected.float()
    y = F.linear(torch.tanh(F.linear(x, weight, model.a.bias)), weight, model.b.bias)
    torch.testing.assert_close(found.run([x])[0], y, rtol=1e-4, atol=1e-4)
    assert share("macs", found, program) == 6 * 32 / 16**2


def test_what_reads_one_input_can_share_its_first_factor():
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(24, 12, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.query(x), self.key(x), self.value(x)

    model, x = Projections(), correlated(300, 24)
    program = program_of(model, x)
    found, _ = factored(program, x, rank=8, shared=True, damp=0.0)
    biases = ("query.1.bias", "key.1.bias")
    assert set(found.weights()) == {"query.0.weight", "query.1.weight", "key.1.weight", "value.1.weight", *biases}
    parts = (model.query, model.key, model.value)
    expected, _ = textbook(torch.cat([p.weight for p in parts]), x, 8, "whitened")
    for part, weight, y in zip(parts, expected.float().split([24, 12, 12]), found.run([x]), strict=True):
        torch.testing.assert_close(y, F.linear(x, weight, part.bias), rtol=1e-3, atol=1e-2)
    assert share("macs", found, program) == 8 * (24 + 48) / (24 * 48)
    alone, _ = factored(program, x, rank=8)
    assert alone.get("key.weight").shape == (12, 24)  # 8 × (24 + 12) saves nothing


def test_each_layer_sees_what_the_factored_ones_before_it_give():
    model, x = Deep(), torch.randn(300, 24)
    program, seen = program_of(model, x), {}
    for sequential in (True, False):
        found, _ = factored(program, x, rank=8, damp=0.0, sequential=sequential)
        first = product(found, "layers.0").float() if sequential else model.layers[0].weight.detach()
        inputs = torch.tanh(F.linear(x, first, model.layers[0].bias.detach()))
        expected, _ = textbook(model.layers[1].weight, inputs, 8, "whitened")
        seen[sequential] = product(found, "layers.1")
        torch.testing.assert_close(seen[sequential], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(seen[True], seen[False], rtol=1e-3, atol=1e-3)


# -- how small --------------------------------------------------------------------------------------------


def test_keep_is_a_share_of_the_parameters_rounded_down():
    x = torch.randn(4, 96)
    program = program_of(nn.Sequential(nn.Linear(96, 48, bias=False)), x)
    for keep, multiple, rank in ((0.5, 1, 16), (0.5, 8, 16), (0.7, 8, 16), (0.7, 1, 22), (0.1, 8, 8)):
        found, _ = factored(program, x, keep, method="svd", round_to=multiple)
        assert found.get("0.0.weight").shape == (rank, 96), (keep, multiple)
        assert share("parameters", found, program) == rank * (96 + 48) / (96 * 48)


def test_energy_is_what_the_outputs_keep():
    model, x = nn.Sequential(nn.Linear(40, 40)), correlated(500, 40)
    found, _ = factored(program_of(model, x), x, energy=0.97, round_to=1, damp=0.0)
    rank = found.get("0.0.weight").shape[0]
    _, sigma = textbook(model[0].weight, x, rank, "whitened")
    lost = [float(sigma[r:].square().sum() / sigma.square().sum()) for r in (rank, rank - 1)]
    assert lost[0] <= 0.03 < lost[1]


def test_a_budget_is_met_and_spent_where_it_helps_most():
    """As the best of all combinations of ranks, tried one by one."""
    model, x = Deep(), correlated(400, 24)
    program, inputs, sizes, losses = program_of(model, x), x, [], []
    for layer in model.layers:
        _, sigma = textbook(layer.weight, inputs, 0, "whitened")
        rows, width = layer.weight.shape
        ranks = [r for r in range(4, width, 4) if r * (rows + width) < rows * width]
        sizes.append([rows * width, *(r * (rows + width) for r in ranks)])
        losses.append([0.0, *(float(sigma[r:].square().sum() / sigma.square().sum()) for r in ranks)])
        inputs = torch.tanh(layer(inputs)).detach()
    biases = sum(len(layer.bias) for layer in model.layers)
    for option, fixed, wanted in itertools.product(("parameters", "macs"), (biases,), (0.4, 0.7)):
        fixed = fixed if option == "parameters" else 0
        whole, best = fixed + sum(s[0] for s in sizes), (torch.inf, 0)
        for chosen in itertools.product(*(range(len(s)) for s in sizes)):
            total = fixed + sum(s[i] for s, i in zip(sizes, chosen, strict=True))
            loss = sum(e[i] for e, i in zip(losses, chosen, strict=True))
            best = min(best, (loss, total)) if total <= wanted * whole else best
        found, result = factored(program, x, **{option: wanted}, round_to=4, damp=0.0, sequential=False)
        assert share(option, found, program) == best[1] / whole <= wanted
        assert len(result.skipped) + len(result.matched) == 3


def test_a_budget_spends_more_on_what_loses_more():
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Tanh(), nn.Linear(32, 32, bias=False))
    with torch.no_grad():
        left, _, right = torch.linalg.svd(model[0].weight)
        model[0].weight.copy_(left * 0.5 ** torch.arange(32) @ right)  # of low rank; the other is not
    x = torch.randn(500, 32)
    program = program_of(model, x)
    found, _ = factored(program, x, parameters=0.5, method="svd", round_to=1)
    assert found.get("0.0.weight").shape[0] < 10
    uniform, _ = factored(program, x, 0.5, method="svd", round_to=1)
    assert share("parameters", found, program) <= share("parameters", uniform, program) == 0.5
    errors = [float((p.run([x])[0] - program.run([x])[0]).norm()) for p in (found, uniform)]
    assert errors[0] < 0.9 * errors[1]


def test_a_budget_out_of_reach_says_what_can_be_reached(refused):
    x = torch.randn(2, 24)
    program = program_of(Deep(), x)
    least = 8 * (24 + 40 + 40 + 32 + 32 + 12) / (24 * 40 + 40 * 32 + 32 * 12)
    sentence = f"macs=0.3 cannot be reached: the least that the smallest ranks leave is {least:.4f}"
    error = refused(PassError, sentence, lambda: factored(program, x, macs=0.3, method="svd", round_to=8))
    assert error.fix == f"ask for {least:.4f} or more, widen targets=, or lower round_to"
    found, _ = factored(program, x, macs=least + 1e-6, method="svd", round_to=8)
    assert share("macs", found, program) == pytest.approx(least)


# -- what it leaves, and refuses --------------------------------------------------------------------------


def test_what_no_rank_makes_smaller_is_left(models):
    x = torch.randn(2, 4, 8, 8)
    _, result = factored(program_of(models.Cnn(), x), x, rank=6, method="svd")
    assert result.matched == ["stem"]
    reasons = {"depthwise": "grouped convolution", "head": "rank 6 of a matrix of 16 × 8 saves nothing"}
    assert result.skipped == reasons


def test_a_tied_embedding_is_left_and_so_is_what_is_encoded(models, refused):
    ids = torch.randint(0, 48, (2, 5))
    program = program_of(models.TiedLanguageModel(), ids)
    _, result = factored(program, ids, rank=8, method="svd")
    assert result.matched == ["middle"]
    assert list(result.skipped.values()) == ["its weight is also read by aten.embedding.default"]
    pc.PruneNM("2:4").apply(program, pc.Context())
    sentence = "middle: already stored as NM(n=2, m=4)"
    refused(PassError, sentence, lambda: factored(program, ids, rank=8, method="svd"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "nothing says how small the model shall be"),
        ({"keep": 0.5, "rank": 8}, "keep and rank says how small the model shall be"),
        ({"keep": 1.0}, "keep=1.0 is no share"),
        ({"energy": 0.0}, "energy=0.0 is no share"),
        ({"macs": 1.5}, "macs=1.5 is no share"),
        ({"rank": 0}, "rank=0 is not valid"),
        ({"keep": 0.5, "round_to": 0}, "round_to=0 is not valid"),
        ({"keep": 0.5, "damp": -1.0}, "damp=-1.0 is not valid"),
        ({"keep": 0.5, "method": "pca"}, "no method is called 'pca'"),
    ],
)
def test_bad_options_are_refused(refused, options, sentence):
    refused(OptionError, sentence, lambda: pc.Factorize(**options))


def test_nothing_to_do_and_missing_data_are_errors(reference, refused, models):
    x = torch.randn(2, 16)
    call = lambda: reference(models.Mlp(), ["low_rank:0.5,method=svd,round_to=32"], x)  # noqa: E731
    refused(PassError, "no layer becomes smaller: up: rank 32 of a matrix of 32 × 16 saves nothing", call)
    refused(CalibrationError, "needs calibration data", lambda: reference(models.Mlp(), ["low_rank:0.5"], x))


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"macs": 0.8, "shared": True}], ids=str)
def test_the_pass_conforms(options, models):
    result = paretoc.testing.check_pass(pc.Factorize(**options, round_to=8), models.Mlp(32, 64, 48), torch.randn(4, 32))
    assert result.matched


# -- what comes after -------------------------------------------------------------------------------------


def test_each_factor_is_quantised_as_a_layer_of_its_own(reference, models):
    model, x = models.Mlp(128, 256, 128), torch.randn(40, 128)
    compiled = reference(model, ["low_rank:0.8,round_to=32", "quantize:W4A16,fitter=gptq"], x[:2], calibration=[x])
    rows = {row.site: row.encoding for row in compiled.explain().rows}
    assert rows == dict.fromkeys(["up.0", "up.1", "down.0", "down.1"], "Affine(bits=4, group=32)")


def test_onnx_runtime_runs_the_factors_and_an_artifact_keeps_them(models, tmp_path):
    model, x = models.Mlp(64, 256, 64).eval(), torch.randn(5, 64)
    compiled = pc.compile(model, ["low_rank:0.7,round_to=32"], example_inputs=x, calibration=[x])
    assert share("macs", compiled.program, compiled.original) == 32 * (64 + 256) / (64 * 256)
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=1e-4, atol=1e-5)  # float32 sums
    compiled.save(tmp_path / "out")
    assert torch.equal(pc.load(tmp_path / "out")(x), compiled(x))
