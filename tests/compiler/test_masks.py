"""Masks in their simplest form compute the same, whatever the batch and the padding."""

import paretoc as pc
import pytest
import torch
from paretoc.compiler import masks
from paretoc.compiler.canonical import canonicalize
from torch.nn import functional as F


class Masked(torch.nn.Module):
    """Attention under a mask that is written as predicates over index grids, as libraries write them."""

    def __init__(self, predicate):
        super().__init__()
        self.predicate = predicate

    def forward(self, x, padding):
        batch, tokens = x.shape[0], x.shape[1]
        b = torch.arange(batch)[:, None, None, None]
        q, k = torch.arange(tokens)[None, None, :, None], torch.arange(tokens)[None, None, None, :]
        mask = self.predicate(b, q, k, padding.bool())
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)


def _program(predicate, batch=2, tokens=5):
    x, padding = torch.randn(batch, tokens, 8), torch.ones(batch, tokens, dtype=torch.long)
    padding[0, 3:] = 0
    return pc.capture(Masked(predicate), (x, padding)), (x, padding)


def _targets(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def _simplified(predicate):
    program, inputs = _program(predicate)
    expected = program(*inputs)
    canonicalize(program)
    torch.testing.assert_close(program(*inputs), expected)
    x, padding = torch.randn(3, 7, 8), torch.ones(3, 7, dtype=torch.long)
    padding[1, 2:] = 0
    torch.testing.assert_close(program(x, padding), Masked(predicate)(x, padding))
    return _targets(program)


def test_a_padding_mask_that_is_gathered_is_a_view():
    targets = _simplified(lambda b, q, k, padding: padding[b, k])
    assert "aten.index.Tensor" not in targets
    assert targets.count("aten.unsqueeze.default") == 2


def test_what_is_true_everywhere_is_left_out():
    targets = _simplified(lambda b, q, k, padding: q.new_ones((), dtype=torch.bool) & (q >= 0) & padding[b, k])
    assert not any("and" in t or "ge" in t for t in targets)


def test_a_mask_that_is_all_true_goes():
    def predicate(b, q, k, padding):
        return (q >= 0) & (k >= 0)

    targets = _simplified(predicate)
    assert not any("and" in t or "arange" in t for t in targets)


@pytest.mark.parametrize(
    "predicate",
    [
        lambda b, q, k, padding: (q >= 1) | padding[b, k],
        lambda b, q, k, padding: (k <= q) & padding[b, k],
        lambda b, q, k, padding: padding[b, k.flip(-1)],
        lambda b, q, k, padding: padding[b, q] | padding[b, k],
        lambda b, q, k, padding: torch.full_like(q, True, dtype=torch.bool) & (k < 3),
    ],
    ids=["not everywhere", "causal", "another order", "two grids", "a prefix"],
)
def test_what_hides_something_stays(predicate):
    _simplified(predicate)


def test_a_causal_mask_is_not_taken_for_an_open_one():
    targets = _simplified(lambda b, q, k, padding: (k <= q) & padding[b, k])
    assert any("and" in t for t in targets)


def test_a_wrong_bound_is_caught(monkeypatch):
    monkeypatch.setattr(masks, "_least", lambda value: 10)
    with pytest.raises(AssertionError):
        _simplified(lambda b, q, k, padding: (q >= 3) & padding[b, k])
