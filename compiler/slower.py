"""Is the compiled model slower than the uncompressed one on its target, and which sites are to blame?

predicted: Σᵢ macs′ᵢ / speedᵢ > Σᵢ macsᵢ, where the speed of a kernel is in multiples of fp32
measured:  both the median and the minimum of calls that take turns say so, beyond what equal models differ by
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .backend import Executable, Row
from .cost import Latency

#: by how much the times of equal models may differ
_NOISE = 1.05
#: how many sites are named; the others are counted
_NAMED = 4


def predicted_slower(original_macs: int, compiled_macs: int, rows: Sequence[Row]) -> str:
    """The warning that the kernels chosen for `rows` take longer than fp32 would, or "". The counts are of all
    operators at the inputs that the macs of the rows are for."""
    lost = {row.site: row.macs / row.predicted - row.macs for row in rows if row.predicted and row.macs}
    ratio = (compiled_macs + sum(lost.values())) / original_macs if original_macs else 0.0
    if ratio <= _NOISE:
        return ""
    slow = [row for row in rows if lost.get(row.site, 0.0) > 0]
    return f"the compiled model should take {ratio:.2g} × the time of the uncompressed one{_blame(slow, lost)}"


def measured_slower(ours: Latency, theirs: Latency, compiled: Executable, original: Executable) -> str:
    """The warning that `compiled` was measured to take longer than `original`, or ""."""
    if ours.median <= theirs.median * _NOISE or ours.minimum <= theirs.minimum * _NOISE:
        return ""
    before = {row.site: row.milliseconds for row in original.explain()}
    rows = compiled.explain()
    lost = {row.site: (row.milliseconds or 0.0) - (before.get(row.site) or 0.0) for row in rows}
    slow = [row for row in rows if lost[row.site] > (_NOISE - 1) * (before.get(row.site) or 0.0)]
    what = f"the compiled model takes {ours.median:.2f} ms, the uncompressed one {theirs.median:.2f} ms"
    return f"{what} (medians of {ours.runs} calls in turns){_blame(slow, lost)}"


def _blame(slow: Sequence[Row], lost: Mapping[str, float]) -> str:
    if not slow:
        return "; no site is slower by itself: the time goes into what stands between them"
    ordered = sorted(slow, key=lambda row: -lost[row.site])
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    sites = ", ".join(f"{row.site} ({row.kernel})" for row in ordered[:_NAMED])
    instead = " or ".join(dict.fromkeys(row.instead for row in ordered if row.instead))
    return f"; to blame: {sites}{more}" + (f"; {instead} has a fast kernel" if instead else "")
