"""What was gained and what it cost: a table for the terminal, a dictionary, and a self-contained HTML page."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table

from . import cost as costs
from .backend import Executable, Explanation, Predicting, Row
from .backend import notes as backend_notes
from .registry import registry
from .sensitivity import Sensitivity
from .slower import measured_slower, predicted_slower
from .verify import Fidelity

if TYPE_CHECKING:
    from .driver import Compilation

#: how many sites the terminal lists by their sensitivity
_SENSITIVE_SITES = 8


@dataclass(frozen=True)
class Report:
    """Original and compiled, side by side, and one entry per pass.

    Sizes are bytes of the stored tensors; `stored_bytes` those of the model file, which may need more than the encoding
    (a target without an n:m kernel stores the zeros). Latencies are milliseconds at the example inputs, the three
    contenders ("compiled", "original" on the same backend, "pytorch" eager) interleaved in one run. `warnings` say
    that the compiled model is slower than the original, as measured or, without latencies, as predicted.
    """

    target: str
    original: costs.Cost
    compiled: costs.Cost
    fidelity: Fidelity | None
    passes: list[dict[str, Any]]
    latency: dict[str, costs.Latency] = field(default_factory=dict)
    metric: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stored_bytes: int = 0
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""

        def side(cost: costs.Cost, latency: costs.Latency | None) -> dict[str, Any]:
            return {
                "size_bytes": cost.bytes,
                "macs": cost.macs,
                "parameters": cost.parameters,
                "tokens": list(cost.tokens),
                "latency_ms": asdict(latency) if latency else None,
            }

        return {
            "target": self.target,
            "original": side(self.original, self.latency.get("original")),
            "compiled": side(self.compiled, self.latency.get("compiled"))
            | {"stored_bytes": self.stored_bytes}
            | {"fidelity": asdict(self.fidelity) if self.fidelity else None},
            "pytorch_latency_ms": asdict(self.latency["pytorch"]) if "pytorch" in self.latency else None,
            "metric": self.metric,
            "passes": self.passes,
            "notes": self.notes,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._summary()
        yield self._pass_table()
        yield from map(_sensitivity_table, self.sensitivities())
        yield from (f"note: {escape(note)}" for note in self.notes)
        yield from (f"warning: {escape(warning)}" for warning in self.warnings)

    def _summary(self) -> Table:
        table = Table(title=f"compiled for {self.target}", title_justify="left")
        for column in ("", "original", "compiled", "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        for label, attribute, unit in (("size", "bytes", "B"), ("MACs", "macs", ""), ("parameters", "parameters", "")):
            was, now = getattr(self.original, attribute), getattr(self.compiled, attribute)
            table.add_row(label, quantity(was, unit), quantity(now, unit), f"{now / was:.3f}" if was else "")
        if self.stored_bytes:
            was, now = self.original.bytes, self.stored_bytes
            table.add_row("size in the model file", quantity(was, "B"), quantity(now, "B"), f"{now / was:.3f}")
        if self.original.tokens:
            table.add_row("tokens, last attention", str(self.original.tokens[-1]), str(self.compiled.tokens[-1]), "")
        if self.latency:
            was, now = self.latency["original"].median, self.latency["compiled"].median
            table.add_row("latency, same backend", f"{was:.2f} ms", f"{now:.2f} ms", f"{now / was:.3f}")
            eager = self.latency["pytorch"].median
            table.add_row("latency, PyTorch eager", f"{eager:.2f} ms", "", f"{now / eager:.3f}")
        for label, value in self.metric.items():
            table.add_row(f"metric, {label}", "", f"{value:.4f}", "")
        if self.fidelity:
            for name, error in self.fidelity.relative_error.items():
                noise = self.fidelity.standard_error[name]
                table.add_row(f"relative error, {name}", "", f"{error:.2e} ± {noise:.0e}", "")
            table.caption = f"fidelity on {self.fidelity.samples} samples of {self.fidelity.data}"
        return table

    def _pass_table(self) -> Table:
        table = Table(title="passes", title_justify="left")
        for column in ("pass", "sites", "size", "MACs", "relative error"):
            table.add_column(column, justify="left" if column == "pass" else "right", overflow="fold")
        for entry in self.passes:
            error = entry["relative_error"]
            table.add_row(
                escape(entry["text"]),
                str(len(entry["matched"])),
                quantity(entry["size_bytes"], "B"),
                quantity(entry["macs"], ""),
                "" if error is None else f"{error:.2e}",
            )
        return table

    def sensitivities(self) -> Iterator[Sensitivity]:
        """What the passes measured of it."""
        return (Sensitivity.from_dict(entry["sensitivity"]) for entry in self.passes if entry.get("sensitivity"))

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with plots."""
        from .html import write_report

        write_report(self, Path(path))


