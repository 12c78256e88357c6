"""Which dimensions are the same dimension: the axes of a model, what may be done to each, and what forbids it.

Every dimension of every value and parameter is a node; every operator equates some, splits and joins others
(`axis_terms`) and pins what it cannot follow (`axis_rules`, `axis_views`). A class of equal dimensions is one axis of
the model. Permuting its channels in all parameters that hold it leaves the output as it was (Ainsworth et al. 2023,
Git Re-Basin, section 3; Fang et al. 2023, DepGraph, section 3.2, for slicing). One pass, linear in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import networkx as nx
from torch import Tensor, fx

from . import axis_rules, axis_views  # noqa: F401  # their rules
from .axis_terms import ACTIONS, Action, Atom, Dim, Pin, atoms, channels, pin, size, written
from .axis_walk import Literal, Walk
from .errors import OptionError, did_you_mean
from .program import Program

__all__ = ["ACTIONS", "Action", "Axes", "Axis", "Pin", "Use", "find_axes"]


@dataclass(frozen=True)
class Use:
    """Dimension `dim` of a stored tensor holds an axis, alone or among others. `sums`: an operator sums over it."""

    parameter: str
    dim: int
    sums: bool
    whole: Dim = field(repr=False, compare=False)
    atom: Atom = field(repr=False, compare=False)

    @property
    def channels(self) -> Tensor:
        """int64 `[size of the dimension]`: the channel at each place, −1 where something else is."""
        return channels(self.whole, self.atom)

    @property
    def layout(self) -> str:
        """How the axis lies in the dimension, outermost first: `3 × [4] × 8`, `[64] + 64`."""
        return written(self.whole, {self.atom: f"[{self.atom.extent}]"})

    def __str__(self) -> str:
        alone = size(self.whole) == self.atom.extent
        return f"{self.parameter}.{self.dim}" + ("" if alone else f" ({self.layout})")


@dataclass(eq=False)
class Axis:
    """One axis of the model: `size` channels, and every place in a parameter that runs along it.

    `writers` make its channels with a weight, `readers` sum over them with one.
    """

    program: Program = field(repr=False)
    atom: Atom = field(repr=False)
    uses: list[Use] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list, repr=False)

    @property
    def size(self) -> int:
        return self.atom.extent

    @property
    def name(self) -> str:
        """Its first use."""
        return str(self.uses[0])

    def why(self, action: Action) -> Pin | None:
        """What forbids an action; None when it may be done."""
        pins = self.atom.pins
        if action == "zero" and "sum" in pins and "shift" in pins:
            return pins.get("zero", pins["sum"])
        return pins.get(action)

    def free(self, action: Action) -> bool:
        return self.why(action) is None

    def __str__(self) -> str:
        return f"{self.name} of {self.size} channels"


class Axes(Sequence[Axis]):
    """Every axis that a parameter holds, in graph order."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._walk = walk = Walk(program)
        found: dict[Atom, Axis] = {}
        # the dimensions of a stored tensor are known by identity: equal ones of another tensor are others
        roles = {place: {id(dim) for _, dim in ends} for place, ends in walk.ends.items()}
        for node in program.graph.nodes:
            for index, dim in enumerate(walk.dims[node] if node.op == "get_attr" else ()):
                sums = id(dim) in roles["readers"]
                if sums and id(dim) in roles["writers"]:
                    pin(dim, Pin(f"{node.target} both makes it and sums over it", node), "scale")
                for atom in dict.fromkeys(atoms(dim)):
                    axis = found.setdefault(atom, Axis(program, atom))
                    axis.uses.append(Use(str(node.target), index, sums, dim, atom))
        for place, ends in walk.ends.items():
            for node, dim in ends:
                for atom in dict.fromkeys(atoms(dim)):
                    if atom in found and node not in (known := getattr(found[atom], place))[-1:]:
                        known.append(node)
        for literal in walk.literals:
            for atom in dict.fromkeys(a for dim in literal.dims for a in atoms(dim)):
                if atom in found:
                    found[atom].literals.append(literal)
        self._axes = list(found.values())
        self._of_atom = found

    @overload
    def __getitem__(self, index: int) -> Axis: ...
    @overload
    def __getitem__(self, index: slice) -> list[Axis]: ...
    def __getitem__(self, index: int | slice) -> Axis | list[Axis]:
        return self._axes[index]

    def __len__(self) -> int:
        return len(self._axes)

    @cached_property
    def _dims(self) -> dict[str, list[Dim]]:
        """By parameter, under all its names when it is tied."""
        first = self.program.state_names
        dims = {str(n.target): self._walk.dims[n] for n in self.program.graph.nodes if n.op == "get_attr"}
        tied = {first.get(name, name): held for name, held in dims.items()}
        return dims | {name: tied[same] for name, same in first.items() if same in tied}

    def of(self, parameter: str, dim: int) -> list[Axis]:
        """The axes that one dimension of a parameter consists of, outermost first (heads, then head width)."""
        if parameter not in self._dims:
            raise OptionError(
                f"the model has no parameter {parameter!r}",
                where="looking for an axis",
                fix=did_you_mean(parameter, self._dims),
            )
        return [self._of_atom[atom] for atom in dict.fromkeys(atoms(self._dims[parameter][dim]))]

    def one(self, parameter: str, dim: int) -> Axis:
        """The only axis of a dimension; an OptionError names them when there are several."""
        found = self.of(parameter, dim)
        if len(found) != 1:
            layout = written(self._dims[parameter][dim], {})
            raise OptionError(
                f"dimension {dim} of {parameter!r} is {layout}: {len(found)} axes, not one",
                where="looking for an axis",
                fix="choose one of Axes.of(parameter, dim), which lists them outermost first",
            )
        return found[0]

    def at(self, node: fx.Node, dim: int) -> list[Axis]:
        """The axes of one dimension of a value that parameters hold too."""
        return [self._of_atom[a] for a in dict.fromkeys(atoms(self._walk.dims[node][dim])) if a in self._of_atom]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value, at the example inputs, with the sizes that the axes have now."""
        return tuple(map(size, self._walk.dims[node]))

    def holders(self, axis: Axis) -> Iterator[tuple[fx.Node, int]]:
        """Every dimension of every value and parameter along which an axis runs, in graph order."""
        return ((node, dim) for node, dim, atom in self._places() if atom is axis.atom)

    def _places(self) -> Iterator[tuple[fx.Node, int, Atom]]:
        for node, held in self._walk.dims.items():
            for dim, whole in enumerate([] if isinstance(node.meta.get("val"), (list, tuple)) else held):
                for atom in dict.fromkeys(atoms(whole)):
                    yield node, dim, atom

    @cached_property
    def graph(self) -> nx.Graph[Any]:
        """Dimensions, as (node name, dim), joined to the axes they hold: two with a common neighbour share it."""
        graph: nx.Graph[Any] = nx.Graph()
        graph.add_edges_from(
            ((node.name, dim), self._of_atom[atom]) for node, dim, atom in self._places() if atom in self._of_atom
        )
        return graph

    def coverage(self, action: Action = "permute") -> float:
        """The share of the model's weights that lie on at least one axis free for an action."""
        weights = {name: value.numel() for name, value in self.program.weights().items() if value.is_floating_point()}
        covered = {use.parameter for axis in self if axis.free(action) for use in axis.uses}
        return sum(weights[name] for name in covered & weights.keys()) / max(sum(weights.values()), 1)


def find_axes(program: Program) -> Axes:
    """Every axis of a program. What they say holds until the graph changes by anything but `axis_moves`."""
    return Axes(program)
