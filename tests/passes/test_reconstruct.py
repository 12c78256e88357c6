"""Block reconstruction: blocks end where branches meet, a step is that of PyTorch's autograd, outputs come closer."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.encodings import Affine
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.passes import Context
from paretoc.compiler.recipe import parse_passes
from paretoc.compiler.sites import weight_sites
from paretoc.passes import Reconstruct
from paretoc.passes.reconstruct import _blocks
from torch import Tensor, nn
from torch.nn import functional as F


def captured(model: nn.Module, x: Tensor):
    program = pc.capture(model.eval(), x)
    canonicalize(program)
    return program


def inputs(seed: int = 1, count: int = 6) -> list[Tensor]:
    """Batches `[16, 16]` of channels that go together: rounding to nearest is far from the best."""
    mix = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, generator=make) @ mix + torch.randn(16, 16, generator=make) / 5 for _ in range(count)]


@pytest.fixture(scope="module")
def mlp(models):
    torch.manual_seed(0)
    return captured(models.Mlp(16, 32, 8), inputs()[0])


@pytest.fixture(scope="module")
def vit(models):
    torch.manual_seed(0)
    return captured(models.Vit(depth=2), torch.randn(2, 16, 12))


def after(program, batches, text: str):
    """The program after a recipe, and what its last pass says, as the driver runs it."""
    made, result = program, None
    for step in parse_passes(text.split("|")):
        made = made.clone()
        result = step.apply(made, Context(batches=[[b] for b in batches], reference=program))
    return made, result


def error(program, other, batches) -> float:
    want, got = (torch.cat([p.run([b])[0] for b in batches]) for p in (program, other))
    return float((want - got).norm() / want.norm())


# -- blocks ----------------------------------------------------------------------------------------------


def blocks(program, branches: int, reference=None) -> list[str]:
    paths = {site.node: site.path.removeprefix("blocks.") for site in weight_sites(program)}
    found = _blocks(program, reference or program, branches)
    return [" ".join(paths[node] for node in block.sites) for block in found]


def test_blocks_end_where_branches_meet(vit):
    attention, mlp = ([f"{i}.{a} {i}.{b}" for i in (0, 1)] for a, b in
                      (("attention.qkv", "attention.out"), ("mlp.up", "mlp.down")))  # fmt: skip
    assert blocks(vit, 1) == ["embed", attention[0], mlp[0], attention[1], mlp[1], "head"]
    assert blocks(vit, 2) == ["embed", f"{attention[0]} {mlp[0]}", f"{attention[1]} {mlp[1]}", "head"]
    assert blocks(vit, 0) == [" ".join(blocks(vit, 1))]


def test_layers_outside_branches_are_blocks_of_their_own(mlp):
    assert blocks(mlp, 1) == blocks(mlp, 2) == ["up", "down"]


def test_blocks_end_at_values_that_the_reference_has(vit):
    rounded, _ = after(vit, [torch.randn(2, 16, 12)], "quantize:W8A8-dynamic,fitter=rtn")
    assert blocks(rounded, 2, vit) == blocks(vit, 2)


# -- learning --------------------------------------------------------------------------------------------


def textbook(weight: Tensor, bias: Tensor, x: Tensor, bits: int, rates: list[float]) -> tuple[Tensor, Tensor]:
    """(Ŵ, b̂) after signed steps on ‖x·Ŵᵀ + b̂ − (x·Wᵀ + b)‖², symmetric codes, one scale a row, by autograd."""
    top = 2 ** (bits - 1) - 1
    start = weight.abs().amax(1, keepdim=True) / top
    move, growth, shift = (torch.zeros_like(t, requires_grad=True) for t in (weight, start, bias))

    def learned() -> tuple[Tensor, Tensor]:
        steps = weight / start + move
        codes = steps + (steps.round().clamp(-top, top) - steps).detach()
        return codes * start * growth.exp(), bias + shift * bias.abs().mean()

    for rate in rates:
        loss = F.mse_loss(F.linear(x, *learned()), F.linear(x, weight, bias))
        for leaf, slope in zip((move, growth, shift), torch.autograd.grad(loss, (move, growth, shift)), strict=True):
            leaf.data -= rate * slope.sign()
    return tuple(t.detach() for t in learned())


def test_the_steps_are_those_of_a_textbook():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), inputs(count=1)[0]
    program = captured(layer, x)
    made, _ = after(program, [x], "quantize:W8A16,weights=Affine(3),fitter=rtn|reconstruct:steps=10,rate=0.03")
    (site,) = weight_sites(made)
    weight, bias = textbook(layer.weight.detach(), layer.bias.detach(), x, 3, [0.03 * (1 - i / 10) for i in range(10)])
    torch.testing.assert_close(made.weight_value(site.weight), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.get(str(site.bias.target)), bias, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight, textbook(layer.weight.detach(), layer.bias.detach(), x, 3, [])[0])


STORED = {
    "integers": "quantize:W2A16,group_size=8",
    "gptq": "quantize:W2A16,group_size=8,fitter=gptq",
    "half scales": "quantize:W8A16,weights=Affine(2;8;symmetric=False;scale='float16')",
    "float": "quantize:W8A16,weights=Float('e2m1';8)",
    "codebook": "quantize:W8A16,weights=Codebook(2),fitter=kmeans",
    "sum": "quantize:W8A16,weights=Sum(Affine(2;8;symmetric=False);LowRank(2)),fitter=rtn",
    "activations": "quantize:W4A4,group_size=8,code=uint4",
}


@pytest.mark.parametrize("recipe", STORED.values(), ids=STORED)
def test_outputs_on_new_data_come_closer(mlp, recipe):
    recipe = recipe.replace(";", ",")
    plain, _ = after(mlp, inputs(), recipe)
    learned, result = after(mlp, inputs(), f"{recipe}|reconstruct:steps=60,rate=0.01")
    fresh = inputs(seed=2)
    assert error(mlp, learned, fresh) < 0.95 * error(mlp, plain, fresh)
    assert result.metrics["block error after"] < result.metrics["block error before"]
    assert result.matched == ["up", "down"]
    before, now = ([str(p.encoding(n)) for n in p.calls(torch.ops.paretoc.decode.default)] for p in (plain, learned))
    assert before == now


def test_a_later_block_sees_what_the_earlier_ones_have_become(vit):
    batches = [torch.randn(2, 16, 12) for _ in range(4)]
    plain, _ = after(vit, batches, "quantize:W8A16,weights=Affine(3)")
    _, result = after(vit, batches, "quantize:W8A16,weights=Affine(3)|reconstruct:steps=1,targets=head")
    assert result.metrics["block error before"] == pytest.approx(error(vit, plain, batches), rel=1e-4)


def test_a_block_that_gets_no_nearer_stays(mlp):
    recipe = "quantize:W4A16,group_size=8"
    plain, _ = after(mlp, inputs(), recipe)
    learned, result = after(mlp, inputs(), f"{recipe}|reconstruct:steps=3,rate=50")
    assert result.metrics["block error after"] == result.metrics["block error before"]
    assert all(torch.equal(value, learned.weights()[name]) for name, value in plain.weights().items())


def test_it_is_deterministic_and_leaves_the_original_alone(mlp):
    before = {name: value.clone() for name, value in mlp.weights().items()}
    first, second = (after(mlp, inputs(), "quantize:W2A16,group_size=8|reconstruct:steps=5")[0] for _ in range(2))
    assert all(torch.equal(value, second.weights()[name]) for name, value in first.weights().items())
    assert all(torch.equal(value, mlp.weights()[name]) for name, value in before.items())


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"steps": 0}, {"branches": -1}, {"rate": 0.0}], ids=str)
def test_wrong_options_are_refused(options):
    ((option, value),) = options.items()
    with pytest.raises(OptionError, match=f"{option}={value} is not valid"):
        Reconstruct(**options)


def test_nothing_to_compare_with(mlp):
    with pytest.raises(PassError, match="no pass has quantised the model"):
        Reconstruct().apply(mlp.clone(), Context(batches=[[inputs()[0]]]))


def test_weights_that_are_stored_as_they_are(mlp):
    with pytest.raises(PassError, match="no weight can be learned: up: its weight is stored as it is"):
        after(mlp, inputs(), "reconstruct")


def test_a_weight_of_two_blocks_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.layer(torch.relu(self.layer(x)))))

    torch.manual_seed(0)
    program = captured(Twice(), inputs()[0])
    _, result = after(program, inputs(), "quantize:W4A16,group_size=8|reconstruct:steps=3")
    assert result.matched == ["last"]
    assert result.skipped == {"layer": "its weight is shared with another block"}


def test_the_encoding_decides_what_moves():
    """Exponents of scales are stored as codes and stay; numbers move."""
    torch.manual_seed(0)
    program = captured(nn.Linear(16, 8), inputs()[0])
    for scale, moves in (("e8m0", False), ("float32", True)):
        encoding = Affine(3, 8, scale=scale)
        plain, _ = after(program, inputs(), f"quantize:W8A16,weights={encoding}")
        learned, _ = after(program, inputs(), f"quantize:W8A16,weights={encoding}|reconstruct:steps=40,rate=0.02")
        assert torch.equal(plain.get("weight.scale"), learned.get("weight.scale")) is not moves
        assert not torch.equal(plain.get("weight.codes"), learned.get("weight.codes"))
