"""Norms of the last axis, fused or as exporters spell them out: y = (x − mean?) / rms · weight + bias.

`aten.layer_norm` and `aten.rms_norm` are one node; transformers write an RMS norm as
pow → mean → add → rsqrt → mul (→ mul by the weight), with casts between when the model is not in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program, argument, describe, operands, shape_of
from .weights import Operand, is_stored

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class Norm:
    """One norm over the C channels of the last axis.

    `output` is the value that is read on, `inside` the other nodes of the spelt-out form. `weight` and `bias` say
    where those operands stand; an operand that may be given but is not has a place too, and the value None.
    `centred`: it subtracts the mean (LayerNorm); without, it is an RMS norm. `eps` None: that of the dtype.
    """

    input: fx.Node
    output: fx.Node
    inside: frozenset[fx.Node]
    weight: Operand | None
    bias: Operand | None
    centred: bool
    eps: float | None

    @property
    def channels(self) -> int:
        return int(shape_of(self.output)[-1])

    @property
    def plain(self) -> bool:
        """Whether it commutes with every rotation: it has no weight, and subtracts nothing."""
        return not self.centred and (self.weight is None or self.weight.source is None)

    def describe(self) -> str:
        return f"the norm at {describe(self.output)}"


def norms(program: Program) -> list[Norm]:
    """Every norm of the last axis, in graph order."""
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        norm = None
        if node.target is aten.layer_norm.default:
            eps = float(argument(node, 4, "eps", 1e-5))
            norm = Norm(operands(node)[0], node, frozenset(), Operand(node, 2), Operand(node, 3, "bias"), True, eps)
        elif node.target is aten.rms_norm.default:
            norm = Norm(operands(node)[0], node, frozenset(), Operand(node, 2), None, False, argument(node, 3, "eps"))
        elif node.target is aten.rsqrt.default:
            norm = _spelt_out(node)
        if norm is not None and (norm.inside or len(operands(norm.output)[1]) == 1):
            found.append(norm)
    return found


def _spelt_out(rsqrt: fx.Node) -> Norm | None:
    """x · rsqrt(mean(x²) + eps), and the product with a stored weight where one follows."""
    add = operands(rsqrt)[0]
    mean = operands(add)[0] if _is(add, aten.add.Tensor, aten.add.Scalar) else None
    square = operands(mean)[0] if _is(mean, aten.mean.dim) else None
    if mean is None or square is None or not isinstance(operands(add)[1], float):
        return None
    rank = len(shape_of(square))
    keep = bool(argument(mean, 2, "keepdim", False))
    if [d % rank for d in operands(mean)[1]] != [rank - 1] or not keep:
        return None
    wide = _squared(square)
    products = [u for u in rsqrt.users if _is(u, aten.mul.Tensor) and wide in operands(u)[:2]]
    if wide is None or len(rsqrt.users) != 1 or len(products) != 1:
        return None
    chain = [square, mean, add, rsqrt, products[0]]
    source = wide
    if wide.target in _CASTS and set(wide.users) <= {square, products[0]}:
        chain.append(wide)
        source = operands(wide)[0]
    weight = _weighted(chain, products[0])
    output = weight.node if weight else products[0]
    inside = frozenset(chain) - {output}
    if any(not set(n.users) <= {*inside, output} for n in inside):
        return None  # something else reads a value in between
    return Norm(source, output, inside, weight, None, False, float(operands(add)[1]))


def _squared(node: fx.Node) -> fx.Node | None:
    """x of x², however it is written."""
    x, *rest = operands(node)
    square = _is(node, aten.pow.Tensor_Scalar) and rest[0] == 2
    return x if square or (_is(node, aten.mul.Tensor) and rest[0] is x) or _is(node, aten.square.default) else None


def _weighted(chain: list[fx.Node], product: fx.Node) -> Operand | None:
    """Where the stored weight stands in the product that follows; appends the nodes on the way to `chain`."""
    node, way = product, []
    while len(node.users) == 1:
        (node,) = node.users
        way.append(node)
        if not _is(node, *_CASTS):
            break
    if not way or not _is(node, aten.mul.Tensor):
        return None
    for index, other in enumerate(operands(node)[:2]):
        width = shape_of(product)[-1:]
        if isinstance(other, fx.Node) and is_stored(other) and tuple(shape_of(other)) == tuple(width):
            chain.extend(way)
            return Operand(node, index)
    return None


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def rms_norm(program: Program, norm: Norm, weight: Operand | None = None) -> fx.Node:
    """Put `aten.rms_norm` in the place of a norm, with what stands at `weight` or without one; returns the new node."""
    with program.graph.inserting_before(norm.output):
        arguments = (norm.input, [norm.channels], None if weight is None else weight.source, norm.eps)
        node = program.graph.call_function(aten.rms_norm.default, arguments)
    node.meta = dict(norm.output.meta)
    norm.output.replace_all_uses_with(node)
    return node
