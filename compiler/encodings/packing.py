"""True bit packing: unsigned codes of 1–8 bits ↔ a dense uint8 stream, low bits first along the last axis."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: rows are padded to whole bytes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` in 0…2^bits-1 (any integer dtype) → uint8 `[..., ceil(n·bits/8)]`."""
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    field = bits if 8 % bits == 0 else 1  # what is put into a byte at once: whole codes, or their bits
    fields = codes.to(torch.uint8)
    if field < bits:
        fields = (fields.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device) & 1).flatten(-2)
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % (8 // field)))
    packed = fields[..., :: 8 // field].clone()
    for place in range(1, 8 // field):
        packed |= fields[..., place :: 8 // field] << place * field
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 `[..., ceil(count·bits/8)]` → int32 codes `[..., count]`.

    Every byte is looked up in a table of the codes (or of the bits) it holds: exports as one Gather, where shifts
    would be ten ONNX operators.
    """
    if bits == 8:
        return packed.to(torch.int32)
    field = bits if 8 % bits == 0 else 1
    table = [[byte >> low & (1 << field) - 1 for low in range(0, 8, field)] for byte in range(256)]
    fields = torch.tensor(table, dtype=torch.uint8, device=packed.device).index_select(0, packed.flatten().int())
    fields = fields.reshape(*packed.shape[:-1], -1).to(torch.int32)
    if field == bits:
        return fields[..., :count]
    places = torch.tensor([1 << place for place in range(bits)], dtype=torch.int32, device=packed.device)
    stream = fields[..., : count * bits].reshape(*packed.shape[:-1], count, bits)
    return (stream * places).sum(-1, dtype=torch.int32)
