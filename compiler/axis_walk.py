"""One pass over a graph that asks a rule per operator which dimensions are the same.

A rule gets the walk and a node, equates and pins dimensions of its operands, and returns the dimensions of the result
(a list of them for an operator with several results). An operator without a rule, or whose rule does not fit the
shapes, pins all that it reads and makes.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .axis_terms import ACTIONS, Action, Cat, Dim, Pin, atoms, equate, factors, fresh, pin, size
from .encodings import NM
from .norms import Norm, norms
from .program import Program, argument, example_shape, hint, operands
from .weights import Operand

Dims = list[Dim]
Rule = Callable[["Walk", fx.Node], Any]

#: operator (or its name, for one that another library registers) → rule
RULES: dict[Any, Rule] = {}
#: operators whose stored operands are weights, whatever they are called → the name of each in its module, by its index,
#: where it is no part of a list
WEIGHTED: dict[Any, Mapping[int, str]] = {}


def rule(*targets: Any, weights: Mapping[int, str] | None = None) -> Callable[[Rule], Rule]:
    """Register the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        if weights is not None:
            WEIGHTED.update(dict.fromkeys(targets, weights))
        return function

    return register


@dataclass(frozen=True, eq=False)
class Literal:
    """Sizes that a node is given as arguments: `write(node, sizes of dims)` renews them."""

    node: fx.Node
    dims: Sequence[Dim]
    write: Callable[[fx.Node, list[int]], None]

    def renew(self) -> None:
        self.write(self.node, [size(dim) for dim in self.dims])


