"""What operators that compute say about axes: element by element, linear layers, products, norms and sums.

First what holds for the order of the channels; `bend` adds that an operator is not linear along them. The marks "sum"
(values are added up along the axis without a weight) and "shift" (it may turn 0 into another number) decide together
whether leaving a channel out equals setting it to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import dialect  # noqa: F401  # registers the operators named below
from .axis_terms import Dim, Pin, fresh, regroup, size
from .axis_walk import Dims, Literal, Walk, rule, unknown
from .program import argument, example_shape, operands
from .sites import EMBEDDING, LINEAR, SDPA, SOFTMAX

aten = torch.ops.aten
paretoc = torch.ops.paretoc

# -- element by element -------------------------------------------------------------------------------------------

_SUMS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
#: f(s·x) = s·f(x) for s > 0
_HOMOGENEOUS = {aten.relu.default, aten.leaky_relu.default, aten.abs.default}
#: f(0) = 0
_KEEP_ZERO = {
    *(aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sin.default, aten.erf.default, aten.sqrt.default),
    *(aten.hardswish.default, aten.relu6.default, aten.elu.default, aten.mish.default, aten.square.default),
}


@rule(
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.dropout.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.lift_fresh_copy.default),
    aten.neg.default,
)
def _copy(w: Walk, node: fx.Node) -> Dims:
    made = list(w.of(operands(node)[0]))
    if not node.meta["val"].is_floating_point():
        w.bend(made, node)
    if node.target is aten.neg.default:
        w.pin(made, node, "it is negated", "offset")
    return made


@rule(
    torch.Tag.pointwise,  # every operator that PyTorch marks so, and some that it does not
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.floor_divide.default, aten.type_as.default),
    *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Tensor),
    *(aten.hardswish.default, aten.log_sigmoid.default),
)
def _pointwise(w: Walk, node: fx.Node) -> Dims:
    given = [value for value in (*operands(node), *node.kwargs.values()) if isinstance(value, fx.Node)]
    given.sort(key=lambda value: all(read.op == "get_attr" for read in value.all_input_nodes))  # what is stored last
    values = [w.of(value) for value in given if isinstance(value.meta["val"], Tensor)]  # x · x varies twice
    if node.target is aten.div.Tensor:
        w.bend(w.of(operands(node)[1]), node)
        w.pin(w.of(operands(node)[1]), node, "it divides", "shift")
    if node.target in _PRODUCTS:
        made = w.product(node, values)
        w.pin(made, node, "it is multiplied", "offset")
        return made
    if node.target in _SUMS:
        made = _added(w, node, values if len(values) > 1 else [*values, []])
        w.pin(made, node, "it is added to another value", "offset")
        return made
    made = w.broadcast(node, values)
    if node.target in _HOMOGENEOUS:
        w.pin(made, node, f"{node.target} does not commute with it", "rotate")
    else:
        w.bend(made, node)
        if node.target not in _KEEP_ZERO:
            w.pin(made, node, f"{node.target} of 0 need not be 0", "shift")
    return made


#: operators that look at the shape of what they read
LIKE = (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default)


@rule(*LIKE)
def _filled_like(w: Walk, node: fx.Node) -> Dims:
    made = list(w.of(operands(node)[0]))
    w.bend(made, node)
    w.pin(made, node, "all its channels are one number", "shift")
    return made


@rule(
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
)
def _filled(w: Walk, node: fx.Node) -> Dims:
    """One number everywhere: in any order it is the same tensor."""
    made, place = w.new(node), 1 if "new_" in str(node.target) else 0
    for index, dim in enumerate(made):
        w.sized(node, (place, index), dim)
    w.bend(made, node)
    if "zeros" not in str(node.target):
        w.pin(made, node, "all its channels are one number", "shift")
    return made


def _added(w: Walk, node: fx.Node, values: Sequence[Dims]) -> Dims:
    """The dimensions of a sum; what does not vary along one is a constant there, and a number alone everywhere."""
    made = w.broadcast(node, values)
    constant = [dim for dims in values for dim in _missing(made, dims)]
    w.pin(constant, node, "the same number is added to all its channels", "rotate", "scale", "shift")
    return made


def _missing(made: Dims, dims: Dims) -> Dims:
    """The dimensions of a result along which one operand does not vary."""
    return [dim for place, dim in enumerate(reversed(made), 1) if place > len(dims) or not dims[-place]]


# -- linear layers ------------------------------------------------------------------------------------------------


_WEIGHT_AND_BIAS = {1: "weight", 2: "bias"}


@rule(*LINEAR, weights=_WEIGHT_AND_BIAS)
def _linear(w: Walk, node: fx.Node) -> Dims:
    """x `[…, I]`, W `[O, I]`, b `[O]` → `[…, O]`."""
    x, weight = (w.of(value) for value in operands(node)[:2])
    w.same(x[-1], weight[1], node)
    w.reads(node, weight[1])
    w.writes(node, weight[0])
    bias = w.given(node, 2, "bias")
    return _added(w, node, [[*x[:-1], weight[0]], *([bias] if bias else [])])


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
    weights=_WEIGHT_AND_BIAS,
)
def _convolution(w: Walk, node: fx.Node) -> Any:
    """x `[B, G·I, …]`, W `[G·O, I, …]` (transposed: `[G·I, O, …]`) → `[B, G·O, …]`.

    A depthwise convolution is the case I = 1. The channels inside a group have the same order in all groups.
    """
    x, weight = (w.of(value) for value in operands(node)[:2])
    general = node.target is aten.convolution.default
    place = 8 if general else 6
    transposed = operands(node)[6] if general else "transpose" in str(node.target)
    if "groups" in node.kwargs or len(x) != len(weight):
        return unknown(w, node)
    groups = argument(node, place, "groups", 1)
    g, own = regroup([weight[0]], [groups, size(weight[0]) // groups], Pin("its groups cut an axis", node))
    read, channels = (own, weight[1]) if transposed else (weight[1], own)
    w.same(x[1], g + read, node)
    if groups > 1:
        w.sized(node, (place,), g)
        w.bend([g], node)
    w.pin([*x[2:], *weight[2:]], node, "a convolution slides over it")
    if bias := w.given(node, 2, "bias"):
        _added(w, node, [[x[0], g + channels], bias])
    w.reads(node, weight[0 if transposed else 1])
    w.writes(node, weight[1 if transposed else 0])
    return [x[0], g + channels, *w.fixed(node, "a convolution slides over it")[2:]]


@rule(*EMBEDDING, weights={0: "weight"})
def _embedding(w: Walk, node: fx.Node) -> Dims:
    """W `[V, C]`, numbers `[…]` → `[…, C]`."""
    weight, numbers = (w.of(value) for value in operands(node)[:2])
    w.pin(weight[:1], node, "an embedding looks up its rows by number")
    w.writes(node, weight[1])
    return [*numbers, weight[1]]


@rule(aten.lstm.input, aten.gru.input, weights={})
def _recurrent(w: Walk, node: fx.Node) -> Any:
    """N gates of H channels: W_ih `[N·H, I]`, W_hh `[N·H, H]`, biases `[N·H]`; all layers have the same H."""
    x, states, weights, biased, layers, _, _, both_ways, batch_first = operands(node)[:9]
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    x, directions, count = w.of(x), 2 if both_ways else 1, 4 if biased else 2
    if len(x) != 3 or len(weights) != layers * directions * count:  # no batch, or an LSTM with a projection
        return unknown(w, node)
    hidden = w.broadcast(node, [w.of(state)[-1:] for state in states])[0]
    for state in states:  # [layers and directions, B, H]
        w.pin(w.of(state)[:1], node, "it numbers the layers and directions")
        w.same(w.of(state)[1], x[0 if batch_first else 1], node)
    ways = fresh(directions, w.every("it numbers the directions", node))
    for start in range(0, len(weights), count):
        read = x[2] if start < directions * count else ways + hidden
        inputs, states_in, *biases = (w.of(weight) for weight in weights[start : start + count])
        gates = fresh(size(inputs[0]) // size(hidden), w.every("it numbers the gates", node))
        for dims in (inputs, states_in, *biases):
            w.same(dims[0], gates + hidden, node)
        w.same(inputs[1], read, node)
        w.same(states_in[1], hidden, node)
        w.reads(node, inputs[1])
        w.reads(node, states_in[1])
        w.writes(node, inputs[0])
    w.bend([hidden, x[0], x[1]], node)
    w.pin([x[1 if batch_first else 0]], node, "a recurrence runs along it")
    return [[*x[:2], ways + hidden], *(list(w.of(state)) for state in states)]


@rule("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
def _experts(w: Walk, node: fx.Node) -> Any:
    """x `[M, K]`, W `[E, K, N]`, ends `[E]` → `[M, N]`: the rows up to its end belong to an expert."""
    x, weight, ends = (w.of(value) for value in operands(node)[:3])
    if len(x) != 2 or len(weight) != 3:
        return unknown(w, node)
    w.pin([x[0], weight[0], *ends], node, "the rows are sorted by expert")
    w.same(x[1], weight[1], node)
    w.reads(node, weight[1])
    w.writes(node, weight[2])
    return [x[0], weight[2]]


@rule(paretoc.decode.default)
def _decode(w: Walk, node: fx.Node) -> Any:
    return w.fixed(node, f"its weight is stored as {operands(node)[1]}")


# -- products of two values ---------------------------------------------------------------------------------------


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)
def _matmul(w: Walk, node: fx.Node) -> Dims:
    """a `[…, M, K]`, b `[…, K, N]` → `[…, M, N]`; M and N fall away with a vector."""
    left, right = operands(node)[:2]
    return _product(w, node, left, right)


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(w: Walk, node: fx.Node) -> Dims:
    bias, left, right = operands(node)[:3]
    return _added(w, node, [_product(w, node, left, right), w.of(bias)])


def _product(w: Walk, node: fx.Node, left: fx.Node, right: fx.Node) -> Dims:
    """`...mk,...kn->...mn`, written for these ranks."""
    a, b = len(w.of(left)), len(w.of(right))
    batch = [-place for place in range(max(a, b), 2, -1)]
    rows, columns = ["m"] * (a > 1), ["n"] * (b > 1)
    return _sum_of_products(
        w,
        node,
        [left, right],
        [[*batch[len(batch) - max(a - 2, 0) :], *rows, "k"], [*batch[len(batch) - max(b - 2, 0) :], "k", *columns]],
        [*batch, *rows, *columns],
    )


@rule(aten.einsum.default)
def _einsum(w: Walk, node: fx.Node) -> Any:
    equation, values = operands(node)[:2]
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or any(len(set(term)) < len(term) for term in terms):
        return unknown(w, node)
    return _sum_of_products(w, node, values, terms, result)


def _sum_of_products(
    w: Walk, node: fx.Node, values: Sequence[fx.Node], terms: Sequence[Sequence[Any]], result: Sequence[Any]
) -> Dims:
    """Each term labels the dimensions of a value; what is not in the result is summed over."""
    held: dict[Any, list[tuple[fx.Node, Dim]]] = {}
    for value, term in zip(values, terms, strict=True):
        for label, dim in zip(term, w.of(value), strict=True):
            if dim:
                held.setdefault(label, []).append((value, dim))
    made: dict[Any, Dim] = {}
    for label, ends in held.items():
        values_of, stored = [[dim] for _, dim in ends], [dim for value, dim in ends if value.op == "get_attr"]
        made[label] = (w.product if label in result else w.broadcast)(node, values_of)[0]
        if label in result and len(ends) == 1 and stored:
            w.writes(node, stored[0])
        elif label in result:
            w.pin([made[label]], node, "it is multiplied", "offset")
        elif len(ends) == 2 and len(stored) == 1:
            w.reads(node, stored[0])
        elif len(ends) == 2:
            w.pin([made[label]], node, "two values are multiplied along it", "scale", "sum")
        else:
            w.bend([made[label]], node)
            w.pin([made[label]], node, "a sum runs over it", "sum")
    return [made.get(label, ()) for label in result]


@rule(*SDPA)
def _attention(w: Walk, node: fx.Node) -> Dims:
    """q `[…, H, T, D]`, k `[…, H, S, D]`, v `[…, H, S, E]` → `[…, H, T, E]`; the queries may have more heads."""
    q, k, v = (list(w.of(value)) for value in operands(node)[:3])
    if argument(node, 7, "enable_gqa", False) and size(q[-3]) != size(k[-3]):
        shape = [size(k[-3]), size(q[-3]) // size(k[-3])]
        heads, each = regroup([q[-3]], shape, Pin("its groups of heads cut an axis", node))
        k[-3], v[-3] = w.same(heads, k[-3], node) + each, v[-3] + each
    batch = w.product(node, [q[:-2], k[:-2]])
    width, keys = w.same(q[-1], k[-1], node), w.same(k[-2], v[-2], node)
    logits = [*batch, q[-2], keys]
    w.broadcast(node, [logits, w.given(node, 3, "attn_mask")])
    w.bend(logits, node)
    w.pin([width], node, "queries and keys are multiplied along it", "scale", "sum")
    w.pin([keys], node, "an attention normalises over it", "zero")
    if argument(node, 5, "is_causal", False):
        w.pin([q[-2], keys], node, "a causal attention runs along it")
    if argument(node, 6, "scale") is None:
        scale = size(width) ** -0.5  # of the width at capture, whatever is left of it
        w.literals.append(Literal(node, [width], lambda node, _: node.update_kwarg("scale", scale)))
    w.pin(v[-1:], node, "an attention mixes tokens", "offset")
    return [*w.product(node, [batch, v[:-2]]), q[-2], v[-1]]


# -- norms, softmax, sums -----------------------------------------------------------------------------------------


@rule(aten.layer_norm.default, aten.rms_norm.default, weights={})
def _last_norm(w: Walk, node: fx.Node) -> Dims:
    """Over the last dimensions; weight and bias have their shape."""
    x, shape = operands(node)[:2]
    made = list(w.of(x))
    first = len(made) - len(shape)
    bias = w.given(node, 3, "bias") if node.target is aten.layer_norm.default else []
    w.broadcast(node, [made, w.given(node, 2, "weight"), bias])
    for index, dim in enumerate(made[first:]):
        w.sized(node, (1, index), dim)
    w.bend(made, node)
    w.pin(made[first:], node, "a norm takes its statistics over it", "zero")
    w.pin(made, node, "a norm shifts it", "shift")
    return made


@rule(
    *(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.instance_norm.default),
    weights={},
)
def _batch_norm(w: Walk, node: fx.Node) -> Any:
    """Each channel by itself: x `[B, C, …]`, weight, bias, mean and variance `[C]`."""
    made = list(w.of(operands(node)[0]))
    for value in operands(node)[1:5]:
        w.broadcast(node, [made[1:2], w.of(value)])
    w.bend(made, node)
    w.pin(made, node, "a norm shifts it", "shift")
    if node.target is aten.instance_norm.default:
        w.pin(made[2:], node, "a norm takes its statistics over it", "zero")
    several = isinstance(node.meta["val"], (list, tuple))
    return [made, *w.fixed(node, "batch statistics")[1:]] if several else made


@rule(aten.group_norm.default, weights={})
def _group_norm(w: Walk, node: fx.Node) -> Dims:
    """x `[B, G·C, …]`: the groups may change places, and the channels inside them, alike in all groups."""
    x, groups = operands(node)[:2]
    batch, outer, *others = w.of(x)
    g, own = regroup([outer], [groups, size(outer) // groups], Pin("its groups cut an axis", node))
    for value in (w.given(node, 2, "weight"), w.given(node, 3, "bias")):
        w.broadcast(node, [[g + own], value])
    w.sized(node, (1,), g)
    made = [batch, g + own, *others]
    w.bend(made, node)
    w.pin(made, node, "a norm shifts it", "shift")
    w.pin([own, *others], node, "a norm takes its statistics over it", "zero")
    return made


@rule(*SOFTMAX, aten.log_softmax.int, aten._log_softmax.default)
def _softmax(w: Walk, node: fx.Node) -> Dims:
    made = list(w.of(operands(node)[0]))
    w.bend(made, node)
    w.pin(made, node, "a softmax makes it", "shift")
    w.pin([made[operands(node)[1]]], node, "a softmax normalises over it", "zero")
    return made


_LINEAR_SUMS = {aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default}


@rule(
    *(*_LINEAR_SUMS, aten.amax.default, aten.amin.default, aten.var.correction, aten.std.correction),
    *(aten.logsumexp.default, aten.prod.dim_int, aten.any.dim, aten.all.dim),
    *(aten.linalg_vector_norm.default, aten.max.default, aten.min.default, aten.any.default, aten.all.default),
)
def _reduction(w: Walk, node: fx.Node) -> Dims:
    """Over the named dimensions; over all when none is named."""
    x = w.of(operands(node)[0])
    place = 2 if node.target is aten.linalg_vector_norm.default else 1
    named = argument(node, place, "dim")
    named = [named] if isinstance(named, int) else named or range(len(x))
    reduced = {d % len(x) for d in named}
    summed = [x[d] for d in sorted(reduced)]
    w.bend(summed, node)
    if node.target in (aten.sum.dim_IntList, aten.sum.default):
        w.pin(summed, node, "a sum runs over it", "sum")
        w.pin(x, node, "a sum multiplies it", "offset")
    else:
        w.pin(summed, node, f"{node.target} depends on how many channels there are", "zero")
    if node.target not in _LINEAR_SUMS:
        w.bend(x, node)
        w.pin(x, node, f"{node.target} of 0 need not be 0", "shift")
    if len(example_shape(node)) == len(x):
        return [() if d in reduced else dim for d, dim in enumerate(x)]
    return [dim for d, dim in enumerate(x) if d not in reduced]


@rule(
    *(aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default, aten.flip.default, aten.roll.default),
    *(aten.sort.default, aten.argsort.default, aten.topk.default, aten.argmax.default, aten.argmin.default),
    *(aten.max.dim, aten.min.dim),
)
def _ordered(w: Walk, node: fx.Node) -> Any:
    """What depends on the order along a dimension pins it; its place in the results is pinned too."""
    x = w.of(operands(node)[0])
    place = 2 if node.target in (aten.topk.default, aten.roll.default) else 1
    whole = node.target in (aten.argmax.default, aten.argmin.default)
    name = "dims" if node.target in (aten.flip.default, aten.roll.default) else "dim"
    named = argument(node, place, name, None if whole else -1)
    named = [named] if isinstance(named, int) else named or range(len(x))
    ordered = {d % len(x) for d in named}
    why = f"{node.target} depends on its order"
    if node.target is aten.cumsum.default:
        w.pin(x, node, "a sum multiplies it", "offset")
    elif node.target not in (aten.flip.default, aten.roll.default):
        w.bend(x, node)
        w.pin(x, node, why, "shift")
    w.pin([x[d] for d in ordered], node, why)

    def result(fixed: Dims) -> Dims:
        kept = len(fixed) == len(x)
        return [fixed[d] if d in ordered else dim for d, dim in enumerate(x) if kept or d not in ordered]

    several = isinstance(node.meta["val"], (list, tuple))
    fixed = w.fixed(node, why)
    return list(map(result, fixed)) if several else result(fixed)
