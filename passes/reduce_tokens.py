"""x `[B, T, C]` → fewer tokens behind the attention of chosen layers. Lossy; exact when nothing is removed.

`merge_tokens` and `prune_tokens` are the two common rules by their own names. The token counts are static: every
layer removes a fixed number, so batches, exports and kernels stay regular.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

from ..compiler.errors import OptionError, PassError
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program
from ..compiler.protocols import TokenRule
from ..compiler.registry import registry
from ..compiler.sites import protected_tokens
from ..compiler.tokens import carry, insert, token_blocks
from .token_rules import Keep

Plan = Callable[[int, int, int], int]


@dataclass(frozen=True)
class ReduceTokens(Pass):
    """Any token rule by name. Give `r` (tokens removed per layer: one number, or a list over the layers) or `keep`
    (the share of unprotected tokens that stays). `layers` (from 0) defaults to all for `r`, and to a quarter, half
    and three quarters of the depth for `keep`. `schedule` "decreasing" goes from 2r in the first layer down to 0.
    """

    name: ClassVar[str] = "reduce_tokens"
    phase: ClassVar[Phase] = Phase.TOKENS
    positional: ClassVar[str | None] = "rule"

    rule: str = "merge"
    r: int | tuple[int, ...] | None = None
    keep: float | None = None
    layers: tuple[int, ...] | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        where = f"pass {self.name!r}"
        if (self.r is None) == (self.keep is None):
            raise OptionError("give either r or keep", where=where, fix="for example r=8, or keep=0.7")
        amounts = (self.r,) if isinstance(self.r, int) else self.r or ()
        if any(a < 0 for a in amounts) or (self.keep is not None and not 0 < self.keep <= 1):
            raise OptionError(
                f"r={self.r}, keep={self.keep} is out of range", where=where, fix="use r >= 0, or 0 < keep <= 1"
            )
        if self.schedule not in ("constant", "decreasing"):
            raise OptionError(
                f"there is no schedule {self.schedule!r}",
                where=where,
                fix="use 'constant', 'decreasing' or a list for r",
            )

    def token_rule(self) -> TokenRule:
        return registry().token_rule(self.rule)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        rule = self.token_rule()
        found = token_blocks(program)
        if isinstance(rule, Keep) and protected_tokens(program) == 0:
            raise PassError(
                "the model has no class token whose attention could rank the others",
                where=f"pass {self.name!r}",
                fix="use merge_tokens",
            )
        trace = insert(program, rule, self._plan(len(found)))
        counts = [after for _, _, after in trace]
        if counts[-1] != trace[0][1]:
            carry(program)
        result = PassResult(matched=[b.attention.path for b, before, after in trace if before != after])
        result.metrics = {"tokens at first": float(trace[0][1]), "tokens at last": float(counts[-1])}
        return result

    def _plan(self, depth: int) -> Plan:
        chosen = self.layers
        if chosen is None:
            quarters = tuple(depth * q // 4 for q in (1, 2, 3))
            chosen = tuple(range(depth)) if self.keep is None else tuple(dict.fromkeys(quarters))
        beyond = [layer for layer in chosen if not 0 <= layer < depth]
        if beyond:
            raise OptionError(
                f"layer {beyond[0]} does not exist", where=f"pass {self.name!r}", fix=f"use layers 0 to {depth - 1}"
            )
        amounts = self._amounts(depth)

        def plan(layer: int, tokens: int, protected: int) -> int:
            if layer not in chosen:
                return 0
            if self.keep is not None:
                return tokens - protected - ceil(self.keep * (tokens - protected))
            return amounts[layer]

        return plan

    def _amounts(self, depth: int) -> list[int]:
        if isinstance(self.r, tuple):
            return [*self.r, *[0] * depth][:depth]
        r = self.r or 0
        if self.schedule == "decreasing" and depth > 1:
            return [int(2 * r * (depth - 1 - layer) / (depth - 1)) for layer in range(depth)]
        return [r] * depth


@dataclass(frozen=True)
class MergeTokens(ReduceTokens):
    """Bipartite soft matching: each layer merges its r most similar pairs of tokens (ToMe)."""

    name: ClassVar[str] = "merge_tokens"
    positional: ClassVar[str | None] = "r"

    rule: str = field(default="merge", kw_only=True)
    r: int | tuple[int, ...] | None = 8


@dataclass(frozen=True)
class PruneTokens(ReduceTokens):
    """Keep the tokens the class token attends to most; `fuse` adds one token that sums up the dropped ones (EViT)."""

    name: ClassVar[str] = "prune_tokens"
    positional: ClassVar[str | None] = "keep"

    rule: str = field(default="keep", kw_only=True)
    r: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    keep: float | None = 0.7
    fuse: bool = False

    def token_rule(self) -> TokenRule:
        return Keep(fuse=self.fuse)
