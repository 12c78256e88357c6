"""x → x − mean(x) on the residual stream: the LayerNorms that read it become RMS norms, which are cheaper.

Ashkboos et al. 2024, "SliceGPT", section 3; the mean leaves the weights that write the stream (`compiler/streams.py`).
Exact up to rounding, by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..compiler.errors import PassError
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program, describe
from ..compiler.streams import center


@dataclass(frozen=True)
class CenterStream(Pass):
    """Make RMS norms of the LayerNorms of pre-norm residual streams; a model that has none is refused with the reason.

    Before `smooth`, `rotate` and `quantize`, which find their scales on what it leaves.
    """

    name: ClassVar[str] = "center_stream"
    phase: ClassVar[Phase] = Phase.TRANSFORM
    before: ClassVar[tuple[str, ...]] = ("rotate", "smooth")
    conflicts: ClassVar[tuple[str, ...]] = ("prune_nm",)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        done = center(program)
        if not done.norms:
            pin = next(iter(done.left.values()), None)
            raise PassError(
                f"no residual stream can be centred: {pin.why}" if pin else "the model has no residual stream",
                where=describe(pin.node) if pin else "pass 'center_stream'",
                fix="leave center_stream out for this model",
            )
        apart = "is a tensor of its own now: what it was shared with changes differently"
        skipped = {norm.output.name: str(pin) for norm, pin in done.left.items()}
        matched = [norm.output.name for norm in done.norms]
        return PassResult(matched, skipped, {"norms": len(done.norms)}, [f"{name} {apart}" for name in done.untied])
