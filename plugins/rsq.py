"""Rotate, Scale, Quantise: GPTQ on a rotated model, in which the tokens that others attend to weigh more.

Sung et al. 2025, "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs". The Hessian of every layer of a
block is Σ r·xᵀx with r the attention a token receives, scaled to r_min … 1. Integers per channel with a clip search,
as in the paper's scripts. Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..compiler.encodings import Affine
from ..compiler.passes import Composite


@dataclass(frozen=True)
class Rsq(Composite):
    """`bits` of the weights; `r_min` of the least important token; `group` 0 is one scale a channel."""

    name: ClassVar[str] = "rsq"
    positional: ClassVar[str | None] = "bits"

    bits: int = 3
    group: int = 0
    r_min: float = 0.01
    targets: tuple[str, ...] = (r"re:\.\d+\.",)

    def passes(self) -> Sequence[object]:
        fitter = f"gptq(importance='attention', r_min={self.r_min})"
        weights = Affine(self.bits, self.group)
        return [
            "rotate",
            {"quantize": {"scheme": "W4A16", "weights": weights, "fitter": fitter, "targets": self.targets}},
        ]
