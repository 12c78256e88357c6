"""The scheme that is proposed instead of one without a fast kernel has one."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.backends.onnxruntime.forms import FORMS
from paretoc.backends.onnxruntime.nearest import nearest_fast
from paretoc.backends.onnxruntime.speeds import Speeds
from torch import nn


@pytest.mark.parametrize(
    ("kind", "bits", "activations", "scheme"),
    [
        ("linear", 4, "", "W4A8"),  # W4A16, NVFP4, codebooks
        ("linear", 2, "", "W4A8"),
        ("linear", 8, "", "W8A8-dynamic"),  # W8A16
        ("linear", 32, "", "W8A8-dynamic"),  # n:m
        ("linear", 8, "token", "W8A8-dynamic"),  # FP8
        ("linear", 8, "static", "W8A8"),
        ("linear", 4, "group48", "W4A8"),
        ("conv", 8, "", "W8A8"),
        ("conv", 8, "token", "W8A8"),
        ("conv", 8, "static", ""),
        ("embedding", 8, "", ""),
    ],
)
def test_the_nearest_scheme(kind, bits, activations, scheme):
    assert nearest_fast(kind, bits, activations, rows=128, speeds=Speeds(), standard=False) == scheme


def test_only_what_is_fast_here_is_proposed():
    def nearest(bits: float, standard: bool = False, **speeds: float) -> str:
        table = {name: (speeds.get(name, 1.0),) * 3 for name in FORMS}
        return nearest_fast("linear", bits, "", rows=128, speeds=Speeds(table), standard=standard)

    assert nearest(4) == ""
    assert nearest(4, SharedMatMul=2.0) == "W8A8"
    assert nearest(4, GroupMatMul=2.0, SharedMatMul=3.0) == "W4A8"
    assert nearest(4, GroupMatMul=2.0, IntegerMatMul=2.0, standard=True) == "W8A8-dynamic"


@pytest.mark.parametrize("scheme", ["W8A8-dynamic", "W8A8", "W4A8"])
def test_it_has_a_fast_kernel(scheme):
    """And a scheme without one names it, in `explain()` and, where it is slower, in the report."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.linear = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 8)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(self.first(image).relu()).relu().mean((2, 3)))

    x = torch.randn(2, 3, 12, 12)
    group = {"group_size": 16} if scheme == "W4A8" else {}
    compiled = pc.compile(Layers().eval(), [pc.Quantize(scheme, **group)], example_inputs=x, calibration=[x])
    rows = {row.site: row for row in compiled.explain().rows}
    assert rows["linear"].accelerated and not rows["linear"].instead
    assert {rows[site].instead for site in ("first", "conv") if not rows[site].accelerated} <= {"W8A8", ""}
    assert rows["first"].accelerated == (scheme == "W8A8")
