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
    count = codes.shape[-1]
    shifts = torch.arange(bits, device=codes.device)
    stream = ((codes.to(torch.int32).unsqueeze(-1) >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, packed_size(count, bits) * 8 - count * bits))
    octets = stream.reshape(*stream.shape[:-1], -1, 8)
    return (octets << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """uint8 `[..., ceil(count·bits/8)]` → int32 codes `[..., count]`. Written to trace and export."""
    values = packed.to(torch.int32)
    if bits == 8:
        return values
    if 8 % bits == 0:
        per_byte = 8 // bits
        shifts = torch.arange(per_byte, device=packed.device, dtype=torch.int32) * bits
        mask = (1 << bits) - 1
        return ((values.unsqueeze(-1) >> shifts) & mask).flatten(-2)[..., :count]
    stream = ((values.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.int32)) & 1).flatten(-2)
    codes = stream[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
    return (codes << torch.arange(bits, device=packed.device, dtype=torch.int32)).sum(-1, dtype=torch.int32)
