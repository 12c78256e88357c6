"""What stays under a budget: min Σ worth of the channels that leave, subject to cost ≤ budget.

Channels leave in steps, always those worth least for the cost they save: the greedy solution of the knapsack, with
savings as they are at the widths so far, since the cost of a layer is a product of two. They only fall as widths do, so
that a price on the heap is a lower bound and is looked at again when it comes up (lazy greedy, Minoux 1978).
A latency is met by search over budgets of multiply–accumulates, to which it is predicted to be in proportion: what is
lowered for the target is timed in turns with the whole model.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx

from .axes import Axes, Axis
from .axis_moves import resized
from .calibrate import FlatBatch, Stream
from .cost import measure, node_macs
from .errors import OptionError
from .program import Program
from .refit import fitted_readers
from .registry import registry
from .sensitivity import OutputValues, output_error

T = TypeVar("T")
Track = Callable[[Iterable[Any], str], Iterable[Any]]
#: what is measured under a latency: so many forms of a program, for so many seconds each
_MEASURED, _SECONDS = 6, 3.0
#: a latency is met by what takes so much less than it, a share of the whole
_NEAR = 0.02
#: multiply–accumulates that differ by less, a share of the whole, are not told apart
_FINE = 0.01


@dataclass
class Ledger:
    """What a program costs as its axes become narrower: "macs" at the example inputs, or "parameters"."""

    axes: Axes
    what: Literal["macs", "parameters"] = "macs"
    along: dict[Axis, set[fx.Node]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.along = defaultdict(set)
        nodes = {node for node in self.axes.program.graph.nodes if self.cost(node)}
        for axis in self.axes:
            for node, _ in self.axes.holders(axis):
                self.along[axis] |= {node, *node.users} & nodes

    def cost(self, node: fx.Node) -> int:
        """Of one node, at the widths that the axes have now."""
        if self.what == "parameters":
            stored = node.op == "get_attr" and node.meta["val"].is_floating_point()
            return prod(self.axes.shape(node)) if stored else 0
        return node_macs(node, self.axes.shape) if node.op == "call_function" else 0

    def total(self) -> int:
        """The cost at the widths that the axes have now."""
        return sum(map(self.cost, self.axes.program.graph.nodes))

    def share(self, widths: Mapping[Axis, int]) -> float:
        """What is left of the cost when these axes have so many channels."""
        with resized(widths):
            left = self.total()
        return left / self.total()

    def spend(self, steps: Mapping[Axis, int], worth: Mapping[Axis, Tensor], share: float) -> dict[Axis, int]:
        """The widths at which at most `share` of the cost is left. An axis loses `steps` channels at a time, those
        worth least first, down to one step. Raises OptionError when even that costs more: it says what is left then.
        """
        losses = {axis: worth[axis].sort().values.cumsum(0).tolist() for axis in steps}
        with resized({axis: axis.size for axis in steps}):
            left = whole = self.total()
            heap = [(0.0, index, axis) for index, axis in enumerate(steps)]
            while left > share * whole and heap:
                _, index, axis = heapq.heappop(heap)
                narrower = (axis.size - 1) // steps[axis] * steps[axis]
                saved = self._saved(axis, narrower) if narrower else 0
                if not saved:
                    continue
                size = len(losses[axis])
                gone = losses[axis][size - axis.size - 1] if axis.size < size else 0.0
                price = (losses[axis][size - narrower - 1] - gone) / saved
                if heap and (price, index) > heap[0][:2]:
                    heapq.heappush(heap, (price, index, axis))
                    continue
                axis.atom.extent = narrower
                left -= saved
                heapq.heappush(heap, (0.0, index, axis))
            if left > share * whole:
                raise unreachable(share, self.what, left / whole)
            return {axis: axis.size for axis in steps}

    def _saved(self, axis: Axis, width: int) -> int:
        nodes = self.along[axis]
        before = sum(map(self.cost, nodes))
        with resized({axis: width}):
            return before - sum(map(self.cost, nodes))


def worth(
    scores: Mapping[Axis, Tensor],
    widths: Mapping[Axis, int],
    batches: Sequence[FlatBatch],
    damp: float | None,
    track: Track = lambda items, _: items,
) -> dict[Axis, Tensor]:
    """Scores of the axes of one program on one scale: those of the channels that leave add up to the squared relative
    error of the outputs on the batches, measured when one axis alone has this width.

    The readers are fitted anew unless `damp` is None. Only what comes after them runs again.
    """
    program = next(iter(scores)).program
    fitting, running, values = Stream(program, batches), Stream(program, batches), OutputValues.of(program)
    exact = Stream(program, batches).advance(program.placeholders[-1], values)
    first = {axis: min(read for node in axis.readers for read in node.all_input_nodes) for axis in scores}
    scaled = {}
    for axis in track(sorted(scores, key=first.__getitem__), "measuring sensitivity"):
        order = scores[axis].argsort(descending=True, stable=True)
        kept, gone = order[: widths[axis]].sort().values, order[widths[axis] :]
        changed = _without(axis, kept)
        if damp is not None:
            changed |= fitted_readers({axis: kept}, fitting, damp)[0]
        running.advance(first[axis])
        before = {name: program.get(name) for name in changed}
        for name, value in changed.items():
            program.set(name, value)
        error = output_error(exact, running.advance(running.place, values))
        for name, value in before.items():
            program.set(name, value)
        scaled[axis] = scores[axis] * error / max(float(scores[axis][gone].sum()), 1e-30)
    return scaled


def only_budget(options: Mapping[str, float | None], where: str) -> str:
    """The one of some options that is given. Raises OptionError for none or several."""
    given = [option for option, value in options.items() if value is not None]
    if len(given) != 1:
        raise OptionError(
            f"{' and '.join(given) or 'nothing'} says how much is to go",
            where=where,
            fix=f"give one of {', '.join(options)}",
        )
    return given[0]


def unreachable(share: float, what: str, least: float) -> OptionError:
    return OptionError(
        f"{share:.3g} of the {what} cannot be reached: {least:.3g} is the least",
        where="spending the budget",
        fix="raise the budget, or let more leave: see targets=, axes= and round_to=",
    )


class Clock:
    """The latency on a target of other forms of a program, as a share of its own."""

    def __init__(self, program: Program, target: str, seed: int) -> None:
        self.backend, self.options = registry().backend(target), {"seed": seed}
        self.whole, self.inputs = self.backend.lower(program, self.options), program.users_example()

    def __call__(self, form: Program) -> float:
        """Medians of calls in turns."""
        lowered = self.backend.lower(form, self.options)
        calls = {"whole": lambda: self.whole.run(self.inputs), "form": lambda: lowered.run(self.inputs)}
        taken = measure(calls, runs=100, budget_s=_SECONDS)
        return taken["form"].median / taken["whole"].median


def within_latency(
    latency: float, spend: Callable[[float], T], fastest: T, least: float, time: Callable[[T], float], track: Track
) -> tuple[T, float]:
    """The form of a program with most multiply–accumulates that takes at most `latency`, and what it took: both are
    shares of the whole program's.

    `spend(share)` is the best form with so many multiply–accumulates, down to `least`, those of the `fastest`; `time`
    measures one. What is tried next lies on the line between the two nearest that were measured, at first the whole
    program and the fastest; an end that stays counts half as far away (Illinois method, Dowell & Jarratt 1971). Raises
    OptionError when even the fastest takes longer.
    """
    found, taken = fastest, time(fastest)
    if taken > latency:
        raise unreachable(latency, "latency", taken)
    low, high, slow = least, 1.0, None
    under, over, rose = latency - taken, 1.0 - latency, None
    for _ in track(range(_MEASURED - 1), "measuring latency"):
        if latency - taken <= _NEAR:
            break
        untried = _untried(spend, low, high, under / (under + over), (found, slow))
        if untried is None:
            break
        share, form = untried
        measured = time(form)
        rises = measured <= latency
        if rises:
            low, found, taken, under, over = share, form, measured, latency - measured, over / (2 if rose else 1)
        else:
            high, slow, under, over = share, form, under / (2 if rose is False else 1), measured - latency
        rose = rises
    return found, taken


def _untried(
    spend: Callable[[float], T], low: float, high: float, part: float, known: tuple[T, T | None]
) -> tuple[float, T] | None:
    """A share so far between two, and its form; where that is the form of either, half way to the other."""
    while high - low > _FINE:
        share = low + (high - low) * part
        form = spend(share)
        if form not in known:
            return share, form
        low, high = (share, high) if form == known[0] else (low, share)
        part = 0.5
    return None


def _without(axis: Axis, kept: Tensor) -> dict[str, Tensor]:
    """The weights that sum over an axis, with 0 for the channels that are not kept."""
    changed: dict[str, Tensor] = {}
    for use in axis.uses:
        if use.sums:
            value = changed.get(use.parameter, axis.program.get(use.parameter).detach())
            gone = ((use.channels >= 0) & ~torch.isin(use.channels, kept)).nonzero().flatten()
            changed[use.parameter] = value.index_fill(use.dim, gone, 0.0)
    return changed
