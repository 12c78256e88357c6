"""A paretoc plugin in one module: an encoding, a pass that uses it, and a token rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import paretoc as pc
import torch
from torch import Tensor

aten, paretoc = torch.ops.aten, torch.ops.paretoc
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SampleSign(pc.Encoding):
    """w → α·sgn(w), α = mean|w| of the output channel: one bit a weight.

    Rastegari et al. 2016, "XNOR-Net", section 3.1. Lossy. Stored: `signs` uint8 `[O, I/8]`, low bits first,
    set where negative; `scale` float32 `[O, 1]`, α.
    """

    summary: ClassVar[str] = "1 bit"

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        rows, columns = shape[0], prod(shape[1:])
        if columns % 8:
            raise pc.OptionError(
                f"8 signs make a byte, which does not divide the input width {columns}",
                where=f"a weight of shape {list(shape)}",
                fix="leave this site out with ignore=",
            )
        return {"signs": ((rows, columns // 8), torch.uint8), "scale": ((rows, 1), torch.float32)}

    def encode(self, weight: Tensor, fit: object = None) -> dict[str, Tensor]:
        rows = weight.float().reshape(weight.shape[0], -1)
        bits = (rows < 0).reshape(len(rows), -1, 8) * 2 ** torch.arange(8)
        return {"signs": bits.sum(-1).to(torch.uint8), "scale": rows.abs().mean(1, keepdim=True)}

    def decode(self, arrays: dict[str, Tensor], shape: Shape) -> Tensor:
        places = 2 ** torch.arange(8, dtype=torch.int32, device=arrays["signs"].device)
        negative = (arrays["signs"].to(torch.int32).unsqueeze(-1) & places) != 0
        return (torch.where(negative.flatten(1), -1.0, 1.0) * arrays["scale"]).reshape(shape)


@dataclass(frozen=True)
class SampleSignPass(pc.EncodePass):
    """Store the weights of linear sites as `SampleSign`."""

    name: ClassVar[str] = "sample_sign"
    phase: ClassVar[pc.Phase] = pc.Phase.QUANTIZE

    def encoding(self) -> SampleSign:
        return SampleSign()


class SampleNorm(pc.TokenRule):
    """x `[B, T, C]` → the protected tokens and those of largest ‖x‖₂, in order: it needs no attention."""

    name: ClassVar[str] = "sample_norm"

    def limit(self, tokens: int, protected: int) -> int:
        return tokens - protected - 1

    def emit(self, program: pc.Program, state: pc.TokenState, remove: int) -> pc.Reduced:
        graph, keep = program.graph, state.tokens - state.protected - remove
        with graph.inserting_after(state.x):
            norm = graph.call_function(aten.linalg_vector_norm.default, (state.x, 2, [-1]))
        with graph.inserting_after(norm):
            x = graph.call_function(paretoc.keep_tokens.default, (state.x, norm, keep, state.protected, False))
        return pc.Reduced(x, None, state.protected + keep)


@pc.hook
def paretoc_encodings() -> list[type[pc.Encoding]]:
    return [SampleSign]


@pc.hook
def paretoc_passes() -> list[type[pc.Pass]]:
    return [SampleSignPass]


@pc.hook
def paretoc_token_rules() -> list[pc.TokenRule]:
    return [SampleNorm()]
