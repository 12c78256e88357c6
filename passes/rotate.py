"""x → x·Q on the residual stream, W → W·Q in what reads it, W → Qᵀ·W in what writes it, QᵀQ = I.

Ashkboos et al. 2024, "QuaRot", section 4 (Hadamard matrices behind random signs); Ashkboos et al. 2024, "SliceGPT",
section 3 (norm weights folded into the layers behind, the mean removed before so that a LayerNorm becomes an RMS norm).
Exact up to rounding; an outlier channel is spread over all channels, which makes weights and activations easier to
quantise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.channels import ChannelAxis, Pin, Use, channel_axes, output_axis
from ..compiler.errors import OptionError, PassError
from ..compiler.norms import Norm, rms_norm
from ..compiler.orthogonal import factors, has_hadamard, rotation
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program, describe, shape_of
from ..compiler.sites import LINEAR, weight_sites
from ..compiler.weights import Operand, WeightEdits

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate every residual stream whose norms can be folded; a model that has none is refused with the reason.

    `kind`: "hadamard" (random signs, then a Hadamard matrix where one of that order is known) or "random". `heads`:
    also each attention head's values, folded into the value and output projections. `online`: also the input of the
    layers that close a branch (down projections), by two small matrix products at run time. `stream=False` leaves
    the stream as it is. `seed` None: that of the compilation.
    """

    name: ClassVar[str] = "rotate"
    phase: ClassVar[Phase] = Phase.TRANSFORM
    before: ClassVar[tuple[str, ...]] = ("smooth",)
    conflicts: ClassVar[tuple[str, ...]] = ("prune_nm",)
    positional: ClassVar[str | None] = "kind"

    kind: str = "hadamard"
    heads: bool = True
    online: bool = False
    stream: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "random"):
            raise OptionError(
                f"there is no rotation of kind {self.kind!r}", where="pass 'rotate'", fix="use 'hadamard' or 'random'"
            )

    def apply(self, program: Program, ctx: Context) -> PassResult:
        axes = channel_axes(program, "rotate")
        result, turn = PassResult(), _Turn(program, axes, self.kind, ctx.seed if self.seed is None else self.seed)
        paths = {site.node: site.path for site in weight_sites(program)}
        streams = self._streams(axes, result) if self.stream else []
        last = [norm for axis in streams for norm in axis.norms if _kept(axes, norm)]
        heads = [a for a in axes if a.heads and not a.norms and _separable(a)] if self.heads else []
        for axis in heads:
            turn.head(axis)
        for axis in streams:
            turn.writers(axis)
        for axis in streams:
            turn.readers(axis)
        downs = _downs(program, axes, turn.turned) if self.online else []
        for node in downs:
            turn.online(node)
        if not turn.edits.values:
            raise PassError("nothing can be rotated", where="pass 'rotate'", fix="leave it out for this model")
        changed = {o.node for o in turn.edits.values}
        result.matched = list(dict.fromkeys(path for node, path in paths.items() if node in changed))
        for name in turn.edits.commit():
            result.warnings.append(f"{name} is a tensor of its own now: what it was shared with changes differently")
        for norm in (n for axis in streams for n in axis.norms):
            if norm in last:
                turn.back(norm)
                result.warnings.append(f"one more matrix product: {_kept(axes, norm)}, so it is rotated back before")
            else:
                rms_norm(program, norm)
        result.warnings += [f"no Hadamard matrix of order {n} is known: a random rotation instead" for n in turn.random]
        result.metrics = {"streams": len(streams), "head projections": len(heads), "online": len(downs)}
        program.refresh()
        return result

    def _streams(self, axes: list[ChannelAxis], result: PassResult) -> list[ChannelAxis]:
        """The residual streams that can be rotated; PassError when none can."""
        streams = [axis for axis in axes if axis.norms]
        reasons = [_forbidden(axes, axis) for axis in streams]
        for axis, pin in zip(streams, reasons, strict=True):
            if pin is not None:
                result.skipped[axis.norms[0].output.name] = str(pin)
        if streams and all(reasons):
            pin = reasons[0]
            assert pin is not None
            raise PassError(
                f"the residual stream cannot be rotated: {pin.why}",
                where=describe(pin.node),
                fix="leave rotate out for this model, or rotate only its attention heads with stream=false",
            )
        if not streams:
            raise PassError(
                "the model has no residual stream that a norm of the last axis reads",
                where="pass 'rotate'",
                fix="leave rotate out for this model, or rotate only its attention heads with stream=false",
            )
        return [axis for axis, pin in zip(streams, reasons, strict=True) if pin is None]


