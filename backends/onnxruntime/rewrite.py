"""Equal graphs that ONNX Runtime runs faster: one small rule each, with the reason where it does not apply.

Each is exact but for the order of float sums. What they save was measured on an x86 CPU (see
`benchmarks/onnxruntime_cpu.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet


class Rule(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript ships no types
    """A pattern, what must hold for it, and what takes its place."""


class ResidualSum(Rule):
    """a + b before a LayerNormalization passes a Reshape, which changes nothing and costs nothing: ONNX Runtime fuses
    Add and LayerNormalization into SkipLayerNormalization, which takes three times as long as the two operators."""

    def pattern(self, op: Any, a: ir.Value, b: ir.Value) -> Any:
        return op.Add(a, b, _outputs=["total"])

    def check(self, context: Any, a: ir.Value, b: ir.Value, total: ir.Value, **_: Any) -> MatchResult:
        readers = [node.op_type for node, index in total.uses() if index == 0]
        if "LayerNormalization" not in readers:
            return MatchResult().fail("no LayerNormalization reads it")
        if _rank(a) != 3 or _shape(a) != _shape(b):
            return MatchResult().fail("ONNX Runtime fuses only sums of two equally shaped [B, T, C]")
        if not isinstance(_shape(a)[2], int):  # type: ignore[index]
            return MatchResult().fail("it has no fixed number of channels")
        return MatchResult()

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, total: ir.Value, **_: Any) -> Any:
        same = np.array([0, 0, _shape(a)[2]], dtype=np.int64)  # type: ignore[index]
        return op.Reshape(op.Add(a, b), _stored(op, f"{total.name}.shape", same))


class HeadsInside(Rule):
    """Attention takes q, k, v as [B, T, H·D] and splits the heads itself: no Reshape and Transpose around it."""

    def pattern(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value) -> Any:
        def heads(x: ir.Value, name: str) -> Any:
            split = op.Reshape(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=[f"{name}_split"])
            return op.Transpose(split, perm=[0, 2, 1, 3])

        result = op.Attention(
            heads(q, "q"), heads(k, "k"), heads(v, "v"),
            _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"],
        )  # fmt: skip
        joined = op.Transpose(result, perm=[0, 2, 1, 3])
        return op.Reshape(joined, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["merged"])

    def check(self, context: Any, result: ir.Value, merged: ir.Value, **values: ir.Value) -> MatchResult:
        node = result.producer()
        assert node is not None
        if len(node.inputs) > 4 or "q_num_heads" in node.attributes:
            return MatchResult().fail("a cache is kept with the heads apart")
        for name in "qkv":
            if reason := _not_split(name, values[name], values[f"{name}_split"]):
                return MatchResult().fail(reason)
        shape = _shape(merged)
        if shape is None or len(shape) != 3 or shape[:2] != _shape(values["q"])[:2]:  # type: ignore[index]
            return MatchResult().fail("the result is not joined to [B, T, H·D]")
        return MatchResult()

    def rewrite(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, q_split: ir.Value, k_split: ir.Value,
        result: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = result.producer()
        assert node is not None
        attributes = {name: a.value for name, a in node.attributes.items()}
        heads = {"q_num_heads": _shape(q_split)[2], "kv_num_heads": _shape(k_split)[2]}  # type: ignore[index]
        return op.Attention(q, k, v, *node.inputs[3:], **attributes, **heads)


class RootMeanSquareNorm(Rule):
    """x / √(mean(x²) + ε) · weight, spelt out, is RMSNormalization (opset 23)."""

    def pattern(self, op: Any, x: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value, weight: ir.Value) -> Any:
        mean = op.ReduceMean(op.Pow(x, two), axes, _allow_other_attributes=True, _outputs=["mean"])
        return op.Mul(weight, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps)))))

    def check(
        self, context: Any, x: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value, weight: ir.Value,
        mean: ir.Value, **_: Any,
    ) -> MatchResult:  # fmt: skip
        if _opset(mean) < 23:
            return MatchResult().fail("the operator is of opset 23")
        node = mean.producer()
        assert node is not None
        keep = node.attributes.get("keepdims")
        rank = _rank(x)
        if _number(two) != 2 or _number(eps) is None or (keep is not None and not keep.as_int()):
            return MatchResult().fail("it is not a root mean square")
        if _numbers(axes) not in ([-1], [rank - 1]):
            return MatchResult().fail("the mean is not over the last axis")
        if _rank(weight) != 1 or _shape(weight) != (_shape(x) or [])[-1:]:
            return MatchResult().fail("the weight is not one number a channel")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, eps: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=_number(eps))


class Rotary(Rule):
    """x · cos + rotate_half(x) · sin, where both halves turn by the same angles, is RotaryEmbedding (opset 23)."""

    def pattern(self, op: Any, x: ir.Value, angles: ir.Value, by: ir.Value, again: ir.Value) -> Any:
        both = op.Concat(angles, angles, axis=-1)
        low = op.Slice(x, _allow_other_inputs=True, _outputs=["low"])
        high = op.Slice(x, _allow_other_inputs=True, _outputs=["high"])
        cos = op.Unsqueeze(op.Mul(op.Cos(both), by), _allow_other_inputs=True, _outputs=["cos"])
        sin = op.Unsqueeze(op.Mul(op.Sin(both), again), _allow_other_inputs=True, _outputs=["sin"])
        return op.Add(op.Mul(x, cos), op.Mul(op.Concat(op.Neg(high), low, axis=-1), sin))

    def check(
        self, context: Any, x: ir.Value, angles: ir.Value, by: ir.Value, again: ir.Value,
        low: ir.Value, high: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any,
    ) -> MatchResult:  # fmt: skip
        if _opset(low) < 23:
            return MatchResult().fail("the operator is of opset 23")
        shape, turned = _shape(x), _shape(angles)
        if shape is None or turned is None or len(shape) != 4 or len(turned) != 3 or not isinstance(shape[3], int):
            return MatchResult().fail("it is not [B, H, T, D] with angles [B, T, D/2]")
        if turned[0] != shape[0] or turned[1] != shape[2] or turned[2] != shape[3] // 2:
            return MatchResult().fail("the operator wants the angles of every text of the batch")
        if _number(by) is None or _number(by) != _number(again):
            return MatchResult().fail("cosine and sine are scaled differently")
        if any(_axes(v) != [1] for v in (cos, sin)):
            return MatchResult().fail("the angles do not stand for all heads")
        half = shape[3] // 2
        if _part(low) != (3, 0, half) or _part(high)[:2] != (3, half) or _part(high)[2] < shape[3]:
            return MatchResult().fail("the halves are not the two halves of a head")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, angles: ir.Value, by: ir.Value, **_: Any) -> Any:
        return op.RotaryEmbedding(x, op.Mul(op.Cos(angles), by), op.Mul(op.Sin(angles), by))


class RotaryInside(Rule):
    """RotaryEmbedding takes [B, T, H·D] too: it turns the heads before they are split, so that attention may split
    them (`HeadsInside`)."""

    def pattern(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value) -> Any:
        split = op.Reshape(x, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["split"])
        return op.RotaryEmbedding(op.Transpose(split, perm=[0, 2, 1, 3]), cos, sin)

    def check(self, context: Any, x: ir.Value, split: ir.Value, **_: Any) -> MatchResult:
        reason = _not_split("x", x, split)
        return MatchResult().fail(reason) if reason else MatchResult()

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, split: ir.Value, **_: Any) -> Any:
        node = split.producer()
        assert node is not None
        turned = op.RotaryEmbedding(x, cos, sin, num_heads=_shape(split)[2])  # type: ignore[index]
        parts = op.Reshape(turned, *node.inputs[1:], **node.attributes)
        parts.shape, parts.type, turned.shape, turned.type = split.shape, split.type, x.shape, x.type
        return op.Transpose(parts, perm=[0, 2, 1, 3])


class GroupedHeads(Rule):
    """Attention reads keys and values that several query heads share where they stand, unrepeated."""

    def pattern(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value) -> Any:
        def repeated(x: ir.Value, name: str) -> Any:
            several = op.Unsqueeze(x, _allow_other_inputs=True, _outputs=[f"{name}_apart"])
            several = op.Expand(several, _allow_other_inputs=True)
            return op.Reshape(
                several, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=[f"{name}_repeated"]
            )

        return op.Attention(
            q, repeated(k, "k"), repeated(v, "v"),
            _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"],
        )  # fmt: skip

    def check(self, context: Any, q: ir.Value, result: ir.Value, **values: ir.Value) -> MatchResult:
        node = result.producer()
        assert node is not None
        if len(node.inputs) > 4:
            return MatchResult().fail("a cache is kept apart")
        for name in "kv":
            one, repeated = _shape(values[name]), _shape(values[f"{name}_repeated"])
            if one is None or repeated is None or len(one) != 4 or len(repeated) != 4:
                return MatchResult().fail("keys and values are not [B, H, T, D]")
            if _axes(values[f"{name}_apart"]) != [2] or (one[0], one[2:]) != (repeated[0], repeated[2:]):
                return MatchResult().fail("something else than the heads is repeated")
        return MatchResult()

    def rewrite(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, result: ir.Value, **_: Any) -> Any:
        node = result.producer()
        assert node is not None
        return op.Attention(q, k, v, *node.inputs[3:], **node.attributes)


class AddedMask(Rule):
    """A mask of truth values becomes the numbers that Attention adds, once for all layers: ONNX Runtime makes them anew
    in every Attention, on one thread. Bit by bit the same there; where a row of the mask hides everything, the
    specification leaves the result open."""

    def pattern(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> Any:
        return op.Attention(
            q, k, v, mask, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"]
        )

    def check(self, context: Any, mask: ir.Value, result: ir.Value, **_: Any) -> MatchResult:
        node = result.producer()
        assert node is not None
        if mask.dtype != ir.DataType.BOOL:
            return MatchResult().fail("its mask is added already")
        return MatchResult() if len(node.outputs) == 1 else MatchResult().fail("a cache is kept")

    def rewrite(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, result: ir.Value, **_: Any
    ) -> Any:
        node = result.producer()
        assert node is not None
        shown, hidden = (
            _stored(op, f"{result.name}.{name}", np.array(value, dtype=np.float32))
            for name, value in (("shown", 0.0), ("hidden", np.finfo(np.float32).min))
        )
        return op.Attention(q, k, v, op.Where(mask, shown, hidden), *node.inputs[4:], **node.attributes)


class VisibleRows(Rule):
    """Where a mask is added as finite numbers, the softmax of finite scores is never NaN, and nothing needs to look for
    one. With −∞ for what is hidden, a row of nothing else is 0/0."""

    def pattern(self, op: Any, scores: ir.Value, mask: ir.Value, zero: ir.Value) -> Any:
        shares = op.Softmax(op.Add(scores, mask), _allow_other_attributes=True, _outputs=["shares"])
        return op.Where(op.IsNaN(shares), zero, shares)

    def check(self, context: Any, mask: ir.Value, shares: ir.Value, **_: Any) -> MatchResult:
        node = mask.producer()
        if node is None or node.op_type != "Where":
            return MatchResult().fail("its mask is not made of two numbers")
        if mask.dtype != ir.DataType.FLOAT:
            return MatchResult().fail("the least number of another type overflows when a score is added")
        added = [_number(value) for value in node.inputs[1:] if value is not None]
        if any(number is None or not np.isfinite(number) for number in added):
            return MatchResult().fail("it may hide a whole row")
        return MatchResult()

    def rewrite(self, op: Any, shares: ir.Value, **_: Any) -> Any:
        return op.Identity(shares)


class EmptyPad(Rule):
    """A Pad by nothing is its input: what stands between a convolution and the rounding of its result keeps ONNX
    Runtime from running it on integers."""

    def pattern(self, op: Any, x: ir.Value, pads: ir.Value) -> Any:
        return op.Pad(x, pads, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, context: Any, pads: ir.Value, **_: Any) -> MatchResult:
        numbers = _numbers(pads)
        return MatchResult() if numbers is not None and not any(numbers) else MatchResult().fail("it pads")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)


class PaddedConvolution(Rule):
    """A convolution of codes pads them itself, each side by its own number: 0 has a code of its own."""

    def pattern(self, op: Any, x: ir.Value, pads: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        padded = op.Pad(x, pads, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["padded"])
        codes = op.QuantizeLinear(padded, scale, zero)
        return op.Conv(
            op.DequantizeLinear(codes, scale, zero),
            _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"],
        )  # fmt: skip

    def check(self, context: Any, pads: ir.Value, padded: ir.Value, result: ir.Value, **_: Any) -> MatchResult:
        node, convolution, numbers = padded.producer(), result.producer(), _numbers(pads)
        assert node is not None and convolution is not None
        filled = _number(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
        if filled != 0 or len(node.inputs) > 3 or _text(node, "mode") not in ("", "constant"):
            return MatchResult().fail("it does not pad with zeros along the last axes")
        if numbers is None or min(numbers) < 0 or any(numbers[side] for side in _outside(numbers)):
            return MatchResult().fail("it does not widen the image by a known number of zeros")
        if _text(convolution, "auto_pad") not in ("", "NOTSET"):
            return MatchResult().fail("the convolution finds its pads itself")
        return MatchResult()

    def rewrite(
        self, op: Any, x: ir.Value, pads: ir.Value, scale: ir.Value, zero: ir.Value, result: ir.Value, **_: Any
    ) -> Any:
        node, numbers = result.producer(), _numbers(pads)
        assert node is not None and numbers is not None
        sides = [int(n) for side, n in enumerate(numbers) if side not in _outside(numbers)]
        own = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0] * len(sides)
        attributes = {**node.attributes, "pads": [a + b for a, b in zip(own, sides, strict=True)]}
        values = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        padding = op.Conv(values, *node.inputs[1:], **attributes)
        padding.producer().name = node.name  # of its site
        return padding


class SaturatedClip(Rule):
    """Codes that end where a Clip does need no Clip: bit by bit the same."""

    def pattern(self, op: Any, x: ir.Value, low: ir.Value, high: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        return op.QuantizeLinear(op.Clip(x, low, high), scale, zero)

    def check(
        self, context: Any, low: ir.Value, high: ir.Value, scale: ir.Value, zero: ir.Value, **_: Any
    ) -> MatchResult:
        bounds, step, middle = (_number(low), _number(high)), _number(scale), _number(zero)
        if None in bounds or step is None or middle is None or zero.dtype != ir.DataType.UINT8:
            return MatchResult().fail("its bounds or its codes are not known")
        ends = [round(float(np.float32(b) / np.float32(step))) + middle for b in bounds]
        return MatchResult() if ends[0] <= 0 and ends[1] >= 255 else MatchResult().fail("codes go beyond the bounds")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value, **_: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero)


class Signed(Rule):
    """The second factor of a product of activations in signed codes, 128 less each and the same numbers: u8·s8 takes
    half the time of u8·u8."""

    def check(self, context: Any, a: ir.Value, zero: ir.Value, **_: Any) -> MatchResult:
        first = a.producer()
        codes = first.inputs[0] if first is not None and first.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != ir.DataType.UINT8:
            return MatchResult().fail("the first factor is not in unsigned codes")
        if zero.dtype != ir.DataType.UINT8 or _number(zero) is None:
            return MatchResult().fail("its codes are not unsigned with one known zero")
        return MatchResult()

    def middle(self, op: Any, product: ir.Value, zero: ir.Value) -> ir.Value:
        return _stored(op, f"{product.name}.zero", np.array(int(_number(zero) or 0) - 128, dtype=np.int8))


class SignedFactor(Signed):
    """As they stand: the values of an attention."""

    def pattern(self, op: Any, a: ir.Value, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        return op.MatMul(a, op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero), _outputs=["product"])

    def rewrite(
        self, op: Any, a: ir.Value, x: ir.Value, scale: ir.Value, zero: ir.Value, product: ir.Value, **_: Any
    ) -> Any:
        middle = self.middle(op, product, zero)
        return op.MatMul(a, op.DequantizeLinear(op.QuantizeLinear(x, scale, middle), scale, middle))


class SignedKeys(Signed):
    """Transposed, its keys: the codes are, since ONNX Runtime fails to move signed ones there itself (1.31.1)."""

    def pattern(self, op: Any, a: ir.Value, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        values = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        turned = op.Transpose(values, _allow_other_attributes=True, _outputs=["turned"])
        return op.MatMul(a, turned, _outputs=["product"])

    def rewrite(
        self, op: Any, a: ir.Value, x: ir.Value, scale: ir.Value, zero: ir.Value, turned: ir.Value,
        product: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = turned.producer()
        assert node is not None
        middle = self.middle(op, product, zero)
        codes = op.Transpose(op.QuantizeLinear(x, scale, middle), **node.attributes)
        return op.MatMul(a, op.DequantizeLinear(codes, scale, middle))


class ScaledCodes(Rule):
    """A number times a product of codes goes into the scale of the first factor, a number too."""

    def pattern(self, op: Any, codes: ir.Value, scale: ir.Value, zero: ir.Value, b: ir.Value, by: ir.Value) -> Any:
        product = op.MatMul(op.DequantizeLinear(codes, scale, zero), b, _outputs=["product"])
        return op.Mul(product, by)

    def check(
        self, context: Any, scale: ir.Value, by: ir.Value, b: ir.Value, product: ir.Value, **_: Any
    ) -> MatchResult:
        factor = _number(by)
        if _number(scale) is None or factor is None or by.dtype != ir.DataType.FLOAT:
            return MatchResult().fail("one of the two is not one known number")
        if factor <= 0:
            return MatchResult().fail("a scale is positive")
        return MatchResult() if len(product.uses()) == 1 else MatchResult().fail("the product is read as it is, too")

    def rewrite(
        self, op: Any, codes: ir.Value, scale: ir.Value, zero: ir.Value, b: ir.Value, by: ir.Value,
        product: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = product.producer()
        assert node is not None
        together = np.array((_number(scale) or 0.0) * (_number(by) or 0.0), dtype=np.float32)
        scaled = op.MatMul(op.DequantizeLinear(codes, _stored(op, f"{product.name}.scale", together), zero), b)
        scaled.producer().name = node.name  # of its site
        return scaled


#: in the order in which one makes room for the next
_ORDER = (
    ResidualSum, RootMeanSquareNorm, GroupedHeads, Rotary, RotaryInside, HeadsInside, AddedMask, VisibleRows,
    EmptyPad, PaddedConvolution, SaturatedClip, SignedFactor, SignedKeys, ScaledCodes,
)  # fmt: skip


def rewrite(model: ir.Model) -> None:
    """Apply every rule wherever it fits, in place."""
    for rule in _ORDER:
        # a value may be read elsewhere too; what nothing reads is removed with other dead nodes
        RewriteRuleSet([rule.rule(remove_nodes=False)], commute=True).apply_to_model(model)


def _stored(op: Any, name: str, value: np.ndarray[Any, Any]) -> ir.Value:
    """An initializer: what a quantiser reads has to be one for ONNX Runtime to look into it."""
    made: ir.Value = op.initializer(ir.tensor(value, name=name))
    return made


def _shape(value: ir.Value) -> list[int | str | None] | None:
    return None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]


def _not_split(name: str, whole: ir.Value, split: ir.Value) -> str:
    """Why a reshape is not [B, T, H·D] → [B, T, H, D], or ""."""
    before, after = _shape(whole), _shape(split)
    if before is None or after is None or len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
        return f"{name} is not [B, T, H·D] split to [B, T, H, D]"
    return "" if isinstance(after[2], int) and isinstance(after[3], int) else f"{name} has no fixed number of heads"


def _text(node: ir.Node, name: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else ""


def _outside(pads: list[float]) -> tuple[int, ...]:
    """Where the pads of all axes, begins before ends, speak of batch and channels."""
    return (0, 1, len(pads) // 2, len(pads) // 2 + 1)


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _opset(value: ir.Value) -> int:
    node = value.producer()
    graph = node.graph if node is not None else None
    return 0 if graph is None else graph.opset_imports.get("", 0)


def _numbers(value: ir.Value) -> list[float] | None:
    """The elements of a small constant."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy().reshape(-1).tolist() if tensor is not None and tensor.size <= 8 else None


def _number(value: ir.Value) -> float | None:
    found = _numbers(value)
    return found[0] if found is not None and len(found) == 1 else None


def _axes(unsqueezed: ir.Value) -> list[float] | None:
    node = unsqueezed.producer()
    return _numbers(node.inputs[1]) if node is not None and node.inputs[1] is not None else None


def _part(sliced: ir.Value) -> tuple[int, int, int]:
    """(axis counted from the front, start, end) of a Slice along one axis, or (−1, 0, 0)."""
    node = sliced.producer()
    assert node is not None
    given = [None if v is None else _number(v) for v in node.inputs[1:]]
    if len(given) < 3 or any(g is None for g in given) or (len(given) > 3 and given[3] != 1):
        return -1, 0, 0
    start, end, axis = (int(g) for g in given[:3])  # type: ignore[arg-type]
    return axis % _rank(node.inputs[0]), start, end
