"""W₁ `[C, I]`, W₂ `[O, C]` → the same with fewer channels C: those that matter least leave, the others make up for it.

Structured pruning by groups of weights that share an axis (Fang et al. 2023, DepGraph, section 3), which `find_axes`
finds; the criteria are in `importance`, the least squares of the readers in `refit`, budgets in `widths`. Lossy; exact
where what leaves was zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from torch import Tensor

from ..compiler.axes import Axes, Axis, find_axes
from ..compiler.axis_kinds import KINDS, axis_kinds
from ..compiler.axis_moves import slice_all
from ..compiler.backend import channel_multiple
from ..compiler.calibrate import Stream
from ..compiler.errors import OptionError, PassError
from ..compiler.importance import Criterion
from ..compiler.importance import measure as importance
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.refit import fitted_readers
from ..compiler.registry import registry
from ..compiler.sites import site_of
from ..compiler.widths import Clock, Ledger, only_budget, within_latency, worth

_BUDGETS = ("ratio", "macs", "parameters", "latency")


@dataclass(frozen=True)
class PruneWidth(SitePass):
    """Give one of `ratio` (the share of channels that stays in every axis) and the budgets `macs`, `parameters` and
    `latency` (on the target), each a share of the model's own.

    `criterion` ranks the channels: hessian, activation, taylor, magnitude or random. `refit`: the layers that read an
    axis are fitted anew to their outputs on the calibration data. `axes` says which kinds of axes lose channels, of
    hidden, heads, head_width and stream; `targets` and `ignore`, by the layers that make or read them. Leaving a
    channel out equals setting its weights to zero, except on a stream that norms take their statistics over. Widths are
    multiples of `round_to`, by default of what the kernels of the target like; an axis keeps one such step at least.
    """

    name: ClassVar[str] = "prune_width"
    phase: ClassVar[Phase] = Phase.WIDTH
    positional: ClassVar[str | None] = "ratio"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    ratio: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    criterion: str | Criterion = "hessian"
    refit: bool = True
    round_to: int | None = None
    axes: tuple[str, ...] = ("hidden", "heads")
    damp: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"pass {self.name!r}"
        given = only_budget({option: getattr(self, option) for option in _BUDGETS}, where)
        object.__setattr__(self, "axes", (self.axes,) if isinstance(self.axes, str) else tuple(self.axes))
        for option, valid, fix in (
            (given, 0 < getattr(self, given) <= 1, "give the share that stays, such as 0.7"),
            ("round_to", self.round_to is None or self.round_to >= 1, "give a number of channels such as 8"),
            ("damp", self.damp >= 0, "give a share of the mean of diag(H) such as 0.001"),
            ("axes", self.axes and set(self.axes) <= set(KINDS), f"choose among {', '.join(KINDS)}"),
        ):
            if not valid:
                raise OptionError(f"{option}={getattr(self, option)!r} is not valid", where=where, fix=fix)
        self.ranking()

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # depends on the options
        return self.refit or not self.ranking().data_free

    def ranking(self) -> Criterion:
        return registry().criterion(self.criterion) if isinstance(self.criterion, str) else self.criterion

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result, axes = PassResult(), find_axes(program)
        steps = self._steps(axes, ctx, result)
        scores = importance(list(steps), self.ranking(), ctx.batches, ctx.track)
        widths, measured = self._widths(axes, steps, scores, ctx)
        kept = {axis: _best(scores[axis], width) for axis, width in widths.items() if width < axis.size}
        result.metrics = {"axes": len(kept), "channels": sum(widths.values()) / sum(axis.size for axis in widths)}
        result.metrics |= measured
        result.matched = list(dict.fromkeys(path for axis in kept for path in _layers(axis)))
        if self.refit:
            fitted, result.warnings = fitted_readers(kept, Stream(program, ctx.batches), self.damp, ctx.track)
            for name, value in fitted.items():
                program.set(name, value)
        slice_all(program, kept)
        return result

    def _steps(self, axes: Axes, ctx: Context, result: PassResult) -> dict[Axis, int]:
        """The axes that lose channels, and how many leave at once; fills in what is skipped, and why."""
        kinds, ranking, chosen = axis_kinds(axes), self.ranking(), self.chooses(axes.program)
        multiple = self.round_to or channel_multiple(registry().backend(ctx.target))
        steps: dict[Axis, int] = {}
        for axis in axes:
            layers, kind = _layers(axis), kinds.get(axis, "")
            if not chosen(layers):
                continue
            step = _step(axis, multiple)
            reason = _refusal(axis, kind, self.axes) or (
                f"{axis} has no {step} channels besides those that leave" if step >= axis.size else ranking.refuse(axis)
            )
            if reason is None:
                steps[axis] = step
            elif kind in self.axes or self.targets:
                result.skipped |= dict.fromkeys(layers, reason)
        narrower = {path for axis in steps for path in _layers(axis)}
        result.skipped = {path: reason for path, reason in result.skipped.items() if path not in narrower}
        if not steps:
            found = list(dict.fromkeys(result.skipped.values()))
            reasons = "; ".join(found[:3]) or "no layer makes channels that another reads"
            raise PassError(
                f"no channel may leave: {reasons}",
                where=f"pass {self.name!r}",
                fix="widen targets= or axes=, or lower round_to=: `paretoc axes MODEL` lists the axes",
            )
        return steps

    def _widths(
        self, axes: Axes, steps: Mapping[Axis, int], scores: Mapping[Axis, Tensor], ctx: Context
    ) -> tuple[dict[Axis, int], dict[str, float]]:
        """The channels that stay in each axis; under a latency also the share of the multiply–accumulates that is
        left, which predicts it, and the latency measured."""
        if self.ratio is not None:
            return {axis: _width(axis, self.ratio, step) for axis, step in steps.items()}, {}
        tried = {axis: _width(axis, _TRIED, step) for axis, step in steps.items()}
        prices = worth(scores, tried, ctx.batches, self.damp if self.refit else None, ctx.track)
        ledger = Ledger(axes, "parameters" if self.parameters else "macs")
        if self.latency is None:
            return ledger.spend(steps, prices, self.macs or self.parameters or 1.0), {}
        clock, least = Clock(axes.program, ctx.target, ctx.seed), dict(steps)
        found, taken = within_latency(
            self.latency,
            spend=lambda share: ledger.spend(steps, prices, share),
            fastest=least,
            least=ledger.share(least),
            time=lambda widths: clock(_sliced(axes, widths)),
            track=ctx.track,
        )
        return found, {"macs": ledger.share(found), "latency": taken}


def _sliced(axes: Axes, widths: Mapping[Axis, int]) -> Program:
    """A copy with the first channels of each axis: it takes as long as with the best."""
    narrow = axes.program.clone()
    same = dict(zip(axes, find_axes(narrow), strict=True))
    slice_all(narrow, {same[axis]: range(width) for axis, width in widths.items()})
    return narrow


def _refusal(axis: Axis, kind: str, chosen: Sequence[str]) -> str | None:
    """Why an axis keeps its channels, or None."""
    if pin := axis.why("slice") or (kind != "stream" and axis.why("zero")) or None:
        return f"{axis}: {pin.why}"
    if not kind:
        return f"{axis} is not made and read by layers, or only a part of a group of heads"
    if kind not in chosen:
        return f"{axis} is of the kind {kind!r}, which axes= leaves out"
    return None


def _layers(axis: Axis) -> list[str]:
    """The paths of the layers that make or read an axis."""
    sites = (site_of(axis.program, node) for node in (*axis.writers, *axis.readers))
    return list(dict.fromkeys(site.path for site in sites if site is not None))


def _step(axis: Axis, multiple: int) -> int:
    """How many channels are a multiple of so many places wherever the axis runs: a head is as many as its width."""
    places = gcd(*(int((use.channels == 0).sum()) for use in axis.uses))
    return multiple // gcd(multiple, places)


def _width(axis: Axis, share: float, step: int) -> int:
    """The multiple of a step that is nearest to a share of an axis, at least one step; or all of it."""
    return min(max(round(axis.size * share / step), 1) * step, axis.size)


def _best(scores: Tensor, width: int) -> Tensor:
    """The channels that are worth most `[width]`, in their order; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:width].sort().values


#: the share of an axis that is left when it is measured what this does to the outputs
_TRIED = 0.5
