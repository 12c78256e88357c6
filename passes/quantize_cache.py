"""K, V → q(K), q(V) where attention reads them: the error of a key-value cache that is stored in few bits.

One scale for each token and head (its last axis), as QuaRot groups its cache (Ashkboos et al. 2024, section 4); keys
are rounded as they are read, behind a rotary embedding. The graph computes on rounded values, so that accuracy is
measured, and says so: `compiler.attention.cache_code` tells a backend that decodes what its cache may hold.
Lossy; it changes no bytes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compiler.attention import cache_code, operand_places
from ..compiler.dialect.activations import CODES
from ..compiler.errors import OptionError, PassError, did_you_mean
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program, operands
from ..compiler.sites import attention_sites
from .activations import dynamic


@dataclass(frozen=True)
class QuantizeCache(Pass):
    """Round keys and values of every attention to `code`, one of `paretoc::fake_quantize_dynamic`."""

    name: ClassVar[str] = "quantize_cache"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    positional: ClassVar[str | None] = "code"

    code: str = "int8"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise OptionError(
                f"there is no code {self.code!r}", where="pass 'quantize_cache'", fix=did_you_mean(self.code, CODES)
            )

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        for site in attention_sites(program):
            if code := cache_code(site):
                result.skipped[site.path] = f"its keys and values are rounded to {code} already"
                continue
            for reader, index in operand_places(site)[1:]:
                reader.update_arg(index, dynamic(program, operands(reader)[index], reader, "token", self.code))
            result.matched.append(site.path)
        if not result.matched and not result.skipped:
            raise PassError(
                "the model has no attention", where="pass 'quantize_cache'", fix="leave this pass out of the recipe"
            )
        program.refresh()
        return result
