"""The moves on one axis that leave a model whole: put its channels in another order, leave some out, scale, mix them.

    permute: W[…, i, …] ← W[…, p(i), …] in every parameter along the axis; exact
    slice:   the same with the kept channels only, and every size in the graph that the axis is a part of
    scale:   W ← s·W in what makes the channels, W ← W/s in what sums over them, s > 0; exact up to rounding
    rotate:  W ← W·Q along the axis, QᵀQ = 1; exact up to rounding

Sources as in `axes`. Slicing an axis that is free for "zero" is exact for a model whose other channels are 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .axes import Action, Axis, Use
from .axis_terms import places, size
from .errors import OptionError, PassError
from .program import Program, describe
from .weights import WeightEdits


def take(axis: Axis, parameter: str, value: Tensor, order: Tensor) -> Tensor:
    """A parameter, or any tensor of its shape, with these channels of an axis, in this order."""
    for use in axis.uses:
        if use.parameter == parameter:
            value = value.index_select(use.dim, places(use.whole, {axis.atom: order}).to(value.device))
    return value


def permute(program: Program, axis: Axis, permutation: Tensor | Sequence[int]) -> None:
    """Channel j becomes the old channel `permutation[j]`, in place. The outputs stay as they are.

    `program` may be another model with the same parameters. Raises PassError for a pinned axis, OptionError for what
    is no permutation of its channels.
    """
    order = torch.as_tensor(permutation, dtype=torch.int64)
    _check_free(axis, "permute")
    if not torch.equal(order.sort().values, torch.arange(axis.size)):
        raise OptionError(
            f"{order.tolist()} is no permutation of {axis.size} channels",
            where=f"permuting {axis}",
            fix="pass every channel once",
        )
    _replace(program, axis, order)


def slice(program: Program, axis: Axis, kept: Tensor | Sequence[int]) -> None:
    """Keep these channels, in this order, and leave out the others, in place. See `slice_all`."""
    slice_all(program, {axis: kept})


def slice_all(program: Program, kept: Mapping[Axis, Tensor | Sequence[int]]) -> None:
    """Keep these channels of each axis, in place: all the weights and sizes first, then the shapes once.

    Afterwards these axes, and all that were found with them, describe the smaller model. Raises PassError for a pinned
    axis or one of another program, OptionError for channels that an axis has not, or none at all; then nothing changes.
    """
    orders = {axis: torch.as_tensor(order, dtype=torch.int64) for axis, order in kept.items()}
    for axis, order in orders.items():
        _check_slice(program, axis, order)
    for axis, order in orders.items():
        _replace(program, axis, order)
        axis.atom.extent = len(order)
    for literal in dict.fromkeys(literal for axis in orders for literal in axis.literals):
        literal.renew()
    program.refresh()


def scale(edits: WeightEdits, axis: Axis, factors: Tensor) -> None:
    """Channel j times `factors[j]` > 0, float64 `[size]`. A norm that has no weight gets one."""
    for use in axis.uses:
        value = edits[use.operand] if use.operand in edits else torch.ones(size(use.whole), dtype=torch.float64)
        by = use.spread(factors.reciprocal() if use.sums else factors)
        edits[use.operand] = (value.movedim(use.dim, -1) * by).movedim(-1, use.dim)


def rotate(edits: WeightEdits, uses: Iterable[Use], matrix: Tensor) -> None:
    """The row of channels times a matrix, float64 `[size, size]`, in these uses of an axis."""
    for use in uses:
        order = use.channels.argsort(stable=True)
        copies = order[use.channels[order] >= 0].reshape(len(matrix), -1).T  # [copy, channel] → place
        value = edits[use.operand].movedim(use.dim, -1).clone()
        value[..., copies] = value[..., copies] @ matrix
        edits[use.operand] = value.movedim(-1, use.dim)


@contextmanager
def resized(widths: Mapping[Axis, int]) -> Iterator[None]:
    """In here, `Axes.shape` tells what shapes would be if these axes had so many channels."""
    before = {axis: axis.size for axis in widths}
    try:
        for axis, width in widths.items():
            axis.atom.extent = width
        yield
    finally:
        for axis, width in before.items():
            axis.atom.extent = width


def _check_slice(program: Program, axis: Axis, order: Tensor) -> None:
    _check_free(axis, "slice")
    if axis.program is not program:
        raise PassError(
            "the axis was found in another program",
            where=f"slicing {axis}",
            fix="find the axes of the program that is to change",
        )
    channels = order.tolist()
    if not channels or len(set(channels)) < len(channels) or not 0 <= min(channels) <= max(channels) < axis.size:
        raise OptionError(
            f"{channels} is no choice among {axis.size} channels",
            where=f"slicing {axis}",
            fix="pass at least one channel, each at most once",
        )


def _check_free(axis: Axis, action: Action) -> None:
    pin = axis.why(action)
    if pin is not None:
        raise PassError(
            f"{axis} may not be {'permuted' if action == 'permute' else 'sliced'}: {pin.why}",
            where=describe(pin.node),
            fix="choose an axis that is free: `paretoc axes MODEL` lists them",
        )


def _replace(program: Program, axis: Axis, order: Tensor) -> None:
    nodes = {str(n.target): n for n in program.graph.nodes if n.op == "get_attr"}
    for parameter in dict.fromkeys(use.parameter for use in axis.uses):
        value = take(axis, parameter, program.get(parameter).detach(), order)
        program.set(parameter, value)
        nodes[parameter].meta["val"] = program.fake(value)
