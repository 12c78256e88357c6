"""The plots of the report's page, as inline SVG: the same bytes for the same report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, isfinite, log10
from textwrap import wrap
from typing import NamedTuple

from .markup import Markup, amount, contenders, join, percent, tag
from .report import Report, quantity, stored_bits
from .sensitivity import Sensitivity

#: the width of every plot in its own units, about the pixels of a phone; wider screens set two abreast
_WIDTH = 420
#: more sites than this are drawn as a profile, and only the worst of them by name
_NAMED_SITES = 8
#: letters in a line of the text of a pass, and lines
_PASS_WIDTH, _PASS_LINES = 32, 3


class Bar(NamedTuple):
    """One bar: its length, the words beside it, its CSS class, and what a pointer over it shows."""

    value: float
    label: str
    style: str = "now"
    tip: str = ""


def plots(report: Report) -> Markup:
    figures = [_comparison(report), _steps(report)]
    if report.fidelity is not None and report.fidelity.sites:
        figures += _site_errors(report.fidelity.sites)
    if report.compiled.tokens and report.compiled.tokens != report.original.tokens:
        figures.append(_tokens(report.original.tokens, report.compiled.tokens))
    figures += map(_sensitivity, report.sensitivities())
    return tag("section", *figures, class_="plots")


def _comparison(report: Report) -> Markup:
    """Size, MACs and latency, original above compiled; every group has its own scale."""
    was, now = report.original, report.compiled
    groups = [("size", _pair(was.bytes, now.bytes, "B")), ("MACs", _pair(was.macs, now.macs, ""))]
    if report.latency:
        groups.append(("latency", [_timed(report, key, name) for key, name in contenders(report)]))
    shapes, top = [], 0.0
    for heading, bars in groups:
        shapes += [_text(0, top + 12, heading, "strong"), _bars(bars, top + 19)]
        top += 19 + 19 * len(bars) + 10
    return _plot("Original and compiled", top, shapes)


def _timed(report: Report, key: str, name: str) -> Bar:
    median = report.latency[key].median
    return Bar(median, f"{median:.2f} ms {name}", "now" if key == "compiled" else "was")


def _pair(was: float, now: float, unit: str) -> list[Bar]:
    return [Bar(was, f"{amount(was, unit)} original", "was"), Bar(now, f"{amount(now, unit)} compiled")]


def _bars(bars: Sequence[Bar], top: float) -> Markup:
    """Horizontal bars to one scale, each with its label at its end."""
    longest = _largest(bar.value for bar in bars)
    parts = []
    for index, bar in enumerate(bars):
        y, length = top + 19 * index, _share(bar.value, longest) * (_WIDTH - 185)
        parts.append(_rect(0, y, length, 14, bar.style, bar.label))
        parts.append(_text(length + 6, y + 11, bar.label))
    return join(parts)


def _steps(report: Report) -> Markup:
    """Down the passes: left the size that remains and, paler, what the pass took off; right the error."""
    sizes = [report.original.bytes, *(entry["size_bytes"] for entry in report.passes)]
    errors = [entry["relative_error"] for entry in report.passes]
    worst = _largest(error for error in errors if error is not None)
    shapes, points, y = [], [], 0.0
    for index, entry in enumerate(report.passes):
        for line in _lines(entry["text"]):
            shapes.append(_text(0, y + 12, line, "strong"))
            y += 16
        for size, style in ((sizes[index], "was"), (sizes[index + 1], "now")):
            length = _share(size, max(sizes)) * 180
            shapes.append(_rect(0, y + 3, length, 14, style, quantity(size, "B")))
        shapes.append(_text(0, y + 30, quantity(sizes[index + 1], "B")))
        if errors[index] is not None:
            points.append((230 + _share(errors[index], worst) * 120, y + 10, percent(errors[index])))
        y += 42
    return _plot("Size and relative error after each pass", y, [*shapes, _line(points)])


def _lines(text: str) -> list[str]:
    """The text of a pass in lines that end left of the errors, broken between options where it can be."""
    lines = wrap(text.replace(",", ", "), _PASS_WIDTH, break_on_hyphens=False) or [""]
    return [*lines[: _PASS_LINES - 1], lines[_PASS_LINES - 1] + " …"] if len(lines) > _PASS_LINES else lines


def _line(points: Sequence[tuple[float, float, str]]) -> Markup:
    """Points joined by a line, their values in a column at the right."""
    marks = [_circle(x, y, "error", label) for x, y, label in points]
    labels = [_text(_WIDTH, y + 4, label, "end") for _, y, label in points]
    return join([_path([(x, y) for x, y, _ in points], "error"), *marks, *labels])


def _path(points: Sequence[tuple[float, float]], style: str) -> Markup:
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=style)


def _circle(x: float, y: float, style: str, tip: str, radius: float = 4) -> Markup:
    return tag("circle", tag("title", tip), cx=f"{x:.1f}", cy=f"{y:.1f}", r=radius, class_=style)


def _site_errors(sites: dict[str, float]) -> list[Markup]:
    """A profile of all sites in the order of the graph when there are many; the worst of them by name."""
    if len(sites) <= _NAMED_SITES:
        return [_named_sites(f"Relative error at {len(sites)} sites", list(sites.items()))]
    ranked = sorted(sites.items(), key=lambda item: (isfinite(item[1]), -item[1]))
    profile = [Bar(error, "", "error", f"{path}: {percent(error)}") for path, error in sites.items()]
    caption = f"Relative error at {len(sites)} sites, input to output"
    return [
        _columns(caption, profile, [], percent),
        _named_sites(f"The {_NAMED_SITES} sites with the largest error", ranked[:_NAMED_SITES]),
    ]


def _named_sites(caption: str, sites: Sequence[tuple[str, float]]) -> Markup:
    longest = _largest(error for _, error in sites)
    shapes = []
    for index, (path, error) in enumerate(sites):
        y, length = 32.0 * index, _share(error, longest) * (_WIDTH - 70)
        shapes += [_text(0, y + 11, _shorten(path, 54)), _rect(0, y + 16, length, 8, "error", path)]
        shapes.append(_text(length + 6, y + 24, percent(error)))
    return _plot(caption, 32.0 * len(sites), shapes)


def _tokens(was: Sequence[int], now: Sequence[int]) -> Markup:
    bars = [Bar(n, str(n), tip=f"layer {layer}: {n} tokens") for layer, n in enumerate(now, 1)]
    return _columns("Tokens in each attention layer, original and compiled", bars, was, "{:g}".format)


def _sensitivity(measured: Sensitivity) -> Markup:
    """Sites in the order of the graph, one line a candidate, darkest that of the fewest bits; errors on a log scale."""
    left, top, height = 62, 30, 180
    errors = {(loss.site, loss.encoding): loss.error**0.5 for loss in measured.losses}
    powers = [log10(error) for error in errors.values() if error and isfinite(error)] or [0.0]
    low, high = floor(min(powers)), floor(max(powers)) + 1

    def depth(error: float) -> float:
        return top + height * (1 - (_share(log10(error) - low, high - low) if error else 0.0))

    decades = range(low, high + 1, ceil((high - low) / 6))
    shapes = [_grid(left, depth(10.0**power), percent(10.0**power)) for power in decades]
    candidates = sorted(measured.bits().items(), key=lambda item: item[1])
    pitch, key = (_WIDTH - left - 8) / max(len(measured.weights) - 1, 1), min(90, (_WIDTH - left) / len(candidates))
    radius = 2.5 if pitch > 12 else 1
    for index, (encoding, bits) in enumerate(candidates):
        marks = [
            _circle(left + 4 + key * index, 8, "now", encoding),
            _text(left + 12 + key * index, 12, stored_bits(bits)),
        ]
        path = []
        for place, site in enumerate(measured.weights):
            if (error := errors.get((site, encoding))) is not None:
                path.append((left + 4 + place * pitch, depth(error)))
                marks.append(_circle(*path[-1], "now", f"{site}, {stored_bits(bits)}: {percent(error)}", radius))
        shapes.append(tag("g", _path(path, "now"), *marks, opacity=f"{1 - 0.8 * index / len(candidates):.2f}"))
    return _plot(f"Relative error with one of {len(measured.weights)} weights encoded", top + height + 8, shapes)


def _columns(caption: str, bars: Sequence[Bar], ghosts: Sequence[float], show: Callable[[float], str]) -> Markup:
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
    return join([line, _text(left - 6, y + 4, label, "end")])


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
