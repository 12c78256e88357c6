"""Graph clean-up after lowering, before the file is written: fold constants, share duplicates, drop what is dead."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants

from .rewrite import rewrite
from .rule import STANDARD, Target


def optimise(model: ir.Model, encoded: Collection[str], target: Target = STANDARD) -> None:
    """Clean up in place. Nothing computed from the `encoded` initializers is folded: the file keeps them encoded."""
    protected = _descendants(model, encoded)

    def should_fold(node: ir.Node) -> bool | None:
        return False if node in protected or node.op_type == "DequantizeLinear" else None

    fold_constants(
        model, onnx_shape_inference=True, input_size_limit=1024, output_size_limit=1 << 16, should_fold=should_fold
    )
    rewrite(model, target)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=2)(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    _strip(model)


def _descendants(model: ir.Model, encoded: Collection[str]) -> set[ir.Node]:
    """Nodes whose inputs all come, directly or not, from encoded initializers and constants."""
    tainted = {v for n, v in model.graph.initializers.items() if n in encoded}
    found: set[ir.Node] = set()
    for node in model.graph:
        if any(v in tainted for v in node.inputs if v is not None):
            found.add(node)
            tainted.update(node.outputs)
    return found


def _strip(model: ir.Model) -> None:
    """Drop the exporter's metadata: it holds source paths of the machine that compiled."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "paretoc", None, None
    model.graph.name, model.graph.doc_string = "model", None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for function in model.functions.values():
        function.metadata_props.clear()
