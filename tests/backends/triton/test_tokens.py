"""Matching and merging against the dialect's definitions."""

from __future__ import annotations

import pytest
import torch
from paretoc.backends.triton.kernels.launch import DTYPES
from paretoc.backends.triton.kernels.tokens import bipartite_match, merge_tokens
from paretoc.compiler.dialect.tokens import reference_bipartite_match, reference_merge_tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "D", "r", "protected"),
    [(7, 3, 2, 0), (8, 20, 3, 1), (131, 70, 60, 1), (150, 8, 10, 5), (2, 4, 1, 0), (9, 4, 0, 1)],
)
def test_the_same_pairs_are_chosen(T, D, r, protected, dtype):
    metric = torch.randn(2, T, D).to(dtype) * torch.logspace(-3, 3, T).unsqueeze(1).to(dtype)
    for found, expected in zip(
        bipartite_match(metric, r, protected), reference_bipartite_match(metric, r, protected), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_strided_metric():
    metric = torch.randn(2, 4, 21, 8).transpose(1, 2)[:, :, 1]
    assert not metric.is_contiguous()
    for found, expected in zip(bipartite_match(metric, 5, 1), reference_bipartite_match(metric, 5, 1), strict=True):
        assert torch.equal(found, expected)


def test_equal_tokens_and_tokens_of_zeros():
    metric = torch.zeros(1, 12, 4)
    metric[0, 4:] = torch.tensor([1.0, 0, 0, 0])
    _, source, destination = bipartite_match(metric, 4, 0)
    assert torch.equal(source, torch.tensor([[2, 3, 4, 5]])) and torch.equal(destination, torch.full((1, 4), 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "C", "r"), [(7, 3, 2), (30, 70, 11), (9, 16, 0)])
def test_means_are_weighted_by_size(near, T, C, r, dtype):
    x, size = torch.randn(2, T, C).to(dtype), torch.randint(1, 5, (2, T, 1)).float()
    match = reference_bipartite_match(torch.randn(2, T, 4), r, 1)
    (y, sizes), (expected, expected_sizes) = (
        merge_tokens(x, size, *match),
        reference_merge_tokens(x.double(), size, *match),
    )
    assert torch.equal(sizes, expected_sizes) and y.dtype == dtype
    near(y, expected, 2 * torch.finfo(dtype).eps * x.abs().max())


def test_many_tokens_may_move_to_one(near):
    x, size = torch.randn(1, 10, 4), torch.ones(1, 10, 1)
    match = torch.empty(1, 0, dtype=torch.int64), torch.arange(5).unsqueeze(0), torch.full((1, 5), 3)
    y, sizes = merge_tokens(x, size, *match)
    near(y[0, 3], (x[0, ::2].sum(0) + x[0, 7]) / 6, 1e-6)
    assert sizes[0, :, 0].tolist() == [1, 1, 1, 6, 1]


def test_strided_activations(near):
    x, size = torch.randn(5, 2, 12, 2).transpose(0, 1)[..., 0].transpose(1, 2), torch.ones(2, 12, 2)[..., :1]
    match = reference_bipartite_match(torch.randn(2, 12, 4), 3, 0)
    near(merge_tokens(x, size, *match)[0], reference_merge_tokens(x, size, *match)[0], 1e-6 * x.abs().max())


def test_the_shape_rules_agree():
    metric = torch.randn(2, 9, 4)
    options = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(torch.ops.paretoc_triton.bipartite_match.default, (metric, 2, 1), **options)
    arguments = (metric, torch.ones(2, 9, 1), *reference_bipartite_match(metric, 2, 1))
    torch.library.opcheck(torch.ops.paretoc_triton.merge_tokens.default, arguments, **options)
