"""Sums of encodings, low-rank corrections, and linears that run them side by side."""

from __future__ import annotations

import onnx
import paretoc as pc
import pytest
import torch
from paretoc.compiler.capture import capture
from paretoc.compiler.encodings import NM, Affine, Codebook, Dense, LowRank, Sum, innermost, parse_encoding
from paretoc.compiler.encodings.residual import factors
from paretoc.compiler.errors import OptionError
from paretoc.compiler.program import Program
from paretoc.compiler.protocols import fit, refusal
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import weight_sites
from paretoc.compiler.statistics import Hessian
from paretoc.compiler.sums import split_sums
from paretoc.passes.fit import AdditiveFit, Gptq, Mse, Rtn
from paretoc.testing import check_encoding
from torch import nn

SUMS = [
    Sum(Affine(4, 16), LowRank(4)),
    Sum(NM(2, 4, Affine(8)), LowRank(2, "float32")),
    Sum(Affine(3), Affine(3)),
    Sum(Sum(Affine(2), Affine(2)), LowRank(3)),
    Sum(Codebook(3), LowRank(2, "bfloat16")),
]


def left_over(weight: torch.Tensor, encoding: pc.Encoding) -> float:
    decoded = encoding.decode(encoding.encode(weight), tuple(weight.shape))
    return float((decoded - weight).double().square().sum() / weight.double().square().sum())


