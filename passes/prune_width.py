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
from ..compiler.axis_moves import resized, slice_all
from ..compiler.backend import channel_multiple
from ..compiler.calibrate import Stream
from ..compiler.cost import measure
from ..compiler.errors import OptionError, PassError
from ..compiler.importance import Criterion
from ..compiler.importance import measure as importance
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.refit import fitted_readers
from ..compiler.registry import registry
from ..compiler.sites import site_of
from ..compiler.targets import select
from ..compiler.widths import Ledger, worth

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
        given = [option for option in _BUDGETS if getattr(self, option) is not None]
        if len(given) != 1:
            raise OptionError(
                f"{' and '.join(given) or 'nothing'} says how much is to go",
                where=where,
                fix=f"give one of {', '.join(_BUDGETS)}",
            )
        object.__setattr__(self, "axes", (self.axes,) if isinstance(self.axes, str) else tuple(self.axes))
        for option, valid, fix in (
            (given[0], 0 < getattr(self, given[0]) <= 1, "give the share that stays, such as 0.7"),
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
        widths = self._widths(axes, steps, scores, ctx)
        kept = {axis: _best(scores[axis], width) for axis, width in widths.items() if width < axis.size}
        result.metrics = {"axes": len(kept), "channels": sum(widths.values()) / sum(axis.size for axis in widths)}
        result.matched = list(dict.fromkeys(path for axis in kept for path in _layers(axis)))
        if self.refit:
            fitted, result.warnings = fitted_readers(kept, Stream(program, ctx.batches), self.damp, ctx.track)
            for name, value in fitted.items():
                program.set(name, value)
        slice_all(program, kept)
        return result

    def _steps(self, axes: Axes, ctx: Context, result: PassResult) -> dict[Axis, int]:
        """The axes that lose channels, and how many leave at once; fills in what is skipped, and why."""
        kinds, ranking = axis_kinds(axes), self.ranking()
        wanted, ignored = self._named(axes.program, self.targets), self._named(axes.program, self.ignore)
        multiple = self.round_to or channel_multiple(registry().backend(ctx.target))
        steps: dict[Axis, int] = {}
        for axis in axes:
            layers, kind = _layers(axis), kinds.get(axis, "")
            if (self.targets and not wanted & set(layers)) or ignored & set(layers):
                continue
            step = _step(axis, multiple)
            reason = _refusal(axis, kind, self.axes) or (
                f"{axis} has no {step} channels besides those that leave" if step >= axis.size else ranking.refuse(axis)
            )
            if reason is None:
                steps[axis] = step
            elif kind in self.axes or self.targets:
                result.skipped |= dict.fromkeys(layers, reason)
        chosen = {path for axis in steps for path in _layers(axis)}
        result.skipped = {path: reason for path, reason in result.skipped.items() if path not in chosen}
        if not steps:
            found = list(dict.fromkeys(result.skipped.values()))
            reasons = "; ".join(found[:3]) or "no layer makes channels that another reads"
            raise PassError(
                f"no channel may leave: {reasons}",
                where=f"pass {self.name!r}",
                fix="widen targets= or axes=, or lower round_to=: `paretoc axes MODEL` lists the axes",
            )
        return steps

    def _named(self, program: Program, patterns: tuple[str, ...]) -> set[str]:
        found = select(program, patterns, (), self.kinds, where=f"pass {self.name!r}") if patterns else None
        return {site.path for site in found.sites} if found else set()

    def _widths(
        self, axes: Axes, steps: Mapping[Axis, int], scores: Mapping[Axis, Tensor], ctx: Context
    ) -> dict[Axis, int]:
        if self.ratio is not None:
            return {axis: _width(axis, self.ratio, step) for axis, step in steps.items()}
        tried = {axis: _width(axis, _TRIED, step) for axis, step in steps.items()}
        prices = worth(scores, tried, ctx.batches, self.damp if self.refit else None, ctx.track)
        ledger = Ledger(axes, "parameters" if self.parameters else "macs")
        if self.latency is not None:
            return _fast_enough(ledger, steps, prices, self.latency, ctx)
        return ledger.spend(steps, prices, self.macs or self.parameters or 1.0)


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
#: how often the widths under a latency are halved in, and the seconds that each candidate is measured
_HALVINGS, _SECONDS = 5, 3.0


def _fast_enough(
    ledger: Ledger, steps: Mapping[Axis, int], prices: Mapping[Axis, Tensor], share: float, ctx: Context
) -> dict[Axis, int]:
    """The widths with most multiply–accumulates that take at most `share` of the latency, by bisection."""
    program, backend = ledger.axes.program, registry().backend(ctx.target)
    whole, inputs = backend.lower(program, {"seed": ctx.seed}), program.users_example()

    def latency(widths: Mapping[Axis, int]) -> float:
        narrow = program.clone()
        same = dict(zip(ledger.axes, find_axes(narrow), strict=True))
        slice_all(narrow, {same[axis]: range(width) for axis, width in widths.items()})
        lowered = backend.lower(narrow, {"seed": ctx.seed})
        calls = {"whole": lambda: whole.run(inputs), "narrow": lambda: lowered.run(inputs)}
        taken = measure(calls, runs=100, budget_s=_SECONDS)
        return taken["narrow"].median / taken["whole"].median

    least = dict(steps)
    if (reached := latency(least)) > share:
        raise OptionError(
            f"{share:.3g} of the latency cannot be reached: {reached:.3g} is the least",
            where="spending the budget on widths",
            fix="raise the budget, prune more kinds of axes (axes=), or lower round_to=",
        )
    with resized(least):
        left = ledger.total()
    low, high, found = left / ledger.total(), 1.0, least
    for _ in ctx.track(range(_HALVINGS), "measuring latency"):
        middle = (low + high) / 2
        widths = ledger.spend(steps, prices, middle)
        if latency(widths) <= share:
            low, found = middle, widths
        else:
            high = middle
    return found
