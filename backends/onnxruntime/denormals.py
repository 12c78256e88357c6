"""|x| < 2⁻¹²⁶ → 0 while a session computes.

What a mask hides keeps so small a probability in ONNX Runtime's softmax, and x86 CPUs multiply such numbers much slower
than others: attention of [8, 128, 384] with a fifth of the tokens hidden takes 1.3 ms instead of 4.3 without them. The
session option does this for the session's own threads, and for the thread that starts the first session of a process
for good; the thread that calls is ours to set, and to leave as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: session options
FLUSHED = {"session.set_denormal_as_zero": "1"}
_LEAST = 5e-324


@contextmanager
def flushed() -> Iterator[None]:
    """Flush in this thread, then as before."""
    before = _LEAST == 0.0  # where a thread flushes, they are equal
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
