"""The kernel table: what it chooses, that every form is exact, and that a measured table is kept and used."""

import json

import paretoc as pc
import pytest
import torch
from paretoc.backends import OnnxRuntime
from paretoc.backends.onnxruntime import forms, probe, speeds
from paretoc.backends.onnxruntime.forms import FORMS
from paretoc.backends.onnxruntime.speeds import MARGIN, ROWS, Speeds, cache_file, cpu_flags, load_speeds, shipped

#: form → a scheme whose layers it fits
SCHEMES = {
    "DynamicMatMul": "W8A8-dynamic",
    "SharedMatMul": "W8A8",
    "ShiftedMatMul": "W8A8",
    "RoundedMatMul": "W8A8",
    "IntegerMatMul": "W8A8-dynamic,granularity=token",
    "GroupMatMul": "W4A8",
    "BlockMatMul": "W4A16",
    "StoredMatMul": "W4A16,symmetric=false",
    "FoldedMatMul": "W8A16",
}
#: what tables of ONNX Runtime's own providers hold: their kernels take zero points as they are
OWN = FORMS.keys() - {"ShiftedMatMul"}


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


@pytest.mark.parametrize("bias", [True, False])
def test_a_zero_point_moves_into_the_bias(bias):
    _only("ShiftedMatMul").save()
    net = torch.nn.Sequential(torch.nn.Linear(64, 32, bias), torch.nn.ReLU(), torch.nn.Linear(32, 8, bias)).eval()
    assert _differences(net, "W8A8")[0] < 1e-5
    compiled = pc.compile(net, ["quantize:W8A8"], example_inputs=(x := torch.randn(7, 64),), calibration=[x])
    model = compiled._compiled().executable.model
    stored = [node.inputs[2].const_value.numpy() for node in model.graph if node.op_type == "QuantizeLinear"]
    read = [node.inputs[0].producer().inputs[2].const_value.numpy() for node in model.graph if node.op_type == "MatMul"]
    assert [zero > 0 for zero in stored] == [True, False]  # that of what is behind a ReLU is 0 anyway
    assert len(read) == 2 and not any(read)


def test_a_zero_point_left_behind_is_caught(layer, monkeypatch):
    monkeypatch.setattr(forms, "number_of", lambda value: 0.0)
    _only("ShiftedMatMul").save()
    assert _differences(layer, "W8A8")[0] > 0.1


def test_a_bias_that_is_computed_takes_no_zero_point():
    class Linear(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, x.mean((0, 1))[:8])

    _only("ShiftedMatMul").save()
    difference, chosen = _differences(torch.nn.Sequential(Linear(64, 8)).eval(), "W8A8")
    assert len(chosen) == 1 and chosen != ["ShiftedMatMul"] and difference < 1e-5


def test_a_form_that_takes_less_memory_wins_unless_it_is_much_slower():
    table = Speeds({"small": (1.0, 0.5, 0.9), "large": (1.2, 1.0, 1.0)})
    assert [table.fastest(["small", "large"], rows) for rows in (1, 10, 20, 64, 1000)] == [
        "small", "large", "large", "small", "small",
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"table": {"DynamicMatMul": [1]}})])
def test_a_damaged_table_is_not_used(content):
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    assert load_speeds() == shipped()


def test_a_table_is_read_once_and_again_when_it_changes(monkeypatch):
    reads = []
    monkeypatch.setattr(speeds.json, "loads", lambda text: reads.append(text) or json.JSONDecoder().decode(text))
    for form in ("StoredMatMul", "FoldedMatMul"):
        _only(form).save()
        assert [load_speeds().of(name, 1) for _ in range(3) for name in FORMS if name == form] == [1.0] * 3
    assert len(reads) == 2
    cache_file().unlink()
    assert load_speeds() == shipped()


def _machine(monkeypatch, *flags: str) -> Speeds:
    monkeypatch.setattr(speeds, "cpu_flags", lambda: frozenset(flags))
    return load_speeds()


def test_the_table_is_that_of_the_cpu(monkeypatch):
    with_vnni, without, unknown = (_machine(monkeypatch, *f) for f in (("avx2", "avx512_vnni"), ("avx2",), ()))
    amx = _machine(monkeypatch, "avx2", "avx512_vnni", "amx_int8")
    assert amx.measured and amx.peaks["int8"] > 2 * with_vnni.peaks["int8"] and amx.table.keys() == OWN
    assert (with_vnni.joint_rows, amx.joint_rows, unknown.joint_rows) == (256, 256, 0)
    assert with_vnni.measured and not with_vnni.stated
    assert without.stated and unknown.stated and not without.measured and not unknown.measured
    assert all(table.table.keys() == OWN for table in (with_vnni, without, unknown))
    for form, share in (("DynamicMatMul", 1 / 2), ("GroupMatMul", 2 / 3), ("FoldedMatMul", 1)):
        assert [without.of(form, r) for r in ROWS] == pytest.approx([with_vnni.of(form, r) * share for r in ROWS])
    assert not any(unknown.known(form) or unknown.of(form, 1) >= MARGIN for form in FORMS)


