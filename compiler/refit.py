"""min ‖(A − B)·X‖² over B that reads only the columns S of X: what the columns left out gave is put on the others.

    B_S = A_S + A_R·H_RS·(H_SS + λI)⁻¹,   H = Σ xxᵀ,  R the columns left out

which is A·H_{·S}·H_SS⁻¹ for λ = 0 (Hassibi & Stork 1993, Optimal Brain Surgeon, for many weights at once); λ holds the
weights back from moving, not small. A bias is a column of A whose input is 1: it takes the means of what is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .axes import Axis
from .calibrate import Stream
from .cholesky import inverse_factor
from .importance import Reader
from .program import Program, describe


def refit(matrix: Tensor, gram: Tensor, kept: Tensor, damp: float = 1e-3) -> Tensor:
    """A `[O, K]`, H `[K, K]`, columns S `[n]` → B `[O, K]`, float64, zero outside S.

    `damp` is λ over the mean of diag(H_SS).
    """
    matrix, gram = matrix.double(), gram.double()
    left = torch.ones(matrix.shape[1], dtype=torch.bool)
    left[kept] = False
    factor = inverse_factor(gram[kept][:, kept], damp)[0].flip(0, 1)
    wanted = matrix[:, left] @ gram[left][:, kept]
    fitted = torch.zeros_like(matrix)
    fitted[:, kept] = matrix[:, kept] + wanted @ factor.T @ factor
    return fitted


def fitted_readers(
    kept: Mapping[Axis, Tensor],
    stream: Stream,
    damp: float = 1e-3,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> tuple[dict[str, Tensor], list[str]]:
    """New weights and biases, by name, for every layer that reads one of these axes of the program of the stream: the
    columns of channels that are not `kept` are 0, the others give its outputs on the inputs it has now. Also which
    readers are left as they are, and why."""
    program = stream.program
    groups: dict[fx.Node, dict[fx.Node, Reader]] = defaultdict(dict)
    left = []
    for axis in kept:
        for node in axis.readers:
            reader = Reader.of(axis, node)
            if reader is not None:
                groups[reader.site.weight][node] = reader
            else:
                left.append(f"{describe(node)} is not fitted anew: it is neither linear nor a convolution")
    fitted: dict[str, Tensor] = {}
    for weight in track(sorted(groups, key=lambda weight: min(groups[weight])), "fitting readers"):
        shared = list(groups[weight].values())
        if other := next((user for user in weight.users if user not in groups[weight]), None):
            left.append(f"{shared[0].site.path!r} is not fitted anew: {describe(other)} reads its weight too")
            continue
        wanted = [reader.hessian() for reader in shared]
        found = stream.advance(min(reader.site.input for reader in shared), wanted)
        grams = wanted[0].combine([found[need] for need in wanted])
        fitted |= _fitted(program, shared[0], grams, shared[0].kept(kept), damp)
    return fitted, left


def _fitted(program: Program, reader: Reader, grams: Tensor, columns: Tensor, damp: float) -> dict[str, Tensor]:
    weight, bias = reader.site.weight, reader.site.bias
    matrices = reader.weight(program)
    width = matrices.shape[2]
    if bias is not None:
        value = program.weight_value(bias).double().reshape(len(matrices), -1, 1)
        matrices, columns = torch.cat([matrices, value], 2), torch.cat([columns, torch.tensor([width])])
    fitted = torch.stack([refit(m, g, columns, damp) for m, g in zip(matrices, grams, strict=True)])
    values = {weight: fitted[..., :width].reshape(reader.site.shape)}
    if bias is not None:
        values[bias] = fitted[..., width].flatten()
    return {str(node.target): value.to(program.get(str(node.target)).dtype) for node, value in values.items()}
