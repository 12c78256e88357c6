"""What a pass is: options from text, their description, the context, and site selection."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from paretoc.compiler.capture import capture
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.passes import Context, Pass, PassResult, Phase, SitePass, build_pass
from paretoc.compiler.registry import registry
from paretoc.compiler.statistics import MinMax


@dataclass(frozen=True)
class Demo(Pass):
    name: ClassVar[str] = "demo"
    positional: ClassVar[str | None] = "count"

    count: int = 3
    share: float = 0.5
    deep: bool = False
    label: str = "a"
    size: int | None = None
    sizes: tuple[int, ...] = ()
    either: int | tuple[int, ...] | None = None
    anything: Any = None


@dataclass(frozen=True)
class Needy(Pass):
    name: ClassVar[str] = "needy"

    rank: int
    tables: tuple[str, ...] = field(default_factory=tuple)


@pytest.mark.parametrize(
    ("option", "given", "expected"),
    [
        ("count", "4", 4),
        ("count", 4, 4),
        ("count", 4.0, 4),
        ("share", "0.25", 0.25),
        ("share", 1, 1.0),
        ("share", "1e-3", 1e-3),
        ("deep", "true", True),
        ("deep", "False", False),
        ("deep", True, True),
        ("label", "4", "4"),
        ("size", None, None),
        ("size", "7", 7),
        ("sizes", [1, "2"], (1, 2)),
        ("sizes", (1, 2), (1, 2)),
        ("sizes", "3", (3,)),
        ("either", 3, 3),
        ("either", [3, 4], (3, 4)),
        ("either", None, None),
        ("anything", {"a": 1}, {"a": 1}),
    ],
)
def test_values_become_what_the_option_is(option, given, expected):
    value = getattr(build_pass(Demo, {option: given}), option)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("option", "given", "wanted"),
    [
        ("count", "many", "int"),
        ("count", 2.5, "int"),
        ("count", True, "int"),
        ("count", None, "int"),
        ("count", [1], "int"),
        ("share", "half", "float"),
        ("deep", "maybe", "bool"),
        ("deep", 1, "bool"),
        ("label", 4, "str"),
        ("size", "x", "int or NoneType"),
        ("sizes", ["x"], "int"),
        ("sizes", {"a": 1}, "tuple"),
        ("either", 2.5, "int or"),
    ],
)
def test_a_value_of_another_type_is_refused(refused, option, given, wanted):
    error = refused(OptionError, f"is not a value for {option!r}", lambda: build_pass(Demo, {option: given}))
    assert error.where == "pass 'demo'"
    assert wanted in error.fix


def test_unknown_and_missing_options_are_named(refused):
    error = refused(OptionError, "pass 'demo' has no option 'cuont'", lambda: build_pass(Demo, {"cuont": 1}))
    assert error.fix == "did you mean 'count'?"
    error = refused(OptionError, "pass 'needy' needs the option 'rank'", lambda: build_pass(Needy, {}))
    assert error.fix == "give it, for example needy:rank=…"
    assert build_pass(Needy, {"rank": "2"}) == Needy(2)


def test_a_pass_describes_itself_in_the_text_form():
    assert Demo().describe() == "demo:3"
    assert Demo(4, deep=True, sizes=(1, 2)).describe() == "demo:4,deep=True,sizes=[1,2]"
    assert Demo(anything=torch.ones(2)).describe() == "demo:3,anything=Tensor"
    assert registry().pass_class("canonicalize")().describe() == "canonicalize"
    assert registry().pass_class("quantize")().describe() == "quantize:W8A8-dynamic"
    assert registry().pass_class("prune_depth")(macs=0.5).describe() == "prune_depth:macs=0.5"


def test_a_default_factory_is_a_default():
    assert Needy(2).describe() == "needy:rank=2"


def test_options_are_all_fields():
    assert list(Demo().options()) == [
        "count",
        "share",
        "deep",
        "label",
        "size",
        "sizes",
        "either",
        "anything",
    ]
    assert Demo(count=9).options()["count"] == 9


def test_passes_are_values():
    assert Demo(4) == Demo(4) != Demo(5)
    with pytest.raises(AttributeError):
        Demo().count = 5  # type: ignore[misc]


def test_the_base_does_nothing_by_itself():
    assert Pass().needs(None) == []
    with pytest.raises(NotImplementedError):
        Pass().apply(None, Context())


def test_phases_are_in_the_documented_order():
    assert [p.name for p in Phase][:3] == ["COMBINE", "CANONICALIZE", "TOKENS"]
    assert Phase.SPARSIFY < Phase.TRANSFORM < Phase.QUANTIZE < Phase.LOWER


def test_results_do_not_share_their_lists():
    PassResult().matched.append("x")
    assert PassResult().matched == []


# -- context ---------------------------------------------------------------------------------------------


def test_map_keeps_the_order_and_reports_progress():
    seen = []

    def track(items, label):
        seen.append(label)
        return items

    assert Context(track=track).map(lambda v: v * 2, [3, 1, 2], "doubling") == [6, 2, 4]
    assert seen == ["doubling"]


def test_map_runs_on_the_executor():
    class Counting(ThreadPoolExecutor):
        calls = 0

        def map(self, *arguments, **options):
            Counting.calls += 1
            return super().map(*arguments, **options)

    with Counting(2) as executor:
        assert Context(executor=executor).map(abs, [-1, 2, -3], "x") == [1, 2, 3]
    assert Counting.calls == 1


def test_a_statistic_that_was_not_asked_for_is_named(refused):
    context = Context(statistics={MinMax("x"): 3})
    assert context.statistic(MinMax("x")) == 3
    error = refused(PassError, "MinMax(node='y') was not gathered", lambda: context.statistic(MinMax("y")))
    assert error.fix == "return it from the pass's needs()"


# -- sites -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Both(SitePass):
    name: ClassVar[str] = "both"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "norm")


def test_a_site_pass_selects(models, refused):
    program = capture(models.Vit(depth=1), torch.randn(2, 16, 12))
    assert [s.path for s in Both(targets="*norm*").sites(program)] == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "norm",
    ]
    assert [s.path for s in Both(targets=["*.mlp.*"], ignore="*.up").sites(program)] == ["blocks.0.mlp.down"]
    assert Both(targets="head").targets == ("head",)
    assert Both(ignore=["a"]) == Both(ignore=("a",))
    error = refused(OptionError, "matches none of the 9 linear/norm sites", lambda: Both(targets="x").sites(program))
    assert error.where == "pass 'both'"
