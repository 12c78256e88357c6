"""min over a and q of ‖(W − Ŵ)·X‖², Ŵ = m·sgn(q)·(|q|/Q)^(1/a): codes over the whole grid, an exponent for each layer.

Yvinec et al. 2023, "NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search": the code of PowerQuant,
its exponent and its codes learned so that the output of a layer stays, a code free to take any value and not only
those above and below. The paper descends by stochastic gradients of a soft rounding. Here the loss is the quadratic
tr((W − Ŵ)·H·(W − Ŵ)ᵀ) of all data at once, H = Σ xᵀx, which coordinate descent minimises without a learning rate:
one column of codes after the other, and the exponent by Gauss–Newton steps along ∂Ŵ/∂a = −Ŵ·ln(|q|/Q)/a². m = max|W|
stays. Lossy. A layer never errs more on the calibration data than under PowerQuant; for Student-t₄ weights and
correlated inputs its squared error is 0.3 of PowerQuant's, at 3 and at 4 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..compiler.encodings import Arrays, Encoding, pack
from ..compiler.errors import OptionError
from ..compiler.passes import Context, PassResult, Phase
from ..compiler.program import Program
from ..compiler.protocols import NO_EVIDENCE, Evidence
from ..compiler.reencode import EncodePass, inside
from ..compiler.sites import Site, weight_sites
from ..compiler.statistics import Hessian, Statistic
from .descent import Layer
from .powerquant import EXPONENTS, Power, search_exponent

#: how far from the best exponent so far two others are tried, and how many sweeps each
_RADII, _TRIAL = (0.1, 0.05, 0.025), 3


@dataclass(frozen=True)
class NupesFit:
    """Codes of a `Power` and, in passes, its exponent, beginning with the one that it has.

    The exponent is first chosen by the error after a few sweeps over the columns; then sweeps and steps of the exponent
    follow each other until the error shrinks by less than `tolerance`, at most `rounds` times. `damp` is the share of
    the mean of diag(H) that is added to it. A sweep costs 2·O·K² multiplications.
    """

    name: ClassVar[str] = "nupes"
    data_free: ClassVar[bool] = False

    rounds: int = 20
    tolerance: float = 1e-3
    damp: float = 0.01

    def __post_init__(self) -> None:
        for option, least in (("rounds", 1), ("tolerance", 0), ("damp", 0)):
            if not getattr(self, option) >= least:
                raise OptionError(
                    f"{option}={getattr(self, option)} is not valid", where="fitter 'nupes'", fix=f"use {least} or more"
                )

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(encoding, Power):
            return None
        return f"fitter 'nupes' learns the codes of Power; {encoding} is none"

    def needs(self, site: Site) -> list[Statistic]:
        return [Hessian(site.input.name, site.window)]

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        """Under the exponent that the encoding has."""
        assert isinstance(encoding, Power)
        return self._learn(encoding, weight, evidence, radii=())[1]

    def adapt(self, encoding: Encoding, weight: Tensor, evidence: Evidence) -> tuple[Encoding, Arrays]:
        assert isinstance(encoding, Power)
        return self._learn(encoding, weight, evidence, _RADII)

    def _learn(self, start: Power, weight: Tensor, evidence: Evidence, radii: Sequence[float]) -> tuple[Power, Arrays]:
        problem = _Problem(weight, Layer(weight, evidence, self.damp))
        best = problem.tried(start)
        for radius in radii:
            others = [best.power.exponent + sign * radius for sign in (-1, 1)]
            tried = [problem.tried(_with(start, exponent)) for exponent in others]
            best = min(best, *tried, key=lambda answer: answer.error)
        for _ in range(self.rounds):
            before = best.error
            if radii:
                best = min(best, problem.stepped(best), key=lambda answer: answer.error)
            best = problem.swept(best.power, best.values)
            if best.error >= before * (1 - self.tolerance):
                break
        exact = Layer(weight, evidence)
        plain = start.encode(weight)
        if exact.error(exact.columns(start.decode(plain, tuple(weight.shape)).double())) <= exact.error(best.values):
            return start, plain
        return best.power, problem.store(best)


def _with(power: Power, exponent: float) -> Power:
    """Three decimals of an exponent, as in PowerQuant: rounding noise must not reach the artifact."""
    return replace(power, exponent=round(min(max(exponent, EXPONENTS[0]), EXPONENTS[1]), 3))


@dataclass(frozen=True)
class _Answer:
    """q + Q, int64 `[g, K, o]`, the values they stand for, and their error."""

    power: Power
    codes: Tensor
    values: Tensor
    error: float


class _Problem:
    def __init__(self, weight: Tensor, layer: Layer) -> None:
        self.layer = layer
        self.scale = weight.float().reshape(len(weight), -1).abs().amax(1, keepdim=True)
        self.peak = layer.columns(torch.where(self.scale > 0, self.scale, 1.0).double())

    def table(self, power: Power) -> Tensor:
        """The values of all codes, ascending, for m = 1."""
        return power.look_up(torch.arange(2 * power.largest + 1)).double()

    def tried(self, power: Power) -> _Answer:
        """A few sweeps: in the first, columns still to come stand at the weights, not at codes."""
        answer = self.swept(power, self.layer.weight)
        for _ in range(_TRIAL - 1):
            answer = self.swept(power, answer.values)
        return answer

    def swept(self, power: Power, values: Tensor) -> _Answer:
        """Every column of codes once, from any values."""
        table, peak = self.table(power), self.peak[:, 0]
        middle = (table[1:] + table[:-1]) / 2
        codes = torch.empty(values.shape, dtype=torch.int64)

        def choose(column: int, target: Tensor) -> Tensor:
            codes[:, column] = torch.searchsorted(middle, target / peak)
            return table[codes[:, column]] * peak

        values = self.layer.sweep(values, choose)
        return _Answer(power, codes, values, self.layer.error(values))

    def stepped(self, answer: _Answer) -> _Answer:
        """The exponent that is best to first order, under the same codes."""
        power, table = answer.power, self.table(answer.power)
        share = (torch.arange(len(table)) - power.largest).abs().double() / power.largest
        # 0·ln 0 = 0: a code of 0 stays 0 under every exponent
        slope = -table * torch.where(share > 0, share, 1.0).log() / power.exponent**2
        part = torch.zeros(len(self.scale), dtype=torch.int64)
        step = self.layer.steps(self.layer.slope(answer.values), slope[answer.codes] * self.peak, part, 1)
        power = _with(power, power.exponent + float(step))
        values = self.table(power)[answer.codes] * self.peak
        return _Answer(power, answer.codes, values, self.layer.error(values))

    def store(self, answer: _Answer) -> Arrays:
        return {"codes": pack(self.layer.rows(answer.codes), answer.power.bits), "scale": self.scale}


@dataclass(frozen=True)
class Nupes(EncodePass):
    """Store each weight as `Power(bits, a)` with its own a, learned from calibration data in at most `rounds` rounds.

    Begins with the one exponent that PowerQuant finds for the network. Layers are fitted in order, each to the inputs
    that the layers already encoded give it. Weights that something else reads too (an embedding), that are encoded
    already, or that follow an N:M pattern, are left and listed.
    """

    name: ClassVar[str] = "nupes"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    positional: ClassVar[str | None] = "bits"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    needs_calibration: ClassVar[bool] = True

    bits: int = 4
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoding(), self.fitter()  # refuse what is out of range

    def encoding(self) -> Power:
        return Power(self.bits)

    def fitter(self) -> NupesFit:
        return NupesFit(self.rounds)

    def refuse(self, program: Program, site: Site) -> str:
        encoding = inside(program.encoding(site.weight), self.encoding())
        return super().refuse(program, site) or self.fitter().refuse(encoding) or ""

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        sites = self.distinct(program, result)
        start = search_exponent([program.weight_value(site.weight) for site in sites], self.bits)
        jobs = [(site, Power(self.bits, start)) for site in sites]
        result.warnings += self.store(program, jobs, ctx, self.fitter())
        now = [program.encoding(site.weight) for site in weight_sites(program) if site.path in set(result.matched)]
        learned = [encoding.exponent for encoding in now if isinstance(encoding, Power)]
        result.metrics |= {"exponent of all": start, "least exponent": min(learned), "largest exponent": max(learned)}
        return result
