"""A fit that was interrupted continues where it stopped, ends with the same arrays, and never takes another's work."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.errors import ArtifactError
from paretoc.passes import Quantize
from paretoc.passes.fit import Gptq
from torch import nn

DATA = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]).eval()


@pytest.fixture
def quantised(reference, model, tmp_path):
    def run(data=DATA, scheme="W4A16", fitter="gptq", directory=tmp_path / "kept"):
        step = Quantize(scheme, fitter=fitter, checkpoint=None if directory is None else str(directory))
        compiled = reference(model, [step], data[0], calibration=data, verify=False)
        return {**compiled.program.weights(), "": compiled(data[0])}

    return run


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


def test_a_killed_run_continues(quantised, tmp_path, monkeypatch):
    whole = quantised(directory=None)
    fit, calls = Gptq.fit, []

    def dies(self, *job):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(self, *job)

    with monkeypatch.context() as patched:
        patched.setattr(Gptq, "fit", dies)
        with pytest.raises(KeyboardInterrupt):
            quantised()
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert same(quantised(), whole)


OTHERS = {"data": {"data": DATA[:3]}, "bits": {"scheme": "W3A16"}, "fitter": {"fitter": "gptq(act_order=True)"}}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_fit_takes_nothing(quantised, other):
    first = quantised()
    fresh = quantised(**other, directory=None)
    assert same(quantised(**other), fresh) and not same(fresh, first)


def test_an_unwritable_directory(quantised, refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(ArtifactError, "cannot write to", lambda: quantised(directory=tmp_path / "file"))
