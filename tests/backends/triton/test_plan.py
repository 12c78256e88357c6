"""Which tiling runs: the fastest that was measured, what fits when the first does not, the reference at last."""

from __future__ import annotations

import json
import warnings
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton import Triton
from paretoc.backends.triton.executable import read_tilings
from paretoc.backends.triton.kernels import plan as module
from paretoc.backends.triton.kernels import quantized, weight_only
from paretoc.backends.triton.kernels.launch import Tiling
from paretoc.backends.triton.kernels.plan import REFERENCE, TUNINGS, Plan, Tunings, tokens_class
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

BIG, SMALL = Tiling("matmul", 128, 128, 64), Tiling("matmul", 64, 64, 32)
PLAN = Plan("a product", (BIG, SMALL, REFERENCE))
ONE = torch.ones(1)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    """Tests that tune the process's own table leave none of it behind."""
    yield
    TUNINGS.best.clear()
    TUNINGS.refused.clear()


def limited(*fits: Tiling) -> Any:
    """A product that runs with these tilings only, and answers with the number of its rows."""

    def call(tiling: Tiling) -> Tensor:
        if tiling not in fits:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return torch.tensor(tiling.block_m)

    return call


def test_the_first_that_fits_runs_and_one_warning_says_so():
    table = Tunings()
    with pytest.warns(UserWarning, match="^a product: matmul 128 .* needs 300000 of shared memory, .* 232448"):
        assert table.run(PLAN, ONE, limited(SMALL, REFERENCE)) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.run(PLAN, ONE, limited(SMALL, REFERENCE)) == 64
    assert table.pick(PLAN) == SMALL and table.note(PLAN).startswith("matmul 128 × 128 × 64, 4 warps needs 300000")


def test_when_nothing_fits_the_reference_runs():
    table = Tunings()
    with pytest.warns(UserWarning) as seen:
        assert table.run(PLAN, ONE, limited(REFERENCE)) == 0
    assert len(seen) == 1 and table.pick(PLAN) == REFERENCE


