"""W → m·sgn(q)·(|q|/Q)^(1/a), q = round(Q·sgn(W)·(|W|/m)^a): m = max|W| of a channel, Q = 2^(bits−1) − 1.

Yvinec et al. 2023, "PowerQuant: Automorphism Search for Non-Uniform Quantization", section 3. The
automorphisms of the positive reals under multiplication are x → x^a; one exponent a serves the whole network,
the one that minimises Σ ‖W − Ŵ‖₂ over the layers, found by Nelder–Mead. Data-free; weights only.
Lossy. At 4 bits the squared error is that of uniform codes × 0.65 for Gaussian weights (a = 0.63), × 0.35 for
Laplace (a = 0.49), × 0.17 for Student-t₄ (a = 0.36), at 2¹⁸ weights a channel. a = 1 is the uniform code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..compiler.encodings import Arrays, Encoding, Fit, pack, packed_size, unpack
from ..compiler.errors import OptionError
from ..compiler.passes import Context, PassResult, Phase
from ..compiler.program import Program
from ..compiler.reencode import EncodePass

#: where the exponent is searched: below, every code but 0 decodes to almost m; 1 is the uniform code
EXPONENTS = (0.1, 1.0)


@dataclass(frozen=True)
class Power(Encoding):
    """Integer codes for the weights to the power `exponent`, one scale m per output channel.

    Stored: `codes` uint8 `[O, ceil(I·bits/8)]`, q + Q packed; `scale` float32 `[O, 1]`, m. Decoding is a
    look-up in a table of 2Q + 1 values and a product.
    """

    bits: int = 4
    exponent: float = 0.5
    summary: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError(f"Power has 2 to 8 bits, not {self.bits}", where="Power(bits=…)", fix="use 2 … 8")
        if not EXPONENTS[0] <= self.exponent <= EXPONENTS[1]:
            raise OptionError(
                f"the exponent {self.exponent} is out of range",
                where="Power(exponent=…)",
                fix="use {} … {}; 1 is the uniform code".format(*EXPONENTS),
            )

    @property
    def largest(self) -> int:
        """Q, the largest code."""
        return (1 << (self.bits - 1)) - 1

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W → q + Q `[O, I]`, int32, and m `[O, 1]`."""
        rows = weight.float().reshape(weight.shape[0], -1)
        scale = rows.abs().amax(1, keepdim=True)
        share = rows / torch.where(scale > 0, scale, 1.0)
        codes = torch.round(self.largest * share.sign() * share.abs() ** self.exponent)
        return (codes + self.largest).int(), scale

    def look_up(self, codes: Tensor) -> Tensor:
        """q + Q → sgn(q)·(|q|/Q)^(1/a)."""
        positive = [(q / self.largest) ** (1 / self.exponent) for q in range(1, self.largest + 1)]
        table = [-value for value in reversed(positive)] + [0.0] + positive
        values = torch.tensor(table, device=codes.device).index_select(0, codes.flatten())
        return values.reshape(codes.shape)

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        columns = packed_size(prod(shape[1:]), self.bits)
        return {"codes": ((shape[0], columns), torch.uint8), "scale": ((shape[0], 1), torch.float32)}

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        if fit is not None:
            return fit(self, weight)
        codes, scale = self.quantize(weight)
        return {"codes": pack(codes, self.bits), "scale": scale}

    def decode(self, arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
        codes = unpack(arrays["codes"], self.bits, prod(shape[1:]))
        return (self.look_up(codes) * arrays["scale"]).reshape(shape)


@dataclass(frozen=True)
class PowerQuant(EncodePass):
    """Store weights as `Power(bits, a)`; `exponent` sets a instead of searching it.

    What stays of N:M sparse weights is encoded inside the pattern. Weights that something else reads too (an
    embedding), or that are encoded already, are left and listed.
    """

    name: ClassVar[str] = "powerquant"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    positional: ClassVar[str | None] = "bits"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    bits: int = 4
    exponent: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        Power(self.bits, 0.5 if self.exponent is None else self.exponent)  # refuses what is out of range

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        sites = self.distinct(program, result)
        exponent = self.exponent
        if exponent is None:
            exponent = search_exponent([program.weight_value(site.weight) for site in sites], self.bits)
        self.store(program, [(site, Power(self.bits, exponent)) for site in sites], ctx)
        result.metrics["exponent"] = exponent
        return result


def search_exponent(weights: Sequence[Tensor], bits: int) -> float:
    """The a that minimises Σ ‖W − Ŵ‖₂, to three decimals: rounding noise must not reach the artifact."""
    from scipy.optimize import minimize

    def error(point: Sequence[float]) -> float:
        return sum(_distance(Power(bits, float(point[0])), weight) for weight in weights) / total

    total = sum(float(weight.float().norm()) for weight in weights) or 1.0
    options = {"xatol": 1e-3, "fatol": 1e-5}
    found = minimize(error, [0.5], method="Nelder-Mead", bounds=[EXPONENTS], options=options)
    return round(float(found.x[0]), 3)


def _distance(power: Power, weight: Tensor) -> float:
    """‖W − Ŵ‖₂ without packing the codes."""
    codes, scale = power.quantize(weight)
    return float((weight.reshape(codes.shape) - power.look_up(codes) * scale).norm())