def _forbidden(axes: list[ChannelAxis], axis: ChannelAxis) -> Pin | None:
    """What forbids to rotate a stream, if anything does."""
    everything = torch.arange(axis.size)
    if axis.pins:
        return axis.pins[0]
    if axis.sources:
        return Pin(everything, "the weights of a norm act on what is added to it (post-norm)", axis.sources[0].output)
    kept = [pin for norm in axis.norms if (pin := _kept(axes, norm))]
    if len(kept) > 1 or len(kept) == len(axis.norms):
        return kept[0]
    for norm in axis.norms:
        if norm.centred != axis.norms[0].centred:
            return Pin(everything, "some of its norms subtract the mean, and this one differs", norm.output)
        if norm.input.meta["val"].dtype != norm.output.meta["val"].dtype:
            return Pin(everything, "its norm changes the dtype", norm.output)
    if axis.width < axis.size:
        return Pin(everything, f"an attention passes it in heads of width {axis.width}", axis.norms[0].output)
    if axis.norms[0].centred and axis.readers:
        return Pin(everything, "this reads it without a norm that subtracts the mean", axis.readers[0].operand.node)
    behind = [use for norm in axis.norms if not _kept(axes, norm) for use in output_axis(axes, norm).readers]
    uses = [*axis.writers, *axis.readers, *behind]
    apart = next((u for u in uses if _runs(u, axis.free, axis.size) is None), None)
    return None if apart is None else Pin(everything, "this takes its channels apart", apart.operand.node)


def _kept(axes: list[ChannelAxis], norm: Norm) -> Pin | None:
    """Why the weights of a norm cannot go into the layers behind it, if so. One such norm of a stream, usually the
    last one whose output the model returns, can be given the stream rotated back."""
    output = output_axis(axes, norm)
    if output.writers or output.norms or len(output.sources) > 1:
        return Pin(
            torch.arange(output.size), "other values are added to what this norm scales (post-norm)", norm.output
        )
    return output.pins[0] if output.pins else None


def _separable(axis: ChannelAxis) -> bool:
    """Whether the heads that pass an attention can be rotated, each by itself."""
    uses = [*axis.writers, *axis.readers]
    linear = all(use.operand.index > 0 and use.operand.node.target in LINEAR for use in uses)
    runs = [_runs(use, axis.free, axis.width) for use in uses]
    return linear and bool(axis.readers) and not axis.sources and all(r is not None and len(r) for r in runs)


def _runs(use: Use, free: Tensor, width: int) -> Tensor | None:
    """Places `[n, width]` in the dimension of a use that hold whole blocks of free channels, in order; None when a
    block is torn."""
    if len(use.channels) % width:
        return None
    runs = use.channels.reshape(-1, width)
    live = (runs >= 0) & free[runs.clamp(min=0)]
    whole = (runs == runs[:, :1] + torch.arange(width)).all(1) & (runs[:, 0] % width == 0)
    if bool((live.any(1) & ~(live.all(1) & whole)).any()):
        return None
    return torch.arange(len(use.channels)).reshape(-1, width)[live.all(1)]


def _downs(program: Program, axes: list[ChannelAxis], turned: set[fx.Node]) -> list[fx.Node]:
    """The linears that close a branch and whose input no folded rotation reaches."""
    outputs = {norm.output for axis in axes for norm in axis.norms}
    behind: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node in outputs or any(read in behind for read in node.all_input_nodes):
            behind.add(node)
    closing = (use.operand.node for axis in axes if axis.norms for use in axis.writers if use.operand.index == 1)
    linears = [n for n in dict.fromkeys(closing) if n.target in LINEAR and n.args[0] in behind and n not in turned]
    return [n for n in linears if isinstance(weight := n.args[1], fx.Node) and program.encoding(weight) is None]


