"""The report as one HTML page: inline style and SVG, nothing fetched, the same bytes for the same report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

from .files import whole_file
from .markup import Markup, amount, contenders, join, percent, tag
from .plots import plots
from .report import Report, quantity, stored_bits
from .sensitivity import Sensitivity
from .verify import Fidelity

#: how many sites are listed by their sensitivity
_SENSITIVE_SITES = 20
#: nothing may be fetched or run, whatever a name in the report says
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    with whole_file(path, where="to_html", fix="choose a writable directory") as part:
        part.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The whole document."""
    title = f"Compiled for {report.target}"
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    sections = (_cards, plots, _fidelity, _latency, _passes, _sensitivities, _notes)
    main = tag("main", tag("h1", title), _chain(report), *(section(report) for section in sections))
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


# -- frames -------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """The first column is text, the others are numbers; wide tables scroll inside their frame."""
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def _section(heading: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", heading), *content)


# -- words and figures ---------------------------------------------------------------------------------------


def _chain(report: Report) -> Markup:
    """The passes in order, as chips."""
    return tag("p", *(tag("code", entry["text"]) for entry in report.passes), class_="chain")


def _cards(report: Report) -> Markup:
    """The headline: how many times smaller and faster, and how far off."""
    was, now = report.original, report.compiled
    cards = [
        _ratio_card("size", was.bytes, now.bytes, "smaller", "larger", "B"),
        _ratio_card("MACs", was.macs, now.macs, "fewer", "more", ""),
        _ratio_card("parameters", was.parameters, now.parameters, "fewer", "more", ""),
    ]
    for key, label in (("original", f"latency on {report.target}"), ("pytorch", "latency, PyTorch eager")):
        if {key, "compiled"} <= report.latency.keys():
            before, after = report.latency[key].median, report.latency["compiled"].median
            cards.append(_ratio_card(label, before, after, "faster", "slower", "ms"))
    if report.fidelity is not None:
        cards.append(_fidelity_card(report, report.fidelity))
    if {"original", "compiled"} <= report.metric.keys():
        before, after = report.metric["original"], report.metric["compiled"]
        cards.append(_card("metric", f"{after:.4f}", "", f"{before:.4f} → {after:.4f}"))
    return tag("section", *cards, class_="cards")


def _ratio_card(label: str, was: float, now: float, better: str, worse: str, unit: str) -> Markup:
    values = f"{amount(was, unit)} → {amount(now, unit)}"
    if not was or not now:
        return _card(label, amount(now, unit), "", values)
    ratio = max(was, now) / min(was, now)
    if f"{ratio:.2f}" == "1.00":
        return _card(label, "1×", "unchanged", values)
    return _card(label, f"{ratio:.2f}×", better if now < was else worse, values, bad=now > was)


def _fidelity_card(report: Report, fidelity: Fidelity) -> Markup:
    worst = max(fidelity.relative_error, key=fidelity.relative_error.__getitem__, default=None)
    if worst is None:
        return _card("relative error", "none", "", "the model has no floating-point output")
    noise = _noise(fidelity.standard_error[worst], fidelity.samples)
    return _card("relative error", percent(fidelity.worst), noise, f"{worst}, {_sampled(fidelity)}")


def _card(label: str, figure: str, unit: str, detail: str, *, bad: bool = False) -> Markup:
    style = "figure worse" if bad else "figure"
    headline = tag("p", tag("b", figure), " ", unit, class_=style)
    return tag("div", tag("p", label), headline, tag("p", detail), class_="card")


def _noise(standard_error: float, samples: int) -> str:
    return f"± {100 * standard_error:.1g} %" if samples > 1 else "± unknown (one sample)"


def _sampled(fidelity: Fidelity) -> str:
    return f"{fidelity.samples} {'sample' if fidelity.samples == 1 else 'samples'} of {fidelity.data}"


def _fidelity(report: Report) -> Markup:
    """Distance to the original per output, with its noise."""
    fidelity = report.fidelity
    if fidelity is None:
        return _section("Fidelity", tag("p", "Not measured: compiled with verify=False."))
    rows = []
    for name, error in fidelity.relative_error.items():
        noise = _noise(fidelity.standard_error[name], fidelity.samples)
        rows.append((name, f"{percent(error)} {noise}", f"{fidelity.cosine[name]:.6f}"))
    text = f"Distance to the original model on {_sampled(fidelity)}: mean ± standard error over the samples."
    return _section("Fidelity", tag("p", text), _table(("output", "relative L2 error", "cosine"), rows))


def _latency(report: Report) -> Markup:
    if not report.latency:
        return _section("Latency", tag("p", "Not measured for this page."))
    rows = []
    for key, name in contenders(report):
        timed = report.latency[key]
        rows.append((name, f"{timed.median:.2f}", f"{timed.minimum:.2f}", timed.runs))
    text = f"One call at the example inputs, interleaved in one run; original and compiled on {report.target}."
    headings = ("contender", "median, ms", "minimum, ms", "runs")
    return _section("Latency", tag("p", text), _table(headings, rows))


def _passes(report: Report) -> Markup:
    """One row a pass: what it did, and what the model costs after it."""
    headings = ("pass", "sites", "size", "MACs", "parameters", "relative error")
    return _section("Passes", _table(headings, (_pass_row(entry) for entry in report.passes)))


def _pass_row(entry: dict[str, Any]) -> tuple[object, ...]:
    error = entry["relative_error"]
    return (
        _pass_story(entry),
        len(entry["matched"]),
        quantity(entry["size_bytes"], "B"),
        quantity(entry["macs"], ""),
        quantity(entry["parameters"], ""),
        "" if error is None else percent(error),
    )


def _pass_story(entry: dict[str, Any]) -> Markup:
    """The pass as it was written; below it warnings, metrics and, folded away, the sites."""
    parts = [tag("code", entry["text"])]
    parts += [tag("p", f"warning: {warning}", class_="worse") for warning in entry["warnings"]]
    if entry["metrics"]:
        parts.append(tag("p", ", ".join(f"{name} {value:.6g}" for name, value in entry["metrics"].items())))
    if entry["matched"]:
        paths = (tag("li", path) for path in entry["matched"])
        parts.append(_folded(f"{_count(entry['matched'])} matched", paths))
    if entry["skipped"]:
        reasons = (tag("li", tag("b", path), f": {reason}") for path, reason in entry["skipped"].items())
        parts.append(_folded(f"{_count(entry['skipped'])} skipped", reasons))
    return join(parts)


def _count(sites: Sized) -> str:
    return "1 site" if len(sites) == 1 else f"{len(sites)} sites"


def _folded(summary: str, items: Iterable[Markup]) -> Markup:
    return tag("details", tag("summary", summary), tag("ul", *items))


def _sensitivities(report: Report) -> Markup:
    return join(map(_sensitivity, report.sensitivities()))


def _sensitivity(measured: Sensitivity) -> Markup:
    """The most sensitive sites, a column a candidate, and what the candidates are."""
    bits, rows = measured.bits(), measured.table()
    text = (
        f"Relative error of the outputs with one weight encoded and the others as they are, {measured.data}: "
        f"the most sensitive of {_count(rows)}."
    )
    cells = ((site, *(percent(errors[e]) if e in errors else "" for e in bits)) for site, errors in rows.items())
    names = _folded(
        "what is stored", (tag("li", f"{stored_bits(b)} a weight: ", tag("code", e)) for e, b in bits.items())
    )
    table = _table(("site", *map(stored_bits, bits.values())), list(cells)[:_SENSITIVE_SITES])
    return _section("Sensitivity", tag("p", text), table, names)


def _notes(report: Report) -> Markup:
    notes = [tag("li", f"warning: {warning}", class_="worse") for warning in report.warnings]
    notes += [tag("li", note) for note in report.notes]
    return _section("Notes", tag("ul", *notes)) if notes else Markup()


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #1b1f24; --quiet: #5b6470;
  --line: #dfe3e8; --was: #c2cad3; --now: #2364aa; --error: #b8500f; }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1b1e23; --ink: #e8eaed;
  --quiet: #9da7b3; --line: #2f353d; --was: #4c5661; --now: #6cabf7; --error: #f29a5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: 0; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
.chain { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: 1rem; }
.chain code { background: var(--card); border: 1px solid var(--line); border-radius: 4px; padding: 0 .5rem; }
.cards { display: grid; grid-template-columns: repeat(2, 1fr); gap: .75rem; }
@media (min-width: 40rem) { .cards { grid-template-columns: repeat(3, 1fr); } }
.card, figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.card { padding: .7rem; font-size: .85rem; color: var(--quiet); overflow-wrap: anywhere; }
.card .figure { color: var(--now); }
.card b { font-size: 1.5rem; }
.worse, .card .worse { color: var(--error); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .75rem;
  margin-top: .75rem; align-items: start; }
figure { margin: 0; padding: .8rem .7rem; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
svg { display: block; width: 100%; height: auto; font-size: 13px; font-variant-numeric: tabular-nums; }
svg text { fill: var(--quiet); }
svg .strong { fill: var(--ink); }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg line { stroke: var(--line); }
rect.was { fill: var(--was); }
rect.now { fill: var(--now); }
rect.error, circle.error { fill: var(--error); }
circle.now { fill: var(--now); }
polyline { fill: none; stroke-width: 1.5; }
polyline.error { stroke: var(--error); }
polyline.now { stroke: var(--now); }
.scroll { overflow-x: auto; margin-top: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; color: var(--quiet); font-size: .85rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11rem; }
tbody tr { border-top: 1px solid var(--line); }
td p, details { font-size: .85rem; color: var(--quiet); margin-top: .2rem; }
td p.worse { color: var(--error); }
summary { cursor: pointer; }
details ul { margin: .2rem 0; padding-left: 1.2rem; max-height: 20rem; overflow: auto; }
details li { overflow-wrap: anywhere; }
"""
