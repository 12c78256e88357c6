"""Scale formats: OCP Microscaling, NVFP4 and ZeroQuant-FP against a block at a time, written with Python's floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import paretoc as pc
import pytest
import torch
from paretoc.compiler.encoding_rules import ZERO
from paretoc.compiler.encodings import NF4, NM, SCALES, Affine, Binary, Codebook, Float, Nested, Ternary
from paretoc.compiler.encodings.scales import power_of_two
from paretoc.compiler.registry import registry
from paretoc.passes.fit import Mse
from paretoc.testing import check_encoding
from torch import nn

TOP = 3.4028234663852886e38
#: the ends of blocks of eight; each is filled up with what random numbers its size gives
PEAKS = [0.0, 1.0, 0.99999994, 1.5, 1.75, 6.0, 7.999, 8.0, 448.0, 1e-30, 1e30, 1e-38, 1.4e-45, 2.0**-126, TOP]


def blocks(size: int = 8) -> torch.Tensor:
    """One block a row, its largest magnitude first, with both signs and zeros."""
    noise = torch.rand(len(PEAKS), size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = noise * torch.tensor(PEAKS).unsqueeze(1)
    weight[:, 0] = torch.tensor(PEAKS)
    weight[::2, 0] *= -1
    weight[:, -1] = 0
    return weight


# -- microscaling ------------------------------------------------------------------------------------------------

#: element → type, its largest number, and the largest power of two among its numbers
ELEMENTS = {
    "e2m1": (ml_dtypes.float4_e2m1fn, 6.0, 4.0),
    "e2m3": (ml_dtypes.float6_e2m3fn, 7.5, 4.0),
    "e3m2": (ml_dtypes.float6_e3m2fn, 28.0, 16.0),
    "e4m3": (ml_dtypes.float8_e4m3fn, 448.0, 256.0),
    "e5m2": (ml_dtypes.float8_e5m2, 57344.0, 32768.0),
}


def slow_mx(block: list[float], element: str) -> tuple[list[float], int]:
    """Section 6.3: the numbers of one block, and its E8M0 code."""
    peak = max(abs(v) for v in block)
    largest_power = 1.0 if element == "int8" else ELEMENTS[element][2]
    exponent = math.frexp(peak)[1] - 1 if peak else -1000
    exponent = max(-127, min(127, exponent - int(math.log2(largest_power))))
    scaled = [v / 2.0**exponent for v in block]
    if element == "int8":  # multiples of 2^−6; −2 stays unused, as the standard allows
        rounded = [max(-127, min(127, round(v * 64))) / 64 for v in scaled]
    else:
        dtype, largest, _ = ELEMENTS[element]
        rounded = [float(np.float32(max(-largest, min(largest, v))).astype(dtype)) for v in scaled]
    return [r * 2.0**exponent for r in rounded], exponent + 127


@pytest.mark.parametrize("element", [*ELEMENTS, "int8"])
def test_microscaling_equals_the_standard_block_by_block(element):
    weight = blocks()
    encoding = Affine(8, 8, scale="e8m0") if element == "int8" else Float(element, 8, "e8m0")
    arrays = encoding.encode(weight)
    decoded = encoding.decode(arrays, tuple(weight.shape))
    for row, found, code in zip(weight.tolist(), decoded.tolist(), arrays["scale"].flatten().tolist(), strict=True):
        numbers, stored = slow_mx(row, element)
        offset = 6 if element == "int8" else 0  # our integers are not divided by 64
        if max(abs(v) for v in row) >= 2.0**-110:
            assert code == stored - offset
            assert found == numbers
        else:  # the exponent ends at −127, so the offset cannot be taken
            assert code == max(stored - offset, 0)
            assert found == numbers if not offset else np.allclose(found, numbers, rtol=0, atol=2.0**-127)


def test_the_slow_standard_done_by_hand():
    assert slow_mx([4.0, -5.0, 1.0, 0.2], "e2m1") == ([4.0, -4.0, 1.0, 0.0], 127)
    assert slow_mx([7.9, 3.5, 0.0, 0.0], "e2m1") == ([6.0, 4.0, 0.0, 0.0], 127)  # clamped: 7.9 > 6
    assert slow_mx([8.0, 3.5, 0.0, 0.0], "e2m1") == ([8.0, 4.0, 0.0, 0.0], 128)
    assert slow_mx([1.0, -1.999, 0.5, 0.01], "int8") == ([1.0, -127 / 64, 0.5, 1 / 64], 127)
    assert slow_mx([0.0, 0.0], "e4m3") == ([0.0, 0.0], 0)


def test_the_exponent_stays_in_range_and_is_never_not_a_number():
    extremes = torch.tensor([[1.4e-45], [2.0**-127], [2.0**-126], [1.0], [2.0**127], [TOP]])
    for scale in ("e8m0", "e8m0-ceil"):
        codes = Binary(scale=scale).encode(extremes)["scale"].flatten().tolist()
        assert codes == [0, 0, 1, 127, 254, 254]
    assert Float("e5m2", 0, "e8m0").encode(torch.zeros(1, 4))["scale"].tolist() == [[0]]


def test_powers_of_two_are_exact():
    exponents = torch.arange(-127, 128)
    assert power_of_two(exponents).tolist() == [2.0**e for e in exponents.tolist()]
    codes = np.arange(255, dtype=np.uint8)  # the next is NaN
    assert power_of_two(exponents).tolist() == codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).tolist()


# -- ZeroQuant-FP ------------------------------------------------------------------------------------------------


def test_scales_rounded_up_to_powers_of_two_clip_nothing():
    weight = blocks()[:11]
    encoding = Float("e2m1", 8, "e8m0-ceil")
    grouped = encoding.grouped(weight)
    scale = encoding.parameters(grouped)["scale"].flatten().tolist()
    ideal = [peak / 6 for peak in PEAKS[:11]]
    assert scale[1:] == [2.0 ** math.ceil(math.log2(s)) for s in ideal[1:]]
    assert all(s >= i and s < 2 * i for s, i in zip(scale[1:], ideal[1:], strict=True))


def test_shifted_scales_equal_the_textbook():
    peaks = torch.tensor([[6.0, 6.1, 3.0, 2.9, 0.4, 1e-3, 0.0, 5.9], [0.0] * 8, [1e-30] * 8])
    encoding = Float("e2m1", 2, "shift")
    weight = peaks.repeat_interleave(2, 1)
    arrays = encoding.encode(weight)
    assert arrays["shift"][0].tolist() == [0, 0, 1, 1, 3, 8, 8, 0]  # ⌊log2(6.1 / peak)⌋, at most 8
    assert arrays["shift"][1:].tolist() == [[0] * 8] * 2
    torch.testing.assert_close(arrays["scale"][[0, 2], 0], torch.tensor([6.1 / 6, 1e-30 / 6]), rtol=1e-6, atol=0)
    scale = encoding.load(arrays, (3, 16))[1]["scale"]
    assert (scale * 6 >= peaks * (1 - 1e-6)).all()  # nothing is clipped
    assert (encoding.decode(arrays, (3, 16))[1] == 0).all()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float8_e4m3fn, 8), (torch.float8_e5m2, 15)], ids=str)
def test_so_many_shifts_of_e2m1_are_exact_in_fp8_and_one_more_is_not(dtype, most):
    numbers = torch.tensor([Float("e2m1").number(code) for code in range(16)])

    def exact(shift: int) -> bool:
        shifted = numbers * 2.0**-shift
        return torch.equal(shifted.to(dtype).float(), shifted)

    assert all(exact(shift) for shift in range(most + 1)) and not exact(most + 1)


# -- NVFP4 -------------------------------------------------------------------------------------------------------


def slow_nvfp4(rows: list[list[float]]) -> tuple[list[list[float]], list[float], float]:
    """Blocks → their numbers, their E4M3 scales and the scale of the tensor."""
    outer = float(np.float32(max(abs(v) for row in rows for v in row) / (6 * 448)))
    decoded, scales = [], []
    for row in rows:
        ideal = max(abs(v) for v in row) / (6 * outer)
        inner = float(np.float32(min(448.0, max(2.0**-9, ideal))).astype(ml_dtypes.float8_e4m3fn))
        elements = np.clip([v / (inner * outer) for v in row], -6, 6).astype(np.float32)
        decoded.append([float(e) * inner * outer for e in elements.astype(ml_dtypes.float4_e2m1fn)])
        scales.append(inner)
    return decoded, scales, outer


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_nvfp4_equals_the_definition_block_by_block(size):
    weight = blocks(16)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]] * size
    weight[1] *= 1e-3
    encoding = Float("e2m1", 16, "e4m3")
    arrays = encoding.encode(weight)
    numbers, scales, outer = slow_nvfp4(weight.tolist())
    torch.testing.assert_close(arrays["outer"], torch.tensor([[outer]]), rtol=1e-6, atol=0)
    found = arrays["scale"].view(torch.float8_e4m3fn).float().flatten().tolist()
    assert found == scales and max(scales) == 448 and min(scales) == 2.0**-9
    torch.testing.assert_close(encoding.decode(arrays, tuple(weight.shape)), torch.tensor(numbers), rtol=1e-6, atol=0)


# -- all formats -------------------------------------------------------------------------------------------------

ENCODINGS = [Affine(4, 8), Affine(4, 8, False), Float("e2m1", 8), Binary(8), Ternary(8), Nested(8, 4, 8)]


def under(encoding: Any, scale: str) -> Any:
    """The encoding with another scale format."""
    return type(encoding)(**{**vars(encoding), "scale": scale})


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_group_of_zeros_changes_nothing_else(encoding, scale):
    encoding = under(encoding, scale)
    weight = torch.randn(4, 32) * 1e-3
    alone = encoding.decode(encoding.encode(weight), (4, 32))
    together = encoding.decode(encoding.encode(torch.cat([weight, torch.zeros(4, 8)], 1)), (4, 40))
    assert torch.equal(together[:, :32], alone)
    if isinstance(encoding, Binary):  # has no zero: what remains is the least scale there is
        assert float(together[:, 32:].abs().max()) <= float(alone.abs().max()) * 2.0**-7
    else:
        assert (together[:, 32:] == 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_clip_search_never_loses(encoding, scale):
    """Group by group, also where groups share part of their scales."""
    encoding = under(encoding, scale)
    weight = torch.distributions.StudentT(2.5).sample((8, 64))
    weight[0] *= 50

    def errors(arrays: pc.Arrays) -> torch.Tensor:
        difference = encoding.decode(arrays, (8, 64)).double() - weight.double()
        return difference.reshape(encoding.grid((8, 64))).square().sum(-1)

    rounded, fitted = errors(encoding.encode(weight)), errors(Mse().fit(encoding, weight))
    assert (fitted <= rounded * (1 + 1e-5)).all()
    if scale not in ("e8m0", "shift") and not isinstance(encoding, Binary):  # few scales, or the best from the start
        assert (fitted < 0.9 * rounded).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.0, -3.0, 5.0, 1e-20])
def test_a_group_of_one_value_is_kept_by_a_floating_zero_point(value, scale):
    weight = torch.cat([torch.full((2, 8), value), torch.randn(2, 8)], 1)
    encoding = Affine(4, 8, False, "float", scale)
    decoded = encoding.decode(encoding.encode(weight), (2, 16))
    torch.testing.assert_close(decoded[:, :8], weight[:, :8], rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_stored_has_the_parameters_that_were_chosen(scale):
    weight = torch.randn(4, 64) * torch.logspace(-20, 20, 4).unsqueeze(1)
    for encoding in (Float("e2m1", 16, scale), Affine(4, 16, False, scale=scale)):
        grouped = encoding.grouped(weight)
        chosen = encoding.parameters(grouped)
        arrays = encoding.store(encoding.quantize(grouped, chosen), chosen, (4, 64))
        assert torch.equal(encoding.load(arrays, (4, 64))[1]["scale"], chosen["scale"])


@pytest.mark.parametrize("scale", [s for s in SCALES if s != "e4m3"])
def test_the_contract_of_integers_under_every_scale(scale):
    shapes = ((4, 64), (5, 7))
    check_encoding(Affine(4, 16, scale=scale), shapes=shapes)
    check_encoding(Affine(8, 0, scale=scale), shapes=shapes)


def extremes(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Tensors at the ends of float32, with one outlier, with rows or columns of all sizes, and of one value a row."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = {f"{size:g}": normal * size for size in (1e-45, 1e-38, 1e-30, 1e-8, 1e8, 1e30, 1e37, 1e38)}
    made["outlier"] = torch.where(torch.arange(shape[1]) == 3, 1e30, normal * 1e-30)
    made["rows"] = normal * torch.logspace(-38, 37, shape[0]).unsqueeze(1)
    made["columns"] = normal * torch.logspace(-38, 37, shape[1])
    made["constant"] = normal[:, :1].expand(shape)
    made["largest"] = torch.where(normal < 0, -TOP, TOP)
    made["not finite"] = torch.where(torch.arange(shape[1]) == 0, torch.nan, normal)
    return made | {"zeros": torch.zeros(shape), "far from zero": 1e6 + normal}


def accepted(encoding: Any, weight: torch.Tensor) -> bool:
    try:
        encoding.check(weight)
    except pc.OptionError:
        return False
    return True


def loses_everything(encoding: Any, weight: torch.Tensor) -> bool:
    """Whether what is stored is no number, or farther from the weight than zeros; subnormal numbers are zeros."""
    decoded = encoding.decode(encoding.encode(weight), tuple(weight.shape)).double()
    error, norm = (decoded - weight.double()).norm(), weight.double().norm()
    if weight.abs().max() < 2.0**-126:
        return not decoded.abs().max() <= ZERO
    return not error <= norm * (1 + 1e-9)


AT_EXTREMES = [
    *(Affine(4, group) for group in (-1, 0, 8)),
    *(Affine(bits, 8, False, zero) for bits in (1, 4) for zero in ("integer", "float")),
    *(Float(name, 8) for name in ("e2m1", "e4m3", "e5m2", "e8m7")),
    *(Binary(8), Binary(0), Ternary(8), Nested(6, 2, 8), Nested(8, 4, 0), NF4(8), Codebook(3, 8)),
]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("encoding", AT_EXTREMES, ids=str)
def test_what_is_not_refused_is_stored_better_than_zeros(encoding, scale):
    encoding = under(encoding, scale)
    for shape in ((3, 16), (5, 1)):
        for kind, weight in extremes(shape).items():
            if accepted(encoding, weight):
                assert not loses_everything(encoding, weight), (kind, shape)


@pytest.mark.parametrize("encoding", AT_EXTREMES, ids=str)
def test_scales_in_float32_reach_all_sizes_but_the_last(encoding):
    refused = {kind for kind, weight in extremes((3, 16)).items() if not accepted(encoding, weight)}
    assert refused == {"1e+38", "largest", "not finite"}


def test_a_scale_that_does_not_reach_would_lose_everything(refused):
    weight = torch.randn(4, 16) * 1e-30
    assert loses_everything(Binary(0, "float16"), weight)
    error = refused(
        pc.OptionError,
        "no scale of Binary(group=0, scale='float16') fits weights up to",
        lambda: Binary(0, "float16").check(weight),
    )
    assert error.fix.startswith("use scale='float32'")
    sparse = NM(2, 4, Affine(4, 0, scale="float16"))
    refused(pc.OptionError, "no scale of Affine", lambda: sparse.check(weight))
    Affine(4, 0, scale="float16").check(weight * 1e30)


@pytest.mark.parametrize(
    "encoding", [Binary(0, "float16"), Affine(4, 0, False, "float", "float16"), Nested(6, 2, -1, "e8m0-ceil")], ids=str
)
def test_the_contract_at_the_ends_of_a_format(encoding):
    check_encoding(encoding, shapes=((12, 256), (5, 7)), idempotent=None)


# -- ONNX Runtime ------------------------------------------------------------------------------------------------

ON_ONNX_RUNTIME = [
    Float("e2m1", 32),
    Float("e2m1", 16, "e4m3"),
    Float("e4m5", 32, "e8m0-ceil"),
    Float("e8m7", -1),
    Binary(32),
    Ternary(32, "e8m0"),
    Nested(6, 3, 0, "shift"),
    NM(2, 4, Float("e4m3", 0, "float16")),
]


class Layers(nn.Module):
    """For every encoding an embedding and a linear layer; rows and columns of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(24, 64) for _ in ON_ONNX_RUNTIME)
        self.linears = nn.ModuleList(nn.Linear(64, 12) for _ in ON_ONNX_RUNTIME)
        with torch.no_grad():
            for table in self.tables:
                table.weight *= torch.logspace(-12, 12, 24, base=2).unsqueeze(1)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t(ids) for t in self.tables) + tuple(f(x) for f in self.linears)


