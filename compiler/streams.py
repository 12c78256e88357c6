"""Residual streams: the axes that norms read, and whether their channels may be mixed.

    x → x − mean(x) on a stream that only LayerNorms read changes nothing, since they subtract the mean; behind it,
    LayerNorm(x) = RMSNorm(x)·γ + β

Ashkboos et al. 2024, "SliceGPT", section 3. The mean is taken out of the weights that write the stream, over their
output channels: W ← W − 1·mean(W); β goes into the layers behind the norm. Exact up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from .axes import Axis, Pin, Use, find_axes
from .axis_moves import rotate
from .norms import Norm, norms, rms_norm
from .program import Program, shape_of
from .sites import LINEAR
from .weights import Operand, WeightEdits


class Streams:
    """The axes that norms read and make. `streams`: those that norms read as a whole; `broken`: norms that read a value
    of another kind, and what that is; `parts`: the axes in these values."""

    def __init__(self, program: Program) -> None:
        self.program, self.axes, self.norms = program, find_axes(program, "rotate"), norms(program)
        self.outputs = {norm: self._whole(norm.output) for norm in self.norms}
        self.streams: dict[Axis, list[Norm]] = {}
        self.broken: dict[Norm, Pin] = {}
        self.parts: dict[Axis, Pin] = {}
        for norm in self.norms:
            if axis := self._whole(norm.input):
                self.streams.setdefault(axis, []).append(norm)
            else:
                self.broken[norm] = self.torn(norm.input)
                self.parts |= dict.fromkeys(self.axes.at(norm.input, -1), self.broken[norm])

    def _whole(self, value: fx.Node) -> Axis | None:
        """The axis that is the last dimension of a value."""
        held = self.axes.at(value, -1)
        return held[0] if len(held) == 1 and held[0].size == shape_of(value)[-1] else None

    def torn(self, value: fx.Node) -> Pin:
        """Why the last dimension of a value is no axis as a whole."""
        return self.axes.why(value, -1, "fold") or Pin("not all of its channels may be mixed with one another", value)

    def forbidden(self, axis: Axis, read: list[Norm]) -> Pin | None:
        """What forbids to mix the channels of a stream, or to take its mean out where LayerNorms read it."""
        if pin := axis.why("fold") or self.parts.get(axis):
            return pin
        source = next((norm for norm, output in self.outputs.items() if output is axis and not norm.plain), None)
        if source is not None:
            return Pin("the weights of a norm act on what is added to it (post-norm)", source.output)
        for norm in read:
            if norm.centred != read[0].centred:
                return Pin("some of its norms subtract the mean, and this one differs", norm.output)
            if norm.input.meta["val"].dtype != norm.output.meta["val"].dtype:
                return Pin("its norm changes the dtype", norm.output)
        raw = next((use.operand.node for use in axis.uses if use.sums), None)
        if read[0].centred and raw is not None:
            return Pin("this reads it without a norm that subtracts the mean", raw)
        return None

    def kept(self, norm: Norm) -> Pin | None:
        """Why the weights of a norm cannot go into the layers behind it, if so."""
        output = self.outputs[norm]
        if norm.plain:
            return None
        if output is None:
            return self.torn(norm.output)
        others = [use for use in output.uses if not use.sums and use.operand not in (norm.weight, norm.bias)]
        if others or output in self.streams:
            return Pin("other values are added to what this norm scales (post-norm)", norm.output)
        if pin := output.why("fold") or self.parts.get(output):
            return pin
        if norm.bias is None or norm.bias.source is None:
            return None
        other = next((use.operand.node for use in output.sums if not linear(use)), None)
        return output.why("offset") if other is None else Pin("no bias of this can take up the bias of its norm", other)


def linear(use: Use) -> bool:
    """Whether a linear layer reads or makes an axis there."""
    return use.operand.index > 0 and use.operand.node.target in LINEAR


def fold_bias(edits: WeightEdits, norm: Norm, readers: Iterable[Use]) -> None:
    """W·(n + β) + b = W·n + (b + W·β)."""
    if norm.bias is None or norm.bias.source is None:
        return
    for use in readers:
        held, bias = use.channels >= 0, Operand(use.operand.node, 2, "bias")
        shift = edits[use.operand].movedim(use.dim, -1)[:, held] @ edits[norm.bias][use.channels[held]]
        edits[bias] = edits[bias] + shift if bias in edits else shift


@dataclass
class Centred:
    """What `center` did: the norms that became RMS norms, those that did not with the reason, tensors that stopped
    being shared."""

    norms: list[Norm] = field(default_factory=list)
    left: dict[Norm, Pin] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)


def center(program: Program, *, untie: bool = True) -> Centred:
    """Take the mean out of every residual stream where that changes nothing, in place: the LayerNorms that read it
    become RMS norms. One whose bias no layer can take up stays, and is the same on what has no mean. `untie`: also
    where a tensor that is shared would have to be stored twice."""
    found, result, edits = Streams(program), Centred(), WeightEdits(program)
    for axis, read in found.streams.items():
        pin = found.forbidden(axis, read) if read[0].centred else Pin("it subtracts no mean", read[0].output)
        kept = {norm: pin or found.kept(norm) for norm in read}
        result.left |= {norm: why for norm, why in kept.items() if why is not None}
        freed = [norm for norm, why in kept.items() if why is None]
        writers = [use for use in axis.uses if not use.sums]
        if (tied := _shared(writers)) and not untie:
            result.left |= dict.fromkeys(freed, tied)
        elif freed:
            rotate(edits, writers, torch.eye(axis.size, dtype=torch.float64) - 1 / axis.size)
            for norm in freed:
                fold_bias(edits, norm, _readers(found, norm))
            result.norms += freed
    result.untied = edits.commit()
    for norm in result.norms:
        rms_norm(program, norm, norm.weight)
    if result.norms:
        program.refresh()
    return result


def _readers(found: Streams, norm: Norm) -> list[Use]:
    output = found.outputs[norm]
    return output.sums if output is not None else []


def _shared(writers: Sequence[Use]) -> Pin | None:
    """Which weight would need a tensor of its own."""
    tied = next((use.operand for use in writers if use.operand.index >= 0 and use.operand.shared()), None)
    return None if tied is None else Pin(f"its {tied.leaf} is shared", tied.node)
