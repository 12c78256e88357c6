"""Program → ONNX → ONNX Runtime, in steps that can be read: translate, lower, optimise, write, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...compiler.backend import Calibration, Executable
from ...compiler.program import Program


class Onnx:
    """target="onnx": standard operators only; runs on ONNX Runtime here and anywhere else."""

    name = "onnx"

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        from .executable import OnnxExecutable

        return OnnxExecutable.from_program(program, target=self.name, options=options)

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        from .executable import OnnxExecutable

        return OnnxExecutable.from_directory(directory, settings)

    def save_all(self, executables: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
        from .executable import save_all

        return save_all(executables, directory)


class OnnxRuntime(Onnx):
    """target="onnxruntime": may use the com.microsoft operators that ONNX Runtime runs fastest."""

    name = "onnxruntime"
    #: an RMS norm takes two thirds of the time of a LayerNorm, and is one kernel with the sum before it
    prepares = ("center_stream",)

    def calibrate(self) -> Calibration:
        from .probe import measure_speeds
        from .speeds import ROWS

        measured = measure_speeds()
        table = {form: {_rows(r): v for r, v in zip(ROWS, row, strict=True)} for form, row in measured.table.items()}
        return Calibration(table, measured.save())


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


__all__ = ["Onnx", "OnnxRuntime"]
