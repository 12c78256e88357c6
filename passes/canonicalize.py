"""graph → the same graph without what does nothing; batch norms folded. Exact up to rounding of the folded norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compiler.canonical import canonicalize
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Dropout, assertions and no-op copies go, constants and batch norms fold. Runs by itself in every compile."""

    name: ClassVar[str] = "canonicalize"
    phase: ClassVar[Phase] = Phase.CANONICALIZE

    def apply(self, program: Program, ctx: Context) -> PassResult:
        counts = canonicalize(program)
        return PassResult(metrics={f"{name} removed": float(count) for name, count in counts.items()})
