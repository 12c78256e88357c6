"""Double rounding against Python's own integers and rounding, and against the narrow integers stored alone."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import SCALES, Affine, Nested
from paretoc.compiler.sites import weight_sites
from paretoc.passes.fit import Mse
from paretoc.testing import check_encoding
from torch import nn

quick = settings(max_examples=60, deadline=None)
WIDTHS = [(h, r) for h in range(2, 9) for r in range(2, h + 1)]


def slow_read(weight: float, scale: float, bits: int, read: int) -> float:
    """ŵ = clip(rnd(q / 2^Δ)) · scale · 2^Δ, q = clip(rnd(w / scale)): round() is half to even."""
    master = max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, round(weight / scale)))
    step = 2 ** (bits - read)
    return max(-(2 ** (read - 1)), min(2 ** (read - 1) - 1, round(master / step))) * scale * step


@pytest.mark.parametrize(("bits", "read"), WIDTHS)
def test_reading_equals_the_textbook(bits, read):
    encoding, weight = Nested(bits, read, 8), torch.randn(3, 16)
    arrays = encoding.encode(weight)
    scale = encoding.load(arrays, (3, 16))[1]["scale"].repeat_interleave(8, 1)
    expected = [
        [slow_read(w, s, bits, read) for w, s in zip(*rows, strict=True)]
        for rows in zip(weight.tolist(), scale.tolist(), strict=True)
    ]
    assert encoding.decode(arrays, (3, 16)).tolist() == torch.tensor(expected).tolist()


def test_double_rounding_done_by_hand():
    assert [slow_read(w, 1.0, 8, 4) for w in (7.4, 8.0, 8.5, 24.0, 23.5, 40.0, 119.9, 200.0, -200.0)] == [
        0,
        0,  # 8 / 16 is half, to even
        0,
        32,
        32,  # 23.5 rounds to 24, 24 / 16 to 2: rounding once gives 1
        32,
        112,
        112,
        -128,
    ]
    encoding = Nested(8, 4)
    codes = torch.tensor([[[7.0, 8.0, 24.0, 40.0, 119.0, 127.0, -128.0]]])
    read = encoding.dequantize(codes, {"scale": torch.ones(1, 1)})
    assert read.tolist() == [[[0, 0, 32, 32, 112, 112, -128]]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_reading_all_bits_is_the_ordinary_integer_code(bits):
    weight = torch.randn(4, 32)
    ours, plain = Nested(bits, bits, 16).encode(weight), Affine(bits, 16).encode(weight)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert torch.equal(Nested(bits, bits, 16).decode(ours, (4, 32)), Affine(bits, 16).decode(plain, (4, 32)))


def test_one_master_is_read_at_every_width():
    weight = torch.randn(16, 256)
    arrays = Nested(8, 8, 64).encode(weight)
    losses = []
    for read in range(2, 9):
        encoding = Nested(8, 8, 64).at(read)
        assert encoding == Nested(8, read, 64)
        assert encoding.layout((16, 256)) == Affine(8, 64).layout((16, 256))
        assert encoding.nbytes((16, 256)) == 16 * 256 + 16 * 4 * 4
        decoded = encoding.decode(arrays, (16, 256))
        losses.append(float((decoded - weight).square().mean()))
    assert losses == sorted(losses, reverse=True) and losses[0] > 1000 * losses[-1]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("bits", "read"), [(8, 4), (8, 2), (6, 3), (8, 8)])
def test_the_narrow_arrays_decode_to_the_same(bits, read, scale):
    wide, weight = Nested(bits, read, 16, scale), torch.randn(5, 64)
    arrays = Mse().fit(wide, weight)  # has codes at both ends
    narrow, stored = wide.narrow(arrays, (5, 64))
    assert narrow == Affine(read, 16, scale=scale)
    assert {k: (tuple(v.shape), v.dtype) for k, v in stored.items()} == narrow.layout((5, 64))
    assert torch.equal(narrow.decode(stored, (5, 64)), wide.decode(arrays, (5, 64)))


def test_the_narrow_arrays_run_in_a_model():
    model = nn.Linear(64, 12, bias=False)
    program = pc.capture(model, torch.randn(3, 64))
    encoding = Nested(8, 4, 32)
    site = weight_sites(program)[0]
    narrow, arrays = encoding.narrow(encoding.encode(model.weight.detach()), (12, 64))
    program.encode(site.weight, narrow, arrays)
    program.refresh()
    dense = encoding.decode(encoding.encode(model.weight.detach()), (12, 64))
    torch.testing.assert_close(program.run(program.example)[0], program.example[0] @ dense.T)
    assert narrow.nbytes((12, 64)) < 0.6 * encoding.nbytes((12, 64))


# -- how good it is ----------------------------------------------------------------------------------------------


def errors(read: int) -> tuple[float, float, float, float]:
    """Mean squared error of rounding once, twice and downwards, each at its best scale, and how many codes differ."""
    weight = torch.randn(1 << 15, generator=torch.Generator().manual_seed(0)) * 0.3
    step, low, high = 1 << 8 - read, -(1 << read - 1), (1 << read - 1) - 1

    def best(codes) -> tuple[float, float]:
        scales = torch.linspace(0.15, 1.8, 120) / 2 ** (read - 1)
        tried = [(float((codes(s) * s - weight).square().mean()), float(s)) for s in scales]
        return min(tried)

    encoding = Nested(8, read)

    def master(scale):
        return encoding.quantize(weight.reshape(1, 1, -1), {"scale": (scale / step).reshape(1, 1)})

    def twice(scale):
        unit = {"scale": torch.full((1, 1), 1 / step)}
        return encoding.dequantize(master(scale), unit).flatten()

    def once(scale):
        return torch.round(weight / scale).clamp(low, high)

    def floor(scale):
        return torch.floor(master(scale) / step).clamp(low, high).flatten()

    scale = torch.tensor(best(twice)[1])
    return best(once)[0], best(twice)[0], best(floor)[0], float((twice(scale) != once(scale)).float().mean())


@pytest.mark.parametrize(
    ("read", "expected"),
    [(2, (0.0134, 0.0134, 0.0257)), (4, (0.00107, 0.00108, 0.00287)), (6, (0.94e-4, 1.10e-4, 2.2e-4))],
)
def test_double_rounding_costs_little_and_dropping_bits_much(read, expected):
    once, twice, floor, other = errors(read)
    assert (once, twice, floor) == pytest.approx(expected, rel=0.04)
    assert once <= twice < 1.2 * once < 1.6 * twice < floor
    if read == 4:
        assert other == pytest.approx(0.031, abs=0.004)


def test_the_range_is_that_of_the_width_that_is_read():
    weight = torch.tensor([[7.0, -7.0, 1.0, 0.4]])
    assert Nested(8, 4).encode(weight)["scale"].item() == 0.0625
    assert Nested(8, 4).decode(Nested(8, 4).encode(weight), (1, 4)).tolist() == [[7, -7, 1, 0]]
    assert Affine(4).decode(Affine(4).encode(weight), (1, 4)).tolist() == [[7, -7, 1, 0]]


@quick
@given(st.sampled_from(WIDTHS), st.lists(st.floats(-100, 100, width=32), min_size=8, max_size=8))
def test_the_error_is_bounded_by_half_a_step_of_each_width(widths, values):
    encoding, weight = Nested(*widths), torch.tensor([values])
    arrays = encoding.encode(weight)
    scale = float(arrays["scale"])
    error = (encoding.decode(arrays, (1, 8)) - weight).abs().max()
    once = encoding.bits == encoding.read
    assert float(error) <= scale * (0.5 if once else 0.5 + encoding.step / 2) * (1 + 1e-5) + 1e-30


def test_clip_search_fits_the_width_that_is_read():
    weight = torch.randn(16, 256)

    def loss(encoding: Nested, arrays: pc.Arrays) -> float:
        return float((encoding.decode(arrays, (16, 256)) - weight).square().mean())

    narrow, wide = Nested(8, 3), Nested(8, 8)
    fitted, rounded, of_wide = Mse().fit(narrow, weight), narrow.encode(weight), Mse().fit(wide, weight)
    assert loss(narrow, fitted) < 0.8 * min(loss(narrow, rounded), loss(narrow, of_wide))
    assert loss(wide, of_wide) < loss(wide, fitted)


# -- the contract ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", [Nested(), Nested(8, 8, 32), Nested(8, 2, 16), Nested(6, 3, -1), Nested(8, 4, 32, "e4m3")], ids=str
)
def test_the_contract(encoding):
    check_encoding(encoding, shapes=((4, 64), (4, 128, 3, 3), (5, 7)))


def test_the_extra_negative_code_may_move_a_power_of_two_scale():
    """A range of −8 … 7 is wider than one of −7 … 7: its exponent is one more, and the codes are read from half as
    many bits."""
    check_encoding(Nested(8, 4, 32, "e8m0"), shapes=((4, 64),), idempotent=None)
    with pytest.raises(pc.ConformanceError, match="storing the decoded tensor again moves it"):
        check_encoding(Nested(8, 4, 32, "e8m0"), shapes=((4, 64),))


@pytest.mark.parametrize(("bits", "read"), [(9, 4), (4, 8), (8, 1), (1, 1)])
def test_widths_that_do_not_nest_are_refused(bits, read, refused):
    refused(pc.OptionError, f"{read} bits cannot be read from {bits}", lambda: Nested(bits, read))


def test_the_other_options_are_checked(refused):
    refused(pc.OptionError, "group=-3 is not a group size", lambda: Nested(group=-3))
    refused(pc.OptionError, "there is no scale format 'int4'", lambda: Nested(scale="int4"))
