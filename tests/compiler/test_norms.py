"""Norms: which spellings are recognised, with which operands; and that putting RMS norms in their place is exact."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.capture import capture
from paretoc.compiler.norms import norms, rms_norm
from torch import Tensor, nn
from torch.nn import functional as F


class Spelt(nn.Module):
    def __init__(self, spelling) -> None:
        super().__init__()
        self.weight, self.spelling = nn.Parameter(torch.randn(8)), spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(self, x)


def captured(*spellings, dtype: torch.dtype = torch.float32):
    """All spellings in one program, an output each."""
    parts = nn.ModuleList(map(Spelt, spellings))
    parts.forward = lambda x: [part(x) for part in parts]
    program = capture(parts.to(dtype).eval(), torch.randn(2, 3, 8, dtype=dtype))
    canonicalize(program)
    return program


def root(x: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def llama(model, x):
    """The spelling of transformers: float32 inside."""
    wide = x.to(torch.float32)
    return model.weight * (wide * root(wide)).to(x.dtype)


SPELLINGS = {
    "rms_norm": lambda m, x: F.rms_norm(x, (8,), m.weight, 1e-6),
    "llama": llama,
    "gemma": lambda m, x: x * root(x) * (1.0 + m.weight),
    "product": lambda m, x: m.weight * (x * torch.rsqrt((x * x).mean((-1,), keepdim=True) + 1e-6)),
}


@pytest.fixture(scope="module")
def program():
    return captured(*SPELLINGS.values())


def test_rms_norms_are_recognised(program):
    found = norms(program)
    assert [norm.output for norm in found] == program.outputs
    for place, (name, norm) in enumerate(zip(SPELLINGS, found, strict=True)):
        assert norm.input is program.placeholders[0]
        assert (norm.centred, norm.bias, norm.channels) == (False, None, 8)
        assert norm.eps == pytest.approx(1e-6)
        want = program.get(f"{place}.weight").double() + (name == "gemma")
        torch.testing.assert_close(norm.weight.value(program), want, rtol=1e-6, atol=1e-6)


def test_layer_norm():
    program = captured(lambda m, x: F.layer_norm(x, (8,), m.weight, None, 1e-3))
    (norm,) = norms(program)
    assert norm.centred
    assert norm.eps == 1e-3
    assert norm.bias.source is None
    assert torch.equal(norm.weight.value(program), program.get("0.weight").double())


def test_a_norm_without_a_weight():
    (norm,) = norms(captured(lambda m, x: x * root(x) + m.weight))
    assert norm.weight is None
    (norm,) = norms(captured(lambda m, x: F.rms_norm(x, (8,), None, 1e-6) + m.weight))
    assert norm.weight.source is None


def read_in_between(model, x):
    square = x.pow(2)
    return model.weight * (x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6)) + square


OTHERS = {
    "cube": lambda m, x: m.weight * (x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-6)),
    "tokens": lambda m, x: m.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)),
    "another value": lambda m, x: m.weight * ((x + 1) * root(x)),
    "two axes": lambda m, x: F.layer_norm(x, (3, 8)) * m.weight,
    "two roots": lambda m, x: m.weight * (x * (root(x) + root(x, 1e-3))),
    "read in between": read_in_between,
}


def test_what_only_looks_like_one_is_not():
    found = norms(captured(*OTHERS.values()))
    assert found == [], [norm.describe() for norm in found]


def test_an_rms_norm_in_its_place_divides_by_the_root_mean_square(program):
    program = program.clone()
    for norm in norms(program):
        rms_norm(program, norm)
    program.refresh()
    x = torch.randn(2, 3, 8)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for got in program.run([x]):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(norm.eps == pytest.approx(1e-6) for norm in norms(program))


def test_casts_of_a_half_precision_model_are_inside():
    program = captured(llama, dtype=torch.bfloat16)
    (norm,) = norms(program)
    assert norm.input is program.placeholders[0]
    assert norm.weight.value(program).dtype == torch.float64
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    want = program.run([x])[0]
    rms_norm(program, norm)
    program.refresh()
    got = program.run([x])[0] * Tensor(want / (x.float() * root(x.float())).bfloat16()).mean((0, 1))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05)
