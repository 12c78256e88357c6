"""torch.compile and Triton kernels: the lowered graph compiles whole, and "paretoc" is a backend of `torch.compile`."""

from __future__ import annotations

from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton import Triton
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    torch._dynamo.reset()


def small(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("step", "backend"),
    [
        ("quantize:W4A16", "eager"),
        ("quantize:W8A8", "aot_eager"),
        ("quantize:W4A8", "aot_eager"),
        ("quantize:W8A8-dynamic", "aot_eager"),
    ],
)
def test_the_lowered_graph_compiles_whole(models, step, backend):
    x = small(5, 64)
    options = {"example_inputs": (x,), "calibration": [(x,)], "target": "eager", "verify": False}
    lowered = Triton().lower(pc.compile(models.Mlp(64, 32, 32).eval(), [step], **options).program, {}).lowered
    compiled = torch.compile(lowered.module, fullgraph=True, backend=backend)
    for tokens in (5, 20):
        x = small(tokens, 64)
        with torch.no_grad():
            assert torch.equal(compiled(x)[0], lowered.run([x])[0])


def test_token_merging_compiles_whole(models):
    x = small(2, 16, 12)
    options = {"example_inputs": (x,), "target": "eager", "verify": False}
    program = pc.compile(models.Vit(depth=1).eval(), ["merge_tokens:r=2"], **options).program
    lowered = Triton().lower(program, {}).lowered
    with torch.no_grad():
        (y,) = torch.compile(lowered.module, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, lowered.run([x])[0])


def test_a_lowered_graph_can_be_exported(models):
    x = small(5, 64)
    options = {"example_inputs": (x,), "target": "eager", "verify": False}
    program = pc.compile(models.Mlp(64, 32, 32).eval(), ["quantize:FP8"], **options).program
    lowered = Triton().lower(program, {}).lowered
    exported = torch.export.export(lowered.module, (x,))
    assert "paretoc_triton.quantized_linear" in str(exported.graph)
    assert torch.equal(exported.module()(x)[0], lowered.run([x])[0])


class Model(nn.Module):
    """A parameter, a buffer and a size in one graph; a dict comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.register_buffer("shift", torch.randn(32))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.linear(x) + self.shift, "rows": x.reshape(x.shape[0] * x.shape[1], -1)}


@pytest.fixture
def compiled_by_torch() -> Any:
    torch.manual_seed(0)
    model = Model().eval()
    options = {"passes": ["quantize:W4A16"], "verify": False}
    return model, lambda **how: torch.compile(model, backend="paretoc", options=options, **how)


def check(compiled: Any, model: Model, x: Tensor) -> None:
    """As near as 4-bit weights are, and no nearer."""
    with torch.no_grad():
        found, expected = compiled(x), model(x)
    assert list(found) == list(expected) and torch.equal(found["rows"], expected["rows"])
    distance = (found["y"] - expected["y"]).abs().max() / expected["y"].abs().max()
    assert 1e-3 < distance < 0.15


def test_paretoc_is_a_backend_of_torch_compile(compiled_by_torch):
    model, compiled = compiled_by_torch
    once = compiled()
    for x in (small(2, 3, 64), small(4, 3, 64)):
        check(once, model, x)


def test_open_sizes_are_read_from_the_tensors(compiled_by_torch):
    model, compiled = compiled_by_torch
    once = compiled(dynamic=True)
    check(once, model, small(2, 3, 64))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(once, model, small(4, 5, 64))


def test_options_are_those_of_compile(models):
    options = {"passes": ["quantize:W9"], "verify": False}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="there is no scheme 'W9'"):
        torch.compile(models.Mlp(), backend="paretoc", options=options)(small(2, 16))


def test_a_number_that_no_input_has_is_refused():
    class Scaled(nn.Module):
        def forward(self, x: Tensor, n: int) -> Tensor:
            return x * n

    compiled = torch.compile(Scaled(), backend="paretoc", dynamic=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="which no input has as a size"):
        compiled(small(2, 3), 7)