# -- LowRank -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (12, 12)], ids=str)
def test_factors_are_the_truncated_decomposition(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, v = factors(matrix, 4)
    left, sigma, right = torch.linalg.svd(matrix)
    torch.testing.assert_close(u @ v, left[:, :4] * sigma[:4] @ right[:4])
    # each has the root of the singular values, largest first
    torch.testing.assert_close(u.square().sum(0), sigma[:4])
    torch.testing.assert_close(v.square().sum(1), sigma[:4])


def test_factors_of_a_matrix_of_lower_rank():
    matrix = torch.randn(8, 2, dtype=torch.float64) @ torch.randn(2, 20, dtype=torch.float64)
    u, v = factors(matrix, 5)
    assert torch.isfinite(u).all()
    assert torch.isfinite(v).all()
    torch.testing.assert_close(u @ v, matrix)
    assert not torch.allclose(torch.linalg.multi_dot([*factors(matrix, 1)]), matrix)


@pytest.mark.parametrize(("rank", "kept"), [(8, 0.785), (16, 0.617)])
def test_how_much_of_the_error_of_e2m1_low_rank_leaves(rank, kept):
    """Noise has no direction: of a matrix of 128 × 128, 8 of 128 directions hold about a fifth."""
    weight = torch.randn(128, 128)
    codes = pc.parse_encoding("Float('e2m1', 0)")
    share = left_over(weight, Sum(codes, LowRank(rank))) / left_over(weight, codes)
    error = weight - codes.decode(codes.encode(weight), (128, 128))
    energy = torch.linalg.svdvals(error).square()
    assert share == pytest.approx(float(1 - energy[:rank].sum() / energy.sum()), rel=1e-3)  # factors in float16
    assert share == pytest.approx(kept, abs=0.01)


def test_low_rank_of_a_convolution_flattens_its_kernel():
    weight = torch.randn(6, 4, 3, 3)
    decoded = LowRank(6, "float32").decode(LowRank(6, "float32").encode(weight), (6, 4, 3, 3))
    torch.testing.assert_close(decoded, weight, rtol=1e-5, atol=1e-5)


# -- Sum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [LowRank(4), LowRank(3, "float32"), *SUMS], ids=str)
def test_it_keeps_the_contract(encoding):
    check_encoding(encoding, shapes=[(6, 64), (4, 16, 3), (5, 16)], idempotent=None)


@pytest.mark.parametrize("encoding", SUMS, ids=str)
def test_the_second_stores_what_the_first_leaves(encoding):
    weight, shape = torch.randn(8, 32), (8, 32)
    arrays = encoding.encode(weight)
    first = encoding.first.decode(encoding.first.encode(weight), shape)
    second = encoding.second.decode(encoding.second.encode(weight - first), shape)
    assert torch.equal(encoding.decode(arrays, shape), first + second)
    assert left_over(weight, encoding) < left_over(weight, encoding.first)
    assert encoding.nbytes(shape) == encoding.first.nbytes(shape) + encoding.second.nbytes(shape)
    assert parse_encoding(str(encoding)) == encoding


def test_the_text_form_is_what_documentation_shows():
    encoding = Sum(Affine(4, 32), LowRank(8))
    assert encoding == Sum()
    assert str(encoding) == "Sum(first=Affine(bits=4, group=32), second=LowRank(rank=8, dtype='float16'))"
    assert parse_encoding("Sum(Affine(4, 32), LowRank(8))") == encoding


def test_a_fitter_fits_the_first_and_the_second_what_that_leaves():
    weight, encoding = torch.randn(16, 32) ** 3, Sum(Affine(3, 16), LowRank(2))
    assert innermost(encoding) == Affine(3, 16)
    arrays = encoding.encode(weight, Mse().fit)
    first = Mse().fit(Affine(3, 16), weight)
    second = LowRank(2).encode(weight - Affine(3, 16).decode(first, (16, 32)))
    assert {k: v.tolist() for k, v in arrays.items()} == {
        **{f"first.{k}": v.tolist() for k, v in first.items()},
        **{f"second.{k}": v.tolist() for k, v in second.items()},
    }
    rounded = encoding.encode(weight)
    assert not torch.equal(arrays["second.u"], rounded["second.u"])


@pytest.mark.parametrize("inner", [Affine(4, 16), NM(2, 4, Affine(4, 8))], ids=str)
def test_a_fitter_that_knows_no_sums_fits_the_first_of_one(inner):
    weight, encoding = torch.randn(16, 32), Sum(Sum(inner, LowRank(2)), LowRank(1))
    inputs = torch.randn(200, 32)
    evidence = {Hessian: (inputs.T @ inputs).double()[None]}
    assert Gptq().refuse(encoding) is not None
    assert refusal(Gptq(), encoding) is None
    arrays = fit(Gptq(), encoding, weight, evidence)
    alone = Gptq().fit(inner, weight, evidence)
    assert all(torch.equal(arrays[f"first.first.{k}"], v) for k, v in alone.items())
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == encoding.layout((16, 32))
    rounded = encoding.encode(weight)
    assert not all(torch.equal(arrays[f"first.first.{k}"], rounded[f"first.first.{k}"]) for k in alone)


def test_a_pair_that_does_not_go_together_is_refused(refused):
    encoding = Sum(Dense("float16"), LowRank(1))
    assert refusal(Rtn(), encoding) is None
    assert refusal(Mse(), encoding) == f"fitter 'mse' searches the ranges of scales; {encoding} has none"
    assert refusal(AdditiveFit(), encoding) is not None
    refused(OptionError, "learns additive codebooks", lambda: pc.Quantize(weights=encoding, fitter="additive"))
    assert pc.Quantize(weights="Sum(Affine(4, 32), LowRank(8))", fitter="gptq").encoding() == Sum()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LowRank(0), "0 is not a rank"),
        (lambda: LowRank(8, "int8"), "Dense stores no 'int8'"),
        (lambda: LowRank(8).check(torch.empty(5, 64)), "a matrix of 5 × 64 has no rank 8"),
        (lambda: LowRank(2).check(torch.full((4, 4), 1e30)), "factors in float16 end at 65504, those of this"),
        (lambda: Sum(Affine(4), LowRank(8)).check(torch.ones(64, 5)), "a matrix of 64 × 5 has no rank 8"),
        (lambda: Sum(Affine(4, 32), LowRank(1)).check(torch.ones(4, 33)), "group size 32 does not divide"),
    ],
)
def test_refusals(refused, make, sentence):
    refused(OptionError, sentence, make)


