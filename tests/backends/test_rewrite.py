"""Rewrite rules: equal results before and after, refusals with reasons, and a planted bug is caught."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import paretoc as pc
import pytest
import torch
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
from onnxscript.rewriter import MatchingTracer
from onnxscript.rewriter.pattern import RewriteRuleSet
from paretoc.backends.onnxruntime import rewrite, rewrite_attention, rewrite_codes
from paretoc.backends.onnxruntime.rewrite_attention import (
    AddedMask,
    GroupedHeads,
    HeadsInside,
    JointAttention,
    Rotary,
    RotaryInside,
    TransposedKeys,
    VisibleRows,
)
from paretoc.backends.onnxruntime.rewrite_codes import (
    CenteredCodes,
    EmptyPad,
    PaddedConvolution,
    PooledCodes,
    SaturatedClip,
    ScaledCodes,
    SignedFactor,
    SignedKeys,
    TurnedCodes,
)
from paretoc.backends.onnxruntime.rewrite_norms import ResidualSum, RootMeanSquareNorm, SkipRootMeanSquareNorm
from paretoc.backends.onnxruntime.rule import Target, stored

B, T, HEADS, WIDTH = 2, 5, 3, 4
CHANNELS = HEADS * WIDTH


def _model(text: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> {text}')
    return onnx.shape_inference.infer_shapes(model)


def _run(model: onnx.ModelProto, *, first_visible: bool = False, as_it_is: bool = False) -> list[np.ndarray]:
    """On random inputs; `first_visible`: no mask hides the first token; `as_it_is`: ONNX Runtime rewrites nothing."""
    options = onnxruntime.SessionOptions()
    if as_it_is:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    generator = np.random.default_rng(0)
    feeds = {
        i.name: generator.random([B if d == "B" else T if d == "T" else d for d in i.shape]) > 0.3
        if i.type == "tensor(bool)"
        else generator.standard_normal([B if d == "B" else T if d == "T" else d for d in i.shape]).astype(np.float32)
        for i in session.get_inputs()
    }
    if first_visible and "m" in feeds:
        feeds["m"][..., 0] = True
    return session.run(None, feeds)


#: a target on which everything may be written
ALL = Target(contrib=True, few=("q", "k", "v"), signed=True)


def _rules(rule, target: Target = ALL) -> RewriteRuleSet:
    return RewriteRuleSet([rule.rule(target)], commute=True)


def _applied(rule, model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    rewritten = ir.from_proto(model)
    count = _rules(rule).apply_to_model(rewritten)
    RemoveUnusedNodesPass()(rewritten)
    return ir.to_proto(rewritten), count


def _equal(rule, text: str) -> list[str]:
    """Operators after the rule, which must have changed the graph and not the results."""
    model = _model(text)
    rewritten, count = _applied(rule, model)
    assert count > 0
    for was, now in zip(_run(model), _run(rewritten), strict=True):
        np.testing.assert_allclose(now, was, rtol=1e-5, atol=1e-6)
    return [node.op_type for node in rewritten.graph.node]


def _reason(rule, text: str) -> str:
    model, tracer = ir.from_proto(_model(text)), MatchingTracer()
    assert _rules(rule).apply_to_model(model, tracer=tracer) == 0
    reasons = [m.match_result.reason for found in tracer.best_matches_map.values() for m in found]
    return "; ".join(r for r in reasons if r)


NORM = """g (float[B,T,12] a, float[B,T,12] b, float[12] scale) => (float[B,T,12] y, float[B,T,12] z) {{
    total = Add({operands})
    y = LayerNormalization<axis=-1>(total, scale)
    z = {second}
}}"""


def test_residual_sum_is_no_add_before_a_norm() -> None:
    operators = _equal(ResidualSum, NORM.format(operands="a, b", second="Relu(total)"))
    assert operators == ["Add", "Reshape", "LayerNormalization", "Relu"]


def test_onnx_runtime_keeps_a_residual_sum_and_its_norm_apart(tmp_path) -> None:
    """What the rule is for: without it the session has the fused operator."""
    model = _model(NORM.format(operands="a, b", second="Relu(a)"))
    ways = {"fused": model, "apart": _applied(ResidualSum, model)[0]}
    found = {}
    for name, way in ways.items():
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / name)
        onnxruntime.InferenceSession(way.SerializeToString(), options)
        found[name] = {node.op_type for node in onnx.load(tmp_path / name).graph.node}
    assert "SkipLayerNormalization" in found["fused"]
    assert found["apart"] >= {"Add", "LayerNormalization"} and "SkipLayerNormalization" not in found["apart"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NORM.format(operands="a, scale", second="Relu(total)"), "equally shaped"),
        (NORM.format(operands="a, b", second="Relu(total)").replace("(total, scale)", "(a, scale)"), "no LayerNorm"),
    ],
    ids=["a bias", "no norm reads it"],
)
def test_residual_sum_refuses(text: str, reason: str) -> None:
    assert reason in _reason(ResidualSum, text)


def _root_mean_square(operands: str = "a, b", axis: int = -1, second: str = "Relu(total)") -> str:
    return f"""g (float[B,T,12] a, float[B,T,12] b, float[12] scale) => (float[B,T,12] y, float[B,T,12] z) {{
    total = Add({operands})
    y = RMSNormalization<axis={axis}, epsilon=0.5>(total, scale)
    z = {second}
}}"""


@pytest.mark.parametrize("second", ["Relu(total)", "Relu(y)"], ids=["the sum is read too", "it is not"])
def test_a_residual_sum_and_its_root_mean_square_norm_are_one(second: str) -> None:
    operators = _equal(SkipRootMeanSquareNorm, _root_mean_square(second=second))
    assert operators == ["SkipSimplifiedLayerNormalization", "Relu"]


def test_another_sum_or_norm_stays_apart() -> None:
    assert "equally shaped" in _reason(SkipRootMeanSquareNorm, _root_mean_square(operands="a, scale"))
    assert "last axis" in _reason(SkipRootMeanSquareNorm, _root_mean_square(axis=1).replace("12] scale", "T,12] scale"))


def test_a_norm_with_another_epsilon_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrite(self, op, a, b, weight, **_):
        return [op.SkipSimplifiedLayerNormalization(a, b, weight, epsilon=0.1, _domain="com.microsoft", _outputs=4)[i]
                for i in (0, 3)]  # fmt: skip

    monkeypatch.setattr(SkipRootMeanSquareNorm, "rewrite", rewrite)
    with pytest.raises(AssertionError):
        _equal(SkipRootMeanSquareNorm, _root_mean_square())


def test_standard_operators_stay_standard() -> None:
    for text in (_root_mean_square(), _joint()):
        model = ir.from_proto(_model(text))
        before = [node.op_type for node in model.graph]
        rewrite.rewrite(model, Target(contrib=False, few=ALL.few))
        assert [node.op_type for node in model.graph if node.op_type in ("RMSNormalization", "Attention")] == [
            op_type for op_type in before if op_type in ("RMSNormalization", "Attention")
        ]


def _joint(
    mask: str = ", m", options: str = "", heads: str = "q_num_heads=3, kv_num_heads=3", shape: str = "B,1,T,T",
    scales: tuple[str, str] = ("fine", "fine"), then: str = "Identity(q)",
) -> str:  # fmt: skip
    """Three products of one input in codes, and an attention on them."""
    generator = np.random.default_rng(1)
    lines = []
    for name in "qkv":
        codes = ", ".join(map(str, generator.integers(-127, 128, 144)))
        scale, bias = (", ".join(f"{x:.4f}" for x in xs) for xs in (generator.random(12) / 30, generator.random(12)))
        inputs = f"codes, {name}_w, {scales[name == 'k']}, {name}_s, zero, , {name}_b"
        lines += [
            f"    {name}_w = Constant<value=int8[12, 12] {{{codes}}}>()",
            f"    {name}_s = Constant<value=float[12] {{{scale}}}>()",
            f"    {name}_b = Constant<value=float[12] {{{bias}}}>()",
            f"    {name} = com.microsoft.MatMulIntegerToFloat({inputs})",
        ]
    return f"""g (float[B,T,12] x, bool[{shape}] m, float[B,1,T,T] f) => (float[B,T,12] y, float[B,T,12] z) {{
    fine = Constant<value=float {{0.02}}>()
    coarse = Constant<value=float {{0.04}}>()
    zero = Constant<value=uint8 {{120}}>()
    codes = QuantizeLinear(x, fine, zero)
{chr(10).join(lines)}
    y = Attention<{heads}{options}>(q, k, v{mask})
    z = {then.replace("q)", "x)") if then == "Identity(q)" else then}
}}"""


def _named(text: str) -> onnx.ModelProto:
    """The products carry the names of their sites; weights are initializers, as in a lowered model."""
    model = ir.from_proto(_model(text))
    for node in model.graph:
        if node.op_type == "MatMulIntegerToFloat":
            node.name = node.outputs[0].name
            shape = model.graph.inputs[0].shape
            node.outputs[0].shape, node.outputs[0].type = shape, ir.TensorType(ir.DataType.FLOAT)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return ir.to_proto(model)


@pytest.mark.parametrize("options", ["", ", scale=0.2, is_causal=0, softcap=0.0"], ids=["its own scale", "another"])
@pytest.mark.parametrize("mask", ["", ", m"])
def test_an_attention_and_its_products_are_one(mask: str, options: str) -> None:
    model = _named(_joint(mask, options))
    rewritten, count = _applied(JointAttention, model)
    assert count == 1
    (joint,) = (node for node in rewritten.graph.node if node.op_type == "QAttention")
    assert joint.name == "q + k + v"
    assert not {"Attention", "MatMulIntegerToFloat"} & {node.op_type for node in rewritten.graph.node}
    for was, now in zip(_run(model, first_visible=True), _run(rewritten, first_visible=True), strict=True):
        np.testing.assert_allclose(now, was, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_joint(options=", is_causal=1"), "causal"),
        (_joint(options=", softcap=2.0"), "bounds its scores"),
        (_joint(heads="q_num_heads=3, kv_num_heads=1"), "share a key"),
        (_joint(mask=", f"), "not a truth value"),
        (_joint(shape="1,1,T,T"), "for each pair of tokens of each text"),
        (_joint(scales=("fine", "coarse")), "several ranges"),
        (_joint(then="Relu(k)"), "something else reads"),
    ],
    ids=["causal", "softcap", "grouped", "added mask", "one mask", "two ranges", "keys read"],
)
def test_another_attention_stays_behind_its_products(text: str, reason: str) -> None:
    model, tracer = ir.from_proto(_named(text)), MatchingTracer()
    assert _rules(JointAttention).apply_to_model(model, tracer=tracer) == 0
    assert reason in "; ".join(m.match_result.reason for found in tracer.best_matches_map.values() for m in found)


def test_products_of_many_rows_stay() -> None:
    model, tracer = ir.from_proto(_named(_joint())), MatchingTracer()
    assert _rules(JointAttention, Target(contrib=True, few=("q", "k"))).apply_to_model(model, tracer=tracer) == 0
    assert "many rows" in "; ".join(m.match_result.reason for f in tracer.best_matches_map.values() for m in f)


def test_a_scale_of_every_head_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale belongs to the queries alone."""
    monkeypatch.setattr(rewrite_attention, "sqrt", lambda x: 2 * x**0.5)
    model = _named(_joint(options=", scale=0.2"))
    now, was = _run(_applied(JointAttention, model)[0], first_visible=True), _run(model, first_visible=True)
    assert not np.allclose(now[0], was[0], rtol=1e-4, atol=1e-5)


