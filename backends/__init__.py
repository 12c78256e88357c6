"""Where a program runs: eager PyTorch (the reference), portable ONNX, ONNX Runtime."""

from __future__ import annotations

from ..compiler.backend import Backend
from ..compiler.hookspecs import hook
from .eager import Eager
from .onnxruntime import Onnx, OnnxRuntime

__all__ = ["Eager", "Onnx", "OnnxRuntime"]


@hook
def paretoc_backends() -> list[Backend]:
    return [Eager(), Onnx(), OnnxRuntime()]
