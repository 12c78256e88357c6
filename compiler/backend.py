"""The Backend protocol: program → something that runs, and the truth about what runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from .program import Program

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Row:
    """One site in `explain()`: its encoding, the kernel that runs it, whether that is a fast one, and why not."""

    site: str
    encoding: str
    kernel: str
    accelerated: bool
    milliseconds: float | None = None
    note: str = ""


@runtime_checkable
class Executable(Protocol):
    """A lowered program."""

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Flat inputs → flat outputs."""

    def explain(self) -> list[Row]:
        """What runs each site."""

    def stored_bytes(self) -> int:
        """Bytes of the tensors in the model file: what is on disk and what a session loads."""

    def save(self, directory: Path) -> dict[str, Any]:
        """Write the model into a directory; returns what the manifest must remember to load it again."""

    def export(self, path: Path) -> None:
        """Write one self-contained ONNX file."""


@runtime_checkable
class Backend(Protocol):
    """A `target=`."""

    name: str

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        """Raises LoweringError, naming the node, for what it cannot lower."""

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        """What `Executable.save` wrote → an executable. Must not execute anything from the directory."""


@dataclass(frozen=True)
class Explanation:
    """Per site: encoding, kernel, accelerated, milliseconds."""

    target: str
    rows: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        from .report import explanation_table, render

        return render(explanation_table(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .report import explanation_table

        yield explanation_table(self)

    def to_dict(self) -> dict[str, Any]:
        return {"target": self.target, "rows": [vars(row) for row in self.rows]}