def test_on_a_gpu_the_fastest_is_measured_once(monkeypatch):
    table, timed = Tunings(), []

    def milliseconds(call):
        rows = int(call())
        timed.append(rows)
        return {128: 3.0, 64: 1.0, 0: 2.0}[rows]

    monkeypatch.setattr(module, "can_time", lambda x: True)
    monkeypatch.setattr(module, "milliseconds", milliseconds)
    for _ in range(2):
        assert table.run(PLAN, ONE, limited(BIG, SMALL, REFERENCE)) == 64
    assert timed == [128, 64, 0]
    other = Plan("another", PLAN.tilings)
    with pytest.warns(UserWarning, match="another: matmul 64"):
        assert table.run(other, ONE, limited(BIG, REFERENCE)) == 0  # the reference is faster than what is left


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[int]:
    """A GPU on which everything can be timed, the larger the slower; returns what was timed."""
    timed: list[int] = []

    def milliseconds(call: Any) -> float:
        timed.append(int(call()))
        return timed[-1] or 1000.0

    monkeypatch.setenv("PARETOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "can_time", lambda x: True)
    monkeypatch.setattr(module, "milliseconds", milliseconds)
    monkeypatch.setattr(module, "device_name", lambda: "NVIDIA X/1")
    return timed


def test_another_process_need_not_measure_again(timer, monkeypatch):
    run = lambda plan=PLAN: Tunings(shared=True).run(plan, ONE, limited(BIG, SMALL, REFERENCE))  # noqa: E731
    assert run() == 64 and len(timer) == 3
    assert run() == 64 and len(timer) == 3
    run(Plan("another", PLAN.tilings))
    assert run() == 64 and len(timer) == 6  # one plan does not displace the other
    assert len(json.loads(module.cache_file().read_text())) == 2
    run(Plan(PLAN.key, (BIG, REFERENCE)))
    assert len(timer) == 8  # what is remembered is no tiling of this plan
    monkeypatch.setattr(module, "device_name", lambda: "NVIDIA Y")
    run()
    assert len(timer) == 11
    Tunings().run(PLAN, ONE, limited(BIG, SMALL, REFERENCE))
    assert len(timer) == 14


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": {"kernel": "matmul"}}'])
def test_a_broken_file_is_measured_anew(timer, text):
    module.cache_file().parent.mkdir()
    module.cache_file().write_text(text)
    assert Tunings(shared=True).run(PLAN, ONE, limited(BIG, SMALL, REFERENCE)) == 64
    assert list(json.loads(module.cache_file().read_text())) == [PLAN.key]


def test_where_nothing_can_be_written_it_runs_all_the_same(timer, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    assert Tunings(shared=True).run(PLAN, ONE, limited(BIG, SMALL, REFERENCE)) == 64


def test_nothing_is_timed_on_a_cpu_or_while_tracing():
    with torch._subclasses.FakeTensorMode() as mode:
        traced = mode.from_tensor(ONE)
    assert not module.can_time(ONE) and not module.can_time(traced)


def test_a_table_travels_as_json():
    table, other = Tunings(best={"a product": SMALL}), Tunings()
    other.merge(json.loads(json.dumps(table.dump())))
    assert other.pick(PLAN) == SMALL and other.pick(Plan("unknown", PLAN.tilings)) == BIG
    other.merge({"a product": {"kernel": "matmul", "block_m": 7, "block_n": 7, "block_k": 7}})
    assert other.pick(PLAN) == BIG  # what no plan lists is never run


def test_a_manifest_that_holds_something_else_is_refused(refused):
    for tables in ([1], {"": {"a": {"kernel": "matmul"}}}, {"": [2]}):
        refused(pc.ArtifactError, "not those of a triton artifact", lambda tables=tables: read_tilings(tables))


def arguments(text: str, N: int = 9, K: int = 64) -> tuple[list[Tensor], str, int, Tensor]:
    encoding = pc.parse_encoding(text)
    return list(encoding.encode(torch.randn(N, K)).values()), str(encoding), N, torch.randn(N)


@pytest.mark.parametrize("M", [1, 5, 40, 70])
@pytest.mark.parametrize("operator", ["weight_only", "quantized"])
def test_every_tiling_computes_the_same(near, monkeypatch, operator, M):
    """Each in turn: those before it do not fit."""
    text = "Affine(4, 32)"
    weight = arguments(text)
    x = torch.randn(M, 64)
    fmt = weight_only.weight_format(text)
    if operator == "weight_only":
        count = len(weight_only.tilings(M, 9, 64, fmt))
        run = lambda: weight_only.weight_only_linear(x, *weight)  # noqa: E731
    else:
        codes, scale = torch.randint(-127, 128, (M, 64), dtype=torch.int8), torch.rand(M, 2)
        count = len(quantized.tilings(M, 9, 64, 32))
        run = lambda: quantized.quantized_linear(codes, scale, None, 8, *weight, torch.float32)  # noqa: E731
    expected, picked = run(), []
    for skip in range(1, count + 1):
        pick = lambda self, plan, skip=skip: picked.append(plan.tilings[skip]) or plan.tilings[skip]  # noqa: E731
        monkeypatch.setattr(Tunings, "pick", pick)
        near(run(), expected, 1e-5 * expected.abs().max())
    assert picked[-1] == REFERENCE and len(set(picked)) == count


@pytest.mark.parametrize("zero", [torch.tensor(3.0), None])
def test_the_reference_of_codes_under_one_range(near, monkeypatch, zero):
    codes, scale = torch.randint(-128, 128, (5, 64), dtype=torch.int8), torch.tensor(0.1)
    scale = scale if zero is not None else torch.full((5, 1), 0.1)
    run = lambda: quantized.quantized_linear(codes, scale, zero, 8, *arguments_once, torch.float32)  # noqa: E731
    arguments_once = arguments("Affine(8)")
    expected = run()
    monkeypatch.setattr(Tunings, "pick", lambda self, plan: REFERENCE)
    near(run(), expected, 1e-5 * expected.abs().max())


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    options = {"example_inputs": (x,), "target": "triton", "verify": False}
    return pc.compile(nn.Sequential(nn.Linear(64, 32)).eval(), ["quantize:W4A16"], **options), x


def test_explain_names_what_ran_instead(model, monkeypatch):
    compiled, x = model
    launch = weight_only.launch

    def small(kernel, grid, **given):
        if given["BLOCK_K"] > 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        launch(kernel, grid, **given)

    monkeypatch.setattr(weight_only, "launch", small)
    with pytest.warns(UserWarning, match="needs 300000"):
        y = compiled(x)
    (row,) = compiled.explain().rows
    assert row.kernel == "skinny matmul 16 × 32 × 64, 4 warps" and "needs 300000 of shared memory" in row.note
    assert torch.allclose(y, compiled.program.run([x])[0], rtol=1e-5, atol=1e-5)


def test_explain_says_when_the_reference_runs(model, monkeypatch):
    compiled, x = model

    def none(kernel, grid, **given):
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(weight_only, "launch", none)
    with pytest.warns(UserWarning, match="needs 300000"):
        y = compiled(x)
    (row,) = compiled.explain().rows
    assert row.kernel == "decode + aten.linear.default" and not row.accelerated and "needs 300000" in row.note
    assert torch.allclose(y, compiled.program.run([x])[0], rtol=1e-5, atol=1e-5)


def test_what_was_measured_travels_with_the_artifact(model, monkeypatch, tmp_path):
    compiled, x = model
    key = next(iter(compiled._compiled().executable.choices.values())).plan.key
    TUNINGS.best[key] = weight_only.tilings(4, 32, 64, weight_only.weight_format("Affine(4, 32)"))[2]
    compiled.save(tmp_path / "saved")
    TUNINGS.best.clear()
    pc.load(tmp_path / "saved")(x)
    assert compiled.explain().rows[0].kernel.startswith("skinny matmul 16 × 16 × 256")
    TUNINGS.best.clear()
    monkeypatch.setattr("paretoc.backends.triton.executable.device_name", lambda: "another GPU")
    pc.load(tmp_path / "saved")
    assert not TUNINGS.best


def test_an_old_gpu_is_refused(refused, model, monkeypatch):
    compiled, _ = model
    monkeypatch.setattr("paretoc.backends.triton.executable._device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    what = "the GPU has compute capability 7.5, Triton needs 8.0"
    refused(pc.LoweringError, what, lambda: Triton().lower(compiled.program, {}))


def test_tokens_are_tiled_by_classes():
    assert [tokens_class(M) for M in (0, 1, 2, 16, 17, 512, 513)] == [16, 1, 16, 16, 64, 512, 4096]
    keys = {weight_only.product_plan(M, 9, 64, "Affine(4, 32)", torch.float16).key for M in (4097, 10**6)}
    assert keys == {"weight_only_linear many × 9 × 64, Affine(4, 32), float16"}
    other = weight_only.product_plan(4097, 9, 64, "Affine(4, 32)", torch.float32)
    assert other.key not in keys
