"""Measure the forms of a linear layer on this machine: the same lowering that ships, one form at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tape

from ...compiler.cost import measure
from ...compiler.encodings import Affine, Encoding
from .executable import CONFIG
from .forms import FORMS
from .lower import Lowering
from .optimise import optimise
from .rule import STANDARD, Target
from .runtimes import CPU, Runtime, Start
from .speeds import ROWS, Speeds, shipped

_WIDTH, _LAYERS = 1024, 4
_HEADS, _HEAD, _ATTENDED = 8, 64, (64, 128, 256, 512, 1024)
_TENSOR, _TOKEN = {"granularity": "tensor", "code": "int8"}, {"granularity": "token", "code": "int8"}
#: form → (weights, what rounds the activations: attributes of the dynamic quantiser, "static" or nothing)
_TRIED: dict[str, tuple[Encoding | None, Any]] = {
    "fp32": (None, None),
    "DynamicMatMul": (Affine(8), _TENSOR),
    "SharedMatMul": (Affine(8), "static"),
    "RoundedMatMul": (Affine(8), "static"),
    "ShiftedMatMul": (Affine(8), "static"),
    "IntegerMatMul": (Affine(8), _TOKEN),
    "GroupMatMul": (Affine(4, 32), {"granularity": "group32", "code": "int8"}),
    "BlockMatMul": (Affine(4, 32), None),
    "FoldedMatMul": (Affine(8), None),
    "StoredMatMul": (Affine(8), None),
}


def measure_speeds(runtime: Runtime = CPU) -> Speeds:
    """Every form that the runtime is given against fp32, interleaved, and the rates of the roofline; takes about a
    minute."""
    contrib = runtime is CPU
    tried = ["fp32", *(name for name in _TRIED if name in shipped(runtime.table).table)]
    found: dict[str, list[float]] = {name: [] for name in tried}
    for rows in ROWS:
        times = measure({name: _call(name, rows, runtime) for name in tried}, runs=30)
        for name in tried:
            found[name].append(round(times["fp32"].median / times[name].median, 3))
    del found["fp32"]
    many = 512
    operations = 2e-6 * many * _WIDTH**2 * _LAYERS
    integers = "SharedMatMul" if contrib else "ShiftedMatMul"
    fastest = measure({"fp32": _call("fp32", many, runtime), "int8": _call(integers, many, runtime)}, runs=20)
    peaks = {name: round(operations / taken.minimum, 1) for name, taken in fastest.items()}
    large, copy = torch.ones(2, 1 << 25)
    peaks["memory"] = round(2e-6 * large.nbytes / measure({"": lambda: copy.copy_(large)}, runs=5)[""].minimum, 1)
    where = f"this machine, {torch.get_num_threads()} threads, {runtime.version}"
    return Speeds(found, peaks, where, joint_rows=_joint_rows() if contrib else 0)


def _joint_rows() -> int:
    """Up to how many rows one QAttention is faster than three products and Attention."""
    last = 0
    for rows in _ATTENDED:
        times = measure({name: _attention(rows, name == "joint") for name in ("joint", "apart")}, runs=20)
        if times["joint"].minimum > times["apart"].minimum:  # of runs so short medians are noise
            break
        last = rows
    return last


def _attention(rows: int, joint: bool) -> Callable[[], Any]:
    """A chain of attentions, each on three products of one input."""
    width = _HEADS * _HEAD
    x = ir.Value(name="x", shape=ir.Shape((1, rows, width)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="probe", opset_imports={"": 23, "paretoc": 1})
    for layer in range(_LAYERS):
        source = _rounded(graph, x, f"layer{layer}", "static")
        parts = [_linear(graph, source, f"layer{layer}.{part}", Affine(8), rows, width) for part in "qkv"]
        x = tape.Tape(graph).op("Attention", parts, {"q_num_heads": _HEADS, "kv_num_heads": _HEADS})
        x.shape, x.type = ir.Shape((1, rows, width)), ir.TensorType(ir.DataType.FLOAT)
    few = [f"layer{layer}.{part}" for layer in range(_LAYERS) for part in "qkv"] if joint else []
    return _started(graph, x, "SharedMatMul", Target(True, few), CPU)


def _call(form: str, rows: int, runtime: Runtime = CPU) -> Callable[[], Any]:
    """A chain of equal layers in one form."""
    encoding, rounding = _TRIED[form]
    x = ir.Value(name="x", shape=ir.Shape((1, rows, _WIDTH)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="probe", opset_imports={"": 21, "paretoc": 1})
    for layer in range(_LAYERS):
        source = _rounded(graph, x, f"layer{layer}", rounding)
        x = _linear(graph, source, f"layer{layer}", encoding, rows, _WIDTH)
    return _started(graph, x, form, STANDARD, runtime)


def _rounded(graph: ir.Graph, x: ir.Value, site: str, rounding: Any) -> ir.Value:
    """x behind what rounds it."""
    built = tape.Tape(graph)
    if rounding == "static":
        bounds = [_stored(graph, f"{site}.scale", np.float32(0.03)), _stored(graph, f"{site}.zero", np.uint8(128))]
        return built.op("StaticQuantize", [x, *bounds], domain="paretoc")
    return x if rounding is None else built.op("DynamicQuantize", [x], rounding, domain="paretoc")


def _linear(graph: ir.Graph, x: ir.Value, site: str, encoding: Encoding | None, rows: int, width: int) -> ir.Value:
    """x·W with W stored so."""
    weight, built = torch.randn(width, width) / width**0.5, tape.Tape(graph)
    if encoding is None:
        read = _stored(graph, f"{site}.weight", weight.numpy())
    else:
        arrays = encoding.encode(weight)
        parts = [_stored(graph, f"{site}.weight.{key}", arrays[key].numpy()) for key in encoding.layout(weight.shape)]
        attributes = {"encoding": str(encoding), "shape": list(weight.shape)}
        read = built.op("Decode", parts, attributes, domain="paretoc")
    bias = _stored(graph, f"{site}.bias", np.full(width, 0.1, dtype=np.float32))
    y = built.op("Linear", [x, read, bias], domain="paretoc", output=ir.Value(name=f"{site}.y"))
    y.shape, y.type = ir.Shape((1, rows, width)), ir.TensorType(ir.DataType.FLOAT)
    return y


def _started(graph: ir.Graph, y: ir.Value, form: str, target: Target, runtime: Runtime) -> Callable[[], Any]:
    """A session on numbers of the shape of its input."""
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=10)
    chosen = Speeds({name: (float(name == form),) * len(ROWS) for name in FORMS})
    Lowering(model, runtime is CPU, speeds=chosen).run()
    optimise(model, [], target)
    session = runtime.start(Start(ir.to_proto(model).SerializeToString(), CONFIG))
    x = np.random.default_rng(0).standard_normal(graph.inputs[0].shape.numpy(), dtype=np.float32)
    outputs = [str(graph.outputs[0].name)]
    return lambda: session.run(outputs, {"x": x})


def _stored(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    tensor = ir.Tensor(np.asarray(value), name=name)
    made = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = made
    return made
