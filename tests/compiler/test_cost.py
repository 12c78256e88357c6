"""Cost: multiply–accumulates against torch's counter and by hand, bytes, parameters, tokens; and timing."""

from __future__ import annotations

import time

import pytest
import torch
from paretoc.compiler.capture import capture
from paretoc.compiler.cost import cost, measure, node_macs, parameter_count
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.sites import weight_sites
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def _counted(model: nn.Module, *example: Tensor, **keywords: Tensor) -> int:
    """Multiply–accumulates by torch's counter, which counts two operations for each."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*example, **keywords)
    return counter.get_total_flops() // 2


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.along = nn.Conv1d(8, 6, 3, dilation=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.along(self.grouped(x).flatten(2))
        return torch.bmm(x, x.transpose(1, 2)).flatten(1) @ y


@pytest.mark.parametrize("name", ["Mlp", "Cnn", "Vit"])
def test_macs_equal_torchs_counter(models, name):
    shapes = {"Mlp": (3, 16), "Cnn": (3, 4, 8, 8), "Vit": (3, 16, 12)}
    model, x = getattr(models, name)().eval(), torch.randn(shapes[name])
    assert cost(capture(model, x)).macs == _counted(model, x)


def test_macs_of_convolutions_and_products():
    model, x, y = Products().eval(), torch.randn(2, 4, 10, 10), torch.randn(36, 5)
    assert cost(capture(model, (x, y))).macs == _counted(model, x, y)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_macs_of_hugging_face_models(captured, models, form):
    model, program = captured("ViTForImageClassification", attn_implementation=form)
    assert cost(program).macs == _counted(model, **models.images(2))


def test_macs_by_hand(models):
    assert cost(capture(models.Mlp(), torch.randn(3, 16))).macs == 3 * (16 * 32 + 32 * 8)
    tokens, width, depth = 16, 16, 2
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 2 * width
    macs = 2 * (tokens * 12 * width + depth * block + width * 5)
    assert cost(capture(models.Vit(depth=depth), torch.randn(2, tokens, 12))).macs == macs


def test_what_is_no_product_costs_nothing(models):
    program = capture(models.TiedLanguageModel(), torch.randint(0, 48, (2, 5)))
    assert {node_macs(n) for n in program.calls(torch.ops.aten.embedding.default)} == {0}
    assert cost(program).macs == 2 * 5 * (32 * 32 + 32 * 48)


def test_macs_are_those_of_the_users_example(models):
    assert cost(capture(models.Mlp(), torch.randn(1, 16))).macs == 16 * 32 + 32 * 8


def test_bytes_and_parameters_of_a_dense_model(models):
    model = models.Cnn().eval()
    program = capture(model, torch.randn(2, 4, 8, 8))
    weights = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert parameter_count(program) == sum(w.numel() for w in weights)
    assert cost(program).bytes == sum(t.numel() * t.itemsize for t in program.weights().values())
    assert cost(program).bytes == 4 * parameter_count(program)


def test_tied_weights_count_once(models):
    model = models.TiedLanguageModel()
    found = cost(capture(model, torch.randint(0, 48, (2, 5))))
    assert found.parameters == 48 * 32 + 32 * 32 + 32
    assert found.bytes == 4 * found.parameters


@pytest.mark.parametrize("encoding", [Affine(4), Affine(8, 8, False), NM(2, 4), NM(2, 4, Affine(8))], ids=str)
def test_bytes_and_parameters_of_encoded_weights(models, encoding):
    program = capture(models.Mlp(), torch.randn(2, 16))
    for site in weight_sites(program):
        program.encode(site.weight, encoding, encoding.encode(program.weight_value(site.weight)))
    program.refresh()
    kept = 2 if isinstance(encoding, NM) else 1
    found = cost(program)
    assert found.parameters == (16 * 32 + 32 * 8) // kept + 32 + 8
    assert found.bytes == encoding.nbytes((32, 16)) + encoding.nbytes((8, 32)) + 4 * 40
    assert found.macs == 2 * (16 * 32 + 32 * 8)


def test_tokens(captured, models):
    _, program = captured("ViTForImageClassification")
    assert cost(program).tokens == (17, 17, 17)
    assert cost(capture(models.Mlp(), torch.randn(2, 16))).tokens == ()


# -- timing ----------------------------------------------------------------------------------------------


def test_calls_take_turns_in_changing_order():
    order = []
    found = measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=20)
    assert {"".join(order[i : i + 4]) for i in range(0, 80, 4)} == {"aabb", "bbaa"} and len(order) == 80
    assert {n: latency.runs for n, latency in found.items()} == {"a": 20, "b": 20}


def test_times_are_milliseconds_of_the_second_call():
    waits = iter([0.03, 0.001] * 3)
    latency = measure({"nap": lambda: time.sleep(next(waits))}, runs=3)["nap"]
    assert 1 <= latency.minimum <= latency.median < 25


def test_the_budget_ends_it_after_three_rounds():
    found = measure({"nap": lambda: time.sleep(0.01)}, runs=1000, budget_s=0.05)
    assert 3 <= found["nap"].runs < 20
