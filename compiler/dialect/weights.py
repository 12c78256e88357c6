"""`paretoc::decode(arrays, encoding, shape, dtype)`: stored arrays → the dense weight.

One operator for every encoding: its second argument is the encoding's text form, so a plugin's encoding is in the
graph, trains, saves and exports like a built-in. The reference is `Encoding.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..encodings import parse_encoding


@torch.library.custom_op("paretoc::decode", mutates_args=())
def decode(arrays: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    dense = reference_decode(arrays, encoding, shape, dtype).contiguous()
    stored = {array.untyped_storage().data_ptr() for array in arrays}
    return dense.clone() if dense.untyped_storage().data_ptr() in stored else dense  # an operator returns no input


@decode.register_fake
def _(arrays: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return arrays[0].new_empty(tuple(shape), dtype=dtype)


def reference_decode(arrays: Sequence[Tensor], encoding: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The definition of `decode` in ATen operators; arrays come in the order of the encoding's layout."""
    parsed = parse_encoding(encoding)
    named = dict(zip(parsed.layout(tuple(shape)), arrays, strict=True))
    return parsed.decode(named, tuple(shape)).to(dtype)
