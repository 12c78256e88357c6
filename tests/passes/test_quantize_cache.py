"""Rounded keys and values: the values are those of a cache in that code, on every target."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from ml_dtypes import float8_e4m3fn
from paretoc.compiler.attention import operand_places
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.sites import attention_sites
from torch import Tensor, nn
from torch.nn import functional as F


def rounded(x: Tensor, code: str) -> Tensor:
    """[B, H, T, D], every row of D numbers under a scale of its own."""
    top = 448.0 if code == "e4m3" else float(2 ** (int(code[3:]) - 1) - 1)
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        scale = float(row.abs().max()) / top
        if code == "e4m3":
            codes = torch.from_numpy((row / scale).numpy().astype(float8_e4m3fn).astype("float32"))
        else:
            codes = torch.tensor([float(round(float(v) / scale)) for v in row])
        rows.append(codes * scale)
    return torch.stack(rows).reshape(x.shape)


class Decoder(nn.Module):
    """One causal attention; two heads of queries share one of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, keep=lambda x: x) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, keep(k), keep(v), is_causal=True, enable_gqa=True)


X = torch.randn(2, 6, 16)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("code", ["int8", "int4", "e4m3"])
def test_attention_reads_what_a_cache_of_that_code_holds(reference, code):
    model = Plain().eval()
    compiled = reference(model, [f"quantize_cache:{code}"], X)
    with torch.no_grad():
        want = model.inner(X, lambda x: rounded(x, code))
        other = model.inner(X, lambda x: rounded(x, "int5"))
    torch.testing.assert_close(compiled(X), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(compiled(X), other, rtol=1e-4, atol=1e-5)
    (entry,) = [e for e in compiled.report(latency=False).passes if e["name"] == "quantize_cache"]
    assert entry["matched"] == ["inner"]


def test_on_onnx_runtime_and_with_rounded_products():
    model = Plain().eval()
    passes = ["quantize_cache:int4", "quantize:W8A8-dynamic,attention=true"]
    eager, compiled = (pc.compile(model, passes, example_inputs=X, target=t) for t in ("eager", "onnx"))
    torch.testing.assert_close(compiled(X), eager(X), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", ["true", "scores"])
def test_products_of_a_rounded_cache_can_be_rounded_too(attention):
    passes = ["quantize_cache:int4", f"quantize:W8A8-dynamic,attention={attention}"]
    compiled = pc.compile(Plain().eval(), passes, example_inputs=X, target="eager")
    assert compiled.report(latency=False).passes[-1]["skipped"] == {}
    (site,) = attention_sites(compiled.program)
    (reader, index), *_ = operand_places(site)
    assert reader.args[index].target is torch.ops.paretoc.fake_quantize_dynamic.default


def test_the_attention_of_a_transformer_library_too(captured):
    _, program = captured("BertForSequenceClassification", attn_implementation="eager")
    result = pc.QuantizeCache().apply(program, pc.Context())
    assert result.matched == [site.path for site in attention_sites(program)]
    assert len(result.matched) == 2
    assert len(program.calls(torch.ops.paretoc.fake_quantize_dynamic.default)) == 4
    again = pc.QuantizeCache("int4").apply(program, pc.Context())
    assert set(again.skipped.values()) == {"its keys and values are rounded to int8 already"}


def test_what_cannot_be_is_refused(models, reference, refused):
    refused(OptionError, "there is no code 'int9'", lambda: pc.QuantizeCache("int9"))
    sentence = "the model has no attention"
    refused(PassError, sentence, lambda: reference(models.Mlp(), ["quantize_cache"], torch.randn(2, 16)))
