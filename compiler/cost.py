"""What a program costs: multiply–accumulates, parameters, bytes, tokens; and how long it takes, measured fairly."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from .encodings import NM
from .program import Program, example_shape, operands
from .sites import CONV, LINEAR, MATMUL, SDPA, attention_sites

aten = torch.ops.aten
_MATMULS = (*MATMUL, aten.mm.default, aten.addmm.default, aten.baddbmm.default)


@dataclass(frozen=True)
class Cost:
    """At the example inputs: multiply–accumulates, parameters, bytes of stored tensors, tokens per attention."""

    macs: int
    parameters: int
    bytes: int
    tokens: tuple[int, ...]


def cost(program: Program) -> Cost:
    return Cost(
        macs=sum(node_macs(n) for n in program.graph.nodes if n.op == "call_function") // program.repeats,
        parameters=parameter_count(program),
        bytes=sum(t.numel() * t.dtype.itemsize for t in program.weights().values()),
        tokens=tuple(example_shape(site.key)[-2] for site in attention_sites(program)),
    )


def node_macs(node: fx.Node, shape: Callable[[fx.Node], tuple[int, ...]] = example_shape) -> int:
    """Multiply–accumulates of one node at the example inputs; 0 for everything that is not a matrix product."""
    if node.target in LINEAR:
        return prod(shape(node)) * shape(operands(node)[1])[-1]
    if node.target in CONV:
        return prod(shape(node)) * prod(shape(operands(node)[1])[1:])
    if node.target in SDPA:
        query, value = shape(operands(node)[0]), shape(operands(node)[2])
        return prod(query) * value[-2] + prod(query[:-1]) * value[-2] * value[-1]
    if node.target in _MATMULS:
        left = operands(node)[1] if node.target in (aten.addmm.default, aten.baddbmm.default) else operands(node)[0]
        return prod(shape(node)) * shape(left)[-1]
    return 0


def parameter_count(program: Program) -> int:
    """Weights of the model as it computes: an encoded weight counts its elements, a pruned one only those kept."""
    total = 0
    for node in program.graph.nodes:
        encoding = program.encoding(node)
        if encoding is not None:
            total += (
                prod(operands(node)[2]) * encoding.n // encoding.m
                if isinstance(encoding, NM)
                else prod(operands(node)[2])
            )
        elif node.op == "get_attr" and not any(program.encoding(u) is not None for u in node.users):
            value = program.get(str(node.target))
            total += value.numel() if value.is_floating_point() else 0
    return total


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median and minimum over `runs` interleaved runs."""

    median: float
    minimum: float
    runs: int


def measure(calls: Mapping[str, Callable[[], object]], *, runs: int = 10, budget_s: float = 20.0) -> dict[str, Latency]:
    """Time several callables interleaved in this process; stops early at `budget_s`.

    They take turns in another order each round. A turn is two calls, of which the second counts: the first meets
    threads of other libraries that still spin (PyTorch's do), and cold caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline, order = time.perf_counter() + budget_s, random.Random(0)
    for round_number in range(runs):
        for name, call in order.sample(list(calls.items()), len(calls)):
            call()
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
        if round_number >= 2 and time.perf_counter() > deadline:
            break
    return {n: Latency(statistics.median(t), min(t), len(t)) for n, t in times.items()}
