"""The report as one HTML page: inline style and SVG, nothing fetched, the same bytes for the same report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import suppress
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ArtifactError
from .report import Report, quantity
from .verify import Fidelity

#: the width of every plot in its own units, about the pixels of a phone; wider screens set two abreast
_WIDTH = 420
#: nothing may be fetched or run, whatever a name in the report says
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
#: more sites than this are drawn as a profile, and only the worst of them by name
_NAMED_SITES = 8


def write_report(report: Report, path: Path) -> None:
    """Write the page, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(page(report), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {str(path)!r}: {error.strerror}",
            where="to_html",
            fix="choose a writable directory",
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


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
    sections = (_cards, _plots, _fidelity, _latency, _passes, _notes)
    main = tag("main", tag("h1", title), _chain(report), *(section(report) for section in sections))
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


# -- HTML from strings: what is not Markup is escaped on its way in ------------------------------------------


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Markup:
    """One element. A trailing underscore (`class_`) is dropped from an attribute, others become hyphens."""
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items()
    )
    inside = "".join(child if isinstance(child, Markup) else escape(str(child)) for child in children)
    return Markup(f"<{element}{words}>{inside}</{element}>")


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("".join(parts))


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
    values = f"{_amount(was, unit)} → {_amount(now, unit)}"
    if not was or not now:
        return _card(label, _amount(now, unit), "", values)
    ratio = max(was, now) / min(was, now)
    if f"{ratio:.2f}" == "1.00":
        return _card(label, "1×", "unchanged", values)
    return _card(label, f"{ratio:.2f}×", better if now < was else worse, values, bad=now > was)


def _fidelity_card(report: Report, fidelity: Fidelity) -> Markup:
    worst = max(fidelity.relative_error, key=fidelity.relative_error.__getitem__, default=None)
    if worst is None:
        return _card("relative error", "none", "", "the model has no floating-point output")
    noise = _noise(fidelity.standard_error[worst], fidelity.samples)
    return _card("relative error", _percent(fidelity.worst), noise, f"{worst}, {_sampled(fidelity)}")


def _card(label: str, figure: str, unit: str, detail: str, *, bad: bool = False) -> Markup:
    style = "figure worse" if bad else "figure"
    headline = tag("p", tag("b", figure), " ", unit, class_=style)
    return tag("div", tag("p", label), headline, tag("p", detail), class_="card")


def _amount(value: float, unit: str) -> str:
    return f"{value:.2f} ms" if unit == "ms" else quantity(value, unit)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


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
        rows.append((name, f"{_percent(error)} {noise}", f"{fidelity.cosine[name]:.6f}"))
    text = f"Distance to the original model on {_sampled(fidelity)}: mean ± standard error over the samples."
    return _section("Fidelity", tag("p", text), _table(("output", "relative L2 error", "cosine"), rows))


def _latency(report: Report) -> Markup:
    if not report.latency:
        return _section("Latency", tag("p", "Not measured for this page."))
    rows = []
    for key, name in _contenders(report):
        timed = report.latency[key]
        rows.append((name, f"{timed.median:.2f}", f"{timed.minimum:.2f}", timed.runs))
    text = (
        f"One call at the example inputs, interleaved in one run; original and compiled on {report.target}."
    )
    headings = ("contender", "median, ms", "minimum, ms", "runs")
    return _section("Latency", tag("p", text), _table(headings, rows))


def _contenders(report: Report) -> list[tuple[str, str]]:
    """Key in `report.latency` and name for the reader."""
    names = {"pytorch": "PyTorch eager", "original": "original", "compiled": "compiled"}
    return [(key, name) for key, name in names.items() if key in report.latency]


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
        "" if error is None else _percent(error),
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
    return _join(parts)


def _count(sites: Sized) -> str:
    return "1 site" if len(sites) == 1 else f"{len(sites)} sites"


def _folded(summary: str, items: Iterable[Markup]) -> Markup:
    return tag("details", tag("summary", summary), tag("ul", *items))


