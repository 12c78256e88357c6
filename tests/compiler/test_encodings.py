"""Encodings against slow textbook versions of themselves, written with Python loops."""

from __future__ import annotations

from itertools import combinations
from math import ceil, comb, log2, pi

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paretoc.compiler.encodings import (
    NM,
    Affine,
    Codebook,
    Dense,
    Float,
    parse_encoding,
    register_encoding,
    registered_encodings,
)
from paretoc.compiler.encodings.packing import pack, packed_size, unpack
from paretoc.compiler.errors import OptionError

quick = settings(max_examples=60, deadline=None)


# -- bit packing ---------------------------------------------------------------------------------------


def slow_pack(codes: list[int], bits: int) -> list[int]:
    """Low bits first, one long binary number, cut into bytes."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return [(number >> (8 * byte)) & 255 for byte in range(ceil(len(codes) * bits / 8))]


@st.composite
def code_rows(draw):
    bits = draw(st.integers(1, 8))
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 37))
    code = st.integers(0, 2**bits - 1)
    return bits, draw(st.lists(st.lists(code, min_size=count, max_size=count), min_size=rows, max_size=rows))


@quick
@given(code_rows())
def test_packing_equals_a_slow_bit_packer(case):
    bits, rows = case
    packed = pack(torch.tensor(rows), bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == packed_size(len(rows[0]), bits)
    assert packed.tolist() == [slow_pack(row, bits) for row in rows]


@quick
@given(code_rows(), st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_unpacking_inverts_packing(case, dtype):
    bits, rows = case
    codes = torch.tensor(rows).to(dtype)
    back = unpack(pack(codes, bits), bits, codes.shape[-1])
    assert back.dtype == torch.int32
    assert back.tolist() == rows


def test_packing_keeps_leading_axes():
    codes = torch.randint(0, 8, (2, 3, 5))
    assert pack(codes, 3).shape == (2, 3, 2)
    assert torch.equal(unpack(pack(codes, 3), 3, 5), codes.int())


def test_the_slow_packer_is_right_on_a_case_done_by_hand():
    assert slow_pack([1, 2, 3], 2) == [0b111001]
    assert slow_pack([5, 6, 7], 3) == [0b11110101, 0b1]


# -- Affine --------------------------------------------------------------------------------------------


def slow_affine(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> tuple[np.ndarray, list[list[int]]]:
    """Textbook rounding to nearest, one group at a time, in float32. Returns weight and codes."""
    matrix = weight.reshape(weight.shape[0], -1)
    flat = [r for row in matrix for r in np.split(row, _cuts(row, group))]
    flat = [matrix.reshape(-1)] if group == -1 else flat
    decoded, codes = [], []
    for values in flat:
        low, high = np.float32(min(0, values.min())), np.float32(max(0, values.max()))
        if symmetric:
            top = 2 ** (bits - 1) - 1
            peak = max(-low, high)
            scale, zero, least = (peak / np.float32(top) if peak > 0 else np.float32(1)), np.float32(0), -top
        else:
            top = 2**bits - 1
            if low == high:
                low, high = np.float32(-1), np.float32(1)
            scale = (high - low) / np.float32(top)
            zero, least = np.rint(-low / scale), 0
        code = np.clip(np.rint(values / scale) + zero, least, top)
        codes.append([int(c) for c in code])
        decoded.append((code - zero).astype(np.float32) * scale)
    return np.concatenate(decoded).reshape(weight.shape), codes


def _cuts(row: np.ndarray, group: int) -> list[int]:
    return list(range(group, len(row), group)) if group > 0 else []


SHAPES = {"matrix": (3, 12), "one row": (1, 12), "conv2d": (4, 3, 2, 2), "conv1d": (2, 4, 3)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("group", [-1, 0, 4, 12], ids=["tensor", "channel", "group 4", "group 12"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_affine_equals_the_textbook(bits, symmetric, group, shape):
    weight = torch.randn(shape) + 0.3
    encoding = Affine(bits, group, symmetric)
    arrays = encoding.encode(weight)
    decoded, codes = slow_affine(weight.numpy(), bits, group, symmetric)
    assert encoding.load(arrays, shape)[0].reshape(-1).tolist() == [c for row in codes for c in row]
    assert torch.equal(encoding.decode(arrays, shape), torch.from_numpy(decoded))


def test_the_textbook_is_right_on_a_case_done_by_hand():
    decoded, codes = slow_affine(np.float32([[-1.0, 0.2, 1.0, 3.0]]), 2, 0, symmetric=False)
    assert codes == [[0, 1, 2, 3]]  # scale 4/3, zero 1
    np.testing.assert_allclose(decoded, [[-4 / 3, 0, 4 / 3, 8 / 3]], rtol=1e-6)
    decoded, codes = slow_affine(np.float32([[-1.0, 0.2, 1.0, 3.0]]), 3, 2, symmetric=True)
    assert codes == [[-3, 1], [1, 3]]


@quick
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=24),
)
def test_affine_error_is_bounded_and_zero_is_exact(bits, symmetric, values):
    weight = torch.tensor([values])
    encoding = Affine(bits, 0, symmetric)
    arrays = encoding.encode(weight)
    decoded = encoding.decode(arrays, tuple(weight.shape))
    scale = float(arrays["scale"])
    # half a step; one more half where rounding the zero point shifts the range of an asymmetric code
    bound = scale * (0.5 if symmetric else 1.0) * (1 + 1e-5)
    assert torch.isfinite(decoded).all()
    assert float((decoded - weight).abs().max()) <= bound + 1e-30
    assert (decoded[weight == 0] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-38, -3.0, 5.0])
def test_affine_of_a_constant_group(value, symmetric):
    weight = torch.full((2, 8), value)
    encoding = Affine(4, 4, symmetric)
    decoded = encoding.decode(encoding.encode(weight), (2, 8))
    # a range of one value and zero has a code for both ends
    torch.testing.assert_close(decoded, weight, rtol=1e-6, atol=0)


def test_one_bit_with_a_floating_zero_point_has_the_means_of_both_halves():
    encoding, weight = Affine(1, 0, False, "float"), torch.tensor([[-3.0, -1.0, 2.0, 4.0, 9.0, 7.0]])
    decoded = encoding.decode(encoding.encode(weight), (1, 6))
    # the mean of all is 3: below it −2/3 on average, above it 20/3
    torch.testing.assert_close(decoded, torch.tensor([[-2, -2, -2, 20, 20, 20]]) / 3, rtol=1e-6, atol=1e-6)
    weight = torch.randn(64, 1024) + 5
    loss = (encoding.decode(encoding.encode(weight), (64, 1024)) - weight).square().mean()
    assert float(loss) == pytest.approx(1 - 2 / pi, rel=0.02)  # that of the best two levels of a Gaussian


def test_a_symmetric_code_leaves_out_the_extra_negative_level():
    encoding = Affine(4)
    codes, _ = encoding.load(encoding.encode(torch.tensor([[-8.0, 8.0, 7.9, -7.9]])), (1, 4))
    assert codes.tolist() == [[[-7, 7, 7, -7]]]


def test_a_shrunk_range_clips():
    encoding = Affine(4)
    grouped = torch.tensor([[[7.0, 1.0, -7.0]]])
    parameters = encoding.parameters(grouped, 0.5)
    assert parameters["scale"].tolist() == [[0.5]]
    assert encoding.quantize(grouped, parameters).tolist() == [[[7.0, 2.0, -7.0]]]


def test_a_fit_is_used():
    fitted = Affine(4).encode(torch.ones(1, 4))
    assert Affine(4).encode(torch.randn(1, 4), lambda encoding, weight: fitted) is fitted


# -- Dense ---------------------------------------------------------------------------------------------


def test_dense_float32_is_exact_and_half_types_round():
    weight = torch.randn(5, 3)
    assert torch.equal(Dense().decode(Dense().encode(weight), (5, 3)), weight)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        decoded = Dense(name).decode(Dense(name).encode(weight), (5, 3))
        assert decoded.dtype == torch.float32
        assert torch.equal(decoded, weight.to(dtype).float())
        assert not torch.equal(decoded, weight)


# -- N:M -----------------------------------------------------------------------------------------------


def slow_kept(group: list[float], n: int) -> tuple[int, ...]:
    """The n positions with the largest sum of magnitudes; among equals the first in lexicographic order."""
    subsets = combinations(range(len(group)), n)
    return max(subsets, key=lambda kept: (sum(abs(group[i]) for i in kept), *(-i for i in kept)))


def slow_mask(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Groups of m consecutive input channels, for every output channel and kernel position on its own."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    flat, out = weight.reshape(*weight.shape[:2], -1), mask.view(*weight.shape[:2], -1)
    for o in range(flat.shape[0]):
        for position in range(flat.shape[2]):
            for start in range(0, flat.shape[1], m):
                group = flat[o, start : start + m, position].tolist()
                for i in slow_kept(group, n):
                    out[o, start + i, position] = True
    return mask


VALUES = [Dense(), Dense("float16"), Affine(8), Affine(4, 4), Affine(3, -1, False)]
PATTERNS = [(1, 4), (2, 4), (4, 8), (3, 5), (8, 16)]


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda v: str(v))
@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)], ids=["linear", "conv1d", "conv2d"])
def test_the_mask_equals_brute_force_with_ties(n, m, kernel):
    if m == 16 and kernel:
        kernel = (2,)  # 12870 subsets for each group
    weight = torch.randint(-3, 4, (2, 2 * m, *kernel)).float()  # small integers: many ties
    assert torch.equal(NM(n, m).mask(weight), slow_mask(weight, n, m))


def test_the_brute_force_is_right_on_a_case_done_by_hand():
    assert slow_kept([1.0, -2.0, 2.0, 2.0], 2) == (1, 2)
    assert slow_kept([0.0, 0.0, 0.0, 0.0], 2) == (0, 1)
    weight = torch.tensor([[[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]]])
    assert slow_mask(weight, 2, 4).int().tolist() == [[[0, 1], [0, 1], [1, 0], [1, 0]]]


@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda v: str(v))
@pytest.mark.parametrize("kernel", [(), (3, 2)], ids=["linear", "conv2d"])
def test_nm_stores_the_kept_values_under_its_encoding(n, m, values, kernel):
    shape = (3, 4 * m, *kernel)
    weight = torch.randn(shape)
    encoding = NM(n, m, values)
    decoded = encoding.decode(encoding.encode(weight), shape)
    mask = slow_mask(weight, n, m) if m < 16 else encoding.mask(weight)
    assert (decoded[~mask] == 0).all()
    rows = weight.movedim(1, -1)[mask.movedim(1, -1)].reshape(3, -1)
    stored = values.decode(values.encode(rows), tuple(rows.shape))
    assert torch.equal(decoded.movedim(1, -1)[mask.movedim(1, -1)], stored.reshape(-1))


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda v: str(v))
def test_a_tensor_that_has_the_pattern_is_kept(n, m):
    weight = torch.randn(4, 2 * m)
    pruned = weight * NM(n, m).mask(weight)
    pruned[0, :n] = 0  # groups with fewer non-zeros than allowed
    encoding = NM(n, m)
    assert torch.equal(encoding.decode(encoding.encode(pruned), (4, 2 * m)), pruned)


@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=lambda v: str(v))
def test_the_index_takes_the_fewest_whole_bits(n, m):
    bits = ceil(log2(comb(m, n)))
    assert NM(n, m).index_bits == bits
    groups = 8
    stored = NM(n, m).encode(torch.randn(1, groups * m))
    index_bytes = sum(a.numel() for name, a in stored.items() if name.startswith("indices"))
    assert index_bytes == groups * bits // 8


def test_patterns_are_ranked_in_lexicographic_order():
    assert NM(2, 4).patterns().tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    weight = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]])
    assert unpack(NM(2, 4).encode(weight)["indices"], 3, 2).tolist() == [[5, 1]]


# -- what holds for every encoding ---------------------------------------------------------------------

plain = st.one_of(
    st.builds(Dense, st.sampled_from(["float32", "float16", "bfloat16"])),
    st.builds(Affine, st.integers(2, 8), st.sampled_from([-1, 0, 2, 4, 8]), st.booleans()),
)
encodings = st.one_of(plain, st.builds(NM, st.integers(1, 3), st.sampled_from([4, 8]), plain))
shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.sampled_from([8, 16, 24])), st.just((2, 8, 3)), st.just((3, 16, 2, 2))
)


@quick
@given(encodings, shapes)
def test_the_layout_and_the_bytes_are_those_really_stored(encoding, shape):
    try:
        layout = encoding.layout(shape)
    except OptionError:
        assume(False)
    arrays = encoding.encode(torch.randn(shape))
    assert list(arrays) == list(layout)
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == layout
    assert encoding.nbytes(shape) == sum(len(a.contiguous().view(torch.uint8).flatten()) for a in arrays.values())


#: more bits: less error, at any size of group
FAMILIES = {
    "symmetric": [lambda group, bits=bits: Affine(bits, group) for bits in (2, 3, 4, 6, 8)],
    "asymmetric": [lambda group, bits=bits: Affine(bits, group, symmetric=False) for bits in (2, 3, 4, 6, 8)],
    "float": [lambda group, name=name: Float(name, group) for name in ("e2m1", "e2m2", "e2m3", "e2m4")],
    "codebook": [lambda group, bits=bits: Codebook(bits, group) for bits in (2, 3, 4)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_with_more_bits_and_with_smaller_groups(family, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 128, generator=generator) * torch.randn(32, 128, generator=generator).abs()

    def error(encoding):
        return float((encoding.decode(encoding.encode(weight), tuple(weight.shape)) - weight).square().mean())

    errors = torch.tensor([[error(make(group)) for group in (16, 32, 64, 0)] for make in FAMILIES[family]])
    assert (errors.diff(dim=0) < 0).all() and (errors.diff(dim=1) > 0).all()


@quick
@given(encodings, shapes)
def test_decoding_gives_the_shape_and_is_a_fixed_point(encoding, shape):
    try:
        encoding.layout(shape)
    except OptionError:
        assume(False)
    arrays = encoding.encode(torch.randn(shape))
    decoded = encoding.decode(arrays, shape)
    assert tuple(decoded.shape) == shape
    assert decoded.dtype == torch.float32
    # a kept value that rounds to zero ties with the pruned ones, and another place may join the group of a scale
    assume(not (isinstance(encoding, NM) and (decoded != 0).sum() < decoded.numel() * encoding.n // encoding.m))
    again = encoding.decode(encoding.encode(decoded), shape)
    torch.testing.assert_close(again, decoded, rtol=1e-5, atol=1e-6)  # the scale is recomputed: one rounding


@quick
@given(encodings)
def test_the_text_form_round_trips(encoding):
    assert parse_encoding(str(encoding)) == encoding


def test_the_text_form_is_what_documentation_shows():
    assert str(NM(2, 4, Affine(4, 32))) == "NM(n=2, m=4, values=Affine(bits=4, group=32))"
    assert parse_encoding("NM(2, 4, values=Affine(4, group=32))") == NM(2, 4, Affine(4, 32))


@pytest.mark.parametrize(
    ("encoding", "shape", "count"),
    [
        (Dense("float16"), (3, 5), 30),
        (Affine(8), (3, 5), 15 + 3 * 4),
        (Affine(3), (3, 5), 3 * 2 + 3 * 4),
        (Affine(4, 4, symmetric=False), (3, 8), 3 * 4 + 3 * 2 * 4 + 3 * 1),
        (NM(2, 4), (2, 8), 2 * 4 * 4 + 2 * 1),
        (NM(2, 4, Affine(4)), (2, 64), 2 * 16 + 2 * 4 + 2 * 6),
    ],
    ids=str,
)
def test_bytes_counted_by_hand(encoding, shape, count):
    assert encoding.nbytes(shape) == count


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Affine(9), "Affine has 2 to 8 bits, or 1 when asymmetric, not 9"),
        (lambda: Affine(1), "Affine has 2 to 8 bits, or 1 when asymmetric, not 1"),
        (lambda: Affine(4, -2), "group=-2 is not a group size"),
        (lambda: Affine(4, 32).check(torch.empty(8, 48)), "group size 32 does not divide the input width 48"),
        (lambda: Dense("int8"), "Dense stores no 'int8'"),
        (lambda: NM(4, 4), "4:4 is not a sparsity pattern"),
        (lambda: NM(0, 4), "0:4 is not a sparsity pattern"),
        (lambda: NM(2, 32), "2:32 is not a sparsity pattern"),
        (lambda: NM(2, 4, NM(1, 2)), "NM does not nest in NM"),
        (lambda: NM(2, 4).check(torch.empty(3, 6)), "2:4 needs an input width divisible by 4, this one is 6"),
        (
            lambda: NM(2, 4).check(torch.empty(4, 3, 2, 2)),
            "2:4 needs an input width divisible by 4, this one is 3",
        ),
        (lambda: NM(2, 4).check(torch.empty(8)), "2:4 needs an input width divisible by 4, this one is 0"),
        (
            lambda: NM(2, 4, Affine(4, 32)).check(torch.empty(3, 32)),
            "group size 32 is larger than the input width 16",
        ),
        (lambda: parse_encoding("Affine(4"), "'Affine(4' is not an encoding"),
        (lambda: parse_encoding("Afine(4)"), "no encoding is called 'Afine'"),
        (lambda: parse_encoding("Affine(bitz=4)"), "Affine has no option 'bitz'"),
        (lambda: parse_encoding("Affine(4, 32, True, 7, 8, 9)"), "Affine has 5 options, got 6"),
        (lambda: parse_encoding("Affine(bits=f.g(1))"), "'f.g(1)' is not a literal or a registered encoding"),
        (lambda: parse_encoding("__import__('os')"), "no encoding is called '__import__'"),
        (lambda: parse_encoding("8"), "'8' is not an encoding"),
        (lambda: parse_encoding("Dense(\0)"), "is not an encoding"),
    ],
)
def test_refusals(refused, make, sentence):
    refused(OptionError, sentence, make)


def test_a_refusal_names_what_would_work(refused):
    error = refused(OptionError, "does not divide", lambda: Affine(4, 32).check(torch.empty(8, 48)))
    assert error.fix == "use 16"
    error = refused(OptionError, "32 is larger than the input width 7", lambda: Affine(4, 32).check(torch.empty(8, 7)))
    assert error.fix == "use group=0 (one scale per channel)"
    error = refused(OptionError, "no encoding", lambda: parse_encoding("Afine(4)"))
    assert error.fix.startswith("did you mean 'Affine'?")


def test_two_encodings_of_one_name_are_refused(refused):
    before = registered_encodings()
    stranger = type("Affine", (Dense,), {})
    refused(OptionError, "two encodings are called 'Affine'", lambda: register_encoding(stranger))
    register_encoding(Affine)  # the same one again is no clash
    assert registered_encodings() == before
