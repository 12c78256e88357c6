"""The kernel table: what it chooses, that every form is exact, and that a measured table is kept and used."""

import json

import numpy as np
import paretoc as pc
import pytest
import torch
from paretoc.backends import OnnxRuntime
from paretoc.backends.onnxruntime import probe
from paretoc.backends.onnxruntime.forms import FORMS
from paretoc.backends.onnxruntime.speeds import ROWS, Speeds, cache_file, load_speeds

#: form → a scheme whose layers it fits
SCHEMES = {
    "DynamicMatMul": "W8A8-dynamic",
    "SharedMatMul": "W8A8",
    "IntegerMatMul": "W8A8-dynamic,granularity=token",
    "GroupMatMul": "W4A8",
    "BlockMatMul": "W4A16",
    "StoredMatMul": "W4A16,symmetric=false",
    "FoldedMatMul": "W8A16",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARETOC_CACHE", str(tmp_path / "cache"))


def _only(form: str) -> Speeds:
    return Speeds({name: (float(name == form),) * len(ROWS) for name in FORMS})


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).eval()


def _differences(layer, scheme: str) -> tuple[float, list[str]]:
    x = torch.randn(2, 7, 64)
    compiled = pc.compile(layer, [f"quantize:{scheme},targets=Linear"], example_inputs=(x,), calibration=[x])
    expected = compiled.program(x)
    forms = [site["form"] for site in compiled._compiled().executable.settings["sites"]]
    return float((compiled(x) - expected).abs().max() / expected.abs().max()), forms


@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_eager_reference(layer, form):
    _only(form).save()
    difference, forms = _differences(layer, SCHEMES[form])
    assert forms == [form, form]
    assert difference < 1e-5


def test_the_comparison_sees_a_wrong_form(layer, monkeypatch):
    _only("FoldedMatMul").save()
    emit = type(FORMS["FoldedMatMul"]).emit

    def doubled(self, lowering, linear):
        value = emit(self, lowering, linear)
        return lowering.emit(linear.node, "Add", [value, value])

    monkeypatch.setattr(type(FORMS["FoldedMatMul"]), "emit", doubled)
    assert _differences(layer, SCHEMES["FoldedMatMul"])[0] > 0.5


def test_a_form_that_takes_less_memory_wins_unless_it_is_much_slower():
    speeds = Speeds({"small": (1.0, 0.5, 0.9), "large": (1.2, 1.0, 1.0)})
    assert [speeds.fastest(["small", "large"], rows) for rows in (1, 10, 20, 64, 1000)] == [
        "small", "large", "large", "small", "small",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"table": {"DynamicMatMul": [1]}})])
def test_a_damaged_table_is_not_used(content):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert load_speeds() == Speeds()


def test_a_table_that_cannot_be_kept_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARETOC_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(pc.OptionError, match="PARETOC_CACHE"):
        Speeds().save()


def test_calibration_measures_every_form_and_is_used_afterwards(monkeypatch):
    monkeypatch.setattr(probe, "_WIDTH", 64)
    monkeypatch.setattr(probe, "_LAYERS", 1)
    kept = OnnxRuntime().calibrate()
    assert kept.speeds.keys() == FORMS.keys()
    assert all(speed > 0 for row in kept.speeds.values() for speed in row.values())
    used = load_speeds()
    assert "this machine" in used.measured
    assert {form: list(row.values()) for form, row in kept.speeds.items()} == dict(used.table)


def test_the_probe_times_the_form_it_says(monkeypatch):
    """Its sessions hold the operator of their form: a table of something else would choose wrongly."""
    monkeypatch.setattr(probe, "_WIDTH", 64)
    monkeypatch.setattr(probe, "_LAYERS", 2)
    expected = probe._session("fp32", 3).run(None, {"x": np.ones((1, 3, 64), np.float32)})[0]
    assert expected.shape == (1, 3, 64)
    for form in FORMS:
        assert probe._session(form, 3).run(None, {"x": np.ones((1, 3, 64), np.float32)})[0].shape == (1, 3, 64)
