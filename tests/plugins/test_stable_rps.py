"""STABLE-RPS: the mapping of the paper, one stored array, exact for what was trained so; better than pruning."""

from __future__ import annotations

from math import ceil, prod

import paretoc as pc
import paretoc.testing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.capture import capture
from paretoc.compiler.sites import weight_sites
from paretoc.plugins import Folded, StableRps
from paretoc.plugins.hashing import PRIME, coefficients
from paretoc.plugins.stable_rps import fold, gradient_scale, plan
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


def one_by_one(encoding: Folded, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The equation, one weight at a time."""
    a, b, c = coefficients(encoding.seed)
    chunk, weights = encoding.chunk or encoding.slots, []
    for i in range(encoding.offset, encoding.offset + prod(shape)):
        hashed = (a * (i // chunk) + b * (i // chunk) ** 2 + c) % PRIME
        sign = -1 if hashed // encoding.slots % 2 else 1
        weights.append(sign * encoding.scale * float(values[(hashed + i % chunk) % encoding.slots]))
    return torch.tensor(weights).reshape(shape)


# -- the encoding -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(0, 500), st.integers(0, 70), st.integers(0, 9), st.integers(1, 90))
def test_it_is_the_equation(slots, offset, chunk, seed, rows):
    encoding = Folded(slots, offset, 0.37, min(chunk, slots), seed)
    values = torch.randn(slots, generator=torch.Generator().manual_seed(seed))
    decoded = encoding.decode({"values": values}, (rows, 2))
    torch.testing.assert_close(decoded, one_by_one(encoding, values, (rows, 2)), rtol=1e-6, atol=0)
    index, scale = encoding.places(2 * rows)
    torch.testing.assert_close((values[index] * scale).float(), decoded.flatten(), rtol=1e-6, atol=0)


def test_the_hash_is_the_same_everywhere():
    assert coefficients(0) == (458671758, 1504627871, 181170396)
    assert len({coefficients(seed) for seed in range(100)}) == 100


@pytest.mark.parametrize("encoding", [Folded(64, 40, 0.5), Folded(48, 0, 1.0, 8, 3)], ids=str)
def test_it_conforms(encoding):
    pc.testing.check_encoding(encoding, shapes=[(12, 16), (6, 8, 5)])


def test_folding_reads_every_number_equally_often_and_hashing_does_not():
    reads = {chunk: Folded(200, chunk=chunk).places(2000)[0].bincount(minlength=200) for chunk in (0, 1, 16)}
    assert reads[0].tolist() == [10] * 200
    assert all(reads[chunk].min() < 8 < 12 < reads[chunk].max() for chunk in (1, 16))
    whole, _ = Folded(500).places(500)
    assert sorted(whole.tolist()) == list(range(500))  # a permutation: without compression any model fits
    hashed, _ = Folded(500, chunk=1).places(500)
    assert len(set(hashed.tolist())) / 500 == pytest.approx(1 - 1 / 2.718, abs=0.05)


def test_what_is_stored_is_the_least_squares_array():
    torch.manual_seed(0)
    shapes = {"a": (20, 6), "b": (8, 20), "c": (3, 8, 2)}
    encodings = list(plan(shapes, 5.0, seed=4).values())
    weights = [torch.randn(shape) for shape in shapes.values()]
    design, done = torch.zeros(328, encodings[0].slots), 0  # W = design · Z
    for encoding, shape in zip(encodings, shapes.values(), strict=True):
        for slot in range(encoding.slots):
            unit = torch.zeros(encoding.slots)
            unit[slot] = 1
            design[done : done + prod(shape), slot] = one_by_one(encoding, unit, shape).flatten()
        done += prod(shape)
    expected = torch.linalg.lstsq(design.double(), torch.cat([w.flatten() for w in weights]).double()).solution
    torch.testing.assert_close(fold(weights, encodings)["values"].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_scale_is_that_of_the_paper():
    shapes = {"a": (30, 4), "b": (10, 9)}
    encodings = plan(shapes, 7.0)
    values = torch.randn(encodings["a"].slots, requires_grad=True)
    sums = torch.zeros(2, len(values), dtype=torch.float64)
    for name, encoding in encodings.items():
        index, _ = encoding.places(prod(shapes[name]))
        for slot in index.tolist():
            sums[:, slot] += torch.tensor([encoding.scale, 1.0], dtype=torch.float64)
    expected = sums[0] ** 2 / (sums[1] + 1e-3) + 1e-6
    torch.testing.assert_close(gradient_scale(encodings, shapes).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Folded(0), "slots=0, offset=0 is no place"),
        (lambda: Folded(8, -1), "slots=8, offset=-1 is no place"),
        (lambda: Folded(8, chunk=9), "pieces of 9 do not fit 8 slots"),
        (lambda: Folded(8, scale=0.0), "0.0 is not a scale"),
        (lambda: StableRps(0.5), "compression=0.5, chunk=0 is not valid"),
        (lambda: StableRps(chunk=-1), "compression=10.0, chunk=-1 is not valid"),
    ],
)
def test_bad_options_are_refused(refused, make, sentence):
    refused(pc.OptionError, sentence, make)


# -- the pass -----------------------------------------------------------------------------------------------


def folded_model(model: nn.Module, compression: float, chunk: int = 0) -> Tensor:
    """Give a model weights that read one array; returns the array."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
    encodings = plan(shapes, compression, chunk)
    values = torch.randn(next(iter(encodings.values())).slots)
    with torch.no_grad():
        for name, encoding in encodings.items():
            model.get_parameter(name).copy_(encoding.decode({"values": values}, shapes[name]))
    return values


def test_the_pass_conforms(models):
    pc.testing.check_pass(StableRps(4.0), models.Mlp(), torch.randn(4, 16))


def test_a_model_that_was_trained_so_is_stored_exactly_once(models, tmp_path):
    model, x = models.Mlp(32, 64, 16).eval(), torch.randn(3, 32)
    values = folded_model(model, 6.0)
    compiled = pc.compile(model, ["stable_rps:6"], example_inputs=x)
    stored = compiled.program.weights()
    assert set(stored) == {"stable_rps.values", "up.bias", "down.bias"}
    torch.testing.assert_close(stored["stable_rps.values"], values)
    report = compiled.report(latency=False)
    assert report.compiled.bytes == 4 * (ceil((32 + 16) * 64 / 6) + 64 + 16)
    assert report.passes[-1]["metrics"]["relative error"] < 1e-7
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)  # float32 sums
    compiled.save(tmp_path / "out")
    assert torch.equal(pc.load(tmp_path / "out")(x), compiled(x))
    disk = (tmp_path / "out/weights.safetensors").stat().st_size
    assert disk < report.compiled.bytes + 2000 < report.original.bytes