def test_a_mask_of_truth_values_is_added() -> None:
    text = _attention(mask=", m", extra=", is_causal=1")
    assert _equal(AddedMask, text).count("Where") == 1
    model = _model(text)
    rewritten, _ = _applied(AddedMask, model)
    assert np.array_equal(*(_run(m)[0] for m in (model, rewritten)))


def test_a_mask_that_is_added_stays() -> None:
    text = _attention(mask=", m").replace("bool[B,1,T,T] m", "float[B,1,T,T] m")
    assert "added already" in _reason(AddedMask, text)


def test_a_mask_turned_round_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_attention, "stored", lambda op, name, value: stored(op, name, -value - np.float32(1)))
    with pytest.raises(AssertionError):
        _equal(AddedMask, _attention(mask=", m"))


def _keys(joined: str = "minus, tokens, width", parted: str = "lead, width, tokens", perm: str = "0, 2, 1") -> str:
    """Keys turned as PyTorch's exporter turns them: B and H joined, and parted again."""
    return f"""g (float[B,3,T,4] k) => (float[B,3,R,C] y) {{
    shape = Shape(k)
    first = Constant<value_ints=[-9223372036854775808]>()
    two = Constant<value_ints=[-2]>()
    one = Constant<value_ints=[-1]>()
    end = Constant<value_ints=[9223372036854775807]>()
    minus = Constant<value_ints=[-1]>()
    lead = Slice(shape, first, two)
    tokens = Slice(shape, two, one)
    width = Slice(shape, one, end)
    joined = Concat<axis=0>({joined})
    parted = Concat<axis=0>({parted})
    flat = Reshape(k, joined)
    turned = Transpose<perm=[{perm}]>(flat)
    y = Reshape(turned, parted)
}}"""


