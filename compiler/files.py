"""Files that are there whole or not at all."""

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
