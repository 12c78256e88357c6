"""Passes as the user writes them: objects, text "name:positional,key=value,…", dicts, or a YAML recipe."""

from __future__ import annotations

import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import OptionError
from .passes import Composite, Pass, build_pass
from .registry import registry

PassLike = Pass | str | Mapping[str, Any]


def parse_passes(passes: PassLike | Sequence[PassLike] | os.PathLike[str]) -> list[Pass]:
    """Everything `passes=` accepts → pass objects, in the order written."""
    items = passes if isinstance(passes, Sequence) and not isinstance(passes, str) else [passes]
    return [built for item in items for parsed in _parse(item, ()) for built in _spelled_out(parsed)]


def _spelled_out(built: Pass) -> list[Pass]:
    return parse_passes(built.passes()) if isinstance(built, Composite) else [built]


def _parse(item: Any, including: tuple[Path, ...]) -> list[Pass]:
    if isinstance(item, Pass):
        return [item]
    if isinstance(item, os.PathLike) or (isinstance(item, str) and item.endswith((".yaml", ".yml"))):
        return _recipe(Path(item).resolve(), including)
    if isinstance(item, str):
        return [_text(item)]
    if isinstance(item, Mapping):
        return [_named(name, options) for name, options in item.items()]
    if isinstance(item, type) and issubclass(item, Pass):
        return [build_pass(item, {})]
    raise OptionError(
        f"{item!r} is not a pass",
        where="passes=",
        fix='pass an object, text like "quantize:W8A8", a dict like {"quantize": {"scheme": "W8A8"}} or a YAML file',
    )


def _recipe(path: Path, including: tuple[Path, ...]) -> list[Pass]:
    if path in including:
        raise OptionError(f"the recipe {str(path)!r} includes itself", where="passes=", fix="take that line out")
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(
            f"the recipe {str(path)!r} cannot be read: {str(error).splitlines()[0]}",
            where="passes=",
            fix="give the path of a YAML file that holds a list of passes",
        ) from error
    if not isinstance(content, list):
        raise OptionError(
            f"the recipe {str(path)!r} is not a list", where="passes=", fix="write one '- name: {option: value}' a pass"
        )
    return [built for item in content for built in _parse(item, (*including, path))]


def _named(name: str, options: Any) -> Pass:
    cls = registry().pass_class(name)
    if options is None:
        return build_pass(cls, {})
    if isinstance(options, Mapping):
        return build_pass(cls, dict(options))
    return build_pass(cls, {_positional(cls, options): options})


def _positional(cls: type[Pass], value: Any) -> str:
    if cls.positional is None:
        raise OptionError(
            f"pass {cls.name!r} takes no bare value, got {value!r}", where=cls.name, fix="write option=value"
        )
    return cls.positional


def _text(text: str) -> Pass:
    name, _, rest = text.partition(":")
    cls = registry().pass_class(name.strip())
    hints = typing.get_type_hints(cls)
    options: dict[str, Any] = {}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = _positional(cls, part), part
        key = key.strip()
        if key in options:
            raise OptionError(f"the option {key!r} is given twice", where=text, fix="give it once")
        options[key] = _scalar(value.strip(), verbatim=_is_text(hints.get(key)))
    return build_pass(cls, options)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [p.strip() for p in (*parts, current) if p.strip()]


def _is_text(hint: Any) -> bool:
    """Whether an option of this type holds text only: `str`, `tuple[str, ...]`, and either with None."""
    inner = [kind for kind in typing.get_args(hint) if kind not in (type(None), ...)]
    return hint is str or (bool(inner) and all(map(_is_text, inner)))


def _scalar(value: str, *, verbatim: bool) -> Any:
    """Numbers, booleans, null and [lists] as YAML reads them; everything else (globs, patterns) is text.

    With `verbatim` only null and [lists] are: modules may be called "2" or "on".
    """
    if value.startswith("["):
        return [_scalar(v, verbatim=verbatim) for v in _split(value[1:-1])]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    kinds = (type(None),) if verbatim else (int, float, bool, type(None))
    return parsed if isinstance(parsed, kinds) and ":" not in value else value
