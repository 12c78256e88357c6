"""Memory that is free but not given back: PyTorch frees tensors to the C library, which keeps what it got in pieces."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give freed memory back to the system. Where the C library is not glibc, it does nothing."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
