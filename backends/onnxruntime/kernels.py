"""Which kernel really runs each site: read from the optimised session graph and from the session's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from ...compiler.backend import Row
from .nearest import nearest_fast
from .speeds import load_speeds

#: the fast integer kernels
_INTEGER = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "QLinearConv"}
_RANGES = {"static": "static range", "tensor": "range per tensor", "token": "range per token"}
_FLOATING = {"MatMul": "fp32 MatMul", "Gemm": "fp32 Gemm", "FusedMatMul": "fp32 FusedMatMul", "FusedGemm": "fp32 Gemm"}
_FLOATING |= {"Conv": "fp32 Conv", "FusedConv": "fp32 FusedConv", "FusedMatMulActivation": "fp32 FusedMatMul"}
#: operators that consume a weight, as opposed to decoding it
_READERS = {*_INTEGER, *_FLOATING, "MatMulNBits", "GatherBlockQuantized"}
_PROFILE_RUNS = 5


@dataclass(frozen=True)
class Placed:
    """A site of the program and what was chosen for it; `speed` is predicted, in multiples of the fp32 operator."""

    path: str
    encoding: str
    kind: str
    activations: str
    macs: int
    bytes: int
    form: str = ""
    speed: float | None = None


def explain_session(
    start: Callable[[onnxruntime.SessionOptions], onnxruntime.InferenceSession],
    options: onnxruntime.SessionOptions,
    sites: Sequence[Placed],
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
    nodes, peaks = _by_site(graph, sites), load_speeds().peaks
    return [_row(site, nodes.get(site.path), times, peaks) for site in sites if site.kind != "norm"]


def _node_times(profile: Path) -> dict[str, float]:
    """Node name → milliseconds of one run: the median over the profiled runs."""
    events: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(profile.read_text()):
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            events[name.removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    return {name: sorted(durations)[len(durations) // 2] for name, durations in events.items()}


def _by_site(graph: onnx.GraphProto, sites: Sequence[Placed]) -> dict[str, onnx.NodeProto]:
    """Site → the node that reads its weight: by the node's name, else by the name of the stored tensor."""
    kinds = {site.path: site.kind for site in sites}
    known = set(kinds)
    found: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type in (*_READERS, "Gather") and node.name in known:
            found.setdefault(node.name, node)
    decoded: dict[str, str] = {}  # value computed from stored arrays → the site they belong to
    for node in graph.node:
        owners = (decoded.get(i) or _owner(i, known) for i in node.input)
        if node.domain == "com.microsoft.nchwc" and len(node.input) > 2:  # its weight has been laid out anew
            owners = (_owner(i, known, ".bias") for i in node.input[2:])
        owner = next((o for o in owners if o), None)
        if owner is None:
            continue
        if node.op_type in _READERS or (node.op_type == "Gather" and kinds[owner] == "embedding"):
            found.setdefault(owner, node)
        else:
            decoded.update(dict.fromkeys(node.output, owner))
    return found


def _owner(name: str, known: set[str], part: str = ".weight") -> str | None:
    """encoder.query.weight.codes → encoder.query, when that is a site."""
    path, separator, _ = name.partition(part)
    return path if separator and path in known else None


def _row(site: Placed, node: onnx.NodeProto | None, times: Mapping[str, float], peaks: Mapping[str, float]) -> Row:
    if node is None:
        note = "no node of the optimised graph reads its weight"
        return Row(site.path, site.encoding, "folded away or fused", False, note=note)
    kernel, fast, note = _describe(node, site)
    taken = times.get(node.name)
    least = 0.0
    if site.macs:
        peak = peaks["int8" if fast else "fp32"]
        least = max(2 * site.macs / peak, site.bytes / peaks["memory"]) / 1e6
    return Row(site.path, site.encoding, kernel, fast, taken, note, site.speed, least / taken if taken else None)


def _describe(node: onnx.NodeProto, site: Placed) -> tuple[str, bool, str]:
    """(kernel, accelerated, note)"""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMulNBits":
        bits, block = attributes["bits"], attributes["block_size"]
        level = attributes.get("accuracy_level", 0)
        activations = "int8 activations" if level == 4 else "floating activations"
        kernel = f"MatMulNBits {bits} bit, block {block}, accuracy level {level} ({activations})"
        return kernel, level == 4, "" if level == 4 else "packed in memory; floating activations, no speed-up claimed"
    if node.op_type in _INTEGER:
        return f"{node.op_type} (u8×s8, {_RANGES[site.activations]})", True, ""
    encoded = site.encoding != "dense"
    if site.kind == "embedding":
        return f"{node.op_type} of {'codes' if encoded else 'float rows'}", encoded, ""
    kernel = _FLOATING.get(node.op_type, node.op_type)
    if not encoded:
        return kernel, False, ""
    if site.encoding.startswith("NM(") and ("values=" not in site.encoding or "values=Dense" in site.encoding):
        why = "ONNX Runtime has no n:m kernel, the zeros are stored and multiplied"
    else:
        why = "small on disk, decoded to fp32 when the session starts"
    nearest = nearest_fast(site.kind, site.activations)
    return kernel, False, f"not accelerated: {why}" + (f"; {nearest} has a fast kernel" if nearest else "")