class _Turn:
    """The new weights. Every rotation acts on rows: v → v·Q for what is written and for the columns of what reads."""

    def __init__(self, program: Program, axes: list[ChannelAxis], kind: str, seed: int) -> None:
        self.program, self.axes, self.kind, self.seed = program, axes, kind, seed
        self.edits = WeightEdits(program)
        self.turned: set[fx.Node] = set()  # linears whose input is rotated
        self.random: list[int] = []  # orders without a Hadamard matrix

    def rotation(self, n: int) -> Tensor:
        if self.kind == "hadamard" and not has_hadamard(n) and n not in self.random:
            self.random.append(n)
        return rotation(n, self.kind, self.seed)

    def head(self, axis: ChannelAxis) -> None:
        matrix = self.rotation(axis.width)
        self._turn(axis.writers, axis.free, matrix)
        self._turn(axis.readers, axis.free, matrix)
        self.turned |= {use.operand.node for use in axis.readers}

    def writers(self, axis: ChannelAxis) -> None:
        """The mean goes before the rotation where LayerNorms would subtract it."""
        matrix = self.rotation(axis.size)
        mean = matrix.mean(0, keepdim=True) if axis.norms[0].centred else 0
        self._turn(axis.writers, axis.free, matrix - mean)

    def readers(self, axis: ChannelAxis) -> None:
        matrix = self.rotation(axis.size)
        self._turn(axis.readers, axis.free, matrix)
        for norm in axis.norms:
            if _kept(self.axes, norm):
                continue
            output = output_axis(self.axes, norm)
            self._fold(norm, output.readers)
            self._turn(output.readers, output.free, matrix)

    def _turn(self, uses: Iterable[Use], free: Tensor, matrix: Tensor) -> None:
        for use in uses:
            value = self.edits[use.operand].movedim(use.dim, -1).clone()
            runs = _runs(use, free, len(matrix))
            assert runs is not None
            value[..., runs] = value[..., runs] @ matrix
            self.edits[use.operand] = value.movedim(-1, use.dim)

    def _fold(self, norm: Norm, readers: Iterable[Use]) -> None:
        """W·(γ∘n + β) + b = (W·diag γ)·n + (b + W·β)."""
        for use in readers:
            held, weight = use.channels >= 0, self.edits[use.operand].clone()
            if norm.bias is not None and norm.bias.source is not None:
                bias = Operand(use.operand.node, 2, "bias")
                shift = weight[:, held] @ self.edits[norm.bias][use.channels[held]]
                self.edits[bias] = self.edits[bias] + shift if bias in self.edits else shift
            if norm.weight is not None and norm.weight.source is not None:
                weight[:, held] *= self.edits[norm.weight][use.channels[held]]
                self.edits[use.operand] = weight

    def online(self, node: fx.Node) -> None:
        """x → x·(A ⊗ B): with x seen as a matrix X `[a, b]`, Aᵀ·X·B."""
        source, weight = node.args[0], Operand(node, 1)
        assert isinstance(source, fx.Node)
        a, b = factors(int(shape_of(source)[-1]))
        left, right = self.rotation(a), self.rotation(b)
        value = self.edits[weight]
        split = value.reshape(-1, a, b)
        self.edits[weight] = (left.T @ split @ right).reshape(value.shape)
        before, after = (self._stored(f"{side}_{len(m)}", m, node) for side, m in (("left", left.T), ("right", right)))
        graph = self.program.graph
        with graph.inserting_before(node):
            x = graph.call_function(aten.unflatten.int, (source, -1, [a, b]))
            x = graph.call_function(aten.matmul.default, (x, after))
            x = graph.call_function(aten.matmul.default, (before, x))
            x = graph.call_function(aten.flatten.using_ints, (x, -2, -1))
        node.update_arg(0, x)
        for new in (x, *x.all_input_nodes):
            new.meta["nn_module_stack"] = node.meta.get("nn_module_stack")

    def back(self, norm: Norm) -> None:
        """Rotate the stream back in front of a norm that stays."""
        user = min(u for u in norm.input.users if u in norm.inside or u is norm.output)
        matrix = self._stored(f"back_{norm.channels}", self.rotation(norm.channels).T, user)
        with self.program.graph.inserting_before(user):
            x = self.program.graph.call_function(aten.matmul.default, (norm.input, matrix))
        x.meta["nn_module_stack"] = user.meta.get("nn_module_stack")
        for reader in (norm.output, *norm.inside):
            reader.replace_input_with(norm.input, x)

    def _stored(self, name: str, matrix: Tensor, before: fx.Node) -> fx.Node:
        dtype = before.meta["val"].dtype
        return self.program.attribute(f"rotations.{name}", matrix.to(dtype).contiguous(), before=before)
