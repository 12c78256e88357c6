"""Attention: heads, rotations and masks."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult

from .forms import MICROSOFT
from .projections import JOINT
from .rule import Rule, asked_of, axes_of, not_split, number_of, opset_of, part_of, rank_of, shape_of, sizes_of, stored


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
            if reason := not_split(name, values[name], values[f"{name}_split"]):
                return MatchResult().fail(reason)
        shape = shape_of(merged)
        if shape is None or len(shape) != 3 or shape[:2] != shape_of(values["q"])[:2]:  # type: ignore[index]
            return MatchResult().fail("the result is not joined to [B, T, H·D]")
        return MatchResult()

    def rewrite(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, q_split: ir.Value, k_split: ir.Value,
        result: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = result.producer()
        assert node is not None
        attributes = {name: a.value for name, a in node.attributes.items()}
        heads = {"q_num_heads": shape_of(q_split)[2], "kv_num_heads": shape_of(k_split)[2]}  # type: ignore[index]
        return op.Attention(q, k, v, *node.inputs[3:], **attributes, **heads)


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
        if opset_of(low) < 23:
            return MatchResult().fail("the operator is of opset 23")
        shape, turned = shape_of(x), shape_of(angles)
        if shape is None or turned is None or len(shape) != 4 or len(turned) != 3 or not isinstance(shape[3], int):
            return MatchResult().fail("it is not [B, H, T, D] with angles [B, T, D/2]")
        if turned[0] != shape[0] or turned[1] != shape[2] or turned[2] != shape[3] // 2:
            return MatchResult().fail("the operator wants the angles of every text of the batch")
        if number_of(by) is None or number_of(by) != number_of(again):
            return MatchResult().fail("cosine and sine are scaled differently")
        if any(axes_of(v) != [1] for v in (cos, sin)):
            return MatchResult().fail("the angles do not stand for all heads")
        half = shape[3] // 2
        if part_of(low) != (3, 0, half) or part_of(high)[:2] != (3, half) or part_of(high)[2] < shape[3]:
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
        reason = not_split("x", x, split)
        return MatchResult().fail(reason) if reason else MatchResult()

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, split: ir.Value, **_: Any) -> Any:
        node = split.producer()
        assert node is not None
        turned = op.RotaryEmbedding(x, cos, sin, num_heads=shape_of(split)[2])  # type: ignore[index]
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
            one, repeated = shape_of(values[name]), shape_of(values[f"{name}_repeated"])
            if one is None or repeated is None or len(one) != 4 or len(repeated) != 4:
                return MatchResult().fail("keys and values are not [B, H, T, D]")
            if axes_of(values[f"{name}_apart"]) != [2] or (one[0], one[2:]) != (repeated[0], repeated[2:]):
                return MatchResult().fail("something else than the heads is repeated")
        return MatchResult()

    def rewrite(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, result: ir.Value, **_: Any) -> Any:
        node = result.producer()
        assert node is not None
        return op.Attention(q, k, v, *node.inputs[3:], **node.attributes)


class JointAttention(Rule):
    """Attention on three products of one input is QAttention, which writes the heads where it reads them.

    Equal up to float rounding, but for a query that may attend to nothing: it gets the mean of the values, not zero.
    The kernel packs the input anew for every head: it pays for few rows (`speeds.py`).
    """

    contrib = True

    def pattern(self, op: Any, codes: ir.Value) -> Any:
        def product(name: str) -> Any:
            return op.MatMulIntegerToFloat(codes, _allow_other_inputs=True, _domain=MICROSOFT, _outputs=[name])

        return op.Attention(
            product("q"), product("k"), product("v"),
            _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"],
        )  # fmt: skip

    def check(
        self, context: Any, codes: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value, result: ir.Value, **_: Any
    ) -> MatchResult:
        node, products = _producer(result), [_producer(value) for value in (q, k, v)]
        if any(product.name not in self.target.few for product in products):
            return MatchResult().fail("its products have many rows")
        if len({(product.inputs[2], product.inputs[4]) for product in products}) > 1:
            return MatchResult().fail("its products read their input under several ranges")
        if any(len(product.outputs[0].uses()) > 1 for product in products):
            return MatchResult().fail("something else reads its queries, keys or values")
        shape = shape_of(q)
        if shape is None or any(shape_of(x) != shape for x in (k, v)):
            return MatchResult().fail("queries, keys and values are of several shapes")
        heads = [node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads") if name in node.attributes]
        if len(heads) < 2 or heads[0] != heads[1]:
            return MatchResult().fail("several queries share a key")
        if len(node.inputs) > 4 or len(node.outputs) > 1 or any(a.value for a in _options(node)):
            return MatchResult().fail("it is causal, keeps a cache or bounds its scores")
        if any(_array(product.inputs[place]) is None for product in products for place in (1, 3)):
            return MatchResult().fail("its weights are not constant")
        mask = (*node.inputs[3:], None)[0]
        pairs = mask is None or (mask.dtype == ir.DataType.BOOL and shape_of(mask) == [shape[0], 1, shape[1], shape[1]])
        reason = "its mask is not a truth value for each pair of tokens of each text"
        return MatchResult() if pairs else MatchResult().fail(reason)

    def rewrite(
        self, op: Any, codes: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value, result: ir.Value, **_: Any
    ) -> Any:
        node, products = _producer(result), [_producer(value) for value in (q, k, v)]
        heads, width = node.attributes["q_num_heads"].as_int(), int(shape_of(q)[2])  # type: ignore[index, arg-type]
        scaled = node.attributes["scale"].as_float() * sqrt(width / heads) if "scale" in node.attributes else 1.0
        sizes = [scaled, 1.0, 1.0]  # the kernel divides by √D; what the model does otherwise goes into its queries
        scales = [_array(p.inputs[3]) * np.float32(s) for p, s in zip(products, sizes, strict=True)]
        biases = [_bias(p, width) * np.float32(s) for p, s in zip(products, sizes, strict=True)]
        name = JOINT.join(str(product.name) for product in products)
        weights = np.concatenate([_array(product.inputs[1]) for product in products], axis=1)
        arrays = {"codes_transposed": weights, "scale_channel": np.concatenate(scales)}
        read = [stored(op, f"{name}.weight.{kind}", array) for kind, array in arrays.items()]
        bias = stored(op, f"{name}.bias", np.concatenate(biases))
        mask = (*node.inputs[3:], None)[0]
        shown = mask and op.Cast(op.Squeeze(mask, stored(op, f"{name}.heads", np.array([1]))), to=ir.DataType.INT32)
        attended = op.QAttention(
            codes, read[0], bias, products[0].inputs[2], read[1], shown, products[0].inputs[4],
            num_heads=heads, mask_filter_value=float(np.finfo(np.float32).min), _domain=MICROSOFT,
        )  # fmt: skip
        attended.producer().name = name
        return attended


def _options(node: ir.Node) -> list[ir.Attr]:
    """What an Attention says beside its heads and its scale; all 0 where it does nothing more."""
    return [a for name, a in node.attributes.items() if name not in ("q_num_heads", "kv_num_heads", "scale")]


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _array(value: ir.Value | None) -> Any:
    """A stored tensor, or None."""
    return value.const_value.numpy() if value is not None and value.const_value is not None else None


def _bias(product: ir.Node, width: int) -> Any:
    given = _array(product.inputs[6]) if len(product.inputs) > 6 else None
    return np.zeros(width, dtype=np.float32) if given is None else given


class AddedMask(Rule):
    """A mask of truth values becomes the numbers that Attention adds, once for all layers: ONNX Runtime makes them anew
    in every Attention, on one thread. Bit by bit the same."""

    def pattern(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value) -> Any:
        return op.Attention(q, k, v, mask, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["result"])

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
            stored(op, f"{result.name}.{name}", np.array(value, dtype=np.float32))
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
        added = [number_of(value) for value in node.inputs[1:] if value is not None]
        if any(number is None or not np.isfinite(number) for number in added):
            return MatchResult().fail("it may hide a whole row")
        return MatchResult()

    def rewrite(self, op: Any, shares: ir.Value, **_: Any) -> Any:
        return op.Identity(shares)


class TransposedKeys(Rule):
    """The last two axes of [B, H, T, D] trade places in one Transpose, not between two Reshapes that join B and H and
    part them again: compilers know attention by it."""

    def pattern(self, op: Any, k: ir.Value, joined: ir.Value, parted: ir.Value) -> Any:
        flat = op.Reshape(k, joined, _allow_other_attributes=True)
        return op.Reshape(op.Transpose(flat, perm=[0, 2, 1]), parted, _allow_other_attributes=True)

    def check(self, context: Any, k: ir.Value, joined: ir.Value, parted: ir.Value) -> MatchResult:
        if rank_of(k) != 4:
            return MatchResult().fail("they are not [B, H, T, D]")
        batch, heads, tokens, width = sizes_of(k)
        if asked_of(joined, k)[1:] != [tokens, width] or asked_of(parted, k) != [batch, heads, width, tokens]:
            return MatchResult().fail("its last two axes do not just trade places")
        return MatchResult()

    def rewrite(self, op: Any, k: ir.Value, **_: Any) -> Any:
        return op.Transpose(k, perm=[0, 1, 3, 2])
