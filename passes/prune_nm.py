"""W → W with at most n non-zeros in every m consecutive input weights, those of largest magnitude.

Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3. Lossy; the pattern survives quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compiler.encodings import NM
from ..compiler.errors import OptionError, ParetocError
from ..compiler.passes import Phase
from ..compiler.program import Program
from ..compiler.reencode import EncodePass
from ..compiler.sites import Site


@dataclass(frozen=True)
class PruneNM(EncodePass):
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

    def refuse(self, program: Program, site: Site) -> str:
        if program.encoding(site.weight) is not None:
            return f"already stored as {program.encoding(site.weight)}"
        if site.window is not None and site.window.groups != 1:
            return "grouped convolution"
        try:
            self.encoding().check(program.weight_value(site.weight))
        except ParetocError as error:
            return error.what
        return super().refuse(program, site)
