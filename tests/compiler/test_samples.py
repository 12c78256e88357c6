"""Samples that are computed apart: models that mix them are seen, and of the others a part of a batch gives a part."""

from __future__ import annotations

import operator

import paretoc as pc
import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.samples import _RULES, mixes_samples
from torch import Tensor, nn
from torch.nn import functional as F

X = torch.randn(4, 6, 8)


class Call(nn.Module):
    """f(x), with weights to use."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f, self.linear, self.table = f, nn.Linear(8, 8), nn.Embedding(9, 8)
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def program_of(f, x: Tensor = X):
    program = pc.capture(Call(f).eval(), x)
    canonicalize(program)
    return program


def apart_by_running(program, x: Tensor) -> bool:
    """Whether parts of a batch give the parts of its result."""
    (whole,) = program.run([x])
    found = [program.run([x[i : i + 2]])[0] for i in range(0, len(x), 2)]
    return torch.allclose(torch.cat(found), whole, rtol=1e-5, atol=1e-6)


APART = {
    "linear": lambda m, x: m.linear(x).relu() + x,
    "attention": lambda m, x: F.scaled_dot_product_attention(*x.reshape(x.shape[0], 3, 2, 8).unsqueeze(2).unbind(1)),
    "matmul": lambda m, x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "heads": lambda m, x: x.view(x.shape[0], 6, 2, 4).permute(0, 2, 1, 3).reshape(-1, 6, 4).view(x.shape[0], 2, 24),
    "flattened rows": lambda m, x: m.linear(x.reshape(-1, 8)).view(x.shape),
    "moved": lambda m, x: m.linear(x.transpose(0, 1)).cumsum(0).transpose(0, 1),
    "pooled": lambda m, x: m.norm(x.mean(1)),
    "class token": lambda m, x: torch.cat([m.table.weight[:1].expand(x.shape[0], 1, 8), x], 1)[:, 0],
    "convolution": lambda m, x: m.conv(x),
    "a mask": lambda m, x: x.masked_fill(torch.ones(6, 6).tril()[:, :1] == 0, 0.0) * torch.zeros_like(x).add(1),
    "stacked": lambda m, x: torch.stack([x, 2 * x], 1).amax(2),
    "ones": lambda m, x: x * torch.full((x.shape[0], 1, 8), 2.0),
    "all rows": lambda m, x: x[: x.shape[0]] * 2,
}
MIXED = {
    "mean": lambda m, x: x - x.mean(0, keepdim=True),
    "mean of all": lambda m, x: x / x.abs().mean(),
    "softmax": lambda m, x: x.softmax(0),
    "count": lambda m, x: x * x.shape[0],
    "count as a tensor": lambda m, x: x * torch.full((), x.shape[0]),
    "count as rows": lambda m, x: x * torch.full((x.shape[0], 1, 1), x.shape[0]),
    "index": lambda m, x: x + torch.arange(x.shape[0]).view(-1, 1, 1),
    "order": lambda m, x: x.flip(0),
    "first": lambda m, x: x + x[:1],
    "one": lambda m, x: x + x[0],
    "one behind": lambda m, x: x + x.roll(1, 0),
    "products": lambda m, x: torch.einsum("btc,dtc->bd", x, x).sum(1, keepdim=True) + x[:, :, 0],
    "norm over samples": lambda m, x: (
        F.layer_norm(x.permute(1, 2, 0), (x.shape[0],)).permute(2, 0, 1)
        if isinstance(x.shape[0], int)
        else x.permute(1, 2, 0).softmax(-1).permute(2, 0, 1)
    ),
    "tokens across": lambda m, x: x.transpose(0, 1).reshape(x.shape[0], 6, 8),
    "sum": lambda m, x: x.cumsum(0),
    "no batch": lambda m, x: x.sum(0),
    "largest": lambda m, x: x.sort(0).values,
    "batch last": lambda m, x: x.permute(1, 2, 0),
}


@pytest.mark.parametrize("name", APART)
def test_samples_that_are_apart(name: str) -> None:
    program = program_of(APART[name])
    assert mixes_samples(program) == ""
    assert apart_by_running(program, X)


@pytest.mark.parametrize("name", MIXED)
def test_samples_that_are_mixed(name: str) -> None:
    program = program_of(MIXED[name])
    reason = mixes_samples(program)
    assert reason, name
    if name not in ("no batch", "batch last"):
        assert not apart_by_running(program, X), "the case itself must mix"
        assert "node" in reason


def test_a_range_of_the_whole_tensor_mixes_samples() -> None:
    batches = {
        "dynamic": "quantize:W8A8-dynamic",
        "token": "quantize:W8A8-dynamic,granularity=token",
        "static": "quantize:W8A8",
    }
    found = {}
    for name, passes in batches.items():
        compiled = pc.compile(nn.Linear(8, 4), [passes], example_inputs=X, calibration=[X], target="eager")
        found[name] = mixes_samples(compiled.program)
    assert "fake_quantize_dynamic" in found["dynamic"] and found["token"] == found["static"] == ""


def test_a_fixed_batch_is_not_cut() -> None:
    program = pc.capture(nn.Linear(8, 4), X, dynamic_shapes=({},))
    assert mixes_samples(program) == "its batch is fixed"


def test_an_operator_that_is_not_known_is_named() -> None:
    program = program_of(lambda m, x: torch.linalg.inv(x @ x.transpose(1, 2) + torch.eye(6)))
    assert "it is not known that aten." in mixes_samples(program)


def test_every_rule_stands_for_an_operator() -> None:
    assert all(isinstance(t, torch._ops.OpOverload) or t is operator.getitem for t in _RULES)


def test_a_rule_that_forgets_its_dimension_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison by running sees what a wrong rule lets through."""
    monkeypatch.setitem(_RULES, torch.ops.aten.softmax.int, lambda walk, node: walk.only(node))
    program = program_of(MIXED["softmax"])
    assert mixes_samples(program) == "" and not apart_by_running(program, X)
