"""Triton kernels without a GPU: imported for Triton's interpreter here, compiled ahead of time in another process.

Triton looks at TRITON_INTERPRET when `triton.jit` is applied, so it is set while Triton and the kernels are imported,
and while these tests run: the rest of the suite never sees it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

if "triton.language" in sys.modules and "paretoc.backends.triton.kernels.launch" not in sys.modules:
    raise pytest.UsageError("a test module imports Triton before tests/backends/triton can set TRITON_INTERPRET")
_INTERPRET = {"TRITON_INTERPRET": "1"}
with mock.patch.dict(os.environ, _INTERPRET):
    import paretoc.backends.triton.executable  # noqa: F401  # imports every kernel


@pytest.fixture(autouse=True)
def _interpret() -> Iterator[None]:
    with mock.patch.dict(os.environ, _INTERPRET):
        yield


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that is not initialised holds NaN, or the largest integer: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def near() -> Callable[..., None]:
    """`near(y, expected, bound)`: every |y − expected| ≤ bound, tensors or numbers; NaN is never near."""

    def check(y: Tensor, expected: Tensor, bound: Any) -> None:
        assert y.shape == expected.shape
        excess = (y.double() - expected.double()).abs() - bound
        assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than allowed"

    return check
