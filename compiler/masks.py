"""Attention masks in their simplest form: what hides nothing goes, what gathers leading rows is a slice.

    and(true, m) → m;  m[0…B−1, 0…S−1] → m[:B, None, None, :S];  attention(q, k, v, true) → attention(q, k, v)

Exact. Libraries write masks as predicates over index grids, and a kernel that reads a mask costs more than one that
does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .program import Program, operands, origin, shape_of
from .sites import ADD, SDPA

aten = torch.ops.aten

#: operators whose result holds only elements of their first argument
_SELECTIONS = (aten.expand.default, aten.clone.default, aten.alias.default, aten.slice.Tensor, aten.unsqueeze.default)
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.new_ones.default, aten.ones.default, aten.ones_like.default)
_FULL = (aten.full.default, aten.new_full.default, aten.full_like.default)


def simplify_masks(program: Program) -> int:
    """Rewrite in place; returns how many masks or parts of masks it removed."""
    graph, count = program.graph, 0
    for node in list(graph.nodes):
        if node.target in _AND:
            replacement = _without_true(program, node)
        elif node.target is aten.index.Tensor:
            replacement = _leading(node)
        elif node.target in ADD:
            replacement = _without_zero(program, node)
        else:
            continue
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            count += 1
    for node in program.calls(*SDPA):
        mask = operands(node)[3] if len(operands(node)) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, fx.Node) and _uniform(program, mask) == (mask.meta["val"].dtype == torch.bool):
            node.args = (*operands(node)[:3], None, *operands(node)[4:])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
            count += 1
    return count


def _without_true(program: Program, node: fx.Node) -> fx.Node | None:
    """The other operand of an "and" with what is true everywhere; broadcast, unless attention will do that."""
    if node.meta["val"].dtype != torch.bool:
        return None
    for kept, other in (operands(node)[:2], operands(node)[1::-1]):
        if (
            not isinstance(kept, fx.Node)
            or kept.meta["val"].dtype != torch.bool
            or _uniform(program, other) is not True
        ):
            continue
        if _same_shape(kept, node):
            return kept
        if kept.meta["val"].ndim == node.meta["val"].ndim and all(u.target in SDPA for u in node.users):
            return kept
    return None


def _without_zero(program: Program, node: fx.Node) -> fx.Node | None:
    if _uniform(program, operands(node)[1]) != 0:
        return None
    source = operands(node)[0]
    same = isinstance(source, fx.Node) and _same_shape(source, node)
    return source if same and source.meta["val"].dtype == node.meta["val"].dtype else None


def _leading(node: fx.Node) -> fx.Node | None:
    """x[i, j] where i = 0 … I−1 and j = 0 … J−1, each along an axis of its own: x[:I, :J] with axes of size 1."""
    source, indices = operands(node)[:2]
    shape, result = shape_of(source), shape_of(node)
    if len(indices) != len(shape) or not all(isinstance(i, fx.Node) for i in indices):
        return None
    axes, counts = [], []
    for index in indices:
        root = index
        while root.target is aten.unsqueeze.default:
            root = operands(root)[0]
        varying = [a for a, s in enumerate(shape_of(index), len(result) - len(shape_of(index))) if str(s) != "1"]
        if root.target is not aten.arange.default or len(varying) != 1:
            return None
        axes.append(varying[0])
        counts.append(root)
    if axes != sorted(set(axes)):
        return None
    value: fx.Node = source
    with node.graph.inserting_before(node):
        for axis, count in enumerate(counts):
            if str(shape_of(count)[0]) != str(shape[axis]):
                value = _call(aten.slice.Tensor, value, axis, 0, operands(count)[0])
        for axis in range(len(result)):
            if axis not in axes:
                value = _call(aten.unsqueeze.default, value, axis)
    return value


def _call(target: Any, source: fx.Node, *arguments: Any) -> fx.Node:
    node = source.graph.call_function(target, (source, *arguments))
    node.meta.update(origin(source))
    literal = [a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments]
    node.meta["val"] = target(source.meta["val"], *literal)
    return node


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return [*map(str, shape_of(one))] == [*map(str, shape_of(other))]


def _uniform(program: Program, value: Any) -> Any:
    """The number that every element of an operand equals, or None where that is not known."""
    if not isinstance(value, fx.Node):
        return value if isinstance(value, (bool, int, float)) else None
    if value.target in _SELECTIONS:
        return _uniform(program, operands(value)[0])
    if value.target in _ONES:
        return True if value.meta["val"].dtype == torch.bool else 1
    if value.target in _FULL:
        return _uniform(program, operands(value)[-1])
    if value.target in _AND and value.meta["val"].dtype == torch.bool:
        return True if all(_uniform(program, v) is True for v in operands(value)[:2]) else None
    if value.target is aten.ge.Scalar:
        least = _least(operands(value)[0])
        return True if least is not None and least >= operands(value)[1] else None
    if str(value.target).startswith("aten.where.") and (condition := _uniform(program, operands(value)[0])) is not None:
        return _uniform(program, operands(value)[1 if condition else 2])
    if value.op != "get_attr" or isinstance(stored := program.get(str(value.target)), torch.nn.Parameter):
        return None
    tensor: Tensor = stored.detach()
    first = tensor.reshape(-1)[:1]
    return first.item() if tensor.numel() and bool((tensor == first).all()) else None


def _least(value: Any) -> int | None:
    """A lower bound of an index grid, where one is known."""
    while isinstance(value, fx.Node) and value.target in _SELECTIONS:
        value = operands(value)[0]
    return 0 if isinstance(value, fx.Node) and value.target is aten.arange.default else None
