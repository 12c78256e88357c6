"""The contract of an encoding, one rule a function; `paretoc.testing.check_encoding` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from . import dialect  # noqa: F401  # registers the paretoc:: operators
from .capture import capture
from .conformance import require, require_frozen, same
from .dialect.weights import reference_decode
from .encodings import Arrays, Encoding, parse_encoding, registered_encodings
from .errors import ConformanceError, OptionError
from .program import Program
from .registry import registry
from .sites import weight_sites

Shape = tuple[int, ...]

#: weights of a linear, of 2-D and 1-D convolutions, and odd sizes; an encoding may refuse some of them
SHAPES: tuple[Shape, ...] = ((12, 256), (4, 128, 3, 3), (6, 32, 5), (5, 7), (3, 5, 3, 3))
#: storing a decoded tensor again may move it by this share of its largest value: max = Q·scale and then
#: max / Q are two float32 roundings, of 6e-8 each
IDEMPOTENT = 1e-6
#: the outputs of a layer on a target differ from the reference by this share of the largest: float32 sums in another
#: order; decoding itself is the same everywhere
RUNTIME = 1e-5
#: the largest value that a tensor of zeros may decode to: scales are often kept from zero by a small constant
ZERO = 1e-4


def weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Weights as they come, and at the edges."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    outlier = normal.clone()
    outlier.view(-1)[-1] = 1e4
    return {
        "normal": normal,
        "zero": torch.zeros(shape),
        "huge": normal * 1e30,
        "tiny": normal * 1e-30,
        "outlier": outlier,
        "bfloat16": normal.bfloat16(),
    }


def accepts(encoding: Encoding, shape: Shape) -> bool:
    """Whether `layout` takes the shape; OptionError is how it refuses one, anything else is a fault."""
    try:
        encoding.layout(shape)
    except OptionError:
        return False
    except Exception as error:
        raise ConformanceError(
            f"layout raises {type(error).__name__}: {error}",
            where=f"{encoding}, shape {list(shape)}",
            fix="raise OptionError for a shape that cannot be stored like this",
        ) from error
    return True


@dataclass(frozen=True)
class Stored:
    """One weight under one encoding: the stored arrays, and what they decode to."""

    encoding: Encoding
    kind: str
    weight: Tensor
    seed: int
    tolerance: float | None

    @property
    def shape(self) -> Shape:
        return tuple(self.weight.shape)

    @property
    def accepted(self) -> bool:
        try:
            self.encoding.check(self.weight)
        except OptionError:
            return False
        return True

    @cached_property
    def arrays(self) -> Arrays:
        return self.encoding.encode(self.weight.clone())

    @cached_property
    def decoded(self) -> Tensor:
        return self.encoding.decode({name: array.clone() for name, array in self.arrays.items()}, self.shape)

    def operator(self, dtype: torch.dtype) -> Tensor:
        """What a graph that holds this weight computes."""
        decode = torch.ops.paretoc.decode.default
        result: Tensor = decode(list(self.arrays.values()), str(self.encoding), list(self.shape), dtype)
        return result


# -- of the encoding itself ---------------------------------------------------------------------------------


def encoding_is_frozen(encoding: Encoding) -> None:
    """An encoding is a frozen dataclass of hashable options: it is compared, and written into the graph."""
    require_frozen(encoding)


def encoding_is_registered(encoding: Encoding) -> None:
    """A plugin offers the class, so that a saved model can be read again."""
    registry()
    name = type(encoding).__name__
    require(
        registered_encodings().get(name) is type(encoding),
        f"no plugin offers an encoding {name!r}",
        "return the class from the hook paretoc_encodings, and install the distribution",
    )


def encoding_text_reads_back(encoding: Encoding) -> None:
    """`parse_encoding(str(encoding)) == encoding`: every option is in the text, a literal or an encoding."""
    parsed = parse_encoding(str(encoding))
    require(
        parsed == encoding,
        f"its text reads back as {parsed}",
        "let every option be a field of the dataclass, and leave str and repr as they are",
    )


# -- of every weight ----------------------------------------------------------------------------------------


def arrays_have_the_layout(stored: Stored) -> None:
    """`encode` returns what `layout` names: same order, shapes and dtypes, contiguous, at least one array."""
    layout = stored.encoding.layout(stored.shape)
    found = {name: (tuple(array.shape), array.dtype) for name, array in stored.arrays.items()}
    promised = {name: (tuple(shape), dtype) for name, (shape, dtype) in layout.items()}
    require(found, "it stores nothing", "store at least one array")
    require(
        list(found.items()) == list(promised.items()),
        f"encode returns {_listed(found)}, layout promises {_listed(promised)}",
        "make both agree, in the same order",
    )
    loose = [name for name, array in stored.arrays.items() if not array.is_contiguous()]
    require(not loose, f"the array {''.join(loose[:1])!r} is not contiguous", "call .contiguous()")


def _listed(layout: Mapping[str, tuple[Shape, torch.dtype]]) -> str:
    return ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in layout.items())


def nbytes_is_exact(stored: Stored) -> None:
    """`nbytes` is what the arrays take in memory, to the byte."""
    real = sum(array.numel() * array.element_size() for array in stored.arrays.values())
    told = stored.encoding.nbytes(stored.shape)
    require(told == real, f"nbytes says {told}, the arrays take {real} bytes", "leave nbytes to the base class")


def decode_is_finite(stored: Stored) -> None:
    """`decode` gives a finite floating tensor of the weight's shape, for every weight `check` accepts."""
    decoded = stored.decoded
    require(
        tuple(decoded.shape) == stored.shape,
        f"a weight of shape {list(stored.shape)} decodes to {list(decoded.shape)}",
        "reshape to the shape that decode is given",
    )
    require(decoded.is_floating_point(), f"it decodes to {decoded.dtype}", "decode to the dtype of the scales")
    bad = int((~torch.isfinite(decoded)).sum())
    require(
        bad == 0,
        f"{bad} of {decoded.numel()} weights decode to NaN or infinity",
        "guard scales against 0 and overflow, or raise OptionError in check",
    )


