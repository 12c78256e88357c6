"""The verifier: passes that break something are refused by name; distances against slow loops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from paretoc.compiler.capture import capture
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.errors import PassError, VerificationError
from paretoc.compiler.passes import Context, Pass, PassResult, Phase
from paretoc.compiler.program import Program
from paretoc.compiler.sites import weight_sites
from paretoc.compiler.verify import Fidelity, check, encodings_by_weight, measure
from torch import Tensor, nn

aten = torch.ops.aten
X = torch.randn(3, 16)


@dataclass(frozen=True)
class Broken(Pass):
    """A pass that breaks what `how` says."""

    name: ClassVar[str] = "broken"
    phase: ClassVar[Phase] = Phase.LOWER

    how: str = ""

    def apply(self, program: Program, ctx: Context) -> PassResult:
        getattr(self, self.how)(program)
        program.refresh()
        return PassResult()

    def nothing(self, program: Program) -> None:
        pass

    def shape(self, program: Program) -> None:
        self._wrap(program, aten.slice.Tensor, 1, 0, 5)

    def rank(self, program: Program) -> None:
        self._wrap(program, aten.unsqueeze.default, 0)

    def batch(self, program: Program) -> None:
        self._wrap(program, aten.slice.Tensor, 0, 0, 1)

    def dtype(self, program: Program) -> None:
        self._wrap(program, aten.to.dtype, torch.float64)

    def dropped_output(self, program: Program) -> None:
        program.output.args = ((),)

    def nan_weight(self, program: Program) -> None:
        program.set("up.bias", torch.full((32,), float("nan")))

    def infinite_weight(self, program: Program) -> None:
        program.set("up.bias", torch.full((32,), float("inf")))

    def nan_output(self, program: Program) -> None:
        self._wrap(program, aten.sub.Tensor, 1e30)
        self._wrap(program, aten.sqrt.default)

    def interface(self, program: Program) -> None:
        program.interface = replace(program.interface, parameters=("y",))

    def shapes_inside(self, program: Program) -> None:
        program.set("down.weight", torch.zeros(8, 31))

    def raises(self, program: Program) -> None:
        raise ZeroDivisionError("in the pass")

    def dense(self, program: Program) -> None:
        self._encode(program, lambda: Affine(8))

    def another_pattern(self, program: Program) -> None:
        self._encode(program, lambda: NM(3, 4))

    def behind_the_decode(self, program: Program) -> None:
        for decode in program.calls(torch.ops.paretoc.decode.default):
            with program.graph.inserting_after(decode):
                dense = program.graph.call_function(aten.roll.default, (decode, [1, 1], [0, 1]))
            decode.replace_all_uses_with(dense, delete_user_cb=lambda user, dense=dense: user is not dense)

    def _encode(self, program: Program, make) -> None:
        for site in weight_sites(program):
            program.encode(site.weight, make(), make().encode(program.weight_value(site.weight)))

    def _wrap(self, program: Program, target, *arguments) -> None:
        (result,) = program.outputs
        with program.graph.inserting_before(program.output):
            node = program.graph.call_function(target, (result, *arguments))
        program.output.args = ((node,),)


def test_a_pass_that_breaks_nothing_is_accepted(models, reference):
    model = models.Mlp()
    compiled = reference(model, [Broken("nothing")], X)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("shape", "output 0 was [3, 8] torch.float32 and is [3, 5] torch.float32"),
        ("rank", "output 0 was [3, 8] torch.float32 and is [1, 3, 8] torch.float32"),
        ("batch", "output 0 was [3, 8] torch.float32 and is [1, 8] torch.float32"),
        ("dtype", "output 0 was [3, 8] torch.float32 and is [3, 8] torch.float64"),
        ("dropped_output", "the model had 1 outputs and now has 0"),
        ("nan_weight", "the stored tensor 'up.bias' holds NaN or infinite values"),
        ("infinite_weight", "the stored tensor 'up.bias' holds NaN or infinite values"),
        ("nan_output", "output 'output' is NaN"),
        ("interface", "the call signature changed"),
    ],
)
def test_a_pass_that_breaks_the_model_is_refused(models, reference, refused, how, sentence):
    error = refused(VerificationError, sentence, lambda: reference(models.Mlp(), [Broken(how)], X))
    assert "broken" in error.where or how == "nan_output"


def test_the_pass_that_makes_nan_is_named(models, reference, refused):
    error = refused(VerificationError, "is NaN", lambda: reference(models.Mlp(), [Broken("nan_output")], X))
    assert "broken" in error.where


@pytest.mark.parametrize(("how", "now"), [("dense", "Affine(bits=8, group=0)"), ("another_pattern", "NM(n=3")])
def test_a_pass_that_undoes_the_sparsity_is_refused(models, reference, refused, how, now):
    sentence = "'up.weight' was 2:4 sparse and now is " + now
    error = refused(VerificationError, sentence, lambda: reference(models.Mlp(), ["prune_nm:2:4", Broken(how)], X))
    assert error.fix == "run this pass before prune_nm, or leave the site out"


def test_a_pass_that_changes_a_sparse_weight_behind_its_decode_is_refused(models, reference, refused):
    passes = ["prune_nm:2:4", Broken("behind_the_decode")]
    refused(VerificationError, "'up.weight' was 2:4 sparse", lambda: reference(models.Mlp(), passes, X))


def test_a_pass_that_writes_a_dense_weight_over_a_sparse_one_is_refused(models, refused):
    program = capture(models.Mlp(), X)
    after = program.clone()
    site = weight_sites(program)[0]
    program.encode(site.weight, NM(2, 4), NM(2, 4).encode(program.weight_value(site.weight)))
    refused(VerificationError, "'up.weight' was 2:4 sparse and now is None", lambda: check(program, after, "x"))


def test_a_pass_that_breaks_shapes_inside_is_refused(models, reference, refused):
    sentence = "shapes no longer fit after the rewrite"
    refused(PassError, sentence, lambda: reference(models.Mlp(), [Broken("shapes_inside")], X))


def test_a_pass_that_raises_is_named(models, reference, refused):
    sentence = "ZeroDivisionError: in the pass"
    error = refused(PassError, sentence, lambda: reference(models.Mlp(), [Broken("raises")], X))
    assert error.where == "pass 'broken:how=raises'"
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_without_verify_nothing_is_checked(models, reference):
    compiled = reference(models.Mlp(), [Broken("shape")], X, verify=False)
    assert compiled(X).shape == (3, 5)
    assert compiled.report(latency=False).fidelity is None


def test_a_failed_pass_leaves_the_program_before_it_alone(models):
    program = capture(models.Mlp(), X)
    after = program.clone()
    Broken("nan_weight").apply(after, Context())
    assert torch.isfinite(program(X)).all()


def test_encodings_by_weight(models):
    program = capture(models.TiedLanguageModel(), torch.randint(0, 48, (2, 5)))
    names = list(encodings_by_weight(program))
    assert names == ["embedding.weight", "middle.weight"] or names == ["lm_head.weight", "middle.weight"]
    node = weight_sites(program)[1].weight
    program.encode(node, Affine(4), Affine(4).encode(program.weight_value(node)))
    assert encodings_by_weight(program)["middle.weight"] == Affine(4)


# -- distances -------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two outputs: a matrix, and integers that are not compared."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor):
        y = self.linear(x)
        return {"y": y, "best": y.argmax(-1)}


def _slow_distance(want: Tensor, got: Tensor) -> tuple[list[float], list[float]]:
    errors, cosines = [], []
    for a, b in zip(want.tolist(), got.tolist(), strict=True):
        norm = sum(v * v for v in a) ** 0.5
        errors.append(sum((v - w) ** 2 for v, w in zip(a, b, strict=True)) ** 0.5 / norm)
        cosines.append(sum(v * w for v, w in zip(a, b, strict=True)) / norm / sum(w * w for w in b) ** 0.5)
    return errors, cosines


def test_distances_equal_a_slow_loop():
    program = capture(Pair(), torch.randn(2, 4))
    changed = program.clone()
    changed.set("linear.weight", program.get("linear.weight") * 1.1 + 0.05)
    changed.refresh()
    batches = [[torch.randn(5, 4)], [torch.randn(2, 4)]]
    fidelity = measure(program, changed, batches, "noise")
    want = torch.cat([program.run(b)[0] for b in batches])
    got = torch.cat([changed.run(b)[0] for b in batches])
    errors, cosines = _slow_distance(want, got)
    mean = sum(errors) / 7
    spread = (sum((e - mean) ** 2 for e in errors) / 6 / 7) ** 0.5
    assert (fidelity.samples, fidelity.data) == (7, "noise")
    assert fidelity.relative_error == {"y": pytest.approx(mean, rel=1e-6)}
    assert fidelity.standard_error == {"y": pytest.approx(spread, rel=1e-6)}
    assert fidelity.cosine == {"y": pytest.approx(sum(cosines) / 7, rel=1e-6)}
    assert fidelity.worst == pytest.approx(mean)
    total = float((want - got).square().sum() / want.square().sum()) ** 0.5
    assert fidelity.sites == {"linear": pytest.approx(total, rel=1e-5)}


def test_a_program_is_at_no_distance_from_itself():
    program = capture(Pair(), torch.randn(2, 4))
    fidelity = measure(program, program.clone(), [[torch.randn(3, 4)]], "noise")
    assert fidelity.worst == 0
    assert fidelity.cosine["y"] == pytest.approx(1)
    assert Fidelity("", 0, {}, {}, {}).worst == 0


def test_minus_infinity_in_both_is_no_distance():
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, float("-inf"))

    program = capture(Masked(), torch.randn(2, 4))
    assert measure(program, program.clone(), [[torch.randn(3, 4)]], "noise").worst == 0


def test_an_infinity_that_was_none_is_a_distance():
    class Identity(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    program = capture(Identity(), torch.randn(2, 4))
    changed = program.clone()
    changed.calls(aten.mul.Tensor)[0].update_arg(1, float("inf"))
    try:
        fidelity = measure(program, changed, [[torch.rand(3, 4) + 1]], "noise")
    except VerificationError:
        return
    assert fidelity.worst > 0.5
