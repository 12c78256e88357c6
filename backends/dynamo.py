"""torch.compile(model, backend="paretoc", options={"passes": […]}): the graph that Dynamo found → `paretoc.compile`.

Options are those of `paretoc.compile`, `passes` among them; the target is "triton" unless one is given. What the graph
reads of the module's parameters and buffers is fixed as it is at the first call: for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compiler.driver import compile
from ..compiler.errors import CaptureError


def compile_graph(
    module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
) -> Callable[..., tuple[Any, ...]]:
    """The backend that `torch.compile` calls, by the entry point of `torch_dynamo_backends`."""
    given = {"target": "triton", **(options or {})}
    module, places = _closed(module, inputs)
    example = tuple(inputs[place] for place in places)
    with torch._guards.tracing(None):  # a capture of its own, not part of the one that called
        compiled = compile(module, example_inputs=example, **given)

    def run(*values: Any) -> tuple[Any, ...]:
        return tuple(compiled(*(values[place] for place in places)))

    return run


def _closed(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """Parameters and buffers that Dynamo passes become the module's own, and sizes are read from the tensors that have
    them. Returns the module and the places of the inputs that are left."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    output = graph.graph_copy(module.graph, values)
    graph.output(output)
    closed = fx.GraphModule(module, graph)
    placeholders = [values[n] for n in module.graph.nodes if n.op == "placeholder"]
    kept = []
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        for place, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
            if isinstance(value, Tensor) and not _static(node, value):
                kept.append(place)
                continue
            if isinstance(value, Tensor):
                closed.register_buffer(f"weight_{place}", value.detach())
                inner = graph.get_attr(f"weight_{place}")
            else:
                inner = graph.call_function(torch.ops.aten.sym_size.int, _size(node, placeholders))
            node.replace_all_uses_with(inner)
            graph.erase_node(node)
    closed.recompile()
    return closed, kept


def _static(node: fx.Node, value: Tensor) -> bool:
    """Whether an input is a parameter or a buffer: Dynamo marks both for CUDA graphs."""
    return isinstance(value, nn.Parameter) or "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def _size(node: fx.Node, placeholders: Sequence[fx.Node]) -> tuple[fx.Node, int]:
    """The tensor and the axis that have the size that Dynamo passes."""
    size = node.meta["example_value"]
    for other in placeholders:
        for axis, length in enumerate(getattr(other.meta["example_value"], "shape", ())):
            if isinstance(length, torch.SymInt) and str(length) == str(size):
                return other, axis
    raise CaptureError(
        f"the graph takes the number {size}, which no input has as a size",
        where="torch.compile(…, backend='paretoc')",
        fix="pass dynamic=False to torch.compile",
    )
