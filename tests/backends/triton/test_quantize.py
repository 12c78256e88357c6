"""Activation quantisers against those of the dialect."""

from __future__ import annotations

import pytest
import torch
from paretoc.backends.triton.kernels.launch import DTYPES
from paretoc.backends.triton.kernels.quantize import (
    quantize_range,
    quantize_tokens,
    round_range,
    round_tokens,
    tensor_range,
)
from paretoc.backends.triton.kernels.quantized import dequantized
from paretoc.compiler.dialect.activations import (
    FLOATS,
    group_of,
    reference_fake_quantize,
    reference_fake_quantize_dynamic,
)
from torch.nn import functional as F

CODES = ["int8", "int5", "int2", "e4m3", "e5m2"]


def tokens(M: int, K: int) -> torch.Tensor:
    """Tokens of very different sizes, one of zeros, one with ties half-way between two codes."""
    x = torch.randn(M, K) * torch.logspace(-20, 3, M).unsqueeze(1)
    x[0] = 0
    x[1] = torch.arange(K).remainder(255).sub(127) / 2
    x[1, 0] = 127
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(("K", "group"), [(1, 0), (45, 0), (256, 0), (96, 32), (48, 16), (64, 64)])
def test_codes_of_tokens_and_groups_are_those_of_the_dialect(code, dtype, K, group):
    x = tokens(7, K).to(dtype)
    codes, scales = quantize_tokens(x, code, group)
    assert codes.dtype == FLOATS.get(code, torch.int8) and codes.shape == x.shape
    assert scales.shape == (7, K // group if group else 1)
    expected = reference_fake_quantize_dynamic(x, f"group{group}" if group else "token", code)
    assert torch.equal(dequantized(codes, scales, None, 8).to(dtype), expected)


@pytest.mark.parametrize(("code", "granularity"), [("int8", "token"), ("e4m3", "token"), ("int4", "group32")])
def test_rounded_tokens_are_those_of_the_dialect(code, granularity):
    x = tokens(10, 96).reshape(2, 5, 96).transpose(0, 1)
    y = round_tokens(x, code, group_of(granularity))
    assert torch.equal(y, reference_fake_quantize_dynamic(x, granularity, code))


def test_rounded_tensors_are_those_of_the_dialect():
    x = tokens(7, 200).half()
    assert torch.equal(round_range(x, *tensor_range(x, 4), 4), reference_fake_quantize_dynamic(x, "tensor", "int4"))
    scale, zero = torch.tensor(0.03), torch.tensor(100, dtype=torch.uint8)
    assert torch.equal(round_range(x, scale, zero, 8), reference_fake_quantize(x, scale, zero))


@pytest.mark.parametrize("x", [torch.randn(2, 3, 20), torch.randn(20, 3).T, torch.randn(3, 40)[:, ::2]])
def test_activations_of_any_strides(x):
    codes, scales = quantize_tokens(x, "int8")
    dequantised = codes * scales.reshape(*x.shape[:-1], 1)
    assert torch.equal(dequantised, reference_fake_quantize_dynamic(x, "token"))
    codes = quantize_range(x, *tensor_range(x, 8), 8)
    assert codes.shape == x.shape and codes.is_contiguous()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_front(near, kind, affine, dtype):
    x = (torch.randn(5, 90) * 3 + 1).to(dtype)
    weight, bias = (torch.randn(90).to(dtype) if affine else None for _ in range(2))
    if kind == "layer":
        normalised = F.layer_norm(x, (90,), weight, bias, 1e-5)
    else:
        bias, normalised = None, F.rms_norm(x, (90,), weight, 1e-5)
    codes, scales = quantize_tokens(x, "int8", 0, kind, weight, bias, 1e-5)
    expected, expected_scales = quantize_tokens(normalised, "int8")
    # the sums of the norm round otherwise, and Triton's interpreter truncates to bfloat16: a code is off by a step
    near(scales, expected_scales, expected_scales * 2 * torch.finfo(dtype).eps)
    near(codes, expected, 1)
    assert (codes != expected).float().mean() < (0.01 if dtype == torch.float32 else 0.2)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def same_codes(codes: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """A code in a hundred is the next one, where an activation rounds otherwise; Triton's interpreter truncates to
    bfloat16, for an activation and again for a product: then 2⁻⁶ of 255 codes."""
    apart = (codes.float() - expected.float()).abs()
    if dtype == torch.bfloat16:
        return bool(apart.max() <= 4)
    return bool(apart.max() <= 1) and float((apart > 0).float().mean()) <= 0.01


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("front", ACTIVATIONS)
def test_an_activation_in_front(near, front, gated, dtype):
    both = (torch.randn(3, 2, 2 * 90) * 3).to(dtype)
    x, gate = both[..., :90], both[..., 90:] if gated else None  # the halves of one projection: strided
    active = ACTIVATIONS[front](x)
    active = active if gate is None else active * gate
    codes, scales = quantize_tokens(x, "int8", 0, front, gate=gate)
    expected, expected_scales = quantize_tokens(active, "int8")
    near(scales, expected_scales, expected_scales * 3 * torch.finfo(dtype).eps)
    assert same_codes(codes, expected, dtype)
    scale, zero = tensor_range(active, 8)
    static, expected = quantize_range(x, scale, zero, 8, front, gate), quantize_range(active, scale, zero, 8)
    assert same_codes(static, expected, dtype)
    other = next(name for name in ACTIVATIONS if name not in (front, "gelu", "gelu_tanh"))
    assert not same_codes(quantize_range(x, scale, zero, 8, other, gate), expected, dtype)


def test_the_two_gelus_are_told_apart():
    x, scale, zero = torch.linspace(-5, -2.6, 2000), torch.tensor(1e-4), torch.tensor(200)  # they differ by 4e-4 at −3
    found = {front: quantize_range(x, scale, zero, 8, front).float() for front in ("gelu", "gelu_tanh")}
    for front, codes in found.items():
        expected = quantize_range(ACTIVATIONS[front](x), scale, zero, 8).float()
        assert (codes - expected).abs().max() <= 1
    assert (found["gelu"] - found["gelu_tanh"]).abs().max() > 1


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_a_tensor_are_those_of_the_dialect(bits, dtype):
    x = tokens(7, 200).to(dtype)
    scale, zero = tensor_range(x, bits)
    codes = quantize_range(x, scale, zero, bits)
    dequantised = (codes.float() + (1 << bits - 1) - zero) * scale
    assert torch.equal(dequantised.to(dtype), reference_fake_quantize_dynamic(x, "tensor", f"int{bits}"))


def test_codes_of_a_measured_range_are_those_of_the_dialect():
    x = torch.cat([torch.randn(1500) * 3, torch.tensor([1e30, -1e30, torch.inf])])
    scale, zero = torch.tensor(0.03), torch.tensor(100, dtype=torch.uint8)
    codes = quantize_range(x, scale, zero, 8)
    assert torch.equal((codes.float() + 128 - 100) * scale, reference_fake_quantize(x, scale, zero))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("quantize_tokens", (torch.randn(2, 3, 8), "int8")),
        ("quantize_tokens", (torch.randn(4, 8), "e4m3", 4, "rms", torch.ones(8), None, 1e-5)),
        ("quantize_tokens", (torch.randn(4, 8), "int8", 0, "silu", None, None, 0.0, torch.randn(4, 8))),
        ("quantize_range", (torch.randn(2, 8), torch.tensor(0.1), torch.tensor(3.0), 8)),
        ("tensor_range", (torch.randn(2, 8), 8)),
        ("round_tokens", (torch.randn(2, 3, 8).transpose(0, 1), "int8", 4)),
        ("round_range", (torch.randn(2, 8), torch.tensor(0.1), torch.tensor(3.0), 8)),
    ],
)
def test_the_shape_rules_agree(operator, arguments):
    overload = getattr(torch.ops.paretoc_triton, operator).default
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
