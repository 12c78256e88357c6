"""Codes times codes against float64 products of what the dialect makes of both."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton.kernels.quantize import quantize_range, quantize_tokens, tensor_range
from paretoc.backends.triton.kernels.quantized import quantized_format, quantized_linear
from paretoc.compiler.dialect.activations import group_of, reference_fake_quantize_dynamic
from torch import Tensor

CASES = [
    ("Affine(8)", 45, "int8"),
    ("Affine(8, -1)", 45, "int8"),
    ("Affine(4)", 45, "int8"),
    ("Affine(4, 32)", 160, "int8"),
    ("Affine(4, 32)", 96, "int4"),
    ("Affine(2, 64, symmetric=False)", 192, "int8"),
    ("Affine(4, 0, symmetric=False)", 45, "int8"),
    ("Affine(8, 32, scale='e8m0')", 96, "int8"),
    ("Affine(8, 256)", 512, "int8"),
]
FLOAT8 = [("Float('e4m3')", 45, "e4m3"), ("Float('e5m2')", 45, "e5m2"), ("Float('e4m3', 32, 'e8m0')", 96, "e4m3")]


def multiplied(x: Tensor, text: str, code: str, granularity: str, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the kernel's product with a random weight and bias, the same in float64)."""
    encoding = pc.parse_encoding(text)
    weight, bias = torch.randn(N, x.shape[-1]), torch.randn(N)
    arrays = encoding.encode(weight)
    bits = int(code[3:]) if granularity == "tensor" else 8
    if granularity != "tensor":
        codes, scale, zero = *quantize_tokens(x, code, group_of(granularity)), None
    else:
        scale, zero = tensor_range(x, bits)
        codes = quantize_range(x, scale, zero, bits)
    y = quantized_linear(codes, scale, zero, bits, list(arrays.values()), str(encoding), N, bias, dtype)
    rounded = reference_fake_quantize_dynamic(x, granularity, code).double()
    return y, rounded @ encoding.decode(arrays, (N, x.shape[-1])).double().T + bias.double()


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize(("text", "K", "code"), CASES, ids=[f"{t} {c}" for t, _, c in CASES])
def test_integers(near, text, K, code, M, granularity):
    x = torch.randn(M, K) + 0.5
    y, expected = multiplied(x, text, code, granularity, 37, torch.float32)
    near(y, expected, 1e-5 * expected.abs().max())  # exact integers, then a few float32 roundings


@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize(("text", "K", "code"), FLOAT8, ids=[text for text, _, _ in FLOAT8])
def test_float8(near, text, K, code, M):
    y, expected = multiplied(torch.randn(M, K), text, code, "token", 37, torch.float32)
    near(y, expected, 1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("text", "K", "code", "granularity"),
    [
        ("Affine(4, 32)", 160, "int8", "group32"),
        ("Affine(4, 64)", 192, "int4", "group32"),
        ("Affine(8)", 96, "int8", "group32"),
        ("Affine(2, 32, symmetric=False)", 256, "int8", "group128"),
        ("Affine(8)", 32, "int8", "group32"),
        ("Float('e4m3')", 128, "e4m3", "group64"),
    ],
)
@pytest.mark.parametrize("M", [1, 17])
def test_groups_of_activations(near, text, K, code, granularity, M):
    x = torch.randn(M, K) * torch.logspace(-2, 2, K)
    y, expected = multiplied(x, text, code, granularity, 37, torch.float32)
    near(y, expected, 1e-5 * expected.abs().max())


@pytest.mark.parametrize(("M", "N", "K"), [(17, 130, 288), (65, 70, 96), (130, 129, 33)])
def test_every_class_of_shapes(near, M, N, K):
    y, expected = multiplied(torch.randn(M, K), "Affine(8)", "int8", "token", N, torch.float32)
    near(y, expected, 1e-5 * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_output_has_the_type_that_is_asked_for(near, dtype):
    y, expected = multiplied(torch.randn(2, 3, 64), "Affine(8)", "int8", "token", 9, dtype)
    assert y.dtype == dtype
    near(y, expected, torch.finfo(dtype).eps * expected.abs().max())


def test_the_largest_sums_do_not_wrap():
    K = 4096
    codes, ones = torch.full((1, K), 127, dtype=torch.int8), torch.ones(1, 1)
    arrays = [torch.full((3, K), 255, dtype=torch.uint8), torch.ones(3, 1)]
    y = quantized_linear(codes, ones, None, 8, arrays, "Affine(8)", 3, None, torch.float32)
    assert torch.equal(y, torch.full((1, 3), 127.0 * 127 * K))


def test_the_comparison_sees_a_wrong_zero_point(near):
    x, N = torch.randn(3, 45) + 0.5, 9
    arrays = pc.parse_encoding("Affine(8)").encode(torch.randn(N, 45))
    scale, zero = tensor_range(x, 8)
    codes = quantize_range(x, scale, zero, 8)
    y, wrong = (
        quantized_linear(codes, scale, z, 8, list(arrays.values()), "Affine(8)", N, None, torch.float32)
        for z in (zero, zero + 1)
    )
    with pytest.raises(AssertionError, match="more than allowed"):
        near(wrong, y, 1e-5 * y.abs().max())


@pytest.mark.parametrize(
    ("text", "code", "reason"),
    [
        ("Affine(8, 0, symmetric=False)", "int8", "8-bit weights less their zero point need 9 bits"),
        ("Affine(4, 32, symmetric=False, zero='float')", "int8", "the weights are no integers"),
        ("NF4(64)", "int8", "the weights are no integers"),
        ("Affine(4, 16)", "int8", "more than a group of 16"),
        ("Affine(8)", "e4m3", "the weights are not e4m3"),
        ("Float('e5m2')", "e4m3", "the weights are not e4m3"),
        ("Affine(3)", "int8", "codes of 3 bits"),
        ("NM(2, 4, values=Affine(8))", "int8", "2:4 sparse"),
    ],
)
def test_a_refusal_of_weights_says_why(text, code, reason):
    found = quantized_format(text, code)
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize(("group", "reason"), [(16, "more than a group of 16"), (96, "groups of 96 are no power of")])
def test_a_refusal_of_groups_says_why(group, reason):
    found = quantized_format("Affine(8)", "int8", group)
    assert isinstance(found, str) and reason in found


def test_the_shape_rule_agrees():
    arrays = list(pc.parse_encoding("Affine(8)").encode(torch.randn(4, 8)).values())
    codes, scales = quantize_tokens(torch.randn(2, 3, 8), "int8")
    torch.library.opcheck(
        torch.ops.paretoc_triton.quantized_linear.default,
        (codes, scales, None, 8, arrays, "Affine(8)", 4, None, torch.float16),
        test_utils=("test_schema", "test_faketensor"),
    )
