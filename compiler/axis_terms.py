"""What one dimension of a tensor consists of, and when two dimensions are the same one.

A dimension is a product of factors, the outermost first; a factor is an axis or a concatenation of dimensions:

    dim ::= factor × … × factor        factor ::= atom | dim + … + dim

An atom is a variable of a union-find: `equate` binds it to another atom, to a product (a view split it) or to a
concatenation (a slice cut it), as in first-order unification (Robinson 1965). Every part is smaller than the whole, so
no atom is ever bound to a term that holds it. A dimension of size 1 is the empty product. Sizes are read from the
atoms, so a term stays true when an axis loses channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import torch
from torch import Tensor, fx

#: "permute" the channels, leave some out ("slice"), mix them by an orthogonal matrix ("rotate"), multiply each by a
#: positive number of its own ("scale"). Three are no actions but questions: is leaving channels out the same as setting
#: them to zero ("zero"), may they be mixed once the norms around them have neither weights nor a mean to subtract
#: ("fold"), does a constant that is added to each of them, the bias of a norm, arrive as it is ("offset").
Action = Literal["permute", "slice", "rotate", "scale", "zero", "fold", "offset"]
#: an axis is cut into at most so many pieces, one behind the other: x[1:] − x[:-1] would go on to single channels
_MOST_CUTS = 64
ACTIONS: tuple[Action, ...] = ("permute", "slice", "rotate", "scale", "zero")

Dim = tuple["Atom | Cat", ...]


@dataclass(frozen=True)
class Pin:
    """What forbids an action: a sentence about the axis, and the node that said so."""

    why: str
    node: fx.Node

    def __str__(self) -> str:
        return f"{self.why} (node {self.node.name})"


class Atom:
    """An axis that is not known to consist of others. `extent` is its size, `pins` holds the first pin per action."""

    __slots__ = ("bound", "cuts", "extent", "pins", "rank")

    def __init__(self, extent: int, pins: Mapping[str, Pin], cuts: int = 0) -> None:
        self.extent = extent
        self.pins: dict[str, Pin] = dict(pins)
        self.bound: Dim | None = None
        self.rank = 0  # of its tree in the union-find
        self.cuts = cuts


class Cat:
    """Dimensions one behind the other."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Dim]) -> None:
        self.parts = tuple(parts)


def fresh(extent: int, pins: Mapping[str, Pin] | None = None, cuts: int = 0) -> Dim:
    """A new axis."""
    return () if extent == 1 else (Atom(extent, pins or {}, cuts),)


def joined(dims: Sequence[Dim]) -> Dim:
    """A concatenation as a dimension."""
    return dims[0] if len(dims) == 1 else (Cat(dims),)


def factors(dim: Dim) -> list[Atom | Cat]:
    """The factors that stand for a dimension by now."""
    found: list[Atom | Cat] = []
    for factor in dim:
        if isinstance(factor, Atom) and factor.bound is not None:
            factor.bound = tuple(factors(factor.bound))
            found += factor.bound
        else:
            found.append(factor)
    return found


def parts(cat: Cat) -> list[Dim]:
    """The dimensions that stand one behind the other by now: a part that is a concatenation itself gives its own."""
    found: list[Dim] = []
    for part in cat.parts:
        whole = factors(part)
        alone = whole[0] if len(whole) == 1 else None
        found += parts(alone) if isinstance(alone, Cat) else [part]
    return found


def size(dim: Dim) -> int:
    return prod(f.extent if isinstance(f, Atom) else sum(map(size, f.parts)) for f in factors(dim))


def atoms(dim: Dim) -> Iterator[Atom]:
    """Every axis in a dimension, outermost first; one that occurs twice comes twice."""
    for factor in factors(dim):
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from atoms(part)


def pin(dim: Dim, why: Pin, *actions: str) -> None:
    """Forbid actions on every axis of a dimension; the first reason stays."""
    for atom in atoms(dim):
        for action in actions:
            atom.pins.setdefault(action, why)


def pinned(dim: Dim) -> Mapping[str, Pin] | None:
    """The pins of a dimension that may not be touched at all, otherwise None."""
    held = list(atoms(dim))
    untouchable = bool(held) and all(all(action in a.pins for action in ACTIONS) for a in held)
    return held[0].pins if untouchable else None


