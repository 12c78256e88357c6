"""Program → ONNX → ONNX Runtime, in steps that can be read: translate, lower, optimise, write, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.backend import Calibration, Executable
from ...compiler.program import Program

if TYPE_CHECKING:
    from .providers import Provider


class Onnx:
    """target="onnx": standard operators only; runs on ONNX Runtime here and anywhere else."""

    name = "onnx"
    #: whether it may use com.microsoft operators
    contrib = False

    def provider(self) -> Provider:
        from .providers import CPU

        return CPU

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        from .executable import OnnxExecutable

        return OnnxExecutable.from_program(program, contrib=self.contrib, provider=self.provider())

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        from .executable import OnnxExecutable

        return OnnxExecutable.from_directory(directory, settings, self.provider())

    def save_all(self, executables: Mapping[str, Any], directory: Path) -> dict[str, dict[str, Any]]:
        from .executable import save_all

        return save_all(executables, directory)


class OnnxRuntime(Onnx):
    """target="onnxruntime": may use the com.microsoft operators that ONNX Runtime runs fastest."""

    name = "onnxruntime"
    contrib = True
    #: an RMS norm takes two thirds of the time of a LayerNorm, and is one kernel with the sum before it
    prepares = ("center_stream",)

    def calibrate(self) -> Calibration:
        return _calibrate(self.provider())


class OpenVino(Onnx):
    """target="openvino": standard operators, run by OpenVINO inside ONNX Runtime; "openvino-bf16": its floating
    operators in bf16 where the CPU can, which rounds what no pass of the program does."""

    def __init__(self, precision: str = "f32") -> None:
        self.precision = precision
        self.name = "openvino" if precision == "f32" else f"openvino-{precision}"
        #: fidelity is measured on the program, which knows nothing of it
        self.notes = (
            () if precision == "f32" else (f"floating operators compute in {precision}; fidelity is without it",)
        )

    def provider(self) -> Provider:
        from . import providers

        return providers.OpenVino(self.precision)

    def calibrate(self) -> Calibration:
        return _calibrate(self.provider())


def _calibrate(provider: Provider) -> Calibration:
    from .probe import measure_speeds
    from .speeds import ROWS

    measured = measure_speeds(provider)
    table = {form: {_rows(r): v for r, v in zip(ROWS, row, strict=True)} for form, row in measured.table.items()}
    return Calibration(table, measured.save(provider.table))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


__all__ = ["Onnx", "OnnxRuntime", "OpenVino"]
