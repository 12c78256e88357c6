"""Every paretoc:: operator: schema, shape rule, and its meaning against slow loops or the ONNX reference."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from paretoc.compiler import dialect
from paretoc.compiler.encodings import NM, Affine, Dense
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.paretoc
quick = settings(max_examples=60, deadline=None)
ENCODINGS = [Dense("bfloat16"), Affine(3, -1, False), Affine(4, 4), NM(2, 4, Affine(8)), NM(8, 16)]


def _decode_case(encoding, dtype=torch.float32):
    arrays = encoding.encode(torch.randn(4, 16))
    return ops.decode.default, (list(arrays.values()), str(encoding), [4, 16], dtype)


def _token_case(r: int, protected: int):
    x, size = torch.randn(2, 9, 3), torch.rand(2, 9, 1) + 1
    return ops.merge_tokens.default, (x, size, *ops.bipartite_match(torch.randn(2, 9, 4), r, protected))


CASES = {
    "fake_quantize": lambda: (
        ops.fake_quantize.default,
        (torch.randn(3, 4), torch.tensor(0.1), torch.tensor(7).byte()),
    ),
    "fake_quantize_dynamic tensor": lambda: (
        ops.fake_quantize_dynamic.default,
        (torch.randn(3, 4), "tensor"),
    ),
    "fake_quantize_dynamic token": lambda: (
        ops.fake_quantize_dynamic.default,
        (torch.randn(2, 3, 4), "token"),
    ),
    "bipartite_match": lambda: (ops.bipartite_match.default, (torch.randn(2, 9, 4), 3, 1)),
    "bipartite_match nothing": lambda: (ops.bipartite_match.default, (torch.randn(2, 8, 4), 0, 2)),
    "merge_tokens": lambda: _token_case(3, 1),
    "merge_tokens nothing": lambda: _token_case(0, 0),
    "keep_tokens": lambda: (ops.keep_tokens.default, (torch.randn(2, 9, 3), torch.rand(2, 9), 4, 1, False)),
    "keep_tokens fuse": lambda: (
        ops.keep_tokens.default,
        (torch.randn(2, 9, 3), torch.rand(2, 9), 4, 2, True),
    ),
    "decode half": lambda: _decode_case(Affine(4), torch.float16),
} | {f"decode {e}": (lambda e=e: _decode_case(e)) for e in ENCODINGS}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_schema_and_shape_rule(case):
    operator, arguments = case()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=tests)


def test_every_operator_of_the_dialect_is_checked():
    defined = {
        value._name.removeprefix("paretoc::")
        for module in dialect.__all__
        for value in vars(getattr(dialect, module)).values()
        if isinstance(value, torch.library.CustomOpDef)
    }
    assert len(defined) >= 6
    assert defined == {name.split()[0] for name in CASES}


# -- activation quantisers -------------------------------------------------------------------------------

floats = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20)


def _onnx_dynamic(x: np.ndarray) -> np.ndarray:
    return _run(
        [
            onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"x": x},
    )


def _onnx_static(x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    return _run(
        [
            onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        {"x": x, "s": scale, "z": zero},
    )


def _run(nodes: list[onnx.NodeProto], feed: dict[str, np.ndarray]) -> np.ndarray:
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feed.items()}
    inputs = [onnx.helper.make_tensor_value_info(n, kinds[n], list(v.shape)) for n, v in feed.items()]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(feed["x"].shape))
    graph = onnx.helper.make_graph(nodes, "quantise", inputs, [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model).run(None, feed)[0]


@quick
@example([-0.495, 254.505])  # a scale of one and a zero point just below, and at, a half
@example([-0.5, 254.5])
@example([-1.5, 253.5])
@given(floats.filter(lambda values: max(map(abs, values)) > 1e-30))
def test_the_dynamic_range_of_a_tensor_is_onnx_dynamic_quantize_linear(values):
    x = np.float32(values)
    got = ops.fake_quantize_dynamic(torch.from_numpy(x), "tensor").numpy()
    np.testing.assert_array_equal(got, _onnx_dynamic(x))


@quick
@given(floats, st.floats(2**-10, 8, width=32), st.integers(0, 255))
def test_the_static_range_is_onnx_quantize_linear(values, scale, zero):
    x, s, z = np.float32(values), np.float32(scale), np.uint8(zero)
    got = ops.fake_quantize(torch.from_numpy(x), torch.tensor(s), torch.tensor(z)).numpy()
    np.testing.assert_array_equal(got, _onnx_static(x, s, z))


def test_halves_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5])
    got = ops.fake_quantize(x, torch.tensor(1.0), torch.tensor(128).byte())
    assert got.tolist() == [0.0, 2.0, 2.0, 0.0]


def test_the_dynamic_range_of_a_token_is_symmetric_over_the_last_axis():
    x = torch.randn(2, 3, 5) * torch.tensor([1.0, 10.0, 0.0]).reshape(1, 3, 1)
    got = ops.fake_quantize_dynamic(x, "token")
    for b in range(2):
        for t in range(3):
            scale = np.float32(max(abs(v) for v in x[b, t].tolist())) / np.float32(127)
            want = [float(np.rint(np.float32(v) / scale) * scale) if scale else 0.0 for v in x[b, t].tolist()]
            # the smallest scale is clamped, so that a row of zeros stays zeros
            torch.testing.assert_close(got[b, t], torch.tensor(want), rtol=1e-6, atol=0)


def test_unsigned_codes_of_a_token_cover_its_own_range():
    """A token on one side of zero has all codes there: three times finer than with the symmetric code."""
    x = torch.rand(3, 64) * torch.tensor([[1.0], [-5.0], [0.0]])
    got = ops.fake_quantize_dynamic(x, "token", "uint4")
    for row, values in zip(got.numpy(), x.numpy(), strict=True):
        low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
        scale = (high - low) / np.float32(15) or np.float32(1)
        zero = np.rint(-low / scale)
        want = (np.clip(np.rint(values / scale) + zero, 0, 15) - zero) * scale
        np.testing.assert_allclose(row, want, rtol=1e-6, atol=1e-7)
    symmetric = ops.fake_quantize_dynamic(x, "token", "int4")
    assert (got - x).square().sum() < (symmetric - x).square().sum() / 3


def test_gradients_go_straight_through():
    for rounded in (
        lambda x: ops.fake_quantize_dynamic(x, "token", "int4"),
        lambda x: ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(128).byte()),
    ):
        x = torch.randn(3, 4, requires_grad=True)
        (rounded(x) * torch.arange(12.0).reshape(3, 4)).sum().backward()
        assert torch.equal(x.grad, torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_zeros_stay_zeros(granularity):
    assert torch.equal(ops.fake_quantize_dynamic(torch.zeros(2, 3), granularity), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantisers_keep_the_dtype(dtype):
    x = torch.randn(2, 3).to(dtype)
    assert ops.fake_quantize_dynamic(x, "tensor").dtype == dtype
    assert ops.fake_quantize(x, torch.tensor(0.1), torch.tensor(1).byte()).dtype == dtype


# -- tokens ----------------------------------------------------------------------------------------------


def slow_match(metric: np.ndarray, r: int, protected: int) -> tuple[list[int], list[int], list[int]]:
    """Bipartite soft matching of one sequence `[T, D]`, in token numbers: unmerged, sources, destinations."""
    A = [t for t in range(len(metric)) if t % 2 == 0]
    B = [t for t in range(len(metric)) if t % 2 == 1]

    def similarity(i: int, j: int) -> float:
        return float(metric[i] @ metric[j] / (np.linalg.norm(metric[i]) * np.linalg.norm(metric[j])))

    edges = []
    for i in A:
        if i >= protected:
            best = max((j for j in B if j >= protected), key=lambda j: similarity(i, j))
            edges.append((similarity(i, best), i, best))
    merged = sorted(edges, key=lambda edge: -edge[0])[:r]
    sources, destinations = [i for _, i, _ in merged], [j for _, _, j in merged]
    return [i for i in A if i not in sources], sources, destinations


def slow_merge(x: np.ndarray, size: np.ndarray, match: tuple[list[int], list[int], list[int]]):
    """Size-weighted means of the merged pairs of one sequence: unmerged tokens of A first, then B."""
    unmerged, sources, destinations = match
    rows, sizes = [x[i] for i in unmerged], [size[i] for i in unmerged]
    for j in range(1, len(x), 2):
        group = [j, *(s for s, d in zip(sources, destinations, strict=True) if d == j)]
        total = sum(size[t] for t in group)
        rows.append(sum(x[t] * size[t] for t in group) / total)
        sizes.append(total)
    return np.stack(rows), np.stack(sizes)


def _merge_cases():
    for tokens in (5, 8, 9, 16):
        for protected in (0, 1, 2, 3):
            in_a = (tokens + 1) // 2 - (protected + 1) // 2
            yield from ((tokens, protected, r) for r in {0, 1, in_a // 2, in_a})


@pytest.mark.parametrize(("tokens", "protected", "r"), list(_merge_cases()))
def test_matching_and_merging_equal_a_slow_loop(tokens, protected, r):
    metric, x = torch.randn(2, tokens, 4), torch.randn(2, tokens, 3)
    size = torch.randint(1, 5, (2, tokens, 1)).float()
    unmerged, source, destination = ops.bipartite_match(metric, r, protected)
    merged, total = ops.merge_tokens(x, size, unmerged, source, destination)
    assert merged.shape == (2, tokens - r, 3)
    assert total.shape == (2, tokens - r, 1)
    for b in range(2):
        match = slow_match(metric[b].numpy(), r, protected)
        assert (2 * unmerged[b]).tolist() == match[0]
        assert (2 * source[b]).tolist() == match[1]
        assert (2 * destination[b] + 1).tolist() == match[2]
        want, sizes = slow_merge(x[b].numpy(), size[b].numpy(), match)
        np.testing.assert_allclose(merged[b].numpy(), want, rtol=1e-5, atol=1e-6)  # sums in another order
        np.testing.assert_allclose(total[b].numpy(), sizes, rtol=1e-6)


def test_the_slow_loop_is_right_on_a_case_done_by_hand():
    metric = np.float32([[1, 0], [1, 0.1], [0, 1], [0.05, 1], [1, -1]])
    assert slow_match(metric, 2, 0) == ([4], [2, 0], [3, 1])
    assert slow_match(metric, 2, 1) == ([0], [2, 4], [3, 1])  # token 0 stays
    assert slow_match(metric, 1, 2) == ([0, 4], [2], [3])  # and token 1 takes nobody in
    rows, sizes = slow_merge(np.float32([[0], [2], [4], [6], [8]]), np.ones((5, 1)), ([4], [0, 2], [1, 3]))
    assert rows.tolist() == [[8], [1], [5]]
    assert sizes.tolist() == [[1], [2], [2]]


def test_sizes_weigh_the_mean():
    x, size = torch.tensor([[[0.0], [9.0]]]), torch.tensor([[[1.0], [2.0]]])
    index = torch.zeros(1, 1, dtype=torch.int64)
    merged, total = ops.merge_tokens(x, size, index[:, :0], index, index)
    assert merged.tolist() == [[[6.0]]]
    assert total.tolist() == [[[3.0]]]


@quick
@given(st.integers(2, 20), st.integers(0, 3), st.integers(0, 10), st.integers(0, 1000))
def test_merging_keeps_every_original_token_once(tokens, protected, r, seed):
    assume(tokens // 2 > protected // 2)  # somebody to merge into
    r = min(r, max((tokens + 1) // 2 - (protected + 1) // 2, 0))
    torch.manual_seed(seed)
    x, size = torch.randn(3, tokens, 2), torch.ones(3, tokens, 1)
    merged, total = ops.merge_tokens(x, size, *ops.bipartite_match(torch.randn(3, tokens, 4), r, protected))
    assert total.sum(1).flatten().tolist() == [tokens] * 3
    torch.testing.assert_close((merged * total).sum(1), x.sum(1), rtol=1e-5, atol=1e-5)
    if protected:
        assert torch.equal(merged[:, 0], x[:, 0])


def test_merging_equal_tokens_is_exact():
    x = torch.randn(2, 1, 3).expand(2, 8, 3).contiguous()
    size = torch.ones(2, 8, 1)
    for _ in range(2):
        x, size = ops.merge_tokens(x, size, *ops.bipartite_match(x, 2, 1))
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert size.sum(1).flatten().tolist() == [8, 8]


def test_a_zero_metric_is_not_a_nan():
    unmerged, source, destination = ops.bipartite_match(torch.zeros(1, 6, 4), 2, 0)
    assert (unmerged.tolist(), source.tolist(), destination.tolist()) == ([[2]], [[0, 1]], [[0, 0]])


def slow_keep(x: Tensor, scores: Tensor, keep: int, protected: int, fuse: bool) -> Tensor:
    """EViT: protected tokens, the best of the rest in their order, and the weighted sum of the others."""
    sequences = []
    for rows, weights in zip(x, scores.tolist(), strict=True):
        free = range(protected, len(rows))
        kept = sorted(sorted(free, key=lambda t: -weights[t])[:keep])
        parts = [rows[t] for t in (*range(protected), *kept)]
        if fuse:
            parts.append(sum((weights[t] * rows[t] for t in free if t not in kept), torch.zeros(rows.shape[1])))
        sequences.append(torch.stack(parts))
    return torch.stack(sequences)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("keep", [1, 4, 6])
def test_keeping_equals_a_slow_loop(keep, protected, fuse):
    x, scores = torch.randn(3, 9, 4), torch.randint(0, 4, (3, 9)).float() / 8  # ties: the lower index stays
    got = ops.keep_tokens(x, scores, keep, protected, fuse)
    torch.testing.assert_close(got, slow_keep(x, scores, keep, protected, fuse), rtol=1e-6, atol=1e-6)


def test_the_slow_keep_is_right_on_a_case_done_by_hand():
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.25]])
    torch.testing.assert_close(slow_keep(x, scores, 1, 1, True), torch.tensor([[[1.0], [3.0], [1.2]]]))
    assert slow_keep(x, scores, 2, 1, False).tolist() == [[[1.0], [3.0], [4.0]]]


TOO_MANY = {
    "match": (lambda x: ops.bipartite_match(x, 5, 1), "r=5 is out of range: of 9 tokens, 1 protected, 4 may move to 4"),
    "match fewer than none": (lambda x: ops.bipartite_match(x, -1, 1), "r=-1 is out of range"),
    "match with nobody": (lambda x: ops.bipartite_match(x[:, :3], 0, 2), "3 tokens, 2 protected, 1 may move to 0"),
    "match all protected": (lambda x: ops.bipartite_match(x, 1, 9), "9 tokens, 9 protected, 0 may move to 0"),
    "keep": (
        lambda x: ops.keep_tokens(x, x[..., 0], 9, 1, False),
        "keep=9 is out of range: of 9 tokens, 1 protected, 8 can be kept",
    ),
    "keep and fuse": (lambda x: ops.keep_tokens(x, x[..., 0], 8, 2, True), "keep=8 is out of range"),
    "keep fewer than none": (lambda x: ops.keep_tokens(x, x[..., 0], -1, 2, True), "keep=-1 is out of range"),
    "keep more than all protected": (lambda x: ops.keep_tokens(x, x[..., 0], 0, 10, False), "keep=0 is out of range"),
}


@pytest.mark.parametrize(("call", "sentence"), TOO_MANY.values(), ids=TOO_MANY)
def test_a_count_that_does_not_fit_is_refused_by_the_run_and_the_shape_rule(call, sentence):
    x = torch.randn(2, 9, 4)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call(x)
    with FakeTensorMode() as fake, pytest.raises(ValueError, match=re.escape(sentence)):
        call(fake.from_tensor(x))


def _shapes(call, *tensors) -> list[list[int]] | None:
    """The shapes a call gives, None when it refuses."""
    try:
        got = call(*tensors)
    except ValueError:
        return None
    return [list(t.shape) for t in (got if isinstance(got, tuple) else (got,))]


@quick
@given(st.integers(1, 12), st.integers(-1, 13), st.integers(0, 13), st.booleans())
def test_the_shape_rule_gives_what_the_run_gives(tokens, count, protected, fuse):
    x = torch.randn(2, tokens, 4)
    for call in (
        lambda x: ops.bipartite_match(x, count, protected),
        lambda x: ops.keep_tokens(x, x[..., 0], count, protected, fuse),
    ):
        with FakeTensorMode() as fake:
            told = _shapes(call, fake.from_tensor(x))
        assert told == _shapes(call, x)


# -- encoded weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_decode_is_the_decode_of_the_encoding(encoding):
    arrays = encoding.encode(torch.randn(4, 16))
    got = ops.decode(list(arrays.values()), str(encoding), [4, 16], torch.float32)
    assert torch.equal(got, encoding.decode(arrays, (4, 16)))


def test_decode_gives_fresh_memory_of_the_asked_dtype():
    stored = torch.randn(4, 16)
    got = ops.decode([stored], str(Dense()), [4, 16], torch.float32)
    got.zero_()
    assert stored.abs().sum() > 0
    assert ops.decode([stored], str(Dense()), [4, 16], torch.float16).dtype == torch.float16


@pytest.mark.parametrize("code", ["int8", "int4", "uint4", "e4m3"])
def test_a_group_of_channels_is_rounded_as_a_token(code):
    x = torch.randn(2, 3, 64)
    rounded = torch.ops.paretoc.fake_quantize_dynamic
    parts = torch.cat([rounded(part, "token", code) for part in x.split(16, -1)], -1)
    torch.testing.assert_close(rounded(x, "group16", code), parts, rtol=0, atol=0)
    assert not torch.equal(rounded(x, "group32", code), parts)