@dataclass(frozen=True)
class Store(pc.EncodePass):
    """Stores embeddings and linear layers under one encoding."""

    name: ClassVar[str] = "store"
    phase: ClassVar[pc.Phase] = pc.Phase.QUANTIZE
    kinds: ClassVar[tuple[str, ...]] = ("linear", "embedding")
    values: Any = None

    def encoding(self) -> pc.Encoding:
        return self.values


def test_onnx_runtime_equals_the_reference_under_every_encoding():
    count = len(ON_ONNX_RUNTIME)
    passes = [Store(e, targets=(f"tables.{i}", f"linears.{i}")) for i, e in enumerate(ON_ONNX_RUNTIME)]
    inputs = (torch.arange(24), torch.randn(5, 64))
    compiled = pc.compile(Layers().eval(), passes, example_inputs=inputs, target="onnxruntime")
    stored = [str(row.encoding) for row in compiled.explain().rows]
    assert sorted(stored) == sorted(2 * [str(e) for e in ON_ONNX_RUNTIME])
    found, expected = compiled(*inputs), compiled.program(*inputs)
    for encoding, ours, theirs in zip(ON_ONNX_RUNTIME, found[:count], expected[:count], strict=True):
        assert torch.equal(ours, theirs), encoding  # look-ups and products of two float32: the same bits
    for encoding, ours, theirs in zip(ON_ONNX_RUNTIME, found[count:], expected[count:], strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= 1e-5, encoding  # float32 sums in another order


def test_quantize_takes_every_encoding_as_text():
    model = nn.Sequential(nn.Embedding(24, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    ids = torch.arange(24).reshape(2, 12)
    for text in ("Float('e2m1', group=32)", "Float('e2m1', 16, 'e4m3')", "Ternary(32)", "Nested(8, 4, 32)"):
        passes = [{"quantize": {"scheme": "W8A16", "weights": text, "fitter": "mse"}}]
        compiled = pc.compile(model, passes, example_inputs=(ids,), target="eager")
        stored = [row.encoding for row in compiled.explain().rows if row.encoding != "dense"]
        assert stored == [str(pc.parse_encoding(text))] * 2
        assert 0 < float((compiled(ids) - model(ids)).detach().abs().max()) < 1


def test_quantize_on_onnx_runtime():
    model = nn.Sequential(nn.Embedding(24, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).eval()
    ids = torch.arange(24).reshape(2, 12)
    passes = [{"quantize": {"scheme": "W8A16", "weights": "Float('e2m1', group=32)", "fitter": "rtn"}}]
    compiled = pc.compile(model, passes, example_inputs=(ids,), target="onnxruntime")
    torch.testing.assert_close(compiled(ids), compiled.program(ids), rtol=0, atol=1e-5)


def test_the_encodings_are_registered():
    registry()
    for name in ("Float", "Binary", "Ternary", "Nested"):
        assert pc.parse_encoding(f"{name}()") == getattr(pc, name)()
