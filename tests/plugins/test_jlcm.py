"""JLCM: what is stored, the order of its forms on rows of different distributions, its descent, and the pass."""

from __future__ import annotations

from itertools import product

import numpy as np
import paretoc as pc
import paretoc.testing
import pytest
import torch
from paretoc.compiler.registry import registry
from paretoc.plugins import ClusteredCodebook, Jlcm, JlcmFit
from paretoc.plugins.jlcm import cluster_rows

#: one form for each sentence of the paper's ablation, worst first; their codes take the same bits
FORMS = (ClusteredCodebook(3, 1), ClusteredCodebook(3, 8, "scale"), ClusteredCodebook(3, 8))


def mixed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows drawn from four distributions of different shape and width."""
    random = np.random.RandomState(seed)
    kinds = [
        lambda: random.randn(columns) * 0.02,
        lambda: random.laplace(size=columns) * 0.05,
        lambda: random.uniform(-0.3, 0.3, columns),
        lambda: random.standard_t(4, columns) * 0.1,
    ]
    return torch.tensor(np.array([kinds[random.randint(4)]() for _ in range(rows)]), dtype=torch.float32)


def correlated(count: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs `[N, K]` of which few directions carry most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(1, 0.02, columns).unsqueeze(1)
    noise = torch.randn(count, columns, generator=generator)
    return torch.randn(count, columns, generator=generator) @ mix / columns**0.5 + 0.1 * noise


def evidence(x: torch.Tensor) -> dict[type[pc.Statistic], torch.Tensor]:
    return {pc.Hessian: (x.double().T @ x.double()).unsqueeze(0)}


def output_error(encoding: pc.Encoding, arrays: pc.Arrays, weight: torch.Tensor, x: torch.Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖², from the outputs themselves."""
    decoded = encoding.decode(arrays, tuple(weight.shape)).double()
    return float((x.double() @ (weight.double() - decoded).T).square().sum() / (x @ weight.T).double().square().sum())


# -- the encoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [ClusteredCodebook(), ClusteredCodebook(2, 3, "scale")], ids=str)
def test_it_conforms(encoding):
    # clusters of the decoded rows may differ: k-means is an iterative search
    pc.testing.check_encoding(encoding, shapes=[(12, 16), (3, 2, 3, 3)], idempotent=None)


def test_the_stored_bytes_are_codes_clusters_and_tables():
    assert ClusteredCodebook(3, 8).nbytes((64, 128)) == 64 * 48 + 64 + 8 * 8 * 4
    assert ClusteredCodebook(3, 8, "scale").nbytes((64, 128)) == 64 * 48 + 64 + 8 * 4 + 8 * 4
    assert ClusteredCodebook(2, 8).nbytes((5, 3, 3)) == 5 * 3 + 5 + 5 * 4 * 4  # no more clusters than rows


@pytest.mark.parametrize("encoding", [ClusteredCodebook(3, 4), ClusteredCodebook(3, 4, "scale")], ids=str)
def test_decoding_is_a_look_up_in_the_table_of_the_row(encoding):
    weight = mixed(12, 10)
    arrays = encoding.encode(weight)
    codes, decoded = pc.unpack(arrays["codes"], 3, 10), encoding.decode(arrays, (12, 10))
    assert len(set(arrays["cluster"].tolist())) == 4
    for row, column in product(range(12), range(10)):
        cluster, code = int(arrays["cluster"][row]), int(codes[row, column])
        if encoding.per == "scale":
            expected = arrays["scale"][cluster] * arrays["table"][0, code]
        else:
            expected = arrays["table"][cluster, code]
        assert decoded[row, column] == expected


def test_rows_of_few_values_are_stored_exactly():
    values = torch.tensor([[-1.0, -0.5, 0.0, 2.0], [-30.0, 1.0, 10.0, 20.0]])
    weight = values[torch.arange(10) % 2].repeat(1, 5)
    encoding = ClusteredCodebook(2, 2)
    assert torch.equal(encoding.decode(encoding.encode(weight), (10, 20)), weight)
    shared = ClusteredCodebook(2, 1)
    assert not torch.allclose(shared.decode(shared.encode(weight), (10, 20)), weight, atol=0.1)


