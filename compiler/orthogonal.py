"""Orthogonal matrices that spread outliers: Hadamard where the order allows, random elsewhere. All in float64.

H has entries ±1 and H·Hᵀ = n·I. Orders 2^k: Sylvester's doubling. Paley 1933, with χ the quadratic character of the
field of q elements and J_ij = χ(i − j): I, q ≡ 3 (mod 4): order q + 1; II, q ≡ 1 (mod 4): order 2(q + 1).
Random: QR of a Gaussian matrix with the signs of R's diagonal (Stewart 1980), uniform over the orthogonal group.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from math import isqrt

import torch
from torch import Tensor

_DOUBLE = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix `[n, n]` of ±1, or None when none of the three constructions gives one of this order."""
    base = _base(n)
    if base is None:
        return None
    matrix = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base)
    while len(matrix) < n:
        matrix = torch.kron(_DOUBLE, matrix)
    return matrix


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` is a matrix."""
    return _base(n) is not None


def _base(n: int) -> int | None:
    """The order from which doubling leads to n: 1, or one of Paley's."""
    odd = n // (n & -n)
    orders = (odd << k for k in range(n.bit_length()) if odd << k <= n)
    return next((m for m in orders if m == 1 or _field(m - 1, 3) or (m % 4 == 0 and _field(m // 2 - 1, 1))), None)


def _field(q: int, residue: int) -> tuple[int, int] | None:
    """(p, d) where q = p^d is an odd prime power with that residue modulo 4."""
    if q < 3 or q % 4 != residue:
        return None
    prime = next((p for p in range(3, isqrt(q) + 1, 2) if q % p == 0), q)
    degree = next(d for d in range(1, q) if prime**d >= q)
    return (prime, degree) if prime**degree == q else None


@cache
def _paley(n: int) -> Tensor:
    eye = torch.eye(n, dtype=torch.float64)
    if _field(n - 1, 3):  # I + S with S = [[0, 1], [−1, J]] skew and S·Sᵀ = q·I
        return eye + _bordered(n - 1, -1)
    # C = [[0, 1], [1, J]] symmetric, C·Cᵀ = q·I: its ±1 become ±[[1, 1], [1, −1]], its zeros [[1, −1], [−1, −1]]
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(n // 2 - 1, 1), _DOUBLE) + torch.kron(eye[::2, ::2], zero)


def _bordered(q: int, left: int) -> Tensor:
    """[[0, 1], [left, J]] with J_ij = χ(i − j) over the field of q elements, `[q + 1, q + 1]`."""
    field = _field(q, q % 4)
    assert field is not None
    prime, degree = field
    places = prime ** torch.arange(degree)
    elements = torch.arange(q).unsqueeze(1) // places % prime  # [q, degree]: digits to the base p
    polynomials = product(range(prime), repeat=degree)
    square = next(s for tail in polynomials if (s := _squares(elements, tail, prime)) is not None)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(square * places).sum(1)] = 1
    character[0] = 0
    bordered = torch.ones(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 0], bordered[1:, 0] = 0, left
    bordered[1:, 1:] = character[((elements.unsqueeze(1) - elements) % prime * places).sum(-1)]
    return bordered


def _squares(elements: Tensor, tail: tuple[int, ...], prime: int) -> Tensor | None:
    """x² of every field element modulo the polynomial t^d + Σ tail_i t^i; None when that one is reducible.

    It is irreducible where no product of two elements other than zero is zero.
    """
    degree = len(tail)
    if degree == 1:
        return elements * elements % prime
    products = torch.zeros(len(elements), len(elements), 2 * degree - 1, dtype=torch.int64)
    for i, j in product(range(degree), repeat=2):
        products[..., i + j] += elements[:, None, i] * elements[None, :, j]
    for power in range(2 * degree - 2, degree - 1, -1):
        for i, coefficient in enumerate(tail):
            products[..., power - degree + i] -= coefficient * products[..., power]
    products = products[..., :degree] % prime
    if (products[1:, 1:] == 0).all(-1).any():
        return None
    return products.diagonal().T


def rotation(n: int, kind: str, seed: int) -> Tensor:
    """An orthogonal matrix `[n, n]`. "hadamard": a Hadamard matrix behind random signs, where there is one of this
    order; "random", and otherwise: uniform."""
    generator = torch.Generator().manual_seed(seed)
    basis = hadamard(n) if kind == "hadamard" else None
    if basis is not None:
        signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
        return signs * basis.div(n**0.5)
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    uniform: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).double()
    return uniform


def factors(n: int) -> tuple[int, int]:
    """n = a·b for a Kronecker product: both with Hadamard matrices where possible, as equal as possible."""
    pairs = [(a, n // a) for a in range(1, isqrt(n) + 1) if n % a == 0]
    return max(pairs, key=lambda p: (sum(map(has_hadamard, p)), p[0]))
