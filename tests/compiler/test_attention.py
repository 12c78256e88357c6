"""Taking an attention apart: the same values from products and a softmax, and what is read where."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.compiler.attention import cache_code, decompose, operand_places
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.sites import attention_sites
from torch import Tensor, nn
from torch.nn import functional as F

Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
CASES = {
    "plain": ({}, (Q, K, V)),
    "three axes": ({}, (Q[0], K[0], V[0])),
    "causal": ({"is_causal": True}, (Q, K, V)),
    "causal, grouped keys": ({"is_causal": True, "enable_gqa": True}, (Q, K[:, :2], V[:, :2])),
    "boolean mask, own scale": ({"scale": 0.7}, (Q, K, V, (torch.rand(2, 1, 5, 6) < 0.6) | torch.eye(5, 6).bool())),
    "added mask": ({}, (Q, K, V, torch.randn(5, 6))),
}


class Fused(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def captured(case: str):
    options, inputs = CASES[case]
    program = pc.capture(Fused(**options).eval(), inputs)
    canonicalize(program)
    (site,) = attention_sites(program)
    return program, site, inputs, Fused(**options)(*inputs)


@pytest.mark.parametrize("case", CASES)
def test_the_parts_give_what_the_whole_gave(case):
    program, site, inputs, want = captured(case)
    product = decompose(program, site)
    program.refresh()
    torch.testing.assert_close(program(*inputs), want, rtol=1e-5, atol=1e-6)
    (parts,) = attention_sites(program)
    assert (parts.node, parts.fused, parts.scale) == (product, False, site.scale)
    assert parts.query is site.query
    scale = next(n for n in program.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    scale.update_arg(1, 2 * site.scale)
    program.module.recompile()
    assert not torch.allclose(program(*inputs), want, rtol=1e-2, atol=1e-2)


def test_a_query_that_may_attend_to_nothing_gets_the_mean():
    program, site, (q, k, v, mask), _ = captured("boolean mask, own scale")
    decompose(program, site)
    program.refresh()
    mask = mask.clone()
    mask[:, :, 2] = False
    want = v.mean(-2)
    torch.testing.assert_close(program(q, k, v, mask)[:, :, 2], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "causal, grouped keys"])
def test_queries_keys_and_values_are_read_in_the_same_order_before_and_after(case):
    program, site, _, _ = captured(case)
    read = [reader.args[index] for reader, index in operand_places(site)]
    assert read == [site.query, site.key, site.value]
    decompose(program, site)
    program.refresh()
    (parts,) = attention_sites(program)
    again = [reader.args[index] for reader, index in operand_places(parts)]
    sources = [n.args[0] if n.target is torch.ops.aten.repeat_interleave.self_int else n for n in again]
    assert sources == read


def test_what_a_cache_may_hold_is_read_from_the_graph():
    program, site, _, _ = captured("causal, grouped keys")
    assert cache_code(site) is None
    pc.QuantizeCache("int4").apply(program, pc.Context())
    (site,) = attention_sites(program)
    assert cache_code(site) == "int4"
    decompose(program, site)
    program.refresh()
    (site,) = attention_sites(program)
    assert cache_code(site) == "int4"
    (values,) = [n for n in program.graph.nodes if n.args[:1] == (program.placeholders[2],)]
    values.update_arg(2, "int8")
    assert cache_code(site) is None  # keys and values differ