def test_keys_turn_where_they_stand() -> None:
    assert [op for op in _equal(TransposedKeys, _keys()) if op in ("Reshape", "Transpose")] == ["Transpose"]


def test_keys_of_fixed_sizes_turn_too() -> None:
    text = """g (float[2,3,5,4] k) => (float[2,3,4,5] y) {
        joined = Constant<value_ints=[6, 5, 4]>()
        parted = Constant<value_ints=[2, 3, 4, 5]>()
        flat = Reshape(k, joined)
        turned = Transpose<perm=[0, 2, 1]>(flat)
        y = Reshape(turned, parted)
    }"""
    assert "Reshape" not in _equal(TransposedKeys, text)
    other = text.replace("[2, 3, 4, 5]", "[3, 2, 4, 5]").replace("float[2,3,4,5] y", "float[3,2,4,5] y")
    assert "trade places" in _reason(TransposedKeys, other)


@pytest.mark.parametrize(
    "given", [{"joined": "minus, width, tokens"}, {"parted": "lead, tokens, width"}, {"parted": "minus, width, tokens"}]
)
def test_what_is_joined_otherwise_is_not_keys(given: dict[str, str]) -> None:
    assert "trade places" in _reason(TransposedKeys, _keys(**given))


def test_keys_that_are_not_apart_are_not_keys() -> None:
    flat = _keys().replace("float[B,3,T,4] k", "float[B,T,4] k").replace("float[B,3,R,C] y", "float[B,R,C] y")
    assert "[B, H, T, D]" in _reason(TransposedKeys, flat)


def test_keys_turned_wrongly_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransposedKeys, "rewrite", lambda _, op, k, **__: op.Transpose(k, perm=[0, 1, 2, 3]))
    with pytest.raises(AssertionError):
        _equal(TransposedKeys, _keys())


