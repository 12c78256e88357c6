"""Program → ONNX → ONNX Runtime, in steps that can be read: translate, lower, optimise, write, run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...compiler.backend import Executable
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


class OnnxRuntime(Onnx):
    """target="onnxruntime": may use the com.microsoft operators that ONNX Runtime runs fastest."""

    name = "onnxruntime"


__all__ = ["Onnx", "OnnxRuntime"]
