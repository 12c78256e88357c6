"""HTML from strings: what is not Markup is escaped on its way in. And how the report's page writes its figures."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from .report import Report, quantity


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


def join(parts: Iterable[Markup]) -> Markup:
    return Markup("".join(parts))


def amount(value: float, unit: str) -> str:
    return f"{value:.2f} ms" if unit == "ms" else quantity(value, unit)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def contenders(report: Report) -> list[tuple[str, str]]:
    """Key in `report.latency` and name for the reader."""
    names = {"pytorch": "PyTorch eager", "original": "original", "compiled": "compiled"}
    return [(key, name) for key, name in names.items() if key in report.latency]
