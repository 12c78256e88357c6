"""What an axis is for: hidden channels between layers, heads, the width of a head, or a residual stream."""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from .axes import Axes, Axis
from .axis_walk import WEIGHTED
from .sites import attention_sites

#: "hidden": channels that layers make and others read, such as the width of a feed-forward or a convolution. "heads":
#: whole heads of an attention; where queries share keys, whole groups of them. "head_width": channels of every head.
#: "stream": channels to which several layers add.
Kind = Literal["hidden", "heads", "head_width", "stream"]
KINDS: tuple[Kind, ...] = ("hidden", "heads", "head_width", "stream")
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


def axis_kinds(axes: Axes) -> dict[Axis, Kind]:
    """The axes that layers both make and read, with what each is for; query heads that share keys are none alone."""
    heads, widths = _attention_axes(axes)
    summed = _summed(axes)
    kinds: dict[Axis, Kind] = {}
    for axis in axes:
        if axis in heads:
            if heads[axis]:
                kinds[axis] = "heads"
        elif axis in widths:
            kinds[axis] = "head_width"
        elif axis.readers and axis.writers:
            kinds[axis] = "stream" if axis in summed else "hidden"
    return kinds


def _attention_axes(axes: Axes) -> tuple[dict[Axis, bool], set[Axis]]:
    """The axes of heads, and whether a head of each has keys and values of its own; the axes of their width."""
    heads: dict[Axis, bool] = {}
    widths: set[Axis] = set()
    for site in attention_sites(axes.program):
        for value in (site.query, site.key, site.value):
            widths.update(axes.at(value, -1))
        among = axes.at(site.query, -3)
        own = [axis for axis in among if all(axis in _all_at(axes, node) for node in _made_from(site.value))]
        heads |= {axis: axis in (own or among) for axis in among}
    return heads, widths


def _made_from(value: fx.Node) -> set[fx.Node]:
    """A value, and what it is made from, down to the nearest layers."""
    found, queue = set(), [value]
    while queue:
        node = queue.pop()
        if node not in found and isinstance(node.meta.get("val"), torch.Tensor):
            found.add(node)
            queue += [] if node.target in WEIGHTED else node.all_input_nodes
    return found


def _all_at(axes: Axes, node: fx.Node) -> set[Axis]:
    return {axis for dim in range(node.meta["val"].ndim) for axis in axes.at(node, dim)}


def _summed(axes: Axes) -> set[Axis]:
    """The axes along which outputs of different layers are added."""
    makers: dict[fx.Node, dict[Axis, frozenset[fx.Node]]] = {}
    found: set[Axis] = set()
    writers = {node for axis in axes for node in axis.writers}
    for node in axes.program.graph.nodes:
        if node.op not in ("call_function", "get_attr") or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        made: dict[Axis, frozenset[fx.Node]] = {}
        inputs = [makers[read] for read in node.all_input_nodes if read in makers]
        for axis in _all_at(axes, node):
            if node in writers and node in axis.writers:
                made[axis] = frozenset([node])
                continue
            sources = [given[axis] for given in inputs if given.get(axis)]
            made[axis] = frozenset().union(*sources)
            if node.target in _SUMS and len(set(sources)) > 1:
                found.add(axis)
        makers[node] = made
    return found
