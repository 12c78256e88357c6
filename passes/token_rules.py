"""Token rules: which tokens go, and what becomes of them.

`Merge`: Bolya et al. 2023, "Token Merging", section 3. `Keep`: Liang et al. 2022, "EViT", section 3.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..compiler.program import Program
from ..compiler.protocols import Reduced, TokenRule, TokenState

aten = torch.ops.aten
paretoc = torch.ops.paretoc


@dataclass(frozen=True)
class Merge(TokenRule):
    """The r most similar pairs become one token, the size-weighted mean; keys are compared, averaged over heads."""

    name: ClassVar[str] = "merge"
    tracks_size: ClassVar[bool] = True

    def limit(self, tokens: int, protected: int) -> int:
        in_a = (tokens + 1) // 2 - (protected + 1) // 2
        return min(in_a, (tokens - protected) // 2) if tokens // 2 > protected // 2 else 0

    def emit(self, program: Program, state: TokenState, remove: int) -> Reduced:
        graph, key = program.graph, state.block.attention.key
        with graph.inserting_after(state.x):
            cursor = graph.call_function(aten.alias.default, (state.x,))
        with graph.inserting_before(cursor):
            metric = graph.call_function(aten.mean.dim, (key, [1]))
            matched = graph.call_function(paretoc.bipartite_match.default, (metric, remove, state.protected))
            indices = [graph.call_function(operator.getitem, (matched, i)) for i in range(3)]
            size = state.size or graph.call_function(aten.ones_like.default, (_first_channel(graph, state.x),))
            merged = graph.call_function(paretoc.merge_tokens.default, (state.x, size, *indices))
            x, new_size = (graph.call_function(operator.getitem, (merged, i)) for i in range(2))
            if state.protected > 1:
                x, new_size = _protected_first(program, x, new_size, state, remove, before=cursor)
        graph.erase_node(cursor)
        return Reduced(x, new_size, state.tokens - remove)


@dataclass(frozen=True)
class Keep(TokenRule):
    """The tokens the class token attends to most stay, in order; with `fuse` one token sums up the others."""

    name: ClassVar[str] = "keep"
    fuse: bool = False

    def limit(self, tokens: int, protected: int) -> int:
        return tokens - protected - 1

    def emit(self, program: Program, state: TokenState, remove: int) -> Reduced:
        graph, site = program.graph, state.block.attention
        keep = state.tokens - state.protected - remove
        with graph.inserting_after(state.x):
            cursor = graph.call_function(aten.alias.default, (state.x,))
        with graph.inserting_before(cursor):
            query = graph.call_function(aten.slice.Tensor, (site.query, 2, 0, 1))
            query = graph.call_function(aten.mul.Tensor, (query, site.scale))
            keys = graph.call_function(aten.transpose.int, (site.key, -1, -2))
            logits = graph.call_function(aten.matmul.default, (query, keys))
            attention = graph.call_function(aten.softmax.int, (logits, -1))
            scores = graph.call_function(aten.mean.dim, (attention, [1]))
            scores = graph.call_function(aten.select.int, (scores, 1, 0))
            arguments = (state.x, scores, keep, state.protected, self.fuse)
            x = graph.call_function(paretoc.keep_tokens.default, arguments)
        graph.erase_node(cursor)
        return Reduced(x, None, state.protected + keep + int(self.fuse))


def _first_channel(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(aten.slice.Tensor, (x, 2, 0, 1))


def _protected_first(
    program: Program, x: fx.Node, size: fx.Node, state: TokenState, remove: int, *, before: fx.Node
) -> tuple[fx.Node, ...]:
    """Merging puts what is left of A before B: bring the protected tokens of both back to the front, in order."""
    left = (state.tokens + 1) // 2 - remove
    front = [token // 2 + (token % 2) * left for token in range(state.protected)]
    order = front + [token for token in range(state.tokens - remove) if token not in front]
    index = program.attribute(f"tokens.{x.name}.order", torch.tensor(order), before=before)
    return tuple(program.graph.call_function(aten.index_select.default, (part, 1, index)) for part in (x, size))
