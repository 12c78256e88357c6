"""Which of OpenVINO's kernels really runs each site: read from the graph that it runs and its profile."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from ...compiler.backend import Row
from .kernels import Placed, owner_of, roofline, why_floating
from .runtime_openvino import Ran
from .speeds import MARGIN, Speeds

#: what OpenVINO calls operators that consume a weight
_READERS = ("FullyConnected", "MatMul", "Convolution", "GroupConvolution", "Deconvolution", "Gather")


def explain_openvino(ran: Sequence[Ran], sites: Sequence[Placed], graph: ir.Graph, speeds: Speeds) -> list[Row]:
    """Look up every site among the kernels that ran: by the weight that one reads, else by the nodes that it runs."""
    known = {site.path for site in sites}
    readers = [kernel for kernel in ran if kernel.operator.startswith(_READERS)]
    reading, running = dict[str, Ran](), dict[str, Ran]()
    for kernel in readers:
        for name in kernel.constants:
            if path := owner_of(name, known):
                reading.setdefault(path, kernel)
        for name in (kernel.name, *kernel.nodes):
            while name:
                running.setdefault(name.removesuffix("_original"), kernel)
                name = name.rpartition("/")[0]
    named, rows = _names(graph, known), []
    for site in sites:
        found = reading.get(site.path) or next((running[n] for n in named.get(site.path, ()) if n in running), None)
        if site.kind != "norm":
            rows.append(_row(site, found, speeds))
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


def _row(site: Placed, ran: Ran | None, speeds: Speeds) -> Row:
    if ran is None:
        note = "OpenVINO ran no kernel of its name"
        return Row(site.path, site.encoding, "folded away or fused", False, note=note, macs=site.macs)
    integers, encoded = ran.executed.lower().endswith(("i8", "u8")), site.encoding != "dense"
    packed = ran.operator.endswith("Compressed")
    fast = encoded and (integers or site.kind == "embedding" or (packed and (site.speed or 0) >= MARGIN))
    why = "decoded as it is read, which is no faster for so many rows" if packed else why_floating(site)
    note = "" if fast or not encoded else f"not accelerated: {why}"
    share = roofline(site, ran.milliseconds, "int8" if integers else "fp32", speeds)
    instead = "" if fast else site.instead
    named = f"{ran.operator} ({ran.executed})"
    return Row(site.path, site.encoding, named, fast, ran.milliseconds, note, site.speed, share, site.macs, instead)
