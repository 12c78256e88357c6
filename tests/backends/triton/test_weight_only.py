"""Linears on encoded weights against float64 products with the decoded weight."""

from __future__ import annotations

from itertools import combinations

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton.kernels.launch import DTYPES, PROGRAMS, split_k
from paretoc.backends.triton.kernels.weight_only import tilings, weight_only_linear
from paretoc.backends.triton.kernels.weights import fixed_arrays, weight_format
from torch import Tensor

#: encodings, each with a width that no block divides
CASES = [
    ("Affine(8)", 45),
    ("Affine(4)", 45),
    ("Affine(2)", 45),
    ("Affine(4, 32)", 160),
    ("Affine(4, -1)", 90),
    ("Affine(8, 16, symmetric=False)", 80),
    ("Affine(4, 16, symmetric=False)", 80),
    ("Affine(2, 32, symmetric=False, scale='float16')", 96),
    ("Affine(4, 128, symmetric=False, zero='float')", 256),
    ("Affine(4, 0, symmetric=False)", 45),
    ("Affine(8, 32, scale='e8m0')", 64),
    ("Float('e2m1', 32, 'e8m0')", 96),
    ("Float('e2m1', 16, 'e4m3')", 80),
    ("Float('e2m1', 32, 'e8m0-ceil')", 64),
    ("Float('e2m1', 16, 'shift')", 80),
    ("Float('e4m3')", 45),
    ("Float('e5m2', 32)", 96),
    ("Float('e3m4')", 45),
    ("NF4(64)", 192),
    ("Codebook(4)", 45),
    ("Codebook(8, 16)", 48),
    ("Codebook(2, per='row', scale='none')", 45),
    ("Codebook(4, 16, per='row')", 48),
    ("Additive(1, 8, 8)", 104),
    ("Additive(2, 8, 4)", 76),
    ("Dense('float16')", 45),
    ("NM(2, 4)", 44),
    ("NM(2, 4, values=Affine(4, 32))", 192),
    ("NM(2, 4, values=Affine(8, symmetric=False))", 44),
    ("NM(2, 4, values=Codebook(4))", 300),
    ("NM(1, 4)", 44),
    ("NM(1, 2, values=Affine(4, 32))", 192),
    ("NM(1, 8, values=Affine(8, symmetric=False))", 88),
    ("NM(4, 8, values=Affine(4, 32))", 192),
    ("NM(2, 8, values=Codebook(4))", 304),
    ("NM(2, 16)", 48),
]