def _notes(report: Report) -> Markup:
    if not report.notes:
        return Markup()
    return _section("Notes", tag("ul", *(tag("li", note) for note in report.notes)))


# -- plots ---------------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """One bar: its length, the words beside it, its CSS class, and what a pointer over it shows."""

    value: float
    label: str
    style: str = "now"
    tip: str = ""


def _plots(report: Report) -> Markup:
    figures = [_comparison(report), _steps(report)]
    if report.fidelity is not None and report.fidelity.sites:
        figures += _site_errors(report.fidelity.sites)
    if report.compiled.tokens and report.compiled.tokens != report.original.tokens:
        figures.append(_tokens(report.original.tokens, report.compiled.tokens))
    return tag("section", *figures, class_="plots")


def _comparison(report: Report) -> Markup:
    """Size, MACs and latency, original above compiled; every group has its own scale."""
    was, now = report.original, report.compiled
    groups = [("size", _pair(was.bytes, now.bytes, "B")), ("MACs", _pair(was.macs, now.macs, ""))]
    if report.latency:
        groups.append(("latency", [_timed(report, key, name) for key, name in _contenders(report)]))
    shapes, top = [], 0.0
    for heading, bars in groups:
        shapes += [_text(0, top + 12, heading, "strong"), _bars(bars, top + 19)]
        top += 19 + 19 * len(bars) + 10
    return _plot("Original and compiled", top, shapes)


def _timed(report: Report, key: str, name: str) -> Bar:
    median = report.latency[key].median
    return Bar(median, f"{median:.2f} ms {name}", "now" if key == "compiled" else "was")


def _pair(was: float, now: float, unit: str) -> list[Bar]:
    return [Bar(was, f"{_amount(was, unit)} original", "was"), Bar(now, f"{_amount(now, unit)} compiled")]


def _bars(bars: Sequence[Bar], top: float) -> Markup:
    """Horizontal bars to one scale, each with its label at its end."""
    longest = _largest(bar.value for bar in bars)
    parts = []
    for index, bar in enumerate(bars):
        y, length = top + 19 * index, _share(bar.value, longest) * (_WIDTH - 185)
        parts.append(_rect(0, y, length, 14, bar.style, bar.label))
        parts.append(_text(length + 6, y + 11, bar.label))
    return _join(parts)


def _steps(report: Report) -> Markup:
    """Down the passes: left the size that remains and, paler, what the pass took off; right the error."""
    sizes = [report.original.bytes, *(entry["size_bytes"] for entry in report.passes)]
    errors = [entry["relative_error"] for entry in report.passes]
    worst = _largest(error for error in errors if error is not None)
    shapes, points = [], []
    for index, entry in enumerate(report.passes):
        y = 58.0 * index
        shapes.append(_text(0, y + 12, _shorten(entry["text"], 54), "strong"))
        for size, style in ((sizes[index], "was"), (sizes[index + 1], "now")):
            length = _share(size, max(sizes)) * 180
            shapes.append(_rect(0, y + 19, length, 14, style, quantity(size, "B")))
        shapes.append(_text(0, y + 46, quantity(sizes[index + 1], "B")))
        if errors[index] is not None:
            points.append((230 + _share(errors[index], worst) * 120, y + 26, _percent(errors[index])))
    caption = "Size and relative error after each pass"
    return _plot(caption, 58.0 * len(report.passes), [*shapes, _line(points)])


