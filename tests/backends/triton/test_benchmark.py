"""benchmarks/triton_gpu.py as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton.kernels.quantized import quantized_format
from paretoc.backends.triton.kernels.weights import Format, weight_format

SCRIPT = Path(__file__).parents[3] / "benchmarks/triton_gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_it_explains_itself(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["triton_gpu.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    assert "--only" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["triton_gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        script.main()


@pytest.mark.parametrize("scheme", ["W4A16", "NF4", "2:4 W4A16", "FP8", "W4A16 + 32"])
def test_a_layer_is_what_it_says(script, monkeypatch, scheme):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    layer = script.Layer(scheme, 2 * script.ROWS, 256)
    assert layer.decoded.shape == (256, 256)
    assert layer.error(torch.randn(2, 256)) < 1e-5
    layer.arrays[0][3, 5] ^= 1
    assert layer.error(torch.randn(2, 256)) > 1e-4


def test_every_scheme_has_its_kernel(script):
    for text, code in script.SCHEMES.values():
        encoding = pc.parse_encoding(text)
        canonical = str(encoding.first if isinstance(encoding, pc.Sum) else encoding)
        assert isinstance(quantized_format(canonical, code) if code else weight_format(canonical), Format)


#: half a step between two codes of int8, and rounding
BOUNDS = {"SiLU · gate + int8": 0.01, "RMS norm + int8": 0.01}


def test_every_operator_is_what_it_says(script):
    cases = script.operator_cases("cpu", shrink=16)
    assert [case.name for case in cases] == list(script.OPERATORS)
    for case in cases:
        assert case.error() < BOUNDS.get(case.name, 1e-5), case.name
        wrong = script.Operator(
            case.name, case.inputs, case.kernel, lambda *x, eager=case.eager: -eager(*x), case.dense
        )
        assert wrong.error() > 0.1
