"""Where channels go: which weights write a hidden axis, which read it, and what forbids to rotate or scale it.

The part of a general analysis of axes that rotation and scaling need, in one place so that it can be replaced. Every
operator that makes channels (linear, convolution, embedding, norm weight, a stored tensor that is added) starts an
axis; one forward walk over the graph follows the channels by running each movement of data on their numbers. Where
two axes meet channel by channel (a residual add, one column of a weight) they become one. Unknown operators pin.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, fx

from .encodings import NM
from .norms import Norm, norms
from .program import Program, argument, example_shape, hint, operands
from .sites import ADD, EMBEDDING, LINEAR, MATMUL, SDPA
from .weights import Operand

aten = torch.ops.aten
paretoc = torch.ops.paretoc

#: "scale": channel j times s_j > 0. "rotate": the row of channels times an orthogonal matrix.
Action = Literal["scale", "rotate"]

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_SAME = {
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.dropout.default),
    *(aten.to.dtype, aten._to_copy.default, aten.lift_fresh_copy.default),
}
#: operators that only put elements elsewhere
_MOVES = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    *(aten.unflatten.int, aten.transpose.int, aten.t.default, aten.permute.default, aten.movedim.int),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default),
    *(aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default),
    *(aten.unbind.int, aten.cat.default, aten.stack.default, aten.repeat.default, aten.roll.default),
    *(aten.repeat_interleave.self_int, aten.narrow.default),
}
#: operators that look at the shape of what they read
_SHAPES = {
    *(aten.sym_size.int, aten.ones_like.default, aten.zeros_like.default, aten.full_like.default),
    *(aten.new_ones.default, aten.new_zeros.default, aten.new_empty.default, aten.new_full.default),
}
#: f(s·x) = s·f(x) for s > 0
_HOMOGENEOUS = {aten.relu.default, aten.leaky_relu.default}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@dataclass(frozen=True)
class Use:
    """Dimension `dim` of a weight operand runs along an axis: `channels` int64 `[size of dim]` gives the channel at
    each place, −1 where something else is."""

    operand: Operand
    dim: int
    channels: Tensor


@dataclass(frozen=True)
class Pin:
    """Why some channels have to stay as they are."""

    channels: Tensor
    why: str
    node: fx.Node

    def __str__(self) -> str:
        return f"{self.why} (node {self.node.name})"


@dataclass
class ChannelAxis:
    """One hidden axis of `size` channels. `norms` read it; `sources` are norms whose output it is (action "rotate").

    `heads`: the widths of the attention heads that pass it on, each with weights of its own over the tokens; a
    rotation may mix blocks of `width` channels.
    """

    size: int
    writers: list[Use] = field(default_factory=list)
    readers: list[Use] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    sources: list[Norm] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)

    @property
    def width(self) -> int:
        return gcd(self.size, *self.heads)

    @property
    def free(self) -> Tensor:
        """bool `[size]`: the channels that nothing pins."""
        free = torch.ones(self.size, dtype=torch.bool)
        for pin in self.pins:
            free[pin.channels] = False
        return free

    def pin(self, channels: Tensor, why: str, node: fx.Node) -> None:
        channels = _distinct(channels[channels >= 0])
        if len(channels):
            self.pins.append(Pin(channels, why, node))

    def pinned(self, channels: Tensor) -> Pin | None:
        """The first pin on any of these channels."""
        return next((p for p in self.pins if torch.isin(channels, p.channels).any()), None)


def channel_axes(program: Program, action: Action) -> list[ChannelAxis]:
    """Every hidden axis of the program, with what forbids this action on its channels."""
    return _Walk(program, action).run()


def output_axis(axes: Sequence[ChannelAxis], norm: Norm) -> ChannelAxis:
    """The axis that a norm writes."""
    return next(axis for axis in axes if norm in axis.sources)


class _Walk:
    """Channels are numbered through all axes; what a node's value holds is an integer tensor of its rank with the
    channel of every element (−1: none), of size 1 along the dimensions on which it does not depend."""

    def __init__(self, program: Program, action: Action) -> None:
        self.program, self.action = program, action
        self.norms = {n.output: n for n in norms(program)}
        self.inside = {node for norm in self.norms.values() for node in norm.inside}
        self.values: dict[fx.Node, Any] = {}
        self.sizes: list[int] = []
        self.same: nx.Graph[int] = nx.Graph()
        self.writes: list[tuple[int, Operand, int]] = []
        self.reads: list[tuple[Operand, int, Tensor]] = []
        self.normed: list[tuple[int, Norm]] = []
        self.sources: list[tuple[int, Norm]] = []
        self.pins: list[Pin] = []
        self.lost: dict[fx.Node, Pin] = {}
        self.shifted: list[Pin] = []  # holds only for channels without a bias to carry
        self.heads: list[tuple[int, int]] = []
        self.rules: dict[Any, Callable[[fx.Node], Any]] = {
            **dict.fromkeys(_SHAPES, lambda _: None),
            **dict.fromkeys(_SAME, self._copy),
            **dict.fromkeys(_MOVES, self._move),
            **dict.fromkeys((*ADD, aten.sub.Tensor), self._add),
            aten.neg.default: self._negate,
            **dict.fromkeys(_PRODUCTS, self._multiply),
            **dict.fromkeys(_HOMOGENEOUS, self._homogeneous),
            **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList), self._pool),
            **dict.fromkeys(LINEAR, self._linear),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            **dict.fromkeys(EMBEDDING, self._embedding),
            **dict.fromkeys(MATMUL, self._matmul),
            **dict.fromkeys(SDPA, self._attention),
            operator.getitem: self._item,
            aten.index.Tensor: self._index,
            aten.index_select.default: self._index_select,
            aten.pad.default: self._pad_zeros,
            aten.constant_pad_nd.default: self._pad_zeros,
            paretoc.merge_tokens.default: self._tokens,
            paretoc.keep_tokens.default: self._tokens,
        }

    def run(self) -> list[ChannelAxis]:
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self._stored(node)
            elif node.op == "output":
                self._pin_operands(node, "it is an output of the model")
            elif node.op == "call_function" and node not in self.inside:
                known, norm = len(self.pins), self.norms.get(node)
                self.values[node] = self._norm(norm) if norm else self.rules.get(node.target, self._unknown)(node)
                if self.values[node] is None:
                    self._lose(node, self.pins[known:])
        return self._axes()

    def _lose(self, node: fx.Node, pins: Sequence[Pin]) -> None:
        """Remember what ended the channels that led to a value without any."""
        lost = [self.lost[read] for read in node.all_input_nodes if read in self.lost]
        if pins or lost:
            self.lost[node] = [*pins, *lost][0]

    def _pin_with(self, node: fx.Node, other: Any, numbers: Any) -> None:
        """Channels meet a value that has none."""
        lost = self.lost.get(other)
        why = lost.why if lost else "it meets a value whose channels cannot be followed"
        self._pin(numbers, lost.node if lost else node, why)

    # -- numbers ----------------------------------------------------------------------------------------------------

    def _axis(self, size: int) -> int:
        self.sizes.append(size)
        self.same.add_node(len(self.sizes) - 1)
        return len(self.sizes) - 1

    def _numbers(self, axis: int, rank: int, dim: int = -1) -> Tensor:
        """The channels of an axis along one dimension of a value."""
        shape = [1] * rank
        shape[dim] = self.sizes[axis]
        start = sum(self.sizes[:axis])
        return torch.arange(start, start + self.sizes[axis]).reshape(shape)

    def _split(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers ≥ 0 → (axis, channel within it)."""
        starts = torch.tensor([0, *self.sizes]).cumsum(0)
        axis = torch.bucketize(numbers, starts, right=True) - 1
        return axis, numbers - starts[axis]

    def _stored(self, node: fx.Node) -> None:
        """A stored tensor that is moved or added starts an axis on its last dimension."""
        tensor = node.meta["val"]
        summand = any(user.target in (*_MOVES, *ADD, aten.sub.Tensor) for user in node.users)
        if summand and tensor.is_floating_point() and tensor.ndim and tensor.shape[-1] > 1:
            axis = self._axis(tensor.shape[-1])
            self.writes.append((axis, Operand(node, -1), tensor.ndim - 1))
            self.values[node] = self._numbers(axis, tensor.ndim)

    def _of(self, value: Any) -> Any:
        """The channels of an operand."""
        return self.values.get(value) if isinstance(value, fx.Node) else None

    def _pin(self, numbers: Any, node: fx.Node, why: str) -> None:
        for part in numbers if isinstance(numbers, list) else [numbers]:
            if isinstance(part, Tensor) and len(held := _distinct(part[part >= 0])):
                self.pins.append(Pin(held, why, node))

    def _pin_operands(self, node: fx.Node, why: str) -> None:
        for read in node.all_input_nodes:
            self._pin(self.values.get(read), node, why)

    def _shift(self, numbers: Tensor, node: fx.Node) -> None:
        """An operator that is linear but does not keep a constant as it is."""
        self.shifted.append(Pin(_distinct(numbers[numbers >= 0]), "the bias of its norm cannot pass here", node))

    def _unify(self, a: Tensor, b: Tensor, node: fx.Node) -> None:
        """Both hold the same channels, element by element."""
        larger = torch.maximum(a, b)
        a, b = a.expand_as(larger), b.expand_as(larger)
        one = (a >= 0) ^ (b >= 0)
        self._pin(larger[one], node, "it meets a value whose channels cannot be followed")
        both = (a >= 0) & (b >= 0)
        (axis_a, channel_a), (axis_b, channel_b) = self._split(a[both]), self._split(b[both])
        sizes = torch.tensor(self.sizes)
        fits = (channel_a == channel_b) & (sizes[axis_a] == sizes[axis_b])
        for numbers in (a[both][~fits], b[both][~fits]):
            self._pin(numbers, node, "channels of different places meet")
        self.same.add_edges_from(set(zip(axis_a[fits].tolist(), axis_b[fits].tolist(), strict=True)))

    def _level(self, numbers: Tensor, dims: Sequence[int], node: fx.Node) -> Tensor:
        """Along these dimensions the channels are the same ones: one place speaks for all."""
        for dim in dims:
            if numbers.shape[dim] > 1:
                self._unify(numbers.narrow(dim, 0, 1), numbers, node)
                numbers = numbers.narrow(dim, 0, 1)
        return numbers

    # -- rules ------------------------------------------------------------------------------------------------------

    def _unknown(self, node: fx.Node) -> Any:
        self._pin_operands(node, f"{node.target} does not commute with {'scaling' if self._scales else 'a rotation'}")

    @property
    def _scales(self) -> bool:
        return self.action == "scale"

    def _copy(self, node: fx.Node) -> Any:
        return self._of(operands(node)[0]) if node.meta["val"].is_floating_point() else self._unknown(node)

    def _move(self, node: fx.Node) -> Any:
        """Run the movement on the numbers."""
        if all(self._of(read) is None for read in node.all_input_nodes):
            return None

        def whole(read: fx.Node) -> Any:
            if not isinstance(read.meta["val"], Tensor):
                return hint(read.meta["val"])
            numbers = self._of(read)
            return (torch.tensor(-1) if numbers is None else numbers).expand(example_shape(read))

        args, kwargs = fx.node.map_arg((operands(node), node.kwargs), whole)
        assert callable(node.target)
        moved = node.target(*args, **kwargs)
        return _compact(moved) if isinstance(moved, Tensor) else [_compact(part) for part in moved]

    def _item(self, node: fx.Node) -> Any:
        parts, index = operands(node)[:2]
        parts = self._of(parts)
        return parts[index] if isinstance(parts, list) and index < len(parts) else None

    def _add(self, node: fx.Node) -> Tensor | None:
        left, right = operands(node)[:2]
        a, b = self._of(left), self._of(right)
        if a is None or b is None:
            self._pin_with(node, right if b is None else left, a if b is None else b)
            return None
        self._unify(a, b, node)
        total: Tensor = a.expand_as(torch.maximum(a, b))
        self._shift(total, node)
        return total

    def _negate(self, node: fx.Node) -> Any:
        numbers = self._of(operands(node)[0])
        if numbers is not None:
            self._shift(numbers, node)
        return numbers

    def _multiply(self, node: fx.Node) -> Tensor | None:
        """By a number or a value that has no channels; under a rotation it may not depend on the channel."""
        left, right = operands(node)[:2]
        if self._of(right) is not None and (self._of(left) is not None or "div" in str(node.target)):
            self._pin_operands(node, "it is multiplied by another value of the model")
            return None
        value, factor = (left, right) if self._of(left) is not None else (right, left)
        numbers: Tensor | None = self._of(value)
        if numbers is None:
            return None
        rank = len(example_shape(node))
        numbers = _with_rank(numbers, rank)
        if not self._scales and isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor):
            sizes = [1] * rank + list(example_shape(factor))
            if any(a > 1 and b > 1 for a, b in zip(numbers.shape, sizes[-rank:] if rank else (), strict=True)):
                self._pin(numbers, node, f"{factor.name} multiplies each channel by a number of its own")
                return None
        self._shift(numbers, node)
        return numbers

    def _homogeneous(self, node: fx.Node) -> Any:
        return self._of(operands(node)[0]) if self._scales else self._unknown(node)

    def _pool(self, node: fx.Node) -> Any:
        numbers: Tensor | None = self._of(operands(node)[0])
        dims = argument(node, 1, "dim")
        if numbers is None:
            return None
        if not dims:
            return self._unknown(node)
        dims = sorted({d % numbers.ndim for d in dims}, reverse=True)
        numbers = self._level(numbers, dims, node)
        if node.target is aten.sum.dim_IntList:
            self._shift(numbers, node)
        for dim in () if argument(node, 2, "keepdim", False) else dims:
            numbers = numbers.squeeze(dim)
        return numbers

    def _linear(self, node: fx.Node) -> Tensor | None:
        self._read(Operand(node, 1), 1, self._of(operands(node)[0]), node)
        return self._written(node, -1, [(o, 0) for o in _weight_and_bias(node)])

    def _embedding(self, node: fx.Node) -> Tensor | None:
        self._pin(self._of(operands(node)[1]), node, "an embedding looks it up")
        return self._written(node, -1, [(Operand(node, 0), 1)])

    def _convolution(self, node: fx.Node) -> Tensor | None:
        self._pin(self._of(operands(node)[0]), node, "a convolution reads it")
        grouped = argument(node, 6, "groups", 1) != 1
        if grouped and not self._scales:
            return None
        return self._written(node, 1 - len(example_shape(node)), [(o, 0) for o in _weight_and_bias(node)])

    def _written(self, node: fx.Node, dim: int, writers: Sequence[tuple[Operand, int]]) -> Tensor:
        """A new axis along `dim` of a value, made by these operands, each along a dimension of its own."""
        shape = example_shape(node)
        axis = self._axis(shape[dim])
        self.writes += [(axis, operand, along) for operand, along in writers]
        numbers = self._numbers(axis, len(shape), dim)
        self._pin_fixed(numbers, [operand for operand, _ in writers], node)
        return numbers

    def _read(self, weight: Operand, dim: int, numbers: Tensor | None, node: fx.Node) -> None:
        """A weight sums over the channels."""
        if numbers is None:
            return
        size = example_shape(weight.source)[dim]
        numbers = self._level(numbers, range(numbers.ndim - 1), node).reshape(-1).expand(size)
        self.reads.append((weight, dim, numbers))
        self._pin_fixed(numbers, [weight], node)

    def _pin_fixed(self, numbers: Tensor, weights: Sequence[Operand], node: fx.Node) -> None:
        for operand in weights:
            why = operand.fixed(self.program)
            if not self._scales and operand.source and isinstance(self.program.encoding(operand.source), NM):
                why = "the pattern of its zeros would not survive"
            if why:
                self._pin(numbers, node, why)
            self._pin(self._of(operand.source), node, "it is also the weight of a layer")

    def _norm(self, norm: Norm) -> Tensor | None:
        """A rotation passes a norm without a weight; its output is an axis of its own until the weight is gone."""
        numbers, node = self._of(norm.input), norm.output
        if self._scales:
            self._pin(numbers, node, "a norm reads it")
        elif numbers is not None:
            numbers = self._level(numbers, range(numbers.ndim - 1), node).reshape(-1).expand(norm.channels)
            axes, channels = self._split(numbers.clamp(min=0))
            axis = int(axes[0])
            whole = self.sizes[axis] == norm.channels and bool((axes == axis).all())
            if whole and bool((numbers >= 0).all()) and torch.equal(channels, torch.arange(norm.channels)):
                self.normed.append((axis, norm))
            else:
                self._pin(numbers, node, "a norm reads a part of it")
        else:
            axis = self._axis(norm.channels)
            self.normed.append((axis, norm))
            self._pin_with(node, norm.input, self._numbers(axis, 1))
        if self._scales and norm.weight is None:
            return None
        weights = [norm.weight] if norm.weight else []
        weights += [norm.bias] if norm.bias and norm.bias.source else []
        written = self._written(node, -1, [(o, 0) for o in weights] if self._scales else [])
        if not self._scales:
            self._pin_fixed(written, weights, node)
            self.sources.append((len(self.sizes) - 1, norm))
        return written

    def _attention(self, node: fx.Node) -> Any:
        query, key, value = operands(node)[:3]
        for operand in (query, key, argument(node, 3, "attn_mask")):
            self._pin(self._of(operand), node, "an attention compares queries and keys")
        return self._mixed(node, self._of(value))

    def _matmul(self, node: fx.Node) -> Any:
        left, right = operands(node)[:2]
        self._pin(self._of(left), node, "a matrix product sums over it, and the other operand is no weight")
        return self._mixed(node, self._of(right))

    def _mixed(self, node: fx.Node, numbers: Tensor | None) -> Any:
        """p `[…, T', T]` · v `[…, T, D]`: every token becomes a sum over tokens."""
        if numbers is None:
            return None
        if numbers.ndim < 2:
            return self._unknown(node)
        numbers = self._level(numbers, [numbers.ndim - 2], node)
        shape = example_shape(node)
        numbers = _with_rank(numbers, len(shape))
        if numbers.ndim > 2 and numbers.shape[-3] not in (1, shape[-3]):  # grouped-query attention
            numbers = numbers.repeat_interleave(shape[-3] // numbers.shape[-3], dim=-3)
        held = numbers[numbers >= 0]
        self.heads += [(int(axis), shape[-1]) for axis in _distinct(self._split(held)[0])]
        self._shift(numbers, node)
        return numbers

    def _index(self, node: fx.Node) -> Any:
        """x[i, j, …]: rows picked by position; every row holds the same channels."""
        numbers, indices = self._of(operands(node)[0]), operands(node)[1]
        if numbers is None:
            return None
        if any(i is None or i.meta["val"].dtype == torch.bool for i in indices):
            return self._unknown(node)
        row = self._level(numbers, range(len(indices)), node).flatten(0, len(indices) - 1)[0]
        return _with_rank(row, len(example_shape(node)))

    def _index_select(self, node: fx.Node) -> Tensor | None:
        numbers = self._of(operands(node)[0])
        return None if numbers is None else self._level(numbers, [operands(node)[1] % numbers.ndim], node)

    def _pad_zeros(self, node: fx.Node) -> Any:
        """Zeros stay zeros under both actions."""
        numbers, widths = self._of(operands(node)[0]), operands(node)[1]
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", None)
        if node.target is aten.constant_pad_nd.default:
            mode, value = "constant", argument(node, 2, "value", 0)
        if numbers is None:
            return None
        if mode != "constant" or value:
            return self._unknown(node)
        padded = [numbers.ndim - 1 - place // 2 for place, width in enumerate(widths) if width != 0]
        if padded:
            self._shift(numbers, node)
        return self._level(numbers, sorted(set(padded)), node)

    def _tokens(self, node: fx.Node) -> Any:
        """Token reduction: weighted sums of tokens."""
        numbers = self._of(operands(node)[0])
        if numbers is None:
            return None
        self._pin(self._of(operands(node)[1]), node, "token reduction reads it")
        numbers = self._level(numbers, [1], node)
        self._shift(numbers, node)
        return [numbers] if node.target is paretoc.merge_tokens.default else numbers

    # -- the result -------------------------------------------------------------------------------------------------

    def _axes(self) -> list[ChannelAxis]:
        root = {}
        for group in nx.connected_components(self.same):
            root.update(dict.fromkeys(group, min(group)))
        axes = {r: ChannelAxis(self.sizes[r]) for r in sorted(set(root.values()))}
        for axis, operand, dim in self.writes:
            axes[root[axis]].writers.append(Use(operand, dim, torch.arange(self.sizes[axis])))
        for axis, norm in self.normed:
            axes[root[axis]].norms.append(norm)
        for axis, norm in self.sources:
            axes[root[axis]].sources.append(norm)
        for axis, width in self.heads:
            axes[root[axis]].heads.append(width)
        for pin in self.pins:
            for r, channels in self._by_axis(pin.channels, root):
                axes[r].pin(channels, pin.why, pin.node)
        for pin in self.shifted:
            for r, channels in self._by_axis(pin.channels, root):
                if any(norm.bias and norm.bias.source for norm in axes[r].sources):
                    axes[r].pin(channels, pin.why, pin.node)
        for operand, dim, numbers in self.reads:
            for r, channels in self._by_axis(numbers, root):
                axes[r].readers.append(Use(operand, dim, channels))
        return list(axes.values())

    def _by_axis(self, numbers: Tensor, root: dict[int, int]) -> list[tuple[int, Tensor]]:
        """(axis, its channel at each place, −1 elsewhere) for every axis that numbers hold."""
        owner, channels = self._split(numbers.clamp(min=0))
        owner = torch.tensor([root[a] for a in range(len(self.sizes))])[owner]
        owner[numbers < 0] = -1
        return [(int(r), torch.where(owner == r, channels, -1)) for r in _distinct(owner) if r >= 0]


def _weight_and_bias(node: fx.Node) -> list[Operand]:
    bias = Operand(node, 2, "bias")
    return [Operand(node, 1), bias] if bias.source is not None else [Operand(node, 1)]


def _distinct(numbers: Tensor) -> Tensor:
    found: Tensor = torch.unique(numbers)
    return found


def _with_rank(numbers: Tensor, rank: int) -> Tensor:
    """Dimensions of size 1 in front, as broadcasting adds them."""
    return numbers.reshape([1] * (rank - numbers.ndim) + list(numbers.shape))


def _compact(numbers: Tensor) -> Tensor:
    """Dimensions on which the numbers do not depend get size 1."""
    for dim in range(numbers.ndim):
        first = numbers.narrow(dim, 0, 1) if numbers.shape[dim] else numbers
        if numbers.shape[dim] > 1 and bool((first == numbers).all()):
            numbers = first
    return numbers