def test_rows_that_differ_by_their_scale_share_a_codebook():
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([-2.0, -1.0, 0.5, 3.0])[torch.randint(4, (12, 200), generator=generator)]
    shape = shape * (13.0 / shape.square().mean(1, keepdim=True)).sqrt().round()
    weight = shape * torch.tensor([0.01, 1.0, 50.0])[torch.arange(12) % 3].unsqueeze(1)
    encoding = ClusteredCodebook(2, 3, "scale")
    arrays = encoding.encode(weight)
    assert torch.equal(arrays["cluster"][:3].repeat(4), arrays["cluster"])
    torch.testing.assert_close(encoding.decode(arrays, (12, 200)), weight, rtol=1e-5, atol=0)  # float32 tables


def test_clusters_are_those_that_were_drawn():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 9.0]]).double()
    drawn = torch.randint(3, (60,), generator=generator)
    found = cluster_rows(centres[drawn] + 0.1 * torch.randn(60, 2, generator=generator).double(), 3)
    pairs = set(zip(drawn.tolist(), found.tolist(), strict=True))
    assert len(pairs) == 3


def test_fewer_kinds_of_rows_than_clusters():
    found = cluster_rows(torch.tensor([[1.0], [1.0], [2.0], [1.0]]).double(), 4)
    assert len({int(found[i]) for i in (0, 1, 3)}) == 1
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ClusteredCodebook(bits=0), "ClusteredCodebook has 1 to 8 bits, not 0"),
        (lambda: ClusteredCodebook(clusters=257), "ClusteredCodebook has 1 to 256 clusters, not 257"),
        (lambda: ClusteredCodebook(per="row"), "per='row' is not known"),
        (lambda: JlcmFit(rounds=0), "rounds=0 is not valid"),
        (lambda: JlcmFit(reach=-1), "reach=-1 is not valid"),
        (lambda: JlcmFit(damp=float("nan")), "damp=nan is not valid"),
        (lambda: Jlcm(bits=9), "ClusteredCodebook has 1 to 8 bits, not 9"),
        (lambda: Jlcm(rounds=0), "rounds=0 is not valid"),
    ],
)
def test_bad_options_are_refused(refused, make, sentence):
    refused(pc.OptionError, sentence, make)


# -- the fitter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 4])
def test_the_order_of_the_paper(seed):
    """One codebook > scales of clusters > codebooks of clusters in the error of the output, before and after learning;
    learning moves codes, and not the codebooks alone."""
    weight, x = mixed(64, 128, seed), correlated(512, 128, seed)
    start = [output_error(form, form.encode(weight), weight, x) for form in FORMS]
    kept, learned = (
        [output_error(form, JlcmFit(reach=reach).fit(form, weight, evidence(x)), weight, x) for form in FORMS]
        for reach in (0, 1)
    )
    assert start[0] > 1.05 * start[1] > 1.05 * 1.05 * start[2]
    assert learned[0] > 1.02 * learned[1] > 1.02 * 1.02 * learned[2]
    for first, codebooks_alone, both in zip(start, kept, learned, strict=True):
        assert first >= codebooks_alone > 2 * both


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
def test_nothing_better_is_a_step_away(form):
    """Brute force: no other code of a single weight is better, and no change of a table or a scale."""
    weight, x = mixed(6, 12), correlated(100, 12)
    arrays = JlcmFit(rounds=200, tolerance=0, damp=0).fit(form, weight, evidence(x))
    codes, best = pc.unpack(arrays["codes"], 3, 12), output_error(form, arrays, weight, x)
    for row, column, step in product(range(6), range(12), (-1, 1)):
        tried = codes.clone()
        tried[row, column] = (tried[row, column] + step).clamp(0, 7)
        assert output_error(form, arrays | {"codes": pc.pack(tried, 3)}, weight, x) >= best * (1 - 1e-5)
    for name in set(arrays) & {"table", "scale"}:
        for place, factor in product(range(arrays[name].numel()), (0.97, 1.03)):
            tried = arrays[name].clone()
            tried.view(-1)[place] *= factor
            assert output_error(form, arrays | {name: tried}, weight, x) >= best * (1 - 1e-5)


