"""The scheme that is proposed instead of one without a fast kernel has one."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.backends.onnxruntime.nearest import FAST, nearest_fast
from torch import nn


@pytest.mark.parametrize(
    ("kind", "activations", "scheme"),
    [
        ("linear", "", "W8A8-dynamic"),  # NVFP4, n:m, codebooks
        ("linear", "token", "W8A8-dynamic"),  # FP8, W4A8
        ("linear", "static", "W8A8"),
        ("conv", "", "W8A8"),
        ("conv", "token", "W8A8"),
        ("embedding", "", ""),
    ],
)
def test_the_nearest_scheme(kind, activations, scheme):
    assert nearest_fast(kind, activations) == scheme


@pytest.mark.parametrize("scheme", FAST)
def test_it_has_a_fast_kernel(scheme):
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv, self.linear = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 8)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(self.first(image).relu()).relu().mean((2, 3)))

    x = torch.randn(2, 3, 12, 12)
    rows = pc.compile(Layers().eval(), [pc.Quantize(scheme)], example_inputs=x, calibration=[x]).explain().rows
    kinds = {row.site: "linear" if row.site == "linear" else "conv" for row in rows}
    assert {kinds[row.site] for row in rows if row.accelerated} == set(FAST[scheme][0])
