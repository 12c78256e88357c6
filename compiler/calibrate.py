"""The calibration engine: streams batches through the program and keeps only the statistics that were asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .capture import as_call
from .errors import CalibrationError, ParetocError
from .program import Program
from .statistics import Statistic

FlatBatch = list[Tensor]


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


def gather(
    program: Program,
    statistics: Sequence[Statistic],
    batches: Iterable[FlatBatch],
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> dict[Statistic, Any]:
    """Run the batches once and reduce what each statistic asks for."""
    states: dict[Statistic, Any] = {s: s.start() for s in statistics}
    if not states:
        return {}
    watched: dict[str, list[Statistic]] = defaultdict(list)
    for statistic in states:
        watched[statistic.node].append(statistic)

    def observe(name: str, value: Any) -> None:
        for statistic in watched.get(name, ()):
            states[statistic] = statistic.update(states[statistic], value)

    runner = Observer(program.module, observe)
    with torch.no_grad():
        for batch in track(batches, "calibrating"):
            runner.run(*batch)
    return {s: s.finish(state) for s, state in states.items()}


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

    def advance(self, place: fx.Node, statistics: Sequence[Statistic] = ()) -> dict[Statistic, Any]:
        """Run every batch up to and with `place`, and gather. A statistic may look beyond it, at nodes that then
        run again."""
        nodes = {n.name: n for n in self.program.graph.nodes}
        states: dict[Statistic, Any] = {s: s.start() for s in statistics}
        watched = {nodes[name] for s in statistics for name in s.nodes}
        place, last = max(self.place, place), max([self.place, place, *watched])
        constants: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for values in self.track(self.values, "calibrating"):
                seen = {n: values[n] for n in watched if n in values}
                self._run(values, self.place, place, seen, watched, constants)
                self._run(dict(values), place, last, seen, watched, constants)
                for statistic, state in states.items():
                    states[statistic] = statistic.update(state, *(seen[nodes[name]] for name in statistic.nodes))
        self.place = place
        return {s: s.finish(state) for s, state in states.items()}

    def _run(
        self,
        values: dict[fx.Node, Any],
        after: fx.Node,
        last: fx.Node,
        seen: dict[fx.Node, Any],
        watched: set[fx.Node],
        constants: dict[fx.Node, Any],
    ) -> None:
        """Evaluate the nodes behind `after` up to `last` into `values`, and drop those that nothing later reads."""

        def value(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if node not in constants:  # a weight, or computed from weights alone
                constants[node] = self._evaluate(node, value)
            return constants[node]

        node = after
        while node is not last:
            node = node.next
            if node.op != "call_function" or not _varies(node, values):
                continue
            values[node] = self._evaluate(node, value)
            if node in watched:
                seen[node] = values[node]
            for read in node.all_input_nodes:
                if read in values and all(user <= node for user in read.users):
                    del values[read]

    def _evaluate(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        if node.op == "get_attr":
            return self.program.get(str(node.target)).detach()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function's target is callable


def _varies(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a node reads anything that depends on the batch."""
    return any(read in values for read in node.all_input_nodes)


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
