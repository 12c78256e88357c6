"""The small protocols a plugin can implement besides passes and encodings: fitters and token rules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, fx

from .encodings import Arrays, Encoding, Sum
from .errors import PassError
from .program import Program
from .sites import Block, Site
from .statistics import Statistic

#: what calibration found for one weight: the class of a statistic → its value
Evidence = Mapping[type[Statistic], Any]
NO_EVIDENCE: Evidence = MappingProxyType({})
_COLLECTED: ContextVar[list[str] | None] = ContextVar("collected", default=None)


def found(evidence: Evidence, kind: type[Statistic]) -> Any:
    """The value of the statistic of this kind, or of one derived from it. Raises PassError when there is none."""
    for cls, value in evidence.items():
        if issubclass(cls, kind):
            return value
    raise PassError(
        f"the fitter was given no {kind.__name__}",
        where="Fitter.fit",
        fix="return it from the fitter's needs(), and pass calibration= to compile",
    )


def warn(text: str) -> None:
    """Called by a fitter: say, among the warnings of the pass, what went less than well with a weight."""
    collected = _COLLECTED.get()
    if collected is None:
        warnings.warn(text, stacklevel=2)
    else:
        collected.append(text)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What fitters `warn` of in here, in this thread."""
    texts: list[str] = []
    token = _COLLECTED.set(texts)
    try:
        yield texts
    finally:
        _COLLECTED.reset(token)


@runtime_checkable
class Fitter(Protocol):
    """How the stored values of an encoding are chosen for one weight. A frozen dataclass; its fields are options."""

    @property
    def name(self) -> str:
        """How `fitter=` names it."""

    @property
    def data_free(self) -> bool:
        """Whether it looks at nothing but the weight."""

    def refuse(self, encoding: Encoding) -> str | None:
        """Why this fitter cannot fit that encoding, or None when it can."""

    def needs(self, site: Site) -> list[Statistic]:
        """The statistics of calibration data it wants for this site; none when it needs no data."""

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        """The stored arrays for this weight; they decode to something close to it."""


@runtime_checkable
class Adaptive(Protocol):
    """A fitter that also chooses options of the encoding by the data, such as an exponent."""

    def adapt(self, encoding: Encoding, weight: Tensor, evidence: Evidence) -> tuple[Encoding, Arrays]:
        """What the weight is stored as, and the stored arrays. Only for an encoding that is not refused."""


def refusal(fitter: Fitter, encoding: Encoding) -> str | None:
    """Why `fit` would fail, or None. Of a sum that a fitter cannot fit whole, it fits the first."""
    reason = fitter.refuse(encoding)
    return None if reason and isinstance(encoding, Sum) and not refusal(fitter, encoding.first) else reason


def fit(fitter: Fitter, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
    """The stored arrays for this weight, chosen by the fitter; the second of a sum stores what the first leaves."""
    if isinstance(encoding, Sum) and fitter.refuse(encoding):
        return encoding.complete(weight, fit(fitter, encoding.first, weight, evidence))
    return fitter.fit(encoding, weight, evidence)


class DataFree:
    """Base of fitters that look at nothing but the weight: `fit_values` sees the innermost encoding."""

    data_free: ClassVar[bool] = True

    def refuse(self, encoding: Encoding) -> str | None:
        return None

    def needs(self, site: Site) -> list[Statistic]:
        return []

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        return encoding.encode(weight, self.fit_values)

    def fit_values(self, encoding: Encoding, weight: Tensor) -> Arrays:
        raise NotImplementedError


@dataclass(frozen=True)
class TokenState:
    """The residual stream at the place of a reduction.

    `x` `[B, T, C]`; `size` `[B, T, 1]` how many original tokens each stands for (None: one each); `block` the
    attention just done; `tokens` T; `protected` how many leading tokens must stay.
    """

    x: fx.Node
    size: fx.Node | None
    block: Block
    tokens: int
    protected: int


@dataclass(frozen=True)
class Reduced:
    """What a rule made of a `TokenState`: the new stream, its sizes (None: one each) and its token count."""

    x: fx.Node
    size: fx.Node | None
    tokens: int


class TokenRule:
    """Which tokens go and what becomes of them. `emit` inserts nodes after `state.x`; the surgery is done for it."""

    name: ClassVar[str] = ""
    #: later attentions add log(size) to the logits of their keys
    tracks_size: ClassVar[bool] = False

    def limit(self, tokens: int, protected: int) -> int:
        """The most tokens this rule can remove at once where `tokens` arrive."""
        raise NotImplementedError

    def emit(self, program: Program, state: TokenState, remove: int) -> Reduced:
        raise NotImplementedError
