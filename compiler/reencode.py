"""Re-encode, the first of the four moves: change how the weights of sites are stored, and choose what is stored.

Under an N:M pattern only the values that it keeps are encoded anew. A fitter that needs data meets the sites in graph
order and sees the inputs that the part already encoded produces.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, fx

from .calibrate import Stream
from .checkpoint import Checkpoint, Stored, read, write
from .encodings import NM, Dense, Encoding
from .errors import PassError
from .passes import Context, PassResult, SitePass
from .program import Program
from .protocols import NO_EVIDENCE, Adaptive, Evidence, Fitter, collected_warnings, fit
from .sites import Site, weight_sites
from .statistics import Statistic


@dataclass(frozen=True)
class EncodePass(SitePass):
    """A pass that changes how the weights of its sites are stored. Subclass with `encoding`; or with an `apply` of
    your own, out of `distinct` and `store`."""

    def encoding(self) -> Encoding:
        """What a weight is stored as."""
        raise NotImplementedError

    def refuse(self, program: Program, site: Site) -> str:
        """Why this weight stays as it is, or nothing."""
        return refusal(program, site)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        result.warnings += self.store(program, [(s, self.encoding()) for s in self.distinct(program, result)], ctx)
        return result

    def distinct(self, program: Program, result: PassResult) -> list[Site]:
        """The sites to encode, one where several share a weight; fills in what matched and what is skipped, and why.

        Raises PassError when none is left.
        """
        chosen: dict[str, Site] = {}
        for site in self.sites(program):
            if reason := self.refuse(program, site):
                result.skipped[site.path] = reason
            else:
                chosen.setdefault(str(program.weight_name(site.weight)), site)
                result.matched.append(site.path)
        if not chosen:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(result.skipped.items())[:3])
            raise PassError(
                f"no weight can be encoded: {reasons}",
                where=f"pass {self.name!r}",
                fix="widen targets=, or use another encoding",
            )
        return list(chosen.values())

    def store(
        self,
        program: Program,
        jobs: Sequence[tuple[Site, Encoding]],
        ctx: Context,
        fitter: Fitter | None = None,
        watch: Program | None = None,
        checkpoint: str | None = None,
    ) -> list[str]:
        """Encode the weight of each site, at all its consumers. Data come from `watch`, a clone made before the
        rewrite, or from the program as it is rewritten. What is fitted to data is kept under the directory
        `checkpoint`, and not fitted again. Returns what the fitter warns of."""
        jobs = [(site, inside(program.encoding(site.weight), encoding)) for site, encoding in jobs]
        if fitter is None or fitter.data_free:
            stored, warnings = _fitted(program, jobs, [NO_EVIDENCE] * len(jobs), ctx, fitter, self.name)
            _encode(program, jobs, stored)
        else:
            facts = (fitter, watch is None, *(t for batch in ctx.batches for t in batch))
            kept = Checkpoint(checkpoint, *facts)
            warnings = _store_with_data(program, watch or program, jobs, ctx, fitter, self.name, kept)
        program.refresh()
        return warnings


def refusal(program: Program, site: Site) -> str:
    """Why the weight of a site cannot be encoded without harm to something else, or nothing."""
    other = next((user for user in site.weight.users if user.target != site.node.target), None)
    if other is not None:
        return f"its weight is also read by {other.target}"
    return stored_already(program, site)


def stored_already(program: Program, site: Site) -> str:
    """Says so when the weight, or what an N:M pattern keeps of it, is no plain tensor any more."""
    current = program.encoding(site.weight)
    values = current.values if isinstance(current, NM) else current
    return "" if values is None or isinstance(values, Dense) else f"already stored as {current}"


def inside(current: Encoding | None, encoding: Encoding) -> Encoding:
    """The encoding, nested in the N:M pattern that the weight has already."""
    return replace(current, values=encoding) if isinstance(current, NM) else encoding


def _fitted(
    program: Program,
    jobs: Sequence[tuple[Site, Encoding]],
    evidence: Sequence[Evidence],
    ctx: Context,
    fitter: Fitter | None,
    label: str,
) -> tuple[list[Stored], list[str]]:
    weights = [program.weight_value(site.weight) for site, _ in jobs]
    tasks = [(e, w, seen) for (_, e), w, seen in zip(jobs, weights, evidence, strict=True)]
    done = ctx.map(partial(_fit, fitter), tasks, label)
    texts = [f"{site.path}: {text}" for (site, _), (_, said) in zip(jobs, done, strict=True) for text in said]
    return [stored for stored, _ in done], texts


def _encode(program: Program, jobs: Sequence[tuple[Site, Encoding]], stored: Sequence[Stored]) -> None:
    for (site, _), (encoding, arrays) in zip(jobs, stored, strict=True):
        program.encode(site.weight, encoding, arrays)


def _fit(fitter: Fitter | None, task: tuple[Encoding, Tensor, Evidence]) -> tuple[Stored, list[str]]:
    encoding, weight, evidence = task
    with collected_warnings() as texts:  # they travel back with the arrays, from whatever worker this runs in
        if fitter is None:
            arrays = encoding.encode(weight)
        elif isinstance(fitter, Adaptive) and not fitter.refuse(encoding):
            encoding, arrays = fitter.adapt(encoding, weight, evidence)
        else:
            arrays = fit(fitter, encoding, weight, evidence)
    return (encoding, arrays), texts


def _store_with_data(
    program: Program,
    watch: Program,
    jobs: Sequence[tuple[Site, Encoding]],
    ctx: Context,
    fitter: Fitter,
    label: str,
    checkpoint: Checkpoint,
) -> list[str]:
    """Sites that read the same input together, so that what is gathered is that of one input at a time."""
    seen_at: dict[str, list[Site]] = defaultdict(list)
    for site in weight_sites(watch):
        seen_at[str(watch.weight_name(site.weight))].append(site)
    groups: dict[fx.Node, list[tuple[Site, Encoding]]] = defaultdict(list)
    for site, encoding in jobs:
        groups[seen_at[str(program.weight_name(site.weight))][0].input].append((site, encoding))
    stream = Stream(watch, ctx.batches)
    warnings: list[str] = []
    for place in ctx.track(sorted(groups), label):
        group = groups[place]
        wanted = [[fitter.needs(s) for s in seen_at[str(program.weight_name(site.weight))]] for site, _ in group]
        statistics = list(dict.fromkeys(s for uses in wanted for use in uses for s in use))
        file = checkpoint.step([program.weight_value(s.weight) for s, _ in group], [e for _, e in group])
        if (stored := read(file)) is not None:
            stream.derive(place, statistics)  # while the weights are what they were then
            _encode(program, group, stored)
            continue
        found = stream.advance(place, statistics)
        stored, texts = _fitted(program, group, [_combined(uses, found) for uses in wanted], ctx, fitter, label)
        write(file, stored)
        _encode(program, group, stored)
        warnings += texts
    return warnings


def _combined(uses: Sequence[Sequence[Statistic]], found: dict[Statistic, object]) -> Evidence:
    """Statistics of the same kind at all uses of one weight, in one."""
    return {type(same[0]): same[0].combine([found[s] for s in same]) for same in zip(*uses, strict=True)}
