"""A fit that was interrupted continues where it stopped, ends with the same arrays, and never takes another's work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import paretoc as pc
import pytest
import torch
from paretoc.compiler.errors import ArtifactError
from paretoc.passes import Quantize
from paretoc.passes.fit import Gptq
from torch import Tensor, nn

DATA = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def quantise(directory, data=DATA, scheme="W4A16", fitter="gptq") -> dict[str, Tensor]:
    """What is stored and, under "", what comes out."""
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]).eval()
    step = Quantize(scheme, fitter=fitter, checkpoint=None if directory is None else str(directory))
    compiled = pc.compile(model, [step], calibration=data, target="eager", verify=False)
    return {**compiled.program.weights(), "": compiled(data[0])}


def fit_until(count: int, end: Callable[[], None]) -> Callable[..., None]:
    """`Gptq.fit`, but the call of this number ends it all."""
    fit, calls = Gptq.fit, []

    def dies(self, *job):
        calls.append(1)
        if len(calls) == count:
            end()
        return fit(self, *job)

    return dies


def killed(directory: str) -> None:
    """What the child process of a test does."""
    torch.set_num_threads(1)
    Gptq.fit = fit_until(3, lambda: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[method-assign]
    quantise(directory)


@pytest.fixture
def quantised(tmp_path):
    return lambda directory=tmp_path / "kept", **options: quantise(directory, **options)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_finished_is_not_fitted_again(quantised, tmp_path, monkeypatch):
    whole = quantised(directory=None)
    assert same(quantised(), whole)
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 4 and all(f.suffix == ".safetensors" for f in files)
    fitted = []
    fit = Gptq.fit
    monkeypatch.setattr(Gptq, "fit", lambda self, *job: fitted.append(1) or fit(self, *job))
    assert same(quantised(), whole) and not fitted
    files[1].unlink()
    files[3].unlink()
    assert same(quantised(), whole) and len(fitted) == 2


def test_an_interrupted_run_continues(quantised, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Gptq, "fit", fit_until(3, interrupt))
        with pytest.raises(KeyboardInterrupt):
            quantised()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert same(quantised(), quantised(directory=None))


def test_a_killed_process_is_continued_by_another(quantised, tmp_path):
    code = f"import runpy; runpy.run_path({__file__!r})['killed']({str(tmp_path / 'kept')!r})"
    child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -signal.SIGKILL
    left = {file: file.read_bytes() for file in Path(tmp_path / "kept").iterdir()}
    assert len(left) == 2
    assert same(quantised(), quantised(directory=None))
    assert all(file.read_bytes() == data for file, data in left.items())
    assert len(list((tmp_path / "kept").iterdir())) == 4


OTHERS = {"data": {"data": DATA[:3]}, "bits": {"scheme": "W3A16"}, "fitter": {"fitter": "gptq(act_order=True)"}}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_fit_takes_nothing(quantised, other):
    first = quantised()
    fresh = quantised(**other, directory=None)
    assert same(quantised(**other), fresh) and not same(fresh, first)


def test_an_unwritable_directory(quantised, refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(ArtifactError, "cannot write to", lambda: quantised(directory=tmp_path / "file"))
