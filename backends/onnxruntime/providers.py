"""The execution providers of ONNX Runtime that a session can run on: its own for CPUs, and OpenVINO.

OpenVINO comes as a plugin (`pip install paretoc[openvino]`) and takes whole graphs of standard operators. Where the CPU
has AMX it is faster than ONNX Runtime's own kernels on the models measured, most of all on convolutions
(`benchmarks/onnxruntime_cpu.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import onnxruntime

from ...compiler.errors import LoweringError


class Provider(Protocol):
    @property
    def name(self) -> str:
        """What ONNX Runtime calls it."""

    @property
    def table(self) -> str:
        """What `speeds.py` calls its table."""

    @property
    def fits_sizes(self) -> bool:
        """Whether a session that knows the sizes of its inputs is faster than one for any."""

    def arguments(self, options: onnxruntime.SessionOptions) -> dict[str, Any]:
        """What else `InferenceSession` is given with these options, so that it runs on this provider. Raises
        LoweringError where the provider is not installed."""


class Cpu:
    name = table = "CPUExecutionProvider"
    fits_sizes = False

    def arguments(self, options: onnxruntime.SessionOptions) -> dict[str, Any]:
        return {"providers": [self.name]}


@dataclass(frozen=True)
class OpenVino:
    """`precision`: what floating operators may compute in, "f32" or "bf16"; where a CPU has no bf16, they stay in
    f32."""

    precision: str = "f32"
    name: ClassVar[str] = "OpenVINOExecutionProvider"
    fits_sizes: ClassVar[bool] = True

    @property
    def table(self) -> str:
        return f"{self.name}-{self.precision}"

    def arguments(self, options: onnxruntime.SessionOptions) -> dict[str, Any]:
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": str(options.intra_op_num_threads),
            "NUM_STREAMS": "1",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # activations are rounded where the program rounds them
        }
        options.add_provider_for_devices([_openvino_cpu()], {"load_config": json.dumps({"CPU": settings})})
        # OpenVINO looks for the exporter's shapes. ONNX Runtime moves what rounds an activation up through views, and
        # makes a Gemm between two Reshapes of a product with a bias: 6–10 % of a ViT's time each
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return {}


@cache
def _openvino_cpu() -> Any:
    """The CPU as a device of OpenVINO's plugin, which a process registers once."""
    fix = "pip install 'paretoc[openvino]', or compile with target='onnxruntime'"
    try:
        if not _openvino_devices():
            import onnxruntime_ep_openvino as plugin

            onnxruntime.register_execution_provider_library("paretoc.openvino", plugin.get_library_path())
        return next(d for d in _openvino_devices() if d.ep_metadata.get("ov_device") == "CPU")
    except ImportError as error:
        what = "OpenVINO's plugin for ONNX Runtime is not installed"
        raise LoweringError(what, where="target 'openvino'", fix=fix) from error
    except Exception as error:  # ONNX Runtime has no class of its own for what a plugin refuses
        what = f"OpenVINO's plugin does not start in ONNX Runtime {onnxruntime.__version__}: {error!r}".splitlines()[0]
        raise LoweringError(what, where="target 'openvino'", fix=fix) from error


def _openvino_devices() -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == OpenVino.name]


CPU = Cpu()
