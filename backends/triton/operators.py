"""What is no linear and has a kernel: token merging, rotations before a layer, attention with sizes or on a cache.

Each rewrite is in place and says what it chose for each node, by its name; what has no kernel stays as it is.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import fx

from ...compiler.attention import cache_code, operand_places
from ...compiler.dialect.activations import FLOATS, UNSIGNED
from ...compiler.program import Program, argument, example_shape, hint, operands, shape_of
from ...compiler.sites import ADD, MATMUL, AttentionSite, attention_sites
from .kernels import attention, cache, rotation, tokens  # noqa: F401  # tokens: its operators
from .kernels.launch import DTYPES
from .lower import DYNAMIC, FLOAT8, Capability, Choice

aten = torch.ops.aten
dialect = torch.ops.paretoc
kernels = torch.ops.paretoc_triton

_TOKENS: dict[Any, Any] = {
    dialect.bipartite_match.default: kernels.bipartite_match.default,
    dialect.merge_tokens.default: kernels.merge_tokens.default,
}


def lower_operators(program: Program, capability: Capability) -> dict[str, Choice]:
    """Replace, in place, the operators that have kernels. Returns what was chosen, by the name of the node.

    Comes before `lower`, which rounds what no kernel here reads as codes.
    """
    choices = _tokens(program) | _rotations(program) | _attentions(program, capability)
    program.refresh()
    return choices


def _tokens(program: Program) -> dict[str, Choice]:
    """Token operators whose kernels take the same arguments."""
    choices = {}
    for node in program.calls(*_TOKENS):
        dtype = operands(node)[0].meta["val"].dtype
        if dtype in DTYPES:
            node.target = _TOKENS[node.target]
            choices[node.name] = Choice(str(node.target))
        else:
            choices[node.name] = Choice(note=f"no Triton kernel reads {dtype}")
    return choices


def _rotations(program: Program) -> dict[str, Choice]:
    """flatten(left · unflatten(x) · right), as `rotate` writes it in front of a layer."""
    choices = {}
    for node in program.calls(aten.flatten.using_ints):
        found = _rotation(node)
        if found is None:
            continue
        x, left, right = found
        a, b = (example_shape(side)[0] for side in (left, right))
        if node.meta["val"].dtype not in DTYPES or not rotation.tilings(1, a, b):
            choices[node.name] = Choice(note=f"no kernel rotates {node.meta['val'].dtype} as {a} × {b}")
            continue
        with program.graph.inserting_before(node):
            fast = program.graph.call_function(kernels.rotate.default, (x, left, right))
        M = prod(example_shape(x)[:-1]) // program.repeats
        choices[node.name] = Choice(plan=rotation.rotation_plan(M, a, b, node.meta["val"].dtype))
        replace(node, fast)
    return choices


def _rotation(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, left, right) of the rotation that ends here."""
    outer = operands(node)[0]
    if outer.target is not aten.matmul.default or operands(node)[1:] != (-2, -1):
        return None
    left, inner = operands(outer)
    if inner.target is not aten.matmul.default:
        return None
    split, right = operands(inner)
    if split.target is not aten.unflatten.int or operands(split)[1] != -1 or {left.op, right.op} != {"get_attr"}:
        return None
    return operands(split)[0], left, right


def _attentions(program: Program, capability: Capability) -> dict[str, Choice]:
    """Attention that PyTorch has no fast kernel for: with a number for each key, or on rounded keys and values."""
    choices = {}
    for site in attention_sites(program):
        code = cache_code(site) or ""
        if code in UNSIGNED or not (code or _per_key(site.mask)) or not _plain(site):
            continue
        parts = [operands(reader)[index] for reader, index in operand_places(site)]
        reason = _refusal(parts, code, capability)
        name = site.node.name
        choices[name] = Choice(note=reason) if reason else _attend(program, site, parts, code)
    return choices


def _per_key(mask: fx.Node | None) -> bool:
    """Whether a mask is one number for each key."""
    if mask is None or not mask.meta["val"].is_floating_point():
        return False
    return [str(size) for size in shape_of(mask)][-2:-1] in ([], ["1"])


