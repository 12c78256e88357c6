"""Canonical form: the same model with nothing in the graph that does nothing.

Removes dropout, assertions, no-op casts, copies, slices and views, and attention masks that hide nothing, folds batch
norms into the convolution or linear before them and evaluates constant subgraphs. Views become reshapes, because a
view may rely on a copy that is removed here.
Exact, but for batch-norm folding, which is exact up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .masks import simplify_masks
from .program import Program, operands, shape_of
from .sites import BATCH_NORM, CONV

aten = torch.ops.aten

#: operators whose result is their first argument when dtype and shape did not change
_COPIES = (
    aten.dropout.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten._unsafe_view.default,
)
#: a folded constant larger than this many elements would cost more in the file than the operator at run time
_FOLD_LIMIT = 1 << 16


def canonicalize(program: Program) -> dict[str, int]:
    """Rewrite in place; returns how many nodes each rule removed."""
    _views_to_reshapes(program.graph)
    counts = {
        "assertions": _remove_assertions(program.graph),
        "copies": _remove_copies(program.graph),
        "matrix_products": products_to_linear(program),
        "batch_norms": fold_batch_norms(program),
        "constants": fold_constants(program),
        "masks": simplify_masks(program),
    }
    program.refresh()
    return {name: count for name, count in counts.items() if count}


def _remove(graph: fx.Graph, matches: Callable[[fx.Node], Any]) -> int:
    count = 0
    for node in list(graph.nodes):
        replacement = matches(node)
        if replacement is None:
            continue
        if replacement is not node:
            node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        count += 1
    return count


def _remove_assertions(graph: fx.Graph) -> int:
    def match(node: fx.Node) -> fx.Node | None:
        name = str(node.target)
        asserts = name.startswith(("aten._assert", "aten.sym_constrain_range", "aten._assert_scalar"))
        return node if node.op == "call_function" and asserts and not node.users else None

    return _remove(graph, match)


def _remove_copies(graph: fx.Graph) -> int:
    def match(node: fx.Node) -> fx.Node | None:
        if node.op != "call_function" or node.target not in _COPIES:
            return None
        source = operands(node)[0]
        if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
            return None
        same = [str(s) for s in shape_of(source)] == [str(s) for s in shape_of(node)]
        return source if same else None

    return _remove(graph, match)


def _views_to_reshapes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def products_to_linear(program: Program) -> int:
    """x·W and b + x·W with a stored `W [I, O]` become linear(x, Wᵀ, b), so that one kind of site covers them all."""
    count = 0
    for node in program.calls(aten.addmm.default, aten.mm.default, aten.matmul.default):
        bias, x, weight = operands(node)[:3] if node.target is aten.addmm.default else (None, *operands(node)[:2])
        stored = isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1
        if not stored or weight.meta["val"].ndim != 2 or x.meta["val"].ndim < 2 or node.kwargs:
            continue
        if isinstance(bias, fx.Node) and bias.meta["val"].ndim != 1:
            continue
        with program.graph.inserting_before(node):
            name = str(weight.target)
            value = program.get(name).detach().T.contiguous()
            linear = program.graph.call_function(aten.linear.default, (x, weight, bias))
        program.set(name, value)
        weight.meta["val"] = program.fake(value)
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        program.graph.erase_node(node)
        count += 1
    return count


def fold_batch_norms(program: Program) -> int:
    """conv/linear → batch norm becomes conv/linear: W' = γ/σ·W, b' = (b − μ)·γ/σ + β (inference statistics)."""
    count = 0
    for norm in program.calls(*BATCH_NORM):
        producer = operands(norm)[0]
        if not _foldable(program, norm, producer):
            continue
        assert isinstance(producer, fx.Node)
        weight, bias = operands(producer)[1], operands(producer)[2] if len(operands(producer)) > 2 else None
        gamma, beta, mean, variance = (_value(program, a) for a in operands(norm)[1:5])
        assert isinstance(mean, Tensor) and isinstance(variance, Tensor) and isinstance(weight, fx.Node)
        eps = operands(norm)[7] if norm.target is aten.batch_norm.default else operands(norm)[6]
        factor = torch.rsqrt(variance.double() + float(eps))
        factor = factor * gamma.double() if isinstance(gamma, Tensor) else factor
        old = program.weight_value(weight)
        own = _value(program, bias)
        shift = (own.double() if own is not None else 0.0) - mean.double()
        shift = shift * factor + (beta.double() if isinstance(beta, Tensor) else 0.0)
        name = str(weight.target)
        program.set(name, (old.double() * factor.reshape(-1, *[1] * (old.ndim - 1))).to(old.dtype))
        bias_name = str(bias.target) if isinstance(bias, fx.Node) else f"{name.removesuffix('weight')}bias"
        new_bias = program.attribute(bias_name, shift.to(old.dtype), before=producer)
        arguments = list(operands(producer)) + [None] * (3 - len(operands(producer)))
        producer.args = (*arguments[:2], new_bias, *arguments[3:])
        for user in list(norm.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(producer)
                program.graph.erase_node(user)
        if norm.users:
            norm.replace_all_uses_with(producer)
        program.graph.erase_node(norm)
        count += 1
    return count


def _foldable(program: Program, norm: fx.Node, producer: Any) -> bool:
    if not isinstance(producer, fx.Node) or len(producer.users) != 1:
        return False
    if producer.target not in (*CONV, aten.linear.default):
        return False
    if producer.target is aten.linear.default and producer.meta["val"].ndim != 2:
        return False
    if norm.target is aten.batch_norm.default and operands(norm)[5]:
        return False
    if any(u.target is operator.getitem and operands(u)[1] != 0 and u.users for u in norm.users):
        return False
    stored = [a for a in operands(producer)[1:3] if isinstance(a, fx.Node)]
    return all(a.op == "get_attr" and len(a.users) == 1 for a in stored)


def _value(program: Program, node: Any) -> Tensor | None:
    return program.get(str(node.target)).detach() if isinstance(node, fx.Node) and node.op == "get_attr" else None


def fold_constants(program: Program) -> int:
    """Evaluate small subgraphs that depend on stored tensors and literals only (position ids, masks, anchors)."""
    weights = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    constant: dict[fx.Node, Tensor] = {}
    count = 0
    for node in list(program.graph.nodes):
        value = _evaluate(program, node, constant)
        if value is None:
            continue
        constant[node] = value
        if node.op == "get_attr" or all(u in constant for u in node.users):
            continue
        count += 1
    for node in [n for n in constant if n.op == "call_function"]:
        if any(_evaluate(program, u, constant) is None for u in node.users):
            name = f"constants.{node.name}"
            assert name not in weights
            replacement = program.attribute(name, constant[node], before=node)
            node.replace_all_uses_with(replacement)
    return count


def _evaluate(program: Program, node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor | None:
    if node in known:
        return known[node]
    if node.op == "get_attr":
        value = program.get(str(node.target))
        return value.detach() if value.numel() <= _FOLD_LIMIT and not isinstance(value, torch.nn.Parameter) else None
    meta = node.meta.get("val")
    if node.op != "call_function" or not isinstance(meta, Tensor) or str(node.target).startswith("paretoc."):
        return None
    if "rand" in str(node.target) or any(not isinstance(s, int) for s in meta.shape):
        return None
    if meta.numel() > _FOLD_LIMIT or any(n not in known for n in node.all_input_nodes):
        return None
    args, kwargs = fx.node.map_arg((operands(node), node.kwargs), lambda n: known[n])
    assert callable(node.target)
    result = node.target(*args, **kwargs)
    return result.clone() if isinstance(result, Tensor) else None
