"""x → x / s, W → W·diag(s): channels with large activations hand their size over to the weights. Exact up to rounding.

"smoothquant": s_j = max|X_j|^α / max|W_:j|^(1−α) (Xiao et al. 2023, "SmoothQuant", equation 4), the maxima over all
layers that read the channel. "awq": s_j = mean|X_j|^r, divided by √(max s · min s), r the best of 0, 0.05 … 0.95 by
‖Q(W·diag s)·(X/s) − W·X‖² summed over those layers (Lin et al. 2024, "AWQ", section 3.2 and the reference code).

1/s goes into what makes the channel: the weight of a norm, or the rows of a linear or convolution from which it comes
through nothing but movements, an attention's values, ReLU or a product with a gate.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.axes import Axis, Use, find_axes
from ..compiler.axis_moves import scale
from ..compiler.encodings import Affine, Encoding, parse_encoding
from ..compiler.errors import OptionError, ParetocError, PassError, did_you_mean
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program, describe, operands
from ..compiler.sites import weight_sites
from ..compiler.statistics import ChannelMax, ChannelMean, Sample, Statistic
from ..compiler.weights import Operand, WeightEdits

_RULES: dict[str, tuple[type[Statistic], ...]] = {"smoothquant": (ChannelMax,), "awq": (ChannelMean, Sample)}
_LEAST = 1e-5
_STEPS = 20


@dataclass(frozen=True)
class Smooth(SitePass):
    """Scale the channels that the chosen linears read. A channel that anything else reads is left, with the reason.

    `alpha`: how much of the difficulty moves from activations to weights ("smoothquant"). `rule` "smoothquant" for
    quantised activations, "awq" for weights alone; `weights` is the encoding that "awq" tries out, by default
    asymmetric int4 in groups of 128, or of 32 where 128 does not divide the width.
    """

    name: ClassVar[str] = "smooth"
    phase: ClassVar[Phase] = Phase.TRANSFORM
    positional: ClassVar[str | None] = "alpha"
    needs_calibration: ClassVar[bool] = True

    alpha: float = 0.5
    rule: str = "smoothquant"
    weights: str | Encoding | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise OptionError(
                f"alpha={self.alpha} is not a share", where="pass 'smooth'", fix="use 0 (weights) … 1 (activations)"
            )
        if self.rule not in _RULES:
            raise OptionError(
                f"there is no rule {self.rule!r}", where="pass 'smooth'", fix=did_you_mean(self.rule, _RULES)
            )
        if isinstance(self.weights, str):
            parse_encoding(self.weights)

    def needs(self, program: Program) -> list[Statistic]:
        nodes = {_input(use): None for axis in self._axes(program, PassResult()) for use in axis.sums}
        return [kind(node.name) for node in nodes for kind in _RULES[self.rule]]

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result, edits = PassResult(), WeightEdits(program)
        axes = self._axes(program, result)
        for axis in ctx.track(axes, self.name):
            sizes = self._smoothquant(axis, edits, ctx) if self.rule == "smoothquant" else self._awq(axis, edits, ctx)
            scale(edits, axis, torch.where(torch.isfinite(sizes), 1 / sizes, 1.0))
        edits.commit()
        result.metrics = {"axes": len(axes), "channels": sum(axis.size for axis in axes)}
        program.refresh()
        return result

    def _axes(self, program: Program, result: PassResult) -> list[Axis]:
        """The axes that are scaled; fills in which sites matched and which are skipped, and why."""
        paths = {site.node: site.path for site in weight_sites(program)}
        chosen = {site.node: site.path for site in self.sites(program)}
        reasons = {node: Operand(node, 1).fixed(program) or "its input has no channels" for node in chosen}
        axes, matched = [], set()
        for axis in find_axes(program, "scale"):
            readers = {use.operand.node for use in axis.sums}
            if why := _why(axis, chosen, paths):
                reasons |= dict.fromkeys(readers & chosen.keys(), why)
            elif readers:
                axes.append(axis)
                matched |= readers
        result.matched = [path for node, path in chosen.items() if node in matched]
        result.skipped = {path: reasons[node] for node, path in chosen.items() if node not in matched}
        if not axes:
            found = [f"{path}: {reason}" for path, reason in list(result.skipped.items())[:3]]
            raise PassError(
                f"no input can be scaled: {'; '.join(found) or 'the model has no linear layer'}",
                where="pass 'smooth'",
                fix="widen targets=, or leave it out for this model",
            )
        return axes

    def _smoothquant(self, axis: Axis, edits: WeightEdits, ctx: Context) -> Tensor:
        activations = _largest(axis, ((u, ctx.statistic(ChannelMax(_input(u).name))) for u in axis.sums))
        weights = _largest(axis, ((u, edits[u.operand].abs().amax(0)) for u in axis.sums))
        scale = activations**self.alpha / weights.clamp(min=_LEAST) ** (1 - self.alpha)
        return torch.where(activations > 0, scale.clamp(min=_LEAST), 1.0)  # calibration never saw the others

    def _awq(self, axis: Axis, edits: WeightEdits, ctx: Context) -> Tensor:
        means = _largest(axis, ((u, ctx.statistic(ChannelMean(_input(u).name))) for u in axis.sums))
        alive = means > 0
        best, least = torch.ones_like(means), torch.inf
        for step in range(_STEPS):
            scale = torch.where(alive, means.clamp(min=1e-4) ** (step / _STEPS), 1.0)
            span = scale[alive]
            scale = torch.where(alive, scale / (span.max() * span.min()).sqrt(), 1.0) if len(span) else scale
            loss = sum(self._loss(use, scale, edits, ctx) for use in axis.sums)
            if loss < least:
                best, least = scale, loss
        return best

    def _loss(self, use: Use, scale: Tensor, edits: WeightEdits, ctx: Context) -> float:
        """‖Q(W·diag s)·(X/s) − W·X‖² on the sampled inputs of one layer."""
        weight, x = edits[use.operand].float(), ctx.statistic(Sample(_input(use).name))[0]
        columns = use.spread(scale).float()
        encoding, scaled = self._encoding(weight.shape[1]), weight * columns
        try:
            encoding.check(scaled)
        except ParetocError as error:
            raise OptionError(
                error.what, where=f"pass 'smooth', {describe(use.operand.node)}", fix="try other weights="
            ) from error
        stored = encoding.decode(encoding.encode(scaled), tuple(scaled.shape)) / columns
        return float((x @ (stored - weight).T).square().sum())

    def _encoding(self, width: int) -> Encoding:
        if self.weights is not None:
            return parse_encoding(self.weights) if isinstance(self.weights, str) else self.weights
        return Affine(4, next(g for g in (128, 32, width) if width % g == 0), symmetric=False)


def _input(use: Use) -> fx.Node:
    node = operands(use.operand.node)[0]
    assert isinstance(node, fx.Node)
    return node


def _why(axis: Axis, chosen: Container[fx.Node], paths: Mapping[fx.Node, str]) -> str:
    """Why an axis is not scaled: what forbids it, what has to keep a shared weight, what the user leaves out."""
    if pin := axis.why("scale"):
        return str(pin)
    for use in axis.uses:
        if use.operand.shared():
            return f"its {use.operand.leaf} is shared with other layers (node {use.operand.node.name})"
        if use.sums and use.operand.node not in chosen:
            node = use.operand.node
            return f"{paths.get(node, node.name)!r} reads it too and is left out (node {node.name})"
    return ""


def _largest(axis: Axis, found: Iterable[tuple[Use, Tensor]]) -> Tensor:
    """Per column of each layer → the largest per channel of the axis, float64."""
    largest = torch.zeros(axis.size, dtype=torch.float64)
    for use, values in found:
        held = use.channels >= 0
        largest.scatter_reduce_(0, use.channels[held], values.double()[held], "amax")
    return largest
