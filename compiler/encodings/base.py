"""The encoding protocol and the text form `Name(option=value, nested=Other(...))`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError, did_you_mean

Arrays = dict[str, Tensor]
Shape = tuple[int, ...]
Fit = Callable[["Encoding", Tensor], Arrays]


class Encoding:
    """How a tensor is stored. Subclass as a frozen dataclass; the fields are the options.

    `encode` chooses the stored arrays by rounding to nearest; a fitter may choose them otherwise, so long as they
    have the layout of `layout`. `decode` is written in torch operators and is the definition of the encoding:
    backends that know nothing better trace it.
    """

    #: one line for `explain()`: what a reader should call this scheme
    summary: ClassVar[str] = ""

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name → (shape, dtype) of every stored array for a tensor of this shape. Raises OptionError if unfit."""
        raise NotImplementedError

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        """Dense tensor → stored arrays. `fit` chooses the values of the innermost encoding; default: rounding."""
        raise NotImplementedError

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        """Stored arrays → dense tensor of `shape`, in the floating type of the stored scales."""
        raise NotImplementedError

    def check(self, weight: Tensor) -> None:
        """Raise OptionError when this tensor cannot be stored like this."""
        self.layout(tuple(weight.shape))

    def nbytes(self, shape: Shape) -> int:
        """Exact bytes of the stored arrays."""
        total = 0
        for array_shape, dtype in self.layout(shape).values():
            count = 1
            for size in array_shape:
                count *= size
            total += count * dtype.itemsize
        return total

    def __str__(self) -> str:
        """`Name(option=value, …)` without the last options that have their defaults, but with the first two."""
        items = [f for f in dataclasses.fields(self) if f.repr]  # type: ignore[arg-type]  # encodings are dataclasses
        while len(items) > 2 and getattr(self, items[-1].name) == default_of(items[-1]):
            items.pop()
        return f"{type(self).__name__}({', '.join(f'{i.name}={_text(getattr(self, i.name))}' for i in items)})"


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field; MISSING when it has none."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _text(value: Any) -> str:
    return str(value) if isinstance(value, Encoding) else repr(value)


_ENCODINGS: dict[str, type[Encoding]] = {}


def register_encoding(cls: type[Encoding]) -> None:
    """Make an encoding known by its class name. The plugin manager calls this for every registered encoding."""
    known = _ENCODINGS.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OptionError(
            f"two encodings are called {cls.__name__!r}: {known.__module__} and {cls.__module__}",
            where="registering encodings",
            fix="rename one of them, or disable one plugin with PARETOC_PLUGINS",
        )
    _ENCODINGS[cls.__name__] = cls


def registered_encodings() -> dict[str, type[Encoding]]:
    return dict(_ENCODINGS)


def parse_encoding(text: str) -> Encoding:
    """`str(encoding)` → the encoding. Only registered names and literals: nothing is executed."""
    fix = "write it like Affine(bits=4, group=32)"
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise OptionError(f"{text!r} is not an encoding", where="parsing an encoding", fix=fix) from error
    encoding = _build(tree, text)
    if not isinstance(encoding, Encoding):
        raise OptionError(f"{text!r} is not an encoding", where="parsing an encoding", fix=fix)
    return encoding


def _load_plugins() -> None:
    from ..registry import registry  # which imports this module

    registry()


def _build(tree: ast.expr, text: str) -> Any:
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        if tree.func.id not in _ENCODINGS:
            _load_plugins()
        cls = _ENCODINGS.get(tree.func.id)
        if cls is None:
            raise OptionError(
                f"no encoding is called {tree.func.id!r}",
                where=f"parsing {text!r}",
                fix=did_you_mean(tree.func.id, _ENCODINGS) + " A plugin that defines it must be installed.",
            )
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # encodings are dataclasses
        if len(tree.args) > len(names):
            raise OptionError(
                f"{tree.func.id} has {len(names)} options, got {len(tree.args)}",
                where=f"parsing {text!r}",
                fix="its options are " + ", ".join(names),
            )
        values = dict(zip(names, (_build(a, text) for a in tree.args), strict=False))
        values |= {k.arg: _build(k.value, text) for k in tree.keywords if k.arg}
        unknown = set(values) - set(names)
        if unknown:
            raise OptionError(
                f"{tree.func.id} has no option {sorted(unknown)[0]!r}",
                where=f"parsing {text!r}",
                fix=did_you_mean(sorted(unknown)[0], names),
            )
        return cls(**values)
    try:
        return ast.literal_eval(tree)
    except ValueError as error:
        raise OptionError(
            f"{ast.unparse(tree)!r} is not a literal or a registered encoding",
            where=f"parsing {text!r}",
            fix="use numbers, strings, True/False/None and registered encodings only",
        ) from error


def innermost(encoding: Encoding) -> Encoding:
    """The encoding that holds the numbers, inside the patterns around it (`NM(2, 4, values=…)`)."""
    inner = getattr(encoding, "values", None)
    return innermost(inner) if isinstance(inner, Encoding) else encoding
