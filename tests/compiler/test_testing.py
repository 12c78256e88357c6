"""The conformance kit takes what is sound, and rejects a planted fault for every one of its rules."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import paretoc as pc
import paretoc.testing
import pytest
import torch
from paretoc.compiler import encoding_rules, pass_rules
from paretoc.compiler.encodings import base
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import weight_sites
from torch import Tensor, nn

aten = torch.ops.aten


def rejected(rule: str, sentence: str, call: Any) -> pc.ConformanceError:
    """`call` breaks exactly this rule, with this sentence, in three lines."""
    with pytest.raises(pc.ConformanceError) as caught:
        call()
    error = caught.value
    assert f"rule {rule}" in error.where, error
    assert sentence in error.what, error
    assert len(str(error).splitlines()) == 3 and error.fix, error
    return error


# -- encodings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound(pc.Encoding):
    """8-bit codes and one scale a row, in the shortest form that keeps the contract."""

    levels: int = 127

    def layout(self, shape):
        return {"codes": (shape, torch.int8), "scale": ((shape[0], *[1] * (len(shape) - 1)), torch.float32)}

    def encode(self, weight, fit=None):
        if fit is not None:
            return fit(self, weight)
        peak = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        scale = torch.where(peak > 0, peak, torch.ones_like(peak)) / self.levels
        return {"codes": torch.round(weight.float() / scale).to(torch.int8).contiguous(), "scale": scale}

    def decode(self, arrays, shape):
        return arrays["codes"].float() * arrays["scale"]


@dataclass
class Thawed(pc.Encoding):
    levels: int = 127


class Undecorated(Sound):
    pass


@dataclass(frozen=True)
class WithList(Sound):
    places: Any = field(default_factory=list)


@dataclass(frozen=True)
class HidesAnOption(Sound):
    levels: int = field(default=127, repr=False)


@dataclass(frozen=True)
class OrdersArrays(Sound):
    def encode(self, weight, fit=None):
        return dict(reversed(super().encode(weight, fit).items()))


@dataclass(frozen=True)
class StoresInt16(Sound):
    def encode(self, weight, fit=None):
        arrays = super().encode(weight, fit)
        return arrays | {"codes": arrays["codes"].to(torch.int16)}


@dataclass(frozen=True)
class StoresATransposedView(Sound):
    def encode(self, weight, fit=None):
        arrays = super().encode(weight, fit)
        return arrays | {"codes": arrays["codes"].transpose(0, 1).contiguous().transpose(0, 1)}


@dataclass(frozen=True)
class StoresNothing(Sound):
    def layout(self, shape):
        return {}

    def encode(self, weight, fit=None):
        return {}


@dataclass(frozen=True)
class CountsBits(Sound):
    def nbytes(self, shape):
        return shape[0] * shape[1]


@dataclass(frozen=True)
class DividesByZero(Sound):
    def encode(self, weight, fit=None):
        scale = weight.float().abs().amax(tuple(range(1, weight.ndim)), keepdim=True)
        return {"codes": torch.round(weight.float() / scale * 127).to(torch.int8), "scale": scale / 127}

    def decode(self, arrays, shape):
        return arrays["codes"] / (1 / arrays["scale"]) * (arrays["scale"] / arrays["scale"])


@dataclass(frozen=True)
class Overflows(Sound):
    def decode(self, arrays, shape):
        return super().decode(arrays, shape) * arrays["scale"].square() / arrays["scale"].square()


@dataclass(frozen=True)
class Flattens(Sound):
    def decode(self, arrays, shape):
        return super().decode(arrays, shape).flatten()


@dataclass(frozen=True)
class DecodesToIntegers(Sound):
    def decode(self, arrays, shape):
        return super().decode(arrays, shape).int()


@dataclass(frozen=True)
class ForgetsTheOrder(Sound):
    def decode(self, arrays, shape):
        return super().decode(arrays, shape).flip(1)


@dataclass(frozen=True)
class DecodesToNothing(Sound):
    def decode(self, arrays, shape):
        return super().decode(arrays, shape) * 0


@dataclass(frozen=True)
class ShiftsZero(Sound):
    def decode(self, arrays, shape):
        return torch.where(arrays["codes"] == 0, 0.4 * arrays["scale"], super().decode(arrays, shape))


@dataclass(frozen=True)
class Dithers(Sound):
    def encode(self, weight, fit=None):
        return super().encode(weight + torch.rand_like(weight) * 0.1 * weight.abs())


@dataclass(frozen=True)
class ReadsTheMemory(Sound):
    def encode(self, weight, fit=None):
        shape = weight.shape
        return super().encode(weight.as_strided(shape, torch.empty(shape).stride()))


@dataclass(frozen=True)
class WritesIntoTheWeight(Sound):
    def encode(self, weight, fit=None):
        arrays = super().encode(weight, fit)
        weight.mul_(0.5)
        return arrays


@dataclass(frozen=True)
class WritesIntoTheArrays(Sound):
    def decode(self, arrays, shape):
        decoded = super().decode(arrays, shape)
        arrays["scale"].zero_()
        return decoded


@dataclass(frozen=True)
class AddsAnArray(Sound):
    def decode(self, arrays, shape):
        decoded = super().decode(arrays, shape)
        arrays["cache"] = decoded
        return decoded


@dataclass(frozen=True)
class Clips(Sound):
    def encode(self, weight, fit=None):
        if fit is not None:
            return fit(self, weight)
        arrays = super().encode(weight)
        return arrays | {"scale": arrays["scale"] * 0.99}


@dataclass(frozen=True)
class TakesNoFit(Sound):
    def encode(self, weight):
        return super().encode(weight)


@dataclass(frozen=True)
class MistreatsTheFit(Sound):
    def encode(self, weight, fit=None):
        return super().encode(weight) if fit is None else fit(self, weight * 0.5)


@dataclass(frozen=True)
class KeepsAState(Sound):
    state: float = field(default=1.0, compare=False, repr=False)

    def decode(self, arrays, shape):
        return super().decode(arrays, shape) * self.state


@dataclass(frozen=True)
class BranchesOnValues(Sound):
    def decode(self, arrays, shape):
        return super().decode(arrays, shape) * (1.0 if arrays["scale"].max() > 0 else 0.5)


@dataclass(frozen=True)
class UsesNumPy(Sound):
    def decode(self, arrays, shape):
        return torch.from_numpy(arrays["codes"].detach().numpy().astype("float32")) * arrays["scale"]


ENCODING_FAULTS = [
    ("encoding_is_frozen", Thawed(), "Thawed is not a frozen dataclass"),
    ("encoding_is_frozen", Undecorated(), "Undecorated is not a frozen dataclass"),
    ("encoding_is_frozen", WithList(), "it cannot be hashed: unhashable type: 'list'"),
    ("encoding_text_reads_back", HidesAnOption(levels=63), "its text reads back as HidesAnOption()"),
    ("arrays_have_the_layout", OrdersArrays(), "encode returns scale [12, 1] torch.float32, codes"),
    ("arrays_have_the_layout", StoresInt16(), "codes [12, 256] torch.int16"),
    ("arrays_have_the_layout", StoresATransposedView(), "the array 'codes' is not contiguous"),
    ("arrays_have_the_layout", StoresNothing(), "it stores nothing"),
    ("nbytes_is_exact", CountsBits(), "nbytes says 3072, the arrays take 3120 bytes"),
    ("decode_is_finite", DividesByZero(), "3072 of 3072 weights decode to NaN or infinity"),
    ("decode_is_finite", Overflows(), "weights decode to NaN or infinity"),
    ("decode_is_finite", Flattens(), "a weight of shape [12, 256] decodes to [3072]"),
    ("decode_is_finite", DecodesToIntegers(), "it decodes to torch.int32"),
    ("decode_is_near", ForgetsTheOrder(), "the relative error is 1.4"),
    ("decode_is_near", DecodesToNothing(), "the relative error is 1; storing zeros has 1"),
    ("decode_is_near", ShiftsZero(), "a tensor of zeros decodes to values up to 0.0031"),
    ("encode_is_deterministic", Dithers(), "encoding the same weight twice gives different arrays"),
    (
        "encode_ignores_strides",
        ReadsTheMemory(),
        "a transposed view of the same values is stored differently",
    ),
    ("arguments_are_left_alone", WritesIntoTheWeight(), "encode changes the weight it is given"),
    ("arguments_are_left_alone", WritesIntoTheArrays(), "decode changes the arrays it is given"),
    ("arguments_are_left_alone", AddsAnArray(), "decode changes the arrays it is given"),
    ("encode_is_idempotent", Clips(), "storing the decoded tensor again moves it by 0.0"),
    ("encode_takes_a_fit", TakesNoFit(), "TypeError: TakesNoFit.encode() takes 2 positional arguments"),
    ("encode_takes_a_fit", MistreatsTheFit(), "encode with a fitter that rounds to nearest differs"),
    (
        "operator_equals_decode",
        KeepsAState(state=1 + 2**-22),
        "torch.ops.paretoc.decode differs from Encoding.decode",
    ),
    ("decode_can_be_traced", BranchesOnValues(), "RuntimeError"),
    ("decode_can_be_traced", UsesNumPy(), ""),
]


@pytest.fixture
def offer(monkeypatch):
    """Register a class for the length of one test, as a plugin would."""

    def register(thing: Any) -> Any:
        if isinstance(thing, pc.Encoding):
            monkeypatch.setitem(base._ENCODINGS, type(thing).__name__, type(thing))
        else:
            monkeypatch.setitem(registry().passes, thing.name, type(thing))
        return thing

    return register


def test_a_sound_encoding_is_accepted(offer):
    assert pc.testing.check_encoding(offer(Sound()), targets=("eager",)) is None


@pytest.mark.parametrize(
    "text",
    [
        "Dense()",
        "Dense(dtype='bfloat16')",
        "Affine(bits=2, group=-1)",
        "Affine(bits=3)",
        "Affine(bits=8, symmetric=False)",
        "Affine(bits=4, group=32, symmetric=False)",
        "NM(n=2, m=4)",
        "NM(n=1, m=4, values=Affine(bits=4, group=32))",
    ],
)
def test_the_built_in_encodings_conform(text):
    pc.testing.check_encoding(pc.parse_encoding(text))


@pytest.mark.parametrize(("rule", "encoding", "sentence"), ENCODING_FAULTS, ids=lambda v: type(v).__name__)
def test_a_faulty_encoding_is_rejected(offer, rule, encoding, sentence):
    rejected(rule, sentence, lambda: pc.testing.check_encoding(offer(encoding)))


def test_an_encoding_of_no_plugin_is_rejected():
    rejected(
        "encoding_is_registered",
        "no plugin offers an encoding 'Sound'",
        lambda: pc.testing.check_encoding(Sound()),
    )


def test_a_wrong_shape_rule_is_rejected():
    class Lying(encoding_rules.Stored):
        def operator(self, dtype):
            return super().operator(dtype).transpose(0, 1)

    weight = torch.randn(3, 4)
    encoding_rules.shape_rule_agrees(encoding_rules.Stored(pc.Affine(), "normal", weight, 0, None))
    with pytest.raises(pc.ConformanceError, match=r"the shape rule says \[3, 4\], the operator gives \[4, 3\]"):
        encoding_rules.shape_rule_agrees(Lying(pc.Affine(), "normal", weight, 0, None))


def test_a_target_that_computes_something_else_is_rejected(monkeypatch):
    class Lying(type(registry().backend("eager"))):
        def lower(self, program, options):
            executable = super().lower(program, options)
            run = executable.run
            executable.run = lambda inputs: [output * 1.001 for output in run(inputs)]
            return executable

    monkeypatch.setitem(registry().backends, "lying", Lying())
    call = lambda: pc.testing.check_encoding(pc.Affine(), shapes=[(4, 8)], targets=("eager", "lying"))  # noqa: E731
    error = rejected("target_runs_it", "the outputs differ by 0.001 of the largest", call)
    assert "target 'lying'" in error.where


def test_every_rule_for_encodings_has_a_planted_fault():
    planted = {rule for rule, _, _ in ENCODING_FAULTS}
    planted |= {"encoding_is_registered", "shape_rule_agrees", "target_runs_it"}  # the three tests above
    lists = (
        encoding_rules.ENCODING_RULES,
        encoding_rules.TENSOR_RULES,
        encoding_rules.TRACE_RULES,
        encoding_rules.TARGET_RULES,
    )
    assert planted == {rule.__name__ for rules in lists for rule in rules}


@dataclass(frozen=True)
class OnlyEven(Sound):
    def layout(self, shape):
        if shape[0] % 2:
            raise pc.OptionError(f"{shape[0]} rows do not come in pairs", where="here", fix="use an even number")
        return super().layout(shape)

    def check(self, weight):
        super().check(weight)
        if weight.abs().max() > 1e20:
            raise pc.OptionError("too large", where="here", fix="scale the model")

    def encode(self, weight, fit=None):
        assert len(weight) % 2 == 0
        assert weight.abs().max() <= 1e20
        return super().encode(weight, fit)


def test_shapes_and_weights_that_are_refused_in_three_lines_are_left_out(offer):
    pc.testing.check_encoding(offer(OnlyEven()))
    with pytest.raises(pc.ConformanceError, match="layout refuses each of the 2 shapes"):
        pc.testing.check_encoding(offer(OnlyEven()), shapes=[(3, 4), (5, 4)])


@dataclass(frozen=True)
class Fails(Sound):
    def layout(self, shape):
        raise ValueError("odd")


def test_any_other_exception_from_layout_is_a_fault(offer):
    with pytest.raises(pc.ConformanceError, match="layout raises ValueError: odd"):
        pc.testing.check_encoding(offer(Fails()))


def test_idempotence_can_be_waived(offer):
    pc.testing.check_encoding(offer(Clips()), idempotent=None)


# -- passes -------------------------------------------------------------------------------------------------


def scale_weights(program: pc.Program, sites: Any, factor: float) -> pc.PassResult:
    for site in sites:
        program.set(program.weight_name(site.weight), program.weight_value(site.weight) * factor)
    program.refresh()
    return pc.PassResult(matched=[site.path for site in sites])


@dataclass(frozen=True)
class Halve(pc.SitePass):
    """W → W/2: a pass that keeps the contract."""

    name: ClassVar[str] = "halve"
    phase: ClassVar[pc.Phase] = pc.Phase.TRANSFORM
    positional: ClassVar[str | None] = "factor"

    factor: float = 0.5

    def apply(self, program, ctx):
        return scale_weights(program, self.sites(program), self.factor)


class Bare(Halve):
    pass


@dataclass(frozen=True)
class ListOption(Halve):
    places: Any = field(default_factory=list)


@dataclass(frozen=True)
class Spaced(Halve):
    name: ClassVar[str] = "halve the weights"


@dataclass(frozen=True)
class NumberedPhase(Halve):
    phase: ClassVar[Any] = 8


@dataclass(frozen=True)
class AfterAString(Halve):
    after: ClassVar[Any] = "quantize"


@dataclass(frozen=True)
class NoSuchPositional(Halve):
    positional: ClassVar[str | None] = "amount"


@dataclass(frozen=True)
class MisplacedPositional(Halve):
    positional: ClassVar[str | None] = "amount"

    amount: int = 3


@dataclass(frozen=True)
class Drifts(Halve):
    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "factor", self.factor / 2)


@dataclass(frozen=True)
class TakesAnything(Halve):
    no_such_option: int = 0


@dataclass(frozen=True)
class Rewrites(pc.Pass):
    """Base of the faults below: put one operator in front of the first output."""

    name: ClassVar[str] = "rewrites"

    def node(self, program, output):
        raise NotImplementedError

    def finish(self, program, node):
        program.refresh()

    def apply(self, program, ctx):
        output = program.outputs[0]
        with program.graph.inserting_before(program.output):
            node = self.node(program, output)
        output.replace_all_uses_with(node, delete_user_cb=lambda user: user.op == "output")
        self.finish(program, node)
        return pc.PassResult(matched=["output"])


@dataclass(frozen=True)
class ChangesTheShape(Rewrites):
    def node(self, program, output):
        return program.graph.call_function(aten.unsqueeze.default, (output, 0))


@dataclass(frozen=True)
class HidesTheNewShape(ChangesTheShape):
    def finish(self, program, node):
        node.meta["val"] = node.args[0].meta["val"]
        program.module.recompile()


@dataclass(frozen=True)
class StoresNaN(Halve):
    def apply(self, program, ctx):
        return scale_weights(program, self.sites(program), float("nan"))


@dataclass(frozen=True)
class DividesTheOutput(Rewrites):
    def node(self, program, output):
        return program.graph.call_function(aten.div.Tensor, (output, 0.0))


@dataclass(frozen=True)
class WritesInPlace(Halve):
    def apply(self, program, ctx):
        for site in self.sites(program):
            program.weight_value(site.weight).mul_(0.5)
        return pc.PassResult(matched=[site.path for site in self.sites(program)])


@dataclass(frozen=True)
class Gambles(Halve):
    def apply(self, program, ctx):
        return scale_weights(program, self.sites(program), random.random())


@dataclass(frozen=True)
class ReturnsNothing(Halve):
    def apply(self, program, ctx):
        super().apply(program, ctx)


@dataclass(frozen=True)
class InventsASite(Halve):
    def apply(self, program, ctx):
        super().apply(program, ctx)
        return pc.PassResult(matched=["nowhere"])


@dataclass(frozen=True)
class MatchesNothing(Halve):
    def apply(self, program, ctx):
        return pc.PassResult()


@dataclass(frozen=True)
class KeepsSilent(Rewrites):
    def node(self, program, output):
        return program.graph.call_function(aten.mul.Tensor, (output, 0.5))

    def apply(self, program, ctx):
        super().apply(program, ctx)
        return pc.PassResult()


@dataclass(frozen=True)
class IgnoresIgnore(Halve):
    def apply(self, program, ctx):
        return scale_weights(program, weight_sites(program), self.factor)


@dataclass(frozen=True)
class IgnoresTargets(Halve):
    def apply(self, program, ctx):
        return scale_weights(program, dataclasses.replace(self, targets=()).sites(program), self.factor)


@dataclass(frozen=True)
class LeavesATensor(Halve):
    def apply(self, program, ctx):
        result = super().apply(program, ctx)
        program.set("left_over", torch.zeros(3))
        return result


@dataclass(frozen=True)
class LeavesANode(Rewrites):
    def node(self, program, output):
        program.graph.call_function(aten.neg.default, (program.placeholders[0],))
        return program.graph.call_function(aten.mul.Tensor, (output, 0.5))

    def finish(self, program, node):
        program.propagate_shapes()
        program.module.recompile()


@dataclass(frozen=True)
class RecordsNoShape(Rewrites):
    def node(self, program, output):
        half = program.graph.call_function(aten.mul.Tensor, (output, 0.25))
        return program.graph.call_function(aten.mul.Tensor, (half, 2.0))

    def finish(self, program, node):
        node.meta["val"] = node.args[0].args[0].meta["val"]
        program.module.recompile()


CALLS = [0]


def counted(x: Tensor) -> Tensor:
    """Not a function of its argument."""
    CALLS[0] += 1
    return x * (1 + 1e-3 * CALLS[0])


@dataclass(frozen=True)
class KeepsCount(Rewrites):
    def node(self, program, output):
        return program.graph.call_function(counted, (output,))


@dataclass(frozen=True)
class FreezesTheBatch(Rewrites):
    def node(self, program, output):
        rows = program.attribute("rows", torch.arange(4), before=program.output)
        return program.graph.call_function(aten.index_select.default, (output, 0, rows))


@dataclass(frozen=True)
class WantsOneTarget(Halve):
    def apply(self, program, ctx):
        if ctx.target != "onnxruntime":
            raise pc.PassError("it runs on ONNX Runtime only", where="here", fix="use that")
        return super().apply(program, ctx)


@dataclass(frozen=True)
class Crashes(Halve):
    def apply(self, program, ctx):
        raise ZeroDivisionError("by zero")


PASS_FAULTS = [
    ("pass_is_frozen", Bare(), "Bare is not a frozen dataclass"),
    ("pass_is_frozen", ListOption(), "it cannot be hashed: unhashable type: 'list'"),
    ("pass_has_a_name", Spaced(), "'halve the weights' is not a name for a pass"),
    ("pass_has_a_place", NumberedPhase(), "phase is 8"),
    ("pass_has_a_place", AfterAString(), "after is 'quantize'"),
    (
        "pass_has_a_place",
        NoSuchPositional(),
        "positional is 'amount', the options are ['targets', 'ignore', 'factor']",
    ),
    (
        "pass_takes_its_positional_first",
        MisplacedPositional(),
        "the bare value of the text form sets 'amount', the first argument sets 'factor'",
    ),
    ("pass_text_reads_back", Drifts(), "'halve:0.25' builds Drifts("),
    ("pass_refuses_unknown_options", TakesAnything(), "it takes an option 'no_such_option'"),
    (
        "interface_is_kept",
        ChangesTheShape(),
        "output 0 was [4, 8] torch.float32 and is [1, 4, 8] torch.float32",
    ),
    (
        "interface_is_kept",
        HidesTheNewShape(),
        "output 0 was [4, 8] torch.float32 and is [1, 4, 8] torch.float32",
    ),
    ("interface_is_kept", StoresNaN(), "the stored tensor 'up.weight' holds NaN or infinite values"),
    ("interface_is_kept", Crashes(), "ZeroDivisionError: by zero"),
    ("outputs_are_finite", DividesTheOutput(), "output 0 holds NaN or infinite values"),
    ("original_is_untouched", WritesInPlace(), "the pass wrote into 'up.weight' of the original program"),
    ("pass_is_deterministic", Gambles(), "applying it twice with one seed differs in the tensor 'up.weight'"),
    ("changes_are_reported", ReturnsNothing(), "apply returns NoneType"),
    ("changes_are_reported", InventsASite(), "it reports ['nowhere'], which is no site of the model"),
    ("changes_are_reported", MatchesNothing(), "it changed no site"),
    ("changes_are_reported", KeepsSilent(), "it changed the program and reports nothing"),
    ("targets_are_respected", IgnoresIgnore(), "it changed 'up' in spite of ignore="),
    ("targets_are_respected", IgnoresTargets(), "it takes a target that matches nothing"),
    ("graph_is_tidy", LeavesATensor(), "nothing reads the stored tensor 'left_over'"),
    ("graph_is_tidy", LeavesANode(), "the graph holds nodes that nothing reads"),
    ("shapes_are_true", RecordsNoShape(), "the recorded shape of node 'mul_tensor' is not that of its value"),
    ("clone_is_equal", KeepsCount(), "a clone of the rewritten program computes something else"),
    ("other_batches_run", FreezesTheBatch(), "it fails at batch size 1"),
    ("compile_takes_it", WantsOneTarget(), "it runs on ONNX Runtime only"),
]


@pytest.fixture
def small(models):
    """A model with two linears and four rows of input."""
    torch.manual_seed(0)
    return models.Mlp().eval(), torch.randn(4, 16)


def test_a_sound_pass_is_accepted_and_its_report_returned(offer, small):
    result = pc.testing.check_pass(offer(Halve(factor=0.75)), *small)
    assert result.matched == ["up", "down"]
    assert pc.testing.check_pass(Halve()).matched == ["up", "middle", "head"]


@pytest.mark.parametrize(("rule", "transform", "sentence"), PASS_FAULTS, ids=lambda v: type(v).__name__)
def test_a_faulty_pass_is_rejected(offer, small, rule, transform, sentence):
    rejected(rule, sentence, lambda: pc.testing.check_pass(offer(transform), *small))


def test_what_is_no_pass_is_rejected():
    rejected("pass_is_frozen", "str is not a Pass", lambda: pc.testing.check_pass("quantize"))


def test_a_pass_of_no_plugin_is_rejected(small):
    rejected(
        "pass_is_registered",
        "no plugin offers a pass 'halve'",
        lambda: pc.testing.check_pass(Halve(), *small),
    )


def test_every_rule_for_passes_has_a_planted_fault():
    planted = {rule for rule, _, _ in PASS_FAULTS} | {"pass_is_registered"}
    assert planted == {rule.__name__ for rule in (*pass_rules.PASS_RULES, *pass_rules.TRIAL_RULES)}


@dataclass(frozen=True)
class Refuses(Halve):
    def apply(self, program, ctx):
        raise pc.PassError("there is no flux capacitor", where="here", fix="build one")


@dataclass(frozen=True)
class WantsImages(Halve):
    def apply(self, program, ctx):
        if program.example[0].ndim != 4:
            raise pc.PassError("these are no images", where="here", fix="use images")
        return super().apply(program, ctx)


def test_a_pass_may_refuse_one_default_model_but_not_both(offer):
    assert "head" in pc.testing.check_pass(offer(WantsImages())).matched
    with pytest.raises(pc.ConformanceError) as caught:
        pc.testing.check_pass(offer(Refuses()))
    expected = "Perceptron: there is no flux capacitor; VisionTransformer: there is no flux capacitor"
    assert caught.value.what == f"it refuses every default model: {expected}"
    assert len(str(caught.value).splitlines()) == 3


def test_a_pass_may_not_refuse_the_model_it_is_given(offer, small):
    rejected(
        "interface_is_kept",
        "there is no flux capacitor",
        lambda: pc.testing.check_pass(offer(Refuses()), *small),
    )


@pytest.mark.parametrize(
    "transform",
    [
        pc.Canonicalize(),
        pc.PruneNM(pattern="2:4"),
        pc.Quantize(scheme="W8A8"),
        pc.Quantize(scheme="W4A16", fitter="rtn", ignore="re:^head$"),
        pc.MergeTokens(r=2),
        pc.PruneTokens(keep=0.6, fuse=True),
    ],
    ids=lambda transform: transform.describe(),
)
def test_the_built_in_passes_conform(transform):
    pc.testing.check_pass(transform)


def test_a_pass_that_needs_a_second_model_conforms(small, models):
    model, x = small
    pc.testing.check_pass(pc.MergeModels(models=(models.Mlp(),)), model, x)


def test_the_given_calibration_data_is_used(offer, small, refused):
    model, x = small
    pc.testing.check_pass(pc.Quantize(scheme="W8A8"), model, x, calibration=[x, x * 2])
    rejected(
        "interface_is_kept",
        "the calibration data is empty",
        lambda: pc.testing.check_pass(pc.Quantize(scheme="W8A8"), model, x, calibration=[]),
    )


def test_the_default_models_are_always_the_same_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = pass_rules.default_models(), pass_rules.default_models()
    assert torch.equal(torch.rand(1), expected)
    for (_, a, x), (_, b, y) in zip(first, second, strict=True):
        assert isinstance(a, nn.Module) and torch.equal(x, y)
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
