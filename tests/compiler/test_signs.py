"""Binary and ternary codes against versions of themselves written with Python loops."""

from __future__ import annotations

import math

import paretoc as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import NM, Binary, Ternary
from paretoc.passes.fit import Mse
from paretoc.testing import check_encoding

SHAPES = ((4, 64), (4, 128, 3, 3), (5, 7))
quick = settings(max_examples=60, deadline=None)
groups_of_eight = st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8)


def slow_binary(group: list[float]) -> tuple[list[int], float]:
    """XNOR-Net: the signs, and the mean magnitude."""
    return [-1 if w < 0 else 1 for w in group], sum(abs(w) for w in group) / len(group)


def slow_ternary(group: list[float]) -> tuple[list[int], float]:
    """Ternary Weight Networks: codes beyond Δ = 0.7 · mean|w|, and the mean magnitude there."""
    threshold = 0.7 * sum(abs(w) for w in group) / len(group)
    codes = [0 if abs(w) <= threshold else (1 if w > 0 else -1) for w in group]
    kept = [abs(w) for w, code in zip(group, codes, strict=True) if code]
    return codes, sum(kept) / len(kept) if kept else 0.0


def loss(group: list[float], codes: list[int], scale: float) -> float:
    return sum((w - code * scale) ** 2 for w, code in zip(group, codes, strict=True))


def stored(encoding: pc.Encoding, group: list[float], fitter: pc.Fitter | None = None) -> tuple[list[int], float]:
    weight = torch.tensor([group])
    arrays = fitter.fit(encoding, weight) if fitter else encoding.encode(weight)
    codes, parameters = encoding.load(arrays, (1, len(group)))
    return codes.flatten().tolist(), float(parameters["scale"])


def test_the_textbooks_done_by_hand():
    assert slow_binary([1.0, -3.0, 0.0, 4.0]) == ([1, -1, 1, 1], 2.0)
    assert slow_ternary([1.0, -3.0, 0.0, 4.0]) == ([0, -1, 0, 1], 3.5)  # Δ = 1.4


@quick
@given(groups_of_eight)
def test_binary_equals_the_textbook(group):
    codes, scale = slow_binary(group)
    found, found_scale = stored(Binary(), group)
    assert found == codes
    assert found_scale == pytest.approx(scale, rel=1e-6, abs=1e-44)


@quick
@given(groups_of_eight, st.floats(0.5, 1.5))
def test_no_other_scale_is_better_for_the_signs(group, factor):
    codes, scale = stored(Binary(), group)
    assert loss(group, codes, scale) <= loss(group, codes, scale * factor) * (1 + 1e-6) + 1e-9


@quick
@given(groups_of_eight)
def test_ternary_has_the_scale_of_the_textbook_and_the_nearest_codes(group):
    codes, scale = slow_ternary(group)
    found, found_scale = stored(Ternary(), group)
    assert found_scale == pytest.approx(scale, rel=1e-6, abs=1e-44)
    if scale:
        shares = [w / found_scale for w in group]
        assert found == [0 if abs(s) <= 0.5 else int(math.copysign(1, s)) for s in shares]
    assert loss(group, found, found_scale) <= loss(group, codes, found_scale) * (1 + 1e-6) + 1e-9


def test_only_weights_between_the_two_thresholds_are_stored_unlike_the_paper():
    weight = torch.randn(64, 256)
    encoding = Ternary()
    codes, parameters = encoding.load(encoding.encode(weight), (64, 256))
    scale = parameters["scale"]
    threshold = 0.7 * weight.abs().mean(1, keepdim=True)
    of_paper = torch.where(weight.abs() > threshold, weight.sign(), 0)
    other = codes[:, 0] != of_paper
    between = (weight.abs() > threshold) != (weight.abs() > scale / 2)
    assert torch.equal(other, between) and 0 < other.float().mean() < 0.05
    ours, theirs = (((c * scale) - weight).square().sum() for c in (codes[:, 0], of_paper))
    assert 0.98 * theirs < ours < theirs