def _attention(split: str = "0, 0, 3, 4", mask: str = "", joined: str = "0, 0, 12", extra: str = "") -> str:
    return f"""g (float[B,T,12] q, float[B,T,12] k, float[B,T,12] v, bool[B,1,T,T] m) => (float[B,T,12] y) {{
    split = Constant<value_ints=[{split}]>()
    joined = Constant<value_ints=[{joined}]>()
    q4 = Reshape(q, split)
    k4 = Reshape(k, split)
    v4 = Reshape(v, split)
    qt = Transpose<perm=[0, 2, 1, 3]>(q4)
    kt = Transpose<perm=[0, 2, 1, 3]>(k4)
    vt = Transpose<perm=[0, 2, 1, 3]>(v4)
    a = Attention<scale=0.3{extra}>(qt, kt, vt{mask})
    at = Transpose<perm=[0, 2, 1, 3]>(a)
    y = Reshape(at, joined)
}}"""


@pytest.mark.parametrize("mask", ["", ", m"])
@pytest.mark.parametrize("extra", ["", ", is_causal=1"])
def test_attention_takes_the_heads_inside(mask: str, extra: str) -> None:
    operators = _equal(HeadsInside, _attention(mask=mask, extra=extra))
    assert "Transpose" not in operators and operators.count("Attention") == 1


def test_attention_keeps_its_scale_and_number_of_heads() -> None:
    rewritten, _ = _applied(HeadsInside, _model(_attention()))
    (node,) = (n for n in rewritten.graph.node if n.op_type == "Attention")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["q_num_heads"] == attributes["kv_num_heads"] == HEADS
    assert attributes["scale"] == pytest.approx(0.3)


def test_attention_with_a_cache_is_left_alone() -> None:
    text = _attention().replace("bool[B,1,T,T] m", "float[B,3,7,4] pk, float[B,3,7,4] pv")
    assert "cache" in _reason(HeadsInside, text.replace("(qt, kt, vt)", "(qt, kt, vt, , pk, pv)"))


def test_a_result_that_is_joined_to_a_matrix_is_left_alone() -> None:
    text = _attention(joined="-1, 12").replace("(float[B,T,12] y)", "(float[R,12] y)")
    assert "not joined" in _reason(HeadsInside, text)


def test_a_wrong_rewrite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(self, op, q, k, v, result, **_):  # keys and values exchanged
        return op.Attention(q, v, k, q_num_heads=HEADS, kv_num_heads=HEADS, scale=0.3)

    monkeypatch.setattr(HeadsInside, "rewrite", transposed)
    with pytest.raises(AssertionError):
        _equal(HeadsInside, _attention())


def _rms(weight: str = "float[12] w", power: float = 2.0, axis: int = -1, product: str = "w, n") -> str:
    return f"""g (float[B,T,12] x, {weight}) => (float[B,T,12] y) {{
    two = Constant<value_float={power}>()
    axes = Constant<value_ints=[{axis}]>()
    eps = Constant<value_float=0.01>()
    square = Pow(x, two)
    mean = ReduceMean<keepdims=1>(square, axes)
    shifted = Add(mean, eps)
    root = Sqrt(shifted)
    inverse = Reciprocal(root)
    n = Mul(x, inverse)
    y = Mul({product})
}}"""


@pytest.mark.parametrize("text", [_rms(), _rms(product="n, w"), _rms(axis=2)], ids=["", "the other way", "axis 2"])
def test_a_root_mean_square_norm_is_one_operator(text: str) -> None:
    assert _equal(RootMeanSquareNorm, text) == ["RMSNormalization"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_rms(power=3.0), "not a root mean square"),
        (_rms(axis=1), "last axis"),
        (_rms(weight="float[1] w"), "one number a channel"),
        (_rms().replace("<keepdims=1>", "<keepdims=0>"), "not a root mean square"),
    ],
    ids=["a cube", "tokens", "one weight", "axis dropped"],
)
def test_another_norm_is_left_alone(text: str, reason: str) -> None:
    assert reason in _reason(RootMeanSquareNorm, text)


def _rotary(angles: str = "float[B,T,2] f", halves: tuple[int, int] = (2, 2), by: float = 1.5) -> str:
    low, high = halves
    return f"""g (float[B,3,T,4] x, {angles}) => (float[B,3,T,4] y) {{
    zero = Constant<value_ints=[0]>()
    low = Constant<value_ints=[{low}]>()
    high = Constant<value_ints=[{high}]>()
    end = Constant<value_ints=[9223372036854775807]>()
    axis = Constant<value_ints=[3]>()
    heads = Constant<value_ints=[1]>()
    by = Constant<value_float=1.5>()
    again = Constant<value_float={by}>()
    both = Concat<axis=-1>(f, f)
    cosine = Cos(both)
    cosines = Mul(cosine, by)
    cos = Unsqueeze(cosines, heads)
    sine = Sin(both)
    sines = Mul(sine, again)
    sin = Unsqueeze(sines, heads)
    first = Slice(x, zero, low, axis)
    second = Slice(x, high, end, axis)
    negative = Neg(second)
    turned = Concat<axis=-1>(negative, first)
    a = Mul(x, cos)
    b = Mul(turned, sin)
    y = Add(a, b)
}}"""