def test_codes_stay_within_reach():
    weight, x = mixed(16, 48), correlated(200, 48)
    form = ClusteredCodebook(4, 2)
    first = form.learn(weight, evidence(x)[pc.Hessian][0].diagonal().expand(16, 48)).codes
    for reach in (1, 2):
        fitter = JlcmFit(rounds=1, reach=reach)
        codes = pc.unpack(fitter.fit(form, weight, evidence(x))["codes"], 4, 48)
        assert int((codes - first).abs().max()) == reach


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("case", ["zeros", "no inputs", "one input", "bfloat16"])
def test_it_is_never_worse_than_its_start(form, case):
    weight, x = mixed(10, 24), correlated(40, 24)
    if case == "zeros":
        weight[1:5] = 0
    elif case == "no inputs":
        x = torch.zeros(4, 24)
    elif case == "one input":
        x = x[:1]
    elif case == "bfloat16":
        weight = weight.bfloat16()
    arrays = JlcmFit().fit(form, weight, evidence(x))
    assert {k: (tuple(v.shape), v.dtype) for k, v in arrays.items()} == form.layout((10, 24))
    found, plain = (
        (x.double() @ (form.decode(a, (10, 24)).double() - weight.double()).T).square().sum()
        for a in (arrays, form.encode(weight))
    )
    assert torch.isfinite(found)
    assert found <= plain * (1 + 1e-9)


def test_it_is_a_fitter_by_name_and_refuses_what_it_cannot_fit(refused):
    assert isinstance(registry().fitter("jlcm"), pc.Fitter)
    assert registry().fitter("jlcm(reach=2)") == JlcmFit(reach=2)
    sentence = "fitter 'jlcm' learns the tables of ClusteredCodebook; Affine(bits=4, group=32) has none"
    refused(pc.OptionError, sentence, lambda: pc.Quantize("W4A16", fitter="jlcm"))


# -- the pass -----------------------------------------------------------------------------------------------


def test_the_pass_conforms(models):
    pc.testing.check_pass(Jlcm(bits=3, clusters=2, rounds=1), models.Mlp().eval(), torch.randn(4, 16))


def test_the_size_is_that_of_what_is_stored(reference, models):
    x = torch.randn(8, 16)
    compiled = reference(models.Mlp(16, 32, 8), ["jlcm:3,clusters=4,rounds=1"], x, calibration=[x])
    weights = sum(ClusteredCodebook(3, 4).nbytes(shape) for shape in ((32, 16), (8, 32)))
    assert compiled.report(latency=False).compiled.bytes == weights + 4 * (32 + 8)
    assert {row.encoding for row in compiled.explain().rows} == {"ClusteredCodebook(bits=3, clusters=4)"}


def test_grouped_convolutions_too(reference, models):
    model, x = models.Cnn().eval(), torch.randn(8, 4, 6, 6)
    compiled = reference(model, ["jlcm:bits=3,clusters=2"], x, calibration=[x])
    assert {row.site for row in compiled.explain().rows} == {"stem", "depthwise", "head"}
    before = reference(model, [pc.Quantize(weights="ClusteredCodebook(3, 2)", fitter="rtn", targets="*")], x)
    with torch.no_grad():
        errors = [float((other(x) - model(x)).square().mean()) for other in (compiled, before)]
    assert errors[0] < errors[1]


def test_sparse_weights_are_left_with_the_reason(reference, models):
    x = torch.randn(8, 16)
    passes = [pc.PruneNM("2:4", targets="up"), "jlcm:bits=3,rounds=1"]
    entry = reference(models.Mlp(), passes, x, calibration=[x]).report(latency=False).passes[-1]
    assert entry["matched"] == ["down"]
    assert "learns the tables of ClusteredCodebook; NM(n=2, m=4" in entry["skipped"]["up"]


@pytest.mark.parametrize(("target", "per"), [("onnx", "codebook"), ("onnxruntime", "scale")])
def test_onnx_runtime_equals_eager(target, per, reference, models):
    model, x = models.Mlp(64, 96, 32), correlated(64, 64)
    passes = [f"jlcm:bits=3,per={per},rounds=2"]
    eager = reference(model, passes, x, calibration=[x])
    compiled = pc.compile(model, passes, example_inputs=x, calibration=[x], target=target)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-6)  # float32 sums


def test_onnx_keeps_the_codes_packed(models, tmp_path):
    x = torch.randn(8, 256)
    compiled = pc.compile(
        models.Mlp(256, 512, 256).eval(), ["jlcm:bits=3,rounds=1"], example_inputs=x, calibration=[x], target="onnx"
    )
    compiled.export_onnx(tmp_path / "model.onnx")
    weights, graph = 2 * 256 * 512, 20_000  # bytes of biases, tables, clusters, nodes and names
    assert (tmp_path / "model.onnx").stat().st_size < weights * 3 / 8 + graph < weights * 4 / 8
