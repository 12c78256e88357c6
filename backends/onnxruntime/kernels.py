"""Which kernel really runs each site: read from the optimised session graph and from the session's own profile."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx

from ...compiler.backend import Row
from .denormals import flushed
from .projections import JOINT
from .runtimes import OrtSession, Start, inference_session, session_options
from .speeds import MARGIN, Speeds

#: the fast integer kernels
_INTEGER = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "QLinearConv"}
_INTEGER |= {"QAttention"}
_RANGES = {"static": "static range", "tensor": "range per tensor", "token": "range per token"}
_FLOATING = {"MatMul": "fp32 MatMul", "Gemm": "fp32 Gemm", "FusedMatMul": "fp32 FusedMatMul", "FusedGemm": "fp32 Gemm"}
_FLOATING |= {"Conv": "fp32 Conv", "FusedConv": "fp32 FusedConv", "FusedMatMulActivation": "fp32 FusedMatMul"}
#: operators that consume a weight, as opposed to decoding it
_READERS = {*_INTEGER, *_FLOATING, "MatMulNBits", "GatherBlockQuantized"}
PROFILED_CALLS = 5


@dataclass(frozen=True)
class Placed:
    """A site of the program and what was chosen for it.

    `bits` are those of one weight; `speed` is predicted, in multiples of the fp32 operator; `instead` is the nearest
    scheme with a fast kernel, where its own has none.
    """

    path: str
    encoding: str
    kind: str
    activations: str
    macs: int
    bytes: int
    bits: float = 32.0
    form: str = ""
    speed: float | None = None
    instead: str = ""


@flushed()
def profile(start: Start, feeds: Mapping[str, Any]) -> tuple[onnx.GraphProto, list[dict[str, Any]]]:
    """The graph that ONNX Runtime makes of a model, and the events of a few calls."""
    options = session_options(start.config, start.threads)
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        session = OrtSession(inference_session(start.model, options))
        for _ in range(PROFILED_CALLS):
            session.run([], feeds)
        events: list[dict[str, Any]] = json.loads(Path(session.session.end_profiling()).read_text())
        return onnx.load(options.optimized_model_filepath, load_external_data=False).graph, events


def explain_session(
    graph: onnx.GraphProto,
    events: Sequence[Mapping[str, Any]],
    sites: Sequence[Placed],
    convolved: Mapping[str, str],
    speeds: Speeds,
) -> list[Row]:
    """Look up every site in what `profile` returns; `convolved`: see `_by_site`."""
    times, nodes = _medians(events), _by_site(graph, sites, convolved)
    work: dict[str, int] = defaultdict(int)  # of all sites that a node runs
    for site in sites:
        if site.path in nodes:
            work[nodes[site.path].name] += site.macs
    taken = {site.path: _share(times, work, nodes[site.path].name, site.macs) for site in sites if site.path in nodes}
    return [_row(site, nodes.get(site.path), taken.get(site.path), speeds) for site in sites if site.kind != "norm"]


def _share(times: Mapping[str, float], work: Mapping[str, int], name: str, macs: int) -> float | None:
    """The time of a node that falls to a site with so many of its MACs."""
    return times[name] * (macs / work[name] if work[name] else 1.0) if name in times else None


def roofline(site: Placed, taken: float | None, peak: str, speeds: Speeds) -> float | None:
    """The least time that the machine could need for a site, as a share of what it took."""
    if not taken or peak not in speeds.peaks:
        return None
    bound = max(2 * site.macs / speeds.peaks[peak], site.bytes / speeds.peaks["memory"])
    return bound / 1e6 / taken if site.macs else 0.0


def _medians(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Name of a node → milliseconds of one call."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            found[name.removesuffix("_kernel_time")].append(event["dur"] / 1e3)
    return {name: median(durations) for name, durations in found.items()}


def _by_site(
    graph: onnx.GraphProto, sites: Sequence[Placed], convolved: Mapping[str, str]
) -> dict[str, onnx.NodeProto]:
    """Site → the node that reads its weight: by the node's name, else by the name of the stored tensor.

    ONNX Runtime lays a convolution's weight out anew and names the node after its result: `convolved` says of which
    site each value is the result.
    """
    kinds = {site.path: site.kind for site in sites}
    known = set(kinds)
    found: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        if node.op_type in (*_READERS, "Gather"):
            for name in node.name.split(JOINT):
                if name in known:
                    found.setdefault(name, node)
    constant = {tensor.name for tensor in graph.initializer}
    decoded: dict[str, str] = {}  # value computed from stored arrays → the site they belong to
    for node in graph.node:
        owners = (decoded.get(i) or owner_of(i, known) for i in node.input)
        result = convolved.get(node.name.removesuffix("_nchwc")) if node.domain == "com.microsoft.nchwc" else None
        owner = result or next((o for o in owners if o), None)
        if all(i in constant for i in node.input if i):
            constant.update(node.output)
            decoded |= dict.fromkeys(node.output, owner) if owner else {}
        elif owner and (node.op_type in _READERS or (node.op_type == "Gather" and kinds[owner] == "embedding")):
            found.setdefault(owner, node)
    return found


def owner_of(name: str, known: set[str]) -> str | None:
    """encoder.query.weight.codes → encoder.query, when that is a site."""
    path, separator, _ = name.partition(".weight")
    return path if separator and path in known else None


def _row(site: Placed, node: onnx.NodeProto | None, taken: float | None, speeds: Speeds) -> Row:
    if node is None:
        note = "no node of the optimised graph reads its weight"
        return Row(site.path, site.encoding, "folded away or fused", False, note=note)
    kernel, fast, note = _describe(node, site)
    share = roofline(site, taken, "int8" if _on_integers(node) else "fp32", speeds)
    instead = "" if fast else site.instead
    speed = site.speed if speeds.known(site.form) else None
    note = note or (speeds.stated if site.form else "")
    return Row(site.path, site.encoding, kernel, fast, taken, note, speed, share, site.macs, instead)


def predicted_rows(sites: Sequence[Placed]) -> list[Row]:
    """What is known of the sites before anything runs."""
    return [
        Row(s.path, s.encoding, s.form, (s.speed or 0) >= MARGIN, predicted=s.speed, macs=s.macs, instead=s.instead)
        for s in sites
        if s.kind != "norm"
    ]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _on_integers(node: onnx.NodeProto) -> bool:
    return node.op_type in _INTEGER or _attributes(node).get("accuracy_level") == 4


def _describe(node: onnx.NodeProto, site: Placed) -> tuple[str, bool, str]:
    """(kernel, accelerated, note)"""
    if node.op_type == "MatMulNBits":
        attributes = _attributes(node)
        level, fast = attributes.get("accuracy_level", 0), _on_integers(node) or (site.speed or 0) >= MARGIN
        activations = "int8 activations" if level == 4 else "floating activations"
        kernel = f"MatMulNBits {attributes['bits']} bit, block {attributes['block_size']}, accuracy level {level}"
        note = "" if fast else "packed in memory; floating activations, no speed-up claimed"
        return f"{kernel} ({activations})", fast, note
    if node.op_type in _INTEGER:
        return f"{node.op_type} (u8×s8, {_RANGES[site.activations]})", True, ""
    encoded = site.encoding != "dense"
    if site.kind == "embedding":
        return f"{node.op_type} of {'codes' if encoded else 'float rows'}", encoded, ""
    kernel = _FLOATING.get(node.op_type, node.op_type)
    if not encoded:
        return kernel, False, ""
    return kernel, False, f"not accelerated: {why_floating(site)}"


def why_floating(site: Placed) -> str:
    if site.encoding.startswith("NM(") and ("values=" not in site.encoding or "values=Dense" in site.encoding):
        return "ONNX Runtime has no n:m kernel, the zeros are stored and multiplied"
    if site.kind == "conv" and site.activations == "static":
        return "a convolution runs on integers only where its result is rounded in a known range too"
    if site.kind == "conv" and site.activations:
        return "a convolution runs on integers only between ranges known beforehand"
    return "small on disk, decoded to fp32 when the session starts"
