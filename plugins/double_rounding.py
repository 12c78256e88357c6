"""One integer master, read at fewer bits: q_l = rnd(q_h / 2^(h−l)), ŵ = q_l · s · 2^(h−l).

Huang et al. 2024, "Nearly Lossless Adaptive Bit Switching", section 3.2: the read-out of a trained master, here of one
rounded after training. Models of all widths share the stored codes. Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..compiler.encodings import Nested
from ..compiler.passes import Composite


@dataclass(frozen=True)
class DoubleRounding(Composite):
    """`read` bits of a master of `bits`, in groups of `group` (0: one scale a channel)."""

    name: ClassVar[str] = "double_rounding"
    positional: ClassVar[str | None] = "read"

    read: int = 4
    bits: int = 8
    group: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def passes(self) -> Sequence[object]:
        weights = Nested(self.bits, self.read, self.group)
        chosen = {"weights": weights, "targets": self.targets, "ignore": self.ignore}
        return [{"quantize": {"scheme": "W8A16", "fitter": "rtn", **chosen}}]
