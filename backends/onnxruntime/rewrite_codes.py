"""Codes of activations: what keeps an operator from running on integers, or on the faster ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult

from .rule import Rule, number_of, numbers_of, stored, text_of


class EmptyPad(Rule):
    """A Pad by nothing is its input: what stands between a convolution and the rounding of its result keeps ONNX
    Runtime from running it on integers."""

    def pattern(self, op: Any, x: ir.Value, pads: ir.Value) -> Any:
        return op.Pad(x, pads, _allow_other_inputs=True, _allow_other_attributes=True)

    def check(self, context: Any, pads: ir.Value, **_: Any) -> MatchResult:
        numbers = numbers_of(pads)
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
        node, convolution, numbers = padded.producer(), result.producer(), numbers_of(pads)
        assert node is not None and convolution is not None
        filled = number_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
        if filled != 0 or len(node.inputs) > 3 or text_of(node, "mode") not in ("", "constant"):
            return MatchResult().fail("it does not pad with zeros along the last axes")
        if numbers is None or min(numbers) < 0 or any(numbers[side] for side in _outside(numbers)):
            return MatchResult().fail("it does not widen the image by a known number of zeros")
        if text_of(convolution, "auto_pad") not in ("", "NOTSET"):
            return MatchResult().fail("the convolution finds its pads itself")
        return MatchResult()

    def rewrite(
        self, op: Any, x: ir.Value, pads: ir.Value, scale: ir.Value, zero: ir.Value, result: ir.Value, **_: Any
    ) -> Any:
        node, numbers = result.producer(), numbers_of(pads)
        assert node is not None and numbers is not None
        sides = [int(n) for side, n in enumerate(numbers) if side not in _outside(numbers)]
        own = node.attributes["pads"].as_ints() if "pads" in node.attributes else [0] * len(sides)
        attributes = {**node.attributes, "pads": [a + b for a, b in zip(own, sides, strict=True)]}
        values = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        padding = op.Conv(values, *node.inputs[1:], **attributes)
        padding.producer().name = node.name  # of its site
        return padding


class PooledCodes(Rule):
    """The largest value, rounded, is the largest of rounded values: these the convolution before rounds itself, and
    fewer bytes are pooled. OpenVINO takes .96 of a ResNet-50's time; ONNX Runtime's optimiser does the same."""

    def pattern(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        pooled = op.MaxPool(x, _allow_other_attributes=True, _outputs=["pooled"])
        return op.DequantizeLinear(op.QuantizeLinear(pooled, scale, zero), scale, zero)

    def check(self, context: Any, x: ir.Value, scale: ir.Value, pooled: ir.Value, **_: Any) -> MatchResult:
        node, before = pooled.producer(), x.producer()
        assert node is not None
        if before is not None and before.op_type == "DequantizeLinear":
            return MatchResult().fail("what is pooled is rounded before")
        if number_of(scale) is None:
            return MatchResult().fail("its scale is not one known number")
        if len(pooled.uses()) > 1 or len(node.outputs) > 1:
            return MatchResult().fail("what is pooled is read as it is, too")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value, pooled: ir.Value, **_: Any) -> Any:
        node = pooled.producer()
        assert node is not None
        values = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        pooled = op.MaxPool(values, **node.attributes)
        return op.DequantizeLinear(op.QuantizeLinear(pooled, scale, zero), scale, zero)


class SaturatedClip(Rule):
    """Codes that end where a Clip does need no Clip: bit by bit the same."""

    def pattern(self, op: Any, x: ir.Value, low: ir.Value, high: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        return op.QuantizeLinear(op.Clip(x, low, high), scale, zero)

    def check(
        self, context: Any, low: ir.Value, high: ir.Value, scale: ir.Value, zero: ir.Value, **_: Any
    ) -> MatchResult:
        bounds, step, middle = (number_of(low), number_of(high)), number_of(scale), number_of(zero)
        if None in bounds or step is None or middle is None or zero.dtype != ir.DataType.UINT8:
            return MatchResult().fail("its bounds or its codes are not known")
        ends = [round(float(np.float32(b) / np.float32(step))) + middle for b in bounds]
        return MatchResult() if ends[0] <= 0 and ends[1] >= 255 else MatchResult().fail("codes go beyond the bounds")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value, **_: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero)


class CenteredCodes(Rule):
    """Unsigned codes whose zero is in the middle are signed ones whose zero is 0, the same numbers: OpenVINO multiplies
    them on integers inside its fused attention, and others there on floats."""

    def pattern(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    def check(self, context: Any, zero: ir.Value, **_: Any) -> MatchResult:
        if not self.target.signed:
            return MatchResult().fail("unsigned codes are as fast there, or faster")
        if zero.dtype != ir.DataType.UINT8 or number_of(zero) != 128:
            return MatchResult().fail("its zero is not in the middle of unsigned codes")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        middle = stored(op, f"{zero.name}.signed", np.array(0, dtype=np.int8))
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, middle), scale, middle)


class TurnedCodes(Rule):
    """What is rounded and then transposed is transposed first: of signed codes, ONNX Runtime fails to do so itself
    (1.31.1), and two Transposes of keys meet."""

    def pattern(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value) -> Any:
        values = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        return op.Transpose(values, _allow_other_attributes=True, _outputs=["turned"])

    def check(self, context: Any, scale: ir.Value, zero: ir.Value, **_: Any) -> MatchResult:
        if zero.dtype != ir.DataType.INT8:
            return MatchResult().fail("its codes are unsigned")
        return MatchResult() if number_of(scale) is not None else MatchResult().fail("its scale is not one number")

    def rewrite(self, op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value, turned: ir.Value) -> Any:
        node = turned.producer()
        assert node is not None
        return op.DequantizeLinear(op.QuantizeLinear(op.Transpose(x, **node.attributes), scale, zero), scale, zero)


class Signed(Rule):
    """The second factor of a product of activations in signed codes, 128 less each and the same numbers: u8·s8 takes
    half the time of u8·u8."""

    def check(self, context: Any, a: ir.Value, zero: ir.Value, **_: Any) -> MatchResult:
        first = a.producer()
        codes = first.inputs[0] if first is not None and first.op_type == "DequantizeLinear" else None
        if codes is None or codes.dtype != ir.DataType.UINT8:
            return MatchResult().fail("the first factor is not in unsigned codes")
        if zero.dtype != ir.DataType.UINT8 or number_of(zero) is None:
            return MatchResult().fail("its codes are not unsigned with one known zero")
        return MatchResult()

    def middle(self, op: Any, product: ir.Value, zero: ir.Value) -> ir.Value:
        return stored(op, f"{product.name}.zero", np.array(int(number_of(zero) or 0) - 128, dtype=np.int8))


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
        factor = number_of(by)
        if number_of(scale) is None or factor is None or by.dtype != ir.DataType.FLOAT:
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
        together = np.array((number_of(scale) or 0.0) * (number_of(by) or 0.0), dtype=np.float32)
        scaled = op.MatMul(op.DequantizeLinear(codes, stored(op, f"{product.name}.scale", together), zero), b)
        scaled.producer().name = node.name  # of its site
        return scaled


def _outside(pads: list[float]) -> tuple[int, ...]:
    """Where the pads of all axes, begins before ends, speak of batch and channels."""
    return (0, 1, len(pads) // 2, len(pads) // 2 + 1)
