"""Attention against the softmax written out in float64: biases, masks, packed sequences, caches of codes."""

from __future__ import annotations

from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton import Triton
from paretoc.backends.triton.kernels.attention import attention, packed_attention, tilings
from paretoc.backends.triton.kernels.cache import quantize_cache
from paretoc.backends.triton.kernels.launch import DTYPES
from paretoc.backends.triton.kernels.plan import Tunings
from paretoc.backends.triton.operators import lower_operators
from paretoc.compiler.dialect.activations import reference_fake_quantize_dynamic
from torch import Tensor


def textbook(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    """float64; a query that may attend to nothing gets zeros."""
    repeats = q.shape[-3] // k.shape[-3]
    k, v = (x.double().repeat_interleave(repeats, -3) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias.double()
    if causal:
        scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def bound(v: Tensor, dtype: torch.dtype) -> float:
    """A probability is rounded by half a unit, the output too; scores round in float32. The interpreter truncates to
    bfloat16: whole units."""
    return float(v.abs().max()) * torch.finfo(dtype).eps * {torch.float32: 16, torch.bfloat16: 2}.get(dtype, 1)


def operands(B: int, H: int, G: int, M: int, N: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As projections leave them: heads behind tokens."""
    shapes = ((B, M, H, D), (B, N, G, D), (B, N, G, D))
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "M", "N", "D"),
    [(2, 4, 2, 7, 7, 32), (1, 2, 2, 70, 70, 20), (2, 3, 1, 1, 90, 64), (1, 1, 1, 20, 5, 128)],
)
def test_a_number_for_each_key(near, B, H, G, M, N, D, causal, dtype):
    q, k, v = operands(B, H, G, M, N, D, dtype)
    size = torch.randint(1, 9, (B, 1, 1, N)).log().to(dtype)
    expected = textbook(q, k, v, size, causal, 0.3)
    near(attention(q, k, v, size, causal, 0.3), expected, bound(v, dtype))
    if N > 1 and not causal:
        with pytest.raises(AssertionError, match="more than allowed"):
            near(attention(q, k, v, None, causal, 0.3), expected, bound(v, dtype))


def mask(kind: str) -> Tensor | None:
    """For 2 sequences of 3 heads, 9 queries and 33 keys."""
    lower = torch.ones(9, 33).tril(20).bool()
    return {
        "none": None,
        "queries": lower,
        "heads": torch.randn(3, 9, 33),
        "padding": (torch.arange(33) < torch.tensor([[20], [33]])).reshape(2, 1, 1, 33),
        "nothing": lower.clone().index_fill(0, torch.tensor([4]), False),
        "least": torch.where(lower, 0.0, torch.finfo(torch.float32).min).expand(2, 1, 9, 33),
        "infinite": torch.where(lower.index_fill(0, torch.tensor([0]), False), 0.0, -torch.inf),
    }[kind]


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy, which interprets: the least number minus another
@pytest.mark.parametrize("kind", ["none", "queries", "heads", "padding", "nothing", "least", "infinite"])
def test_masks(near, kind):
    (q, k, v), bias = operands(2, 3, 3, 9, 33, 16, torch.float32), mask(kind)
    near(attention(q, k, v, bias, False, 0.25), textbook(q, k, v, bias, False, 0.25), bound(v, q.dtype))


def test_a_row_of_least_numbers_is_a_mean_as_in_pytorch(near):
    q, k, v = operands(1, 1, 1, 3, 5, 16, torch.float32)
    bias = torch.full((3, 5), torch.finfo(torch.float32).min)
    near(attention(q, k, v, bias, False, 1.0), v.mean(2, keepdim=True).expand(1, 1, 3, 16), bound(v, q.dtype))


def test_large_scores_do_not_overflow(near):
    q, k, v = operands(1, 1, 1, 4, 40, 16, torch.float32)
    near(attention(100 * q, 100 * k, v, None, False, 1.0), textbook(100 * q, 100 * k, v, None, False, 1.0), 1e-2)


def test_any_strides(near):
    q = torch.randn(1, 2, 16, 6).transpose(2, 3)
    k, v = torch.randn(2, 1, 2, 9, 16).unbind(0)
    near(attention(q, k, v[..., ::1], None, False, 1.0), textbook(q, k, v, None, False, 1.0), bound(v, q.dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_do_not_see_each_other(near, causal, dtype):
    lengths, others = [3, 0, 17, 1], [5, 2, 17, 0]
    starts, key_starts = (torch.tensor([0, *n]).cumsum(0, dtype=torch.int32) for n in (lengths, others))
    q, k, v = torch.randn(21, 4, 20).to(dtype), *(torch.randn(24, 2, 20).to(dtype) for _ in range(2))
    size = torch.rand(24) * 3
    y = packed_attention(q, k, v, starts, key_starts, 17, size, causal, 0.2)
    for b in range(4):
        mine, theirs = slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1])
        parts = (q[mine].transpose(0, 1), k[theirs].transpose(0, 1), v[theirs].transpose(0, 1))
        near(y[mine].transpose(0, 1), textbook(*parts, size[theirs], causal, 0.2), bound(v, dtype))


def test_a_dense_batch_is_packed_sequences_of_one_length(near):
    q, k, v = operands(2, 2, 2, 6, 6, 16, torch.float32)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, 6, 12], dtype=torch.int32)
    y = packed_attention(*flat, starts, starts, 6, None, True, 1.0)
    near(y.unflatten(0, (2, 6)).transpose(1, 2), attention(q, k, v, None, True, 1.0), 1e-6)


@pytest.mark.parametrize("code", ["int8", "int4", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_codes_is_the_rounded_cache(near, code, dtype):
    q, k, v = operands(2, 4, 2, 3, 40, 20, dtype)
    k *= torch.logspace(-1, 0.3, 40).reshape(1, 1, 40, 1).to(dtype)
    (keys, key_scale), (values, value_scale) = quantize_cache(k, code), quantize_cache(v, code)
    y = attention(q, keys, values, None, False, 0.2, code, key_scale, value_scale)
    rounded = (reference_fake_quantize_dynamic(x.float(), "token", code) for x in (k, v))
    near(y, textbook(q, *rounded, None, False, 0.2), 2 * bound(v, dtype))


@pytest.mark.parametrize("code", ["", "int8"])
def test_every_tiling_and_the_reference_agree(near, monkeypatch, code):
    for M in (1, 3, 40):  # one query: its heads are joined, its keys split
        q, k, v = operands(1, 4, 2, M, 600, 20, torch.float16)
        bias, causal = torch.randn(1, 1, 1, 600), M > 1
        bias[..., 64:130] = -torch.inf  # parts without a key
        keys, values, scales = k, v, ()
        if code:
            (keys, key_scale), (values, value_scale) = quantize_cache(k, code), quantize_cache(v, code)
            scales = (key_scale, value_scale)
            k, v = (reference_fake_quantize_dynamic(x, "token", code) for x in (k, v))
        expected = textbook(q, k, v, bias.half(), causal, 0.2)
        for number in range(len(tilings(M, 600, 20, q.dtype)) + 1):
            monkeypatch.setattr(Tunings, "pick", lambda self, plan, number=number: plan.tilings[number])
            near(attention(q, keys, values, bias, causal, 0.2, code, *scales), expected, 3 * bound(v, q.dtype))


def test_the_shape_rules_agree():
    q, k, v = operands(2, 2, 1, 3, 5, 8, torch.float32)
    options = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.paretoc_triton.attention.default, (q, k, v, None, False, 1.0), **options)
    flat, starts = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    arguments = (flat, flat, flat, starts, starts, 6, None, False, 1.0)
    torch.library.opcheck(torch.ops.paretoc_triton.packed_attention.default, arguments, **options)


def lowered(model: Any, steps: list[str], inputs: Any) -> tuple[Any, pc.Program, list[str]]:
    """The executable, its program, and the kernels of its graph."""
    options = {"example_inputs": inputs, "target": "eager", "verify": False}
    program = pc.compile(model, steps, **options).program
    executable = Triton().lower(program, {})
    targets = [str(n.target) for n in executable.lowered.graph.nodes if "paretoc_triton" in str(n.target)]
    return executable, program, [t.removeprefix("paretoc_triton.").removesuffix(".default") for t in targets]


@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_attention_with_the_sizes_of_merged_tokens_runs_in_the_kernel(models, near, kind):
    torch.manual_seed(0)
    if kind == "fused":
        model, inputs = models.Vit(pool="class"), (torch.randn(2, 16, 12),)
    else:
        model, inputs = models.hugging_face("ViTForImageClassification", num_hidden_layers=2), models.images(1)
        model.set_attn_implementation("eager")
    executable, program, found = lowered(model.eval(), ["merge_tokens:r=2"], inputs)
    layers = found.count("merge_tokens")
    rest = {"fused": "aten.scaled_dot_product_attention.default", "eager": "aten.softmax.int"}[kind]
    assert [str(n.target) for n in executable.lowered.graph.nodes].count(rest) == 1
    assert found.count("attention") == layers - 1 and layers > 1  # the first has no sizes yet
    x = inputs if isinstance(inputs, tuple) else tuple(inputs.values())
    (y, *_), (reference, *_) = executable.run(list(x)), program.run(list(x))
    near(y, reference, 2e-5 * reference.abs().max())
    rows = [row for row in executable.explain() if row.kernel.startswith("attention")]
    assert len(rows) == layers - 1 and all(row.note == "interpreted, for tests" for row in rows)


class Grouped(torch.nn.Module):
    """Four heads of queries on two of keys, which are repeated as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, (B, T, _) = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2), x.shape
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        k, v = (y[:, :, None].expand(B, 2, 2, T, 4).reshape(B, 4, T, 4) for y in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("code", ["int8", "int4", "e4m3"])
def test_attention_on_a_quantised_cache_reads_codes(near, code):
    inputs = (torch.randn(2, 6, 8), torch.ones(6, 6).tril().bool())
    executable, program, found = lowered(Grouped().eval(), [f"quantize_cache:{code}"], inputs)
    assert found == ["quantize_cache", "quantize_cache", "attention"]
    (keys, _) = [n for n in executable.lowered.graph.nodes if "quantize_cache" in str(n.target)]
    assert keys.args[0].meta["val"].shape[1] == 2  # not repeated for the four heads
    (y,), (reference,) = executable.run(list(inputs)), program.run(list(inputs))
    near(y, reference, 2e-5 * reference.abs().max())
    (row,) = [row for row in executable.explain() if row.kernel.startswith("attention")]
    assert row.note == f"keys and values in {code}; interpreted, for tests"


class Heads(torch.nn.Module):
    """Attention in the open form, as `how` writes it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv = how, torch.nn.Linear(8, 24)

    def forward(self, x: Tensor, bias: Tensor) -> Any:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        scores = (scores + bias) * 0.5 if self.how == "bias first" else scores * 0.5 + bias
        weights = torch.softmax(scores, -1)
        y = weights @ v
        return (y, weights.mean(1)) if self.how == "weights read" else y


@pytest.mark.parametrize(("how", "count"), [("plain", 1), ("bias first", 0), ("weights read", 0)])
def test_only_an_attention_that_is_no_more_than_that_is_replaced(near, how, count):
    inputs = (torch.randn(2, 6, 8), torch.randn(2, 1, 1, 6))
    executable, program, found = lowered(Heads(how).eval(), [], inputs)
    assert found.count("attention") == count
    for y, reference in zip(executable.run(list(inputs)), program.run(list(inputs)), strict=True):
        near(y, reference, 1e-5)


def test_a_gpu_without_float8_rounds_before_which_is_said():
    inputs = (torch.randn(2, 6, 8), torch.ones(6, 6).tril().bool())
    _, program, _ = lowered(Grouped().eval(), ["quantize_cache:e4m3"], inputs)
    old = program.clone()
    assert {choice.note for choice in lower_operators(old, (8, 0)).values()} == {"this GPU has no e4m3"}
    assert not any("paretoc_triton" in str(n.target) for n in old.graph.nodes)


def test_float64_is_refused_which_is_said():
    inputs = (torch.randn(2, 6, 8).double(), torch.ones(6, 6).tril().bool())
    executable, program, found = lowered(Grouped().eval().double(), ["quantize_cache:int8"], inputs)
    assert found == [] and torch.equal(executable.run(list(inputs))[0], program.run(list(inputs))[0])
    assert "no kernel reads attention in torch.float64" in {row.note for row in executable.explain()}


def test_heads_that_are_too_wide_are_refused_which_is_said(monkeypatch):
    monkeypatch.setattr("paretoc.backends.triton.kernels.attention.MAX_WIDTH", 2)
    executable, *_ = lowered(Heads("plain").eval(), [], (torch.randn(2, 6, 8), torch.randn(2, 1, 1, 6)))
    assert "no kernel for heads of width 4" in {row.note for row in executable.explain()}
