"""Measure the forms of a linear layer on this machine: the same lowering that ships, one form at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir import tape

from ...compiler.cost import measure
from ...compiler.encodings import Affine, Encoding
from .denormals import flushed
from .executable import CONFIG, session_options
from .forms import FORMS
from .lower import Lowering
from .optimise import optimise
from .speeds import ROWS, Speeds

_WIDTH, _LAYERS = 1024, 4
_TENSOR, _TOKEN = {"granularity": "tensor", "code": "int8"}, {"granularity": "token", "code": "int8"}
#: form → (weights, what rounds the activations: attributes of the dynamic quantiser, "static" or nothing)
_TRIED: dict[str, tuple[Encoding | None, Any]] = {
    "fp32": (None, None),
    "DynamicMatMul": (Affine(8), _TENSOR),
    "SharedMatMul": (Affine(8), "static"),
    "IntegerMatMul": (Affine(8), _TOKEN),
    "GroupMatMul": (Affine(4, 32), {"granularity": "group32", "code": "int8"}),
    "BlockMatMul": (Affine(4, 32), None),
    "FoldedMatMul": (Affine(8), None),
    "StoredMatMul": (Affine(8), None),
}


def measure_speeds() -> Speeds:
    """Every form against fp32, interleaved, and the rates of the roofline; takes about a minute."""
    found: dict[str, list[float]] = {name: [] for name in _TRIED}
    for rows in ROWS:
        times = measure({name: _call(name, rows) for name in _TRIED}, runs=30)
        for name in _TRIED:
            found[name].append(round(times["fp32"].median / times[name].median, 3))
    del found["fp32"]
    many = 512
    operations = 2e-6 * many * _WIDTH**2 * _LAYERS
    fastest = measure({"fp32": _call("fp32", many), "int8": _call("SharedMatMul", many)}, runs=20)
    peaks = {name: round(operations / taken.minimum, 1) for name, taken in fastest.items()}
    large, copy = torch.ones(2, 1 << 25)
    peaks["memory"] = round(2e-6 * large.nbytes / measure({"": lambda: copy.copy_(large)}, runs=5)[""].minimum, 1)
    where = f"this machine, {torch.get_num_threads()} threads, ONNX Runtime {onnxruntime.__version__}"
    return Speeds(found, peaks, where)


def _call(form: str, rows: int) -> Callable[[], Any]:
    session = _session(form, rows)
    x = np.random.default_rng(0).standard_normal((1, rows, _WIDTH), dtype=np.float32)
    return lambda: session.run(None, {"x": x})


@flushed()
def _session(form: str, rows: int) -> onnxruntime.InferenceSession:
    """A chain of equal layers in one form, as a session."""
    encoding, rounding = _TRIED[form]
    x = ir.Value(name="x", shape=ir.Shape((1, rows, _WIDTH)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="probe", opset_imports={"": 21, "paretoc": 1})
    for layer in range(_LAYERS):
        site, weight = f"layer{layer}", torch.randn(_WIDTH, _WIDTH) / _WIDTH**0.5
        built = tape.Tape(graph)
        if rounding == "static":
            bounds = [_stored(graph, f"{site}.scale", np.float32(0.03)), _stored(graph, f"{site}.zero", np.uint8(128))]
            x = built.op("StaticQuantize", [x, *bounds], domain="paretoc")
        elif rounding is not None:
            x = built.op("DynamicQuantize", [x], rounding, domain="paretoc")
        if encoding is None:
            read = _stored(graph, f"{site}.weight", weight.numpy())
        else:
            arrays = encoding.encode(weight)
            parts = [
                _stored(graph, f"{site}.weight.{key}", arrays[key].numpy()) for key in encoding.layout(weight.shape)
            ]
            attributes = {"encoding": str(encoding), "shape": list(weight.shape)}
            read = built.op("Decode", parts, attributes, domain="paretoc")
        x = built.op("Linear", [x, read], domain="paretoc", output=ir.Value(name=f"{site}.y"))
        x.shape, x.type = ir.Shape((1, rows, _WIDTH)), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(x)
    model = ir.Model(graph, ir_version=10)
    Lowering(model, "onnxruntime", speeds=Speeds({name: (float(name == form),) * len(ROWS) for name in FORMS})).run()
    optimise(model, [])
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, session_options(CONFIG), providers=["CPUExecutionProvider"])


def _stored(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    tensor = ir.Tensor(np.asarray(value), name=name)
    made = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = made
    return made
