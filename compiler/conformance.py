"""What the rules of the conformance kit share: how one is run, how it says that it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import ConformanceError, ParetocError

T = TypeVar("T")


def run(rules: Iterable[Callable[[T], None]], subject: T, where: str) -> None:
    """Run the rules in order. Whatever else goes wrong in one means that it is broken too."""
    for rule in rules:
        place = f"{where}, rule {rule.__name__}"
        try:
            rule(subject)
        except ConformanceError as error:
            raise error.at(place) from error.__cause__
        except ParetocError as error:
            raise ConformanceError(error.what, where=f"{place}; {error.where}", fix=error.fix) from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            text = " ".join((rule.__doc__ or "").split())
            raise ConformanceError(what, where=place, fix=f"the rule is: {text}") from error


def require(condition: object, what: str, fix: str) -> None:
    """The place is added by `run`."""
    if not condition:
        raise ConformanceError(what, fix=fix)


def require_frozen(value: Any) -> None:
    """A frozen dataclass of its own, with a hash."""
    name, parameters = type(value).__name__, vars(type(value)).get("__dataclass_params__")
    require(
        parameters is not None and parameters.frozen,
        f"{name} is not a frozen dataclass",
        f"write @dataclass(frozen=True) above class {name}",
    )
    try:
        hash(value)
    except TypeError as error:
        raise ConformanceError(f"it cannot be hashed: {error}", fix="use tuples where it has lists") from error


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """The same dtypes, shapes and bits."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))
