"""Every encoding × every fitter that takes it × linear, convolution, embedding: stored, decoded, run by ONNX Runtime.

Every combination is fitted; each encoding × kind is a site of one program, exported and started once. A new encoding or
fitter that this page does not know fails here by its name.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.compiler.calibrate import gather
from paretoc.compiler.capture import capture
from paretoc.compiler.encoding_rules import RUNTIME
from paretoc.compiler.encodings import (
    NF4,
    NM,
    Additive,
    Affine,
    Binary,
    Codebook,
    Dense,
    Encoding,
    Float,
    LowRank,
    Nested,
    Sum,
    Ternary,
    registered_encodings,
)
from paretoc.compiler.program import Program
from paretoc.compiler.protocols import Fitter, fit, refusal
from paretoc.compiler.registry import registry
from paretoc.compiler.sites import weight_sites
from paretoc.plugins import ClusteredCodebook, Folded, Power
from torch import Tensor, fx, nn
from torch.nn import functional as F

ENCODINGS: list[Encoding] = [
    Dense(),
    Dense("float16"),
    Dense("bfloat16"),
    *(Affine(bits, group) for bits, group in zip(range(2, 9), (16, 0, 32, 16, -1, 64, 0), strict=True)),
    *(Affine(bits, group, False) for bits, group in zip(range(1, 9), (16, 16, 0, 32, -1, 64, 0, 16), strict=True)),
    *(Affine(bits, 16, False, "float") for bits in (1, 2, 3, 4, 8)),
    Affine(4, 0, False, "float", "float16"),
    Affine(4, 16, scale="float16"),
    Affine(8, 32, scale="e8m0"),  # MXINT8
    Affine(3, 16, scale="e8m0-ceil"),
    Affine(4, 16, scale="shift"),
    Affine(4, 16, False, scale="e4m3"),
    *(Float(name, group) for name, group in (("e4m3", 0), ("e5m2", -1), ("e2m1", 16), ("e3m0", 16), ("e1m1", 32))),
    *(Float(name, 32, "e8m0") for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1")),  # MXFP8, MXFP6, MXFP4
    Float("e2m1", 16, "e4m3"),  # NVFP4
    Float("e2m1", 64, "e8m0-ceil"),  # ZeroQuant-FP M1
    Float("e2m1", 16, "shift"),  # ZeroQuant-FP M2
    Float("e4m5", 16, "float16"),
    Float("e5m10"),
    Float("e8m7", 16),
    Binary(),
    Binary(16, "e8m0"),
    Ternary(),
    Ternary(16, "float16"),
    Nested(8, 4, 16),
    Nested(8, 8),
    Nested(6, 2, -1, "e8m0-ceil"),
    Codebook(4),
    Codebook(3, 16, "row"),
    Codebook(2, 0, "row", "none"),
    Codebook(1, -1, scale="float16"),
    NF4(),
    NF4(16, "float16"),
    Additive(1, 4, 4),
    Additive(2, 3, 8),
    Additive(1, 9, 2, "float32"),
    LowRank(4),
    LowRank(2, "bfloat16"),
    Sum(Affine(4, 16), LowRank(2)),
    Sum(Float("e2m1", 16, "e4m3"), LowRank(2, "float32")),
    Sum(Affine(2), Affine(2)),
    Sum(Additive(1, 4, 4), LowRank(2)),
    NM(2, 4),
    NM(4, 8, Dense("float16")),
    NM(2, 4, Affine(8)),
    NM(2, 4, Affine(4, 16)),
    NM(2, 4, Affine(4, 16, False, "float")),
    NM(1, 4, Affine(3, -1, False)),
    NM(2, 4, Float("e2m1", 16, "e4m3")),
    NM(2, 4, Codebook(3)),
    NM(2, 4, Ternary()),
    Power(4, 0.5),
    Power(3, 0.3),
    ClusteredCodebook(3, 4),
    ClusteredCodebook(2, 2, "scale"),
    Folded(300, 40, 0.5),
]
#: those that learn step by step are stopped early
FITTERS = {"adaround": "adaround(iterations=20)", "nupes": "nupes(rounds=1)", "additive": "additive(rounds=2)"}
SHAPES = {"linear": (16, 64), "conv": (16, 16, 2, 2), "embedding": (16, 64)}
COMPUTE = {"linear": F.linear, "conv": F.conv2d, "embedding": F.embedding}


def ours(offered: dict[str, Any]) -> dict[str, Any]:
    """Without what other distributions have registered."""
    classes = {name: item if isinstance(item, type) else type(item) for name, item in offered.items()}
    return {name: item for name, item in offered.items() if classes[name].__module__.startswith("paretoc.")}


def fitters() -> dict[str, Fitter]:
    return {name: registry().fitter(FITTERS.get(name, name)) for name in ours(registry().fitters)}


def nested_in(encoding: Encoding) -> set[type]:
    parts = (value for value in vars(encoding).values() if isinstance(value, Encoding))
    return {type(encoding)}.union(*(nested_in(part) for part in parts))


def test_every_encoding_is_represented():
    registry()
    met = {kind for encoding in ENCODINGS for kind in nested_in(encoding)}
    missing = sorted(name for name, cls in ours(registered_encodings()).items() if cls not in met)
    assert not missing, f"add to ENCODINGS: {missing}"
    assert len(set(ENCODINGS)) == len(ENCODINGS)


def test_every_fitter_takes_some_encoding_and_refuses_another():
    for name, fitter in fitters().items():
        legal = [e for e in ENCODINGS if not refusal(fitter, e)]
        assert legal, f"add to ENCODINGS what fitter {name!r} takes"
        assert name == "rtn" or len(legal) < len(ENCODINGS), name


@pytest.mark.parametrize("name", fitters())
def test_illegal_pairs_are_refused_at_construction(name, refused):
    fitter = fitters()[name]
    for encoding in ENCODINGS:
        if reason := refusal(fitter, encoding):
            error = refused(pc.OptionError, reason, lambda e=encoding: pc.Quantize(weights=e, fitter=fitter))
            assert error.what.startswith("fitter "), error
        else:
            assert pc.Quantize(weights=encoding, fitter=fitter).encoding() == encoding


# -- stored, decoded, run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One weight."""

    kind: str
    encoding: Encoding
    fitter: str

    def __str__(self) -> str:
        return f"{self.encoding}, fitter {self.fitter}, {self.kind}"


