"""W4A8 in floating point: E2M1 weights in groups fitted by GPTQ, E4M3 activations, and what is lost kept in low rank.

Wu et al. 2023, "ZeroQuant-FP". A group's scale is free, a power of two (M1, 2^⌈log2 S⌉), or the largest scale of its
row divided by a power of two (M2): then E2M1 turns into E4M3 by an addition to the exponent. The low-rank residual is
LoRC (Yao et al. 2023, "ZeroQuant-V2"), of the final weights. Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..compiler.encodings import Encoding, Float, LowRank, Sum
from ..compiler.errors import OptionError, did_you_mean
from ..compiler.passes import Composite

CONSTRAINTS = {"free": "float32", "M1": "e8m0-ceil", "M2": "shift"}


@dataclass(frozen=True)
class ZeroQuantFP(Composite):
    """`constraint` "free", "M1" or "M2" of the scales; `group` weights share one; `rank` 0 leaves LoRC out."""

    name: ClassVar[str] = "zeroquant_fp"
    positional: ClassVar[str | None] = "constraint"

    constraint: str = "M2"
    group: int = 256
    rank: int = 8
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.constraint not in CONSTRAINTS:
            raise OptionError(
                f"there is no constraint {self.constraint!r}",
                where="pass 'zeroquant_fp'",
                fix=did_you_mean(self.constraint, CONSTRAINTS),
            )

    def encoding(self) -> Encoding:
        codes = Float("e2m1", self.group, CONSTRAINTS[self.constraint])
        return Sum(codes, LowRank(self.rank)) if self.rank else codes

    def passes(self) -> Sequence[object]:
        chosen = {"weights": self.encoding(), "targets": self.targets, "ignore": self.ignore}
        return [{"quantize": {"scheme": "FP8", "fitter": "gptq", **chosen}}]
