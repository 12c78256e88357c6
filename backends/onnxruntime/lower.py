"""Opaque `paretoc` nodes → real ONNX operators: the choice of kernels, one short rule each.

The rules see an encoded weight together with the quantiser of its input, and pick the form the target runs best.
`onnx` and `openvino` emit standard operators only; `onnxruntime` may emit com.microsoft ones. What each rule emits is
exact with respect to the eager reference up to float rounding, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir import tape

from ...compiler.dialect.activations import FLOATS, INTEGERS, UNSIGNED, group_of
from ...compiler.encodings import parse_encoding
from ...compiler.errors import LoweringError
from .forms import FORMS, MICROSOFT, Linear, runs_as
from .integers import Integers, integers
from .projections import merge_projections
from .speeds import Speeds

#: which input of an operator is its weight
_WEIGHT_OF = {"Conv": 1, "ConvTranspose": 1, "Gather": 0}


@dataclass
class Lowering:
    """The state of one lowering: the model, whether it may hold com.microsoft operators, how many rows each site
    multiplies, which form is how fast; then the form chosen for each site with its speed, the quantised activations and
    the constants made so far."""

    model: ir.Model
    contrib: bool
    rows: Mapping[str, int] = field(default_factory=dict)
    speeds: Speeds = field(default_factory=Speeds)
    chosen: dict[str, tuple[str, float]] = field(default_factory=dict)
    quantised: dict[tuple[ir.Value | str | None, ...], tuple[ir.Value, ...]] = field(default_factory=dict)
    made: dict[str, ir.Value] = field(default_factory=dict)

    def run(self) -> None:
        """Lower every opaque node, consumers of weights first, then what is left of weights and quantisers."""
        rules = {"Linear": self._linear, "Decode": self._decode}
        rules |= {"StaticQuantize": self._static, "DynamicQuantize": self._dynamic}
        rules |= {"GroupedMatMul": self._grouped_matmul}
        for node in list(self.model.graph):
            place = _WEIGHT_OF.get(node.op_type)
            if place is not None and (node.op_type != "Gather" or str(node.inputs[0].name).endswith(".weight")):
                node.name = _site(node.inputs[place])  # `explain()` looks for it when its weight has been folded
            if node.domain == "paretoc" and node.op_type == "Linear":
                self._linear(node)
            elif node.op_type == "Gather" and _opaque(node.inputs[0], "Decode"):
                self._embedding(node)
        for node in reversed(list(self.model.graph)):
            if node.domain != "paretoc":
                continue
            if any(output.uses() or output.is_graph_output() for output in node.outputs):
                rules[node.op_type](node)
            if node.graph is not None:
                node.graph.remove(node, safe=True)
        merge_projections(self)
        self.model.opset_imports.pop("paretoc", None)
        if any(n.domain == MICROSOFT for n in self.model.graph):
            self.model.opset_imports[MICROSOFT] = 1

    # -- building ---------------------------------------------------------------------------------------------------

    def constant(self, name: str, value: NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer; asked for again under the same name, it is the same one."""
        graph = self.model.graph
        if name in self.made:
            return self.made[name]
        assert name not in graph.initializers, f"{name} is a stored tensor of the model"
        tensor = ir.Tensor(np.array(value, order="C"), dtype=dtype, name=name)
        graph.initializers[name] = self.made[name] = made = ir.Value(
            name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        return made

    def emit(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
        outputs: int = 1,
    ) -> Any:
        """Insert one node; returns its output value(s)."""
        built = tape.Tape()
        if outputs == 1:
            result: Any = built.op(op_type, inputs, attributes, domain=domain, name=name)
        else:
            result = built.op_multi_out(op_type, inputs, attributes, num_outputs=outputs, domain=domain, name=name)
        self.model.graph.insert_before(before, list(built.nodes))
        return result

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` stand in for the node's only output; graph outputs keep their names."""
        old = node.outputs[0]
        value.shape, value.type = value.shape or old.shape, value.type or old.type
        if old.is_graph_output():
            name = old.name
            value = self.emit(node, "Identity", [value])
            graph = self.model.graph
            graph.outputs[graph.outputs.index(old)] = value
            old.name, value.name = f"{name}_before_lowering", name
            value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value)
        self.model.graph.remove(node, safe=True)

    # -- rules ------------------------------------------------------------------------------------------------------

    def _linear(self, node: ir.Node) -> None:
        x, weight, bias = (*node.inputs, None)[:3]
        assert x is not None and weight is not None
        decode = _opaque(weight, "Decode")
        site = _site(decode.inputs[0] if decode else weight)
        stored = _integers(decode) if decode else None
        if stored is None:
            self.replace(node, self.float_linear(node, x, weight, bias, site))
            return
        quantiser = _quantiser(x)
        code, granularity = (_text(quantiser, key) for key in ("code", "granularity")) if quantiser else ("", "")
        shared = quantiser is not None and (len(quantiser.outputs[0].uses()) > 1 or _key(quantiser) in self.quantised)
        linear = Linear(node, x, stored, bias, site, quantiser, code, granularity, shared)
        rows = self.rows.get(site, 1)
        name = self.speeds.fastest(self.fitting(linear), rows)
        kernel = runs_as(name, linear)
        self.chosen[site] = name, self.speeds.of(kernel if self.speeds.known(kernel) else name, rows)
        self.replace(node, FORMS[name].emit(self, linear))

    def fitting(self, linear: Linear) -> list[str]:
        """Names of the forms that this target may use and that fit."""
        return [
            name for name, form in FORMS.items() if form.standard >= (not self.contrib) and not form.refusal(linear)
        ]

    def float_linear(self, node: ir.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None, site: str) -> ir.Value:
        """x·Wᵀ + b in floating point: Gemm for a matrix, MatMul with the transposed weight otherwise."""
        if x.shape is not None and len(x.shape) == 2:
            inputs = [x, weight] if bias is None else [x, weight, bias]
            return self.emit(node, "Gemm", inputs, {"transB": 1}, name=site)
        if weight.const_value is not None:
            transposed = self.constant(f"{weight.name}.T", weight.const_value.numpy().T)
        else:
            transposed = self.emit(node, "Transpose", [weight], {"perm": [1, 0]})
        product = self.emit(node, "MatMul", [x, transposed], name=site)
        return self.add_bias(node, product, bias)

    def add_bias(self, node: ir.Node, product: ir.Value, bias: ir.Value | None) -> ir.Value:
        return product if bias is None else self.emit(node, "Add", [product, bias])

    def stored_weight(self, node: ir.Node, stored: Integers, site: str) -> ir.Value:
        """The weight behind a DequantizeLinear: per tensor, per channel or in blocks along its axis."""
        codes, scale, zero = self._parts(stored, site)
        attributes: dict[str, Any] = {"axis": stored.axis} if stored.block >= 0 else {}
        if stored.block > 0:
            attributes["block_size"] = stored.block
        return self.emit(node, "DequantizeLinear", [codes, scale, *([zero] if zero else [])], attributes)

    def folded_weight(self, node: ir.Node, stored: Integers, site: str) -> ir.Value:
        """The weight by plain arithmetic on its codes, which ONNX Runtime does once, when a session starts."""
        codes, scale, zero = self._parts(stored, site)
        floating = {"to": int(ir.DataType.FLOAT)}
        value = self.emit(node, "Cast", [codes], floating)
        shape, axis = list(stored.codes.shape), stored.axis
        if stored.block > 0:
            blocks = [*shape[:axis], -1, stored.block, *shape[axis + 1 :]]
            value = self._reshape(node, value, blocks)
            ones = [*stored.scale.shape[: axis + 1], 1, *stored.scale.shape[axis + 1 :]]
        else:
            ones = [1] * axis + [-1] + [1] * (len(shape) - axis - 1) if stored.block == 0 else []
        if zero is not None:
            value = self.emit(
                node, "Sub", [value, self._reshape(node, self.emit(node, "Cast", [zero], floating), ones)]
            )
        value = self.emit(node, "Mul", [value, self._reshape(node, scale, ones)])
        return self._reshape(node, value, shape) if stored.block > 0 else value

    def _reshape(self, node: ir.Node, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        target = self.constant(f"shape.{'x'.join(map(str, shape))}", np.array(shape, dtype=np.int64))
        return self.emit(node, "Reshape", [value, target])

    def _parts(self, stored: Integers, site: str) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """(codes, scale, zero) as ONNX stores them: scales of blocks keep their axis, others are a row or a scalar."""
        kind, kept = f".axis{stored.axis}", stored.block > 0
        shape: Any = stored.scale.shape if kept else () if stored.block == -1 else (-1,)
        codes = self.constant(f"{site}.weight.codes{kind}", stored.codes.astype(stored.storage()))
        scale = self.constant(f"{site}.weight.scale{kind}", stored.scale.reshape(shape))
        if stored.zero is None:
            return codes, scale, None
        zero = stored.zero.reshape(shape).astype(stored.storage())
        return codes, scale, self.constant(f"{site}.weight.zero{kind}", zero)

    def _embedding(self, node: ir.Node) -> None:
        """Gather rows of codes, then dequantise only those: the table stays quantised in memory."""
        decode = _opaque(node.inputs[0], "Decode")
        stored = _integers(decode) if decode else None
        if decode is None or stored is None or stored.block > 0:
            return
        site, indices = _site(decode.inputs[0]), node.inputs[1]
        codes = stored.codes.astype(np.int8 if stored.zero is None else np.uint8)
        rows = self.emit(
            node, "Gather", [self.constant(f"{site}.weight.codes_rows", codes), indices], {"axis": 0}, name=site
        )
        values = self.emit(node, "Cast", [rows], {"to": int(ir.DataType.FLOAT)})
        count = codes.shape[0] if stored.block == 0 else 1
        if stored.zero is not None:
            zero = self.constant(f"{site}.weight.zero_rows", stored.zero.astype(np.float32).reshape(count, 1))
            values = self.emit(node, "Sub", [values, self._row(node, zero, indices, stored)])
        scale = self.constant(f"{site}.weight.scale_rows", stored.scale.reshape(count, 1))
        self.replace(node, self.emit(node, "Mul", [values, self._row(node, scale, indices, stored)]))

    def _row(self, node: ir.Node, table: ir.Value, indices: ir.Value | None, stored: Integers) -> ir.Value:
        return table if stored.block == -1 else self.emit(node, "Gather", [table, indices], {"axis": 0})

    def _grouped_matmul(self, node: ir.Node) -> None:
        """Experts one after the other: each multiplies its own rows, and the results stand in the same order."""
        x, weight, ends = node.inputs
        assert x is not None and weight is not None and weight.shape is not None
        experts = int(weight.shape[0])
        one, axis = np.array([1], dtype=np.int64), self.constant("axes.first", np.array([0], dtype=np.int64))
        ends = self.emit(node, "Cast", [ends], {"to": int(ir.DataType.INT64)})
        bounds = [axis, *(self.emit(node, "Slice", [ends, self.constant(f"expert.{e}", one * e),
                                                    self.constant(f"expert.{e + 1}", one * (e + 1))])
                          for e in range(experts))]  # fmt: skip
        parts = []
        for expert in range(experts):
            rows = self.emit(node, "Slice", [x, bounds[expert], bounds[expert + 1], axis])
            index = self.constant(f"expert.index.{expert}", np.array(expert, dtype=np.int64))
            matrix = self.emit(node, "Gather", [weight, index], {"axis": 0})
            parts.append(self.emit(node, "MatMul", [rows, matrix]))
        self.replace(node, self.emit(node, "Concat", parts, {"axis": 0}))

    # -- quantisers -------------------------------------------------------------------------------------------------

    def quantised_input(self, quantiser: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(codes uint8, scale, zero) of an activation, computed once however many operators read it."""
        source = quantiser.inputs[0]
        assert source is not None
        granularity, key = _text(quantiser, "granularity") or quantiser.op_type, _key(quantiser)
        if key not in self.quantised:
            self.quantised[key] = {
                "StaticQuantize": self._static_codes,
                "tensor": self._tensor_codes,
                "token": self._token_codes,
            }[granularity](quantiser, source)
        return self.quantised[key]

    def _static_codes(self, quantiser: ir.Node, source: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        _, scale, zero = quantiser.inputs
        assert scale is not None and zero is not None
        return self.emit(quantiser, "QuantizeLinear", [source, scale, zero]), scale, zero

    def _tensor_codes(self, quantiser: ir.Node, source: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        bits, token = (INTEGERS | UNSIGNED)[_text(quantiser, "code")], _asymmetric_tokens(quantiser)
        if bits == 8 and not token:
            codes, scale, zero = self.emit(quantiser, "DynamicQuantizeLinear", [source], outputs=3)
            return codes, scale, zero
        nought = self.constant("range.nought", np.array(0, dtype=np.float32))
        inputs = [source, *([self.constant("axes.last", np.array([-1], dtype=np.int64))] if token else [])]
        low, high = (
            self.emit(quantiser, bound, [self.emit(quantiser, reduce, inputs, {"keepdims": int(token)}), nought])
            for bound, reduce in (("Min", "ReduceMin"), ("Max", "ReduceMax"))
        )
        levels = self.constant(f"range.levels{bits}", np.array((1 << bits) - 1, dtype=np.float32))
        scale = self.emit(quantiser, "Div", [self.emit(quantiser, "Sub", [high, low]), levels])
        one = self.constant("range.one", np.array(1, dtype=np.float32))
        scale = self.emit(quantiser, "Where", [self.emit(quantiser, "Greater", [scale, nought]), scale, one])
        shift = self.emit(
            quantiser, "Round", [self.emit(quantiser, "Neg", [self.emit(quantiser, "Div", [low, scale])])]
        )
        codes = self.emit(quantiser, "Round", [self.emit(quantiser, "Div", [source, scale])])
        codes = self.emit(quantiser, "Clip", [self.emit(quantiser, "Add", [codes, shift]), nought, levels])
        to_codes = {"to": int(ir.DataType.UINT8)}
        return self.emit(quantiser, "Cast", [codes], to_codes), scale, self.emit(quantiser, "Cast", [shift], to_codes)

    def _token_codes(self, quantiser: ir.Node, source: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Symmetric codes around 128: unsigned, because u8×s8 is the fast product on x86."""
        if _asymmetric_tokens(quantiser):
            return self._tensor_codes(quantiser, source)
        scale = self._symmetric_scale(quantiser, source, (1 << INTEGERS[_text(quantiser, "code")] - 1) - 1)
        rounded = self.emit(quantiser, "Round", [self.emit(quantiser, "Div", [source, scale])])
        offset = self.constant("token.offset", np.array(128, dtype=np.float32))
        shifted = self.emit(quantiser, "Add", [rounded, offset])
        codes = self.emit(quantiser, "Cast", [shifted], {"to": int(ir.DataType.UINT8)})
        return codes, scale, self.constant("token.zero", np.array(128, dtype=np.uint8))

    def _symmetric_scale(self, quantiser: ir.Node, source: ir.Value, top: float) -> ir.Value:
        """max|x| / top, of each token or of all."""
        axes = [self.constant("axes.last", np.array([-1], dtype=np.int64))]
        token = _text(quantiser, "granularity") == "token"
        magnitude = self.emit(quantiser, "Abs", [source])
        peak = self.emit(quantiser, "ReduceMax", [magnitude, *(axes if token else [])], {"keepdims": int(token)})
        floor = self.constant("peak.smallest", np.array(1e-8, dtype=np.float32))
        levels = self.constant(f"peak.code{top:g}", np.array(top, dtype=np.float32))
        return self.emit(quantiser, "Div", [self.emit(quantiser, "Max", [peak, floor]), levels])

    def _floating(self, node: ir.Node) -> None:
        """x → scale · float8(x / scale): ONNX Runtime's CPU has the types, and computes in float32."""
        source, code = node.inputs[0], _text(node, "code")
        assert source is not None
        top = torch.finfo(FLOATS[code]).max
        scale = self._symmetric_scale(node, source, top)
        bounds = [self.constant(f"peak.code{sign * top:g}", np.array(sign * top, dtype=np.float32)) for sign in (-1, 1)]
        shrunk = self.emit(node, "Clip", [self.emit(node, "Div", [source, scale]), *bounds])
        kind = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e5m2": ir.DataType.FLOAT8E5M2}[code]
        rounded = self.emit(node, "Cast", [shrunk], {"to": int(kind), "saturate": 1})
        values = self.emit(node, "Cast", [rounded], {"to": int(ir.DataType.FLOAT)})
        self.replace(node, self.emit(node, "Mul", [values, scale]))

    def _static(self, node: ir.Node) -> None:
        codes, scale, zero = self.quantised_input(node)
        self.replace(node, self.emit(node, "DequantizeLinear", [codes, scale, zero]))

    def _dynamic(self, node: ir.Node) -> None:
        if size := group_of(_text(node, "granularity")):
            self._grouped(node, size)
            return
        if _text(node, "code") in FLOATS:
            self._floating(node)
            return
        codes, scale, zero = self.quantised_input(node)
        if _text(node, "granularity") == "tensor":
            self.replace(node, self.emit(node, "DequantizeLinear", [codes, scale, zero]))
            return
        values, offset = (self.emit(node, "Cast", [v], {"to": int(ir.DataType.FLOAT)}) for v in (codes, zero))
        self.replace(node, self.emit(node, "Mul", [self.emit(node, "Sub", [values, offset]), scale]))

    def _grouped(self, node: ir.Node, size: int) -> None:
        """Groups of channels are the tokens of a tensor with one more axis."""
        source = node.inputs[0]
        assert source is not None and source.shape is not None
        leading = [0] * (len(source.shape) - 1)
        attributes = {"granularity": "token", "code": _text(node, "code")}
        apart = self._reshape(node, source, [*leading, -1, size])
        rounded = self.emit(node, "DynamicQuantize", [apart], attributes, domain="paretoc")
        self.replace(node, self._reshape(node, rounded, [*leading, -1]))
        self._dynamic(rounded.producer())

    def _decode(self, node: ir.Node) -> None:
        """A weight whose reader has no rule of its own: dequantise, or store it dense."""
        site, stored = _site(node.inputs[0]), _integers(node)
        shape = tuple(_ints(node, "shape"))
        if stored is None:
            value = self.constant(f"{site}.weight.dense", _dense(node).numpy())
        else:
            # beside a static input stands the DequantizeLinear that ONNX Runtime fuses with it; a floating weight it
            # would round anew, one range for the whole tensor
            fused = any(_reads_static(user) for user, _ in node.outputs[0].uses())
            weight = self.folded_weight if self.contrib and not fused else self.stored_weight
            value = weight(node, stored, site)
            if tuple(stored.codes.shape) != shape:
                value = self._reshape(node, value, shape)
        if node.outputs[0].dtype not in (None, ir.DataType.FLOAT):
            value = self.emit(node, "Cast", [value], {"to": int(node.outputs[0].dtype)})
        self.replace(node, value)


def _reads_static(node: ir.Node) -> bool:
    """Whether a node's first input is an activation of known range, lowered already or not."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None and source.op_type == "DequantizeLinear" and source.inputs[0] is not None:
        source = source.inputs[0].producer()
        return source is not None and source.op_type == "QuantizeLinear"
    return source is not None and source.op_type == "StaticQuantize"


def _quantiser(value: ir.Value | None) -> ir.Node | None:
    return _opaque(value, "StaticQuantize") or _opaque(value, "DynamicQuantize")


def required_opset(encodings: Sequence[Any], codes: Sequence[str], base: int) -> int:
    """The lowest opset that holds these encodings of weights and codes of activations: 19 for float8, 21 for 4-bit
    integers and for blocks of scales."""
    base = max(base, 19) if any(code in FLOATS for code in codes) else base
    for encoding in encodings:
        inner = getattr(encoding, "values", encoding)
        if getattr(inner, "bits", 8) <= 4 or getattr(inner, "group", 0) > 0:
            base = max(base, 21)
    return base


def _opaque(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The `paretoc` node of that type which produces a value, if one does."""
    producer = value.producer() if value is not None else None
    matches = producer is not None and producer.domain == "paretoc" and producer.op_type == op_type
    return producer if matches else None


def _site(value: ir.Value | None) -> str:
    """encoder.layer.0.query.weight.codes → encoder.layer.0.query, also for what is computed from it."""
    sources, waiting, seen = [], [value], set[ir.Value | None]()
    while waiting:
        one = waiting.pop()
        producer = one.producer() if one is not None else None
        if producer is not None and one not in seen:
            waiting += producer.inputs
        elif one is not None and producer is None and one.name:
            sources.append(one.name)
        seen.add(one)
    name = next((s for s in sources if ".weight" in s), sources[0] if sources else "constant")
    head, separator, _ = name.partition(".weight")
    return head if separator else name.rpartition(".")[0] or name


def _text(node: ir.Node, name: str) -> str:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else ""


def _asymmetric_tokens(quantiser: ir.Node) -> bool:
    return _text(quantiser, "granularity") == "token" and _text(quantiser, "code") in UNSIGNED


def _key(quantiser: ir.Node) -> tuple[ir.Value | str | None, ...]:
    """What makes two quantisers one: the value and the range they read, and how."""
    return (*quantiser.inputs, quantiser.op_type, _text(quantiser, "granularity"), _text(quantiser, "code"))


def _ints(node: ir.Node, name: str) -> Sequence[int]:
    return list(node.attributes[name].as_ints())


def _trimmed(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _stored(node: ir.Node) -> tuple[Any, dict[str, torch.Tensor], tuple[int, ...]]:
    encoding = parse_encoding(_text(node, "encoding"))
    shape = tuple(_ints(node, "shape"))
    arrays = {}
    for name, value in zip(encoding.layout(shape), node.inputs, strict=True):
        if value is None or value.const_value is None:
            raise LoweringError(
                f"the stored array {name!r} of an encoded weight is not constant",
                where=_site(value),
                fix="a pass computed it in the graph; store it with Program.encode instead",
            )
        arrays[name] = _tensor(np.array(value.const_value.numpy()))
    return encoding, arrays, shape


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """NumPy knows bfloat16 only through ml_dtypes, which PyTorch does not read."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _integers(node: ir.Node) -> Integers | None:
    return integers(*_stored(node))


def _dense(node: ir.Node) -> torch.Tensor:
    encoding, arrays, shape = _stored(node)
    dense: torch.Tensor = encoding.decode(arrays, shape).contiguous()
    return dense