def decode_is_near(stored: Stored) -> None:
    """‖w − ŵ‖ ≤ ‖w‖: no worse than storing zeros, better for ordinary weights; zeros stay (almost) zero."""
    weight, decoded = stored.weight.double(), stored.decoded.double()
    if stored.kind == "zero":
        peak = float(decoded.abs().max())
        require(peak <= ZERO, f"a tensor of zeros decodes to values up to {peak:g}", f"stay below {ZERO:g}")
        return
    error = float((weight - decoded).norm() / weight.norm())
    require(
        error < 1 if stored.kind == "normal" else error <= 1 + 1e-9,
        f"the relative error is {error:.3g}; storing zeros has 1",
        "check the order and the scale of the codes",
    )


def encode_is_deterministic(stored: Stored) -> None:
    """Same weight, same bits, whatever the state of torch's generator."""
    with torch.random.fork_rng():
        torch.manual_seed(stored.seed + 1)
        again = stored.encoding.encode(stored.weight.clone())
    require(
        same(stored.arrays.values(), again.values()),
        "encoding the same weight twice gives different arrays",
        "draw what is random from torch.Generator().manual_seed(…)",
    )


def encode_ignores_strides(stored: Stored) -> None:
    """A weight that is a transposed view is stored like its contiguous copy, up to the order of sums."""
    if stored.weight.ndim < 2:
        return
    view = stored.weight.transpose(0, 1).contiguous().transpose(0, 1)
    decoded = stored.encoding.decode(stored.encoding.encode(view), stored.shape)
    require(
        _moved(stored.decoded, decoded) <= IDEMPOTENT,
        "a transposed view of the same values is stored differently",
        "use reshape, not the memory behind the tensor",
    )


def arguments_are_left_alone(stored: Stored) -> None:
    """`encode` does not write into the weight, nor `decode` into the arrays: other programs share them."""
    weight = stored.weight.clone()
    arrays = stored.encoding.encode(weight)
    require(torch.equal(weight, stored.weight), "encode changes the weight it is given", "work on a copy")
    kept = {name: array.clone() for name, array in arrays.items()}
    stored.encoding.decode(arrays, stored.shape)
    unchanged = list(kept) == list(arrays) and same(kept.values(), arrays.values())
    require(unchanged, "decode changes the arrays it is given", "work on a copy")


def encode_is_idempotent(stored: Stored) -> None:
    """What was decoded is stored again without loss, |ŵ′ − ŵ| ≤ tolerance · max|ŵ|: compiling twice is free.

    Not asked of bfloat16 weights: they take so few values that a range may end exactly between two codes,
    and then no rounding keeps both ends.
    """
    if stored.tolerance is None or stored.kind == "bfloat16":
        return
    twice = stored.encoding.decode(stored.encoding.encode(stored.decoded.clone()), stored.shape)
    moved = _moved(stored.decoded, twice)
    require(
        moved <= stored.tolerance,
        f"storing the decoded tensor again moves it by {moved:.3g} of its largest value",
        "let encode find decoded values exactly; idempotent=None waives this for an iterative search",
    )


