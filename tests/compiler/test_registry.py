"""The plugin manager: what plugins offer is found by name, and a broken one is named and skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import paretoc as pc
import pytest
import torch
from paretoc.compiler.encodings import base
from paretoc.compiler.registry import PluginInfo, Registry, registry


@dataclass(frozen=True)
class EntryPoint:
    """As much of `importlib.metadata.EntryPoint` as the registry reads."""

    name: str
    distribution: str | None
    load: Callable[[], Any]

    @property
    def dist(self) -> Any:
        return None if self.distribution is None else SimpleNamespace(name=self.distribution)


def plugin(name: str, distribution: str | None = "someone-elses", **functions: Callable[..., Any]) -> EntryPoint:
    """An entry point whose module has these functions as hooks."""
    module = ModuleType(name)
    for function_name, function in functions.items():
        setattr(module, function_name, pc.hook(function))
    return EntryPoint(name, distribution, lambda: module)


def pass_called(pass_name: str) -> type[pc.Pass]:
    @dataclass(frozen=True)
    class Nothing(pc.Pass):
        name: ClassVar[str] = pass_name

    return Nothing


def offering(name: str, pass_name: str, distribution: str = "someone-elses") -> EntryPoint:
    cls = pass_called(pass_name)
    return plugin(name, distribution, paretoc_passes=lambda: [cls])


def skipped(sentence: str, *entry_points: EntryPoint) -> Registry:
    """The registry of these, built under exactly one warning, which holds the sentence."""
    with pytest.warns(UserWarning) as caught:
        built = Registry(entry_points)
    assert len(caught) == 1
    assert sentence in str(caught[0].message)
    return built


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("PARETOC_PLUGINS", raising=False)


@pytest.fixture(autouse=True)
def _encodings_are_put_back(monkeypatch):
    monkeypatch.setattr(base, "_ENCODINGS", dict(base._ENCODINGS))


# -- what is installed here ---------------------------------------------------------------------------------


def test_the_built_ins_come_through_the_same_hooks():
    names = {info.name for info in registry().plugins if info.distribution == "paretoc"}
    assert {"passes", "backends", "encodings", "plugins"} <= names
    assert {"quantize", "prune_nm", "merge_tokens", "powerquant"} <= set(registry().passes)
    assert {"Affine", "Dense", "NM", "Power"} <= set(registry().encodings)
    assert {"eager", "onnx", "onnxruntime"} <= set(registry().backends)
    assert {"rtn", "mse"} <= set(registry().fitters)
    assert {"merge", "keep"} <= set(registry().token_rules)


def test_none_of_the_built_ins_has_a_problem():
    assert [info for info in registry().plugins if info.distribution == "paretoc" and info.problem] == []


@pytest.mark.parametrize(
    ("find", "name", "sentence", "fix"),
    [
        ("pass_class", "quantise", "there is no pass called 'quantise'", "did you mean 'quantize'"),
        ("fitter", "msee", "there is no fitter called 'msee'", "did you mean 'mse'?"),
        ("token_rule", "merg", "there is no token rule called 'merg'", "did you mean 'merge'?"),
        ("backend", "onnxruntme", "there is no target called 'onnxruntme'", "did you mean 'onnxruntime'"),
        ("encoding", "Afine", "there is no encoding called 'Afine'", "did you mean 'Affine'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(refused, find, name, sentence, fix):
    error = refused(pc.OptionError, sentence, lambda: getattr(registry(), find)(name))
    assert fix in error.fix


# -- third parties ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sixteenth(pc.Encoding):
    """Stands for an encoding of a plugin."""


@dataclass(frozen=True)
class Fitter:
    name: str = "guess"

    def refuse(self, encoding: pc.Encoding) -> str | None:
        return None

    def fit(self, encoding: pc.Encoding, weight: torch.Tensor) -> Any:
        return encoding.encode(weight)


def test_everything_a_plugin_offers_is_found_by_name():
    rule, backend, cls = pc.TokenRule(), SimpleNamespace(name="abacus"), pass_called("polish")
    built = Registry(
        [
            plugin(
                "tools",
                paretoc_passes=lambda: [cls],
                paretoc_encodings=lambda: [Sixteenth],
                paretoc_fitters=lambda: [Fitter()],
                paretoc_token_rules=lambda: [rule],
                paretoc_backends=lambda: [backend],
            )
        ]
    )
    assert built.plugins == [PluginInfo("tools", "someone-elses")]
    assert built.pass_class("polish") is cls
    assert built.encoding("Sixteenth") is Sixteenth
    assert built.fitter("guess") == Fitter()
    assert built.token_rule("") is rule
    assert built.backend("abacus") is backend
    assert pc.parse_encoding("Sixteenth()") == Sixteenth()


def test_a_plugin_without_a_distribution_is_taken():
    cls = pass_called("polish")
    built = Registry([plugin("tools", None, paretoc_passes=lambda: [cls])])
    assert built.pass_class("polish") is cls
    assert built.plugins == [PluginInfo("tools", "")]


def _import_error() -> Any:
    raise ImportError("No module named 'flux'\nsecond line")


def test_a_plugin_that_raises_on_import_is_named_and_skipped():
    broken = EntryPoint("flux", "flux-capacitor", _import_error)
    sentence = "the paretoc plugin 'flux' of 'flux-capacitor' is skipped: ImportError: No module named 'flux'"
    built = skipped(sentence, broken, offering("tools", "polish"))
    assert "polish" in built.passes
    problems = {info.name: info.problem for info in built.plugins}
    assert problems == {"flux": "ImportError: No module named 'flux'", "tools": ""}


def test_a_misspelt_hook_is_detected():
    cls = pass_called("polish")
    misspelt = plugin("tools", paretoc_pases=lambda: [cls])
    built = skipped("unknown hook 'paretoc_pases'", misspelt, offering("others", "grind"))
    assert list(built.passes) == ["grind"]
    assert [info.name for info in built.plugins if info.problem] == ["tools"]


def test_a_hook_with_an_unknown_argument_is_named_with_the_argument():
    nosy = plugin("nosy", before_pass=lambda transform, secret: None)
    built = skipped("Argument(s) {'secret'} are declared in the hookimpl but can not be found in the hookspec", nosy)
    assert not built.manager.has_plugin("someone-elses:nosy")
    (info,) = built.plugins
    assert info.problem.startswith("PluginValidationError: Plugin 'someone-elses:nosy' for hook 'before_pass'")
    assert "\n" not in info.problem


def _crash() -> Any:
    raise RuntimeError("out of flux")


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        (_crash, "RuntimeError: out of flux"),
        (lambda: None, "TypeError"),
        (lambda: ["polish"], "AttributeError"),
    ],
    ids=["raises", "returns None", "returns no passes"],
)
def test_a_plugin_whose_hook_fails_is_named_and_skipped(hook, sentence):
    built = skipped(sentence, plugin("flux", paretoc_passes=hook), offering("tools", "polish"))
    assert list(built.passes) == ["polish"]
    assert [info.name for info in built.plugins if info.problem] == ["flux"]


def test_two_plugins_with_one_name_are_both_named(refused):
    pair = [offering("brush", "polish", "left"), offering("sponge", "polish", "right")]
    error = refused(pc.PluginError, "two plugins offer 'polish' through paretoc_passes", lambda: Registry(pair))
    assert "left:brush" in error.where and "right:sponge" in error.where
    assert "PARETOC_PLUGINS=-" in error.fix


def test_a_plugin_cannot_take_the_name_of_a_built_in(refused):
    pair = [offering("passes", "quantize", "paretoc"), offering("mine", "quantize")]
    error = refused(pc.PluginError, "two plugins offer 'quantize'", lambda: Registry(pair))
    assert error.where == "paretoc:passes and someone-elses:mine"
    assert error.fix.endswith("PARETOC_PLUGINS=-someone-elses")


def test_the_advice_of_a_name_clash_works(monkeypatch, refused):
    pair = [offering("brush", "polish", "left"), offering("sponge", "polish", "right")]
    error = refused(pc.PluginError, "two plugins offer", lambda: Registry(pair))
    monkeypatch.setenv("PARETOC_PLUGINS", error.fix.partition("PARETOC_PLUGINS=")[2].split()[0])
    assert "polish" in Registry(pair).passes


def test_the_same_object_offered_twice_is_no_clash():
    cls = pass_called("polish")
    pair = [plugin(name, name, paretoc_passes=lambda: [cls]) for name in ("left", "right")]
    assert Registry(pair).pass_class("polish") is cls


def test_a_plugin_that_is_found_twice_is_loaded_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = Registry([offering("tools", "polish"), offering("others", "grind"), offering("tools", "polish")])
    assert set(built.passes) == {"polish", "grind"}
    assert built.plugins == [PluginInfo("others", "someone-elses"), PluginInfo("tools", "someone-elses")]


def test_a_broken_plugin_that_is_found_twice_is_named_once():
    built = skipped("is skipped: ImportError", *[EntryPoint("flux", "flux-capacitor", _import_error)] * 2)
    assert len(built.plugins) == 1


# -- PARETOC_PLUGINS ----------------------------------------------------------------------------------------

THREE = [
    offering("passes", "core", "paretoc"),
    offering("brush", "polish", "left"),
    offering("sponge", "wash", "right"),
]


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        ("", {"core", "polish", "wash"}),
        ("brush", {"core", "polish"}),
        ("left", {"core", "polish"}),
        (" brush , right ", {"core", "polish", "wash"}),
        ("-brush", {"core", "wash"}),
        ("-left", {"core", "wash"}),
        ("-left,-sponge", {"core"}),
        ("brush,-left", {"core"}),
        ("nothing", {"core"}),
        ("-paretoc,-passes", {"core", "polish", "wash"}),
    ],
)
def test_plugins_are_allowed_and_disabled_by_name(monkeypatch, value, passes):
    monkeypatch.setenv("PARETOC_PLUGINS", value)
    built = Registry(THREE)
    assert set(built.passes) == passes
    disabled = {info.name for info in built.plugins if info.problem == "disabled by PARETOC_PLUGINS"}
    assert len(disabled) == 3 - len(passes)


def test_a_disabled_plugin_is_not_imported(monkeypatch):
    monkeypatch.setenv("PARETOC_PLUGINS", "-flux")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Registry([EntryPoint("flux", "flux-capacitor", _import_error)])


# -- observers ----------------------------------------------------------------------------------------------


class Observer:
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    @pc.hook
    def before_pass(self, transform: pc.Pass, program: pc.Program) -> None:
        self.seen.append(("before", transform.describe(), len(program.weights())))

    @pc.hook
    def after_pass(self, transform: pc.Pass, program: pc.Program, result: pc.PassResult) -> None:
        self.seen.append(("after", transform.name, len(result.matched)))


@pytest.fixture
def observer():
    watching = Observer()
    registry().manager.register(watching)
    yield watching
    registry().manager.unregister(watching)


def test_observers_see_every_pass_before_and_after(observer, reference, models):
    reference(models.Mlp(), ["prune_nm:2:4", "quantize:W8A16"], torch.randn(2, 16))
    assert observer.seen == [
        ("before", "canonicalize", 4),
        ("after", "canonicalize", 0),
        ("before", "prune_nm:2:4", 4),
        ("after", "prune_nm", 2),
        ("before", "quantize:W8A16", 6),
        ("after", "quantize", 2),
    ]


def test_a_pass_that_fails_is_seen_before_and_not_after(observer, reference, models, refused):
    x = torch.randn(2, 16)
    refused(pc.PassError, "no weight can be encoded", lambda: reference(models.Mlp(), ["prune_nm:5:7"], x))
    assert [(when, what) for when, what, _ in observer.seen] == [
        ("before", "canonicalize"),
        ("after", "canonicalize"),
        ("before", "prune_nm:5:7"),
    ]