def test_a_rotation_is_one_operator() -> None:
    operators = _equal(Rotary, _rotary())
    assert "RotaryEmbedding" in operators and "Neg" not in operators and "Concat" not in operators


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_rotary(angles="float[1,T,2] f"), "every text of the batch"),
        (_rotary(by=2.0), "scaled differently"),
        (_rotary(halves=(1, 1)), "two halves of a head"),
    ],
    ids=["one for all", "two scales", "uneven parts"],
)
def test_another_rotation_is_left_alone(text: str, reason: str) -> None:
    assert reason in _reason(Rotary, text)


def _turned(split: str = "0, 0, 3, 4", x: str = "float[B,T,12] x") -> str:
    return f"""g ({x}, float[B,T,2] c, float[B,T,2] s) => (float[B,3,T,4] y) {{
    split = Constant<value_ints=[{split}]>()
    parts = Reshape(x, split)
    heads = Transpose<perm=[0, 2, 1, 3]>(parts)
    y = RotaryEmbedding(heads, c, s)
}}"""


def test_a_rotation_comes_before_the_heads_are_split() -> None:
    assert _equal(RotaryInside, _turned())[-2:] == ["Reshape", "Transpose"]


def test_a_rotation_of_other_parts_is_left_alone() -> None:
    assert "split to" in _reason(RotaryInside, _turned(x="float[B,T,3,4] x"))


def _grouped(axis: int = 2, mask: str = "") -> str:
    shape = "2, 1, 3, 5, 4" if axis == 2 else "2, 3, 1, 5, 4"
    return f"""g (float[2,3,5,4] q, float[2,1,5,4] k, float[2,1,5,4] v{mask}) => (float[2,3,5,4] y) {{
    axes = Constant<value_ints=[{axis}]>()
    all = Constant<value_ints=[{shape}]>()
    heads = Constant<value_ints=[2, 3, 5, 4]>()
    ku = Unsqueeze(k, axes)
    ke = Expand(ku, all)
    kr = Reshape(ke, heads)
    vu = Unsqueeze(v, axes)
    ve = Expand(vu, all)
    vr = Reshape(ve, heads)
    y = Attention<scale=0.5>(q, kr, vr{", , pk, pv" if mask else ""})
}}"""


def test_attention_repeats_no_keys() -> None:
    assert "Expand" not in _equal(GroupedHeads, _grouped())


@pytest.mark.parametrize(
    ("text", "reason"),
    [(_grouped(axis=1), "something else"), (_grouped(mask=", float[2,3,2,4] pk, float[2,3,2,4] pv"), "cache")],
    ids=["another axis", "a cache"],
)
def test_attention_with_other_keys_is_left_alone(text: str, reason: str) -> None:
    assert reason in _reason(GroupedHeads, text)


def _masked(visible: str = "Identity(m)", hidden: str = "-3.4028235e38", add: str = "scores, mask") -> str:
    return f"""g (float[B,3,T,T] scores, bool[B,1,T,T] m, float[B,1,T,T] f) => (float[B,3,T,T] y) {{
    zero = Constant<value_float=0.0>()
    hidden = Constant<value=float {{{hidden}}}>()
    visible = {visible}
    mask = Where(visible, zero, hidden)
    sums = Add({add})
    shares = Softmax<axis=-1>(sums)
    wrong = IsNaN(shares)
    y = Where(wrong, zero, shares)
}}"""


@pytest.mark.parametrize("visible", ["Identity(m)", "Xor(m, m)"], ids=["some", "none"])
def test_finite_masks_hide_no_row_whole(visible: str) -> None:
    assert "IsNaN" not in _equal(VisibleRows, _masked(visible))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (_masked(hidden="-inf"), "a whole row"),
        (_masked(add="scores, f"), "not made of two numbers"),
        (_masked().replace("value_float=0.0", "value=float {0.0}").replace("float", "double"), "another type"),
    ],
    ids=["minus infinity", "an input", "another type"],
)
def test_rows_that_may_be_hidden_whole_are_left_alone(text: str, reason: str) -> None:
    assert reason in _reason(VisibleRows, text)


def test_a_mask_taken_for_finite_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_attention, "number_of", lambda value: 0.0)
    with pytest.raises(AssertionError):
        _equal(VisibleRows, _masked("Xor(m, m)", hidden="-inf"))


def test_padded_sentences_need_no_look_for_nan_in_standard_operators(models: Any) -> None:
    """Whole: BERT with a sentence that ends early, and one of nothing but padding."""
    model, call = models.hugging_face("BertForMaskedLM", num_hidden_layers=1), models.sentences(3)
    call["attention_mask"][0] = 0
    compiled = pc.compile(model, [], example_inputs=call, target="onnx", verify=False)
    assert "IsNaN" not in {node.op_type for node in compiled._compiled().executable.model.graph}
    seen = call["attention_mask"].bool()
    want = model(**call).logits.detach()[seen]
    torch.testing.assert_close(compiled(**call).logits[seen], want, rtol=1e-4, atol=1e-5)


