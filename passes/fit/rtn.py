"""w → encode(w): every value rounded to the nearest that the encoding can store. Data-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...compiler.encodings import Arrays, Encoding
from ...compiler.protocols import DataFree


@dataclass(frozen=True)
class Rtn(DataFree):
    """Round to nearest, scales from the range."""

    name: ClassVar[str] = "rtn"

    def fit_values(self, encoding: Encoding, weight: Tensor) -> Arrays:
        return encoding.encode(weight)