# -- unification --------------------------------------------------------------------------------------------------


def equate(a: Dim, b: Dim, conflict: Pin) -> None:
    """Make two dimensions the same; where their structures do not fit, `conflict` pins what is left of both."""
    left, right = list(reversed(a)), list(reversed(b))
    while (p := _pop(left)) is not None and (q := _pop(right)) is not None:
        if p is q:
            continue
        m, n = size((p,)), size((q,))
        if m == n:
            _unite(p, q, conflict)
        elif m > n and _split(p, n, left):
            right.append(q)
        elif m < n and _split(q, m, right):
            left.append(p)
        else:
            for rest in ((p, q), tuple(left), tuple(right)):
                pin(rest, conflict, *ACTIONS)
            return


def _pop(stack: list[Atom | Cat]) -> Atom | Cat | None:
    """The next factor."""
    while stack:
        found = factors((stack.pop(),))
        if len(found) == 1:
            return found[0]
        stack.extend(reversed(found))
    return None


def _split(factor: Atom | Cat, outer: int, stack: list[Atom | Cat]) -> bool:
    """Replace an axis by a product whose outermost factor has the size `outer`, and put it back."""
    if isinstance(factor, Cat) or factor.extent % outer:
        return False
    product = fresh(outer, factor.pins) + fresh(factor.extent // outer, factor.pins)
    _bind(factor, product)
    stack.extend(reversed(product))
    return True


def _unite(p: Atom | Cat, q: Atom | Cat, conflict: Pin) -> None:
    """Two factors of one size."""
    if isinstance(p, Cat) and isinstance(q, Cat):
        _align(p, q, conflict)
    elif isinstance(p, Atom) and isinstance(q, Atom):
        older, newer = (p, q) if p.rank >= q.rank else (q, p)
        older.rank = max(older.rank, newer.rank + 1)
        _bind(newer, (older,))
    elif isinstance(p, Atom):
        _bind(p, (q,))
    elif isinstance(q, Atom):
        _bind(q, (p,))


def _bind(atom: Atom, dim: Dim) -> None:
    atom.bound = dim
    for action, why in atom.pins.items():
        pin(dim, why, action)


def _align(p: Cat, q: Cat, conflict: Pin) -> None:
    """Two concatenations: cut the longer part where the shorter one ends."""
    left, right = parts(p)[::-1], parts(q)[::-1]
    while left and right:
        a, b = left.pop(), right.pop()
        m, n = size(a), size(b)
        longer = a if m > n else b
        pieces = (a, b) if m == n else cut(longer, min(m, n))
        if pieces is None:
            pin((p, q), conflict, *ACTIONS)
            return
        if m == n:
            equate(a, b, conflict)
        else:
            (left if m > n else right).append(pieces[1])
            equate(pieces[0], b if m > n else a, conflict)


def cut(dim: Dim, at: int) -> tuple[Dim, Dim] | None:
    """The first `at` places of a dimension and the others; None where no axis ends there and none can be cut there."""
    whole = factors(dim)
    if not whole:
        return None
    outer, inner = whole[0], tuple(whole[1:])
    at, rest = divmod(at, size(inner))
    if rest:
        return None
    if isinstance(outer, Atom):
        if outer.cuts == _MOST_CUTS:
            return None
        halves = fresh(at, outer.pins, outer.cuts + 1), fresh(outer.extent - at, outer.pins, outer.cuts + 1)
        _bind(outer, (Cat(halves),))
        return halves[0] + inner, halves[1] + inner
    before: list[Dim] = []
    after = parts(outer)
    while at and (length := size(after[0])) <= at:
        before.append(after.pop(0))
        at -= length
    if at:
        halves_of = cut(after[0], at)
        if halves_of is None:
            return None
        before.append(halves_of[0])
        after[0] = halves_of[1]
    return joined(before) + inner, joined(after) + inner


def between(dim: Dim, start: int, stop: int) -> Dim | None:
    """Places `start` … `stop` of a dimension; None where they cannot be cut out."""
    head = cut(dim, stop) if stop < size(dim) else (dim, ())
    tail = cut(head[0], start) if head and start else ((), head[0]) if head else None
    return tail[1] if tail else None


def regroup(dims: Sequence[Dim], shape: Sequence[int], conflict: Pin) -> list[Dim]:
    """The dimensions of a row-major view as `shape`. What neither splits nor joins whole axes is pinned."""
    sources, made = list(reversed(dims)), list[Dim]()
    for extents in _runs([size(d) for d in dims], shape):
        taken, have = [], 1
        while have < prod(extents):
            taken.append(sources.pop())
            have *= size(taken[-1])
        stack = [factor for dim in reversed(taken) for factor in reversed(dim)]
        for done, extent in enumerate(extents):
            part = _take(stack, extent)
            if part is None:
                for dim in (*taken, *made[len(made) - done :]):
                    pin(dim, conflict, *ACTIONS)
                made += [fresh(e, dict.fromkeys(ACTIONS, conflict)) for e in extents[done:]]
                break
            made.append(part)
    return made


def _runs(before: Sequence[int], after: Sequence[int]) -> Iterator[list[int]]:
    """The new extents in the shortest runs whose elements are those of whole old dimensions."""
    ends = set(accumulate(before, int.__mul__, initial=1))
    run: list[int] = []
    total = 1
    for extent in after:
        run.append(extent)
        total *= extent
        if total in ends:
            yield run
            run = []


def _take(stack: list[Atom | Cat], extent: int) -> Dim | None:
    """The next factors that make up one dimension."""
    taken: list[Atom | Cat] = []
    while extent > 1:
        factor = _pop(stack)
        if factor is None:
            return None
        length = size((factor,))
        if extent % length == 0:
            taken.append(factor)
            extent //= length
        elif length % extent or not _split(factor, extent, stack):
            return None
    return tuple(taken)


# -- places -------------------------------------------------------------------------------------------------------


def places(dim: Dim, chosen: Mapping[Atom, Tensor]) -> Tensor:
    """Where the places of a dimension come from, int64, when each axis in `chosen` keeps those channels, in order."""
    found = torch.zeros(1, dtype=torch.int64)
    for factor in factors(dim):
        if isinstance(factor, Atom):
            own = chosen.get(factor, torch.arange(factor.extent))
        else:
            starts = accumulate(map(size, factor.parts), initial=0)
            own = torch.cat([s + places(p, chosen) for s, p in zip(starts, factor.parts, strict=False)])
        found = (found[:, None] * size((factor,)) + own).flatten()
    return found


def cells(dim: Dim) -> list[tuple[Atom, ...]]:
    """The products of axes that a dimension is a concatenation of, once every factor is multiplied out."""
    found: list[tuple[Atom, ...]] = [()]
    for factor in factors(dim):
        own = [(factor,)] if isinstance(factor, Atom) else [cell for part in factor.parts for cell in cells(part)]
        found = [outer + inner for outer in found for inner in own]
    return found


def channels(dim: Dim, *together: Atom) -> Tensor:
    """The channel of an axis, or of a product of several, at each place of a dimension: int64 `[size(dim)]`, −1 where
    they do not run."""
    found = torch.zeros(size(dim), dtype=torch.int64)
    for atom in together:
        own = _channels(dim, atom)
        found = torch.where((found < 0) | (own < 0), -1, found * atom.extent + own)
    return found


def _channels(dim: Dim, atom: Atom) -> Tensor:
    found = torch.full((1,), -1)
    for factor in factors(dim):
        if isinstance(factor, Atom):
            own = torch.arange(factor.extent) if factor is atom else torch.full((factor.extent,), -1)
        else:
            own = torch.cat([_channels(part, atom) for part in factor.parts])
        found = torch.maximum(found[:, None], own[None]).flatten()
    return found


def written(dim: Dim, names: Mapping[Atom, str]) -> str:
    """A dimension as text: `3 × [heads] × 8`, `[up] + 64`."""
    whole, texts = factors(dim), []
    for factor in whole:
        if isinstance(factor, Atom):
            texts.append(names.get(factor, str(factor.extent)))
        elif any(map(factors, parts(factor))):
            text = " + ".join(written(part, names) for part in parts(factor))
            texts.append(f"({text})" if len(whole) > 1 else text)
        else:
            texts.append(str(len(parts(factor))))
    return " × ".join(texts) or "1"
