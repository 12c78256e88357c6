"""x → x·Q on the residual stream, W → W·Q in what reads it, W → Qᵀ·W in what writes it, QᵀQ = I.

Ashkboos et al. 2024, "QuaRot", section 4 (Hadamard matrices behind random signs); Ashkboos et al. 2024, "SliceGPT",
section 3 (norm weights folded into the layers behind, the mean removed before so that a LayerNorm becomes an RMS norm).
Exact up to rounding; an outlier channel is spread over all channels, which makes weights and activations easier to
quantise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.axes import Axis, Pin, Use
from ..compiler.axis_moves import rotate
from ..compiler.errors import OptionError, PassError
from ..compiler.norms import Norm, rms_norm
from ..compiler.orthogonal import factors, has_hadamard, rotation
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program, describe, operands, shape_of
from ..compiler.sites import LINEAR, MATMUL, SDPA, weight_sites
from ..compiler.streams import Streams, fold_bias, linear
from ..compiler.weights import Operand, WeightEdits

aten = torch.ops.aten
#: operators that mix tokens → which operand holds them
_VALUES = {**dict.fromkeys(MATMUL, 1), **dict.fromkeys(SDPA, 2)}


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
        result, axes = PassResult(), _Axes(program)
        turn = _Turn(program, self.kind, ctx.seed if self.seed is None else self.seed)
        paths = {site.node: site.path for site in weight_sites(program)}
        streams = self._streams(axes, result) if self.stream else {}
        last = {norm: pin for read in streams.values() for norm in read if (pin := axes.kept(norm))}
        heads = axes.heads() if self.heads else []
        for axis in heads:
            turn.head(axis)
        for axis, read in streams.items():
            turn.stream(axis, [norm for norm in read if norm not in last], read[0].centred, axes)
        downs = axes.downs(turn.turned) if self.online else []
        for node in downs:
            turn.online(node)
        if not turn.edits.values:
            raise PassError("nothing can be rotated", where="pass 'rotate'", fix="leave it out for this model")
        changed = {o.node for o in turn.edits.values}
        result.matched = list(dict.fromkeys(path for node, path in paths.items() if node in changed))
        for name in turn.edits.commit():
            result.warnings.append(f"{name} is a tensor of its own now: what it was shared with changes differently")
        for norm in (norm for read in streams.values() for norm in read):
            if norm in last:
                turn.back(norm)
                result.warnings.append(f"one more matrix product: {last[norm]}, so it is rotated back before")
            else:
                rms_norm(program, norm)
        result.warnings += [f"no Hadamard matrix of order {n} is known: a random rotation instead" for n in turn.random]
        result.metrics = {"streams": len(streams), "head projections": len(heads), "online": len(downs)}
        program.refresh()
        return result

    def _streams(self, axes: _Axes, result: PassResult) -> dict[Axis, list[Norm]]:
        """The residual streams that can be rotated, with the norms that read them; PassError when none can."""
        forbidden = dict(axes.broken)
        streams: dict[Axis, list[Norm]] = {}
        for axis, read in axes.streams.items():
            if pin := axes.forbidden(axis, read):
                forbidden[read[0]] = pin
            else:
                streams[axis] = read
        result.skipped = {norm.output.name: str(pin) for norm, pin in forbidden.items()}
        if forbidden and not streams:
            pin = next(iter(forbidden.values()))
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
        return streams


class _Axes(Streams):
    """Which axes of a program can be rotated."""

    def forbidden(self, axis: Axis, read: list[Norm]) -> Pin | None:
        """One norm of a stream, usually the last one whose output the model returns, may keep its weights: it is given
        the stream rotated back."""
        kept = [pin for norm in read if (pin := self.kept(norm))]
        if pin := super().forbidden(axis, read):
            return pin
        return kept[0] if len(kept) > 1 or len(kept) == len(read) else None

    def heads(self) -> list[Axis]:
        """The widths of attention heads that linear layers make and read, and nothing else."""
        given = [(n, _VALUES[n.target]) for n in self.program.graph.nodes if n.target in _VALUES]
        values = [axis for node, index in given for axis in self.axes.at(operands(node)[index], -1)]
        return [a for a in dict.fromkeys(values) if a.free("rotate") and a.sums and all(map(linear, a.uses))]

    def downs(self, turned: set[fx.Node]) -> list[fx.Node]:
        """The linears that close a branch and whose input no folded rotation reaches."""
        outputs = {norm.output for norm in self.norms}
        behind: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            if node in outputs or any(read in behind for read in node.all_input_nodes):
                behind.add(node)
        read = dict.fromkeys(axis for norm in self.norms for axis in self.axes.at(norm.input, -1))
        closing = dict.fromkeys(u.operand.node for a in read for u in a.uses if not u.sums and u.operand.index == 1)
        linears = [n for n in closing if n.target in LINEAR and n.args[0] in behind and n not in turned]
        return [n for n in linears if self.program.encoding(operands(n)[1]) is None]


class _Turn:
    """The new weights. Every rotation acts on rows: v → v·Q for what is written and for the columns of what reads."""

    def __init__(self, program: Program, kind: str, seed: int) -> None:
        self.program, self.kind, self.seed = program, kind, seed
        self.edits = WeightEdits(program)
        self.turned: set[fx.Node] = set()  # linears whose input is rotated
        self.random: list[int] = []  # orders without a Hadamard matrix

    def rotation(self, n: int) -> Tensor:
        if self.kind == "hadamard" and not has_hadamard(n) and n not in self.random:
            self.random.append(n)
        return rotation(n, self.kind, self.seed)

    def head(self, axis: Axis) -> None:
        rotate(self.edits, axis.uses, self.rotation(axis.size))
        self.turned |= {use.operand.node for use in axis.sums}

    def stream(self, axis: Axis, folded: Iterable[Norm], centred: bool, axes: _Axes) -> None:
        """The mean goes before the rotation where LayerNorms would subtract it."""
        matrix = self.rotation(axis.size)
        writers = [use for use in axis.uses if not use.sums]
        rotate(self.edits, writers, matrix - matrix.mean(0, keepdim=True) if centred else matrix)
        rotate(self.edits, axis.sums, matrix)
        for norm in folded:
            if not norm.plain and (output := axes.outputs[norm]):
                self._fold(norm, output.sums)
                rotate(self.edits, output.sums, matrix)

    def _fold(self, norm: Norm, readers: Sequence[Use]) -> None:
        """W·(γ∘n + β) + b = (W·diag γ)·n + (b + W·β)."""
        fold_bias(self.edits, norm, readers)
        if norm.weight is None or norm.weight.source is None:
            return
        for use in readers:
            held, weight = use.channels >= 0, self.edits[use.operand].movedim(use.dim, -1).clone()
            weight[..., held] *= self.edits[norm.weight][use.channels[held]]
            self.edits[use.operand] = weight.movedim(-1, use.dim)

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
