"""Residual sums and norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult

from .forms import MICROSOFT
from .rule import Rule, number_of, numbers_of, opset_of, rank_of, shape_of, stored


class ResidualSum(Rule):
    """a + b before a LayerNormalization passes a Reshape, which changes nothing and costs nothing: ONNX Runtime fuses
    Add and LayerNormalization into SkipLayerNormalization, which takes about four times as long as the two."""

    def pattern(self, op: Any, a: ir.Value, b: ir.Value) -> Any:
        return op.Add(a, b, _outputs=["total"])

    def check(self, context: Any, a: ir.Value, b: ir.Value, total: ir.Value, **_: Any) -> MatchResult:
        readers = [node.op_type for node, index in total.uses() if index == 0]
        if "LayerNormalization" not in readers:
            return MatchResult().fail("no LayerNormalization reads it")
        if rank_of(a) != 3 or shape_of(a) != shape_of(b):
            return MatchResult().fail("ONNX Runtime fuses only sums of two equally shaped [B, T, C]")
        if not isinstance(shape_of(a)[2], int):  # type: ignore[index]
            return MatchResult().fail("it has no fixed number of channels")
        return MatchResult()

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, total: ir.Value, **_: Any) -> Any:
        same = np.array([0, 0, shape_of(a)[2]], dtype=np.int64)  # type: ignore[index]
        return op.Reshape(op.Add(a, b), stored(op, f"{total.name}.shape", same))


class RootMeanSquareNorm(Rule):
    """x / √(mean(x²) + ε) · weight, spelt out, is RMSNormalization (opset 23)."""

    def pattern(self, op: Any, x: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value, weight: ir.Value) -> Any:
        mean = op.ReduceMean(op.Pow(x, two), axes, _allow_other_attributes=True, _outputs=["mean"])
        return op.Mul(weight, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps)))))

    def check(
        self, context: Any, x: ir.Value, two: ir.Value, axes: ir.Value, eps: ir.Value, weight: ir.Value,
        mean: ir.Value, **_: Any,
    ) -> MatchResult:  # fmt: skip
        if opset_of(mean) < 23:
            return MatchResult().fail("the operator is of opset 23")
        node = mean.producer()
        assert node is not None
        keep = node.attributes.get("keepdims")
        rank = rank_of(x)
        if number_of(two) != 2 or number_of(eps) is None or (keep is not None and not keep.as_int()):
            return MatchResult().fail("it is not a root mean square")
        if numbers_of(axes) not in ([-1], [rank - 1]):
            return MatchResult().fail("the mean is not over the last axis")
        if rank_of(weight) != 1 or shape_of(weight) != (shape_of(x) or [])[-1:]:
            return MatchResult().fail("the weight is not one number a channel")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, eps: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return op.RMSNormalization(x, weight, axis=-1, epsilon=number_of(eps))


class SkipRootMeanSquareNorm(Rule):
    """a + b and the RMSNormalization that reads it are SkipSimplifiedLayerNormalization, which keeps the sum too."""

    contrib = True

    def pattern(self, op: Any, a: ir.Value, b: ir.Value, weight: ir.Value) -> Any:
        total = op.Add(a, b, _outputs=["total"])
        return op.RMSNormalization(total, weight, _allow_other_attributes=True, _outputs=["normed"]), total

    def check(
        self, context: Any, a: ir.Value, b: ir.Value, weight: ir.Value, normed: ir.Value, **_: Any
    ) -> MatchResult:
        node = normed.producer()
        assert node is not None
        if rank_of(a) != 3 or shape_of(a) != shape_of(b):
            return MatchResult().fail("it is no sum of two equally shaped [B, T, C]")
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axis not in (-1, 2) or rank_of(weight) != 1:
            return MatchResult().fail("the norm is not over the last axis")
        return MatchResult() if a.dtype == ir.DataType.FLOAT else MatchResult().fail("it is not in float32")

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, weight: ir.Value, normed: ir.Value, **_: Any) -> Any:
        node = normed.producer()
        assert node is not None
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        outputs = op.SkipSimplifiedLayerNormalization(a, b, weight, epsilon=epsilon, _domain=MICROSOFT, _outputs=4)
        return outputs[0], outputs[3]
