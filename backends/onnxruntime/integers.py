"""Encoded weights → the integer tensors ONNX can hold: dense codes with scales per tensor, channel or block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from ...compiler.encodings import NM, Affine, Arrays, Dense, Encoding, Parameters

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Integers:
    """w = (codes − zero) · scale. `codes` int32 in the weight's shape, or `[O, I]`
    where there are blocks; `scale` float32 `[rows, G]`; `zero` likewise.

    `block` is the number of consecutive weights of the flattened input axis under one scale; 0: the whole row;
    −1: the whole tensor. `axis` of `codes` is that along which ONNX counts scales: rows, or the input where it has
    blocks.
    """

    codes: NDArray[np.int32]
    scale: NDArray[np.float32]
    zero: NDArray[np.int32] | None
    bits: int
    block: int
    axis: int = 0

    @property
    def per_channel(self) -> bool:
        return self.block in (0, -1)

    def transposed(self) -> Integers:
        """Of a matrix: `[O, I]` → `[I, O]`, scales with it."""
        zero = None if self.zero is None else self.zero.T
        return replace(self, codes=self.codes.T, scale=self.scale.T, zero=zero, axis=1 - self.axis)

    def storage(self) -> Any:
        """The narrowest ONNX integer that holds the codes, standard since opset 21 for 4 bits."""
        if self.bits <= 4:
            return ml_dtypes.uint4 if self.zero is not None else ml_dtypes.int4
        return np.uint8 if self.zero is not None else np.int8


def representable(encoding: Encoding) -> bool:
    """Whether `integers` can hold this encoding; the others are traced into the graph."""
    values = encoding.values if isinstance(encoding, NM) else encoding
    if isinstance(values, Affine):
        aligned = not isinstance(encoding, NM) or values.group <= 0 or values.group % encoding.n == 0
        return aligned and (values.symmetric or values.zero == "integer")
    return isinstance(values, Dense)


def integers(encoding: Encoding, arrays: Arrays, shape: tuple[int, ...]) -> Integers | None:
    """The integer form of an encoded weight, or None when it is stored in floating point."""
    if isinstance(encoding, Affine):
        codes, parameters = encoding.load(arrays, shape)
        return _make(codes.reshape(shape), parameters, encoding.bits, encoding.group)
    if isinstance(encoding, NM) and isinstance(encoding.values, Affine):
        return _from_sparse(encoding, encoding.values, arrays, shape)
    return None


def _from_sparse(pattern: NM, values: Affine, arrays: Arrays, shape: tuple[int, ...]) -> Integers | None:
    """Packed codes spread over the dense weight; pruned places get the code of zero."""
    if values.group > 0 and len(shape) > 2:
        return None  # a group of packed weights spans kernel positions: no dense block matches it
    packed_shape = (shape[0], prod(shape[1:]) * pattern.n // pattern.m)
    inner = pattern.inner(arrays)
    codes, parameters = values.load(inner, packed_shape)
    block = values.group * pattern.m // pattern.n if values.group > 0 else values.group
    if not values.symmetric:
        codes = codes - parameters["zero"].int().unsqueeze(-1)
    dense = pattern.scatter(codes.reshape(packed_shape), arrays, shape)
    if not values.symmetric:
        rows, groups, _ = codes.shape
        dense = (dense.reshape(rows, groups, -1) + parameters["zero"].int().unsqueeze(-1)).reshape(shape)
    return _make(dense, parameters, values.bits, block)


def _make(codes: torch.Tensor, parameters: Parameters, bits: int, block: int) -> Integers:
    zero = parameters.get("zero")
    return Integers(
        (codes.flatten(1) if block > 0 else codes).to(torch.int32).numpy(),
        parameters["scale"].float().numpy(),
        None if zero is None else zero.to(torch.int32).numpy(),
        bits,
        block,
        axis=1 if block > 0 else 0,
    )


def pack_bits(codes: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Unsigned codes `[..., n]`, n·bits divisible by 8 → bytes, low bits first: the layout of MatMulNBits."""
    per_byte = 8 // bits
    grouped = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(grouped << shifts, axis=-1).astype(np.uint8)
    return packed
