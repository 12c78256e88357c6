"""The plugin manager: pluggy, entry-point group `paretoc`. A broken plugin is named and skipped, never fatal."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, TypeVar

import pluggy

from . import hookspecs
from .encodings import Encoding, register_encoding
from .errors import OptionError, PluginError, did_you_mean
from .importance import Criterion
from .passes import Pass
from .protocols import Fitter, TokenRule

T = TypeVar("T")
GROUP = "paretoc"


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin: its entry-point name, distribution, and what is wrong with it, if anything."""

    name: str
    distribution: str
    problem: str = ""


class Registry:
    """Everything the plugins offer, by name."""

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint]) -> None:
        self.manager = pluggy.PluginManager("paretoc")
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[PluginInfo] = []
        # an editable install beside a build folder may list an entry point twice; Python imports the first it finds
        for _, same in groupby(sorted(entry_points, key=_built_in_first), key=_built_in_first):
            self._load(next(same))
        self.passes = self._collect("paretoc_passes", lambda cls: cls.name)
        self.encodings = self._collect("paretoc_encodings", lambda cls: cls.__name__)
        self.fitters = self._collect("paretoc_fitters", lambda fitter: fitter.name)
        self.criteria = self._collect("paretoc_criteria", lambda criterion: criterion.name)
        self.token_rules = self._collect("paretoc_token_rules", lambda rule: rule.name)
        self.backends = self._collect("paretoc_backends", lambda backend: backend.name)
        for cls in self.encodings.values():
            register_encoding(cls)

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        distribution = entry_point.dist.name if entry_point.dist else ""
        if not _allowed(entry_point.name, distribution):
            self.plugins.append(PluginInfo(entry_point.name, distribution, "disabled by PARETOC_PLUGINS"))
            return
        try:
            module = entry_point.load()
            self.manager.register(module, name=f"{distribution}:{entry_point.name}")
            self.manager.check_pending()
        except Exception as error:
            self._skip(entry_point.name, distribution, error)
            return
        self.plugins.append(PluginInfo(entry_point.name, distribution))

    def _skip(self, name: str, distribution: str, error: Exception) -> None:
        """Forget a broken plugin, and say so."""
        if self.manager.has_plugin(f"{distribution}:{name}"):
            self.manager.unregister(name=f"{distribution}:{name}")
        lines = str(error).splitlines() or [""]
        # pluggy names the plugin first and what is wrong with it last
        reason = "; ".join(lines) if isinstance(error, pluggy.PluginValidationError) else lines[0]
        problem = f"{type(error).__name__}: {reason}"
        self.plugins = [p for p in self.plugins if (p.name, p.distribution) != (name, distribution)]
        self.plugins.append(PluginInfo(name, distribution, problem))
        warnings.warn(f"the paretoc plugin {name!r} of {distribution!r} is skipped: {problem}", stacklevel=2)

    def _collect(self, hook_name: str, key: Callable[[Any], str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        owner: dict[str, str] = {}
        for implementation in getattr(self.manager.hook, hook_name).get_hookimpls():
            plugin = str(implementation.plugin_name)
            try:
                offered = [(key(item), item) for item in implementation.function()]
            except Exception as error:
                distribution, _, name = plugin.partition(":")
                self._skip(name, distribution, error)
                continue
            for name, item in offered:
                if name in found and found[name] is not item:
                    raise PluginError(
                        f"two plugins offer {name!r} through {hook_name}",
                        where=f"{owner[name]} and {plugin}",
                        fix="uninstall one, or disable it: PARETOC_PLUGINS=-" + plugin.split(":")[0],
                    )
                found[name], owner[name] = item, plugin
        return found

    def find(self, kind: str, table: dict[str, T], name: str, where: str) -> T:
        if name not in table:
            raise OptionError(f"there is no {kind} called {name!r}", where=where, fix=did_you_mean(name, table))
        return table[name]

    def pass_class(self, name: str) -> type[Pass]:
        return self.find("pass", self.passes, name, "passes=")  # type: ignore[no-any-return]

    def fitter(self, text: str) -> Fitter:
        """A fitter by name, or by name and options: "gptq(act_order=True)"."""
        return self._with_options("fitter", self.fitters, text)  # type: ignore[no-any-return]

    def criterion(self, text: str) -> Criterion:
        """A criterion by name, or by name and options: "random(seed=1)"."""
        return self._with_options("criterion", self.criteria, text)  # type: ignore[no-any-return]

    def _with_options(self, kind: str, table: dict[str, Any], text: str) -> Any:
        name, bracket, _ = text.partition("(")
        item = self.find(kind, table, name.strip(), f"{kind}=")
        return _with_options(kind, item, text) if bracket else item

    def token_rule(self, name: str) -> TokenRule:
        return self.find("token rule", self.token_rules, name, "rule=")  # type: ignore[no-any-return]

    def backend(self, name: str) -> Any:
        return self.find("target", self.backends, name, "target=")

    def encoding(self, name: str) -> type[Encoding]:
        return self.find("encoding", self.encodings, name, "encoding")  # type: ignore[no-any-return]


def _with_options(kind: str, item: Any, text: str) -> Any:
    """Only literals: nothing is executed."""
    names = [f.name for f in dataclasses.fields(item)]
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise OptionError(
            f"{text!r} is not a {kind}", where=f"{kind}=", fix=f"write it like {item.name}(option=value)"
        ) from error
    unknown = next((name for name in options if name not in names), None)
    if unknown is not None:
        raise OptionError(
            f"the {kind} {item.name!r} has no option {unknown!r}",
            where=f"{kind}=",
            fix=did_you_mean(unknown, names) if names else "it has none",
        )
    return dataclasses.replace(item, **options)


def _built_in_first(entry_point: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
    distribution = entry_point.dist.name if entry_point.dist else ""
    return distribution != "paretoc", distribution, entry_point.name


def _allowed(name: str, distribution: str) -> bool:
    """PARETOC_PLUGINS: a comma list; plain names allow only these (and the built-ins), "-name" disables."""
    if distribution == "paretoc":
        return True
    words = [w.strip() for w in os.environ.get("PARETOC_PLUGINS", "").split(",") if w.strip()]
    if any(w in (f"-{name}", f"-{distribution}") for w in words):
        return False
    allowed = [w for w in words if not w.startswith("-")]
    return not allowed or name in allowed or distribution in allowed


@cache
def registry() -> Registry:
    """The registry of this process, built on first use."""
    try:
        return Registry(importlib.metadata.entry_points(group=GROUP))
    except OptionError as error:
        raise PluginError(error.what, where=error.where, fix=error.fix) from error


__all__ = ["GROUP", "PluginInfo", "Registry", "registry"]
