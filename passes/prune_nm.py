"""W → W with at most n non-zeros in every m consecutive input weights, those of largest magnitude.

Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3. Lossy; the pattern survives quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compiler.encodings import NM
from ..compiler.errors import OptionError, ParetocError, PassError
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.sites import Site


@dataclass(frozen=True)
class PruneNM(SitePass):
    """`pattern` is "n:m". Sites whose input width m does not divide, and grouped convolutions, are left and listed."""

    name: ClassVar[str] = "prune_nm"
    phase: ClassVar[Phase] = Phase.SPARSIFY
    positional: ClassVar[str | None] = "pattern"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    pattern: str = "2:4"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoding()

    def encoding(self) -> NM:
        try:
            n, m = (int(part) for part in self.pattern.split(":"))
        except ValueError as error:
            raise OptionError(
                f"{self.pattern!r} is not a sparsity pattern", where="pass 'prune_nm'", fix="write n:m, such as 2:4"
            ) from error
        return NM(n, m)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        encoding, result, done = self.encoding(), PassResult(), set()
        for site in self.sites(program):
            name = program.weight_name(site.weight)
            if name in done:
                continue
            reason = self._refusal(program, site)
            if reason:
                result.skipped[site.path] = reason
                continue
            program.encode(site.weight, encoding, encoding.encode(program.weight_value(site.weight)))
            done.add(name)
            result.matched.append(site.path)
        if not done:
            raise PassError(
                f"no site can be pruned {self.pattern}: "
                + "; ".join(f"{p}: {r}" for p, r in list(result.skipped.items())[:3]),
                where="pass 'prune_nm'",
                fix="widen targets=, or use another pattern",
            )
        program.refresh()
        return result

    def _refusal(self, program: Program, site: Site) -> str:
        if program.encoding(site.weight) is not None:
            return f"already stored as {program.encoding(site.weight)}"
        if any(user.target not in (site.node.target,) for user in site.weight.users):
            return "its weight is also used by another kind of operator (tied)"
        if site.kind == "conv" and site.node.args[-1] != 1 and len(site.node.args) >= 7:
            return "grouped convolution"
        try:
            self.encoding().check(program.weight_value(site.weight))
        except ParetocError as error:
            return error.what
        return ""
