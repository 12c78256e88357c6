"""Which of OpenVINO's kernels really runs each site: read from the session's own profile."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from ...compiler.backend import Row
from .kernels import Placed, Profiled, medians, roofline, why_floating
from .speeds import MARGIN, Speeds

#: what OpenVINO calls operators that consume a weight
_READERS = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution", "Deconvolution", "Gather")


def explain_openvino(profiled: Profiled, sites: Sequence[Placed], graph: ir.Graph) -> list[Row]:
    """Look up every site among the kernels that OpenVINO ran."""
    with tempfile.TemporaryDirectory() as folder:
        events = [e for e in profiled.run(Path(folder)) if e.get("cat") == "Kernel"]
    times, ran = medians(events, "Kernel"), {e["name"]: e["args"] for e in events}
    kernels: dict[str, str] = {}  # name of a node → of the kernel: fusions append to it
    for kernel, args in ran.items():
        name = kernel.removeprefix("OV::")
        while name and args["ov_node_type"].startswith(_READERS):
            kernels.setdefault(name.removesuffix("_original"), kernel)
            name = name.rpartition("/")[0]
    named, rows = _names(graph, {site.path for site in sites}), []
    for site in sites:
        kernel = next((kernels[n] for n in named.get(site.path, ()) if n in kernels), "")
        if site.kind != "norm":
            rows.append(_row(site, ran.get(kernel), times.get(kernel), profiled.speeds))
    return rows


def _names(graph: ir.Graph, sites: Collection[str]) -> dict[str, list[str]]:
    """Site → what the kernel that reads its weight may be called: like the first or the last of the nodes that it runs,
    or like an output of the model."""
    found: dict[str, list[str]] = {}
    for node in graph:
        if node.name in sites and node.name not in found:
            last, names = node, [node.name, node.outputs[0].name]
            while len(users := last.outputs[0].uses()) == 1 and users[0].node.name not in sites:
                last = users[0].node
                names += [last.name, last.outputs[0].name]
            found[node.name] = [str(name) for name in names]
    return found


def _row(site: Placed, kernel: Mapping[str, str] | None, taken: float | None, speeds: Speeds) -> Row:
    if kernel is None:
        note = "OpenVINO ran no kernel of its name"
        return Row(site.path, site.encoding, "folded away or fused", False, note=note, macs=site.macs)
    ran = kernel["ov_exec_type"]
    integers, encoded = ran.lower().endswith(("i8", "u8")), site.encoding != "dense"
    packed = kernel["ov_node_type"].endswith("Compressed")
    fast = encoded and (integers or site.kind == "embedding" or (packed and (site.speed or 0) >= MARGIN))
    why = "decoded as it is read, which is no faster for so many rows" if packed else why_floating(site)
    note = "" if fast or not encoded else f"not accelerated: {why}"
    share = roofline(site, taken, "int8" if integers else "fp32", speeds)
    instead = "" if fast else site.instead
    named = f"{kernel['ov_node_type']} ({ran})"
    return Row(site.path, site.encoding, named, fast, taken, note, site.speed, share, site.macs, instead)
