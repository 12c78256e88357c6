"""Layers of one input as one product: equal results, what stays apart, and a wrong order of channels is seen."""

import onnx
import paretoc as pc
import pytest
import torch
from paretoc.backends.onnxruntime import projections
from torch import nn


class Projections(nn.Module):
    """q, k and v of different widths read x; one more layer reads something else."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, width, bias=bias) for width in (48, 16, 32))
        self.last = nn.Linear(96, 8)

    def forward(self, x):
        return self.last(torch.cat([self.q(x), self.k(x).sigmoid(), self.v(x).tanh()], -1))


X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))


def both(scheme, model=None, **options):
    model = model or Projections()
    return [pc.compile(model, [scheme], example_inputs=X, target=t, **options) for t in ("onnxruntime", "eager")]


def products(compiled, folder, kind="MatMulNBits"):
    compiled.export_onnx(folder / "model.onnx")
    return [node.name for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == kind]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        "quantize:W4A16,group_size=16",
        "quantize:W4A8,group_size=32",
        {"quantize": {"scheme": "W4A16", "weights": "Affine(bits=4, group=16, symmetric=False)"}},
    ],
    ids=str,
)
def test_one_product_gives_what_three_gave(scheme, bias, tmp_path):
    ours, reference = both(scheme, Projections(bias))
    assert products(ours, tmp_path) == ["q + k + v", "last"]
    torch.testing.assert_close(ours(X), reference(X), rtol=1e-4, atol=1e-4)
    for rows in (1, 2):
        torch.testing.assert_close(ours(X[:rows]), reference(X[:rows]), rtol=1e-4, atol=1e-4)


def test_a_wrong_order_of_channels_is_seen(monkeypatch):
    stacked = projections._stacked

    def reversed_codes(lowering, name, values):
        return stacked(lowering, name, values[::-1] if "codes" in values[0].name else values)

    monkeypatch.setattr(projections, "_stacked", reversed_codes)
    ours, reference = both("quantize:W4A16,group_size=16", verify=False)
    assert (ours(X) - reference(X)).abs().max() > 1e-2


def test_each_site_has_its_row_and_its_share_of_the_time():
    rows = {row.site: row for row in both("quantize:W4A16,group_size=16")[0].explain().rows}
    assert all(row.kernel.startswith("MatMulNBits") for row in rows.values())
    assert rows["q"].milliseconds / rows["k"].milliseconds == pytest.approx(48 / 16)
    assert rows["v"].milliseconds / rows["k"].milliseconds == pytest.approx(32 / 16)


def test_formats_that_differ_stay_apart(tmp_path):
    passes = ["quantize:W4A16,group_size=16,ignore=k", "quantize:W4A16,group_size=32,targets=k"]
    ours, reference = (pc.compile(Projections(), passes, example_inputs=X, target=t) for t in ("onnxruntime", "eager"))
    assert sorted(products(ours, tmp_path)) == ["k", "last", "q + v"]
    torch.testing.assert_close(ours(X), reference(X), rtol=1e-4, atol=1e-4)


def test_standard_operators_and_integer_products_stay_apart(tmp_path):
    assert not products(pc.compile(Projections(), ["quantize:W4A16"], example_inputs=X, target="onnx"), tmp_path)
    integers = pc.compile(Projections(), ["quantize:W8A8"], example_inputs=X, calibration=[(X,)])
    assert len(products(integers, tmp_path, "MatMulIntegerToFloat")) == 4


def test_stored_arrays_are_not_kept_twice(tmp_path):
    ours = both("quantize:W4A16,group_size=16")[0]
    ours.save(tmp_path / "artifact")
    again = pc.load(tmp_path / "artifact")
    assert torch.equal(again(X), ours(X))
    stored = sum(f.stat().st_size for f in (tmp_path / "artifact").glob("*.safetensors"))
    weights = 96 * 64 + 8 * 96
    assert stored < weights // 2 + 4 * weights // 16 + 2000  # codes, scales, header