def test_chunks_are_stored_exactly_too_where_the_model_was_trained_so(models):
    model, x = models.Mlp(), torch.randn(3, 16)
    folded_model(model, 12.0, chunk=16)
    program = capture(model, x)
    result = StableRps(12.0, chunk=16).apply(program, pc.Context())
    assert result.metrics["relative error"] < 1e-7
    torch.testing.assert_close(program.run([x])[0], model(x).detach(), rtol=1e-5, atol=1e-5)
    for other in (StableRps(12.0, 8), StableRps(12.0, 16, seed=1), StableRps(11.0, 16)):
        assert other.apply(capture(model, x), pc.Context()).metrics["relative error"] > 0.5


def test_without_compression_any_model_is_stored_exactly(models, reference):
    model, x = models.Cnn(), torch.randn(2, 4, 6, 6)
    exact = reference(model, ["stable_rps:1"], x)
    torch.testing.assert_close(exact(x), model.eval()(x), rtol=1e-4, atol=1e-5)  # s·(W/s), and folded batch norms
    lossy = reference(model, ["stable_rps:1,chunk=1"], x)  # HashedNet
    assert lossy.report(latency=False).passes[-1]["metrics"]["relative error"] > 0.3


def test_a_shared_array_survives_what_is_done_to_one_of_its_readers(models):
    program = capture(models.Mlp(), torch.randn(2, 16))
    StableRps(4.0).apply(program, pc.Context())
    weights = [program.weight_value(site.weight) for site in weight_sites(program)]
    first = weight_sites(program)[0].weight
    dense = program.restore(first, weights[0])
    program.refresh()
    assert [program.encoding(site.weight) is None for site in weight_sites(program)] == [True, False]
    program.encode(weight_sites(program)[1].weight, pc.Affine(8), pc.Affine(8).encode(weights[1]))
    program.refresh()
    assert "stable_rps.values" not in program.weights()
    assert torch.equal(program.weight_value(dense), weights[0])
    torch.testing.assert_close(program.weight_value(weight_sites(program)[1].weight), weights[1], rtol=0, atol=0.01)


def test_later_passes_leave_shared_weights(models, reference, refused):
    call = lambda: reference(models.Mlp(), ["stable_rps:4", "quantize:W8A16"], torch.randn(2, 16))  # noqa: E731
    refused(pc.PassError, "already stored as Folded(slots=192", call)


# -- what the paper claims, small ---------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(parameters: list[Tensor], run, x: Tensor, y: Tensor, epochs: int) -> None:
    optimiser = torch.optim.Adam(parameters, 4e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimiser.zero_grad()
            F.cross_entropy(run(x[batch]), y[batch]).backward()
            optimiser.step()


def test_trained_from_scratch_folding_is_no_worse_than_pruning_at_thirty_times():
    """Accuracy on digits, paired over three seeds: folding against magnitude pruning with as many steps again."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    changes = []
    for seed in range(3):
        torch.manual_seed(seed)
        (x_train, x_test), (y_train, y_test) = (
            t[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].split([1347, 450]) for t in (x, y)
        )
        accuracy = []
        model = mlp()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}
        encodings = plan(shapes, 30.0, seed=seed, spread=0.1)
        values = torch.empty(encodings["0.weight"].slots).uniform_(-0.1, 0.1).requires_grad_()

        def shared(inputs: Tensor, model=model, encodings=encodings, values=values, shapes=shapes) -> Tensor:
            weights = {n: e.decode({"values": values}, shapes[n]) for n, e in encodings.items()}
            return functional_call(model, weights, inputs)

        trained([values, model[0].bias, model[2].bias], shared, x_train, y_train, 12)
        accuracy.append((shared(x_test).argmax(1) == y_test).float().mean())

        dense = mlp()
        trained(list(dense.parameters()), dense, x_train, y_train, 12)
        weights = {name: dense.get_parameter(name) for name in shapes}
        kept = torch.cat([w.detach().abs().flatten() for w in weights.values()]).topk(len(values)).values[-1]
        masks = {name: w.detach().abs() >= kept for name, w in weights.items()}

        def sparse(inputs: Tensor, dense=dense, weights=weights, masks=masks) -> Tensor:
            return functional_call(dense, {n: w * masks[n] for n, w in weights.items()}, inputs)

        trained(list(dense.parameters()), sparse, x_train, y_train, 12)
        accuracy.append((sparse(x_test).argmax(1) == y_test).float().mean())
        changes.append(accuracy[0] - accuracy[1])
    change = torch.stack(changes)
    assert change.mean() > -2 * change.std() / len(change) ** 0.5, change
