"""OpenVINO (`pip install paretoc[openvino]`), which runs ONNX models of standard operators on x86 and Arm CPUs.

It fuses what stands around a product into its kernel: with static ranges, in the faster of f32 and bf16, it takes .68
to .95 of the time of ONNX Runtime's own kernels on the models of `benchmarks/onnxruntime_cpu.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...compiler.errors import LoweringError
from .denormals import flushed
from .runtimes import Array, Start, unfit
from .speeds import cpu_flags

if TYPE_CHECKING:
    import openvino


@dataclass(frozen=True)
class OpenVino:
    """`precision`: what floating operators may compute in, "f32" or "bf16"; where a CPU has no bf16, they stay in
    f32."""

    precision: str = "f32"
    fits_sizes = signed = True

    @property
    def version(self) -> str:
        return f"OpenVINO {_openvino().__version__.partition('-')[0]}"

    @property
    def table(self) -> str:
        return f"OpenVINO-{self.precision}"

    @flushed()
    def start(self, start: Start, *, profiled: bool = False) -> OpenVinoSession:
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision if _knows_bf16() else "f32",
            "INFERENCE_NUM_THREADS": start.threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # activations are rounded where the program rounds them
            "CPU_DENORMALS_OPTIMIZATION": True,  # see denormals.py
            "PERF_COUNT": profiled,
        }
        try:
            model = _core().read_model(str(start.model) if isinstance(start.model, Path) else start.model)
            if start.sizes is not None:
                model.reshape({port: list(start.sizes[port.any_name]) for port in model.inputs})
            return OpenVinoSession(_core().compile_model(model, "CPU", settings))
        except RuntimeError as error:
            raise RuntimeError(_said(error)) from error


@dataclass(frozen=True)
class Ran:
    """A kernel that ran: its name, its operator in OpenVINO's words, how it was executed ("brgemm_avx512_I8"), the
    milliseconds of a call, the nodes that it does the work of, and the constants that it reads."""

    name: str
    operator: str
    executed: str
    milliseconds: float = 0.0
    nodes: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()


class OpenVinoSession:
    def __init__(self, compiled: openvino.CompiledModel) -> None:
        self.compiled = compiled
        self._inputs = {port.any_name for port in compiled.inputs}
        self._outputs = {name: index for index, port in enumerate(compiled.outputs) for name in port.names}
        self._kept = threading.local()  # a request serves one call at a time

    @property
    def _request(self) -> openvino.InferRequest:
        if not hasattr(self._kept, "request"):
            self._kept.request = self.compiled.create_infer_request()
        return self._kept.request

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        fed = {name: array for name, array in feeds.items() if name in self._inputs}
        try:
            with flushed():
                found = self._request.infer(fed, share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise unfit(_said(error)) from error
        return [found[self._outputs[name]].copy() for name in outputs]

    def profile(self, feeds: Mapping[str, Array], calls: int) -> list[Ran]:
        """What runs, in a session that was started for it, and how long on average after a first call."""
        self.run([], feeds)
        first = self._times()
        for _ in range(calls):
            self.run([], feeds)
        taken = {name: ((calls + 1) * mean - first[name]) / calls for name, mean in self._times().items()}
        nodes = {node.get_friendly_name(): node for node in self.compiled.get_runtime_model().get_ordered_ops()}
        return [
            Ran(part.node_name, part.node_type, part.exec_type, taken[part.node_name], *_origins(nodes[part.node_name]))
            for part in self._request.profiling_info
            if part.node_name in nodes
        ]

    def _times(self) -> dict[str, float]:
        """Kernel → milliseconds, the mean over all calls until now."""
        return {part.node_name: part.real_time.total_seconds() * 1e3 for part in self._request.profiling_info}


def _origins(node: openvino.Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes of the model that it does the work of, and the constants that it reads."""
    nodes = [name for name in _noted(node, "originalLayersNames").split(",") if name]
    return tuple(nodes), tuple(name for port in node.input_values() if (name := _constant(port.get_node())))


def _constant(node: openvino.Node) -> str:
    """The name of a constant behind what only lays it out anew, else nothing."""
    while _noted(node, "layerType") in ("Reorder", "Transpose", "Reshape", "Convert"):
        node = node.input_value(0).get_node()
    return str(node.get_friendly_name()) if _noted(node, "layerType") == "Const" else ""


def _noted(node: openvino.Node, key: str) -> str:
    return str(node.get_rt_info()[key].value)


def _knows_bf16() -> bool:
    """Whether the CPU has instructions for it, or does not say."""
    flags = cpu_flags()
    return "fpu" not in flags or bool(flags & {"avx512_bf16", "amx_bf16"})


def _said(error: RuntimeError) -> str:
    """The last line, behind those that name OpenVINO's own source files."""
    return str(error).strip().rpartition("\n")[2]


@cache
def _core() -> openvino.Core:
    return _openvino().Core()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise LoweringError(
            "OpenVINO is not installed",
            where="target 'openvino'",
            fix="pip install 'paretoc[openvino]', or compile with target='onnxruntime'",
        ) from error
    return openvino
