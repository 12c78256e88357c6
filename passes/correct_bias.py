"""b → b + E[y] − E[ŷ] for every output channel of every layer, y before and ŷ after quantisation.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with the
means of calibration data (its appendix D): rounding shifts the mean of an output, and the bias takes the shift back.
Layer by layer, on the inputs that the corrected layers before it give. `deviation=True` also matches the standard
deviation, ŷ → μ + (ŷ − μ̂)·σ/σ̂, folded into the scales of the stored weight. This is batch-norm re-estimation for norms
that are folded already: γ·(ŷ − μ̂)/σ̂ + β with statistics taken anew has mean β and deviation γ on the calibration data,
as had the output of the norm before. Lossy; it costs nothing at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..compiler.calibrate import Stream
from ..compiler.encodings import Encoding, Scaled, innermost
from ..compiler.errors import PassError
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.sites import Site
from ..compiler.statistics import Statistic
from ..compiler.weights import Operand, WeightEdits


@dataclass(frozen=True)
class Moments(Statistic):
    """Mean and standard deviation of each channel, float64 `[2, C]`; channels lie along `dim`."""

    dim: int = -1

    def update(self, state: Any, *values: Tensor) -> Any:
        rows = values[0].detach().double().movedim(self.dim, -1).flatten(0, -2)
        sums = torch.stack([rows.sum(0), rows.square().sum(0)])
        return (sums, len(rows)) if state is None else (state[0] + sums, state[1] + len(rows))

    def finish(self, state: Any) -> Tensor:
        mean, square = state[0] / state[1]
        return torch.stack([mean, (square - mean.square()).clamp(min=0).sqrt()])


@dataclass(frozen=True)
class CorrectBias(SitePass):
    """Give every layer back the mean output that it had before quantisation; `deviation`: the standard deviation too,
    where its weight is stored with a scale for each output channel or for groups within one."""

    name: ClassVar[str] = "correct_bias"
    phase: ClassVar[Phase] = Phase.LOWER
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    needs_calibration: ClassVar[bool] = True

    deviation: bool = False

    def apply(self, program: Program, ctx: Context) -> PassResult:
        if ctx.reference is None:
            raise PassError(
                "there is nothing to compare with: no pass has quantised the model",
                where="pass 'correct_bias'",
                fix="put it behind quantize",
            )
        result, sites = PassResult(), self.sites(program)
        before, now = Stream(ctx.reference, ctx.batches), Stream(program, ctx.batches)
        nodes = {n.name: n for n in ctx.reference.graph.nodes}
        shift = []
        for site in ctx.track(sites, self.name):
            if site.node.name not in nodes:
                result.skipped[site.path] = "it did not exist before quantisation"
                continue
            moments = Moments(site.node.name, -1 if site.kind == "linear" else 1)
            wanted = before.advance(nodes[site.node.name], [moments])[moments]
            found = now.advance(site.input, [moments])[moments]
            ratio = self._rescale(program, site, wanted[1], found[1])
            _add(program, site, wanted[0], found[0], ratio)
            shift.append(float((wanted[0] - found[0]).norm() / wanted[0].norm().clamp(min=1e-30)))
            result.matched.append(site.path)
        result.metrics = {"mean relative shift": sum(shift) / max(len(shift), 1)}
        program.refresh()
        return result

    def _rescale(self, program: Program, site: Site, wanted: Tensor, found: Tensor) -> Tensor:
        """Multiply the rows of the weight by σ/σ̂ where that can be stored; returns what they were multiplied by."""
        ratio = torch.where(found > 0, wanted / found.clamp(min=1e-30), 1.0)
        name = _scale_of_rows(program.encoding(site.weight))
        if not self.deviation or name is None or Operand(site.node, 1).shared():
            return torch.ones_like(ratio)
        stored = program.stored_arrays(site.weight)[name]
        scaled = (stored * ratio.unsqueeze(1)).to(stored.dtype)
        program.set(f"{program.weight_name(site.weight)}.{name}", scaled)
        return ratio


def _scale_of_rows(encoding: Encoding | None) -> str | None:
    """The stored array that holds a number for each output channel, or several, times which the weight is."""
    inner = None if encoding is None else innermost(encoding)
    if not isinstance(inner, Scaled) or inner.group < 0 or inner.scale not in ("float32", "float16", "shift"):
        return None
    return {encoding: "scale", getattr(encoding, "values", None): "values.scale"}.get(inner)


def _add(program: Program, site: Site, wanted: Tensor, found: Tensor, ratio: Tensor) -> None:
    """b → r·(b − μ̂) + μ for rows of the weight that were multiplied by r."""
    edits, bias = WeightEdits(program), Operand(site.node, 2, "bias")
    own = edits[bias] if bias in edits else torch.zeros_like(wanted)
    # the output was Wx + b; it is rWx + b', so that b' = μ − r·(μ̂ − b)
    edits[bias] = wanted - ratio * (found - own)
    edits.commit()
