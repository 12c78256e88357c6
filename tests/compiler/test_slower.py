"""The warning that a compiled model is slower than the uncompressed one: when, and whom it blames."""

from __future__ import annotations

from dataclasses import dataclass

import paretoc as pc
import pytest
import torch
from paretoc.compiler.backend import Row
from paretoc.compiler.cost import Latency
from paretoc.compiler.slower import measured_slower, predicted_slower


def row(site: str, predicted: float, macs: int = 100, instead: str = "") -> Row:
    return Row(site, "Affine(8)", "StoredMatMul", False, predicted=predicted, macs=macs, instead=instead)


def test_time_is_counted_in_products():
    rows = [row("up", 0.5, instead="W8A8-dynamic"), row("down", 2.0)]
    warning = predicted_slower(300, 300, rows)  # 200 + 50 for the two, 100 for all else
    assert warning.startswith("the compiled model should take 1.2 × the time of the uncompressed one")
    assert "to blame: up (StoredMatMul); W8A8-dynamic has a fast kernel" in warning and "down" not in warning


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (0.6, 8.0), (0.96, 0.96)])
def test_equal_and_faster_models_are_not_blamed(speeds):
    assert not predicted_slower(200, 200, [row("up", speeds[0]), row("down", speeds[1])])


def test_fewer_tokens_make_up_for_slow_kernels():
    assert predicted_slower(400, 400, [row("up", 0.5)])
    assert not predicted_slower(400, 250, [row("up", 0.5)])


def test_many_sites_are_counted():
    assert "a, b, c, d" in (text := predicted_slower(600, 600, [row(s, 0.5) for s in "abcdef"]).replace(
        " (StoredMatMul)", ""
    )) and "and 2 more" in text  # fmt: skip


@dataclass
class Explained:
    """An executable whose sites take these times."""

    milliseconds: dict[str, float]

    def explain(self):
        return [Row(s, "Affine(8)", "fp32 MatMul", False, ms, instead="W8A8") for s, ms in self.milliseconds.items()]


def test_measured_blame_falls_on_sites_that_take_longer():
    before, after = Explained({"up": 1.0, "down": 1.0}), Explained({"up": 3.0, "down": 0.5})
    warning = measured_slower(Latency(4.0, 3.9, 10), Latency(2.0, 1.9, 10), after, before)
    assert "takes 4.00 ms, the uncompressed one 2.00 ms (medians of 10 calls in turns)" in warning
    assert "to blame: up (fp32 MatMul); W8A8 has a fast kernel" in warning and "down" not in warning
    between = measured_slower(Latency(4.0, 3.9, 10), Latency(2.0, 1.9, 10), before, before)
    assert "no site is slower by itself" in between


@pytest.mark.parametrize(("median", "minimum"), [(2.05, 1.9), (4.0, 1.9), (2.05, 3.9), (1.0, 1.0)])
def test_noise_is_no_slowness(median, minimum):
    """Both must say so: a neighbour slows the median alone."""
    explained = Explained({"up": 1.0})
    assert not measured_slower(Latency(median, minimum, 10), Latency(2.0, 1.9, 10), explained, explained)


def test_a_report_says_what_the_table_of_kernels_predicts(tmp_path):
    """Standard ONNX decodes 8-bit weights at every call."""
    layer, x = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).eval(), torch.randn(1, 5, 64)
    slow = pc.compile(layer, ["quantize:W8A16"], example_inputs=x, target="onnx")
    report = slow.report(latency=False)
    (warning,) = report.warnings
    assert "to blame: 0 (StoredMatMul), 1 (StoredMatMul)" in warning and "W8A8-dynamic has a fast kernel" in warning
    assert f"warning: {warning}"[:40] in str(report) and report.to_dict()["warnings"] == [warning]
    report.to_html(tmp_path / "report.html")
    assert "the compiled model should take" in (tmp_path / "report.html").read_text()
    fast = pc.compile(layer, ["quantize:W8A8-dynamic"], example_inputs=x)
    assert not fast.report(latency=False).warnings
