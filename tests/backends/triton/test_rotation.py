"""Rotations by Kronecker products against float64 products with the whole matrix, and in compiled models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton import Triton
from paretoc.backends.triton.kernels.launch import DTYPES
from paretoc.backends.triton.kernels.plan import REFERENCE, Tunings
from paretoc.backends.triton.kernels.quantize import quantize_tokens
from paretoc.backends.triton.kernels.rotation import rotate, rotate_tokens, tilings
from paretoc.compiler.orthogonal import rotation
from torch import Tensor


def sides(a: int, b: int, dtype: torch.dtype, kind: str = "hadamard") -> tuple[Tensor, Tensor, Tensor]:
    """left, right and A ⊗ B of what they were rounded to, float64."""
    left, right = rotation(a, kind, 0).T.to(dtype).contiguous(), rotation(b, kind, 1).to(dtype).contiguous()
    return left, right, torch.kron(left.T.double().contiguous(), right.double())


def bound(x: Tensor) -> Tensor:
    """Half a unit for each of two roundings, of numbers no larger than the norm; three tf32 products miss 2⁻²² more."""
    units = 3 if x.dtype == torch.float32 else 1.5
    return units * torch.finfo(x.dtype).eps * x.double().norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("a", "b"), [(1, 7), (4, 12), (16, 16), (20, 36), (3, 100)])
def test_a_rotation_is_the_product_with_the_whole_matrix(near, a, b, dtype):
    x = torch.randn(5, a * b).to(dtype)
    left, right, whole = sides(a, b, dtype)
    y = rotate(x, left, right)
    assert y.dtype == dtype
    near(y, x.double() @ whole, bound(x))
    with pytest.raises(AssertionError, match="more than allowed"):
        near(rotate(x, left, -right), x.double() @ whole, bound(x))


@pytest.mark.parametrize("M", [1, 2, 17])
def test_any_number_of_tokens(near, M):
    left, right, whole = sides(8, 16, torch.float32, "random")
    x = torch.randn(M, 128)
    near(rotate(x, left, right), x.double() @ whole, bound(x))


@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 3, 48), torch.randn(48, 3).T, torch.randn(3, 96)[:, ::2], torch.randn(0, 48), torch.randn(48)],
    ids=["3-D", "transposed", "every other", "no tokens", "one vector"],
)
def test_activations_of_any_strides(near, x):
    left, right, whole = sides(4, 12, torch.float32)
    near(rotate(x, left.T.contiguous().T, right), x.double() @ whole, bound(x))


def test_every_tiling_and_the_reference_agree(near, monkeypatch):
    left, right, whole = sides(12, 20, torch.float16)
    x = torch.randn(9, 240).half()
    count = len(tilings(16, 12, 20))
    for number in range(count + 1):
        monkeypatch.setattr(Tunings, "pick", lambda self, plan, number=number: plan.tilings[number])
        near(rotate(x, left, right), x.double() @ whole, bound(x))
    assert count > 1 and not tilings(1, 256, 256)
    monkeypatch.setattr(Tunings, "pick", lambda self, plan: REFERENCE)
    near(rotate(x, left, right), x.double() @ whole, bound(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", ["int8", "int4", "e4m3"])
def test_codes_are_those_of_the_rotated_tokens(monkeypatch, code, dtype):
    left, right, _ = sides(4, 12, dtype)
    x = (torch.randn(2, 5, 48) * torch.logspace(-3, 3, 5).unsqueeze(1)).to(dtype)
    expected = quantize_tokens(rotate(x, left, right), code)
    for found, wanted in zip(rotate_tokens(x, left, right, code), expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found.float(), wanted.float())
    assert not torch.equal(rotate_tokens(x, -left, right, code)[0].float(), expected[0].float())
    monkeypatch.setattr(Tunings, "pick", lambda self, plan: REFERENCE)
    codes, scales = rotate_tokens(x, left, right, code)
    assert codes.shape == x.shape and scales.shape == expected[1].shape


def test_the_shape_rules_agree():
    left, right, _ = sides(2, 4, torch.float32)
    arguments, options = (torch.randn(2, 3, 8).transpose(0, 1), left, right), ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.paretoc_triton.rotate.default, arguments, test_utils=options)
    torch.library.opcheck(torch.ops.paretoc_triton.rotate_tokens.default, (*arguments, "int8"), test_utils=options)


IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def program(models: Any) -> Callable[[str], pc.Program]:
    """A small decoder with an online rotation, quantised by one more step."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = models.hugging_face("LlamaForCausalLM", num_key_value_heads=2, vocab_size=64, use_cache=False, **options)
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": IDS})

    @cache
    def quantised(step: str) -> pc.Program:
        return pc.compile(exported, ["rotate:online=true", step], target="eager", verify=False).program

    return quantised


@pytest.mark.parametrize(
    ("step", "kernel", "note"),
    [
        ("quantize:W4A16,group_size=4", "rotate", "interpreted, for tests"),
        ("quantize:W8A8-dynamic,granularity=token", "rotate_tokens", "to int8; interpreted, for tests"),
    ],
)
def test_the_rotation_of_a_model_is_one_kernel_which_is_said(program, near, step, kernel, note):
    executable = Triton().lower(program(step), {})
    targets = [str(n.target) for n in executable.lowered.graph.nodes]
    assert [t for t in targets if "rotate" in t] == [f"paretoc_triton.{kernel}.default"]
    assert not any("unflatten" in target or "flatten.using_ints" in target for target in targets)
    (y, *_), (reference, *_) = executable.run([IDS]), program(step).run([IDS])
    near(y, reference, (2e-5 if kernel == "rotate" else 5e-3) * reference.abs().max())  # a code may be the next one
    (row,) = [row for row in executable.explain() if row.kernel.startswith("rotation")]
    assert row.site == "model.layers.0.mlp.down_proj" and row.note == note


def test_what_is_too_large_stays_which_is_said(program, monkeypatch):
    monkeypatch.setattr("paretoc.backends.triton.kernels.rotation.MAX_SIZE", 64)
    executable = Triton().lower(program("quantize:W4A16,group_size=4"), {})
    assert "no kernel rotates torch.float32 as 4 × 12" in {row.note for row in executable.explain()}
