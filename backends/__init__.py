"""Where a program runs: eager PyTorch (the reference), portable ONNX, ONNX Runtime, OpenVINO, Triton kernels on a
GPU."""

from __future__ import annotations

from ..compiler.backend import Backend
from ..compiler.hookspecs import hook
from .eager import Eager
from .onnxruntime import Onnx, OnnxRuntime, OpenVino
from .triton import Triton

__all__ = ["Eager", "Onnx", "OnnxRuntime", "OpenVino", "Triton"]


@hook
def paretoc_backends() -> list[Backend]:
    return [Eager(), Onnx(), OnnxRuntime(), OpenVino(), OpenVino("bf16"), Triton()]
