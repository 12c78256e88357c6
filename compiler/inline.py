"""`decode(arrays)` → the ATen operators of its reference: how a backend runs an encoding it knows nothing of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .dialect.weights import reference_decode
from .encodings import Encoding
from .program import Program, operands


def inline_decode(program: Program, keep: Callable[[Encoding], bool]) -> list[str]:
    """Replace, in place, every `decode` whose encoding `keep` refuses by its traced reference.

    Returns the names of the stored arrays that are now read by ordinary operators.
    """
    names: list[str] = []
    for node in program.calls(torch.ops.paretoc.decode.default):
        encoding = program.encoding(node)
        if encoding is None or keep(encoding):
            continue
        arrays = list(program.stored_arrays(node).values())
        names += [str(a.target) for a in operands(node)[0]]
        _splice(program, node, _trace(arrays, node))
    if names:
        program.refresh()
    return names


def _trace(arrays: list[Tensor], node: fx.Node) -> fx.GraphModule:
    encoding, shape, dtype = operands(node)[1:4]

    def reference(*stored: Tensor) -> Tensor:
        return reference_decode(stored, encoding, shape, dtype)

    return make_fx(reference)(*arrays)


def _splice(program: Program, node: fx.Node, traced: fx.GraphModule) -> None:
    graph = program.graph
    sources = iter(operands(node)[0])
    mapping: dict[fx.Node, fx.Node] = {}
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            mapping[inner] = next(sources)
        elif inner.op == "get_attr":
            name = f"constants.{node.name}.{inner.target}"
            mapping[inner] = program.attribute(name, getattr(traced, str(inner.target)), before=node)
        elif inner.op == "output":
            node.replace_all_uses_with(mapping[operands(inner)[0]])
        else:
            with graph.inserting_before(node):
                mapping[inner] = graph.node_copy(inner, lambda n: mapping[n])
    graph.erase_node(node)