def _line(points: Sequence[tuple[float, float, str]]) -> Markup:
    """Points joined by a line, their values in a column at the right."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    marks = [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, class_="error") for x, y, _ in points]
    labels = [_text(_WIDTH, y + 4, label, "end") for _, y, label in points]
    return _join([tag("polyline", points=path, class_="error"), *marks, *labels])


def _site_errors(sites: dict[str, float]) -> list[Markup]:
    """A profile of all sites in the order of the graph when there are many; the worst of them by name."""
    if len(sites) <= _NAMED_SITES:
        return [_named_sites(f"Relative error at {len(sites)} sites", list(sites.items()))]
    ranked = sorted(sites.items(), key=lambda item: (isfinite(item[1]), -item[1]))
    profile = [Bar(error, "", "error", f"{path}: {_percent(error)}") for path, error in sites.items()]
    caption = f"Relative error at {len(sites)} sites, input to output"
    return [
        _columns(caption, profile, [], _percent),
        _named_sites(f"The {_NAMED_SITES} sites with the largest error", ranked[:_NAMED_SITES]),
    ]


def _named_sites(caption: str, sites: Sequence[tuple[str, float]]) -> Markup:
    longest = _largest(error for _, error in sites)
    shapes = []
    for index, (path, error) in enumerate(sites):
        y, length = 32.0 * index, _share(error, longest) * (_WIDTH - 70)
        shapes += [_text(0, y + 11, _shorten(path, 54)), _rect(0, y + 16, length, 8, "error", path)]
        shapes.append(_text(length + 6, y + 24, _percent(error)))
    return _plot(caption, 32.0 * len(sites), shapes)


def _tokens(was: Sequence[int], now: Sequence[int]) -> Markup:
    bars = [Bar(n, str(n), tip=f"layer {layer}: {n} tokens") for layer, n in enumerate(now, 1)]
    return _columns("Tokens in each attention layer, original and compiled", bars, was, "{:g}".format)


def _columns(
    caption: str, bars: Sequence[Bar], ghosts: Sequence[float], show: Callable[[float], str]
) -> Markup:
    """Upright bars to one scale, `ghosts` paler behind them; labels and counts where there is room."""
    left, bottom, height = 62, 160, 140
    highest = _largest((*ghosts, *(bar.value for bar in bars)))
    pitch = min((_WIDTH - left) / len(bars), 40.0)
    shapes = [_grid(left, bottom - part * height, show(highest * part)) for part in (0.0, 0.5, 1.0)]
    for index, ghost in enumerate(ghosts[: len(bars)]):
        tall = _share(ghost, highest) * height
        shapes.append(_rect(left + index * pitch, bottom - tall, pitch * 0.8, tall, "was", show(ghost)))
    for index, bar in enumerate(bars):
        x, tall = left + index * pitch, _share(bar.value, highest) * height
        shapes.append(_rect(x, bottom - tall, pitch * 0.8, tall, bar.style, bar.tip))
        if bar.label and pitch >= 24:
            shapes.append(_text(x + pitch * 0.4, bottom - tall - 4, bar.label, "strong middle"))
            shapes.append(_text(x + pitch * 0.4, bottom + 14, str(index + 1), "middle"))
    return _plot(caption, bottom + 18, shapes)


def _grid(left: float, y: float, label: str) -> Markup:
    line = tag("line", x1=left, x2=_WIDTH, y1=f"{y:.1f}", y2=f"{y:.1f}")
    return _join([line, _text(left - 6, y + 4, label, "end")])


def _plot(caption: str, height: float, shapes: Iterable[Markup]) -> Markup:
    drawing = tag("svg", *shapes, viewBox=f"0 0 {_WIDTH} {height:.0f}", role="img", aria_label=caption)
    return tag("figure", tag("figcaption", caption), drawing)


def _rect(x: float, y: float, width: float, height: float, style: str, tip: str) -> Markup:
    where = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    return tag("rect", tag("title", tip), **where, rx=min(2, int(height / 2)), class_=style)


def _text(x: float, y: float, content: str, style: str = "") -> Markup:
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", class_=style)


def _share(value: float, whole: float) -> float:
    """`value / whole` between 0 and 1; what is not finite fills the whole."""
    if not isfinite(value):
        return 1.0
    return min(max(value / whole, 0.0), 1.0) if whole else 0.0


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if isfinite(value)), default=0.0)


def _shorten(text: str, limit: int) -> str:
    """The end of a long name, which tells sites apart."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


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
polyline.error { fill: none; stroke: var(--error); stroke-width: 1.5; }
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
