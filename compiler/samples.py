"""Are the samples of a batch computed apart: does row i of every output depend on row i of every input alone?

One walk follows where the batch stands in each value: alone, or as the outermost factor of a dimension. An operator
that is not known to keep samples apart, or is asked to mix them, ends it with a reason. What holds for the program lets
an executable compute a batch in parts, if all its inputs have as many samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .dialect.activations import ROUNDING
from .program import Program, argument, describe, operands
from .sites import CONV, EMBEDDING, LINEAR, MATMUL, SDPA

aten = torch.ops.aten
paretoc = torch.ops.paretoc

#: the dimension that is the batch; None: the same for every sample
Place = int | None
Rule = Callable[["_Walk", fx.Node], Place]
_RULES: dict[Any, Rule] = {}


def mixes_samples(program: Program) -> str:
    """Why the samples of a batch are not computed apart, with the place; nothing when they are."""
    inputs = zip(program.placeholders, program.dynamic, strict=True)
    sizes = [node.meta["val"].shape[0] for node, opened in inputs if 0 in opened]
    if not sizes or not all(isinstance(size, torch.SymInt) for size in sizes):
        return "its batch is fixed"
    walk = _Walk(program, {size.node.expr for size in sizes})
    try:
        walk.run()
    except _Mixed as mixed:
        return str(mixed)
    return ""


class _Mixed(Exception):
    pass


class _Walk:
    def __init__(self, program: Program, batch: set[Any]) -> None:
        self.program, self.batch = program, batch
        self.places: dict[fx.Node, Place] = {}

    def run(self) -> None:
        opened = dict(zip(self.program.placeholders, self.program.dynamic, strict=True))
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.places[node] = 0 if 0 in opened[node] else None
            elif node.op == "get_attr":
                self.places[node] = None
            elif node.op == "output":
                self._check_outputs(node)
            elif node.op == "call_function":
                self.places[node] = self._call(node)

    def _check_outputs(self, node: fx.Node) -> None:
        if any(self.places[value] != 0 for value in node.all_input_nodes):
            raise _Mixed("an output does not begin with the batch")

    def _call(self, node: fx.Node) -> Place:
        shapes = [value.shape for value in _tensors(node)]
        found = [self.places[read] for read in node.all_input_nodes]
        if not shapes:
            return None  # a number
        if all(place is None for place in found) and not any(map(self.holds, shapes)):
            self.no_count(node)
            return None
        tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        rule = _RULES.get(node.target) or (_aligned if tagged else None)
        if rule is None:
            raise _Mixed(f"it is not known that {node.target} keeps samples apart ({describe(node)})")
        place = rule(self, node)
        if place is None or not all(self.leads(shape[place]) for shape in shapes):
            raise self.mixed(node)
        return place

    def leads(self, size: Any) -> bool:
        """Whether a size is that of the batch, or a multiple of it."""
        return isinstance(size, torch.SymInt) and any(
            not (size.node.expr / batch).has(batch) for batch in self.batch & size.node.expr.free_symbols
        )

    def holds(self, sizes: Sequence[Any]) -> bool:
        """Whether a size is that of the batch, or computed from it."""
        found = [size.node.expr for size in sizes if isinstance(size, (torch.SymInt, torch.SymFloat))]
        return any(self.batch & expression.free_symbols for expression in found)

    def mixed(self, node: fx.Node) -> _Mixed:
        return _Mixed(f"{node.target} mixes samples ({describe(node)})")

    def need(self, condition: bool, node: fx.Node) -> None:
        if not condition:
            raise self.mixed(node)

    def only(self, node: fx.Node, index: int = 0) -> int:
        """Where the batch stands in an operand, which must be the only one that has it."""
        place = self.places[operands(node)[index]]
        others = [read for read in node.all_input_nodes if read is not operands(node)[index]]
        self.need(place is not None and all(self.places[read] is None for read in others), node)
        self.no_count(node)
        assert place is not None
        return place

    def no_count(self, node: fx.Node) -> None:
        """The number of samples may give a shape; it is no number to compute with."""
        self.need(not self.holds([read.meta.get("val") for read in node.all_input_nodes]), node)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].ndim)


def _dim(node: fx.Node, index: int, name: str, default: Any = None) -> int:
    """A dimension that an operator is given, counted from the front of its first operand."""
    return int(argument(node, index, name, default)) % max(_rank(operands(node)[0]), 1)


def _dims(given: Any, rank: int) -> list[int]:
    """Dimensions as an operator is given them: one, several, or all."""
    if given is None or given == []:
        return list(range(rank))
    return [int(d) for d in (given if isinstance(given, (list, tuple)) else [given])]


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


@_rule(
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.dropout.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.lift_fresh_copy.default),
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.where.Scalar, aten.masked_fill.Tensor, aten.type_as.default, aten.hardswish.default),
    *(aten.log_sigmoid.default, ROUNDING[0]),
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
)
def _aligned(w: _Walk, node: fx.Node) -> Place:
    """Element by element: shapes are aligned at their last dimension."""
    rank = _rank(node)
    found = {rank - _rank(read) + place for read in node.all_input_nodes if (place := w.places[read]) is not None}
    w.need(len(found) == 1, node)
    w.no_count(node)
    return found.pop()


@_rule(ROUNDING[1])
def _rounded(w: _Walk, node: fx.Node) -> Place:
    """Each token by its own range."""
    place = w.only(node)
    w.need(operands(node)[1] != "tensor" and place < _rank(node) - 1, node)
    return place


@_rule(*LINEAR)
def _linear(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    w.need(place < _rank(node) - 1, node)
    return place


@_rule(*EMBEDDING)
def _looked_up(w: _Walk, node: fx.Node) -> Place:
    return w.only(node, 1)


@_rule(aten.layer_norm.default, aten.rms_norm.default)
def _norm(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    w.need(place < _rank(node) - len(operands(node)[1]), node)
    return place


@_rule(
    *(aten._native_batch_norm_legit_no_training.default, aten.group_norm.default, *CONV),
    *(aten.avg_pool2d.default, aten.max_pool2d.default, aten.max_pool2d_with_indices.default),
    *(aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default),
    *(aten.conv_transpose2d.input, aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec),
)
def _leading(w: _Walk, node: fx.Node) -> Place:
    """Of images `[B, C, …]`."""
    w.need(w.only(node) == 0 and _tensors(node)[0].ndim >= 3, node)
    weight = operands(node)[1] if node.target in CONV else None
    w.need(weight is None or _rank(weight) == _rank(operands(node)[0]), node)
    return 0


@_rule(aten.batch_norm.default)
def _batch_norm(w: _Walk, node: fx.Node) -> Place:
    w.need(not operands(node)[5] and w.only(node) == 0, node)
    return 0


@_rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten.cumsum.default)
def _along(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    w.need(_dim(node, 1, "dim") != place, node)
    return place


@_rule(
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.any.dim, aten.all.dim),
    *(aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim, aten.var.correction),
)
def _reduced(w: _Walk, node: fx.Node) -> Place:
    place, rank = w.only(node), _rank(operands(node)[0])
    dims = {d % rank for d in _dims(argument(node, 1, "dim", None), rank)}
    w.need(bool(dims) and place not in dims, node)
    kept = _tensors(node)[0].ndim == rank
    return place if kept else place - sum(d < place for d in dims)


@_rule(*MATMUL, aten.mm.default)
def _product(w: _Walk, node: fx.Node) -> Place:
    """Products of the matrices of each sample; or of rows, some of them of each sample, with one matrix."""
    first, second = operands(node)[:2]
    places = [w.places[first], w.places[second]]
    if places[1] is None and _rank(second) <= 2:
        w.need(places[0] is not None and places[0] < _rank(first) - 1, node)
        return places[0]
    found = set()
    for value, place in zip((first, second), places, strict=True):
        if place is not None:
            w.need(place < _rank(value) - 2, node)
            found.add(_rank(node) - _rank(value) + place)
    w.need(len(found) == 1, node)
    return found.pop()


@_rule(aten.addmm.default)
def _added(w: _Walk, node: fx.Node) -> Place:
    w.need(w.only(node, 1) == 0, node)
    return 0


@_rule(*SDPA)
def _attention(w: _Walk, node: fx.Node) -> Place:
    values = [read for read in node.all_input_nodes if w.places[read] is not None]
    w.need(all(w.places[value] == 0 and _rank(value) == 4 for value in values), node)
    w.need(all(w.places[value] == 0 for value in operands(node)[:3]), node)
    return 0


@_rule(
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    aten.unflatten.int,
)
def _reshaped(w: _Walk, node: fx.Node) -> Place:
    """Samples that stand one behind the other stay so while the batch is outermost; elsewhere where nothing changes up
    to it."""
    source = operands(node)[0]
    place = w.places[source]
    w.need(place is not None, node)
    if not place:
        return 0
    before, after = (list(map(str, value.meta["val"].shape[: place + 1])) for value in (source, node))
    w.need(before == after, node)
    return place


@_rule(aten.permute.default)
def _permuted(w: _Walk, node: fx.Node) -> Place:
    return [int(d) % _rank(node) for d in operands(node)[1]].index(w.only(node))


@_rule(aten.transpose.int)
def _transposed(w: _Walk, node: fx.Node) -> Place:
    place, one, other = w.only(node), _dim(node, 1, "dim0"), _dim(node, 2, "dim1")
    return {one: other, other: one}.get(place, place)


@_rule(aten.expand.default)
def _expanded(w: _Walk, node: fx.Node) -> Place:
    source = operands(node)[0]
    place = w.places[source]
    return _filled(w, node) if place is None else _rank(node) - _rank(source) + place


@_rule(
    *(aten.full.default, aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_ones.default),
    aten.new_full.default,
)
def _filled(w: _Walk, node: fx.Node) -> Place:
    """One number or row for all samples: where the batch stands in the shape."""
    fill = operands(node)[-1] if node.target in (aten.full.default, aten.new_full.default) else None
    held = [i for i, size in enumerate(node.meta["val"].shape) if w.holds([size])]
    w.need(len(held) == 1 and not (isinstance(fill, fx.Node) and w.holds([fill.meta["val"]])), node)
    return held[0]


@_rule(aten.unsqueeze.default)
def _unsqueezed(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    return place + (int(operands(node)[1]) % _rank(node) <= place)


@_rule(aten.squeeze.dim, aten.squeeze.dims)
def _squeezed(w: _Walk, node: fx.Node) -> Place:
    place, source = w.only(node), operands(node)[0]
    dims = {d % _rank(source) for d in _dims(operands(node)[1], 0)}
    gone = [d for d in dims if d < place and str(source.meta["val"].shape[d]) == "1"]
    return place - len(gone)


@_rule(aten.slice.Tensor)
def _sliced(w: _Walk, node: fx.Node) -> Place:
    """Another dimension; or, of the batch, as many samples as there are: all."""
    place, dim, end = w.places[operands(node)[0]], _dim(node, 1, "dim", 0), argument(node, 3, "end", None)
    w.need(place is not None, node)
    if dim == place:
        whole = argument(node, 2, "start", 0) in (0, None) and argument(node, 4, "step", 1) == 1
        counted = isinstance(end, fx.Node) and end.meta["val"].node.expr in w.batch
        w.need(whole and counted, node)
        return place
    return w.only(node)


@_rule(aten.index_select.default, aten.narrow.default, aten.flip.default, aten.roll.default)
def _part(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    rolled = node.target is aten.roll.default
    dims = _dims(argument(node, 2, "dims", None) if rolled else argument(node, 1, "dim", 0), _rank(node))
    w.need(all(d % _rank(node) != place for d in dims), node)
    return place


@_rule(aten.select.int, aten.unbind.int)
def _selected(w: _Walk, node: fx.Node) -> Place:
    place, dim = w.only(node), _dim(node, 1, "dim", 0)
    w.need(dim != place, node)
    return place - (dim < place)


@_rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    w.need(_dim(node, 2, "dim", 0) != place, node)
    return place


@_rule(operator.getitem)
def _item(w: _Walk, node: fx.Node) -> Place:
    return w.places[operands(node)[0]]


@_rule(aten.cat.default, aten.stack.default)
def _joined(w: _Walk, node: fx.Node) -> Place:
    parts = operands(node)[0]
    found = {w.places[part] for part in parts}
    w.need(len(found) == 1 and None not in found, node)
    w.no_count(node)
    place = found.pop()
    assert place is not None
    dim = int(argument(node, 1, "dim", 0)) % _rank(node)
    if node.target is aten.stack.default:
        return place + (dim <= place)
    w.need(dim != place, node)
    return place


@_rule(aten.constant_pad_nd.default, aten.pad.default)
def _padded(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    w.need(place < _rank(node) - len(operands(node)[1]) // 2, node)
    return place


@_rule(aten.tril.default, aten.triu.default)
def _triangle(w: _Walk, node: fx.Node) -> Place:
    place = w.only(node)
    w.need(place < _rank(node) - 2, node)
    return place


@_rule(aten.gather.default)
def _gathered(w: _Walk, node: fx.Node) -> Place:
    places = [w.places[operands(node)[index]] for index in (0, 2)]
    w.need(places[0] == places[1] != _dim(node, 1, "dim"), node)
    return places[0]


@_rule(paretoc.bipartite_match.default, paretoc.merge_tokens.default, paretoc.keep_tokens.default)
def _tokens(w: _Walk, node: fx.Node) -> Place:
    w.need(all(w.places[read] == 0 for read in node.all_input_nodes), node)
    return 0
