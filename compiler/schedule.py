"""The order of the passes: declared rules as a `networkx` DAG, checked or applied."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from .errors import ScheduleError
from .passes import Pass


def rules(passes: Sequence[Pass]) -> nx.DiGraph[int]:
    """Positions in `passes` as nodes, an edge u → v with its `reason` where u must run before v."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, first in enumerate(passes):
        for j, second in enumerate(passes):
            if i != j and (reason := _precedes(first, second)):
                graph.add_edge(i, j, reason=reason)
    return graph


def _precedes(first: Pass, second: Pass) -> str:
    if second.name in first.before:
        return f"{first.name!r} declares that it runs before {second.name!r}"
    if first.name in second.after:
        return f"{second.name!r} declares that it runs after {first.name!r}"
    explicit = first.name in second.before or second.name in first.after
    if first.phase < second.phase and not explicit:
        return f"{first.phase.name} comes before {second.phase.name}"
    return ""


def check(passes: Sequence[Pass]) -> None:
    """Raise ScheduleError, with the rule and the order that works, when the user's order breaks a rule."""
    for i, first in enumerate(passes):
        for second in passes[i + 1 :]:
            if second.name in first.conflicts or first.name in second.conflicts:
                raise ScheduleError(
                    f"{first.name!r} and {second.name!r} cannot be combined: one undoes the other",
                    where="passes=",
                    fix="leave one of them out",
                )
    graph = rules(passes)
    for u, v in graph.edges:
        if u > v:
            raise ScheduleError(
                f"{passes[v].name!r} stands before {passes[u].name!r}, but {graph.edges[u, v]['reason']}",
                where="passes=",
                fix="this order works: " + ", ".join(p.name for p in ordered(passes)),
            )


def ordered(passes: Sequence[Pass]) -> list[Pass]:
    """The passes in an order that keeps every rule, otherwise as the user wrote them."""
    graph = rules(passes)
    try:
        return [passes[i] for i in nx.lexicographical_topological_sort(graph)]
    except nx.NetworkXUnfeasible:
        cycle = " → ".join(passes[u].name for u, _ in nx.find_cycle(graph))
        raise ScheduleError(
            f"the order rules of these passes contradict each other: {cycle}",
            where="passes=",
            fix="leave one of them out, or report it to the plugin's author",
        ) from None
