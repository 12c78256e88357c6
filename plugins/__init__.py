"""First-party plugins: one file per published method, written only against the public API."""

from __future__ import annotations

from ..compiler.encodings import Encoding
from ..compiler.hookspecs import hook
from ..compiler.passes import Pass
from .powerquant import Power, PowerQuant

__all__ = ["Power", "PowerQuant"]


@hook
def paretoc_passes() -> list[type[Pass]]:
    return [PowerQuant]


@hook
def paretoc_encodings() -> list[type[Encoding]]:
    return [Power]
