"""linear(q(x), decode(W), b) → one kernel for q, one for the rest: each linear with an encoded weight gets its kernel.

Activations in 8 bits multiply weights in 8 bits on the tensor cores where both have such codes; every other encoding
that a kernel can read is decoded inside the multiplication; what is left keeps the reference, and `Choice.note` says
why. `Sum(A, LowRank)` is A with a thin product beside it. Token matching and merging have kernels of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ...compiler.dialect.activations import FLOATS, INTEGERS, UNSIGNED
from ...compiler.encodings import parse_encoding
from ...compiler.encodings.codebook import LookUp
from ...compiler.program import Program, argument, example_shape, operands, shape_of
from ...compiler.sites import Site, weight_sites
from ...compiler.sums import split_sums
from .kernels import quantize, quantized, tokens, weight_only  # noqa: F401  # tokens: its operators
from .kernels.launch import DTYPES
from .kernels.weights import array_names, weight_format

aten = torch.ops.aten
dialect = torch.ops.paretoc
kernels = torch.ops.paretoc_triton

STATIC, DYNAMIC = dialect.fake_quantize.default, dialect.fake_quantize_dynamic.default
_NORMS: dict[Any, str] = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}
_TOKENS: dict[Any, Any] = {
    dialect.bipartite_match.default: kernels.bipartite_match.default,
    dialect.merge_tokens.default: kernels.merge_tokens.default,
}
#: the first architecture that multiplies float8
_FLOAT8 = (8, 9)
Capability = tuple[int, int] | None


@dataclass(frozen=True)
class Choice:
    """What runs a linear: the kernel with its blocks for the example inputs, or "" for the reference; and why."""

    kernel: str = ""
    triton: bool = False
    note: str = ""


@dataclass(frozen=True)
class Codes:
    """A quantised activation in the graph: its codes, scales, and for a range of the tensor its zero point."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    bits: int


def lower(program: Program, capability: Capability) -> dict[str, Choice]:
    """Rewrite, in place, the linears with an encoded weight. Returns what was chosen, by the name of the linear."""
    split_sums(program)
    sites = [s for s in weight_sites(program) if s.kind == "linear" and program.encoding(s.weight) is not None]
    reasons = {s.node: _refusal_in_8_bits(s, capability) for s in sites}
    quantisers = [n for n in program.calls(STATIC, DYNAMIC) if any(reasons.get(user) == "" for user in n.users)]
    found = {node: _codes(program, node, all(reasons.get(user) == "" for user in node.users)) for node in quantisers}
    choices = {s.node.name: _replace(program, s, found, reasons[s.node]) for s in sites}
    program.refresh()
    return choices


def _refusal_in_8_bits(site: Site, capability: Capability) -> str:
    """Why this linear is not one of codes with codes; "" when it is."""
    source = site.input
    if source.target not in (STATIC, DYNAMIC):
        return "not quantised"
    if source.meta["val"].dtype not in DTYPES:
        return "not in a type that kernels read"
    static = source.target is STATIC
    code = "int8" if static else argument(source, 2, "code", "int8")
    granularity = "tensor" if static else operands(source)[1]
    if granularity not in ("tensor", "token"):
        return f"no kernel finds a scale for each {granularity}"
    if granularity == "tensor" and code in FLOATS:
        return f"no kernel finds one {code} scale for a tensor"
    if code in UNSIGNED:
        return f"no kernel for {code}, which is asymmetric"
    if code in FLOATS and capability is not None and capability < _FLOAT8:
        return f"this GPU has no {code}"
    width = shape_of(source)[-1]
    if granularity == "token" and width > quantize.MAX_WIDTH:
        return f"{width} columns are more than the quantiser holds"
    chosen = quantized.quantized_format(str(operands(site.weight)[1]), code)
    return chosen if isinstance(chosen, str) else ""