def _plain(site: AttentionSite) -> bool:
    """Whether the site is softmax(q·kᵀ·scale + mask)·v and nothing else, nor anybody reads a part of it."""
    if site.softmax is None:
        return not argument(site.node, 4, "dropout_p", 0.0)
    logits, weights = operands(site.softmax)[0], operands(site.node)[0]
    inside = [site.softmax]
    if weights.target in (aten.to.dtype, aten._to_copy.default):
        inside.append(weights)
        weights = operands(weights)[0]
    if logits.target in ADD and operands(logits)[1] is site.mask:
        inside.append(logits)
        logits = operands(logits)[0]
    while logits.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        inside.append(logits)
        logits = operands(logits)[0]
    return weights is site.softmax and logits.target in MATMUL and all(len(n.users) == 1 for n in [*inside, logits])


def _refusal(parts: list[fx.Node], code: str, capability: Capability) -> str:
    """Why no kernel runs an attention on these queries, keys and values; "" when one does."""
    query, key, value = map(shape_of, parts)
    dtypes = {part.meta["val"].dtype for part in parts}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        return f"no kernel reads attention in {' and '.join(sorted(map(str, dtypes)))}"
    if {len(query), len(key), len(value)} != {4} or len({str(shape[0]) for shape in (query, key, value)}) > 1:
        return f"no kernel for queries {[str(s) for s in query]} on keys {[str(s) for s in key]}"
    widths = {hint(shape[3]) for shape in (query, key, value)}
    if len(widths) > 1 or max(widths) > attention.MAX_WIDTH:
        return f"no kernel for heads of width {' and '.join(map(str, sorted(widths)))}"
    if code and any(part.target is not DYNAMIC for part in parts[1:]):
        return "something stands between the rounding of the keys and the attention"
    if code in FLOATS and capability is not None and capability < FLOAT8:
        return f"this GPU has no {code}"
    return "two codes share a byte, the heads are odd" if cache.packed(code) and max(widths) % 2 else ""


def _attend(program: Program, site: AttentionSite, parts: list[fx.Node], code: str) -> Choice:
    """Put the kernel in the place of an attention, behind the quantisers of keys and values that are rounded."""
    graph, (query, *sources) = program.graph, parts
    with graph.inserting_before(site.node):
        if code:
            rounded = [_unrepeated(operands(part)[0]) for part in sources]
            made = [graph.call_function(kernels.quantize_cache.default, (part, code)) for part in rounded]
            pairs = [[graph.call_function(operator.getitem, (pair, i)) for pair in made] for i in range(2)]
            arguments = (*pairs[0], site.mask, site.causal, site.scale, code, *pairs[1])
        else:
            arguments = (*map(_unrepeated, sources), site.mask, site.causal, site.scale)
        fast = graph.call_function(kernels.attention.default, (query, *arguments))
    bias = "" if site.mask is None else "per key" if _per_key(site.mask) else "mask"
    (M, D), N = example_shape(query)[2:], example_shape(sources[0])[2]
    replace(site.node, fast)
    note = f"keys and values in {code}" if code else ""
    return Choice(plan=attention.attention_plan(M, N, D, query.meta["val"].dtype, code, bias), note=note)


def _unrepeated(node: fx.Node) -> fx.Node:
    """Keys or values `[B, G·r, N, D]` that are those of G heads, each r times: the latter, which the kernel repeats."""
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node
    expanded = operands(node)[0]
    single = operands(expanded)[0] if expanded.target is aten.expand.default else None
    if single is None or single.target is not aten.unsqueeze.default or operands(single)[1] != 2:
        return node
    source: fx.Node = operands(single)[0]
    batch, heads, *rest = map(str, shape_of(source))
    copies = [*map(str, shape_of(expanded))]
    same = [copies[0], copies[1], *copies[3:]] == [batch, heads, *rest] and [*map(str, shape_of(node))][2:] == rest
    return source if same else node


def replace(old: fx.Node, new: fx.Node) -> None:
    """`new` computes what `old` did. An attention, which could drop out at random, would not be eliminated as dead."""
    new.meta.update(old.meta, replaces=old.name)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
