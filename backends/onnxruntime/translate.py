"""Program → an ONNX graph in which every decision about kernels is still open.

Our operators, and the few ATen operators whose ONNX form depends on the encodings around them, become opaque nodes of
the domain `paretoc` (see `lower.py`); everything else goes through `torch.onnx.export`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.onnx.ops import symbolic, symbolic_multi_out

from ...compiler.errors import LoweringError
from ...compiler.program import Program, describe
from ...compiler.quiet import quiet

aten = torch.ops.aten
paretoc = torch.ops.paretoc


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return symbolic("paretoc::Linear", inputs, dtype=x.dtype, shape=(*x.shape[:-1], weight.shape[0]), version=1)


def _decode(arrays: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    attributes: dict[str, Any] = {"encoding": encoding, "shape": list(shape)}
    return symbolic("paretoc::Decode", list(arrays), attributes, dtype=dtype, shape=tuple(shape), version=1)


def _fake_quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return symbolic("paretoc::StaticQuantize", [x, scale, zero], dtype=x.dtype, shape=x.shape, version=1)


def _fake_quantize_dynamic(x: Tensor, granularity: str, code: str = "int8") -> Tensor:
    attributes: dict[str, Any] = {"granularity": granularity, "code": code}
    return symbolic("paretoc::DynamicQuantize", [x], attributes, dtype=x.dtype, shape=x.shape, version=1)


def _top(values: Tensor, count: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """TopK over the last axis, sorted; on a tie the lower index first, as ONNX defines it."""
    shape = (*values.shape[:-1], count)
    k = torch.tensor([count], dtype=torch.int64)
    outputs = symbolic_multi_out(
        "TopK",
        [values, k],
        {"axis": -1, "largest": int(largest), "sorted": 1},
        dtypes=(values.dtype, torch.int64),
        shapes=(shape, shape),
        version=11,
    )
    return outputs[0], outputs[1]


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """x `[B, T, C]`, indices `[B, k]` → `[B, k, C]`: GatherND is several times faster than GatherElements here."""
    shape = (x.shape[0], indices.shape[1], x.shape[2])
    return symbolic("GatherND", [x, indices.unsqueeze(-1)], {"batch_dims": 1}, dtype=x.dtype, shape=shape, version=13)


def _bipartite_match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    in_a, in_b = (protected + 1) // 2, protected // 2
    metric = metric / metric.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    scores = metric[:, ::2][:, in_a:] @ metric[:, 1::2][:, in_b:].transpose(-1, -2)
    best, partner = scores.max(-1)
    total = best.shape[1]
    order = _top(best, total)[1]
    source = order[:, :r]
    rest = _top(order[:, r:], total - r, largest=False)[0]
    destination = _rows(partner.unsqueeze(-1), source).squeeze(-1)
    leading = torch.arange(in_a).expand(metric.shape[0], in_a)
    return torch.cat([leading, rest + in_a], dim=1), source + in_a, destination + in_b


def _merge_tokens(
    x: Tensor, size: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    """One gather of the tokens that stay and one scatter of those that move: no copy of either half."""
    tokens = x.shape[1]
    odd = torch.arange(1, tokens, 2).expand(x.shape[0], tokens // 2)
    stay = torch.cat([2 * unmerged, odd], dim=1)
    row = torch.arange(x.shape[0]).reshape(-1, 1).expand(x.shape[0], source.shape[1])
    where = torch.stack([row, destination + unmerged.shape[1]], dim=-1)

    def merge(value: Tensor) -> Tensor:
        kept = _rows(value, stay)
        inputs = [kept, where, _rows(value, 2 * source)]
        return symbolic("ScatterND", inputs, {"reduction": "add"}, dtype=x.dtype, shape=kept.shape, version=18)

    total = merge(size)
    return merge(x * size) / total, total


def _keep_tokens(x: Tensor, scores: Tensor, keep: int, protected: int, fuse: bool) -> Tensor:
    candidates = scores[:, protected:]
    order = _top(candidates, candidates.shape[1])[1]
    kept = _top(order[:, :keep], keep, largest=False)[0]
    parts = [x[:, :protected], _rows(x, kept + protected)]
    if fuse:
        dropped = order[:, keep:] + protected
        weight = _rows(scores.unsqueeze(-1), dropped)
        parts.append((_rows(x, dropped) * weight).sum(1, keepdim=True))
    return torch.cat(parts, dim=1)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *rest: Any, **options: Any
) -> Tensor:
    """ONNX Runtime's Attention wants a row of the mask for every query, even when all rows are equal."""
    mask = options.pop("attn_mask", mask)
    if mask is not None and mask.shape[-2] == 1:
        mask = mask.expand(*mask.shape[:-2], query.shape[-2], mask.shape[-1])
    return aten.scaled_dot_product_attention.default(query, key, value, mask, *rest, **options)  # type: ignore[no-any-return]


def _cast(x: Tensor, dtype: torch.dtype, *_: Any, **__: Any) -> Tensor:
    return x if x.dtype == dtype else aten._to_copy.default(x, dtype=dtype)


