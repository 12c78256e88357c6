"""The reference: the fx graph in PyTorch, encoded weights decoded on the fly. The oracle of every other backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..compiler.backend import Executable, Row
from ..compiler.errors import ArtifactError
from ..compiler.program import Program
from ..compiler.sites import weight_sites
from .onnxruntime import Onnx


@dataclass
class EagerExecutable:
    """Runs a program as it stands."""

    program: Program

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self.program.run(inputs)

    def explain(self) -> list[Row]:
        rows = []
        for site in weight_sites(self.program):
            encoding = self.program.encoding(site.weight)
            kernel = f"decode + {site.node.target}" if encoding else str(site.node.target)
            rows.append(Row(site.path, str(encoding or "dense"), kernel, False, note="reference, not accelerated"))
        return rows

    def stored_bytes(self) -> int:
        return sum(t.numel() * t.dtype.itemsize for t in self.program.weights().values())

    def save(self, directory: Path) -> dict[str, Any]:
        return Onnx().lower(self.program, {}).save(directory)

    def export(self, path: Path) -> None:
        Onnx().lower(self.program, {}).export(path)


class Eager:
    """target="eager". Saves as portable ONNX, like target="onnx"."""

    name = "eager"

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        return EagerExecutable(program)

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        raise ArtifactError(
            "an artifact holds no PyTorch graph",
            where=str(directory),
            fix="load it with target 'onnx' or 'onnxruntime'",
        )

    def save_all(self, executables: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
        return Onnx().save_all({file: Onnx().lower(e.program, {}) for file, e in executables.items()}, directory)
