"""x + f(x) → x: the residual blocks that matter least leave, one branch each or whole layers.

Ranked by what each does to the residual stream (Men et al. 2024, ShortGPT, section 3), or one after the other by what
the outputs lose (Song et al. 2024, SLEB, algorithm 1, with the error of the outputs for the perplexity). Lossy; exact
where f is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

from ..compiler.axes import find_axes
from ..compiler.calibrate import gather
from ..compiler.errors import OptionError, PassError
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.residuals import LAYERS, UNITS, Influence, Residual, Unit, remove, residual_blocks, without
from ..compiler.sensitivity import relative_error
from ..compiler.widths import Clock, Ledger, only_budget, unreachable, within_latency

CRITERIA = ("influence", "error")
_BUDGETS = ("blocks", "macs", "parameters", "latency")


@dataclass(frozen=True)
class PruneDepth(SitePass):
    """Give one of `blocks`, how many leave, and the budgets `macs`, `parameters` and `latency` (measured on the
    target), each a share of the model's own; or `targets` alone: every block with a layer among them leaves.

    A block is a `unit`: a layer, which a `transformers` model can do without (`paretoc.rebuild`), or a branch, the
    attention or the feed-forward of one. `criterion`: influence, 1 − cos of what goes in and what comes out, one run of
    the calibration data; or error, that of the outputs without it, measured anew after each block that leaves, one run
    for every block that stays. Under a budget it is taken for each unit of cost that it saves. `targets` and `ignore`
    choose blocks by their layers.
    """

    name: ClassVar[str] = "prune_depth"
    phase: ClassVar[Phase] = Phase.WIDTH
    positional: ClassVar[str | None] = "blocks"
    kinds: ClassVar[tuple[str, ...]] = LAYERS

    blocks: int | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    criterion: str = "influence"
    unit: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"pass {self.name!r}"
        given = {option: getattr(self, option) for option in _BUDGETS}
        budget = only_budget(given, where) if self.needs_calibration or not self.targets else "blocks"
        for option, valid, fix in (
            ("blocks", self.blocks is None or self.blocks >= 1, "give a number of blocks such as 2"),
            (budget, budget == "blocks" or 0 < given[budget] <= 1, "give the share that stays, such as 0.7"),
            ("criterion", self.criterion in CRITERIA, f"choose among {', '.join(CRITERIA)}"),
            ("unit", self.unit in UNITS, f"choose among {', '.join(UNITS)}"),
        ):
            if not valid:
                raise OptionError(f"{option}={getattr(self, option)!r} is not valid", where=where, fix=fix)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # depends on the options
        return any(getattr(self, option) is not None for option in _BUDGETS)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        found, skipped = residual_blocks(program, cast(Unit, self.unit))
        chosen = self.chooses(program)
        found = [block for block in found if chosen(block.paths)]
        if not found:
            reasons = "; ".join(f"{path}: {why}" for path, why in list(skipped.items())[:3])
            raise PassError(
                f"no {self.unit} may leave: {reasons or 'nothing chosen is added to what goes into it'}",
                where=f"pass {self.name!r}",
                fix="widen targets=, or use another unit=",
            )
        gone, left = self._leaving(program, found, ctx)
        remove(program, gone)
        return PassResult([path for block in gone for path in block.paths], skipped, {"blocks": len(gone)} | left)

    def _leaving(
        self, program: Program, found: list[Residual], ctx: Context
    ) -> tuple[list[Residual], dict[str, float]]:
        """The blocks that leave; under a budget also the share of its cost that is left, and the latency measured."""
        if not self.needs_calibration:
            return found, {}
        if self.blocks is not None:
            if self.blocks > len(found):
                raise OptionError(
                    f"blocks={self.blocks} cannot leave: {len(found)} may",
                    where=f"pass {self.name!r}",
                    fix="ask for fewer, widen targets=, or use unit=branch",
                )
            order = self._order(program, dict.fromkeys(found, 1), ctx)
            return [next(order) for _ in range(self.blocks)], {}
        ledger = Ledger(find_axes(program), "parameters" if self.parameters else "macs")
        whole, saved = ledger.total(), {block: sum(map(ledger.cost, block.gone)) for block in found}
        saved = {block: cost for block, cost in saved.items() if cost}
        least = 1 - sum(saved.values()) / whole
        if self.latency is None:
            share = self.macs or self.parameters or 1.0
            if least > share:
                raise unreachable(share, ledger.what, least)
            gone = _within(share * whole, whole, self._order(program, saved, ctx), saved)
            return gone, {ledger.what: _left(gone, saved, whole)}
        ranked, clock = list(self._order(program, saved, ctx)), Clock(program, ctx.target, ctx.seed)
        gone, taken = within_latency(
            self.latency,
            spend=lambda share: _within(share * whole, whole, iter(ranked), saved),
            fastest=ranked,
            least=least,
            time=lambda blocks: clock(_removed(program, blocks)),
            track=ctx.track,
        )
        return gone, {"macs": _left(gone, saved, whole), "latency": taken}

    def _order(self, program: Program, saved: Mapping[Residual, int], ctx: Context) -> Iterator[Residual]:
        """The blocks, those first that matter least for what they save."""
        if self.criterion == "influence":
            wanted = {block: Influence(block.source.name, block.result.name) for block in saved}
            found = gather(program, list(dict.fromkeys(wanted.values())), ctx.batches, ctx.track)
            yield from sorted(saved, key=lambda block: found[wanted[block]] / saved[block])
            return
        gone: list[Residual] = []
        lost = 0.0
        while left := [block for block in saved if block not in gone]:
            errors = {
                block: relative_error(program, without(program, [*gone, block]), ctx.batches) ** 2
                for block in ctx.track(left, "measuring sensitivity")
            }
            block = min(left, key=lambda block: (errors[block] - lost) / saved[block])
            lost = errors[block]
            gone.append(block)
            yield block


def _removed(program: Program, blocks: list[Residual]) -> Program:
    """What is timed: a copy as it would be left, without the weights."""
    copy = program.clone()
    remove(copy, blocks)
    return copy


def _within(budget: float, cost: int, order: Iterator[Residual], saved: Mapping[Residual, int]) -> list[Residual]:
    """The first blocks of an order, until the cost is within a budget that can be met."""
    gone = []
    while cost > budget:
        block = next(order)
        gone.append(block)
        cost -= saved[block]
    return gone


def _left(gone: Iterable[Residual], saved: Mapping[Residual, int], whole: int) -> float:
    return 1 - sum(saved[block] for block in gone) / whole
