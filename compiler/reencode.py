"""Re-encode, the first of the four moves: change how the weights of sites are stored, and choose what is stored.

Under an N:M pattern only the values that it keeps are encoded anew. A fitter that needs data meets the sites in graph
order and sees the inputs that the part already encoded produces.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, fx

from .calibrate import Stream
from .checkpoint import Checkpoint, Stored, read, write
from .encodings import NM, Dense, Encoding
from .errors import PassError
from .memory import trim
from .passes import Context, PassResult, SitePass
from .program import Program
from .protocols import NO_EVIDENCE, Adaptive, Evidence, Fitter, collected_warnings, fit
from .sites import Site, weight_sites
from .statistics import Statistic

#: weights and what they are to be stored as
Jobs = Sequence[tuple[Site, Encoding]]
_Task = tuple[Encoding, Tensor, Evidence]
#: what is stored, and what the fitter warned of
_Done = tuple[Stored, list[str]]
#: how many groups of sites an executor may still be fitting while the data run on
_AHEAD = 4


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
        jobs: Jobs,
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
            done = ctx.map(partial(_fit, fitter), _tasks(program, jobs, [NO_EVIDENCE] * len(jobs)), self.name)
            stored, warnings = _collected(jobs, done)
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


def _tasks(program: Program, jobs: Jobs, evidence: Sequence[Evidence]) -> list[_Task]:
    weights = [program.weight_value(site.weight) for site, _ in jobs]
    return [(e, w, seen) for (_, e), w, seen in zip(jobs, weights, evidence, strict=True)]


def _collected(jobs: Jobs, done: Iterable[_Done]) -> tuple[list[Stored], list[str]]:
    done = list(done)
    texts = [f"{site.path}: {text}" for (site, _), (_, said) in zip(jobs, done, strict=True) for text in said]
    return [stored for stored, _ in done], texts


def _encode(program: Program, jobs: Jobs, stored: Sequence[Stored]) -> None:
    for (site, _), (encoding, arrays) in zip(jobs, stored, strict=True):
        program.encode(site.weight, encoding, arrays)


def _fit(fitter: Fitter | None, task: _Task) -> _Done:
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
    jobs: Jobs,
    ctx: Context,
    fitter: Fitter,
    label: str,
    checkpoint: Checkpoint,
) -> list[str]:
    """Sites that read the same input together, so that what is gathered is that of one input at a time; on an
    executor, and where no fit waits for one before it, of a few inputs."""
    seen_at: dict[str, list[Site]] = defaultdict(list)
    for site in weight_sites(watch):
        seen_at[str(watch.weight_name(site.weight))].append(site)
    groups: dict[fx.Node, list[tuple[Site, Encoding]]] = defaultdict(list)
    for site, encoding in jobs:
        groups[seen_at[str(program.weight_name(site.weight))][0].input].append((site, encoding))
    stream = Stream(watch, ctx.batches)
    warnings: list[str] = []
    started: deque[tuple[Path | None, Jobs, Iterator[_Done]]] = deque()
    skipped: list[fx.Node] = []

    def finish(ahead: int) -> None:
        """Wait until no more than so many of the groups are being fitted."""
        while len(started) > ahead:
            file, group, done = started.popleft()
            stored, texts = _collected(group, done)
            write(file, stored)
            _encode(program, group, stored)
            warnings.extend(texts)
            trim()

    for place in ctx.track(sorted(groups), label):
        group = groups[place]
        wanted = [[fitter.needs(s) for s in seen_at[str(program.weight_name(site.weight))]] for site, _ in group]
        statistics = list(dict.fromkeys(s for uses in wanted for use in uses for s in use))
        file = checkpoint.step([program.weight_value(s.weight) for s, _ in group], [e for _, e in group])
        if (stored := read(file)) is not None:
            stream.derive(place, statistics)  # while the weights are what they were then
            _encode(program, group, stored)
            skipped.append(place)
            continue
        while skipped:  # step by step, as the run that stored them did: each holds the weights that it runs
            stream.advance(skipped.pop(0))
        found = stream.advance(place, statistics)
        evidence = [_combined(uses, found) for uses in wanted]
        warnings += _doubts(group, evidence, statistics)
        started.append((file, group, ctx.start(partial(_fit, fitter), _tasks(program, group, evidence))))
        del found, evidence  # they may be as large as several layers
        finish(0 if ctx.executor is None or watch is program else _AHEAD)
    finish(0)
    return warnings


def _doubts(group: Jobs, evidence: Sequence[Evidence], statistics: Sequence[Statistic]) -> list[str]:
    """What makes the evidence of a weight a poor guide. What weights have in common is looked at once."""
    of_kind = {type(s): s for s in statistics}
    said: dict[int, str | None] = {}
    texts = []
    for (site, _), seen in zip(group, evidence, strict=True):
        for kind, value in seen.items():
            if id(value) not in said:
                said[id(value)] = of_kind[kind].doubt(value)
            if text := said[id(value)]:
                texts.append(f"{site.path}: {text}")
    return texts


def _combined(uses: Sequence[Sequence[Statistic]], found: dict[Statistic, object]) -> Evidence:
    """Statistics of the same kind at all uses of one weight, in one."""
    return {type(same[0]): same[0].combine([found[s] for s in same]) for same in zip(*uses, strict=True)}
