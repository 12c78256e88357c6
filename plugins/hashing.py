"""h(x) = ((a·x + b·x² + c) mod P) mod m with a seeded a, b, c: the universal hash of the plugins that share parameters.

Carter & Wegman 1979, "Universal Classes of Hash Functions", with the prime of the ROAST release. The coefficients come
from SHA-256, so that they are the same everywhere and for ever.
"""

from __future__ import annotations

import hashlib

PRIME = 2038074743


def coefficients(*seed: int) -> tuple[int, int, int]:
    """a, b, c in 1 … P − 1."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8], "little") % (PRIME - 1) + 1 for i in (0, 8, 16))
    return a, b, c
