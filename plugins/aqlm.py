"""W → s·Σₘ Cₘ[codeₘ]: groups of 8 weights as sums of codebook vectors, fitted to the layer's output.

Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization", section 3: residual
k-means, then codes and codebooks in turn. The fine-tuning of whole blocks that follows in the paper is not part of
this. Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..compiler.encodings import Additive
from ..compiler.passes import Composite


@dataclass(frozen=True)
class Aqlm(Composite):
    """`codebooks` × `bits` for `dim` weights: 2 × 8 bits for 8 weights are 2 bits a weight."""

    name: ClassVar[str] = "aqlm"
    positional: ClassVar[str | None] = "codebooks"

    codebooks: int = 2
    bits: int = 8
    dim: int = 8
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def passes(self) -> Sequence[object]:
        weights = Additive(self.codebooks, self.bits, self.dim)
        chosen = {"weights": weights, "targets": self.targets, "ignore": self.ignore}
        return [{"quantize": {"scheme": "W4A16", "fitter": "additive", **chosen}}]
