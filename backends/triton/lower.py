"""linear(q(x), decode(W), b) → one kernel for q, one for the rest: each linear with an encoded weight gets its kernel.

Activations in 8 bits multiply weights in 8 bits on the tensor cores where both have such codes; every other encoding
that a kernel can read is decoded inside the multiplication; what is left keeps the reference, and `Choice.note` says
why. `Sum(A, LowRank)` is A with a thin product beside it. Token matching and merging have kernels of their own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ...compiler.dialect.activations import FLOATS, INTEGERS, UNSIGNED, group_of
from ...compiler.encodings import parse_encoding
from ...compiler.program import Program, argument, example_shape, operands
from ...compiler.sites import Site, weight_sites
from ...compiler.sums import split_sums
from .kernels import quantize, quantized, tokens, weight_only  # noqa: F401  # tokens: its operators
from .kernels.launch import DTYPES
from .kernels.plan import Plan
from .kernels.weights import fixed_arrays, weight_format

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
    """What runs a node: a kernel, or for a product its plan at the example inputs, else the reference; and why."""

    kernel: str = ""
    plan: Plan | None = None
    note: str = ""


@dataclass(frozen=True)
class Codes:
    """A quantised activation in the graph: its codes, scales, and for a range of the tensor its zero point. A scale
    holds for `group` channels of a token, 0 for all."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    bits: int = 8
    code: str = "int8"
    group: int = 0


def lower(program: Program, capability: Capability) -> dict[str, Choice]:
    """Rewrite, in place, the linears with an encoded weight. Returns what was chosen, by the name of the linear."""
    split_sums(program)
    sites = [s for s in weight_sites(program) if s.kind == "linear" and program.encoding(s.weight) is not None]
    reasons = {s.node: _refusal_in_8_bits(s, capability) for s in sites}
    quantisers = [n for n in program.calls(STATIC, DYNAMIC) if any(reasons.get(user) == "" for user in n.users)]
    found = {node: _codes(program, node, all(reasons.get(user) == "" for user in node.users)) for node in quantisers}
    choices = {s.node.name: _replace(program, s, found, reasons[s.node]) for s in sites}
    choices |= {node.name: _round(program, node) for node in program.calls(STATIC, DYNAMIC) if node.users}
    program.refresh()
    return choices


def _refusal_in_8_bits(site: Site, capability: Capability) -> str:
    """Why this linear is not one of codes with codes; "" when it is."""
    source = site.input
    if source.target not in (STATIC, DYNAMIC):
        return "not quantised"
    code, granularity = _rounding(source)
    if reason := _refusal_to_round(source, code, granularity):
        return reason
    if code in FLOATS and capability is not None and capability < _FLOAT8:
        return f"this GPU has no {code}"
    chosen = quantized.quantized_format(str(operands(site.weight)[1]), code, group_of(granularity))
    return chosen if isinstance(chosen, str) else ""


def _rounding(node: fx.Node) -> tuple[str, str]:
    """The code and the granularity of a quantiser."""
    return ("int8", "tensor") if node.target is STATIC else (argument(node, 2, "code", "int8"), operands(node)[1])


def _refusal_to_round(node: fx.Node, code: str, granularity: str) -> str:
    """Why no kernel finds the codes; "" when one does."""
    if node.meta["val"].dtype not in DTYPES:
        return "not in a type that kernels read"
    if granularity == "tensor" and code in FLOATS:
        return f"no kernel finds one {code} scale for a tensor"
    if code in UNSIGNED:
        return f"no kernel for {code}, which is asymmetric"
    width, group = example_shape(node)[-1], group_of(granularity)
    if granularity != "tensor" and width > quantize.MAX_WIDTH:
        return f"{width} columns are more than the quantiser holds"
    return f"groups of {group} are no power of two" if group & (group - 1) else ""


def _codes(program: Program, node: fx.Node, alone: bool) -> Codes:
    """The kernel of a quantiser, placed at it. A norm in front joins it when nothing else reads either."""
    graph, x = program.graph, operands(node)[0]
    with graph.inserting_before(node):
        if node.target is STATIC:
            scale, zero = operands(node)[1:3]
            return Codes(graph.call_function(kernels.quantize_range.default, (x, scale, zero, 8)), scale, zero)
        code, granularity = _rounding(node)
        if granularity != "tensor":
            norm = _norm(x) if alone and len(x.users) == 1 else None
            x, *computed = norm or (x,)
            group = group_of(granularity)
            made = graph.call_function(kernels.quantize_tokens.default, (x, code, group, *computed))
            return Codes(_item(graph, made, 0), _item(graph, made, 1), None, code=code, group=group)
        bits = INTEGERS[code]
        scale, zero = _range(graph, x, bits)
        return Codes(graph.call_function(kernels.quantize_range.default, (x, scale, zero, bits)), scale, zero, bits)


