"""Which kernel really runs each site: read from the optimised session graph and from the session's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from ...compiler.backend import Row

#: operator → (what to call it, whether it is a fast integer kernel)
_KERNELS = {
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul (u8×s8, range per tensor)", True),
    "MatMulIntegerToFloat": ("MatMulIntegerToFloat (u8×s8)", True),
    "MatMulInteger": ("MatMulInteger (u8×s8)", True),
    "QLinearMatMul": ("QLinearMatMul (u8×s8)", True),
    "QGemm": ("QGemm (u8×s8)", True),
    "QLinearConv": ("QLinearConv (u8×s8)", True),
    "ConvInteger": ("ConvInteger (u8×s8)", True),
}
_FLOATING = {"MatMul": "fp32 MatMul", "Gemm": "fp32 Gemm", "FusedMatMul": "fp32 FusedMatMul", "FusedGemm": "fp32 Gemm"}
_FLOATING |= {"Conv": "fp32 Conv", "FusedConv": "fp32 FusedConv", "FusedMatMulActivation": "fp32 FusedMatMul"}
_WEIGHT_OPERATORS = {*_KERNELS, *_FLOATING, "MatMulNBits", "Gather", "GatherBlockQuantized"}
_PROFILE_RUNS = 5


def explain_session(
    start: Callable[[onnxruntime.SessionOptions], onnxruntime.InferenceSession],
    options: onnxruntime.SessionOptions,
    settings: Mapping[str, Any],
    feeds: Mapping[str, Any],
) -> list[Row]:
    """Start a profiled session, run it, and look up every site in its optimised graph."""
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = start(options)
        for _ in range(_PROFILE_RUNS):
            session.run(None, dict(feeds))
        times = _node_times(Path(session.end_profiling()))
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    nodes = _by_site(graph, [path for path, _, _ in settings["sites"]])
    return [_row(path, encoding, kind, nodes.get(path), times) for path, encoding, kind in settings["sites"] if kind != "norm"]


def _node_times(profile: Path) -> dict[str, float]:
    """Node name → milliseconds of one run: the median over the profiled runs."""
    events: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            events[name.removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    return {name: sorted(durations)[len(durations) // 2] for name, durations in events.items()}


def _by_site(graph: onnx.GraphProto, paths: list[str]) -> dict[str, onnx.NodeProto]:
    """Site → the node that reads its weight: by the node's name, else by the name of the stored tensor."""
    known = set(paths)
    found: dict[str, onnx.NodeProto] = {}
    produced = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type in _WEIGHT_OPERATORS and node.name in known:
            found.setdefault(node.name, node)
    for node in graph.node:
        if node.op_type not in _WEIGHT_OPERATORS:
            continue
        for name in node.input:
            producer = produced.get(name)
            sources = [name, *(producer.input if producer is not None and producer.op_type == "DequantizeLinear" else ())]
            for source in sources:
                path = source.partition(".weight")[0]
                if path in known:
                    found.setdefault(path, node)
    return found


def _row(path: str, encoding: str, kind: str, node: onnx.NodeProto | None, times: Mapping[str, float]) -> Row:
    if node is None:
        return Row(path, encoding, "folded away or fused", False, note="no node of the optimised graph reads its weight")
    kernel, fast, note = _describe(node, encoding, kind)
    return Row(path, encoding, kernel, fast, times.get(node.name), note)


def _describe(node: onnx.NodeProto, encoding: str, kind: str) -> tuple[str, bool, str]:
    """(kernel, accelerated, note)"""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMulNBits":
        bits, block = attributes["bits"], attributes["block_size"]
        level = attributes.get("accuracy_level", 0)
        activations = "int8 activations" if level == 4 else "floating activations"
        kernel = f"MatMulNBits {bits} bit, block {block}, accuracy level {level} ({activations})"
        return kernel, True, "" if level == 4 else "fast for few rows (decoding); saves memory otherwise"
    if node.op_type in _KERNELS:
        kernel, fast = _KERNELS[node.op_type]
        return kernel, fast, ""
    if kind == "embedding":
        return f"{node.op_type} of {'codes' if encoding != 'dense' else 'float rows'}", encoding != "dense", ""
    kernel = _FLOATING.get(node.op_type, node.op_type)
    note = "" if encoding == "dense" else "not accelerated: the weight is decoded to floating point"
    if encoding.startswith("NM(") and "Dense(" in encoding:
        note = "not accelerated: ONNX Runtime has no n:m kernel, the zeros are stored and multiplied"
    return kernel, False, note
