"""The two small protocols a plugin can implement besides passes and encodings: fitters and token rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, fx

from .encodings import Arrays, Encoding
from .program import Program
from .sites import Block


@runtime_checkable
class Fitter(Protocol):
    """How the stored values of an encoding are chosen for one weight."""

    @property
    def name(self) -> str:
        """How `fitter=` names it."""

    def refuse(self, encoding: Encoding) -> str | None:
        """Why this fitter cannot fit that encoding, or None when it can."""

    def fit(self, encoding: Encoding, weight: Tensor) -> Arrays:
        """The stored arrays for this weight; they decode to something close to it."""


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
