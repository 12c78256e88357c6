"""What operators that only put elements elsewhere say about axes: views, concatenations, selections, pooling.

A view splits and joins axes into products, a concatenation joins them one behind the other, a slice cuts them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import fx

from . import dialect  # noqa: F401  # registers the operators named below
from .axis_rules import LIKE
from .axis_terms import Dim, Pin, between, fresh, joined, pinned, regroup, size
from .axis_walk import Dims, Literal, Walk, rule, unknown, write
from .program import argument, example_shape, operands

aten = torch.ops.aten
paretoc = torch.ops.paretoc


# -- the same elements in another arrangement ---------------------------------------------------------------------


@rule(
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)
def _view(w: Walk, node: fx.Node) -> Any:
    if w.action is not None and (parts := _stacked(w, node)):
        return _part_by_part(w, node, parts)
    made = regroup(w.of(operands(node)[0]), example_shape(node), Pin("a view cuts across axes", node))
    if node.target is aten.unflatten.int:
        first = operands(node)[1] % len(w.of(operands(node)[0]))
        for index in range(len(operands(node)[2])):
            w.sized(node, (2, index), made[first + index])
    elif node.target is not aten.flatten.using_ints:
        for index, dim in enumerate(made):
            w.sized(node, (1, index), dim)
    return made


_ORDERS = (aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.permute.default)


def _stacked(w: Walk, node: fx.Node) -> list[Dims]:
    """Queries, keys and values that one layer makes: where a view splits the last dimension and all that read it take
    it apart along one of the new ones, each part has axes of its own. Nothing in any other case."""
    x, shape = w.of(operands(node)[0]), example_shape(node)
    kept = len(x) - 1
    at = next((d for d in range(kept, len(shape)) if _taken_apart(node, d)), None)
    if at is None or [size(dim) for dim in x[:-1]] != [*shape[:kept]]:
        return []
    conflict = Pin("a view cuts across axes", node)
    *outer, whole = regroup(x[-1:], [*shape[kept:at], prod(shape[at:])], conflict)
    parts = _cut(w, node, whole, range(0, size(whole) + 1, prod(shape[at + 1 :])))
    return [[*x[:-1], *outer, (), *regroup([part], shape[at + 1 :], conflict)] for part in parts]


def _taken_apart(node: fx.Node, dim: int) -> bool:
    """Whether every operator that reads a value reads one or all places of a dimension, one by one."""

    def takes(user: fx.Node) -> bool:
        if user.target in _ORDERS:
            return _taken_apart(user, _order(user).index(dim))
        along = argument(user, 1, "dim", 0)
        single = user.target is aten.select.int and isinstance(operands(user)[2], int)
        return (single or user.target is aten.unbind.int) and along % len(example_shape(node)) == dim

    return bool(node.users) and all(map(takes, node.users))


def _part_by_part(w: Walk, node: fx.Node, parts: list[Dims]) -> Any:
    w.parts[node] = parts
    return w.fixed(node, "its parts are known one by one")


@rule(*_ORDERS)
def _permute(w: Walk, node: fx.Node) -> Any:
    source, order = operands(node)[0], _order(node)
    if source in w.parts:
        return _part_by_part(w, node, [[x[d] for d in order] for x in w.parts[source]])
    return [w.of(source)[d] for d in order]


def _order(node: fx.Node) -> list[int]:
    """Where each dimension of a result comes from."""
    order = list(range(len(example_shape(node))))
    if node.target is aten.permute.default:
        order = [d % len(order) for d in operands(node)[1]]
    elif node.target is aten.transpose.int:
        a, b = operands(node)[1:3]
        order[a], order[b] = order[b], order[a]
    elif node.target is aten.mT.default:
        order[-2:] = order[:-3:-1]
    else:
        order.reverse()
    return order


@rule(aten.unsqueeze.default)
def _unsqueeze(w: Walk, node: fx.Node) -> Dims:
    x = list(w.of(operands(node)[0]))
    x.insert(operands(node)[1] % (len(x) + 1), ())
    return x


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(w: Walk, node: fx.Node) -> Dims:
    x = w.of(operands(node)[0])
    named = argument(node, 1, "dim", range(len(x)))
    dropped = {d % len(x) for d in ([named] if isinstance(named, int) else named)}
    shape = example_shape(operands(node)[0])
    return [dim for d, dim in enumerate(x) if d not in dropped or shape[d] != 1]


@rule(aten.expand.default)
def _expand(w: Walk, node: fx.Node) -> Dims:
    """A repeated dimension holds the same everywhere: any order of it is the same tensor."""
    x, shape = w.of(operands(node)[0]), example_shape(node)
    made = [*([()] * (len(shape) - len(x))), *x]
    made = [dim or fresh(extent) for dim, extent in zip(made, shape, strict=True)]
    for index, dim in enumerate(made):
        w.sized(node, (1, index), dim)
    w.bend([dim for dim in made if dim not in x], node)
    return made


@rule(aten.repeat.default)
def _repeat(w: Walk, node: fx.Node) -> Dims:
    x, times = w.of(operands(node)[0]), operands(node)[1]
    x = [*([()] * (len(times) - len(x))), *x]
    made = []
    for index, (dim, extent) in enumerate(zip(x, example_shape(node), strict=True)):
        copies = fresh(extent // size(dim))
        w.sized(node, (1, index), copies)
        w.bend([copies], node)
        made.append(copies + dim)
    return made


@rule(aten.repeat_interleave.self_int)
def _repeat_each(w: Walk, node: fx.Node) -> Any:
    named = argument(node, 2, "dim")
    if named is None or node.kwargs.get("output_size") is not None:
        return unknown(w, node)
    made = list(w.of(operands(node)[0]))
    copies = fresh(operands(node)[1])
    w.sized(node, (1,), copies)
    w.bend([copies], node)
    made[named] = made[named] + copies
    return made


# -- one behind the other -----------------------------------------------------------------------------------------


@rule(aten.cat.default)
def _cat(w: Walk, node: fx.Node) -> Dims:
    values = [w.of(value) for value in operands(node)[0]]
    values = [dims for dims in values if len(dims) == len(example_shape(node))]  # an empty vector may stand among them
    axis = argument(node, 1, "dim", 0) % len(values[0])
    others = w.broadcast(node, [[*dims[:axis], (), *dims[axis + 1 :]] for dims in values])
    others[axis] = joined([dims[axis] for dims in values])
    return others


@rule(aten.stack.default)
def _stack(w: Walk, node: fx.Node) -> Dims:
    values = [w.of(value) for value in operands(node)[0]]
    made = w.broadcast(node, values)
    made.insert(argument(node, 1, "dim", 0) % (len(made) + 1), joined([()] * len(values)))
    return made


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(w: Walk, node: fx.Node) -> Any:
    """Constant channels before and behind are axes of their own."""
    made, widths = list(w.of(operands(node)[0])), operands(node)[1]
    general = node.target is aten.pad.default
    mode, value = argument(node, 2, "mode", "constant") if general else "constant", argument(node, 2 + general, "value")
    if mode != "constant" or not all(isinstance(width, int) and width >= 0 for width in widths):
        return unknown(w, node)
    for index in range(0, len(widths), 2):
        place = -1 - index // 2
        if not any(widths[index : index + 2]):
            continue
        w.pin(made, node, "constants are put beside it", "offset")
        if held := pinned(made[place]):
            made[place] = fresh(example_shape(node)[place], held)
            continue
        ends = [fresh(width) if width else None for width in widths[index : index + 2]]
        for offset, end in enumerate(ends):
            w.sized(node, (1, index + offset), end or ())
        if value:
            w.bend([end for end in ends if end], node)
            w.pin([end for end in ends if end], node, "all its channels are one number", "shift")
        made[place] = joined([part for part in (ends[0], made[place], ends[1]) if part is not None])
    return made


# -- parts --------------------------------------------------------------------------------------------------------


def _cut(w: Walk, node: fx.Node, dim: Dim, ends: Sequence[int]) -> list[Dim]:
    """A dimension cut at these places, in order, the first 0; what cannot be cut is pinned."""
    held = pinned(dim)
    parts = [None if held else between(dim, start, stop) for start, stop in pairwise(ends)]
    if None in parts:
        if not held:
            w.pin([dim], node, "a cut goes through an axis")
        held = held or w.every("a cut goes through an axis", node)
        return [fresh(stop - start, held) for start, stop in pairwise(ends)]
    return [part for part in parts if part is not None]


@rule(aten.slice.Tensor)
def _slice(w: Walk, node: fx.Node) -> Any:
    made, shape = list(w.of(operands(node)[0])), example_shape(operands(node)[0])
    axis, start, end = argument(node, 1, "dim", 0), argument(node, 2, "start") or 0, argument(node, 3, "end")
    end, length = sys.maxsize if end is None else end, shape[axis]
    if not isinstance(start, int) or not isinstance(end, int) or argument(node, 4, "step", 1) != 1:
        why = "a slice of a computed length or with steps goes through it"
        w.pin([made[axis]], node, why)
        made[axis] = w.fixed(node, why)[axis]
        return made
    first, last = (min(max(e + length if e < 0 else e, 0), length) for e in (start, end))
    if not first < last:
        return unknown(w, node)
    if (first, last) == (0, 1) and all(user.target in LIKE for user in node.users):
        return [*made[:axis], (), *made[axis + 1 :]]
    movable = not pinned(made[axis])
    before, made[axis], behind = _three(w, node, made[axis], first, last)

    def renew(node: fx.Node, sizes: list[int]) -> None:
        left, kept, right = sizes
        begin = left if start >= 0 else -kept - right
        until = end if end > length else left + kept if end >= 0 else -right
        node.args, node.kwargs = (operands(node)[0], axis, begin, until), {}

    if movable:
        w.literals.append(Literal(node, [before, made[axis], behind], renew))
    return made


def _three(w: Walk, node: fx.Node, dim: Dim, first: int, last: int) -> list[Dim]:
    """What lies before, between and behind two places; nothing is an empty concatenation."""
    ends = sorted({0, first, last, size(dim)})
    parts = _cut(w, node, dim, ends)
    start, stop = ends.index(first), ends.index(last)
    return [joined(parts[:start]), joined(parts[start:stop]), joined(parts[stop:])]


@rule(aten.select.int)
def _select(w: Walk, node: fx.Node) -> Any:
    source, axis, index = operands(node)[:3]
    made = list(w.parts[source][index] if source in w.parts else w.of(source))
    dim = made.pop(axis)
    if source in w.parts:
        return made
    if not isinstance(index, int):
        w.pin([dim], node, "a computed channel is read")
        return made
    place = index % size(dim)
    movable = not pinned(dim)
    before, _, behind = _three(w, node, dim, place, place + 1)

    def renew(node: fx.Node, sizes: list[int]) -> None:
        write(node, (2,), sizes[0] if index >= 0 else -1 - sizes[1])

    if movable:
        w.literals.append(Literal(node, [before, behind], renew))
    return made


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def _split(w: Walk, node: fx.Node) -> Any:
    made = w.of(operands(node)[0])
    results = [tuple(part.shape) for part in node.meta["val"]]
    unbind = node.target is aten.unbind.int
    axis = argument(node, 1 if unbind else 2, "dim", 0) % len(made)
    if operands(node)[0] in w.parts:
        return [[*part[:axis], *part[axis + 1 :]] for part in w.parts[operands(node)[0]]]
    if not unbind and not all(isinstance(shape[axis], int) for shape in results):
        return unknown(w, node)
    extents = [1 if unbind else int(shape[axis]) for shape in results]
    movable = not pinned(made[axis])
    parts = _cut(w, node, made[axis], [0, *accumulate(extents)])
    if not unbind and movable:
        w.literals.append(Literal(node, parts, _renew_split))
    return [[*made[:axis], *([] if unbind else [part]), *made[axis + 1 :]] for part in parts]


def _renew_split(node: fx.Node, sizes: list[int]) -> None:
    """Parts may have lost different numbers of channels."""
    axis = argument(node, 2, "dim", 0)
    node.target, node.kwargs = aten.split_with_sizes.default, {}
    node.args = (operands(node)[0], sizes, axis)


@rule(aten.glu.default)
def _glu(w: Walk, node: fx.Node) -> Dims:
    made = list(w.of(operands(node)[0]))
    axis = argument(node, 1, "dim", -1)
    half = size(made[axis]) // 2
    values, gates = _cut(w, node, made[axis], [0, half, 2 * half])
    made[axis] = w.same(values, gates, node)
    w.bend(made, node)
    return made


@rule(operator.getitem)
def _item(w: Walk, node: fx.Node) -> Any:
    source, index = operands(node)[:2]
    held = w.dims[source]
    return held[index] if isinstance(source.meta.get("val"), (list, tuple)) else []


# -- by number ----------------------------------------------------------------------------------------------------


@rule(aten.index.Tensor)
def _index(w: Walk, node: fx.Node) -> Any:
    """x[i, j, …]: the numbered dimensions give way to those of the numbers."""
    x, numbers = w.of(operands(node)[0]), operands(node)[1]
    given = [d for d, value in enumerate(numbers) if value is not None]
    if any(numbers[d].meta["val"].dtype in (torch.bool, torch.uint8) for d in given):
        return unknown(w, node)
    w.pin([x[d] for d in given], node, "its channels are picked by number")
    picked = w.broadcast(node, [w.of(numbers[d]) for d in given])
    together = given == list(range(given[0], given[-1] + 1))
    first = given[0] if together else 0
    rest = [dim for d, dim in enumerate(x) if d not in given]
    return [*rest[:first], *picked, *rest[first:]]


@rule(aten.index_select.default)
def _index_select(w: Walk, node: fx.Node) -> Dims:
    made = list(w.of(operands(node)[0]))
    axis = operands(node)[1]
    w.pin([made[axis]], node, "its channels are picked by number")
    made[axis] = (w.of(operands(node)[2]) or [()])[0]
    return made


@rule(aten.gather.default)
def _gather(w: Walk, node: fx.Node) -> Any:
    """out[i, j] = x[i, n[i, j]] along dimension 1."""
    source, axis, numbers = operands(node)[:3]
    x, made = w.of(source), list(w.of(numbers))
    w.pin([x[axis]], node, "its channels are picked by number")
    for d, dim in enumerate(x):
        if d == axis % len(x):
            continue
        if size(dim) != size(made[d]):
            w.pin([dim, made[d]], node, "a part of its channels is picked")
        else:
            made[d] = w.same(dim, made[d], node)
    return made


@rule(aten.index_add.default)
def _index_add(w: Walk, node: fx.Node) -> Dims:
    made, axis, values = list(w.of(operands(node)[0])), operands(node)[1], list(w.of(operands(node)[3]))
    w.pin([made[axis], values[axis], *w.of(operands(node)[2])], node, "its channels are picked by number")
    values[axis] = ()
    w.broadcast(node, [made, values])
    w.pin(made, node, "it is added to another value", "offset")
    return made


@rule(paretoc.merge_tokens.default, paretoc.keep_tokens.default)
def _tokens(w: Walk, node: fx.Node) -> Any:
    """x `[B, T, C]` → `[B, T′, C]`: sums of tokens, by the numbers or scores that follow."""
    why = "token reduction picks along it"
    w.pin(w.of(operands(node)[0]), node, why, "offset")
    for read in node.all_input_nodes[1:]:
        w.pin(w.of(read), node, why)
    x = w.of(operands(node)[0])
    w.pin(x[:2], node, why)
    made = w.fixed(node, why)
    if node.target is paretoc.keep_tokens.default:
        return [*made[:2], x[2]]
    return [[*made[0][:2], x[2]], made[1]]


# -- windows over positions ---------------------------------------------------------------------------------------

_LINEAR_WINDOWS = {
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default),
    *(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_linear1d.vec),
}


@rule(*_LINEAR_WINDOWS, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def _window(w: Walk, node: fx.Node) -> Dims:
    """Positions are pooled or spread, each channel by itself."""
    x = w.of(operands(node)[0])
    channels = len(x) - int(next(c for c in reversed(str(node.target).split(".")[1]) if c.isdigit()))
    w.pin(x[channels:], node, "a window slides over it")
    if "avg_pool" in str(node.target) and "adaptive" not in str(node.target):
        w.pin(x, node, "zeros around it may be averaged too", "offset")
    if node.target not in _LINEAR_WINDOWS:
        w.pin(x[:channels], node, f"{node.target} does not commute with it", "rotate")
    return [*x[:channels], *w.fixed(node, "a window slides over it")[channels:]]
