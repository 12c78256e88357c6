"""The calibration engine: streams batches through the program and keeps only the statistics that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .capture import as_call
from .errors import CalibrationError, ParetocError, PassError
from .memory import trim
from .program import Program, describe
from .sites import walk_inputs
from .statistics import Derived, Statistic

FlatBatch = list[Tensor]
#: what is derived → number of the batch → its value
_Values = dict[Derived, dict[int, Tensor]]


def read_batches(program: Program, calibration: Any) -> list[FlatBatch]:
    """Calibration data in any accepted form → flat batches that fit the program.

    An iterable (or DataLoader) of tensors, tuples or dicts; or a callable, which is given a stand-in for the model
    and calls it as often as it likes. A labelled batch `(x, y)` of a model with one input gives `x`.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    if callable(calibration) and not isinstance(calibration, Iterable):

        def record(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return program(*args, **kwargs)

        calibration(record)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, (Tensor, Mapping, str)):
        calls.extend(_call(program, item) for item in calibration)
    else:
        raise CalibrationError(
            f"calibration data of type {type(calibration).__name__} is not understood",
            where="calibration=",
            fix="pass an iterable of batches, a DataLoader, or a callable that runs the model",
        )
    if not calls:
        raise CalibrationError(
            "the calibration data is empty",
            where="calibration=",
            fix="pass at least one batch; a generator that was already used up is empty too",
        )
    return [_flat(program, call, index) for index, call in enumerate(calls)]