# -- convolutions on codes -----------------------------------------------------------------------------------------


def _padded(pads: str = "0, 0, 1, 0, 0, 0, 2, 1", fill: float = 0.0, own: str = "pads=[0, 1, 0, 1]") -> str:
    return f"""g (float[B,3,6,5] x, float[4,3,2,3] w) => (float[B,4,R,S] y) {{
    pads = Constant<value_ints=[{pads}]>()
    fill = Constant<value_float={fill}>()
    scale = Constant<value_float=0.03>()
    zero = Constant<value=uint8 {{117}}>()
    padded = Pad(x, pads, fill)
    codes = QuantizeLinear(padded, scale, zero)
    values = DequantizeLinear(codes, scale, zero)
    y = Conv<{own}>(values, w)
}}"""


@pytest.mark.parametrize("own", ["pads=[0, 1, 0, 1]", "strides=[2, 1]"])
def test_a_convolution_pads_its_codes_itself(own: str) -> None:
    assert "Pad" not in _equal(PaddedConvolution, _padded(own=own))


def test_a_padded_convolution_keeps_the_name_of_its_site() -> None:
    model = _model(_padded())
    model.graph.node[-1].name = "stem"
    rewritten, _ = _applied(PaddedConvolution, model)
    assert [node.name for node in rewritten.graph.node if node.op_type == "Conv"] == ["stem"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fill": 1.0}, "zeros"),
        ({"pads": "0, 0, -1, 0, 0, 0, 2, 1"}, "known number of zeros"),
        ({"own": 'auto_pad="SAME_UPPER"'}, "finds its pads itself"),
    ],
)
def test_a_padded_convolution_is_left_alone(options: dict[str, Any], reason: str) -> None:
    assert reason in _reason(PaddedConvolution, _padded(**options))


def test_pads_on_the_wrong_side_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_codes, "numbers_of", lambda value: [0, 0, 2, 1, 0, 0, 1, 0])
    with pytest.raises(AssertionError):
        _equal(PaddedConvolution, _padded())


def _pad(pads: str) -> str:
    return f"""g (float[B,12] x) => (float[B,R] y) {{
    pads = Constant<value_ints=[{pads}]>()
    padded = Pad(x, pads)
    y = Relu(padded)
}}"""


def test_a_pad_by_nothing_goes() -> None:
    assert "Pad" not in _equal(EmptyPad, _pad("0, 0, 0, 0"))


def test_a_pad_stays() -> None:
    assert "it pads" in _reason(EmptyPad, _pad("0, 0, 0, 1"))


def test_a_pad_taken_for_none_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_codes, "numbers_of", lambda value: [0.0, 0.0, 0.0, 0.0])
    with pytest.raises(AssertionError):
        _equal(EmptyPad, _pad("0, 0, 0, 1"))


def _clipped(low: float, high: float, scale: float = 6 / 255, zero: int = 0) -> str:
    return f"""g (float[B,12] x) => (uint8[B,12] y) {{
    low = Constant<value_float={low}>()
    high = Constant<value_float={high}>()
    scale = Constant<value_float={scale}>()
    zero = Constant<value=uint8 {{{zero}}}>()
    ten = Constant<value_float=10.0>()
    wide = Mul(x, ten)
    clipped = Clip(wide, low, high)
    y = QuantizeLinear(clipped, scale, zero)
}}"""


@pytest.mark.parametrize(("low", "high", "zero"), [(0.0, 6.0, 0), (-1.0, 7.0, 10), (0.0, 5.99, 0)])
def test_codes_saturate_where_the_clip_does(low: float, high: float, zero: int) -> None:
    assert "Clip" not in _equal(SaturatedClip, _clipped(low, high, zero=zero))


@pytest.mark.parametrize(("low", "high", "zero"), [(0.0, 5.9, 0), (0.5, 6.0, 0), (0.0, 6.0, 10)])
def test_a_clip_inside_the_codes_stays(low: float, high: float, zero: int) -> None:
    """Each is one that the codes do not replace, as removing it shows."""
    text = _clipped(low, high, zero=zero)
    assert "beyond the bounds" in _reason(SaturatedClip, text)
    bare = text.replace("QuantizeLinear(clipped", "QuantizeLinear(wide")
    assert (_run(_model(text))[0] != _run(_model(bare))[0]).any()


def _pooled(scale: str = "value_float=0.03", zero: int = 120, x: str = "x", more: str = "z = Relu(x)") -> str:
    return f"""g (float[B,2,7,7] x) => (float[B,2,4,4] y, float[B,2,R,R] z) {{
    scale = Constant<{scale}>()
    zero = Constant<value=uint8 {{{zero}}}>()
    before = QuantizeLinear(x, scale, zero)
    rounded = DequantizeLinear(before, scale, zero)
    pooled = MaxPool<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]>({x})
    codes = QuantizeLinear(pooled, scale, zero)
    y = DequantizeLinear(codes, scale, zero)
    {more}
}}"""


