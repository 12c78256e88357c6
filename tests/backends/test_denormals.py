"""Numbers below the least normal float count as zero inside a call, and nowhere else."""

import threading

import numpy as np
import paretoc as pc
import pytest
import torch
from paretoc.backends.onnxruntime.denormals import flushed
from torch import nn

TINY = 1e-40
LEAST = np.array([TINY], dtype=np.float32)


def _flushes() -> bool:
    """Whether this thread does, asked of NumPy."""
    return bool((LEAST * np.float32(0.5))[0] == 0)


@pytest.fixture(autouse=True)
def restored():
    assert not _flushes()
    yield
    torch.set_flush_denormal(False)


def test_the_thread_is_left_as_it_was():
    with flushed():
        assert _flushes()
    assert not _flushes()
    torch.set_flush_denormal(True)
    with flushed():
        assert _flushes()
    assert _flushes()


def test_also_when_it_fails():
    with pytest.raises(ZeroDivisionError), flushed():
        raise ZeroDivisionError
    assert not _flushes()


class Halve(nn.Module):
    def forward(self, x):
        return x * 0.5


def test_a_call_flushes_on_whichever_thread_it_comes(tmp_path):
    x = torch.full((1, 1 << 16), TINY)
    compiled = pc.compile(Halve(), example_inputs=x)
    compiled.save(tmp_path / "out")
    loaded = pc.load(tmp_path / "out")
    assert float(x[0, 0]) > 0 and float((x * 0.5).min()) > 0
    seen = []

    def call():
        seen.append([float(model(x).max()) for model in (compiled, loaded)])
        seen.append(_flushes())

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert seen == [[0.0, 0.0], False] * 2


def test_nothing_else_changes():
    """What is no denormal keeps its bits."""
    x = (torch.rand(3, 64) + 1) * 1e-37
    assert torch.equal(pc.compile(Halve(), example_inputs=x)(x), x * 0.5)
