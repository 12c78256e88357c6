"""The hooks a plugin may implement, in the entry-point group `paretoc`. Built-ins use the same ones.

A plugin module decorates functions of these names with `paretoc.hook`. All are optional.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .backend import Backend
    from .encodings import Encoding
    from .importance import Criterion
    from .passes import Pass, PassResult
    from .program import Program
    from .protocols import Fitter, TokenRule

spec = pluggy.HookspecMarker("paretoc")
hook = pluggy.HookimplMarker("paretoc")


@spec
def paretoc_passes() -> list[type[Pass]]:  # type: ignore[empty-body]  # a specification has no body
    """Pass classes; each is found by its `name`."""


@spec
def paretoc_encodings() -> list[type[Encoding]]:  # type: ignore[empty-body]
    """Encoding classes; each is found by its class name."""


@spec
def paretoc_fitters() -> list[Fitter]:  # type: ignore[empty-body]
    """Fitters: how stored values are chosen; each is found by its `name`."""


@spec
def paretoc_criteria() -> list[Criterion]:  # type: ignore[empty-body]
    """Criteria: what each channel of an axis is worth; each is found by its `name`."""


@spec
def paretoc_token_rules() -> list[TokenRule]:  # type: ignore[empty-body]
    """Token-reduction rules; each is found by its `name`."""


@spec
def paretoc_backends() -> list[Backend]:  # type: ignore[empty-body]
    """Backends; each is found by its `name`, which is a `target=`."""


@spec
def before_pass(transform: Pass, program: Program) -> None:
    """Called before every pass, with the program it is about to rewrite."""


@spec
def after_pass(transform: Pass, program: Program, result: PassResult) -> None:
    """Called after every pass, with the rewritten program and what the pass reports."""
