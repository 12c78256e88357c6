"""Codes of a key-value cache against the dialect's rounding, rerotated keys against keys rotated at their new place."""

from __future__ import annotations

import pytest
import torch
from paretoc.backends.triton.kernels.cache import decode_cache, quantize_cache, rerotate, rerotate_codes
from paretoc.backends.triton.kernels.launch import DTYPES
from paretoc.compiler.dialect.activations import reference_fake_quantize_dynamic
from torch import Tensor

CODES = ["int8", "int5", "int4", "int2", "e4m3", "e5m2"]


def keys(B: int, G: int, T: int, D: int) -> Tensor:
    """As a projection leaves them, heads behind tokens; one token is zeros, the others differ in size."""
    x = torch.randn(B, T, G, D) * torch.logspace(-6, 3, T).reshape(T, 1, 1)
    x[:, T // 2] = 0
    return x.transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_what_is_decoded_is_what_the_dialect_rounds_to(code, dtype):
    x = keys(2, 3, 7, 20).to(dtype)
    codes, scales = quantize_cache(x, code)
    assert codes.shape == (2, 3, 7, 10 if code in ("int4", "int2") else 20) and codes.itemsize == 1
    expected = reference_fake_quantize_dynamic(x, "token", code)
    found = decode_cache(codes, scales, code, torch.float32)
    assert torch.equal(found.to(dtype), expected)
    if dtype != torch.bfloat16:  # to which Triton's interpreter truncates
        assert torch.equal(decode_cache(codes, scales, code, dtype), expected)
    scales[0, 0, 0] *= 1.5
    assert not torch.equal(decode_cache(codes, scales, code, torch.float32).to(dtype), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 2, 130, 64), (2, 1, 5, 128)])
def test_odd_sizes(shape):
    x = keys(*shape)
    for code in ("int8", "int4"):
        expected = reference_fake_quantize_dynamic(x, "token", code)
        assert torch.equal(decode_cache(*quantize_cache(x, code), code, x.dtype), expected)


def test_any_strides():
    x = torch.randn(2, 20, 3, 7).permute(0, 2, 3, 1)
    expected = reference_fake_quantize_dynamic(x, "token", "int8")
    assert torch.equal(decode_cache(*quantize_cache(x, "int8"), "int8", x.dtype), expected)


def rotated(x: Tensor, positions: Tensor, frequencies: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding, as a product of complex numbers, float64."""
    R = 2 * len(frequencies)
    turning = x[..., :R].double()
    pairs = turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).transpose(-1, -2)
    angles = positions.double().unsqueeze(-1) * frequencies.double()
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_real(turned)
    turned = pairs.flatten(-2) if interleaved else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, x[..., R:].double()], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("D", "R"), [(16, 16), (20, 12)])
def test_keys_turn_to_their_new_positions(near, D, R, interleaved, dtype):
    raw, frequencies = torch.randn(2, 3, 9, D), 1e4 ** -(torch.arange(R // 2) / (R / 2))
    old, new = torch.arange(9) + 5, torch.arange(9) + torch.tensor([5, 5, 5, 2, 2, 2, 2, 4000, 4000])
    cached = rotated(raw, old, frequencies, interleaved).to(dtype)
    y = rerotate(cached, new - old, frequencies, interleaved)
    # what the cache has been rounded to, and the result
    near(y, rotated(raw, new, frequencies, interleaved), 3 * torch.finfo(dtype).eps * raw.abs().max())
    wrong = rotated(raw, old, frequencies, interleaved)
    with pytest.raises(AssertionError, match="more than allowed"):
        near(y, wrong, 3 * torch.finfo(dtype).eps * raw.abs().max())


def test_each_row_of_a_batch_may_move_otherwise(near):
    raw, frequencies = keys(2, 3, 4, 8).clamp(-2, 2), torch.tensor([1.0, 0.1, 0.01, 0.001])
    shift = torch.tensor([[0, 0, -3, -3], [7, 8, 9, 10]])
    expected = rotated(raw, shift.unsqueeze(1), frequencies, False)
    near(rerotate(raw, shift, frequencies), expected, 1e-6 * raw.abs().max())


@pytest.mark.parametrize("code", ["int8", "int4", "e4m3"])
def test_codes_turn_without_a_dense_copy(near, code):
    x, frequencies, shift = torch.randn(2, 3, 5, 16), 10.0 ** -torch.arange(8), torch.tensor([0, 1, -2, 30, 4])
    codes, scales = quantize_cache(x, code)
    dense = rerotate(decode_cache(codes, scales, code, torch.float32), shift, frequencies)
    found = decode_cache(*rerotate_codes(codes, scales, code, shift, frequencies), code, torch.float32)
    expected = reference_fake_quantize_dynamic(dense, "token", code)
    near(found, expected, 1e-6 * x.abs().max())
    assert torch.equal(found[:, :, 0], decode_cache(codes, scales, code, torch.float32)[:, :, 0])  # no shift


def test_the_shape_rules_agree():
    x, shift, frequencies = torch.randn(2, 3, 4, 8), torch.arange(4), torch.rand(4)
    codes, scales = quantize_cache(x, "int4")
    for name, arguments in (
        ("quantize_cache", (x, "int4")),
        ("decode_cache", (codes, scales, "int4", torch.float16)),
        ("rerotate", (x.transpose(1, 2).contiguous().transpose(1, 2), shift, frequencies)),
        ("rerotate_codes", (codes, scales, "int4", shift, frequencies)),
    ):
        overload = getattr(torch.ops.paretoc_triton, name).default
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