def _round(program: Program, node: fx.Node) -> Choice:
    """Round in a kernel what is not read as codes."""
    graph, x = program.graph, operands(node)[0]
    code, granularity = _rounding(node)
    if reason := _refusal_to_round(node, code, granularity):
        return Choice(note=reason)
    with graph.inserting_before(node):
        if granularity != "tensor":
            new = graph.call_function(kernels.round_tokens.default, (x, code, group_of(granularity)))
        else:
            given = node.target is STATIC
            scale, zero = operands(node)[1:3] if given else _range(graph, x, INTEGERS[code])
            new = graph.call_function(kernels.round_range.default, (x, scale, zero, INTEGERS[code]))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    return Choice(str(new.target))


def _range(graph: fx.Graph, x: fx.Node, bits: int) -> tuple[fx.Node, fx.Node]:
    """The scale and the zero point of the whole tensor, found at run time."""
    found = graph.call_function(kernels.tensor_range.default, (x, bits))
    return _item(graph, found, 0), _item(graph, found, 1)


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    return graph.call_function(operator.getitem, (node, index))


def _norm(node: fx.Node) -> tuple[Any, ...] | None:
    """A norm over the last axis → its input, and the further arguments of the quantiser that computes it too."""
    kind = _NORMS.get(node.target)
    if kind is None or len(operands(node)[1]) != 1:
        return None
    x, weight = operands(node)[0], argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if kind == "layer" else None
    eps = argument(node, 4, "eps", 1e-5) if kind == "layer" else argument(node, 3, "eps")
    if eps is None:
        eps = torch.finfo(x.meta["val"].dtype).eps
    return x, kind, weight, bias, eps


def _replace(program: Program, site: Site, found: dict[fx.Node, Codes], reason: str) -> Choice:
    """Put a kernel in the place of one linear."""
    text, (N, K) = str(program.encoding(site.weight)), site.shape
    M, dtype = prod(example_shape(site.input)[:-1]) // program.repeats, site.node.meta["val"].dtype
    fmt = weight_format(text)
    if isinstance(fmt, str) or dtype not in DTYPES:
        return Choice(note=fmt if isinstance(fmt, str) else f"no Triton kernel multiplies {dtype}")
    weight: tuple[Any, ...] = (_arrays(program, site.weight, text), text, N, site.bias)
    if reason == "":
        codes = found[site.input]
        call = kernels.quantized_linear.default
        arguments = (codes.codes, codes.scale, codes.zero, codes.bits, *weight, dtype)
        x_dtype, x_group = FLOATS.get(codes.code, torch.int8), codes.group if codes.group < K else 0
        choice = Choice(plan=quantized.product_plan(M, N, K, text, x_dtype, x_group, dtype))
    else:
        call, arguments = kernels.weight_only_linear.default, (site.input, *weight)
        note = f"activations rounded before: {reason}" if site.input.target in (STATIC, DYNAMIC) else ""
        choice = Choice(plan=weight_only.product_plan(M, N, K, text, dtype), note=note)
    with program.graph.inserting_before(site.node):
        fast = program.graph.call_function(call, arguments)
    fast.meta.update(site.node.meta)
    site.node.replace_all_uses_with(fast)
    program.graph.erase_node(site.node)
    return choice


def _arrays(program: Program, decode: fx.Node, text: str) -> list[fx.Node]:
    """The stored arrays of a weight, and what its encoding fixes, stored once for each weight."""
    fixed = fixed_arrays(parse_encoding(text), program.stored_arrays(decode))
    name = decode.meta["parameter"]
    attributes = [program.attribute(f"{name}.{part}", value, before=decode) for part, value in fixed.items()]
    return [*operands(decode)[0], *attributes]


def lower_tokens(program: Program) -> dict[str, Choice]:
    """Replace, in place, the token operators that have kernels. Returns what was chosen, by the name of the node."""
    choices = {}
    for node in program.calls(*_TOKENS):
        dtype = operands(node)[0].meta["val"].dtype
        if dtype in DTYPES:
            node.target = _TOKENS[node.target]
            choices[node.name] = Choice(str(node.target))
        else:
            choices[node.name] = Choice(note=f"no Triton kernel reads {dtype}")
    program.module.recompile()
    return choices
