"""How kernels are launched: compiled on a GPU, interpreted on a CPU where TRITON_INTERPRET=1 was set at the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs

from ....compiler.errors import LoweringError

#: whether Triton interprets kernels: `triton.jit` looks at TRITON_INTERPRET when it is applied, on import
INTERPRETED = knobs.runtime.interpret
#: what activations may be
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: programs that a grid should have to keep the multiprocessors of a large GPU busy; fixed, so that the order of the
#: sums, and with it the result, is the same on every one
PROGRAMS = 512


@dataclass(frozen=True)
class Tiling:
    """A kernel with its block sizes. `split` programs share the sum over K of each output."""

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    split: int = 1
    num_warps: int = 4
    num_stages: int = 3

    @property
    def constants(self) -> dict[str, int]:
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "SPLIT": self.split}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        if not self.block_m:
            return self.kernel
        split = f", split-K {self.split}" if self.split > 1 else ""
        return f"{self.kernel} {self.block_m} × {self.block_n} × {self.block_k}, {self.num_warps} warps{split}"


def padded(side: int) -> int:
    """To a power of two that tensor cores multiply."""
    return max(1 << (side - 1).bit_length(), 16)


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def split_k(programs: int, steps: int) -> int:
    """How many programs share the `steps` of one sum, when the outputs alone give so many programs."""
    return max(1, min(cdiv(PROGRAMS, programs), steps))


def tiling(
    kernel: str, M: int, N: int, K: int, block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int
) -> Tiling:
    """Blocks for a product; few outputs share their sums, where tokens are few too."""
    split = split_k(cdiv(N, block_n), cdiv(K, block_k)) if M <= 64 else 1
    return Tiling(kernel, block_m, block_n, block_k, split, num_warps, num_stages)


def sum_parts(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Partial sums `[SPLIT, M, N]`, float32 → `[M, N]` with the bias; a single part has it already."""
    if len(parts) == 1:
        return parts[0]
    total = parts.sum(0)
    return (total if bias is None else total + bias).to(dtype)


def check_dtype(x: torch.Tensor) -> None:
    """Refuse what no kernel reads."""
    if x.dtype not in DTYPES:
        raise LoweringError(
            f"Triton kernels do not read {x.dtype}",
            where=f"an activation of shape {list(x.shape)}",
            fix="use float16, bfloat16 or float32",
        )


def kernel_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare an operator of PyTorch that launches kernels, which `torch.compile` sees; interpreted, they run on no
    traced tensors, so that the operator is opaque."""
    declare = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    return declare(f"paretoc_triton::{name}", mutates_args=())


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a kernel."""
    if not INTERPRETED:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](**arguments)
