"""scaled_dot_product_attention(q, k, v) → softmax(q·kᵀ·scale + bias)·v: where an attention reads what, and its products
one by one.

Equal up to float rounding, but for a query that may attend to nothing: it gets the mean of the values, not zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .program import Program, argument, operands, origin, shape_of
from .sites import MATMUL, AttentionSite

aten = torch.ops.aten
#: (a node, the index of one of its arguments)
Place = tuple[fx.Node, int]


def operand_places(site: AttentionSite) -> list[Place]:
    """Where the queries, the keys and the values are read, in this order."""
    if site.softmax is None:
        return [(site.node, 0), (site.node, 1), (site.node, 2)]
    logits = operands(site.softmax)[0]
    while logits.target not in MATMUL:
        logits = operands(logits)[0]
    return [(logits, 0), (operands(logits)[1], 0), (site.node, 1)]


def cache_code(site: AttentionSite) -> str | None:
    """The code, as in `paretoc::fake_quantize_dynamic`, that keys and values are rounded to for each token and head:
    what a key-value cache may hold. None where they are not rounded so."""
    keys, values = (_token_code(operands(reader)[index]) for reader, index in operand_places(site)[1:])
    return keys if keys == values else None


def _token_code(node: fx.Node) -> str | None:
    while node.target in (torch.ops.paretoc.fake_quantize.default, aten.repeat_interleave.self_int):
        node = operands(node)[0]
    if node.target is not torch.ops.paretoc.fake_quantize_dynamic.default or operands(node)[1] != "token":
        return None
    return str(argument(node, 2, "code", "int8"))


def decompose(program: Program, site: AttentionSite) -> fx.Node:
    """Take a fused attention apart, in place; returns the product with the values. Call `program.refresh()` behind the
    last one."""
    graph, fused = program.graph, site.node

    def call(target: Any, *arguments: Any, **options: Any) -> fx.Node:
        node = graph.call_function(target, arguments, options)
        node.meta.update(origin(fused))
        return node

    with graph.inserting_before(fused):
        query, key, value = operands(fused)[:3]
        queries, mask = site.query.meta["val"], site.mask
        if fused.kwargs.get("enable_gqa"):
            repeats = int(queries.shape[-3]) // int(shape_of(site.key)[-3])
            key, value = (call(aten.repeat_interleave.self_int, x, repeats, -3) for x in (key, value))
        product = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
        logits = call(aten.mul.Tensor, product, site.scale)
        if site.causal:
            square = product
            for _ in range(queries.ndim - 2):
                square = call(aten.select.int, square, 0, 0)
            mask = call(aten.tril.default, call(aten.ones_like.default, square, dtype=torch.bool))
        if mask is not None and (site.causal or mask.meta["val"].dtype == torch.bool):
            bias = call(aten.where.Scalar, mask, 0.0, torch.finfo(queries.dtype).min)
            mask = call(aten.to.dtype, bias, queries.dtype)
        logits = logits if mask is None else call(aten.add.Tensor, logits, mask)
        result = call(aten.matmul.default, call(aten.softmax.int, logits, -1), value)
    fused.replace_all_uses_with(result)
    graph.erase_node(fused)
    return result
