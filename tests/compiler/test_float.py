"""Floating-point elements against the types of PyTorch, NumPy and ml_dtypes, and against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import paretoc as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import NM, Affine, Float, pack
from paretoc.passes.fit import Mse
from paretoc.testing import check_encoding

quick = settings(max_examples=60, deadline=None)

#: the same format elsewhere; float8_e3m4 keeps its last exponent for infinity and NaN, ours goes on
NUMPY = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m10": np.float16,
    "e8m7": ml_dtypes.bfloat16,
}
TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e5m10": torch.float16,
    "e8m7": torch.bfloat16,
}
ONE = {"scale": torch.ones(1, 1)}


def rounded(encoding: Float, values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of the format."""
    return encoding.quantize(values.reshape(1, 1, -1), ONE).reshape(-1)


def codes_of(dtype: type, values: np.ndarray) -> np.ndarray:
    """Bit patterns of a cast."""
    cast = values.astype(dtype)
    return cast.view(np.uint8 if cast.itemsize == 1 else np.uint16).astype(np.int64)


# -- the grids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NUMPY)
def test_every_code_is_the_number_that_ml_dtypes_has(name):
    encoding, dtype = Float(name), NUMPY[name]
    codes = np.arange(2**encoding.bits)
    theirs = codes.astype(np.uint8 if encoding.bits <= 8 else np.uint16).view(dtype).astype(np.float32)
    finite = np.isfinite(theirs)
    ours = encoding.numbers(torch.from_numpy(codes).int()).numpy()
    np.testing.assert_array_equal(ours[finite], theirs[finite])
    assert (np.signbit(ours) == (codes >= len(codes) // 2))[finite].all()
    if name != "e3m4":
        assert encoding.largest == theirs[finite].max()
        assert encoding.largest_code == np.flatnonzero(finite[: len(codes) // 2]).max()


@pytest.mark.parametrize("name", TORCH)
def test_every_code_is_the_number_that_torch_has(name):
    encoding, dtype = Float(name), TORCH[name]
    codes = torch.arange(2**encoding.bits)
    theirs = codes.to(torch.uint8 if encoding.bits == 8 else torch.uint16).view(dtype).float()
    finite = theirs.isfinite()
    assert torch.equal(encoding.numbers(codes.int())[finite], theirs[finite])
    assert encoding.largest == torch.finfo(dtype).max
    assert encoding.number(1) == torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def test_small_grids_done_by_hand():
    positive = {
        "e1m1": [0, 1, 2, 3],
        "e2m0": [0, 1, 2, 4],
        "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        "e1m2": [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
        "e3m0": [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    }
    for name, numbers in positive.items():
        assert Float(name).numbers(torch.arange(2 * len(numbers)).int()).tolist() == numbers + [-n for n in numbers]


ALL = [f"e{e}m{m}" for e in range(1, 9) for m in range(15) if 3 <= 1 + e + m <= 16]


@pytest.mark.parametrize("name", ALL)
def test_every_split_keeps_its_own_numbers(name):
    encoding = Float(name)
    codes = torch.arange(1 << encoding.bits).int()
    codes = codes[codes % (1 << encoding.bits - 1) <= encoding.largest_code]
    numbers = encoding.numbers(codes)
    half = len(codes) // 2
    assert (numbers[1:half] > numbers[: half - 1]).all() and torch.equal(numbers[half:], -numbers[:half])
    assert torch.equal(rounded(encoding, numbers), numbers)
    assert torch.equal(encoding.patterns(numbers), codes)


# -- rounding ----------------------------------------------------------------------------------------------------


def probes(encoding: Float) -> np.ndarray:
    """Numbers of the format, the points half-way between them, their float32 neighbours, and beyond the range."""
    count = min(encoding.largest_code, 4096)
    codes = np.unique(np.linspace(0, encoding.largest_code, count + 1).astype(int))
    grid = np.array([encoding.number(int(c)) for c in codes])
    half = (grid + [encoding.number(int(c) + 1) for c in codes]) / 2
    exact = np.concatenate([grid, half[:-1]]).astype(np.float32)
    near = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))])
    beyond = np.float32([min(encoding.largest * f, 3e38) for f in (1.01, 2, 1e30)])
    every = np.concatenate([near, beyond])
    return np.concatenate([every, -every])


@pytest.mark.parametrize("name", [name for name in NUMPY if name != "e3m4"])
def test_rounding_equals_the_cast_of_ml_dtypes_bit_for_bit(name):
    encoding, dtype = Float(name), NUMPY[name]
    values = np.concatenate([probes(encoding), np.random.default_rng(0).normal(size=20_000).astype(np.float32)])
    ours = encoding.patterns(rounded(encoding, torch.from_numpy(values)))
    largest = np.float32(encoding.largest)  # casts go to infinity or NaN beyond, or saturate
    np.testing.assert_array_equal(ours.numpy(), codes_of(dtype, np.clip(values, -largest, largest)))


def test_the_bits_of_a_cast_are_compared_with_their_sign():
    assert codes_of(ml_dtypes.float4_e2m1fn, np.float32([-0.2, 0.2, -6.0])).tolist() == [8, 0, 15]


def nearest(encoding: Float, value: float) -> float:
    """The nearest number in exact arithmetic, by bisection of the codes; half-way the even code."""
    low, high = 0, encoding.largest_code
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if encoding.number(middle) <= abs(value) else (low, middle)
    down, up = (abs(Fraction(abs(value)) - Fraction(encoding.number(code))) for code in (low, high))
    code = low if down < up or (down == up and low % 2 == 0) else high
    return float(np.copysign(encoding.number(code), value))


def test_exact_rounding_done_by_hand():
    by_hand = {
        "e2m1": {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 5.01: 6, 9: 6},
        "e3m0": {0.125: 0, 0.375: 0.5, 0.75: 0.5, 1.5: 2, 3: 2, 3.01: 4, 6: 8, 12: 8, 99: 16},
    }
    for name, cases in by_hand.items():
        assert [nearest(Float(name), value) for value in cases] == list(cases.values())
        assert rounded(Float(name), torch.tensor([float(v) for v in cases])).tolist() == list(cases.values())


@pytest.mark.parametrize("name", ["e3m0", "e8m0", "e1m1", "e1m14", "e4m4", "e6m1", "e7m8", "e8m3", "e3m4", "e2m0"])
def test_rounding_equals_exact_arithmetic(name):
    encoding = Float(name)
    values = np.random.default_rng(0).permutation(probes(encoding))[:1500]
    ours = rounded(encoding, torch.from_numpy(values))
    assert ours.tolist() == [nearest(encoding, float(value)) for value in values]


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e4m4"])
def test_rounding_half_away_from_zero_would_be_noticed(name):
    encoding = Float(name)
    values = probes(encoding)
    exact = [nearest(encoding, float(value)) for value in values]
    assert rounded(encoding, torch.from_numpy(values)).tolist() == exact
    assert rounded(encoding, torch.from_numpy(values) * (1 + 2**-23)).tolist() != exact


@quick
@given(st.sampled_from(ALL), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_rounding_is_to_the_nearest_for_every_split(name, values):
    encoding = Float(name)
    assert rounded(encoding, torch.tensor(values)).tolist() == [nearest(encoding, value) for value in values]


# -- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e1m1", "e2m1", "e2m2", "e3m2", "e3m3", "e4m3", "e3m5", "e5m5", "e5m10"])
def test_the_codes_are_packed_low_bits_first(name):
    encoding = Float(name, 4)
    weight = torch.randn(3, 12)
    arrays = encoding.encode(weight)
    scale = weight.reshape(3, 3, 4).abs().amax(-1) / encoding.top
    patterns = encoding.patterns(rounded(encoding, weight.reshape(3, 3, 4) / scale[..., None])).reshape(3, 12)
    low = min(encoding.bits, 8)
    assert torch.equal(arrays["codes"], pack(patterns & (1 << low) - 1, low))
    assert ("codes_high" in arrays) == (encoding.bits > 8)
    if encoding.bits > 8:
        assert torch.equal(arrays["codes_high"], pack(patterns >> 8, encoding.bits - 8))
    torch.testing.assert_close(arrays["scale"], scale, rtol=1e-6, atol=0)


def test_sixteen_bits_are_the_bytes_of_a_float16():
    weight = torch.tensor([[65504.0, -1.0, 3.14159, 6e-8]])
    arrays = Float("e5m10").encode(weight)
    assert arrays["scale"].item() == 1
    words = weight.half().view(torch.uint8).reshape(4, 2)
    assert torch.equal(arrays["codes"], words[None, :, 0]) and torch.equal(arrays["codes_high"], words[None, :, 1])


@pytest.mark.parametrize(
    ("encoding", "count"),
    [
        (Float("e2m1"), 2 * 32 + 2 * 4),
        (Float("e2m1", 32, "e8m0"), 2 * 32 + 2 * 2),  # 4.25 bits
        (Float("e2m1", 16, "e4m3"), 2 * 32 + 2 * 4 + 4),  # 4.5 bits
        (Float("e2m1", 32, "shift"), 2 * 32 + 2 * 2 + 2 * 4),
        (Float("e3m2", 32, "e8m0"), 2 * 48 + 2 * 2),
        (Float("e4m5"), 2 * 64 + 2 * 16 + 2 * 4),
    ],
    ids=str,
)
def test_bytes_counted_by_hand(encoding, count):
    assert encoding.nbytes((2, 64)) == count


@pytest.mark.parametrize("name", ["e8m7", "e8m3", "e7m8", "e6m2", "e5m10"])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_wide_formats_keep_small_and_large_weights(name, size):
    """Their largest number is so large that the scale max|w| / largest would be a subnormal float32, or nothing."""
    encoding, weight = Float(name, 16), torch.randn(8, 64) * size
    decoded = encoding.decode(encoding.encode(weight), (8, 64))
    assert float(((decoded - weight) / weight).abs().max()) <= 2.0 ** -(encoding.mantissa + 1) * 1.001


# -- how good it is ----------------------------------------------------------------------------------------------


def loss(encoding: pc.Encoding, weight: torch.Tensor, fitter: pc.Fitter | None = None) -> float:
    """‖w − ŵ‖² / ‖w‖²."""
    arrays = fitter.fit(encoding, weight) if fitter else encoding.encode(weight)
    difference = encoding.decode(arrays, tuple(weight.shape)) - weight
    return float(difference.square().sum() / weight.square().sum())


def test_formats_of_four_bits_on_gaussian_weights():
    weight = torch.randn(256, 1024)
    found = {name: loss(Float(name, 256), weight) for name in ("e2m1", "e1m2", "e3m0")}
    integers = loss(Affine(4, 256), weight)
    # ZeroQuant-FP: E2M1 beats the integers, which beat E3M0; E1M2 is the integers −7 … 7
    assert found == pytest.approx({"e2m1": 0.0124, "e1m2": 0.0160, "e3m0": 0.0378}, rel=0.02)
    assert found["e1m2"] == pytest.approx(integers, rel=1e-6)
    assert loss(Float("e2m1", 16, "e4m3"), weight) < loss(Float("e2m1", 32, "e8m0"), weight)  # NVFP4, MXFP4


def test_e3m0_beats_the_integers_where_tails_are_heavy():
    weight = torch.distributions.StudentT(4.0).sample((128, 1024))
    assert loss(Float("e2m1", 256), weight) < loss(Float("e3m0", 256), weight) < loss(Affine(4, 256), weight)


def test_scale_constraints_cost_little():
    weight = torch.randn(256, 1024)
    free, m1, m2 = (loss(Float("e2m1", 256, scale), weight) for scale in ("float32", "e8m0-ceil", "shift"))
    assert free < m2 < m1 < 1.5 * free
    # rounded up instead, the shift halves nearly every scale and clips
    scale = weight.reshape(256, 4, 256).abs().amax(-1) / 6
    up = scale.amax(1, keepdim=True) * 2.0 ** -torch.ceil(torch.log2(scale.amax(1, keepdim=True) / scale))
    grouped, encoding = weight.reshape(256, 4, 256), Float("e2m1", 256)
    clipped = encoding.dequantize(encoding.quantize(grouped, {"scale": up}), {"scale": up})
    assert float((clipped - grouped).square().sum() / grouped.square().sum()) > m2


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m2"])
def test_more_mantissa_is_better_by_four(name):
    weight = torch.randn(64, 512)
    e, m = Float(name).exponent, Float(name).mantissa
    assert loss(Float(name), weight) / loss(Float(f"e{e}m{m + 1}"), weight) == pytest.approx(4, rel=0.1)


def test_clipping_pays_on_float_elements():
    weight = torch.distributions.StudentT(4.0).sample((32, 512))
    for encoding in (Float("e2m1"), Float("e2m0"), Float("e2m1", 32, "e8m0-ceil"), Float("e2m1", 16, "e4m3")):
        assert loss(encoding, weight, Mse()) < 0.95 * loss(encoding, weight)


# -- the contract ------------------------------------------------------------------------------------------------

SHAPES = ((4, 64), (4, 128, 3, 3), (5, 7))


@pytest.mark.parametrize(
    "encoding",
    [
        Float("e2m1", 32),
        Float("e4m3"),
        Float("e5m2", -1, "float16"),
        Float("e3m0", 16, "shift"),
        Float("e3m2", 32, "e8m0"),
        Float("e2m3", 32, "e8m0-ceil"),
        Float("e2m1", 16, "e4m3"),
        Float("e4m5", 32, "e8m0"),
        Float("e8m7", 64),
        Float("e8m0"),
        NM(2, 4, Float("e2m1", 16, "e4m3")),
        NM(4, 8, Float("e5m6", 0, "e8m0")),
    ],
    ids=str,
)
def test_the_contract(encoding):
    check_encoding(encoding, shapes=SHAPES)


def test_nearest_block_scales_of_many_elements_are_no_fixed_point():
    """E4M3 has steps of 1/16: E2M1 comes back to 6, E4M3 elements come back to other numbers."""
    check_encoding(Float("e4m3", 32, "e4m3"), shapes=SHAPES, idempotent=None)
    with pytest.raises(pc.ConformanceError, match="storing the decoded tensor again moves it"):
        check_encoding(Float("e4m3", 32, "e4m3"), shapes=SHAPES)


def test_sparse_values_round_trip():
    weight = torch.randn(8, 64)
    encoding = NM(2, 4, Float("e4m3", 16, "e8m0"))
    decoded = encoding.decode(encoding.encode(weight), (8, 64))
    mask = encoding.mask(weight)
    kept = weight[mask].reshape(8, 32)
    assert (decoded[~mask] == 0).all()
    assert torch.equal(decoded[mask].reshape(8, 32), encoding.values.decode(encoding.values.encode(kept), (8, 32)))
    assert loss(encoding, weight * mask) < 2e-3


@pytest.mark.parametrize("text", ["e2", "m3", "e0m3", "e9m3", "e1m0", "e8m8", "e5m11", "e4m3fn", "e4m03", "E4M3"])
def test_a_format_that_there_is_not_is_refused(text, refused):
    refused(pc.OptionError, f"there is no floating-point format {text!r}", lambda: Float(text))


def test_groups_and_scales_that_do_not_fit_are_refused(refused):
    refused(pc.OptionError, "there is no scale format 'e8'", lambda: Float("e2m1", 32, "e8"))
    refused(pc.OptionError, "group size 32 does not divide", lambda: Float("e2m1", 32).layout((4, 48)))
