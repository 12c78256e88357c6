"""Errors in three lines: what happened, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParetocError(Exception):
    """Base of every error paretoc raises on purpose.

    `what` is a sentence with the offending value, `where` names the pass, the site or the user's own source
    line, and `fix` says what to do.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))

    def at(self, where: str) -> ParetocError:
        """The same error with a place, for code that learns the place only further up."""
        return type(self)(self.what, where=self.where or where, fix=self.fix)


class OptionError(ParetocError):
    """A name, option or pattern the user wrote is not valid."""


class CaptureError(ParetocError):
    """`torch.export` could not capture the model."""


class CalibrationError(ParetocError):
    """The calibration data is missing, empty or does not fit the model."""


class PassError(ParetocError):
    """A pass cannot be applied to this model."""


class ScheduleError(ParetocError):
    """The order of the passes breaks a declared rule."""


class VerificationError(ParetocError):
    """A pass broke something that must hold: the interface, shapes, finite numbers."""


class LoweringError(ParetocError):
    """A backend cannot lower the program."""


class ArtifactError(ParetocError):
    """A saved artifact is missing, truncated or altered."""


class PluginError(ParetocError):
    """A plugin is broken or clashes with another."""


class ConformanceError(ParetocError, AssertionError):
    """A pass, encoding or backend breaks the contract that `paretoc.testing` checks."""


def nearest(name: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
    """The candidates that look most like `name`, best first."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """A sentence for the `fix` line of an unknown-name error."""
    known = sorted(candidates)
    close = nearest(name, known)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known)
