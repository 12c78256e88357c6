"""The report: figures in the table and the dictionary, and a page that is whole, safe and drawn to scale."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from math import inf, isfinite, log10, nan
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from paretoc.compiler import html
from paretoc.compiler.backend import Explanation, Row
from paretoc.compiler.cost import Cost, Latency
from paretoc.compiler.errors import ArtifactError
from paretoc.compiler.report import Report, quantity
from paretoc.compiler.sensitivity import Loss, Sensitivity
from paretoc.compiler.verify import Fidelity

HOSTILE = "<script>alert(\"1\")</script>&'x'"
#: elements that HTML closes by themselves
VOID = {"meta"}


def entry(text: str, size: int, error: float | None, **more: Any) -> dict[str, Any]:
    figures = {"size_bytes": size, "macs": 2_000_000, "parameters": 1_000_000, "tokens": [9, 9]}
    return {
        "name": text.partition(":")[0],
        "text": text,
        "matched": ["a.up", "a.down"],
        "skipped": {},
        "metrics": {},
        "warnings": [],
        "relative_error": error,
        "sensitivity": None,
        **figures,
        **more,
    }


def report(**changes: Any) -> Report:
    """4 MB → 1 MB, 2 M → 0.5 M MACs, same parameters, 20 ms PyTorch, 10 ms original, 4 ms compiled."""
    base = Report(
        target="onnxruntime",
        original=Cost(macs=2_000_000, parameters=1_000_000, bytes=4_000_000, tokens=(9, 9)),
        compiled=Cost(macs=500_000, parameters=1_000_000, bytes=1_000_000, tokens=(9, 9)),
        fidelity=Fidelity(
            data="the calibration data",
            samples=32,
            relative_error={"logits": 0.0123, "pooled": 0.004},
            standard_error={"logits": 0.0005, "pooled": 0.0001},
            cosine={"logits": 0.99991, "pooled": 0.99999},
            sites={"a.up": 0.01, "a.down": 0.04},
        ),
        passes=[entry("canonicalize", 4_000_000, 0.0), entry("quantize:W8A8", 1_000_000, 0.0123)],
        latency={
            "pytorch": Latency(20.0, 19.0, 10),
            "original": Latency(10.0, 9.5, 10),
            "compiled": Latency(4.0, 3.9, 10),
        },
    )
    return dataclasses.replace(base, **changes)


def fidelity(**changes: Any) -> Fidelity:
    kept = report().fidelity
    assert kept is not None
    return dataclasses.replace(kept, **changes)


class Page(HTMLParser):
    """Checks that every element is closed, and keeps elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return "|" + "|".join(self.words) + "|"


