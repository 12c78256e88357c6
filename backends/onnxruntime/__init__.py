"""Program → ONNX → ONNX Runtime, in steps that can be read: translate, lower, optimise, write, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compiler.backend import Calibration, Executable
from ...compiler.program import Program

if TYPE_CHECKING:
    from .runtimes import Runtime


class Onnx:
    """target="onnx": standard operators only; runs on ONNX Runtime here and anywhere else."""

    name = "onnx"
    #: whether it may use com.microsoft operators
    contrib = False

    def runtime(self) -> Runtime:
        from .runtimes import CPU

        return CPU

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        from .executable import OnnxExecutable

        return OnnxExecutable.from_program(program, contrib=self.contrib, runtime=self.runtime())

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        from .executable import OnnxExecutable

        return OnnxExecutable.from_directory(directory, settings, self.runtime())

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
        return _calibrate(self.runtime())


class OpenVino(Onnx):
    """target="openvino": standard operators, run by OpenVINO; "openvino-bf16": its floating operators in bf16 where the
    CPU can, which rounds what no pass of the program does."""

    def __init__(self, precision: str = "f32") -> None:
        self.precision = precision
        self.name = "openvino" if precision == "f32" else f"openvino-{precision}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Fidelity is measured on the program, which knows nothing of these."""
        from .speeds import cpu_flags

        exact, flags = self.precision == "f32", cpu_flags()
        rounded = () if exact else (f"floating operators compute in {self.precision}; fidelity is without it",)
        if "fpu" not in flags or flags & {"avx512_vnni", "avx_vnni"}:
            return rounded
        return (
            *rounded,
            "sums of 8-bit products overflow on a CPU without VNNI; weights=Affine(7) keeps them in range",
        )

    def runtime(self) -> Runtime:
        from . import runtime_openvino

        return runtime_openvino.OpenVino(self.precision)

    def calibrate(self) -> Calibration:
        return _calibrate(self.runtime())


def _calibrate(runtime: Runtime) -> Calibration:
    from .probe import measure_speeds
    from .speeds import ROWS

    measured = measure_speeds(runtime)
    table = {form: {_rows(r): v for r, v in zip(ROWS, row, strict=True)} for form, row in measured.table.items()}
    return Calibration(table, measured.save(runtime.table))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


__all__ = ["Onnx", "OnnxRuntime", "OpenVino"]