def _pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Averages of equal parts; of all of them, the mean."""
    if any(count != 1 for count in size):
        pool = aten.adaptive_avg_pool1d if len(size) == 1 else aten.adaptive_avg_pool2d
        return pool.default(x, size)  # type: ignore[no-any-return]
    return x.mean(tuple(range(-len(size), 0)), keepdim=True)


def _grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x `[S, K]` sorted by expert, weight `[E, K, N]`, ends `[E]` the end of each expert's rows → `[S, N]`."""
    shape = (x.shape[0], weight.shape[-1])
    return symbolic("paretoc::GroupedMatMul", [x, weight, ends], dtype=x.dtype, shape=shape, version=1)


#: what calls Python's own functions, on sizes and tuples
_PYTHON = {value for value in vars(operator).values() if callable(value)}
#: operators that other libraries define, by name
FOREIGN: dict[str, Callable[..., Any]] = {"transformers.grouped_mm_fallback.default": _grouped_matmul}
#: our translation table: operator of the program → function that emits its ONNX form
TABLE: dict[Any, Callable[..., Any]] = {
    aten.linear.default: _linear,
    paretoc.decode.default: _decode,
    paretoc.fake_quantize.default: _fake_quantize,
    paretoc.fake_quantize_dynamic.default: _fake_quantize_dynamic,
    paretoc.bipartite_match.default: _bipartite_match,
    paretoc.merge_tokens.default: _merge_tokens,
    paretoc.keep_tokens.default: _keep_tokens,
    # what the exporter would have to decompose
    aten.to.dtype: _cast,
    aten.__and__.Tensor: torch.bitwise_and,
    aten.__or__.Tensor: torch.bitwise_or,
    aten.min.other: torch.minimum,
    aten.max.other: torch.maximum,
    aten.adaptive_avg_pool1d.default: _pooled,
    aten.adaptive_avg_pool2d.default: _pooled,
}


def translate(program: Program, opset: int) -> ir.Model:
    """The program as an ONNX IR model of the given opset, inputs and outputs under readable names."""
    program = program.clone()
    table = TABLE | ({aten.scaled_dot_product_attention.default: _attention} if opset >= 23 else {})
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.target = table.get(node.target) or FOREIGN.get(str(node.target)) or node.target
    _part_outputs(program)
    program.module.recompile()
    axes = tuple(dict.fromkeys(opened, Dim.AUTO) for opened in program.dynamic)
    names = program.interface.output_names()
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(program.module, tuple(program.example), dynamic_shapes=axes)
            onnx_program = _converted(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=program.interface.input_names(),
                output_names=names,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _explained(program, error) from error
    assert onnx_program is not None
    model = onnx_program.model
    _name_axes(program, model)
    return model


def _part_outputs(program: Program) -> None:
    """Every output gets a value of its own, which can have its name: not that of an input, or of another output."""
    seen: set[fx.Node] = set(program.placeholders)

    def apart(node: fx.Node) -> fx.Node:
        if node not in seen:
            seen.add(node)
            return node
        with program.graph.inserting_before(program.output):
            return program.graph.call_function(aten.clone.default, (node,))

    program.output.args = fx.map_arg(program.output.args, apart)


def _converted(exported: ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram | None:
    """`torch.onnx.export` traces a program once more to decompose what ONNX has no form for, which takes as long as the
    rest of it. A program is functional already: one that holds no such operator is given as it is first."""
    decompose = exported.run_decompositions

    def decomposed(table: Mapping[Any, Any] | None = None) -> ExportedProgram:
        called = {node.target for node in exported.graph.nodes if node.op == "call_function"}
        plain = all(isinstance(target, OpOverload) and not target._schema.is_mutable for target in called - _PYTHON)
        return exported if table and plain and called.isdisjoint(table) else decompose(table)

    exported.run_decompositions = decomposed
    try:
        return torch.onnx.export(exported, **options)
    except Exception:
        del exported.run_decompositions
        return torch.onnx.export(exported, **options)


def _explained(program: Program, error: Exception) -> LoweringError:
    """Name the operator and the user's line where the exporter says which node it could not translate."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    named = re.search(r"op='\w+\.(\w+)'", text)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    guilty = next((n for n in calls if str(n.target) in text), None)
    # the exporter may name what an operator was decomposed into: "_linalg_svd" for linalg_svd
    guilty = guilty or next((n for n in calls if named and named.group(1).strip("_") in str(n.target)), None)
    first = next((ln.strip() for ln in str(chain[-1]).splitlines() if ln.strip()), type(error).__name__)
    place = describe(guilty) if guilty is not None else "exporting to ONNX"
    return LoweringError(
        f"the model cannot be exported to ONNX: {first}",
        where=place,
        fix="rewrite that operation with ones that ONNX has, or use target='eager'",
    )


def _name_axes(program: Program, model: ir.Model) -> None:
    """Symbolic axes get readable names: "batch" for the first, "sequence" for the second, else input and axis; those
    of a causal model "past" for the tokens of its cache and "total" for those of its mask."""
    renamed: dict[str, str] = {}
    causal = program.interface.cache is not None
    for value, opened in zip(model.graph.inputs, program.dynamic, strict=True):
        for axis in opened:
            wanted = {0: "batch", 1: "sequence", 2: "past" if causal else ""}.get(axis, "")
            if causal and value.name == "attention_mask" and axis == 1:
                wanted = "total"
            free = wanted and (causal or wanted not in renamed.values())
            renamed.setdefault(str(value.shape[axis]), wanted if free else f"{value.name}_{axis}")
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([d if isinstance(d, int) else renamed.get(str(d)) for d in value.shape])