@pytest.mark.parametrize("zero", [0, 120, 200])
def test_values_are_rounded_before_they_are_pooled(zero: int) -> None:
    """Bit by bit the same, on codes that end where values go on."""
    text = _pooled(zero=zero)
    operators = _equal(PooledCodes, text)
    assert operators.index("QuantizeLinear") < operators.index("MaxPool")
    was, now = (_run(model)[0] for model in (_model(text), _applied(PooledCodes, _model(text))[0]))
    assert (was == now).all() and len(np.unique(was)) > 10


def test_values_that_are_rounded_or_read_elsewhere_stay() -> None:
    assert "rounded before" in _reason(PooledCodes, _pooled(x="rounded"))
    assert "as it is" in _reason(PooledCodes, _pooled(more="z = Relu(pooled)"))
    assert "not one known number" in _reason(PooledCodes, _pooled().replace(
        "scale = Constant<value_float=0.03>()", "mean = ReduceMean<keepdims=0>(x)\n    scale = Abs(mean)"
    ))  # fmt: skip


def test_a_window_that_is_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(self: PooledCodes, op: Any, x: Any, scale: Any, zero: Any, **_: Any) -> Any:
        values = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        return op.MaxPool(values, kernel_shape=[1, 1], strides=[2, 2])

    monkeypatch.setattr(PooledCodes, "rewrite", lossy)
    with pytest.raises(AssertionError):
        _equal(PooledCodes, _pooled())


# -- products of codes -------------------------------------------------------------------------------------------


def _product(second: str = "turned", zero: str = "uint8 {120}", first: str = "q_values", by: str = "0.3") -> str:
    return f"""g (float[B,12,12] q, float[B,12,12] k, float c) => (float[B,12,12] y) {{
    scale = Constant<value_float=0.03>()
    zero = Constant<value={zero}>()
    fine = Constant<value_float=0.02>()
    middle = Constant<value=uint8 {{131}}>()
    by = Constant<value_float={by}>()
    q_codes = QuantizeLinear(q, fine, middle)
    q_values = DequantizeLinear(q_codes, fine, middle)
    codes = QuantizeLinear(k, scale, zero)
    values = DequantizeLinear(codes, scale, zero)
    turned = Transpose<perm=[0, 2, 1]>(values)
    product = MatMul({first}, {second})
    y = Mul(product, by)
}}"""


def test_codes_about_zero_are_signed() -> None:
    """Those of the first factor, whose zero is 131, stay; bit by bit the same."""
    text = _product("values", "uint8 {128}")
    _equal(CenteredCodes, text)
    rewritten, count = _applied(CenteredCodes, _model(text))
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in rewritten.graph.initializer]
    assert count == 1 and [(array.dtype, array.item()) for array in stored] == [(np.int8, 0)]
    assert (_run(rewritten)[0] == _run(_model(text))[0]).all()


def test_codes_stay_unsigned_where_they_are_not_about_zero_or_as_fast() -> None:
    for zero in ("uint8 {127}", "uint8 {0}", "int8 {0}"):
        assert "not in the middle" in _reason(CenteredCodes, _product("turned", zero))
    model, tracer = ir.from_proto(_model(_product("turned", "uint8 {128}"))), MatchingTracer()
    assert _rules(CenteredCodes, Target(contrib=True)).apply_to_model(model, tracer=tracer) == 0
    reasons = {m.match_result.reason for found in tracer.best_matches_map.values() for m in found}
    assert any(reason and "as fast there" in reason for reason in reasons)


def test_a_zero_that_is_not_in_the_middle_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def beside(self: CenteredCodes, op: Any, x: Any, scale: Any, zero: Any) -> Any:
        other = stored(op, "other", np.array(100, dtype=np.int8))
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, other), scale, other)

    monkeypatch.setattr(CenteredCodes, "rewrite", beside)
    with pytest.raises(AssertionError):
        _equal(CenteredCodes, _product("values", "uint8 {128}"))


def _signed_keys(scale: str = "Constant<value_float=0.03>()", zero: str = "int8 {0}") -> str:
    return f"""g (float[B,12,12] k) => (float[B,12,12] y) {{
    scale = {scale}
    zero = Constant<value={zero}>()
    codes = QuantizeLinear(k, scale, zero)
    values = DequantizeLinear(codes, scale, zero)
    y = Transpose<perm=[0, 2, 1]>(values)
}}"""


def test_what_is_transposed_is_rounded_behind() -> None:
    model = _model(_signed_keys())
    rewritten, count = _applied(TurnedCodes, model)
    operators = [node.op_type for node in rewritten.graph.node]
    assert count == 1 and operators.index("Transpose") < operators.index("QuantizeLinear")
    assert (_run(rewritten)[0] == _run(model, as_it_is=True)[0]).all()


def test_signed_keys_of_codes_about_zero_run_on_onnx_runtime() -> None:
    """Without the second rule, ONNX Runtime refuses them."""
    model = _model(_product("turned", "uint8 {128}"))
    once, _ = _applied(CenteredCodes, model)
    twice, _ = _applied(TurnedCodes, once)
    for was, now in zip(_run(model), _run(twice), strict=True):
        np.testing.assert_allclose(now, was, rtol=1e-5, atol=1e-6)


