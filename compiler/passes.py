"""What a pass is: a dataclass whose fields are its options, with a name, a phase and an `apply`."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from .encodings.base import Encoding, default_of
from .errors import OptionError, PassError, did_you_mean
from .program import Program
from .sites import Site
from .statistics import Statistic
from .targets import Selection, select

T = TypeVar("T")
R = TypeVar("R")


class Phase(enum.IntEnum):
    """When a pass runs. Ordering two phases the other way round is an error the scheduler explains.

    Models are combined under their own parameter names, so before canonicalisation folds any of them.
    """

    COMBINE = 0
    CANONICALIZE = 1
    TOKENS = 2
    SHARE = 3
    WIDTH = 4
    FACTOR = 5
    PERMUTE = 6
    SPARSIFY = 7
    TRANSFORM = 8
    QUANTIZE = 9
    LOWER = 10


@dataclass
class PassResult:
    """What a pass did: the sites it changed, those it left with the reason, and what it measured (`sensitivity`:
    a `Sensitivity`)."""

    matched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sensitivity: Any = None


@dataclass
class Context:
    """What a pass may use besides the program: gathered statistics, the seed, the target, workers, progress, the
    calibration batches (flat inputs of the program) themselves, the program before the first QUANTIZE pass, and
    `compile`'s metric."""

    statistics: dict[Statistic, Any] = field(default_factory=dict)
    seed: int = 0
    target: str = "onnxruntime"
    executor: Executor | None = None
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items
    batches: list[list[Tensor]] = field(default_factory=list)
    reference: Program | None = None
    metric: Callable[[Any], float] | None = None

    def map(self, function: Callable[[T], R], items: Sequence[T], label: str) -> list[R]:
        """Apply to every item, on the executor when there is one, with progress; results in order."""
        return list(self.track(self.start(function, items), label))

    def start(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """The same, without waiting: results come in order, when they are asked for."""
        return map(function, items) if self.executor is None else self.executor.map(function, items)

    def statistic(self, statistic: Statistic) -> Any:
        try:
            return self.statistics[statistic]
        except KeyError:
            raise PassError(
                f"{statistic} was not gathered",
                where="Context.statistic",
                fix="return it from the pass's needs()",
            ) from None


@dataclass(frozen=True)
class Pass:
    """Base of every pass. Subclass as a frozen dataclass.

    `after`, `before` and `conflicts` name other passes and refine the order of `phase`. `needs` lists the statistics
    to gather from calibration data before `apply` rewrites the program in place.
    """

    name: ClassVar[str] = ""
    phase: ClassVar[Phase] = Phase.TRANSFORM
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    #: the field that a bare value in the text form ("quantize:W8A8") sets
    positional: ClassVar[str | None] = None
    #: the statistics come from data the user must supply
    needs_calibration: ClassVar[bool] = False

    def needs(self, program: Program) -> list[Statistic]:
        return []

    def apply(self, program: Program, ctx: Context) -> PassResult:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The fields and their values, for the report and the manifest."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def describe(self) -> str:
        """The text form with the options that differ from the defaults."""
        words: list[str] = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name == self.positional and value is not None:
                words.insert(0, _show(value))
            elif value != default_of(item):
                words.append(f"{item.name}={_show(value)}")
        return self.name + (":" + ",".join(words) if words else "")


def _show(value: Any) -> str:
    if isinstance(value, (str, int, float, bool, Encoding)):
        return str(value)
    if value is None:
        return "null"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_show(v) for v in value) + "]"
    return type(value).__name__


@dataclass(frozen=True)
class Composite(Pass):
    """A pass that stands for others: a published recipe under its own name. The others run in its place."""

    def passes(self) -> Sequence[Any]:
        """What it stands for, in any form that `passes=` accepts."""
        raise NotImplementedError


@dataclass(frozen=True)
class SitePass(Pass):
    """A pass over weight sites: `targets`/`ignore` choose them, `kinds` says which kinds it can act on."""

    targets: tuple[str, ...] = field(default=(), kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def __post_init__(self) -> None:
        for option in ("targets", "ignore"):
            value = getattr(self, option)
            object.__setattr__(self, option, (value,) if isinstance(value, str) else tuple(value))

    def select(self, program: Program) -> Selection:
        """The sites this pass acts on, with the match table."""
        return select(program, self.targets, self.ignore, self.default_kinds(), where=f"pass {self.name!r}")

    def default_kinds(self) -> tuple[str, ...]:
        return self.kinds

    def sites(self, program: Program) -> list[Site]:
        return self.select(program).sites

    def chooses(self, program: Program) -> Callable[[Iterable[str]], bool]:
        """Of layers that change together, by their paths: is one of them a target, and none ignored?"""
        chosen, ignored = self._named(program, self.targets), self._named(program, self.ignore)
        return lambda paths: (not self.targets or not chosen.isdisjoint(paths)) and ignored.isdisjoint(paths)

    def _named(self, program: Program, patterns: tuple[str, ...]) -> set[str]:
        sites = (
            select(program, patterns, (), self.default_kinds(), where=f"pass {self.name!r}").sites if patterns else []
        )
        return {site.path for site in sites}


def build_pass(cls: type[Pass], options: dict[str, Any]) -> Pass:
    """A pass from option names and values (possibly text), with every mistake named."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in options.items():
        if name not in fields:
            raise OptionError(
                f"pass {cls.name!r} has no option {name!r}",
                where=f"{cls.name}:{name}={value}",
                fix=did_you_mean(name, fields),
            )
        values[name] = _convert(value, hints[name], cls.name, name)
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionError(
            f"pass {cls.name!r} needs the option {missing[0]!r}",
            where=cls.name,
            fix=f"give it, for example {cls.name}:{missing[0]}=…",
        )
    return cls(**values)


def _convert(value: Any, hint: Any, pass_name: str, option: str) -> Any:
    """Text from a recipe → the option's type; everything else is checked as it is."""
    if hint is Any:
        return value
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, type(int | str)) else (hint,)
    origins = [typing.get_origin(k) or k for k in kinds]
    if value is None and type(None) in kinds:
        return None
    if tuple in origins and isinstance(value, (str, list, tuple)):
        items = (value,) if isinstance(value, str) else tuple(value)
        inner = next((typing.get_args(k) for k in kinds if typing.get_origin(k) is tuple), ())
        element = inner[0] if inner else str
        return tuple(_convert(i, element, pass_name, option) for i in items)
    for kind in (bool, int, float):
        if kind not in origins:
            continue
        converted = _number(value, kind)
        if converted is not None:
            return converted
    if str in origins and isinstance(value, str):
        return value
    simple = all(o in (bool, int, float, str, tuple, type(None)) for o in origins)
    if simple or isinstance(value, str):
        wanted = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise OptionError(
            f"{value!r} is not a value for {option!r}",
            where=f"pass {pass_name!r}",
            fix=f"give {wanted}",
        )
    return value


def _number(value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    try:
        number = kind(value)
    except (TypeError, ValueError):
        return None
    return number if not isinstance(value, float) or number == value else None