def build_report(done: Compilation, *, latency: bool) -> Report:
    """Gather the figures of a finished compilation; measures latency when asked to."""
    original = functools.cache(functools.partial(original_executable, done))
    metric, times = {}, {}
    if done.options.metric is not None:
        metric = {
            "original": float(done.options.metric(_caller(done.original, original().run))),
            "compiled": float(done.options.metric(_caller(done.program, done.executable.run))),
        }
    before, after = costs.cost(done.original), costs.cost(done.program)
    if latency:
        times = costs.measure(contenders(done, original()))
        slower = measured_slower(times["compiled"], times["original"], done.executable, original())
    else:
        rows = done.executable.predict() if isinstance(done.executable, Predicting) else []
        slower = predicted_slower(before.macs, after.macs, rows)
    return Report(
        target=done.options.target,
        original=before,
        compiled=after,
        fidelity=done.fidelity,
        passes=[_entry(record) for record in done.records],
        latency=times,
        metric=metric,
        notes=[*done.program.notes, *backend_notes(registry().backend(done.options.target))],
        stored_bytes=done.executable.stored_bytes(),
        warnings=[slower] if slower else [],
    )


def original_executable(done: Compilation) -> Executable:
    """The original, for the same target."""
    lowered: Executable = registry().backend(done.options.target).lower(done.original, {"seed": done.options.seed})
    return lowered


def _caller(program: Any, run: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: program.interface.unflatten(run(program.interface.flatten(args, kwargs)))


def contenders(done: Compilation, original: Executable) -> dict[str, Callable[[], object]]:
    """The three programs that are timed against each other, each as a call on the example inputs."""
    inputs = done.original.users_example()

    def eager() -> None:
        with torch.inference_mode():
            done.original.module(*inputs)

    return {
        "compiled": lambda: done.executable.run(inputs),
        "original": lambda: original.run(inputs),
        "pytorch": eager,
    }


def _entry(record: Any) -> dict[str, Any]:
    return {
        "name": record.name,
        "text": record.text,
        "matched": record.result.matched,
        "skipped": record.result.skipped,
        "metrics": record.result.metrics,
        "warnings": record.result.warnings,
        "size_bytes": record.cost.bytes,
        "macs": record.cost.macs,
        "parameters": record.cost.parameters,
        "tokens": list(record.cost.tokens),
        "relative_error": record.fidelity.worst if record.fidelity else None,
        "sensitivity": record.result.sensitivity.to_dict() if record.result.sensitivity else None,
    }


def _sensitivity_table(measured: Sensitivity) -> Table:
    """The most sensitive sites: relative error at the outputs, a column a candidate."""
    bits, rows = measured.bits(), list(measured.table().items())
    table = Table(title="the most sensitive sites, relative error with one weight encoded", title_justify="left")
    table.add_column("site", overflow="fold")
    for encoding in bits:
        table.add_column(stored_bits(bits[encoding]), justify="right")
    for site, errors in rows[:_SENSITIVE_SITES]:
        table.add_row(escape(site), *(f"{errors[e]:.2e}" if e in errors else "" for e in bits))
    table.caption = f"{min(len(rows), _SENSITIVE_SITES)} of {len(rows)} sites, {escape(measured.data)}"
    return table


def stored_bits(bits: float) -> str:
    """What a candidate is called where there is little room."""
    return f"{bits:.3g} bits"


def explanation_table(explanation: Explanation) -> Table:
    """`explain()` as a table, a row per site."""
    table = Table(title=f"what runs on {explanation.target}", title_justify="left")
    columns: dict[str, list[str]] = {
        "site": [row.site for row in explanation.rows],
        "encoding": [row.encoding for row in explanation.rows],
        "kernel": [row.kernel for row in explanation.rows],
        "fast": ["yes" if row.accelerated else "no" for row in explanation.rows],
        "ms": ["" if row.milliseconds is None else f"{row.milliseconds:.3f}" for row in explanation.rows],
        "× fp32": ["" if row.predicted is None else f"{row.predicted:.2g}" for row in explanation.rows],
        "roofline": ["" if row.roofline is None else f"{row.roofline:.0%}" for row in explanation.rows],
        "note": [_note(row) for row in explanation.rows],
    }
    told = {name: cells for name, cells in columns.items() if any(cells)}
    for name in told:
        table.add_column(name, overflow="fold")
    for cells in zip(*told.values(), strict=True):
        table.add_row(*map(escape, cells))
    return table


def _note(row: Row) -> str:
    return "; ".join(part for part in (row.note, row.instead and f"{row.instead} has a fast kernel") if part)


def render(content: RenderableType, width: int = 120) -> str:
    """Rich content as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True).print(content)
    return buffer.getvalue().rstrip()


def quantity(value: float, unit: str) -> str:
    """12345678 → "12.3 M" (decimal prefixes)."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:g} {unit}".strip()