def figures(page: str) -> dict[str, ElementTree.Element]:
    """Caption → SVG, each parsed as XML."""
    drawn = (ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    return {svg.attrib["aria-label"]: svg for svg in drawn}


def lengths(svg: ElementTree.Element, style: str, side: str = "width") -> list[float]:
    return [float(rect.attrib[side]) for rect in svg.iter("rect") if rect.attrib["class"] == style]


def sensitivity(sites: int = 3, name: str = "layer.{}") -> dict[str, Any]:
    """Two bits lose 10 %, 20 %, …, four bits a hundredth of it."""
    weights = {name.format(i): 64 for i in range(sites)}
    losses = [
        Loss(site, f"Affine(bits={bits}, group=0)", 8 * bits + 4, (share * i) ** 2)
        for i, site in enumerate(weights, 1)
        for bits, share in ((2, 0.1), (4, 0.001))
    ]
    return Sensitivity(tuple(losses), weights, "3 held-out samples").to_dict()


VARIANTS: dict[str, Callable[[], Report]] = {
    "full": report,
    "no latency": lambda: report(latency={}),
    "no fidelity": lambda: report(fidelity=None, passes=[entry("canonicalize", 4_000_000, None)]),
    "no passes": lambda: report(passes=[]),
    "no weights": lambda: report(original=Cost(0, 0, 0, ()), compiled=Cost(0, 0, 0, ()), passes=[]),
    "not finite": lambda: report(fidelity=fidelity(sites={"a": inf, "b": nan, "c": 0.5})),
    "many sites": lambda: report(fidelity=fidelity(sites={f"layer.{i}": i / 100 for i in range(40)})),
    "fewer tokens": lambda: report(compiled=Cost(1, 1, 1, (9, 3))),
    "no attention left": lambda: report(compiled=Cost(1, 1, 1, ())),
    "no sites": lambda: report(fidelity=fidelity(sites={})),
    "sensitivity": lambda: report(passes=[entry("quantize", 10, 0.1, sensitivity=sensitivity())]),
    "one sensitive site": lambda: report(passes=[entry("quantize", 10, 0.1, sensitivity=sensitivity(1))]),
    "many sensitive sites": lambda: report(passes=[entry("quantize", 10, 0.1, sensitivity=sensitivity(90))]),
    "metric": lambda: report(metric={"original": 0.9, "compiled": 0.875}),
    "hostile": lambda: report(
        target=HOSTILE,
        notes=[HOSTILE],
        fidelity=fidelity(
            data=HOSTILE,
            sites={HOSTILE: 0.5},
            relative_error={HOSTILE: 0.1},
            standard_error={HOSTILE: 0.1},
            cosine={HOSTILE: 0.9},
        ),
        passes=[
            entry(
                HOSTILE,
                10,
                0.1,
                matched=[HOSTILE],
                skipped={HOSTILE: HOSTILE},
                metrics={HOSTILE: 1.0},
                warnings=[HOSTILE],
                sensitivity=sensitivity(1, HOSTILE),
            )
        ],
    ),
}


@pytest.fixture(params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Report:
    return VARIANTS[request.param]()


# -- the page ------------------------------------------------------------------------------------------------


def test_every_variant_is_well_formed_and_fetches_nothing(variant: Report) -> None:
    text = html.page(variant)
    page = Page(text)
    assert figures(text), "there is at least one plot"
    assert {tag for tag, _ in page.elements} >= {"html", "head", "title", "style", "body", "main", "svg"}
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object"}
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "href", "srcset"}, (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert "http:" not in text and "https:" not in text and "@import" not in text


def test_every_variant_stays_inside_its_plots(variant: Report) -> None:
    for caption, svg in figures(html.page(variant)).items():
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for rect in svg.iter("rect"):
            x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert all(map(isfinite, (x, y, w, h))) and w >= 0 and h >= 0, (caption, rect.attrib)
            assert x >= 0 and y >= 0 and x + w <= width + 0.1 and y + h <= height + 0.1, (
                caption,
                rect.attrib,
            )
        for text in svg.iter("text"):
            assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height, text.text
        for circle in svg.iter("circle"):
            x, y = float(circle.attrib["cx"]), float(circle.attrib["cy"])
            assert 0 <= x <= width and 0 <= y <= height, (caption, circle.attrib)


def test_the_same_report_gives_the_same_bytes(variant: Report, tmp_path: Path) -> None:
    variant.to_html(tmp_path / "a.html")
    variant.to_html(tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_names_are_text_never_markup() -> None:
    text = html.page(VARIANTS["hostile"]())
    assert "<script" not in text
    shown = Page(text).text
    # title, heading, chip, five plots and tables, folded lists, note
    assert shown.count(HOSTILE) >= 10


def test_attributes_and_children_are_escaped() -> None:
    made = html.tag("p", "<", html.Markup("<b></b>"), title="\"<&'", class_="a", stroke_width=1)
    assert made == '<p title="&quot;&lt;&amp;&#x27;" class="a" stroke-width="1">&lt;<b></b></p>'


def test_an_unclosed_element_is_noticed() -> None:
    """The helper of this file rejects what it is there to reject."""
    for broken in ("<p><b>x</p>", "<div>", "<p>x</p></p>"):
        with pytest.raises(AssertionError, match="close"):
            Page(broken)


@pytest.mark.parametrize(
    ("label", "figure", "word", "detail"),
    [
        ("size", "4.00×", "smaller", "4.00 MB → 1.00 MB"),
        ("MACs", "4.00×", "fewer", "2.00 M → 500.00 k"),
        ("parameters", "1×", "unchanged", "1.00 M → 1.00 M"),
        ("latency on onnxruntime", "2.50×", "faster", "10.00 ms → 4.00 ms"),
        ("latency, PyTorch eager", "5.00×", "faster", "20.00 ms → 4.00 ms"),
        ("relative error", "1.23 %", "± 0.05 %", "logits, 32 samples of the calibration data"),
    ],
)
def test_headline(label: str, figure: str, word: str, detail: str) -> None:
    assert f"|{label}|{figure}|{word}|{detail}|" in Page(html.page(report())).text


def test_what_got_worse_is_said_and_marked() -> None:
    slow = report(latency={**report().latency, "compiled": Latency(15.0, 15.0, 10)})
    text = html.page(slow)
    assert "|1.50×|slower|" in Page(text).text
    assert '<p class="figure worse"><b>1.50×</b> slower</p>' in text
    assert "worse" not in html.page(report()).partition("</style>")[2]


def test_missing_measurements_are_said_not_drawn() -> None:
    text = Page(html.page(report(latency={}, fidelity=None))).text
    assert "Not measured for this page." in text and "Not measured: compiled with verify=False." in text
    assert "faster" not in text and "±" not in text


def test_one_sample_has_no_noise_estimate() -> None:
    text = Page(html.page(report(fidelity=fidelity(samples=1)))).text
    assert "1.23 % ± unknown (one sample)" in text and "1 sample of the calibration data" in text


def test_passes_tell_their_story() -> None:
    told = entry(
        "prune_nm:2:4",
        7_000,
        0.25,
        skipped={"head": "its input width 10 is not a multiple of 4"},
        metrics={"kept": 0.5},
        warnings=["the tail is small"],
    )
    page = Page(html.page(report(passes=[told])))
    assert "|prune_nm:2:4|warning: the tail is small|kept 0.5|2 sites matched|a.up|a.down|1 site skipped|" in page.text
    assert "|head|: its input width 10 is not a multiple of 4|2|7.00 kB|2.00 M|1.00 M|25 %|" in page.text
    assert [tag for tag, _ in page.elements].count("details") == 2


def test_metric_and_notes() -> None:
    told = report(metric={"original": 0.9, "compiled": 0.875}, notes=["batch is fixed"])
    text = Page(html.page(told)).text
    assert "|metric|0.8750|0.9000 → 0.8750|" in text and "|Notes|batch is fixed|" in text


# -- the plots -----------------------------------------------------------------------------------------------


def test_comparison_bars_are_to_scale() -> None:
    svg = figures(html.page(report()))["Original and compiled"]
    size_was, macs_was, pytorch, original = lengths(svg, "was")
    size_now, macs_now, compiled = lengths(svg, "now")
    assert size_now / size_was == pytest.approx(1 / 4, abs=1e-3)
    assert macs_now / macs_was == pytest.approx(1 / 4, abs=1e-3)
    assert original / pytorch == pytest.approx(10 / 20, abs=1e-3)
    assert compiled / pytorch == pytest.approx(4 / 20, abs=1e-3)


def test_steps_show_what_each_pass_took_off_and_the_error_after_it() -> None:
    steps = [entry("a", 4_000_000, 0.0), entry("b", 2_000_000, 0.01), entry("c", 1_000_000, 0.04)]
    svg = figures(html.page(report(passes=steps)))["Size and relative error after each pass"]
    assert lengths(svg, "was") == [180, 180, 90], "before each pass"
    assert lengths(svg, "now") == [180, 90, 45], "after each pass"
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in svg.iter("circle")]
    assert [x for x, _ in dots] == [230, 260, 350] and dots == sorted(dots, key=lambda dot: dot[1])
    (line,) = svg.iter("polyline")
    assert line.attrib["points"] == " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    assert [text.text for text in svg.iter("text")][-3:] == ["0 %", "1 %", "4 %"]


def test_a_long_pass_ends_left_of_the_errors() -> None:
    text = "quantize:W4A16,fitter=gptq(act_order=True),group_size=64,targets=[" + "encoder.layer.0.attention," * 9 + "]"
    svg = figures(html.page(report(passes=[entry("a", 4, 0.0), entry(text, 2, 0.1)])))[
        "Size and relative error after each pass"
    ]
    lines = [t.text for t in svg.iter("text") if t.attrib["class"] == "strong"]
    assert lines[:2] == ["a", "quantize:W4A16,"] and lines[2] == "fitter=gptq(act_order=True),"
    assert len(lines) == 4 and lines[-1].endswith(" …") and max(map(len, lines)) <= 34
    bars, dots = list(svg.iter("rect")), list(svg.iter("circle"))
    assert float(bars[2].attrib["y"]) > max(float(t.attrib["y"]) for t in svg.iter("text") if t.text == lines[-1])
    assert float(dots[1].attrib["cy"]) == float(bars[2].attrib["y"]) + 7


def test_sensitivity_is_a_line_for_each_candidate() -> None:
    svg = figures(html.page(VARIANTS["sensitivity"]()))["Relative error with one of 3 weights encoded"]
    two, four = ([float(p.split(",")[1]) for p in line.attrib["points"].split()] for line in svg.iter("polyline"))
    assert len(two) == 3 and two == sorted(two, reverse=True)
    # from 0.1 % to 100 % are three decades of 60 units: a factor of 100 is two of them
    assert [b - a for a, b in zip(two, four, strict=True)] == pytest.approx([120] * 3, abs=0.2)
    assert two[0] - two[1] == pytest.approx(60 * log10(2), abs=0.2)
    words = [text.text for text in svg.iter("text")]
    assert words == ["0.1 %", "1 %", "10 %", "100 %", "2.5 bits", "4.5 bits"]
    assert "layer.2, 2.5 bits: 30 %" in [title.text for title in svg.iter("title")]


def test_the_most_sensitive_sites_are_listed() -> None:
    page = Page(html.page(VARIANTS["many sensitive sites"]()))
    assert "|layer.89|900 %|9 %|layer.88|" in page.text and "|layer.70|" in page.text and "|layer.69|" not in page.text
    assert "|2.5 bits a weight: |Affine(bits=2, group=0)|" in page.text.replace("weight:|", "weight: |")
    table = rows(str(VARIANTS["many sensitive sites"]()))
    assert ["site", "2.5 bits", "4.5 bits"] in table
    assert ["layer.89", "9.00e+00", "9.00e-02"] in table and ["layer.82", "8.30e+00", "8.30e-02"] in table
    assert "layer.81" not in str(table)
    assert json.dumps(VARIANTS["sensitivity"]().to_dict())
    assert "bits" not in str(report())


def test_few_sites_are_drawn_by_name() -> None:
    drawn = figures(html.page(report()))
    svg = drawn["Relative error at 2 sites"]
    up, down = lengths(svg, "error")
    assert up / down == pytest.approx(0.01 / 0.04, abs=1e-3)
    assert [text.text for text in svg.iter("text")] == ["a.up", "1 %", "a.down", "4 %"]


def test_no_sites_no_plot_of_them() -> None:
    assert not [caption for caption in figures(html.page(VARIANTS["no sites"]())) if "site" in caption]


def test_many_sites_are_a_profile_and_the_worst_by_name() -> None:
    drawn = figures(html.page(VARIANTS["many sites"]()))
    tall = lengths(drawn["Relative error at 40 sites, input to output"], "error", "height")
    assert len(tall) == 40 and tall == sorted(tall) and tall[20] / tall[39] == pytest.approx(20 / 39, abs=1e-2)
    names = [text.text for text in drawn["The 8 sites with the largest error"].iter("text")][::2]
    assert names == [f"layer.{i}" for i in range(39, 31, -1)]


def test_a_broken_site_counts_as_the_worst() -> None:
    sites = {f"layer.{i}": 0.1 for i in range(9)} | {"bad": nan, "worse": inf}
    drawn = figures(html.page(report(fidelity=fidelity(sites=sites))))
    names = [text.text for text in drawn["The 8 sites with the largest error"].iter("text")][::2]
    assert set(names[:2]) == {"bad", "worse"}


def test_a_long_site_name_keeps_its_end() -> None:
    path = "encoder." * 12 + "query"
    svg = figures(html.page(report(fidelity=fidelity(sites={path: 0.1}))))["Relative error at 1 sites"]
    shown = next(text.text for text in svg.iter("text"))
    assert shown is not None and len(shown) == 54 and shown.startswith("…") and path.endswith(shown[1:])
    assert next(title.text for title in svg.iter("title")) == path


def test_tokens_are_drawn_only_when_they_were_reduced() -> None:
    caption = "Tokens in each attention layer, original and compiled"
    assert caption not in figures(html.page(report()))
    svg = figures(html.page(VARIANTS["fewer tokens"]()))[caption]
    assert lengths(svg, "was", "height") == [140, 140]
    assert lengths(svg, "now", "height") == [140, pytest.approx(140 * 3 / 9, abs=0.1)]


# -- writing -------------------------------------------------------------------------------------------------


def test_writing_where_one_cannot_is_an_error_in_three_lines(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "r.html", tmp_path / "file" / "r.html"):
        with pytest.raises(ArtifactError, match="cannot write") as caught:
            report().to_html(path)
        assert str(path) in caught.value.what and len(str(caught.value).splitlines()) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(_: Report) -> str:
        raise RuntimeError("drawing failed")

    monkeypatch.setattr(html, "page", fail)
    with pytest.raises(RuntimeError, match="drawing failed"):
        report().to_html(path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]


# -- the table and the dictionary ----------------------------------------------------------------------------


def rows(table: str) -> list[list[str]]:
    """The cells of a box-drawn table, row by row."""
    lines = (re.split("[│┃]", line) for line in table.splitlines() if re.match("[│┃]", line))
    return [[cell.strip() for cell in cells[1:-1]] for cells in lines]


def test_table_figures() -> None:
    table = rows(str(report()))
    assert ["size", "4.00 MB", "1.00 MB", "0.250"] in table
    assert ["MACs", "2.00 M", "500.00 k", "0.250"] in table
    assert ["latency, same backend", "10.00 ms", "4.00 ms", "0.400"] in table
    assert ["latency, PyTorch eager", "20.00 ms", "", "0.200"] in table
    assert ["relative error, logits", "", "1.23e-02 ± 5e-04", ""] in table
    assert ["quantize:W8A8", "2", "1.00 MB", "2.00 M", "1.23e-02"] in table


def test_table_is_plain_text_and_keeps_brackets() -> None:
    text = str(report(passes=[entry("quantize:targets=[bold]", 1, 0.0)]))
    assert "\x1b" not in text and "quantize:targets=[bold]" in text


def test_dictionary_is_json_with_the_same_figures() -> None:
    data = json.loads(json.dumps(report().to_dict()))
    assert data["original"]["size_bytes"] == 4_000_000 and data["compiled"]["size_bytes"] == 1_000_000
    assert data["compiled"]["latency_ms"] == {"median": 4.0, "minimum": 3.9, "runs": 10}
    assert data["pytorch_latency_ms"]["median"] == 20.0
    assert data["compiled"]["fidelity"]["samples"] == 32
    assert [item["text"] for item in data["passes"]] == ["canonicalize", "quantize:W8A8"]


def test_explanation_table() -> None:
    fast = Row("a[b]", "int8", "MatMulNBits", True, 0.5, predicted=1.7, roofline=0.25)
    assert "note" not in str(Explanation("onnxruntime", [fast]))  # a column that says nothing is left out
    table = rows(str(Explanation("onnxruntime", [fast, Row("c", "dense", "MatMul", False)])))
    assert ["a[b]", "int8", "MatMulNBits", "yes", "0.500", "1.7", "25%"] in table
    assert ["c", "dense", "MatMul", "no", "", "", ""] in table


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (999, "B", "999 B"),
        (1000, "B", "1.00 kB"),
        (22_710_000, "", "22.71 M"),
        (4.1e9, "", "4.10 G"),
        (0, "B", "0 B"),
    ],
)
def test_quantities(value: float, unit: str, shown: str) -> None:
    assert quantity(value, unit) == shown
