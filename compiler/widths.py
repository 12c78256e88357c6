"""How wide each axis may stay under a budget: min Σ worth of the channels that leave, subject to cost ≤ budget.

Channels leave in steps, always those worth least for the cost they save: the greedy solution of the knapsack, with
savings as they are at the widths so far, since the cost of a layer is a product of two. They only fall as widths do, so
that a price on the heap is a lower bound and is looked at again when it comes up (lazy greedy, Minoux 1978).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .axes import Axes, Axis
from .axis_moves import resized
from .calibrate import FlatBatch, Stream
from .cost import node_macs
from .errors import OptionError
from .refit import fitted_readers
from .sensitivity import OutputValues, output_error


@dataclass
class Ledger:
    """What a program costs as its axes become narrower: "macs" at the example inputs, or "parameters"."""

    axes: Axes
    what: Literal["macs", "parameters"] = "macs"
    along: dict[Axis, set[fx.Node]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.along = defaultdict(set)
        nodes = {node for node in self.axes.program.graph.nodes if self._cost(node)}
        for axis in self.axes:
            for node, _ in self.axes.holders(axis):
                self.along[axis] |= {node, *node.users} & nodes

    def _cost(self, node: fx.Node) -> int:
        if self.what == "parameters":
            stored = node.op == "get_attr" and node.meta["val"].is_floating_point()
            return prod(self.axes.shape(node)) if stored else 0
        return node_macs(node, self.axes.shape) if node.op == "call_function" else 0

    def total(self) -> int:
        """The cost at the widths that the axes have now."""
        return sum(map(self._cost, self.axes.program.graph.nodes))

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
                raise OptionError(
                    f"{share:.3g} of the {self.what} cannot be reached: {left / whole:.3g} is the least",
                    where="spending the budget on widths",
                    fix="raise the budget, prune more kinds of axes (axes=), or lower round_to=",
                )
            return {axis: axis.size for axis in steps}

    def _saved(self, axis: Axis, width: int) -> int:
        nodes = self.along[axis]
        before = sum(map(self._cost, nodes))
        with resized({axis: width}):
            return before - sum(map(self._cost, nodes))


def worth(
    scores: Mapping[Axis, Tensor],
    widths: Mapping[Axis, int],
    batches: Sequence[FlatBatch],
    damp: float | None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
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


def _without(axis: Axis, kept: Tensor) -> dict[str, Tensor]:
    """The weights that sum over an axis, with 0 for the channels that are not kept."""
    changed: dict[str, Tensor] = {}
    for use in axis.uses:
        if use.sums:
            value = changed.get(use.parameter, axis.program.get(use.parameter).detach())
            gone = ((use.channels >= 0) & ~torch.isin(use.channels, kept)).nonzero().flatten()
            changed[use.parameter] = value.index_fill(use.dim, gone, 0.0)
    return changed
