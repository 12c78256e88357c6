"""Orthogonal matrices: each Hadamard construction against its definition, rotations against what they promise."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from paretoc.compiler.orthogonal import factors, hadamard, has_hadamard, rotation
from torch import Tensor


def is_hadamard(matrix: Tensor) -> bool:
    n = len(matrix)
    return (
        matrix.shape == (n, n) and bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, n * torch.eye(n))
    )


def legendre(a: int, q: int) -> int:
    """χ(a) for a prime q, by Euler's criterion."""
    power = pow(a % q, (q - 1) // 2, q)
    return -1 if power == q - 1 else power


def test_the_check_rejects_what_is_no_hadamard_matrix():
    good = torch.tensor([[1.0, 1], [1, -1]])
    assert is_hadamard(good)
    assert not is_hadamard(torch.ones(2, 2))
    assert not is_hadamard(good / 2)
    assert not is_hadamard(torch.kron(good, good)[:2])


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 52, 60, 76, 96, 100, 108, 140, 344, 768, 896])
def test_every_construction(n):
    # 28 = 3³ + 1, 52 = 2·(5² + 1), 100 = 2·(7² + 1) and 344 = 7³ + 1 need fields of prime powers
    assert has_hadamard(n)
    assert is_hadamard(hadamard(n).float())


def test_which_orders_are_known():
    """Sylvester and Paley leave out these multiples of four up to 260, as the tables say; all others do not exist."""
    assert [n for n in range(4, 261, 4) if not has_hadamard(n)] == [92, 116, 156, 172, 184, 188, 232, 236, 260]
    assert not any(has_hadamard(n) for n in range(3, 261) if n % 4)
    assert hadamard(92) is None
    assert hadamard(7) is None


def test_powers_of_two_are_those_of_scipy():
    for n in (1, 2, 8, 64):
        assert torch.equal(hadamard(n), torch.from_numpy(scipy.linalg.hadamard(n, dtype=float)))


@pytest.mark.parametrize("q", [11, 19, 43])
def test_paley_with_a_prime_by_euler(q):
    inner = hadamard(q + 1)[1:, 1:] - torch.eye(q)
    assert all(inner[i, j] == legendre(i - j, q) for i in range(q) for j in range(q))


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("n", [2, 12, 30, 64])
def test_a_rotation_is_orthogonal_and_follows_its_seed(kind, n):
    matrix = rotation(n, kind, 3)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(matrix, rotation(n, kind, 3))
    assert not torch.equal(matrix, rotation(n, kind, 5))


def test_an_outlier_is_spread_over_all_channels():
    """max/rms of a one-hot vector falls from √n to 1; random signs save the constant vector, which H alone makes one
    outlier of."""

    def peak(x: Tensor) -> float:
        return float(x.abs().max() / x.square().mean().sqrt())

    n = 64
    outlier, constant = torch.eye(n, dtype=torch.float64)[5], torch.ones(n, dtype=torch.float64)
    assert peak(outlier) == n**0.5
    assert abs(peak(outlier @ rotation(n, "hadamard", 0)) - 1) < 1e-9
    assert peak(outlier @ rotation(n, "random", 0)) < 4
    assert peak(constant @ hadamard(n)) == n**0.5
    assert peak(constant @ rotation(n, "hadamard", 0)) < 4


def test_random_rotations_are_uniform():
    """QR alone is not: LAPACK's first column has a sign of its own. The mean of an entry is 0, its variance 1/n."""
    entries = torch.stack([rotation(4, "random", seed)[0, 0] for seed in range(400)])
    assert abs(entries.mean()) < 4 * 0.5 / 20
    assert abs(entries.square().mean() - 0.25) < 0.08
    alone = torch.stack([torch.linalg.qr(torch.randn(4, 4)).Q[0, 0] for _ in range(400)])
    assert abs(alone.mean()) > 0.3


@pytest.mark.parametrize(
    ("n", "pair"), [(64, (8, 8)), (96, (8, 12)), (11008, (32, 344)), (14336, (112, 128)), (30, (2, 15)), (7, (1, 7))]
)
def test_factors_of_a_kronecker_product(n, pair):
    assert factors(n) == pair
