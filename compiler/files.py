"""Files that are there whole or not at all, and the folder of those that only this machine has a use for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ArtifactError, ParetocError


@contextmanager
def whole_file(path: Path, where: str, fix: str, error: type[ParetocError] = ArtifactError) -> Iterator[Path]:
    """A file to write beside `path`, which it replaces when the block has ended well and leaves as it was otherwise.

    Raises `error` when the system refuses.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as refused:
        raise error(f"cannot write to {str(path)!r}: {refused.strerror}", where=where, fix=fix) from refused
    finally:
        with suppress(OSError):
            part.unlink()


def cache_folder() -> Path:
    """Where measurements of this machine are kept: in PARETOC_CACHE, else in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("PARETOC_CACHE", Path(base) / "paretoc"))
