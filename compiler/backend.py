"""The Backend protocol: program → something that runs, and the truth about what runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from .causal import Cache
from .program import Program

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Row:
    """One site in `explain()`: its encoding, the kernel that runs it, whether that is a fast one, and why not.

    `milliseconds` of the example call are measured; `predicted` is the speed the choice of kernel counted on, in
    multiples of fp32; `roofline` the least time the machine could need for it, as a share of what it took; `macs` its
    multiply–accumulates; `instead` the nearest scheme that has a fast kernel, where its own has none.
    """

    site: str
    encoding: str
    kernel: str
    accelerated: bool
    milliseconds: float | None = None
    note: str = ""
    predicted: float | None = None
    roofline: float | None = None
    macs: int = 0
    instead: str = ""


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


class Decoder(Protocol):
    """A text being written: it remembers the keys and values of the tokens it was given."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """The next tokens `[B, T]`, the mask `[B, past + T]` and positions `[B, T]` → logits `[B, T, V]`, or of the
        last tokens alone."""


@runtime_checkable
class CachingExecutable(Executable, Protocol):
    """An executable that can keep the key-value cache itself, without passing it in and out."""

    def decoder(self, cache: Cache, batch: int, tokens: int) -> Decoder:
        """Ready for `batch` texts of at most `tokens` tokens."""


@runtime_checkable
class Predicting(Executable, Protocol):
    """An executable that knows, before it has run, how fast its kernels should be."""

    def predict(self) -> list[Row]:
        """Its sites with `macs`, `predicted` and `instead`."""


@runtime_checkable
class Backend(Protocol):
    """A `target=`."""

    name: str

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        """Raises LoweringError, naming the node, for what it cannot lower."""

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        """What `Executable.save` wrote → an executable. Must not execute anything from the directory."""


@runtime_checkable
class Sharing(Protocol):
    """A backend that can write several executables side by side, with every weight they share stored once."""

    def save_all(self, executables: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
        """Its own executables by file name → for each what the manifest must remember to load it again."""


@dataclass(frozen=True)
class Calibration:
    """Kernel → shape → multiples of fp32, and the file that keeps them."""

    speeds: dict[str, dict[str, float]]
    kept: Path


@runtime_checkable
class Calibrated(Protocol):
    """A backend that chooses kernels by speeds it can measure."""

    def calibrate(self) -> Calibration:
        """Measure this machine and keep the result for later compilations."""


def channel_multiple(backend: Backend) -> int:
    """Numbers of channels that the kernels of a backend like are multiples of this: its `channel_multiple`, or 8."""
    return int(getattr(backend, "channel_multiple", 8))


def prepares(backend: Backend) -> tuple[str, ...]:
    """Names of passes that change nothing by themselves and make a model faster on a backend: its `prepares`. They run
    before weights are rounded."""
    return tuple(getattr(backend, "prepares", ()))


def notes(backend: Backend) -> tuple[str, ...]:
    """What a report must tell of whatever runs on a backend: its `notes`."""
    return tuple(getattr(backend, "notes", ()))


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
