"""w → encode(w): every value rounded to the nearest that the encoding can store. Data-free."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...compiler.encodings import Arrays, Encoding


@dataclass(frozen=True)
class Rtn:
    """Round to nearest, scales from the range."""

    name: str = "rtn"

    def refuse(self, encoding: Encoding) -> str | None:
        return None

    def fit(self, encoding: Encoding, weight: Tensor) -> Arrays:
        return encoding.encode(weight)