class Walk:
    """`dims` holds, per node, the dimensions of its value; `stored` those of every stored operand; `ends` the weights
    that sum over an axis ("readers") and those that make it ("writers"), as (operator, dimension of the weight).

    With an action an axis goes on only as far as that action has to follow: a norm makes another one with its weight, a
    product with what is not scaled does not tie the two, and operators that share a weight may get one each.
    """

    def __init__(self, program: Program, action: Action | None = None) -> None:
        self.program = program
        self.action = action
        self.dims: dict[fx.Node, Any] = {}
        self.stored: list[tuple[Operand, Dims]] = []
        self.literals: list[Literal] = []
        self.ends: dict[str, list[tuple[fx.Node, Dim]]] = {"readers": [], "writers": []}
        self.norms = {norm.output: norm for norm in norms(program)}
        self.normed = {node for norm in self.norms.values() for node in norm.inside} | set(self.norms)
        self.parts: dict[fx.Node, list[Dims]] = {}  # of values that are only read part by part along one dimension
        self._own: dict[fx.Node, Dims] = {}  # of the weights of the operator at hand
        self._leaves: dict[fx.Node, dict[int, str]] = defaultdict(dict)
        for operand in (o for norm in self.norms.values() for o in (norm.weight, norm.bias) if o is not None):
            self._leaves[operand.node][operand.index] = operand.leaf
        for node in program.graph.nodes:
            if node.op == "output":
                for read in node.all_input_nodes:
                    self.pin(self.of(read), node, "it is an output of the model")
            else:
                self.dims[node] = self._dims(node)

    def _dims(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.fixed(node, "it is an input of the model")
        if node.op == "get_attr":
            made = self._held(node)
            if self.action is None or not self._splits(node):
                self.stored.append((Operand(node, -1), made))
            return made
        if self.action is not None and node in self.normed:
            return self._normed(self.norms[node]) if node in self.norms else []
        self._own = {} if self.action is None else dict(self._weights(node))
        made = self._rule(node.target)(self, node)
        if not _fits(made, node.meta.get("val")):
            made = unknown(self, node)
        if node in self.norms:
            self._turned(self.norms[node], made)
        return made

    def _rule(self, target: Any) -> Rule:
        tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        found = RULES.get(target) or RULES.get(str(target))
        return found or (RULES[torch.Tag.pointwise] if tagged else unknown)

    # -- stored tensors -------------------------------------------------------------------------------------------

    def _held(self, node: fx.Node) -> Dims:
        """A weight is free; what the model computes for itself (position numbers, rotary frequencies) is not, except
        along dimensions on which it does not depend."""
        name, value = str(node.target), self.program.get(str(node.target))
        known = name in self.program.state_names or any(user.target in WEIGHTED for user in node.users)
        if known and value.is_floating_point():
            return self.new(node)
        pins = self.every(f"{name} is a constant of the model, outside its weights", node)
        constant = dict.fromkeys(("rotate", "scale", "shift"), pins["scale"])
        alike = [bool((value == value.narrow(dim, 0, 1)).all()) for dim in range(value.ndim)]
        return [fresh(extent, constant if same else pins) for extent, same in zip(value.shape, alike, strict=True)]

    def _splits(self, source: fx.Node) -> bool:
        """Whether all that read a stored tensor take it as a weight: each of them may be given one of its own then."""

        def places(user: fx.Node) -> list[bool]:
            leaves = self._leaves.get(user, WEIGHTED.get(user.target, {}))
            return [index in leaves for index, value in enumerate(operands(user)) if value is source]

        return self.program.weight_name(source) is not None and all(places(user) == [True] for user in source.users)

    def _weights(self, node: fx.Node) -> Iterator[tuple[fx.Node, Dims]]:
        """The weights of an operator that may change apart from the same tensors elsewhere, with their dimensions."""
        for index, leaf in WEIGHTED.get(node.target, {}).items():
            operand = Operand(node, index, leaf)
            if operand.source is None or not self._splits(operand.source):
                continue
            encoded = operand.source.op != "get_attr"
            dims: Dims = self.new(operand.source) if encoded else self._held(operand.source)
            if why := self._unchangeable(operand):
                pin_all(dims, Pin(why, node), *ACTIONS)
            self.stored.append((operand, dims))
            yield operand.source, dims

    def _unchangeable(self, operand: Operand) -> str:
        encoded = operand.source is not None and isinstance(self.program.encoding(operand.source), NM)
        if encoded and self.action == "rotate":
            return "the pattern of its zeros would not survive"
        return operand.fixed(self.program)

    # -- norms of the last axis -----------------------------------------------------------------------------------

    def _normed(self, norm: Norm) -> Dims:
        """With its weight, or one that it gets, a norm makes an axis of its own."""
        made, node = list(self.of(norm.input)), norm.output
        if self.action == "scale":
            pin_all(made, Pin("a norm reads it", node), "scale")
        else:
            self._turned(norm, made)
            if norm.plain:
                return made
        made[-1] = fresh(size(made[-1]))
        if norm.weight is None:
            pin(made[-1], Pin("a norm without a weight makes it", node), "scale")
        for operand in (norm.weight, norm.bias):
            if operand is None or (operand is norm.bias and operand.source is None):
                continue
            if why := operand.fixed(self.program):
                pin(made[-1], Pin(why, node), *ACTIONS)
            if operand.source is not None and not self._splits(operand.source):
                pin_all(self.of(operand.source), Pin("it is the weight of a norm", node), *ACTIONS)
            self.stored.append((operand, [made[-1]]))
        self._turned(norm, made)
        return made

    def _turned(self, norm: Norm, dims: Dims) -> None:
        """A norm commutes with a rotation of what it normalises if it neither weighs nor centres it."""
        weighs = norm.weight is not None and norm.weight.source is not None
        why = "a norm multiplies each channel by a weight of its own" if weighs else "a norm subtracts the mean over it"
        pin_all(dims[:-1], Pin("a norm reads it", norm.output), "rotate")
        pin_all([] if norm.plain else dims[-1:], Pin(why, norm.output), "norm")

    # -- what rules are written with ------------------------------------------------------------------------------

    def of(self, value: Any) -> Dims:
        """The dimensions of a tensor operand; none for anything else."""
        if value in self._own:
            return self._own[value]
        return self.dims[value] if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor) else []

    def given(self, node: fx.Node, index: int, name: str) -> Dims:
        """The dimensions of an argument that may be left out."""
        return self.of(argument(node, index, name))

    def new(self, node: fx.Node) -> Dims:
        """New axes for a value."""
        return [fresh(extent) for extent in example_shape(node)]

    def fixed(self, node: fx.Node, why: str) -> Any:
        """New axes, all pinned, for a value of one or several tensors."""
        return _fixed(node.meta.get("val"), self.every(why, node))

    def every(self, why: str, node: fx.Node) -> dict[str, Pin]:
        """One reason against every action."""
        return dict.fromkeys(ACTIONS, Pin(why, node))

    def pin(self, dims: Sequence[Dim], node: fx.Node, why: str, *actions: str) -> None:
        """Forbid actions, all if none is named. Whether a norm may be rotated is not for its parts to say."""
        forbidden = [a for a in actions or ACTIONS if a != "rotate" or node not in self.normed]
        pin_all(dims, Pin(why, node), *forbidden)

    def bend(self, dims: Sequence[Dim], node: fx.Node) -> None:
        """The operator does not commute with a change of the channels' values along these dimensions."""
        self.pin(dims, node, f"{node.target} does not commute with it", "rotate", "scale")

    def same(self, a: Dim, b: Dim, node: fx.Node) -> Dim:
        """Both are the same dimension, or one has size 1."""
        if a and b:
            equate(a, b, Pin("axes of different structure meet", node))
        return a or b

    def broadcast(self, node: fx.Node, values: Sequence[Dims]) -> Dims:
        """The dimensions of values that are aligned from the last one."""
        made: Dims = [()] * max(map(len, values), default=0)
        for dims in values:
            for place in range(1, len(dims) + 1):
                made[-place] = self.same(made[-place], dims[-place], node)
        return made

    def product(self, node: fx.Node, values: Sequence[Dims]) -> Dims:
        """The dimensions of a product, element by element. A scale of one value arrives, the first that may have one; a
        rotation along a dimension arrives if no other value varies there."""
        made: Dims = []
        for place in range(1, max(map(len, values), default=0) + 1):
            varying = [dims[-place] for dims in values if place <= len(dims) and dims[-place]]
            others = varying if len(varying) > 1 else []
            if self.action == "scale":
                scaled = [dim for dim in varying if not all("scale" in atom.pins for atom in atoms(dim))]
                varying, others = scaled[:1] or varying[:1], scaled[1:]
            self.pin(others, node, "each of its channels is multiplied by another number", "rotate", "scale")
            made = self.broadcast(node, [[()], *([dim] for dim in varying)]) + made
        return made

    def reads(self, node: fx.Node, dim: Dim) -> None:
        """A weight sums over its dimension `dim`."""
        self.ends["readers"].append((node, dim))

    def writes(self, node: fx.Node, dim: Dim) -> None:
        """A weight makes the channels of its dimension `dim`."""
        self.ends["writers"].append((node, dim))

    def sized(self, node: fx.Node, path: tuple[int, ...], dim: Dim) -> None:
        """The argument at `path` is the size of `dim`; −1 asks PyTorch to find it."""
        given = _read(node, path)
        if isinstance(given, fx.Node):
            _pin_parts(dim, Pin("its size is a part of a computed one", node))
            before = size(dim)
            self.literals.append(Literal(node, [dim], lambda node, sizes: _scale(node, path, given, sizes[0], before)))
        elif given != -1:
            self.literals.append(Literal(node, [dim], lambda node, sizes: write(node, path, sizes[0])))