def test_where_no_speed_is_known_the_order_of_the_table_chooses(monkeypatch):
    cpu = _machine(monkeypatch)
    assert cpu.fastest(["IntegerMatMul", "StoredMatMul", "FoldedMatMul"], 16) == "IntegerMatMul"
    assert cpu.fastest(["StoredMatMul", "FoldedMatMul"], 1) == "FoldedMatMul"
    cuda = load_speeds("CUDAExecutionProvider")
    assert cuda.table.keys() == OWN and "CUDA" in cuda.stated
    assert cuda.fastest(["IntegerMatMul", "StoredMatMul", "FoldedMatMul"], 16) == "FoldedMatMul"
    assert cuda.fastest(["BlockMatMul", "StoredMatMul"], 1) == "BlockMatMul"


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_has_a_table_of_its_own(precision, monkeypatch):
    """Of the forms with standard operators; whatever is known of it, a static product is QDQ without a zero point."""
    name = f"OpenVINO-{precision}"
    standard = {form for form in FORMS if FORMS[form].standard}
    for flags in (("avx2", "amx_int8"), ("avx2", "avx512_vnni"), ("avx2", "avx512_vnni", "avx512_bf16"), ("avx2",)):
        monkeypatch.setattr(speeds, "cpu_flags", lambda flags=flags: frozenset(flags))
        table = load_speeds(name)
        assert table.table.keys() == standard and bool(table.stated) is (flags == ("avx2",))
        fitting = [form for form in FORMS if form in standard]
        assert all(table.fastest(fitting, rows) == "ShiftedMatMul" for rows in ROWS)
    kept = {form: (7.0,) * len(ROWS) for form in standard}
    Speeds(kept).save(name)
    assert load_speeds(name).of("IntegerMatMul", 1) == 7.0 and load_speeds() == shipped()


def test_the_flags_are_those_of_the_cpu(monkeypatch):
    found = cpu_flags.__wrapped__()
    assert found == frozenset() or found >= {"avx2"} or "sse" in found
    assert ("avx2" in found) == torch.backends.cpu.get_cpu_capability().startswith("AVX")
    monkeypatch.setattr(speeds.Path, "read_text", lambda _: "processor: 0\nFeatures\t: asimd i8mm\n")
    assert not cpu_flags.__wrapped__()

    def refuse(_):
        raise FileNotFoundError

    monkeypatch.setattr(speeds.Path, "read_text", refuse)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert cpu_flags.__wrapped__() == {"avx2"}


def test_explain_says_that_a_speed_is_stated(layer, monkeypatch):
    x = torch.randn(2, 7, 64)
    for flags, predicted in ((("avx2",), 1.3), ((), None)):
        _machine(monkeypatch, *flags)
        compiled = pc.compile(layer, ["quantize:W8A8-dynamic,targets=Linear"], example_inputs=(x,), verify=False)
        for row in compiled.explain().rows:
            assert row.note == shipped().stated and row.predicted == predicted and row.roofline is None
            assert "DynamicQuantizeMatMul" in row.kernel


def test_a_table_that_cannot_be_kept_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARETOC_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(pc.OptionError, match="PARETOC_CACHE"):
        Speeds().save()


def test_calibration_measures_every_form_and_is_used_afterwards(monkeypatch):
    monkeypatch.setattr(probe, "_WIDTH", 64)
    monkeypatch.setattr(probe, "_LAYERS", 1)
    kept = OnnxRuntime().calibrate()
    assert kept.speeds.keys() == OWN
    assert all(speed > 0 for row in kept.speeds.values() for speed in row.values())
    used = load_speeds()
    assert "this machine" in used.measured
    assert {form: list(row.values()) for form, row in kept.speeds.items()} == dict(used.table)


def test_the_probe_times_the_form_it_says(monkeypatch):
    """Its sessions hold the operator of their form: a table of something else would choose wrongly."""
    monkeypatch.setattr(probe, "_WIDTH", 64)
    monkeypatch.setattr(probe, "_LAYERS", 2)
    expected = probe._call("fp32", 3)()[0]
    assert expected.shape == (1, 3, 64)
    for form in FORMS:
        assert probe._call(form, 3)()[0].shape == (1, 3, 64)
