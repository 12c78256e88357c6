"""x → x / s, W → W·diag(s): channels with large activations hand their size over to the weights. Exact up to rounding.

"smoothquant": s_j = max|X_j|^α / max|W_:j|^(1−α) (Xiao et al. 2023, "SmoothQuant", equation 4), the maxima over all
layers that read the channel. "awq": s_j = mean|X_j|^r, divided by √(max s · min s), r the best of 0, 0.05 … 0.95 by
‖Q(W·diag s)·(X/s) − W·X‖² summed over those layers (Lin et al. 2024, "AWQ", section 3.2 and the reference code).

1/s goes into what makes the channel: the weight of a norm, or the rows of a linear or convolution from which it comes
through nothing but movements, an attention's values, ReLU or a product with a gate. Where nothing can take it (behind
GELU; a norm that a residual sum reads too), `insert=True` multiplies in front of the layers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.axes import Axis, Use, find_axes
from ..compiler.axis_moves import scale
from ..compiler.axis_terms import Atom
from ..compiler.encodings import Affine, Encoding, parse_encoding
from ..compiler.errors import OptionError, ParetocError, PassError, did_you_mean
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program, describe, operands, origin, shape_of
from ..compiler.sites import Site, weight_sites
from ..compiler.statistics import ChannelMax, ChannelMean, Sample, Statistic
from ..compiler.weights import Operand, WeightEdits

_RULES: dict[str, tuple[type[Statistic], ...]] = {"smoothquant": (ChannelMax,), "awq": (ChannelMean, Sample)}
_LEAST = 1e-5
_STEPS = 20


@dataclass(frozen=True)
class Smooth(SitePass):
    """Scale the channels that the chosen linears read. A channel that anything else reads is left, with the reason, or
    with `insert` multiplied on its way to them: one more operator for each such value, which costs time unless the
    target computes it together with its neighbours.

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
    insert: bool = False

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
        axes = self._axes(program, PassResult())
        nodes = {_input(use): None for axis in axes for use in axis.sums}
        return [kind(node.name) for node in nodes for kind in _RULES[self.rule]]

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result, edits = PassResult(), WeightEdits(program)
        axes = self._axes(program, result)
        for axis, multiplied in ctx.track(list(axes.items()), self.name):
            sizes = self._smoothquant(axis, edits, ctx) if self.rule == "smoothquant" else self._awq(axis, edits, ctx)
            factors = torch.where(torch.isfinite(sizes), 1 / sizes, 1.0)
            scale(edits, axis, factors)
            if multiplied is not None:
                _multiply(program, multiplied, axis, factors)
        edits.commit()
        result.metrics = {"axes": len(axes), "channels": sum(axis.size for axis in axes)}
        program.refresh()
        return result

    def _axes(self, program: Program, result: PassResult) -> dict[Axis, fx.Node | None]:
        """The axes that are scaled, each with the value to multiply where nothing else takes its factors; fills in
        which sites matched and which are skipped, and why."""
        paths = {site.node: site.path for site in weight_sites(program)}
        sites = list(self.sites(program))
        chosen = {site.node: site.path for site in sites}
        reasons = {node: Operand(node, 1).fixed(program) or "its input has no channels" for node in chosen}
        axes: dict[Axis, fx.Node | None] = {}
        matched: set[fx.Node] = set()
        for axis in find_axes(program, "scale"):
            readers = {use.operand.node for use in axis.sums}
            if why := _why(axis, chosen, paths):
                reasons |= dict.fromkeys(readers & chosen.keys(), why)
            elif readers:
                axes[axis] = None
                matched |= readers
        if self.insert:
            left = _branches(program, [site for site in sites if site.node not in matched])
            axes |= left
            matched |= {use.operand.node for axis in left for use in axis.sums}
        result.matched = [path for node, path in chosen.items() if node in matched]
        result.skipped = {path: reasons[node] for node, path in chosen.items() if node not in matched}
        if not axes:
            found = [f"{path}: {reason}" for path, reason in list(result.skipped.items())[:3]]
            raise PassError(
                f"no input can be scaled: {'; '.join(found) or 'the model has no linear layer'}",
                where="pass 'smooth'",
                fix="widen targets=, use insert=true, or leave it out for this model",
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


def _branches(program: Program, sites: Iterable[Site]) -> dict[Axis, fx.Node | None]:
    """For every value that linears read an axis that ends at these linears, and the value. The weights have to be
    theirs alone, and not stored yet."""
    readers: dict[fx.Node, list[Operand]] = {}
    for site in sites:
        operand = Operand(site.node, 1)
        if site.kind == "linear" and not operand.fixed(program) and not operand.shared():
            readers.setdefault(site.input, []).append(operand)
    axes: dict[Axis, fx.Node | None] = {}
    for source, operands_ in readers.items():
        atom = Atom(int(shape_of(source)[-1]), {})
        names = [program.weight_name(operand.source) or "" for operand in operands_]
        uses = [Use(n, 1, True, operand, (atom,), (atom,)) for n, operand in zip(names, operands_, strict=True)]
        axes[Axis(program, (atom,), uses)] = source
    return axes


def _multiply(program: Program, source: fx.Node, axis: Axis, factors: Tensor) -> None:
    """source → source·factors for the linears of an axis."""
    readers = sorted(use.operand.node for use in axis.uses)
    name = f"smooth.{readers[0].name}.{source.name}"
    stored = program.attribute(name, factors.to(source.meta["val"].dtype), before=readers[0])
    with program.graph.inserting_before(readers[0]):
        product = program.graph.call_function(torch.ops.aten.mul.Tensor, (source, stored))
    product.meta.update(origin(readers[0]))
    for reader in readers:
        reader.update_arg(0, product)


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