def _codes(program: Program, node: fx.Node, alone: bool) -> Codes:
    """The kernel of a quantiser, placed at it. A norm in front joins it when nothing else reads either."""
    graph, x = program.graph, operands(node)[0]
    with graph.inserting_before(node):
        if node.target is STATIC:
            scale, zero = operands(node)[1:3]
            return Codes(graph.call_function(kernels.quantize_range.default, (x, scale, zero, 8)), scale, zero, 8)
        code = argument(node, 2, "code", "int8")
        if operands(node)[1] == "token":
            norm = _norm(x) if alone and len(x.users) == 1 else None
            made = graph.call_function(kernels.quantize_tokens.default, norm(code) if norm else (x, code))
            return Codes(_item(graph, made, 0), _item(graph, made, 1), None, 8)
        bits = INTEGERS[code]
        found = graph.call_function(kernels.tensor_range.default, (x, bits))
        scale, zero = _item(graph, found, 0), _item(graph, found, 1)
        return Codes(graph.call_function(kernels.quantize_range.default, (x, scale, zero, bits)), scale, zero, bits)


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    return graph.call_function(operator.getitem, (node, index))


def _norm(node: fx.Node) -> Callable[[str], tuple[Any, ...]] | None:
    """A norm over the last axis → the arguments of the quantiser that computes it too."""
    kind = _NORMS.get(node.target)
    if kind is None or len(operands(node)[1]) != 1:
        return None
    x, weight = operands(node)[0], argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if kind == "layer" else None
    eps = argument(node, 4, "eps", 1e-5) if kind == "layer" else argument(node, 3, "eps")
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps
    return lambda code: (x, code, kind, weight, bias, eps)


def _replace(program: Program, site: Site, found: dict[fx.Node, Codes], reason: str) -> Choice:
    """Put a kernel in the place of one linear."""
    text, (N, K) = str(program.encoding(site.weight)), site.shape
    M, dtype = prod(example_shape(site.input)[:-1]), site.node.meta["val"].dtype
    fmt = weight_format(text)
    if isinstance(fmt, str) or dtype not in DTYPES:
        return Choice(note=fmt if isinstance(fmt, str) else f"no Triton kernel multiplies {dtype}")
    weight: tuple[Any, ...] = (_arrays(program, site.weight, text, (N, K)), text, N, site.bias)
    if reason == "":
        codes = found[site.input]
        call = kernels.quantized_linear.default
        arguments = (codes.codes, codes.scale, codes.zero, codes.bits, *weight, dtype)
        choice = Choice(str(quantized.tiling(M, N, K, fmt)), True)
    else:
        call, arguments = kernels.weight_only_linear.default, (site.input, *weight)
        note = f"activations rounded by PyTorch: {reason}" if site.input.target in (STATIC, DYNAMIC) else ""
        choice = Choice(str(weight_only.tiling(M, N, K, fmt)), True, note)
    with program.graph.inserting_before(site.node):
        fast = program.graph.call_function(call, arguments)
    fast.meta.update(site.node.meta)
    site.node.replace_all_uses_with(fast)
    program.graph.erase_node(site.node)
    return choice


def _arrays(program: Program, decode: fx.Node, text: str, shape: tuple[int, int]) -> list[fx.Node]:
    """The stored arrays of a weight, and the table of an encoding that fixes it, stored once for each weight."""
    arrays, encoding = list(operands(decode)[0]), parse_encoding(text)
    if len(array_names(encoding, shape)) > len(arrays):
        assert isinstance(encoding, LookUp)
        table = encoding.stored_table(program.stored_arrays(decode))
        arrays.append(program.attribute(f"{decode.meta['parameter']}.table", table, before=decode))
    return arrays


def lower_tokens(program: Program) -> dict[str, Choice]:
    """Replace, in place, the token operators that have kernels. Returns what was chosen, by the name of the node."""
    choices = {}
    for node in program.calls(*_TOKENS):
        dtype = operands(node)[0].meta["val"].dtype
        if dtype in DTYPES:
            node.target = _TOKENS[node.target]
            choices[node.name] = Choice(str(node.target), True)
        else:
            choices[node.name] = Choice(note=f"no Triton kernel reads {dtype}")
    program.module.recompile()
    return choices