def _moved(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny))


def encode_takes_a_fit(stored: Stored) -> None:
    """`encode(weight, fit)` works; a fitter that rounds to nearest gives what `encode(weight)` gives."""
    arrays = stored.encoding.encode(stored.weight.clone(), lambda inner, weight: inner.encode(weight))
    require(
        list(arrays) == list(stored.arrays) and same(arrays.values(), stored.arrays.values()),
        "encode with a fitter that rounds to nearest differs from encode without one",
        "let fit(self, weight) choose the arrays of the innermost encoding",
    )


def operator_equals_decode(stored: Stored) -> None:
    """`paretoc::decode` in a graph computes `Encoding.decode`, bit for bit, cast to the weight's dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        require(
            same([stored.operator(dtype)], [stored.decoded.to(dtype)]),
            f"torch.ops.paretoc.decode differs from Encoding.decode in {dtype}",
            "let decode depend on its arguments and the options alone",
        )


# -- of every shape -----------------------------------------------------------------------------------------


def shape_rule_agrees(stored: Stored) -> None:
    """Under fake tensors the operator has the shape, dtype and strides that it has with real ones."""
    real = stored.operator(torch.float32)
    with FakeTensorMode() as mode:
        arrays = [mode.from_tensor(array) for array in stored.arrays.values()]
        decode = torch.ops.paretoc.decode.default
        fake = decode(arrays, str(stored.encoding), list(stored.shape), torch.float32)
    require(
        (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()),
        f"the shape rule says {list(fake.shape)}, the operator gives {list(real.shape)}",
        "decode to the shape that it is given",
    )


def decode_can_be_traced(stored: Stored) -> None:
    """The trace of `decode` decodes the arrays of another weight too: this is how backends inline it."""

    def reference(*arrays: Tensor) -> Tensor:
        return reference_decode(arrays, str(stored.encoding), stored.shape, torch.float32)

    traced = make_fx(reference)(*stored.arrays.values())
    other = stored.encoding.encode(stored.weight.flip(0) * 0.5)
    require(
        same([traced(*other.values())], [stored.encoding.decode(other, stored.shape).float()]),
        "the traced decode has values of the traced weight baked in",
        "write decode in torch operators: no .item(), no NumPy, no branch on values",
    )


# -- of every target ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lowered:
    """A linear layer whose weight is stored under an encoding, and a target that shall run it."""

    encoding: Encoding
    shape: Shape
    seed: int
    target: str

    def program(self) -> Program:
        weight = weights((self.shape[0], prod(self.shape[1:])), self.seed)["normal"]
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight)
        program = capture(layer, weight[:2].clone())
        program.encode(weight_sites(program)[0].weight, self.encoding, self.encoding.encode(weight))
        program.refresh()
        return program


def target_runs_it(lowered: Lowered) -> None:
    """The target's layer equals the reference up to float32 sums: |y − ŷ| ≤ RUNTIME · max|y|."""
    program = lowered.program()
    executable = registry().backend(lowered.target).lower(program, {"seed": lowered.seed})
    expected, found = program.run(program.example)[0], executable.run(program.example)[0]
    error = _moved(expected, found)
    require(
        error <= RUNTIME,
        f"the outputs differ by {error:.3g} of the largest",
        "write decode in operators that the target has; its trace is what the target runs",
    )


ENCODING_RULES: tuple[Callable[[Encoding], None], ...] = (
    encoding_is_frozen,
    encoding_is_registered,
    encoding_text_reads_back,
)
TENSOR_RULES: tuple[Callable[[Stored], None], ...] = (
    arrays_have_the_layout,
    nbytes_is_exact,
    decode_is_finite,
    decode_is_near,
    encode_is_deterministic,
    encode_ignores_strides,
    arguments_are_left_alone,
    encode_is_idempotent,
    encode_takes_a_fit,
    operator_equals_decode,
)
#: run on the ordinary weights of every shape
TRACE_RULES: tuple[Callable[[Stored], None], ...] = (shape_rule_agrees, decode_can_be_traced)
#: run for every target that is asked for
TARGET_RULES: tuple[Callable[[Lowered], None], ...] = (target_runs_it,)
