"""x → x / s, W → W·diag(s): channels with large activations hand their size over to the weights. Exact up to rounding.

"smoothquant": s_j = max|X_j|^α / max|W_:j|^(1−α) (Xiao et al. 2023, "SmoothQuant", equation 4), the maxima over all
layers that read the channel. "awq": s_j = mean|X_j|^r, divided by √(max s · min s), r the best of 0, 0.05 … 0.95 by
‖Q(W·diag s)·(X/s) − W·X‖² summed over those layers (Lin et al. 2024, "AWQ", section 3.2 and the reference code).

1/s goes into what makes the channel: the weight of a norm, or the rows of a linear or convolution from which it comes
through nothing but movements, an attention's values, ReLU or a product with a gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.channels import ChannelAxis, Use, channel_axes
from ..compiler.encodings import Affine, Encoding, parse_encoding
from ..compiler.errors import OptionError, ParetocError, PassError, did_you_mean
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program, describe, operands
from ..compiler.sites import Site, weight_sites
from ..compiler.statistics import ChannelMax, ChannelMean, Sample, Statistic
from ..compiler.weights import WeightEdits

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
        nodes = {_input(use): None for axis, _ in self._axes(program, PassResult()) for use in axis.readers}
        return [kind(node.name) for node in nodes for kind in _RULES[self.rule]]

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result, edits = PassResult(), WeightEdits(program)
        axes = self._axes(program, result)
        for axis, free in ctx.track(axes, self.name):
            scale = self._smoothquant(axis, edits, ctx) if self.rule == "smoothquant" else self._awq(axis, edits, ctx)
            scale = torch.where(free & torch.isfinite(scale), scale, 1.0)
            _fold(axis, scale, edits)
        edits.commit()
        result.metrics = {"axes": len(axes), "channels": sum(int(free.sum()) for _, free in axes)}
        program.refresh()
        return result

    def _axes(self, program: Program, result: PassResult) -> list[tuple[ChannelAxis, Tensor]]:
        """(axis, which of its channels are scaled); fills in what matched and what is skipped, and why."""
        chosen = {site.node: site for site in self.sites(program)}
        axes, reasons, matched = [], {node: _no_source(site) for node, site in chosen.items()}, set()
        for axis in channel_axes(program, "scale"):
            _leave(axis, chosen, program)
            free = axis.free
            reached = [use for use in axis.readers if bool(_held(use, free).any())]
            reasons |= {u.operand.node: str(pin) for u in axis.readers if (pin := axis.pinned(u.channels))}
            if reached:
                read = torch.zeros(axis.size, dtype=torch.bool)
                for use in reached:
                    read[use.channels[_held(use, free)]] = True
                axes.append((axis, free & read))
                matched |= {use.operand.node for use in reached}
        result.matched = [site.path for node, site in chosen.items() if node in matched]
        result.skipped = {site.path: reasons[node] for node, site in chosen.items() if node not in matched}
        if not axes:
            found = [f"{path}: {reason}" for path, reason in list(result.skipped.items())[:3]]
            raise PassError(
                f"no input can be scaled: {'; '.join(found) or 'the model has no linear layer'}",
                where="pass 'smooth'",
                fix="widen targets=, or leave it out for this model",
            )
        return axes

    def _smoothquant(self, axis: ChannelAxis, edits: WeightEdits, ctx: Context) -> Tensor:
        activations = _largest(axis, ((u, ctx.statistic(ChannelMax(_input(u).name))) for u in axis.readers))
        weights = _largest(axis, ((u, edits[u.operand].abs().amax(0)) for u in axis.readers))
        scale = activations**self.alpha / weights.clamp(min=_LEAST) ** (1 - self.alpha)
        return torch.where(activations > 0, scale.clamp(min=_LEAST), 1.0)  # calibration never saw the others

    def _awq(self, axis: ChannelAxis, edits: WeightEdits, ctx: Context) -> Tensor:
        means = _largest(axis, ((u, ctx.statistic(ChannelMean(_input(u).name))) for u in axis.readers))
        alive = axis.free & (means > 0)
        best, least = torch.ones_like(means), torch.inf
        for step in range(_STEPS):
            scale = torch.where(alive, means.clamp(min=1e-4) ** (step / _STEPS), 1.0)
            span = scale[alive]
            scale = torch.where(alive, scale / (span.max() * span.min()).sqrt(), 1.0) if len(span) else scale
            loss = sum(self._loss(use, scale, edits, ctx) for use in axis.readers)
            if loss < least:
                best, least = scale, loss
        return best

    def _loss(self, use: Use, scale: Tensor, edits: WeightEdits, ctx: Context) -> float:
        """‖Q(W·diag s)·(X/s) − W·X‖² on the sampled inputs of one layer."""
        weight, x = edits[use.operand].float(), ctx.statistic(Sample(_input(use).name))[0]
        columns = torch.where(use.channels >= 0, scale[use.channels.clamp(min=0)], 1.0).float()
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


def _held(use: Use, free: Tensor) -> Tensor:
    """bool over the columns of a layer: those that hold a free channel."""
    return (use.channels >= 0) & free[use.channels.clamp(min=0)]


def _leave(axis: ChannelAxis, chosen: dict[fx.Node, Site], program: Program) -> None:
    """Pin what the user leaves out, and what shares a weight with something else."""
    for use in (*axis.writers, *axis.readers):
        if use.operand.shared():
            axis.pin(use.channels, f"its {use.operand.leaf} is shared with other layers", use.operand.node)
    paths = {site.node: site.path for site in weight_sites(program)}
    for use in axis.readers:
        if use.operand.node not in chosen:
            axis.pin(use.channels, f"{paths[use.operand.node]!r} reads it too and is left out", use.operand.node)


def _no_source(site: Site) -> str:
    return f"the channels of its input cannot be followed to a weight (node {site.input.name}, {site.input.target})"


def _largest(axis: ChannelAxis, found: Iterable[tuple[Use, Tensor]]) -> Tensor:
    """Per column of each layer → the largest per channel of the axis, float64."""
    largest = torch.zeros(axis.size, dtype=torch.float64)
    for use, values in found:
        held = use.channels >= 0
        largest.scatter_reduce_(0, use.channels[held], values.double()[held], "amax")
    return largest


def _fold(axis: ChannelAxis, scale: Tensor, edits: WeightEdits) -> None:
    for use in axis.writers:
        missing = use.operand not in edits  # a norm without a weight gets one
        value = torch.ones(axis.size, dtype=torch.float64) if missing else edits[use.operand]
        edits[use.operand] = (value.movedim(use.dim, -1) / scale).movedim(-1, use.dim)
    for use in axis.readers:
        columns = torch.where(use.channels >= 0, scale[use.channels.clamp(min=0)], 1.0)
        edits[use.operand] = edits[use.operand] * columns