def encoded(text: str, N: int, K: int) -> tuple[list[Tensor], str, Tensor]:
    """(arrays for the operator, the encoding's text, the decoded weight) of a random weight with a row of zeros."""
    encoding = pc.parse_encoding(text)
    weight = torch.randn(N, K) * torch.logspace(-2, 1, N).unsqueeze(1)
    weight[N // 2] = 0
    arrays = encoding.encode(weight)
    stored = [*arrays.values(), *fixed_arrays(encoding, arrays).values()]
    return stored, str(encoding), encoding.decode(arrays, (N, K))


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far one in the type of x may be from it.

    A weight is rounded to the type of x (half a unit), then the output (half a unit); float32 sums add what is small
    beside that, in float32 itself a few units.
    """
    exact, size = (f(x.double()) @ f(weight.double()).T for f in (lambda v: v, torch.abs))
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    return exact, size * torch.finfo(x.dtype).eps * (4 if x.dtype == torch.float32 else 1)


@pytest.mark.parametrize(("M", "dtype"), [(1, torch.float32), (5, torch.float16)], ids=["gemv", "matmul"])
@pytest.mark.parametrize(("text", "K"), CASES, ids=[text for text, _ in CASES])
def test_every_format(near, text, K, M, dtype):
    arrays, text, weight = encoded(text, 37, K)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(37).to(dtype)
    near(weight_only_linear(x, arrays, text, 37, bias), *expected(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "N", "K", "rank", "text"),
    [
        (1, 9, 64, 1, "Affine(4, 32)"),
        (1, 33, 4096, 20, "Affine(8)"),
        (5, 37, 96, 5, "Affine(4)"),
        (17, 9, 64, 70, "NF4(64)"),
    ],
)
def test_a_low_rank_correction(near, M, N, K, rank, text, dtype):
    arrays, text, weight = encoded(text, N, K)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    low, up = torch.randn(M, rank).to(dtype), torch.randn(N, rank).to(dtype)
    y = weight_only_linear(x, arrays, text, N, bias, low, up)
    exact, size = expected(torch.cat([x, low], 1), torch.cat([weight, up.float()], 1), bias)
    near(y, exact, size * (2 if dtype == torch.bfloat16 else 1))  # two products, rounded once
    with pytest.raises(AssertionError, match="more than allowed"):
        near(y, *expected(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 5])
def test_every_type(near, M, dtype):
    test_every_format(near, "Affine(4, 32, symmetric=False)", 96, M, dtype)


@pytest.mark.parametrize("M", [1, 2, 16, 17, 65])
@pytest.mark.parametrize(("N", "K"), [(1, 32), (130, 672)])
def test_every_class_of_shapes(near, M, N, K):
    arrays, text, weight = encoded("Affine(4, 32)", N, K)
    x = torch.randn(M, K)
    near(weight_only_linear(x, arrays, text, N, None), *expected(x, weight, None))


@pytest.mark.parametrize(("M", "text", "K"), [(1, "Affine(8, 512)", 1024), (17, "Affine(4, 128)", 384)])
def test_groups_longer_than_a_step(near, M, text, K):
    test_every_format(near, text, K, M, torch.float32)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 16)])
def test_every_pattern_of_kept_places(n, m):
    patterns = list(combinations(range(m), n))
    weight = torch.zeros(len(patterns), 8, m)
    for row, places in enumerate(patterns):
        weight[row, :, places] = torch.arange(1.0, 8 * n + 1).reshape(8, n)
    weight, encoding = weight.flatten(1), pc.NM(n, m)
    arrays = encoding.encode(weight)
    operands = [*arrays.values(), *fixed_arrays(encoding, arrays).values()]
    y = weight_only_linear(torch.eye(8 * m), operands, str(encoding), len(patterns), None)
    assert torch.equal(y.T, weight)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 64),
        torch.randn(64, 3).T,
        torch.randn(1, 128)[:, ::2],
        torch.randn(4, 5, 64).transpose(0, 1),
        torch.randn(0, 64),
        torch.randn(64),
    ],
    ids=["3-D", "transposed", "every other", "batch behind", "no tokens", "one vector"],
)
def test_activations_of_any_strides(near, x):
    arrays, text, weight = encoded("Affine(4, 32)", 9, 64)
    near(weight_only_linear(x, arrays, text, 9, None), *expected(x, weight, None))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, which interprets
def test_infinity_and_nan_stay_in_their_row():
    arrays, text, _ = encoded("Affine(4)", 9, 45)
    x = torch.randn(3, 45)
    x[0, 44], x[1, 0] = torch.inf, torch.nan
    y = weight_only_linear(x, arrays, text, 9, None)
    assert not y[0, [0, 8]].isfinite().any() and y[1].isnan().all() and y[2].isfinite().all()


def test_the_comparison_sees_one_wrong_code(near):
    arrays, text, weight = encoded("Affine(4, 32)", 9, 64)
    x = torch.randn(3, 64)
    arrays[0][2, 7] ^= 1
    with pytest.raises(AssertionError, match="more than allowed"):
        near(weight_only_linear(x, arrays, text, 9, None), *expected(x, weight, None))


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Affine(3, 32)", "codes of 3 bits do not fill a byte"),
        ("Affine(4, 24)", "groups of 24 are no power of two"),
        ("Float('e8m0')", "codes of 9 bits"),
        ("Float('e6m1')", "float16 does not hold every number of e6m1"),
        ("Binary()", "no Triton kernel reads Binary"),
        ("Additive(1, 16, 8)", "1 codebooks of 16 bits"),
        ("Additive(8, 8, 16)", "do not fit"),
        ("NM(3, 4)", "no Triton kernel reads 3:4 of Dense"),
        ("NM(8, 16)", "no Triton kernel reads 8:16 of Dense"),
        ("NM(2, 4, values=Affine(3))", "codes of 3 bits"),
    ],
)
def test_a_refusal_says_why(text, reason):
    found = weight_format(text)
    assert isinstance(found, str) and reason in found


def test_a_type_that_no_kernel_reads_is_refused(refused):
    arrays, text, _ = encoded("Affine(8)", 4, 8)
    x = torch.randn(2, 8, dtype=torch.float64)
    refused(pc.LoweringError, "do not read torch.float64", lambda: weight_only_linear(x, arrays, text, 4, None))


def test_the_shape_rule_agrees():
    arrays, text, _ = encoded("Affine(8)", 4, 8)
    torch.library.opcheck(
        torch.ops.paretoc_triton.weight_only_linear.default,
        (torch.randn(2, 3, 8), arrays, text, 4, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_few_outputs_share_their_sums():
    assert split_k(programs=PROGRAMS, steps=64) == 1
    assert split_k(programs=PROGRAMS // 4, steps=64) == 4
    assert split_k(programs=1, steps=3) == 3
    formats = weight_format("Affine(4, 32)")
    assert tilings(1, 4096, 4096, formats)[0].split == 1 and tilings(16, 1024, 4096, formats)[0].split > 1
