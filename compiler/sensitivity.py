"""How much each weight may be squeezed: what the outputs lose when one weight alone is stored under each candidate
encoding, and a budget of bits spent where it hurts least.

The knapsack of HAWQ-V2 (Dong et al. 2020, section 3.3) with measured losses: minimise Σ loss over one encoding for each
weight, subject to Σ bits ≤ budget. Losses of different weights are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import Tensor, fx

from .calibrate import FlatBatch, Stream
from .encodings import Arrays, Encoding, parse_encoding
from .errors import CalibrationError, OptionError
from .program import Program, operands
from .protocols import NO_EVIDENCE, Evidence, Fitter
from .sites import Site
from .statistics import Statistic

Track = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Loss:
    """One weight under one encoding: its bytes, and the squared relative error that this causes at the outputs."""

    site: str
    encoding: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Sensitivity:
    """Losses of every weight under every candidate; `weights` counts the numbers in each. Ask it for any budget."""

    losses: tuple[Loss, ...]
    weights: Mapping[str, int]
    data: str

    def allocate(self, effective_bits: float, sites: Sequence[str] | None = None) -> dict[str, Encoding]:
        """Site → encoding, of least total loss within `effective_bits` stored bits a weight, scales included.

        `sites` (default: all) share the budget. Raises OptionError when even the smallest candidates take more, or
        when a site was not measured.
        """
        sites = list(self.weights) if sites is None else list(sites)
        if unknown := [site for site in sites if site not in self.weights]:
            raise OptionError(
                f"the sensitivity of {unknown[0]!r} was not measured",
                where="spending the budget",
                fix="measure it with the same targets=, or leave sensitivity= out",
            )
        candidates = [[loss for loss in self.losses if loss.site == site] for site in sites]
        sizes = [[8 * loss.bytes for loss in offered] for offered in candidates]
        count = sum(self.weights[site] for site in sites)
        least = sum(map(min, sizes))
        if least > effective_bits * count:
            raise OptionError(
                f"the smallest candidates take {least / count:.2f} bits a weight, "
                f"more than effective_bits={effective_bits}",
                where="spending the budget",
                fix="raise effective_bits, or offer smaller candidates",
            )
        chosen = knapsack([[loss.error for loss in offered] for offered in candidates], sizes, effective_bits * count)
        return {s: parse_encoding(o[i].encoding) for s, o, i in zip(sites, candidates, chosen, strict=True)}

    def effective_bits(self, chosen: Mapping[str, Encoding]) -> float:
        """Stored bits a weight of an allocation."""
        size = {(loss.site, loss.encoding): loss.bytes for loss in self.losses}
        return 8 * sum(size[s, str(e)] for s, e in chosen.items()) / sum(self.weights[s] for s in chosen)

    def bits(self) -> dict[str, float]:
        """Candidate → the bits it stores a weight in, scales included, over all that were measured under it."""
        size: dict[str, list[int]] = {}
        for loss in self.losses:
            total = size.setdefault(loss.encoding, [0, 0])
            total[0] += 8 * loss.bytes
            total[1] += self.weights[loss.site]
        return {encoding: stored / count for encoding, (stored, count) in size.items()}

    def table(self) -> dict[str, dict[str, float]]:
        """Site → encoding → relative error at the outputs, the most sensitive site first."""
        rows: dict[str, dict[str, float]] = {site: {} for site in self.weights}
        for loss in self.losses:
            rows[loss.site][loss.encoding] = loss.error**0.5
        return dict(sorted(rows.items(), key=lambda row: -max(row[1].values())))

    def __str__(self) -> str:
        rows = self.table()
        names = list(dict.fromkeys(loss.encoding for loss in self.losses))
        wide = max(len("site"), *map(len, rows))
        lines = [f"relative output error with one weight encoded, {self.data}"]
        lines.append("  ".join(["site".ljust(wide), *names]))
        for site, errors in rows.items():
            cells = [(f"{errors[n]:.5f}" if n in errors else "").rjust(len(n)) for n in names]
            lines.append("  ".join([site.ljust(wide), *cells]))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {"losses": [asdict(loss) for loss in self.losses], "weights": dict(self.weights), "data": self.data}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` returned."""
        losses = tuple(Loss(**loss) for loss in values["losses"])
        return cls(losses, dict(values["weights"]), str(values["data"]))


def knapsack(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> list[int]:
    """One candidate for each item, of least total loss within a budget of sizes that can be met: their indices."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag

    one_each = block_diag([[[1.0] * len(offered)] for offered in losses], format="csr")
    loss, size = ([value for offered in table for value in offered] for table in (losses, sizes))
    found = milp(
        loss,
        integrality=[1] * len(loss),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([size], ub=budget)],
    )
    taken = iter(share > 0.5 for share in found.x)
    return [[next(taken) for _ in offered].index(True) for offered in losses]


def split(batches: Sequence[FlatBatch]) -> tuple[list[FlatBatch], list[FlatBatch]]:
    """(batches to fit on, batches to measure on): every fourth is held out, the last one at least.

    Raises CalibrationError when there is only one.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "one batch cannot be fitted to and measured on",
            where="holding out calibration batches",
            fix="pass at least two calibration batches",
        )
    held = {i for i in range(len(batches)) if i % 4 == 3} or {len(batches) - 1}
    return [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in sorted(held)]