@pytest.mark.parametrize(("width", "columns"), [(5, 1), (6, 2), (10, 2), (11, 3)])
def test_five_ternary_codes_are_the_digits_of_a_byte(width, columns):
    encoding = Ternary()
    weight = torch.randint(-1, 2, (3, width)).float()
    weight[:, 0] = 1
    packed = encoding.encode(weight)["codes"]
    assert packed.shape == (3, columns)
    digits = [[int(w) + 1 for w in row] + [0] * (5 * columns - width) for row in weight.tolist()]
    by_hand = [[sum(d * 3**i for i, d in enumerate(row[b : b + 5])) for b in range(0, len(row), 5)] for row in digits]
    assert packed.tolist() == by_hand
    assert torch.equal(encoding.decode(encoding.encode(weight), (3, width)), weight)


def test_one_bit_a_weight_low_bits_first():
    weight = torch.tensor([[1.0, -1, 1, 1, -1, -1, -1, -1, 0.0, 2]])
    assert Binary().encode(weight)["codes"].tolist() == [[0b00001101, 0b11]]  # zero has the sign +1


@pytest.mark.parametrize(
    ("encoding", "count"),
    [
        (Binary(), 4 * 80 / 8 + 4 * 4),
        (Binary(16, "e8m0"), 4 * 80 / 8 + 4 * 5),
        (Ternary(), 4 * 80 / 5 + 4 * 4),
        (Ternary(-1, "float16"), 4 * 80 / 5 + 2),
    ],
    ids=str,
)
def test_bytes_counted_by_hand(encoding, count):
    assert encoding.nbytes((4, 80)) == count


def share(encoding: pc.Encoding, weight: torch.Tensor, fitter: pc.Fitter | None = None) -> float:
    """‖w − ŵ‖² / ‖w‖²."""
    arrays = fitter.fit(encoding, weight) if fitter else encoding.encode(weight)
    difference = encoding.decode(arrays, tuple(weight.shape)) - weight
    return float(difference.square().sum() / weight.square().sum())


def test_what_is_lost_of_gaussian_weights():
    weight = torch.randn(64, 4096)
    assert share(Binary(), weight) == pytest.approx(1 - 2 / math.pi, rel=0.01)
    assert share(Ternary(), weight) == pytest.approx(0.191, rel=0.01)


def best_ternary(group: torch.Tensor) -> float:
    """The least loss of any ternary code: its non-zeros are the largest magnitudes, however many."""
    size = group.abs().sort(descending=True).values.double()
    counts = torch.arange(1, len(size) + 1)
    return float(size.square().sum() - (size.cumsum(0).square() / counts).max())


def test_clip_search_finds_the_threshold_of_heavy_tails():
    weight = torch.distributions.Laplace(0.0, 1.0).sample((16, 256))
    best = sum(best_ternary(row) for row in weight) / float(weight.square().sum())
    fitted, rounded = share(Ternary(), weight, Mse()), share(Ternary(), weight)
    assert best <= fitted < 1.005 * best
    assert rounded > 1.03 * best


def test_clip_search_leaves_binary_as_it_is():
    weight = torch.randn(8, 64)
    fitted, rounded = Mse().fit(Binary(16), weight), Binary(16).encode(weight)
    assert all(torch.equal(fitted[name], rounded[name]) for name in rounded)
    assert Binary(16).parameters(Binary(16).grouped(weight), 0.5)["scale"].equal(rounded["scale"] / 2)


@pytest.mark.parametrize(
    "encoding",
    [
        Binary(32),
        Binary(0, "e8m0"),
        Binary(16, "e4m3"),
        Binary(-1, "shift"),
        Ternary(32),
        Ternary(0, "e8m0"),
        Ternary(16, "e4m3"),
        Ternary(16, "shift"),
        Ternary(-1, "float16"),
        NM(2, 4, Binary(16)),
    ],
    ids=str,
)
def test_the_contract(encoding):
    check_encoding(encoding, shapes=SHAPES)


def test_sparse_ternary_codes():
    # a kept weight that rounds to zero ties with those pruned, and another place may take its own the next time
    check_encoding(NM(2, 4, Ternary(0, "e8m0-ceil")), shapes=SHAPES, idempotent=None)


def test_scales_that_do_not_fit_are_refused(refused):
    refused(pc.OptionError, "there is no scale format 'int8'", lambda: Binary(32, "int8"))
    refused(pc.OptionError, "group=-2 is not a group size", lambda: Ternary(-2))
