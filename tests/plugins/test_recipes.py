"""Recipes of published methods: what each stands for, and a reduced form of what its paper claims."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.encodings import Additive, Affine, Float, LowRank, Nested, Sum
from paretoc.compiler.errors import OptionError
from paretoc.compiler.recipe import parse_passes
from paretoc.compiler.sensitivity import relative_error
from paretoc.passes import Quantize, Rotate
from paretoc.plugins.bf16_or_death import RECIPES
from paretoc.plugins.format_advisor import advise
from torch import nn

decode = torch.ops.paretoc.decode.default


class Blocks(nn.Module):
    """Two numbered blocks and a head, fed by inputs of which a few channels are large."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def data(count: int = 4, width: int = 128) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return [torch.randn(4, 16, width, generator=generator) ** 3 @ mix for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(2)
    made = Blocks().eval()
    for module in made.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.randn_like(module.weight).abs() ** 0.5  # heavier tails
    return made


@pytest.fixture(scope="module")
def loss(model, reference):
    """Relative output error of a recipe, on data that were not used."""

    def measure(*passes) -> float:
        compiled = reference(model, list(passes), data()[0], calibration=data()[:3])
        return relative_error(compiled.original, compiled.program, [[data()[3]]])

    return measure


def test_what_the_recipes_stand_for():
    blocks = (r"re:\.\d+\.",)
    assert parse_passes("bf16_or_death:W8A8-FP") == [Quantize("FP8", fitter="rtn", targets=blocks)]
    token = Quantize("W8A8-dynamic", granularity="token", fitter="gptq(norm=None)", targets=blocks)
    assert parse_passes("bf16_or_death:W8A8-INT") == [token]
    assert parse_passes("bf16_or_death:W4A16-INT") == [
        Quantize("W4A16", group_size=128, fitter="gptq(norm=2.0)", targets=blocks)
    ]
    fitter = "gptq(importance='attention', r_min=0.01)"
    assert parse_passes("rsq:3") == [Rotate(), Quantize("W4A16", weights=Affine(3), fitter=fitter, targets=blocks)]
    m2 = Sum(Float("e2m1", 256, "shift"), LowRank(8))
    assert parse_passes("zeroquant_fp") == [Quantize("FP8", weights=m2, fitter="gptq")]
    assert parse_passes("zeroquant_fp:M1,rank=0") == [
        Quantize("FP8", weights=Float("e2m1", 256, "e8m0-ceil"), fitter="gptq")
    ]
    assert parse_passes("aqlm:1") == [Quantize("W4A16", weights=Additive(1, 8, 8), fitter="additive")]
    assert parse_passes("double_rounding:2") == [Quantize("W8A16", weights=Nested(8, 2), fitter="rtn")]
    assert parse_passes("format_advisor:6") == [Quantize("W4A16", weights=Float("e3m2", 32), fitter="mse")]


RUN = [
    *(f"bf16_or_death:{name}" for name in RECIPES),
    "zeroquant_fp:M2,group=128",
    "aqlm:codebooks=1,bits=4,dim=4",
    "double_rounding:4",
    "format_advisor:4",
]


@pytest.mark.parametrize("recipe", RUN)
def test_a_recipe_runs_by_name_and_leaves_the_head_alone(model, reference, recipe):
    compiled = reference(model, [recipe], data()[0], calibration=data()[:3])
    encoded = {n.meta["parameter"] for n in compiled.program.calls(decode)}
    inside = {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in (1, 3)}
    assert encoded - {"head.weight"} == inside
    assert ("head.weight" in encoded) is not recipe.startswith("bf16_or_death")


def test_the_three_recipes_keep_their_order(loss):
    """FP8 and INT8 lose less than INT4 with GPTQ and clipping, which loses less than plain rounding to INT4."""
    errors = {name: loss(f"bf16_or_death:{name}") for name in RECIPES}
    plain = loss(Quantize("W4A16", group_size=128, fitter="rtn", targets=(r"re:\.\d+\.",)))
    assert max(errors["W8A8-INT"], errors["W8A8-FP"]) < errors["W4A16-INT"] < plain


def test_constrained_scales_are_nearly_free_and_low_rank_helps(loss):
    free, m1, m2 = (loss(f"zeroquant_fp:{name},group=32,rank=0") for name in ("free", "M1", "M2"))
    assert free <= m2 <= m1 * 1.02 and m2 < 1.35 * free
    assert loss("zeroquant_fp:M2,group=32,rank=16") < m2


def test_fewer_bits_of_one_master_lose_more(loss):
    errors = [loss(f"double_rounding:{bits}") for bits in (8, 6, 4, 2)]
    assert errors == sorted(errors)


def test_fitted_additive_codebooks_beat_their_start(loss):
    start = Quantize("W4A16", weights=Additive(1, 6, 4), fitter="rtn")
    assert loss("aqlm:codebooks=1,bits=6,dim=4") < loss(start)


#: the paper's table of best splits
SPLITS = ["e1m1", "e2m1", "e2m2", "e3m2", "e3m3", "e4m3", "e4m4", "e5m4"]
SPLITS += ["e5m5", "e6m5", "e6m6", "e7m6", "e7m7", "e8m7"]


def test_the_advised_formats_are_those_of_the_paper():
    assert [advise(bits).format for bits in range(3, 17)] == SPLITS
    # the critical data sizes that the paper quotes for 10⁹ parameters in blocks of 128, in tokens
    for bits, tokens in ((16, 1730e12), (8, 27e12), (4, 0.4e12)):
        assert advise(bits, 1e9, block=128).critical_tokens == pytest.approx(tokens, rel=0.02)


def test_more_tokens_than_critical_harm():
    critical = advise(4).critical_tokens
    losses = [advise(4, tokens=factor * critical).loss for factor in (0.5, 1, 2)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


REFUSED = {
    "bf16_or_death:W8A8": "there is no recipe 'W8A8'",
    "zeroquant_fp:M3": "there is no constraint 'M3'",
    "format_advisor:2": "the law says nothing about 2 bits",
    "double_rounding:read=9": "9 bits cannot be read from 8",
}


@pytest.mark.parametrize("recipe", REFUSED)
def test_refusals(refused, recipe):
    refused(OptionError, REFUSED[recipe], lambda: parse_passes(recipe))
