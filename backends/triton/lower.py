"""linear(q(x), decode(W), b) → one kernel for q, one for the rest: each linear with an encoded weight gets its kernel.

Activations in 8 bits multiply weights in 8 bits on the tensor cores where both have such codes; every other encoding
that a kernel can read is decoded inside the multiplication; what is left keeps the reference, and `Choice.note` says
why. Of `Sum(A, LowRank)` the kernel of A adds the correction: only the thin product x·Vᵀ is made before.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ...compiler.dialect.activations import FLOATS, INTEGERS, UNSIGNED, group_of
from ...compiler.encodings import Encoding, LowRank, Sum
from ...compiler.norms import Norm, norms
from ...compiler.program import Program, argument, example_shape, operands
from ...compiler.sites import Site, weight_sites
from .kernels import quantize, quantized, rotation, weight_only
from .kernels.launch import DTYPES
from .kernels.plan import Plan
from .kernels.weights import fixed_arrays, weight_format

aten = torch.ops.aten
dialect = torch.ops.paretoc
kernels = torch.ops.paretoc_triton

STATIC, DYNAMIC = dialect.fake_quantize.default, dialect.fake_quantize_dynamic.default
_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.gelu.default: "gelu", aten.relu.default: "relu"}
#: the first architecture that multiplies float8
FLOAT8 = (8, 9)
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
    holds for `group` channels of a token, 0 for all. `rotated`: by the same kernel."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    bits: int = 8
    code: str = "int8"
    group: int = 0
    rotated: bool = False


def lower(program: Program, capability: Capability) -> dict[str, Choice]:
    """Rewrite, in place, the linears with an encoded weight. Returns what was chosen, by the name of the linear."""
    sites = [s for s in weight_sites(program) if s.kind == "linear" and program.encoding(s.weight) is not None]
    reasons = {s.node: _refusal_in_8_bits(program, s, capability) for s in sites}
    quantisers = [n for n in program.calls(STATIC, DYNAMIC) if any(reasons.get(user) == "" for user in n.users)]
    alone = {s.node for s in sites if reasons[s.node] == "" and _parts(program, s)[1] is None}
    normed = {norm.output: norm for norm in norms(program)}
    found = {node: _codes(program, node, normed, alone.issuperset(node.users)) for node in quantisers}
    choices = {s.node.name: _replace(program, s, found, reasons[s.node]) for s in sites}
    choices |= dict(_rotation(program, operands(n)[0], codes.code) for n, codes in found.items() if codes.rotated)
    choices |= {node.name: _round(program, node) for node in program.calls(STATIC, DYNAMIC) if node.users}
    program.refresh()
    return choices


def _parts(program: Program, site: Site) -> tuple[Encoding | None, LowRank | None]:
    """The encoding that a kernel decodes, and the correction that it adds."""
    encoding = program.encoding(site.weight)
    if isinstance(encoding, Sum) and isinstance(encoding.second, LowRank):
        return encoding.first, encoding.second
    return encoding, None


def _refusal_in_8_bits(program: Program, site: Site, capability: Capability) -> str:
    """Why this linear is not one of codes with codes; "" when it is."""
    source = site.input
    if source.target not in (STATIC, DYNAMIC):
        return "not quantised"
    code, granularity = _rounding(source)
    if reason := _refusal_to_round(source, code, granularity):
        return reason
    if code in FLOATS and capability is not None and capability < FLOAT8:
        return f"this GPU has no {code}"
    chosen = quantized.quantized_format(str(_parts(program, site)[0]), code, group_of(granularity))
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


def _codes(program: Program, node: fx.Node, normed: dict[fx.Node, Norm], alone: bool) -> Codes:
    """The kernel of a quantiser, placed at it. What stands in front joins it when nothing else reads either."""
    graph, x = program.graph, operands(node)[0]
    joins = alone and len(x.users) == 1
    with graph.inserting_before(node):
        code, granularity = _rounding(node)
        if granularity != "tensor":
            front = (_norm(normed.get(x)) or _activation(x)) if joins else None
            group = group_of(granularity)
            rotated = joins and group == 0 and x.target is kernels.rotate.default
            if rotated:
                made = graph.call_function(kernels.rotate_tokens.default, (*operands(x), code))
            else:
                x, options = front or (x, {})
                made = graph.call_function(kernels.quantize_tokens.default, (x, code, group), options)
            codes, scale = _item(graph, made, 0), _item(graph, made, 1)
            return Codes(codes, scale, None, code=code, group=group, rotated=rotated)
        bits = INTEGERS[code]
        front = _activation(x) if joins and node.target is STATIC else None
        x, options = front or (x, {})
        scale, zero = operands(node)[1:3] if node.target is STATIC else _range(graph, x, bits)
        made = graph.call_function(kernels.quantize_range.default, (x, scale, zero, bits), options)
        return Codes(made, scale, zero, bits)


def _rotation(program: Program, x: fx.Node, code: str) -> tuple[str, Choice]:
    """The name of a rotation in the original graph, and what runs it now that it makes codes."""
    a, b = (example_shape(side)[0] for side in operands(x)[1:])
    M = prod(example_shape(x)[:-1]) // program.repeats
    return x.meta["replaces"], Choice(
        plan=rotation.rotation_plan(M, a, b, x.meta["val"].dtype, code), note=f"to {code}"
    )


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


def _norm(norm: Norm | None) -> tuple[fx.Node, dict[str, Any]] | None:
    """A norm over the last axis → its input, and the options of the quantiser that computes it too."""
    if norm is None or not _alike(norm.input, norm.output):
        return None
    weight, bias = (None if operand is None else operand.source for operand in (norm.weight, norm.bias))
    eps = torch.finfo(norm.input.meta["val"].dtype).eps if norm.eps is None else norm.eps
    return norm.input, {"front": "layer" if norm.centred else "rms", "weight": weight, "bias": bias, "eps": eps}


def _activation(node: fx.Node) -> tuple[fx.Node, dict[str, Any]] | None:
    """act(x), or act(x) · gate in either order, → x, and the options of the quantiser that computes it too."""
    gate = None
    if node.target is aten.mul.Tensor:
        for active, other in (operands(node), operands(node)[::-1]):
            if _acts(active) and _alike(active, other, node) and len(active.users) == 1:
                node, gate = active, other
                break
    if not _acts(node):
        return None
    kind = _ACTIVATIONS[node.target] + ("_tanh" if node.kwargs.get("approximate") == "tanh" else "")
    return operands(node)[0], {"front": kind, "gate": gate}


def _acts(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in _ACTIVATIONS


def _alike(*nodes: Any) -> bool:
    """Whether all are tensors of one shape and one type."""
    kinds = {(str(n.meta["val"].shape), n.meta["val"].dtype) if isinstance(n, fx.Node) else None for n in nodes}
    return len(kinds) == 1 and None not in kinds


def _replace(program: Program, site: Site, found: dict[fx.Node, Codes], reason: str) -> Choice:
    """Put a kernel in the place of one linear."""
    (encoding, correction), (N, K) = _parts(program, site), site.shape
    M, dtype = prod(example_shape(site.input)[:-1]) // program.repeats, site.node.meta["val"].dtype
    text, fmt = str(encoding), weight_format(str(encoding))
    if encoding is None or isinstance(fmt, str) or dtype not in DTYPES:
        return Choice(note=fmt if isinstance(fmt, str) else f"no Triton kernel multiplies {dtype}")
    arrays, factors = _arrays(program, site.weight, encoding)
    weight = (arrays, text, N, site.bias)
    beside, rank = _beside(program, site, factors) if correction else (), correction.rank if correction else 0
    notes = [f"adds the correction of rank {rank}"] if rank else []
    if reason == "":
        codes = found[site.input]
        call = kernels.quantized_linear.default
        arguments = (codes.codes, codes.scale, codes.zero, codes.bits, *weight, dtype, *beside)
        x_dtype, x_group = FLOATS.get(codes.code, torch.int8), codes.group if codes.group < K else 0
        plan = quantized.product_plan(M, N, K, text, x_dtype, x_group, dtype, rank)
    else:
        call, arguments = kernels.weight_only_linear.default, (site.input, *weight, *beside)
        if site.input.target in (STATIC, DYNAMIC):
            notes.append(f"activations rounded before: {reason}")
        plan = weight_only.product_plan(M, N, K, text, dtype, rank)
    with program.graph.inserting_before(site.node):
        fast = program.graph.call_function(call, arguments)
    fast.meta.update(site.node.meta)
    site.node.replace_all_uses_with(fast)
    program.graph.erase_node(site.node)
    return Choice(plan=plan, note="; ".join(notes))


def _arrays(program: Program, decode: fx.Node, encoding: Encoding) -> tuple[list[fx.Node], list[fx.Node]]:
    """The arrays from which a kernel decodes, with what their encoding fixes, stored once for each weight; and U and V
    of a correction."""
    stored, nodes = program.stored_arrays(decode), list(operands(decode)[0])
    count = len(encoding.layout(tuple(operands(decode)[2])))
    first = {name.removeprefix("first."): value for name, value in list(stored.items())[:count]}
    name = decode.meta["parameter"]
    fixed = fixed_arrays(encoding, first).items()
    attributes = [program.attribute(f"{name}.{part}", value, before=decode) for part, value in fixed]
    return [*nodes[:count], *attributes], nodes[count:]


def _beside(program: Program, site: Site, factors: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The thin product x·Vᵀ, and U, both in the type of x: the lowered program stores the factors so."""
    graph, dtype, name = program.graph, site.node.meta["val"].dtype, site.weight.meta["parameter"]
    values = (program.get(str(factor.target)).to(dtype) for factor in factors)
    up, down = (program.attribute(f"{name}.{part}", v, before=site.node) for part, v in zip("uv", values, strict=True))
    with graph.inserting_before(site.node):
        return graph.call_function(aten.linear.default, (site.input, down)), up