# -- side by side --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two linears that share a weight, one of them with a bias, and a further one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.again, self.head = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 64)
        self.again.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.up(x)))))


class Tied(nn.Module):
    """A weight that is also an embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(48, 32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


def encoded(model: nn.Module, example: torch.Tensor, encoding: pc.Encoding) -> Program:
    program = capture(model.eval(), example)
    for weight in {site.weight: None for site in weight_sites(program)}:
        program.encode(weight, encoding, encoding.encode(program.weight_value(weight)))
    program.refresh()
    return program


def operators(program: Program) -> list[str]:
    return [str(n.target).split(".")[-2] for n in program.graph.nodes if n.op == "call_function"]


def test_the_rewritten_graph():
    program = encoded(nn.Linear(32, 16), torch.randn(2, 5, 32), Sum(Affine(4, 32), LowRank(4)))
    assert operators(program) == ["decode", "linear"]
    assert split_sums(program) == ["weight.second.v", "weight.second.u"]
    assert operators(program) == ["decode", "to", "to", "permute", "permute", "linear", "matmul", "matmul", "add"]
    decode = program.calls(torch.ops.paretoc.decode.default)[0]
    assert program.encoding(decode) == Affine(4, 32)
    assert list(program.stored_arrays(decode)) == ["codes", "scale"]


@pytest.mark.parametrize("encoding", SUMS, ids=str)
def test_side_by_side_equals_the_sum(encoding):
    program = encoded(Net(), torch.randn(3, 32), encoding)
    split = program.clone()
    names = split_sums(split)
    x = torch.randn(7, 32)
    torch.testing.assert_close(split.run([x])[0], program.run([x])[0], rtol=0, atol=1e-5)
    assert bool(names) == isinstance(encoding.second, LowRank)
    sums = [n for n in split.calls(torch.ops.paretoc.decode.default) if isinstance(split.encoding(n), Sum)]
    assert len(sums) == (0 if names and not isinstance(encoding.first, Sum) else 2)
    if names:
        split.set("head.weight.second.u", split.get("head.weight.second.u") * 0)
        assert not torch.allclose(split.run([x])[0], program.run([x])[0], rtol=0, atol=1e-5)


def test_a_weight_that_something_else_reads_is_left():
    program = encoded(Tied(), torch.arange(6).reshape(2, 3), Sum(Affine(4, 32), LowRank(4)))
    before = operators(program)
    assert split_sums(program) == []
    assert operators(program) == before


# -- on ONNX Runtime -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "first", "kernel"),
    [
        ("W4A16", "Affine(4, 32)", "MatMulNBits"),
        ("W8A8-dynamic", "Affine(8)", "MatMulIntegerToFloat"),
    ],
)
def test_onnx_runtime_runs_both_parts(scheme, first, kernel):
    model, x = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).eval(), torch.randn(2, 3, 64)
    step = pc.Quantize(scheme, weights=f"Sum({first}, LowRank(4))", fitter="rtn")
    compiled = pc.compile(model, [step], example_inputs=x)
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=0, atol=1e-5)
    executable = compiled._compiled().executable
    assert kernel in {node.op_type for node in executable.model.graph}
    stored = {name: value.const_value for name, value in executable.model.graph.initializers.items()}
    assert stored["0.weight.second.u"].nbytes == 128 * 4 * 2  # float16, as the encoding says
    made = [onnx.numpy_helper.to_array(i) for i in executable.profiled()[0].initializer]
    assert max(array.nbytes for array in made) <= 64 * 128, "a dense weight was made when the session started"


def test_onnx_runtime_runs_a_sum_that_is_not_split():
    ids = torch.arange(6).reshape(2, 3)
    program = encoded(Tied(), ids, Sum(Affine(4, 32), LowRank(4)))
    executable = registry().backend("onnxruntime").lower(program, {"seed": 0})
    torch.testing.assert_close(executable.run([ids])[0], program.run([ids])[0], rtol=0, atol=1e-5)
