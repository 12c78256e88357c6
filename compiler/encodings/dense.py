"""w → w, stored in a floating dtype. Exact when the dtype is the tensor's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import Arrays, Encoding, Fit, Shape

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Dense(Encoding):
    """Every element as it is, in `dtype`: float32, float16 or bfloat16. Decodes to float32."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise OptionError(
                f"Dense stores no {self.dtype!r}", where="Dense(dtype=…)", fix="use " + ", ".join(_DTYPES)
            )

    def check(self, weight: Tensor) -> None:
        super().check(weight)
        peak, limit = float(weight.abs().max()), torch.finfo(_DTYPES[self.dtype]).max
        if peak > limit:
            raise OptionError(
                f"{self.dtype} ends at {limit:g}, the largest weight is {peak:g}",
                where=f"a weight of shape {list(weight.shape)}",
                fix="use bfloat16 or float32",
            )

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        return {"values": (shape, _DTYPES[self.dtype])}

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        return {"values": weight.to(_DTYPES[self.dtype]).contiguous()}

    def decode(self, arrays: Arrays, shape: Shape) -> Tensor:
        return arrays["values"].to(torch.float32).reshape(shape)
