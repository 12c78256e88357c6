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
