"""Which dimensions are the same dimension: the axes of a model, what may be done to each, and what forbids it.

Every dimension of every value and parameter is a node; every operator equates some, splits and joins others
(`axis_terms`) and pins what it cannot follow (`axis_rules`, `axis_views`). A class of equal dimensions is one axis of
the model. Permuting its channels in all parameters that hold it leaves the output as it was (Ainsworth et al. 2023,
Git Re-Basin, section 3; Fang et al. 2023, DepGraph, section 3.2, for slicing). One pass, linear in the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, overload

import networkx as nx
import torch
from torch import Tensor, fx

from . import axis_rules, axis_views  # noqa: F401  # their rules
from .axis_terms import ACTIONS, Action, Atom, Dim, Pin, atoms, cells, channels, pin, size, written
from .axis_walk import Literal, Walk
from .errors import OptionError, did_you_mean
from .program import Program
from .weights import Operand

__all__ = ["ACTIONS", "Action", "Axes", "Axis", "Pin", "Use", "find_axes"]


@dataclass(frozen=True)
class Use:
    """Dimension `dim` of a stored tensor holds an axis, alone or among others. `sums`: an operator sums over it.

    `operand` is the tensor itself or, where an operator may get one of its own, the place that it has there.
    """

    parameter: str
    dim: int
    sums: bool
    operand: Operand = field(repr=False)
    whole: Dim = field(repr=False, compare=False)
    atoms: tuple[Atom, ...] = field(repr=False, compare=False)

    @property
    def channels(self) -> Tensor:
        """int64 `[size of the dimension]`: the channel at each place, −1 where something else is."""
        return channels(self.whole, *self.atoms)

    def spread(self, values: Tensor) -> Tensor:
        """A number per channel → one per place of the dimension, 1 where something else is."""
        return torch.where(self.channels >= 0, values[self.channels], 1.0)

    @property
    def layout(self) -> str:
        """How the axis lies in the dimension, outermost first: `3 × [4] × 8`, `[64] + 64`."""
        return written(self.whole, {atom: f"[{atom.extent}]" for atom in self.atoms})

    def __str__(self) -> str:
        alone = size(self.whole) == prod(atom.extent for atom in self.atoms)
        return f"{self.parameter}.{self.dim}" + ("" if alone else f" ({self.layout})")


@dataclass(eq=False)
class Axis:
    """One axis of the model: `size` channels, and every place in a parameter that runs along it.

    `writers` make its channels with a weight, `readers` sum over them with one. `atoms`: more than one where an action
    takes heads and their width together.
    """

    program: Program = field(repr=False)
    atoms: tuple[Atom, ...] = field(repr=False)
    uses: list[Use] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list, repr=False)

    @property
    def atom(self) -> Atom:
        """The one that it is; the outermost of several."""
        return self.atoms[0]

    @property
    def size(self) -> int:
        return prod(atom.extent for atom in self.atoms)

    @property
    def sums(self) -> list[Use]:
        """The uses of the weights that sum over it."""
        return [use for use in self.uses if use.sums]

    @property
    def name(self) -> str:
        """Its first use."""
        return str(self.uses[0])

    def why(self, action: Action) -> Pin | None:
        """What forbids an action; None when it may be done."""
        return _first(self.atoms, action)

    def free(self, action: Action) -> bool:
        return self.why(action) is None

    def __str__(self) -> str:
        return f"{self.name} of {self.size} channels"


def _repeated(dim: Dim) -> Dim:
    """The axes that are a factor of a dimension more than once."""
    held = list(atoms(dim))
    if len(set(held)) == len(held):
        return ()
    return tuple(atom for cell in cells(dim) for atom in cell if cell.count(atom) > 1)


def _first(held: Iterable[Atom], action: Action) -> Pin | None:
    return next((why for atom in held if (why := _why(atom, action)) is not None), None)


def _why(atom: Atom, action: Action) -> Pin | None:
    pins = atom.pins
    if action == "zero" and "sum" in pins and "shift" in pins:
        return pins.get("zero", pins["sum"])
    if action == "rotate":
        return pins.get("rotate", pins.get("norm"))
    return pins.get("rotate" if action == "fold" else action)


class Axes(Sequence[Axis]):
    """Every axis that a parameter holds, in graph order."""

    def __init__(self, program: Program, action: Action | None = None) -> None:
        self.program = program
        self._walk = walk = Walk(program, action)
        # the dimensions of a stored tensor are known by identity: equal ones of another tensor are others
        roles = {place: {id(dim) for _, dim in ends} for place, ends in walk.ends.items()}
        for operand, dims in walk.stored:
            for dim in dims:
                if id(dim) in roles["readers"] and id(dim) in roles["writers"]:
                    pin(dim, Pin(f"{self._name(operand)} both makes it and sums over it", operand.node), "scale")
                pin(_repeated(dim), Pin("it stands twice in one dimension", operand.node), "rotate", "scale")
        found: dict[Atom, Axis] = {}
        for together in self._together(action):
            found |= dict.fromkeys(together, Axis(program, together))
        for operand, dims in walk.stored:
            name = self._name(operand)
            for index, dim in enumerate(dims):
                sums = id(dim) in roles["readers"]
                for axis in dict.fromkeys(found[atom] for atom in atoms(dim)):
                    axis.uses.append(Use(name, index, sums, operand, dim, axis.atoms))
        for place, ends in walk.ends.items():
            for node, dim in ends:
                for axis in dict.fromkeys(found[atom] for atom in atoms(dim) if atom in found):
                    if node not in (known := getattr(axis, place))[-1:]:
                        known.append(node)
        for literal in walk.literals:
            for axis in dict.fromkeys(found[a] for dim in literal.dims for a in atoms(dim) if a in found):
                axis.literals.append(literal)
        self._axes = list(dict.fromkeys(found.values()))
        self._of_atom = found

    def _together(self, action: Action | None) -> list[tuple[Atom, ...]]:
        """The atoms that are one axis: for an action, those that stand side by side wherever one of them does, so that
        what may be done to each may be done to their product (heads × width)."""
        held = [dim for _, dims in self._walk.stored for dim in dims]
        found = dict.fromkeys(atom for dim in held for atom in atoms(dim))
        if action is None:
            return [(atom,) for atom in found]
        where: dict[Atom, list[int]] = defaultdict(list)
        for number, cell in enumerate(cell for dim in held for cell in cells(dim)):
            for atom in cell:
                where[atom].append(number)
        groups: dict[Any, list[Atom]] = defaultdict(list)
        for atom in found:
            free = _why(atom, "fold" if action == "rotate" else action) is None
            groups[tuple(where[atom]) if free else atom].append(atom)
        return list(map(tuple, groups.values()))

    def _name(self, operand: Operand) -> str:
        return self.program.weight_name(operand.source) or f"{operand.node.name}.{operand.leaf}"

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
        dims = {self._name(operand): dims for operand, dims in reversed(self._walk.stored)}
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
        return list(dict.fromkeys(self._of_atom[atom] for atom in atoms(self._dims[parameter][dim])))

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
        return list(dict.fromkeys(self._of_atom[a] for a in atoms(self._walk.dims[node][dim]) if a in self._of_atom))

    def why(self, node: fx.Node, dim: int, action: Action) -> Pin | None:
        """What forbids an action on one dimension of a value, also where no parameter holds it."""
        return _first(atoms(self._walk.dims[node][dim]), action)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a value, at the example inputs, with the sizes that the axes have now."""
        return tuple(map(size, self._walk.dims[node]))

    def holders(self, axis: Axis) -> Iterator[tuple[fx.Node, int]]:
        """Every dimension of every value and parameter along which an axis runs, in graph order."""
        return iter(dict.fromkeys((node, dim) for node, dim, atom in self._places() if atom in axis.atoms))

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


def find_axes(program: Program, action: Action | None = None) -> Axes:
    """Every axis of a program, as far as the order of its channels has to agree. With "scale" or "rotate" only as far
    as that action has to follow: an axis that is not free as a whole may consist of several of which some are.

    What they say holds until the graph changes by anything but `axis_moves`.
    """
    return Axes(program, action)