def pin_all(dims: Sequence[Dim], why: Pin, *actions: str) -> None:
    for dim in dims:
        pin(dim, why, *actions)


def _read(node: fx.Node, path: tuple[int, ...]) -> Any:
    given: Any = operands(node)
    for index in path:
        given = given[index]
    return given


def write(node: fx.Node, path: tuple[int, ...], value: Any) -> None:
    """Put a value at args[path[0]] or args[path[0]][path[1]]."""
    if len(path) > 1:
        value = [value if i == path[1] else old for i, old in enumerate(operands(node)[path[0]])]
    node.update_arg(path[0], value)


def _scale(node: fx.Node, path: tuple[int, ...], given: fx.Node, times: int, over: int) -> None:
    """A computed size (batch × heads) that had a factor of another value."""
    graph = node.graph
    with graph.inserting_before(node):
        product = graph.call_function(operator.mul, (given, times))
        write(node, path, graph.call_function(operator.floordiv, (product, over)))


def _pin_parts(dim: Dim, why: Pin) -> None:
    for factor in factors(dim):
        if isinstance(factor, Cat):
            pin((factor,), why, "slice")


def _fits(made: Any, value: Any) -> bool:
    """Whether a rule gave every result its dimensions, of the right sizes."""
    if isinstance(value, Tensor):
        return [size(dim) for dim in made] == [hint(extent) for extent in value.shape]
    if isinstance(value, (list, tuple)):
        return len(made) == len(value) and all(map(_fits, made, value))
    return True


def _fixed(value: Any, pins: dict[str, Pin]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_fixed(part, pins) for part in value]
    return [fresh(hint(extent), pins) for extent in value.shape] if isinstance(value, Tensor) else []


def unknown(w: Walk, node: fx.Node) -> Any:
    """Nothing may change on either side."""
    why = f"{node.target} is not known to treat all channels alike"
    for read in node.all_input_nodes:
        several = isinstance(read.meta.get("val"), (list, tuple))
        for dims in w.dims[read] if several else [w.of(read)]:
            w.pin(dims, node, why)
    return w.fixed(node, why)
