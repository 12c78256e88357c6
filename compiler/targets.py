"""Which sites a pass acts on: class names, globs on parameter paths, `re:` patterns, and what each one matched."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import OptionError, nearest
from .program import Program
from .sites import Site, weight_sites


@dataclass(frozen=True)
class Selection:
    """The chosen sites and, for every pattern, the paths it matched (the match table)."""

    sites: list[Site]
    table: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(f"{pattern}: {len(paths)} sites" for pattern, paths in self.table.items())


def select(
    program: Program, targets: tuple[str, ...], ignore: tuple[str, ...], kinds: tuple[str, ...], *, where: str
) -> Selection:
    """Sites of `kinds` that match any target (default: all) and no `ignore` pattern.

    A pattern is a module class name ("Linear"), a glob on the path ("*.attention.*"), or "re:" and a regular
    expression searched in the path. Raises OptionError, with near misses, when a pattern matches nothing.
    """
    sites = [s for s in weight_sites(program) if s.kind in kinds]
    table: dict[str, list[str]] = {}

    def matching(patterns: tuple[str, ...]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            accept = _matcher(pattern, where)
            paths = [s.path for s in sites if accept(s)]
            if not paths:
                names = {s.path for s in sites} | {s.module_class for s in sites}
                close = nearest(pattern.removeprefix("re:").strip("*."), names)
                raise OptionError(
                    f"the pattern {pattern!r} matches none of the {len(sites)} {'/'.join(kinds)} sites",
                    where=where,
                    fix=f"did you mean {' or '.join(close)}?" if close else f"sites are named like {sorted(names)[:3]}",
                )
            table[pattern] = paths
            found.update(paths)
        return found

    wanted = matching(targets) if targets else {s.path for s in sites}
    unwanted = matching(ignore)
    return Selection([s for s in sites if s.path in wanted - unwanted], table)


def _matcher(pattern: str, where: str) -> Callable[[Site], bool]:
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise OptionError(
                f"{pattern!r} is not a regular expression: {error}", where=where, fix="correct it, or use a glob"
            ) from error
        return lambda site: expression.search(site.path) is not None
    return lambda site: pattern == site.module_class or fnmatch.fnmatchcase(site.path, pattern)
