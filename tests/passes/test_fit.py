"""Fitters: each against a slow search of its own, what they refuse, and that they beat or equal rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import NM, Affine, Dense
from paretoc.compiler.protocols import Fitter
from paretoc.compiler.registry import registry
from paretoc.passes.fit import Mse, Rtn

quick = settings(max_examples=40, deadline=None)


def _error(encoding, arrays, weight) -> torch.Tensor:
    """Squared error of each group of the innermost integer encoding, float64."""
    difference = encoding.decode(arrays, tuple(weight.shape)).double() - weight.double()
    return difference.reshape(encoding.grid(tuple(weight.shape))).square().sum(-1)


def slow_mse(group: np.ndarray, encoding: Affine) -> tuple[float, list[int]]:
    """(error, codes) of the best of 31 ranges of one group, tried one after the other, in float32."""
    best = (np.inf, [])
    for step in range(31):
        shrink = np.float32(1 - step / 50)
        low, high = min(0, group.min()) * shrink, max(0, group.max()) * shrink
        if encoding.symmetric:
            peak = max(-low, high)
            scale, zero = (peak / np.float32(encoding.levels) if peak > 0 else np.float32(1)), 0
            least = -encoding.levels
        else:
            low, high = (np.float32(-1), np.float32(1)) if low == high else (low, high)
            scale, least = (high - low) / np.float32(encoding.levels), 0
            zero = np.rint(-low / scale)
        codes = np.clip(np.rint(group / scale) + zero, least, encoding.levels)
        error = float(np.square((codes - zero) * scale - group).sum())
        if error < best[0] * (1 - 1e-5):
            best = (error, [int(c) for c in codes])
    return best


@pytest.mark.parametrize(
    "encoding", [Affine(4), Affine(3, 8), Affine(4, -1), Affine(2, 8, False), Affine(4, 0, False)], ids=str
)
def test_mse_equals_a_slow_search(encoding):
    weight = torch.randn(3, 16) ** 3  # long tails: clipping pays
    arrays = Mse().fit(encoding, weight)
    groups = weight.reshape(-1, weight.numel() if encoding.group == -1 else encoding.group or 16).numpy()
    slow = [slow_mse(group, encoding) for group in groups]
    got = _error(encoding, arrays, weight).reshape(-1)
    torch.testing.assert_close(got, torch.tensor([e for e, _ in slow]).double(), rtol=1e-4, atol=1e-9)


def test_clipping_pays_on_a_gaussian_in_three_bits():
    weight = torch.randn(8, 256)
    encoding = Affine(3)
    rounded, fitted = (_error(encoding, fitter.fit(encoding, weight), weight) for fitter in (Rtn(), Mse()))
    assert (fitted <= rounded * (1 + 1e-6)).all()
    assert fitted.sum() < 0.9 * rounded.sum()


@quick
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([-1, 0, 4]),
    symmetric=st.booleans(),
    values=st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16),
)
def test_mse_is_never_worse_than_rounding(bits, group, symmetric, values):
    weight, encoding = torch.tensor(values).reshape(2, 8), Affine(bits, group, symmetric)
    rounded = _error(encoding, Rtn().fit(encoding, weight), weight)
    fitted = _error(encoding, Mse().fit(encoding, weight), weight)
    assert torch.isfinite(fitted).all()
    assert (fitted <= rounded * (1 + 1e-4) + 1e-9).all()  # chosen in float32, compared in float64


@pytest.mark.parametrize(
    "encoding", [Affine(4, 8), Affine(8, 0, False), Dense("float16"), NM(2, 4, Affine(8))], ids=str
)
def test_rtn_is_the_rounding_of_the_encoding(encoding):
    weight = torch.randn(4, 16)
    got, want = Rtn().fit(encoding, weight), encoding.encode(weight)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("fitter", [Rtn(), Mse()], ids=lambda f: f.name)
@pytest.mark.parametrize("encoding", [Affine(4), Affine(4, 8, False), Affine(8, -1)], ids=str)
def test_the_arrays_have_the_layout_of_the_encoding(fitter, encoding):
    arrays = fitter.fit(encoding, torch.randn(4, 16))
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == encoding.layout((4, 16))


def test_a_fitter_fits_the_values_inside_a_sparsity_pattern():
    weight, encoding = torch.randn(4, 16) ** 3, NM(2, 4, Affine(4))
    arrays = encoding.encode(weight, Mse().fit)
    kept = weight[encoding.mask(weight)].reshape(4, 8)
    want = Mse().fit(Affine(4), kept)
    assert all(torch.equal(arrays[f"values.{k}"], want[k]) for k in want)
    assert not torch.equal(arrays["values.scale"], encoding.encode(weight)["values.scale"])


def test_a_pair_that_does_not_go_together_is_refused():
    assert Mse().refuse(Affine(4)) is None
    assert Rtn().refuse(Dense()) is None
    assert Mse().refuse(Dense()) == "fitter 'mse' searches the ranges of scales; Dense(dtype='float32') has none"


def test_the_fitters_are_registered():
    assert registry().fitter("mse") == Mse()
    assert registry().fitter("rtn") == Rtn()
    assert isinstance(Mse(), Fitter)
    assert isinstance(Rtn(), Fitter)
