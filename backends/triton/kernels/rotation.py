"""x → x·(A ⊗ B), that is X → Aᵀ·X·B with x seen as a matrix X `[a, b]`: the rotation before a layer, in one kernel.

Ashkboos et al. 2024, "QuaRot", section 4: the online Hadamard transform, here with the factors that the graph holds,
so that orders other than powers of two and random rotations are the same kernel. x `[…, a·b]` float16, bfloat16 or
float32, any strides; left = Aᵀ `[a, a]` and right = B `[b, b]` in the type of x. Both products run on the tensor cores,
a·b·(a + b) multiplications a token, and x is read and written once; between them X·B is rounded to the type of x, as in
the two products that the kernel replaces. Sums are float32. `rotate_tokens` rounds to codes too, which is what a
rotation is for: one scale for each token, as in `quantize_tokens`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, Tiling, cdiv, check_dtype, kernel_op, launch, padded
from .plan import REFERENCE, TUNINGS, Plan, plan, tokens_class
from .quantize import codes_of, number, outputs, quantize_tokens

#: the most numbers, padded to powers of two, of one token: its sums stay in registers
MAX_SIZE = 1 << 14
#: the rows of B that are held at once
_STEP = 64


@triton.jit
def rotation_kernel(
    x, left, right, out, scales, M, A, B, stride_m, stride_k,
    TOP: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of x `[M, A·B]` → out `[M, A·B]`, contiguous; with scales `[M]` their codes."""
    lines = tl.arange(0, BLOCK_T * BLOCK_A)
    token, i = tl.program_id(0).to(tl.int64) * BLOCK_T + lines // BLOCK_A, lines % BLOCK_A
    live = ((token < M) & (i < A))[:, None]
    j = tl.arange(0, BLOCK_B)
    sums = tl.zeros((BLOCK_T * BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, B, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        places = x + token[:, None] * stride_m + (i[:, None] * B + k[None, :]) * stride_k
        values = tl.load(places, mask=live & (k < B)[None, :], other=0.0)
        matrix = tl.load(right + k[:, None] * B + j[None, :], mask=(k < B)[:, None] & (j < B)[None, :], other=0.0)
        if WIDEN:
            values, matrix = values.to(tl.float32), matrix.to(tl.float32)
        sums = tl.dot(values, matrix, sums, input_precision="tf32x3")
    middle = sums.to(x.dtype.element_ty).reshape(BLOCK_T, BLOCK_A, BLOCK_B)
    middle = tl.permute(middle, (0, 2, 1)).reshape(BLOCK_T * BLOCK_B, BLOCK_A)
    k, n = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_A)
    matrix = tl.load(left + n[None, :] * A + k[:, None], mask=(k < A)[:, None] & (n < A)[None, :], other=0.0)
    if WIDEN:
        middle, matrix = middle.to(tl.float32), matrix.to(tl.float32)
    turned = tl.dot(middle, matrix, input_precision="tf32x3").reshape(BLOCK_T, BLOCK_B, BLOCK_A)
    result = tl.permute(turned, (0, 2, 1)).to(x.dtype.element_ty)
    if scales is not None:
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        codes, scale = codes_of(result.to(tl.float32).reshape(BLOCK_T, BLOCK_A * BLOCK_B), TOP, MANTISSA, LEAST)
        tl.store(scales + rows, scale, mask=rows < M)
        result = codes.reshape(BLOCK_T, BLOCK_A, BLOCK_B)
    result = result.reshape(BLOCK_T * BLOCK_A, BLOCK_B).to(out.dtype.element_ty)
    tl.store(out + token[:, None] * A * B + i[:, None] * B + j[None, :], result, mask=live & (j < B)[None, :])


def rotation_plan(M: int, a: int, b: int, dtype: torch.dtype, code: str = "") -> Plan:
    """What may run a rotation of M tokens, to codes or not; PyTorch alone where a token is too large."""
    return _plan(tokens_class(M), a, b, dtype, code)


@cache
def _plan(M: int, a: int, b: int, dtype: torch.dtype, code: str) -> Plan:
    return plan("rotate", M, a, b, (dtype, *([code] if code else [])), tilings(M, a, b))


def tilings(M: int, a: int, b: int) -> list[Tiling]:
    """The kernels for a class of shapes, M the largest of it: several tokens share what is read of A and B."""
    size = padded(a) * padded(b)
    if size > MAX_SIZE:
        return []
    shared = [1] if M == 1 else [max(1, MAX_SIZE // size), max(1, MAX_SIZE // 2 // size), 1]
    # more in four warps does not fit their registers
    blocks = dict.fromkeys((tokens, 8 if tokens * size > MAX_SIZE // 2 else 4) for tokens in shared)
    blocks |= {(1, 8): None} if M == 1 else {}
    step = min(padded(b), _STEP)
    return [Tiling("rotation", tokens, padded(b), step, 1, warps, 2) for tokens, warps in blocks]


@kernel_op("rotate")
def rotate(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x `[…, a·b]`, left `[a, a]`, right `[b, b]` → left·X·right of each token, in the shape and the type of x."""
    return _run(x, left, right, "")[0]


@rotate.register_fake
def _(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@kernel_op("rotate_tokens")
def rotate_tokens(x: Tensor, left: Tensor, right: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """`quantize_tokens(rotate(x, left, right), code)`: codes in the shape of x and scales `[M, 1]`."""
    return _run(x, left, right, code)


@rotate_tokens.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, code: str) -> tuple[Tensor, Tensor]:
    return outputs(x, code, 0)


def _run(x: Tensor, left: Tensor, right: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """The rotated x and nothing, or its codes and scales."""
    check_dtype(x)
    a, b = int(left.shape[0]), int(right.shape[0])
    tokens = x.reshape(-1, a * b)
    M = tokens.shape[0]
    top, mantissa, least = number(code or "int8")

    def run(tile: Tiling) -> tuple[Tensor, Tensor]:
        if tile == REFERENCE:
            y = torch.flatten(left @ (tokens.unflatten(1, (a, b)) @ right), 1).reshape(x.shape)
            return quantize_tokens(y, code) if code else (y, y)
        plain = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out, scales = outputs(x, code, 0) if code else (plain, plain)
        launch(
            rotation_kernel,
            (cdiv(M, tile.block_m),),
            x=tokens,
            left=left.contiguous(),
            right=right.contiguous(),
            out=out,
            scales=scales if code else None,
            M=M,
            A=a,
            B=b,
            stride_m=tokens.stride(0),
            stride_k=tokens.stride(1),
            TOP=top,
            MANTISSA=mantissa,
            LEAST=least,
            BLOCK_T=tile.block_m,
            BLOCK_A=padded(a),
            BLOCK_B=tile.block_n,
            BLOCK_K=tile.block_k,
            WIDEN=INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return out, scales

    return TUNINGS.run(rotation_plan(M, a, b, x.dtype, code), x, run)