def measure_losses(
    program: Program,
    sites: Sequence[Site],
    candidates: Callable[[Site], Sequence[Encoding]],
    fitter: Fitter,
    batches: Sequence[FlatBatch],
    track: Track = lambda items, _: items,
) -> Sensitivity:
    """Store one weight at a time under each candidate, fitted to some of the batches, and run the others.

    Only what comes after a weight runs again. Cost: one such run for each candidate of each weight.
    """
    fitted, held = split(batches)
    trial = program.clone()
    values = OutputValues.of(trial)
    want = Stream(trial, held).advance(trial.placeholders[-1], values)
    nodes = {n.name: n for n in trial.graph.nodes}
    fitting, running = Stream(program, fitted), Stream(trial, held)
    losses, weights = [], {}
    for site in track(sorted(sites, key=lambda s: s.input), "measuring sensitivity"):
        name, weight = str(program.weight_name(site.weight)), program.weight_value(site.weight)
        evidence: Evidence = NO_EVIDENCE
        if not fitter.data_free:
            wanted = fitter.needs(site)
            found = fitting.advance(site.input, wanted)
            evidence = {type(s): found[s] for s in wanted}
        running.advance(nodes[site.input.name])
        for encoding in candidates(site):
            stored = fitter.fit(encoding, weight, evidence)
            trial.set(name, encoding.decode(stored, tuple(weight.shape)).to(weight.dtype))
            got = running.advance(running.place, values)
            losses.append(Loss(site.path, str(encoding), encoding.nbytes(tuple(weight.shape)), output_error(want, got)))
        trial.set(name, weight)
        weights[site.path] = prod(weight.shape)
    samples = sum(b[0].shape[0] if b and b[0].ndim else 1 for b in held)
    return Sensitivity(tuple(losses), weights, f"{samples} held-out samples of the calibration data")


@dataclass(frozen=True)
class OutputValues(Statistic):
    """The values themselves, one for each batch."""

    @classmethod
    def of(cls, program: Program) -> list[OutputValues]:
        """Of every floating output that is computed."""
        outputs = [n for n in program.outputs if n.op == "call_function" and n.meta["val"].is_floating_point()]
        return [cls(n.name) for n in dict.fromkeys(outputs)]

    def update(self, state: Any, *values: Tensor) -> Any:
        return [*(state or []), values[0].detach().clone()]


def output_error(want: Mapping[Statistic, list[Tensor]], got: Mapping[Statistic, list[Tensor]]) -> float:
    """Σ‖ŷ − y‖² / Σ‖y‖² over batches, the mean over outputs."""
    shares = []
    for output, exact in want.items():
        moved = sum(float((b.double() - a.double()).square().sum()) for a, b in zip(exact, got[output], strict=True))
        total = sum(float(a.double().square().sum()) for a in exact)
        shares.append(moved / total if total else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def relative_error(original: Program, compiled: Program, batches: Sequence[FlatBatch]) -> float:
    """√(Σ‖ŷ − y‖² / Σ‖y‖²) of the floating outputs, the worst output."""
    moved: dict[int, list[float]] = {}
    for batch in batches:
        for index, (a, b) in enumerate(zip(original.run(batch), compiled.run(batch), strict=True)):
            if a.is_floating_point():
                total = moved.setdefault(index, [0.0, 0.0])
                total[0] += float((a.double() - b.double()).square().sum())
                total[1] += float(a.double().square().sum())
    return max(((e / s) ** 0.5 for e, s in moved.values() if s), default=0.0)


@dataclass(frozen=True)
class Undo:
    """What one site read before it was quantised: enough to give it back."""

    node: str
    source: str
    operand: int
    weight: Tensor
    encoding: Encoding | None
    arrays: Arrays

    @classmethod
    def of(cls, program: Program, site: Site) -> Undo:
        operand = list(site.node.args).index(site.weight)
        encoding = program.encoding(site.weight)
        arrays = {} if encoding is None else program.stored_arrays(site.weight)
        return cls(site.node.name, site.input.name, operand, program.weight_value(site.weight), encoding, arrays)

    def __call__(self, program: Program, nodes: Mapping[str, fx.Node]) -> None:
        node = nodes[self.node]
        weight = operands(node)[self.operand]
        if program.encoding(weight) != self.encoding:  # not given back yet through another site that shares it
            dense = program.restore(weight, self.weight)
            if self.encoding is not None:
                program.encode(dense, self.encoding, self.arrays)
        node.update_arg(1 - self.operand, nodes[self.source])


def back_off(
    quantised: Program,
    undo: Mapping[str, Sequence[Undo]],
    drop: Callable[[Program], float],
    max_drop: float,
    track: Track = lambda items, _: items,
) -> tuple[list[str], dict[str, float]]:
    """(sites to give back, drop caused by each site alone): as many sites stay quantised as `max_drop` allows.

    Sites go back most harmful first; how many is found by bisection, and the result is measured, not assumed.
    """

    def keeping(kept: Sequence[str]) -> float:
        mixed = quantised.clone()
        give_back(mixed, [step for path, steps in undo.items() if path not in kept for step in steps])
        return drop(mixed)

    if keeping(list(undo)) <= max_drop:
        return [], {}
    alone = {path: keeping([path]) for path in track(list(undo), "measuring sensitivity")}
    order = sorted(alone, key=lambda path: alone[path])
    low, high = 0, len(order) - 1  # at least one goes back
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keeping(order[:middle]) <= max_drop else (low, middle - 1)
    while low and keeping(order[:low]) > max_drop:
        low -= 1
    return order[low:], alone


def give_back(program: Program, steps: Sequence[Undo]) -> None:
    """Undo in place; shapes are as they were, so that the graph runs again at once."""
    nodes = {n.name: n for n in program.graph.nodes}
    for step in steps:
        step(program, nodes)
    program.graph.eliminate_dead_code()
    program.module.recompile()