def _call(program: Program, item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        args, kwargs = as_call(item)
    except ParetocError as error:
        raise CalibrationError(error.what, where="calibration=", fix=error.fix) from error
    positional = program.interface.in_spec.children()[0].num_children or len(program.interface.inputs)
    return args[:positional], dict(kwargs)


def _flat(program: Program, call: tuple[tuple[Any, ...], dict[str, Any]], index: int) -> FlatBatch:
    where = f"calibration batch {index}"
    try:
        batch = program.interface.flatten(*call)
    except ParetocError as error:
        raise CalibrationError(error.what, where=where, fix=error.fix) from error
    sizes: dict[str, int] = {}
    for node, tensor, opened in zip(program.placeholders, batch, program.dynamic, strict=True):
        expected = node.meta["val"].shape
        if tensor.dtype != node.meta["val"].dtype:
            raise CalibrationError(
                f"input {node.name!r} has dtype {tensor.dtype}, the model was captured with {node.meta['val'].dtype}",
                where=where,
                fix="convert the calibration data",
            )
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CalibrationError(f"input {node.name!r} holds NaN", where=where, fix="clean the calibration data")
        fits = len(expected) == tensor.ndim and all(
            sizes.setdefault(str(size), tensor.shape[axis]) == tensor.shape[axis]
            if axis in opened
            else int(size) == tensor.shape[axis]
            for axis, size in enumerate(expected)
        )
        if not fits:
            shown = [opened.get(axis, int(size) if axis not in opened else "") for axis, size in enumerate(expected)]
            raise CalibrationError(
                f"input {node.name!r} has shape {list(tensor.shape)}, the model was captured with {shown}",
                where=where,
                fix="feed calibration data of the shape the model was captured with",
            )
    return batch


class Reduction:
    """Statistics over batches, each brought up to date as soon as a batch has shown the last of its values."""

    def __init__(self, statistics: Iterable[Statistic], derived: _Values | None = None) -> None:
        self.states: dict[Statistic, Any] = {s: s.start() for s in statistics}
        # of what earlier reductions have derived the nodes need not be seen again
        self.derived: _Values = {} if derived is None else derived
        self.names = {s: self._names(s) for s in self.states}
        self.watched = {name for names in self.names.values() for name in names}
        self.batch = -1

    def _names(self, statistic: Statistic) -> set[str]:
        fresh = [item for item in statistic.nodes if item not in self.derived]
        return {name for item in fresh for name in (item.nodes if isinstance(item, Derived) else (item,))}

    def next_batch(self) -> None:
        """What is seen from now on is of another batch."""
        self.batch += 1
        self.held: dict[Statistic, dict[str, Any]] = {s: {} for s in self.states}
        self._update()

    def see(self, name: str, value: Any) -> None:
        """The value of a node in this batch."""
        if name in self.watched:
            for statistic in self.held:
                if name in self.names[statistic]:
                    self.held[statistic][name] = value
            self._update()

    def _update(self) -> None:
        for statistic in [s for s, seen in self.held.items() if len(seen) == len(self.names[s])]:
            seen = self.held.pop(statistic)
            values = [self._value(item, seen) for item in statistic.nodes]
            self.states[statistic] = statistic.update(self.states[statistic], *values)

    def _value(self, item: str | Derived, seen: Mapping[str, Any]) -> Any:
        if isinstance(item, str):
            return seen[item]
        known = self.derived.setdefault(item, {})
        if self.batch not in known:
            known[self.batch] = item.compute(*(seen[name] for name in item.nodes))
        return known[self.batch]

    def finish(self) -> dict[Statistic, Any]:
        return {s: s.finish(state) for s, state in self.states.items()}


def gather(
    program: Program,
    statistics: Sequence[Statistic],
    batches: Iterable[FlatBatch],
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> dict[Statistic, Any]:
    """Run the batches once and reduce what each statistic asks for."""
    if not statistics:
        return {}
    reduction = Reduction(statistics)
    runner = Observer(program.module, reduction.see)
    with torch.no_grad():
        for batch in track(batches, "calibrating"):
            reduction.next_batch()
            runner.run(*batch)
    return reduction.finish()


class Stream:
    """Calibration batches on their way through a program: everything up to a place has run, the rest not yet.

    A pass that rewrites the program as it goes sees, at every place, the inputs that the rewritten part before it
    produces. What is kept of a batch is what the rest of the graph still reads. Nodes before the place must stay.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[FlatBatch],
        track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
    ) -> None:
        self.program, self.track = program, track
        self.place: fx.Node = program.placeholders[-1]
        self.values: list[dict[fx.Node, Any]] = [dict(zip(program.placeholders, b, strict=True)) for b in batches]
        self.derived: _Values = {}
        self.nodes: dict[str, fx.Node] = {}

    def _node(self, name: str) -> fx.Node:
        """By name; the graph is only walked again for one that came after the last walk."""
        if name not in self.nodes:
            self.nodes = {n.name: n for n in self.program.graph.nodes}
        return self.nodes[name]

    def advance(self, place: fx.Node, statistics: Sequence[Statistic] = ()) -> dict[Statistic, Any]:
        """Run every batch up to and with `place`, and gather. A statistic may look beyond it, at nodes that then
        run again. Raises PassError when one looks at a value that nothing later reads and that is gone, or comes to
        NaN or infinity."""
        reduction = Reduction(statistics, self.derived)
        watched = [self._node(name) for name in reduction.watched]
        place, last = max(self.place, place), max([self.place, place, *watched])
        fixed = [n for n in watched if n <= self.place and _is_fixed(n)]
        constants: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for values in self.track(self.values, "calibrating"):
                reduction.next_batch()
                for node in watched:
                    if node in values or node in fixed:
                        reduction.see(node.name, self._value(node, values, constants))
                self._run(values, self.place, place, reduction, constants)
                self._run(dict(values), place, last, reduction, constants)
                _check_complete(reduction, place)
        self.place, found = place, reduction.finish()
        constants.clear()
        trim()
        _check_finite(found, place)
        return found

    def derive(self, place: fx.Node, statistics: Sequence[Statistic]) -> None:
        """Compute what the statistics derive, as `advance` would; gather nothing."""
        asked = {item for s in statistics for item in s.nodes if isinstance(item, Derived)} - set(self.derived)
        if asked:
            self.advance(place, [_Derivation(place.name, derived) for derived in asked])

    def replay(self, batch: int, last: fx.Node, given: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Any]:
        """Evaluate a batch behind the place up to `last`, with gradients, where some weights are `given`. Returns the
        values that the rest of the graph reads; the batch stays where it is."""
        values = dict(self.values[batch])
        self._run(values, self.place, last, Reduction(()), dict(given))
        return values

    def _run(
        self,
        values: dict[fx.Node, Any],
        after: fx.Node,
        last: fx.Node,
        reduction: Reduction,
        constants: dict[fx.Node, Any],
    ) -> None:
        """Evaluate the nodes behind `after` up to `last` into `values`, and drop those that nothing later reads."""
        node = after
        while node is not last:
            node = node.next
            if any(read in values for read in node.all_input_nodes):
                values[node] = self._evaluate(node, values, constants)
            elif node.name not in reduction.watched:
                continue  # it is the same for every batch: evaluated when it is read
            reduction.see(node.name, self._value(node, values, constants))
            for read in (*node.all_input_nodes, node):
                if read in values and all(user <= node for user in read.users):
                    del values[read]

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any], constants: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        if node not in constants:  # a weight, or computed from weights alone
            constants[node] = self._evaluate(node, values, constants)
        return constants[node]

    def _evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any], constants: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.program.get(str(node.target)).detach()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, values, constants))
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable


@dataclass(frozen=True)
class _Derivation(Statistic):
    """Nothing but the computation of what is derived."""

    derived: Derived

    @property
    def nodes(self) -> tuple[str | Derived, ...]:
        return (self.derived,)

    def update(self, state: Any, *values: Tensor) -> Any:
        return None


def _is_fixed(node: fx.Node) -> bool:
    """Whether the value of a node is the same for every batch."""
    return not any(n.op == "placeholder" for n in (node, *walk_inputs(node)))


def _check_finite(found: Mapping[Statistic, Any], place: fx.Node) -> None:
    for statistic, value in found.items():
        # one that is not finite makes the sum so; isfinite() would take as much memory as the value
        if isinstance(value, Tensor) and not value.sum(dtype=torch.float64).isfinite():
            raise PassError(
                f"{type(statistic).__name__} of the calibration data holds NaN or infinity",
                where=describe(place),
                fix="look for values that overflow in the calibration data, or in the model",
            )


def _check_complete(reduction: Reduction, place: fx.Node) -> None:
    for statistic, seen in reduction.held.items():
        missing = sorted(reduction.names[statistic] - set(seen))
        raise PassError(
            f"{type(statistic).__name__} looks at {missing[0]!r}, which has run already and is not kept",
            where=describe(place),
            fix="ask for it at that node, or before",
        )


def steps(program: Program, batch: FlatBatch) -> Iterator[tuple[fx.Node, Any]]:
    """Every node with its value, as the graph runs: the next one runs when it is asked for."""
    runner = Observer(program.module, lambda *_: None)
    runner.args_iter = iter(batch)
    for node in program.graph.nodes:
        value = runner.env[node] = runner.run_node(node)
        for read in runner.user_to_last_uses.get(node, ()):
            del runner.env[read]
        yield node, value


class Observer(fx.Interpreter):
    """Runs a graph node by node and shows every value to `observe`; values die after their last use."""

    def __init__(self, module: fx.GraphModule, observe: Callable[[str, Any], None]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # our errors are three lines
        self.observe = observe

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.observe(n.name, value)
        return value
