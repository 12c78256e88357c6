"""A batch in parts gives what the whole gives, in any size and on any number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import paretoc as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paretoc.backends.onnxruntime import parts
from paretoc.backends.onnxruntime.parts import Parts
from torch import nn


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_every_sample_is_in_one_part(batch: int, samples: int, least: int, threads: int) -> None:
    inputs = [torch.arange(batch), torch.tensor([7]), torch.arange(batch)[:, None]]
    cut = Parts((0, 2), samples, least).cut(inputs, threads)
    assert torch.equal(torch.cat([part[0] for part in cut]), inputs[0])
    assert torch.equal(torch.cat([part[2] for part in cut]), inputs[2])
    assert all(part[1] is inputs[1] for part in cut)
    if len(cut) > 1:
        sizes = [len(part[0]) for part in cut]
        assert max(sizes) <= samples and min(sizes[:-1]) >= least


def test_inputs_of_several_sizes_stay_whole() -> None:
    inputs = [torch.zeros(4), torch.zeros(1)]
    assert Parts((0, 1), 1, 1).cut(inputs, 2) == [inputs]


@pytest.fixture
def cut_small(monkeypatch: pytest.MonkeyPatch):
    """Small models are worth cutting, on two threads."""
    monkeypatch.setattr(parts, "_WORK", 1)
    monkeypatch.setattr(parts, "_ROWS", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("passes", [[], ["quantize:W8A8"], ["merge_tokens:2", "quantize:W8A8,attention=true"]])
def test_parts_give_what_the_whole_gives(models, cut_small, passes: list[str], batch: int, tmp_path) -> None:
    model, x = models.Vit(depth=2).eval(), torch.randn(8, 16, 12)
    compiled = pc.compile(model, passes, example_inputs=x[:4], calibration=[x])
    executable, seen = compiled._compiled().executable, []
    kept = executable._parts
    assert kept is not None and kept.samples == 1
    run = executable._run
    executable._run = lambda inputs, *session: seen.append(len(inputs[0])) or run(inputs, *session)
    got = compiled(x[:batch])
    assert seen == ([1] * batch)
    executable.__dict__["_parts"] = None
    torch.testing.assert_close(got, compiled(x[:batch]), rtol=1e-5, atol=1e-6)
    compiled.save(tmp_path / "out")
    loaded = pc.load(tmp_path / "out")
    assert loaded._runs()[1]._parts == kept
    torch.testing.assert_close(loaded(x[:batch]), got, rtol=1e-5, atol=1e-6)


def test_what_mixes_samples_stays_whole(cut_small) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(x) - self.linear(x).mean(0)

    model, x = Mixed().eval(), torch.randn(6, 3, 8)
    compiled = pc.compile(model, example_inputs=x)
    assert compiled._compiled().executable._parts is None
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


def test_small_work_is_not_shared_out() -> None:
    compiled = pc.compile(nn.Linear(8, 4), example_inputs=torch.randn(4, 8))
    executable = compiled._compiled().executable
    assert len(executable._parts.cut([torch.randn(64, 8)], 2)) == 1


def test_several_threads_may_call_at_once(models, cut_small) -> None:
    model, x = models.Vit(depth=1).eval(), torch.randn(6, 16, 12)
    compiled = pc.compile(model, example_inputs=x)
    want = compiled(x)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: compiled(x), range(16)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_wrong_inputs_are_named_as_ever(models, cut_small) -> None:
    compiled = pc.compile(models.Vit(depth=1).eval(), example_inputs=torch.randn(4, 16, 12))
    with pytest.raises(pc.OptionError, match="do not fit"):
        compiled(torch.randn(4, 16, 13))
