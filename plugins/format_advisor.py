"""Which ExMy for P bits: the split that a scaling law of floating-point quantised training predicts to lose least.

Sun et al. 2025, "Scaling Laws for Floating-Point Quantization Training", equation for the loss
L(N, D, E, M, B) = n/N^α + d/D^β + ε + D^β/N^α · log2(B) / (γ·(E + ½)^δ·(M + ½)^ν)
of N parameters trained on D tokens, with blocks of B weights under one scale. `advise` evaluates it; the pass stores
weights in the format it picks. Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from typing import ClassVar

from ..compiler.encodings import Float
from ..compiler.errors import OptionError
from ..compiler.passes import Composite

_N, _ALPHA, _D, _BETA, _EPSILON = 69.2343, 0.2368, 68973.0621, 0.5162, 1.9061
_GAMMA, _DELTA, _NU = 11334.5197, 3.1926, 2.9543


@dataclass(frozen=True)
class Advice:
    """The format of least predicted loss; `loss` of training in it, `penalty` its share owed to the format, and the
    number of tokens beyond which more data would harm."""

    exponent: int
    mantissa: int
    loss: float
    penalty: float
    critical_tokens: float

    @property
    def format(self) -> str:
        return f"e{self.exponent}m{self.mantissa}"


def advise(bits: int, parameters: float = 1e9, tokens: float = 1e11, block: int = 128) -> Advice:
    """The best of all splits of `bits` (sign included) for weights of a model; 3 ≤ bits ≤ 16, block ≥ 2.

    Raises OptionError for a width the law was not fitted to.
    """
    if not 3 <= bits <= 16 or block < 2:
        raise OptionError(
            f"the law says nothing about {bits} bits in blocks of {block}",
            where="format_advisor",
            fix="use 3 … 16 bits and blocks of 2 weights or more",
        )
    exponent = max(range(1, min(bits - 1, 9)), key=lambda e: _precision(e, bits - 1 - e))
    precision = _precision(exponent, bits - 1 - exponent)
    penalty = tokens**_BETA / parameters**_ALPHA * log2(block) / precision
    critical = (_D * parameters**_ALPHA * precision / log2(block)) ** (1 / (2 * _BETA))
    loss = _N / parameters**_ALPHA + _D / tokens**_BETA + _EPSILON + penalty
    return Advice(exponent, bits - 1 - exponent, loss, penalty, critical)


def _precision(exponent: int, mantissa: int) -> float:
    return float(_GAMMA * (exponent + 0.5) ** _DELTA * (mantissa + 0.5) ** _NU)


@dataclass(frozen=True)
class FormatAdvisor(Composite):
    """Weights of `bits` in the advised format, `block` under one scale; activations as they are."""

    name: ClassVar[str] = "format_advisor"
    positional: ClassVar[str | None] = "bits"

    bits: int = 4
    block: int = 32
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        advise(self.bits, block=self.block)

    def passes(self) -> Sequence[object]:
        weights = Float(advise(self.bits, block=self.block).format, self.block)
        chosen = {"weights": weights, "targets": self.targets, "ignore": self.ignore}
        return [{"quantize": {"scheme": "W4A16", "fitter": "mse", **chosen}}]
