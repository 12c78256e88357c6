"""Changes to weights, operand by operand: what stays equal stays shared, what does not is untied.

A weight that several operators read (a tied output projection, a repeated block) may have to change differently for
each of them. Changes are made in float64 and rounded once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from .encodings import NM, Dense
from .program import Program, module_path, operands


@dataclass(frozen=True)
class Operand:
    """Argument `index` of `node`, called `leaf` in its module; with index −1 the stored tensor `node` itself, at all
    readers that have no change of their own."""

    node: fx.Node
    index: int
    leaf: str = field(default="weight", compare=False)

    @property
    def source(self) -> fx.Node | None:
        """The node that gives the operand, None when it is left out."""
        if self.index == -1:
            return self.node
        source = operands(self.node)[self.index] if len(operands(self.node)) > self.index else None
        return source if isinstance(source, fx.Node) else None

    def value(self, program: Program) -> Tensor | None:
        """Its value, float64; None when it is left out."""
        return None if self.source is None else _evaluate(program, self.source).double()

    def fixed(self, program: Program) -> str:
        """Why it cannot be given another value, or nothing."""
        source = self.source
        if source is None or source.op == "get_attr":
            return ""
        encoding = program.encoding(source)
        if encoding is None:
            return "" if is_stored(source) else f"its {self.leaf} is computed by {source.name}"
        values = encoding.values if isinstance(encoding, NM) else encoding
        if not isinstance(values, Dense):
            return f"its {self.leaf} is already stored as {encoding}"
        return "" if len(source.users) == 1 else f"its {self.leaf}, stored as {encoding}, has several readers"

    def shared(self) -> bool:
        """Whether other operators read the same tensor."""
        return self.source is not None and len(self.source.users) > 1


def is_stored(node: fx.Node) -> bool:
    """Whether a value is computed from stored tensors alone."""
    if node.op == "get_attr":
        return True
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_stored, node.all_input_nodes))


def _evaluate(program: Program, node: fx.Node) -> Tensor:
    if program.weight_name(node) is not None:
        return program.weight_value(node)
    args, kwargs = fx.node.map_arg((operands(node), node.kwargs), lambda n: _evaluate(program, n))
    assert callable(node.target)
    return node.target(*args, **kwargs)  # type: ignore[no-any-return]


class WeightEdits:
    """New values for operands; the program changes at `commit`."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[Operand, Tensor] = {}

    def __getitem__(self, operand: Operand) -> Tensor:
        """The value so far, float64."""
        value = self.values.get(operand, None)
        value = operand.value(self.program) if value is None else value
        assert value is not None, operand
        return value

    def __setitem__(self, operand: Operand, value: Tensor) -> None:
        self.values[operand] = value

    def __contains__(self, operand: Operand) -> bool:
        return operand in self.values or operand.source is not None

    def commit(self) -> list[str]:
        """Store the new values; returns the names of the tensors that stopped being shared."""
        groups: dict[fx.Node | None, list[Operand]] = defaultdict(list)
        for operand in sorted(self.values, key=lambda o: o.node):
            groups[operand.source].append(operand)
        untied = []
        for source, changed in groups.items():
            if source is not None and source.op == "get_attr":
                untied += self._spread(source, changed)
            elif source is not None and (encoding := self.program.encoding(source)) is not None:
                value = self.values[changed[0]].to(source.meta["val"].dtype)
                self.program.encode(source, encoding, encoding.encode(value))
            else:  # left out so far, or an expression whose value takes its place
                for operand in changed:
                    self._place(operand, self._new(operand, self._rounded(operand), before=operand.node))
        return untied

    def _spread(self, weight: fx.Node, changed: list[Operand]) -> list[str]:
        """One stored tensor for each different value among the readers. The name stays with the readers that have no
        change of their own, otherwise with the module that it belongs to."""
        name, old = str(weight.target), self.program.get(str(weight.target)).detach()
        own = sorted((o for o in changed if o.index >= 0), key=lambda o: self._wanted(o) != name)
        everywhere = [o for o in changed if o.index < 0]
        kept = old if set(weight.users) - {o.node for o in own} else self.values[own[0]].to(old.dtype)
        kept = self.values[everywhere[0]].to(old.dtype) if everywhere else kept
        self.program.set(name, kept)
        variants, untied = [(kept, weight)], []
        for operand in own:
            value = self.values[operand].to(old.dtype)
            same = next((node for known, node in variants if torch.equal(known, value)), None)
            if same is None:
                same = self._new(operand, value, before=weight)
                variants.append((value, same))
                untied.append(str(same.target))
            self._place(operand, same)
        return untied

    def _rounded(self, operand: Operand) -> Tensor:
        return self.values[operand].to(operand.node.meta["val"].dtype)

    def _wanted(self, operand: Operand) -> str:
        return f"{module_path(operand.node) or operand.node.name}.{operand.leaf}"

    def _new(self, operand: Operand, value: Tensor, before: fx.Node) -> fx.Node:
        """A new stored tensor, under the name that the module of an operand would give it."""
        name, taken, count = self._wanted(operand), self.program.weights(), 0
        while name in taken:
            count += 1
            name = f"{self._wanted(operand)}_{count}"
        if name in self.program.state_names:
            self.program.state_names = {**self.program.state_names, name: name}
        return self.program.attribute(name, value, before=before)

    def _place(self, operand: Operand, source: fx.Node) -> None:
        arguments = list(operands(operand.node))
        arguments += [None] * (operand.index + 1 - len(arguments))
        arguments[operand.index] = source
        operand.node.args = tuple(arguments)