def cases() -> list[Case]:
    """A fitter that needs data asks for the inputs of a product: an embedding has none."""
    return [
        Case(kind, encoding, name)
        for kind in SHAPES
        for encoding in ENCODINGS
        for name, fitter in fitters().items()
        if not refusal(fitter, encoding) and (kind != "embedding" or fitter.data_free)
    ]


def exported() -> list[Case]:
    """One fitter for each encoding and kind, each in its turn: what ONNX Runtime runs does not depend on the fitter."""
    by_site: dict[tuple[str, Encoding], list[Case]] = defaultdict(list)
    for case in cases():
        by_site[case.kind, case.encoding].append(case)
    return [some[turn % len(some)] for turn, some in enumerate(by_site.values())]


class Layers(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(64, 16, bias=False), nn.Conv2d(16, 16, 2, bias=False)
        self.embedding = nn.Embedding(16, 64)

    def forward(self, x: Tensor, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(x), self.conv(image), self.embedding(ids)


class Matrix:
    """`stored` are the arrays of every case; `program` has a layer for each exported one, the outputs of a kind side by
    side along axis 1, as `torch.export` would have them one by one at a hundred times the cost."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        self.inputs = [torch.randn(s, generator=make) for s in ((200, 64), (8, 16, 6, 6))] + [torch.arange(16)]
        self.program = capture(Layers().eval(), tuple(self.inputs))
        self.sites = {site.kind: site for site in weight_sites(self.program)}
        # rows of different sizes, and heavy tails
        sizes = torch.logspace(-1, 1, 16).unsqueeze(1)
        self.weights = {k: (torch.randn(16, 64, generator=make) ** 3 * sizes).reshape(s) for k, s in SHAPES.items()}
        seen = {kind: self._evidence(kind) for kind in SHAPES}
        self.stored = {
            case: fit(fitters()[case.fitter], case.encoding, self.weights[case.kind], seen[case.kind])
            for case in cases()
        }
        self.decodes = {case: self._add(case) for case in exported()}
        for kind, site in self.sites.items():
            copies = [next(iter(decode.users)) for case, decode in self.decodes.items() if case.kind == kind]
            with self.program.graph.inserting_before(self.program.output):
                joined = self.program.graph.call_function(torch.ops.aten.cat.default, (copies, 1))
            self.program.output.replace_input_with(site.node, joined)
        self.program.refresh()
        self.expected = self.run(self.program)
        executable = registry().backend("onnxruntime").lower(self.program, {"seed": 0})
        self.found = self._apart(executable.run(self.inputs))

    def _evidence(self, kind: str) -> dict[Any, Any]:
        asked = [] if kind == "embedding" else [s for f in fitters().values() for s in f.needs(self.sites[kind])]
        return {type(s): value for s, value in gather(self.program, asked, [self.inputs]).items()}

    def _add(self, case: Case) -> fx.Node:
        """A copy of the layer of that kind, with its own weight; returns the node that decodes this."""
        site, name = self.sites[case.kind], f"{case.kind}.{ENCODINGS.index(case.encoding)}.weight"
        weight = self.program.attribute(name, self.weights[case.kind], before=self.program.output)
        with self.program.graph.inserting_before(self.program.output):
            self.program.graph.node_copy(site.node, lambda n: weight if n is site.weight else n)
        return self.program.encode(weight, case.encoding, self.stored[case])

    def run(self, program: Program) -> dict[Case, Tensor]:
        return self._apart(program.run(self.inputs))

    def _apart(self, outputs: list[Tensor]) -> dict[Case, Tensor]:
        """The output of each exported case; these come kind by kind."""
        parts = [part for output in outputs for part in output.chunk(len(ENCODINGS), 1)]
        return dict(zip(self.decodes, parts, strict=True))

    def wrong(self, expected: dict[Case, Tensor]) -> dict[Case, float]:
        """Case → max|y − ŷ| / max|y| where that is beyond the tolerance, or not a number; ŷ is ONNX Runtime's."""
        errors = {case: float((self.found[case] - y).abs().max() / y.abs().max()) for case, y in expected.items()}
        return {case: error for case, error in errors.items() if not error <= RUNTIME}


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return Matrix()


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_it_is_stored_and_decoded(matrix, encoding):
    """What is stored has the layout, and is nearer to the weight than zeros; the reference computes with it."""
    for case in (case for case in cases() if case.encoding == encoding):
        weight, shape, arrays = matrix.weights[case.kind], SHAPES[case.kind], matrix.stored[case]
        assert {name: (tuple(a.shape), a.dtype) for name, a in arrays.items()} == encoding.layout(shape), case
        decoded = encoding.decode(arrays, shape)
        assert (decoded - weight).norm() < weight.norm(), case
        if case in matrix.decodes:
            assert matrix.program.encoding(matrix.decodes[case]) == encoding
            operand = matrix.inputs[list(SHAPES).index(case.kind)]
            assert torch.equal(COMPUTE[case.kind](operand, decoded), matrix.expected[case]), case


def test_onnx_runtime_equals_the_reference(matrix):
    assert {str(case): error for case, error in matrix.wrong(matrix.expected).items()} == {}


def test_the_comparison_names_a_planted_fault(matrix):
    """One bit of one code, in a site of each kind."""
    program, victims = matrix.program.clone(), {c for c in matrix.decodes if c.encoding == NF4(16, "float16")}
    for case in victims:
        name = str(matrix.decodes[case].args[0][0].target)
        codes = program.get(name).clone()
        codes[-1, 0] ^= 1
        program.set(name, codes)
    assert len(victims) == len(SHAPES)
    assert set(matrix.wrong(matrix.run(program))) == victims
