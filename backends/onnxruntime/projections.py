"""Layers that read the same input as one product: q, k and v, gate and up.

Exact: each output channel keeps its own codes and scales. Only of `MatMulNBits`, whose products of one row are so short
that starting them counts (`benchmarks/generate.py llama`); of `MatMulIntegerToFloat` the copies of Split cost more than
longer products save.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .forms import MICROSOFT

if TYPE_CHECKING:
    from .lower import Lowering

#: between the sites in the name of a node that runs several
JOINT = " + "


def merge_projections(lowering: Lowering) -> None:
    """Join, in place, the block products of one input and one format, each under the names of all its sites."""
    alike: dict[Any, list[ir.Node]] = defaultdict(list)
    for node in lowering.model.graph:
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
            alike[node.inputs[0], len(node.inputs), *_format(node).items()].append(node)
    for nodes in alike.values():
        if len(nodes) > 1:
            _join(lowering, nodes)


def _format(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in sorted(node.attributes.items()) if name != "N"}


def _join(lowering: Lowering, nodes: list[ir.Node]) -> None:
    name, first = JOINT.join(str(node.name) for node in nodes), nodes[0]
    stored = zip(*(node.inputs[1:] for node in nodes), strict=True)
    inputs = [first.inputs[0], *(_stacked(lowering, name, values) for values in stored)]
    widths = [node.attributes["N"].as_int() for node in nodes]
    attributes = {**_format(first), "N": sum(widths)}
    product = lowering.emit(first, "MatMulNBits", inputs, attributes, domain=MICROSOFT, name=name)
    sizes = lowering.constant(f"{name}.widths", np.array(widths, dtype=np.int64))
    parts = lowering.emit(first, "Split", [product, sizes], {"axis": -1}, outputs=len(nodes))
    for node, part in zip(nodes, parts, strict=True):
        arrays = node.inputs[1:]
        lowering.replace(node, part)
        for value in arrays:
            _forget(lowering, value)


def _stacked(lowering: Lowering, name: str, values: tuple[ir.Value | None, ...]) -> ir.Value:
    """One stored array of all layers, output channels first."""
    arrays = [v.const_value.numpy() for v in values if v is not None and v.const_value is not None]
    assert len(arrays) == len(values), "the arrays of a MatMulNBits are constants"
    kind = str(values[0] and values[0].name).rpartition(".")[2]
    return lowering.constant(f"{name}.weight.{kind}", np.concatenate(arrays))


def _forget(lowering: Lowering, value: ir.Value | None) -> None:
    if value is not None and not value.uses():
        lowering.model.graph.initializers.pop(str(value.name), None)
        lowering.made.pop(str(value.name), None)
