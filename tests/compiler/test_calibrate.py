"""Calibration: every form of data, what it refuses, and statistics against the values themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from paretoc.compiler.calibrate import Observer, gather, read_batches
from paretoc.compiler.capture import capture
from paretoc.compiler.errors import CalibrationError
from paretoc.compiler.statistics import MinMax, Statistic
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DATA = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6)


@pytest.fixture(scope="module")
def mlp(models):
    return capture(models.Mlp(), torch.randn(2, 16))


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor, factor: float = 2.0) -> Tensor:
        return x + y * factor


@pytest.fixture(scope="module")
def two():
    return capture(Two(), {"x": torch.randn(2, 4), "y": torch.randn(2, 4)})


def _call(model: Any) -> None:
    model(DATA[:2])
    model(x=DATA[2:])


FORMS = {
    "tensors": [DATA[:2], DATA[2:]],
    "tuples": [(DATA[:2],), (DATA[2:],)],
    "lists": [[DATA[:2]], [DATA[2:]]],
    "dicts": [{"x": DATA[:2]}, {"x": DATA[2:]}],
    "args and kwargs": [((DATA[:2],), {}), ((), {"x": DATA[2:]})],
    "labelled": [(DATA[:2], LABELS[:2]), [DATA[2:], LABELS[2:]]],
    "a callable": _call,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_data(mlp, form):
    batches = read_batches(mlp, form)
    assert [len(b) for b in batches] == [1, 1]
    assert torch.equal(torch.cat([b[0] for b in batches]), DATA)


def test_a_generator_and_a_data_loader(mlp):
    assert [b[0].shape[0] for b in read_batches(mlp, (x for x in (DATA[:1], DATA[1:])))] == [1, 5]
    loader = DataLoader(TensorDataset(DATA, LABELS), batch_size=4)
    assert [b[0].shape[0] for b in read_batches(mlp, loader)] == [4, 2]


def test_two_inputs_and_a_label(two):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for form in ([(x, y)], [{"y": y, "x": x}], [(x, y, LABELS[:3])], lambda model: model(x, y=y)):
        (batch,) = read_batches(two, form)
        assert [t.data_ptr() for t in batch] == [x.data_ptr(), y.data_ptr()]


def test_the_callable_sees_the_models_outputs(mlp, models):
    seen = []
    read_batches(mlp, lambda model: seen.append(model(DATA)))
    assert seen[0].shape == (6, 8)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "the calibration data is empty"),
        ((x for x in ()), "the calibration data is empty"),
        (lambda model: None, "the calibration data is empty"),
        (DATA, "calibration data of type Tensor is not understood"),
        ({"x": DATA}, "calibration data of type dict is not understood"),
        ("data", "calibration data of type str is not understood"),
        (3, "calibration data of type int is not understood"),
        ([3], "example inputs of type int are not understood"),
        ([torch.randn(2, 15)], "input 'x' has shape [2, 15], the model was captured with ['x_0', 16]"),
        ([torch.randn(2, 3, 16)], "input 'x' has shape [2, 3, 16]"),
        ([{"y": DATA}], "missing ['x'], extra ['y']"),
        ([(3.0,)], "input 'x' must be a tensor, got float"),
    ],
    ids=[
        "list",
        "generator",
        "callable",
        "tensor",
        "dict",
        "text",
        "number",
        "numbers",
        "width",
        "rank",
        "name",
        "float",
    ],
)
def test_data_that_does_not_fit_is_refused(mlp, refused, data, sentence):
    refused(CalibrationError, sentence, lambda: read_batches(mlp, data))


def test_the_batch_that_does_not_fit_is_named(mlp, refused):
    error = refused(CalibrationError, "has shape [2, 3]", lambda: read_batches(mlp, [DATA, torch.randn(2, 3)]))
    assert error.where == "calibration batch 1"


def test_data_of_another_dtype_is_refused(mlp, refused):
    def calibrate():
        return gather(mlp, [MinMax("x")], read_batches(mlp, [DATA.double()]))

    refused(CalibrationError, "float64", calibrate)


def test_inputs_of_different_batch_are_refused(two, refused):
    def calibrate():
        return gather(two, [MinMax("x")], read_batches(two, [(torch.randn(3, 4), torch.randn(2, 4))]))

    refused(CalibrationError, "has shape", calibrate)


# -- statistics ------------------------------------------------------------------------------------------


def test_min_and_max_over_all_batches(mlp, models):
    gelu = mlp.calls(torch.ops.aten.gelu.default)[0]
    statistics = [MinMax("x"), MinMax(gelu.name), MinMax("x")]
    gathered = gather(mlp, statistics, [[DATA[:1]], [DATA[1:2]], [DATA[2:]]])
    assert set(gathered) == set(statistics)
    assert gathered[MinMax("x")].tolist() == [float(DATA.min()), float(DATA.max())]
    hidden = torch.nn.functional.gelu(DATA @ mlp.get("up.weight").T + mlp.get("up.bias"))
    want = torch.stack([hidden.min(), hidden.max()])
    torch.testing.assert_close(gathered[MinMax(gelu.name)], want.detach(), rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Count(Statistic):
    def start(self) -> int:
        return 0

    def update(self, state: int, value: Tensor) -> int:
        return state + value.shape[0]

    def finish(self, state: int) -> str:
        return f"{state} rows"


def test_a_statistic_of_ones_own(mlp):
    assert gather(mlp, [Count("x")], [[DATA], [DATA[:1]]]) == {Count("x"): "7 rows"}


def test_equal_statistics_are_gathered_once_and_none_runs_nothing(mlp, monkeypatch):
    runs = []
    monkeypatch.setattr(Observer, "run", lambda self, *batch: runs.append(batch))
    assert gather(mlp, [], [[DATA]]) == {}
    assert runs == []
    gather(mlp, [Count("x"), Count("x"), MinMax("x")], [[DATA], [DATA]])
    assert len(runs) == 2


def test_progress_is_reported(mlp):
    labels = []

    def track(items, label):
        labels.append((label, len(list(items))))
        return items

    gather(mlp, [Count("x")], [[DATA], [DATA]], track)
    assert labels == [("calibrating", 2)]


def test_the_observer_sees_every_value_and_returns_the_outputs(mlp):
    seen = {}
    with torch.no_grad():
        outputs = Observer(mlp.module, seen.__setitem__).run(DATA)
    assert set(seen) == {n.name for n in mlp.graph.nodes}
    torch.testing.assert_close(outputs[0], mlp(DATA), rtol=0, atol=0)
