"""x·(A + U·V)ᵀ → x·Aᵀ + (x·Vᵀ)·Uᵀ: a low-rank correction runs beside the weight that it corrects. Exact up to rounding.

The dense sum is never formed, and A stays what a backend has a kernel for: how backends run `Sum(…, LowRank(…))`.
"""

from __future__ import annotations

import torch
from torch import fx

from .encodings import LowRank, Sum
from .program import Program, operands
from .sites import LINEAR

aten = torch.ops.aten


def split_sums(program: Program) -> list[str]:
    """Rewrite, in place, the linears whose weight is such a sum; a weight that anything else reads stays as it is.

    Returns the names of the stored arrays that are now read by ordinary operators.
    """
    names = [
        name
        for node in program.calls(torch.ops.paretoc.decode.default)
        if _splits(program, node)
        for name in _split(program, node)
    ]
    if names:
        program.refresh()
    return names


def _splits(program: Program, node: fx.Node) -> bool:
    encoding = program.encoding(node)
    if not isinstance(encoding, Sum) or not isinstance(encoding.second, LowRank):
        return False
    return all(user.target in LINEAR and operands(user)[0] is not node for user in node.users)


def _split(program: Program, node: fx.Node) -> list[str]:
    graph, encoding = program.graph, program.encoding(node)
    assert isinstance(encoding, Sum)
    arrays, _, shape, dtype = operands(node)
    stored = dict(zip(encoding.layout(tuple(shape)), arrays, strict=True))
    kept = [array for name, array in stored.items() if name.startswith("first.")]
    thin = [stored["second.v"], stored["second.u"]]
    with graph.inserting_before(node):
        first = graph.call_function(torch.ops.paretoc.decode.default, (kept, str(encoding.first), shape, dtype))
        casts = [graph.call_function(aten.to.dtype, (array, dtype)) for array in thin]
        factors = [graph.call_function(aten.permute.default, (cast, [1, 0])) for cast in casts]
    first.meta.update(node.meta, parameter=f"{node.meta['parameter']}.first")
    for linear in list(node.users):
        linear.update_arg(1, first)
        _add_beside(graph, linear, factors)
    return [str(array.target) for array in thin]


def _add_beside(graph: fx.Graph, linear: fx.Node, factors: list[fx.Node]) -> None:
    """linear(x) → linear(x) + x·Vᵀ·Uᵀ."""
    last = operands(linear)[0]
    with graph.inserting_before(linear.next):
        for factor in factors:
            last = graph.call_function(aten.matmul.default, (last, factor))
        total = graph.call_function(aten.add.Tensor, (linear, last))
    linear.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