def test_unsigned_codes_are_turned_as_they_are() -> None:
    assert "unsigned" in _reason(TurnedCodes, _signed_keys(zero="uint8 {128}"))
    computed = _signed_keys().replace(
        "scale = C", "mean = ReduceMean<keepdims=0>(k)\n    scale = Abs(mean)\n    unused = C"
    )
    assert "not one number" in _reason(TurnedCodes, computed)


def test_axes_that_do_not_trade_places_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: TurnedCodes, op: Any, x: Any, scale: Any, zero: Any, turned: Any) -> Any:
        kept = op.Transpose(x, perm=[0, 1, 2])
        return op.DequantizeLinear(op.QuantizeLinear(kept, scale, zero), scale, zero)

    monkeypatch.setattr(TurnedCodes, "rewrite", lost)
    with pytest.raises(AssertionError):
        test_what_is_transposed_is_rounded_behind()


SIGNED = [(SignedFactor, "values"), (SignedKeys, "turned")]


@pytest.mark.parametrize("zero", [0, 120, 128, 255])
@pytest.mark.parametrize(("rule", "second"), SIGNED)
def test_the_second_factor_gets_signed_codes(rule, second: str, zero: int) -> None:
    text = _product(second, f"uint8 {{{zero}}}")
    _equal(rule, text)
    rewritten, _ = _applied(rule, _model(text))
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in rewritten.graph.initializer]
    assert [(array.dtype, array.item()) for array in stored] == [(np.int8, zero - 128)]


@pytest.mark.parametrize(("rule", "second"), SIGNED)
def test_other_codes_stay(rule, second: str) -> None:
    assert "not unsigned" in _reason(rule, _product(second, "int8 {3}"))
    assert "not in unsigned codes" in _reason(rule, _product(second, first="q"))


@pytest.mark.parametrize(("rule", "second"), SIGNED)
def test_a_zero_that_did_not_move_is_caught(rule, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = np.array(0, dtype=np.int8)
    monkeypatch.setattr(rewrite_codes.Signed, "middle", lambda self, op, product, zero: stored(op, "z", wrong))
    with pytest.raises(AssertionError):
        _equal(rule, _product(second, "uint8 {255}"))


def test_a_number_goes_into_the_scale_of_codes() -> None:
    assert "Mul" not in _equal(ScaledCodes, _product())


def test_what_is_no_number_stays() -> None:
    assert "not one known number" in _reason(ScaledCodes, _product().replace("Mul(product, by)", "Mul(product, c)"))
    read = _product().replace("=> (float[B,12,12] y)", "=> (float[B,12,12] y, float[B,12,12] z)")
    assert "as it is" in _reason(ScaledCodes, read.replace("y = Mul", "z = Relu(product)\n    y = Mul"))


def test_a_number_that_is_no_scale_stays() -> None:
    assert "positive" in _reason(ScaledCodes, _product(by="-0.3"))


def _twice(second: str) -> str:
    """Another product of the same codes, by another number."""
    text = _product(second).replace("=> (float[B,12,12] y)", "=> (float[B,12,12] y, float[B,12,12] z)")
    more = (
        f"    other = MatMul(q_values, {second})\n    less = Constant<value_float=0.1>()\n    z = Mul(other, less)\n}}"
    )
    return text.rstrip().removesuffix("}") + more


@pytest.mark.parametrize(("rule", "second"), [*SIGNED, (ScaledCodes, "turned")])
def test_codes_of_two_products(rule, second: str) -> None:
    _equal(rule, _twice(second))


def test_a_scaled_product_keeps_the_name_of_its_site() -> None:
    model = _model(_product())
    next(node for node in model.graph.node if node.op_type == "MatMul").name = "head"
    rewritten, _ = _applied(ScaledCodes, model)
    assert [node.name for node in rewritten.graph.node if node.op_type == "MatMul"] == ["head"]


def test_a_number_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_codes, "stored", lambda op, name, value: stored(op, name, value / np.float32(0.3)))
    with pytest.raises(AssertionError):
        _equal(ScaledCodes, _product())


def test_an_attention_on_codes_is_the_eager_one(models) -> None:
    """Whole: both products run on integers, u8·s8, and give the same."""
    model, call = models.hugging_face("ViTForImageClassification", num_hidden_layers=1), models.images()
    options = {"example_inputs": call, "calibration": [call], "verify": False}
    ours, eager = (
        pc.compile(model, ["center_stream", "quantize:W8A8,attention=true"], target=target, **options)
        for target in ("onnxruntime", "eager")
    )
    torch.testing.assert_close(ours(**call).logits, eager(**call).logits, rtol=1e-4, atol=1e-4)
    graph, _ = ours._compiled().executable.profiled()
    assert not any(node.op_type in ("MatMul", "FusedMatMul", "Mul") for node in graph.node)
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMulIntegerToFloat", "QLinearMatMul")]
    zeros = [kinds[node.input[5]] for node in products if node.input[5]]  # of the second factor; weights have none
    assert zeros == [onnx.TensorProto.INT8] * 2
