"""min ‖(W − Ŵ)X‖² column by column: what rounding or pruning a weight costs, the weights not yet fixed make up for.

Optimal Brain Surgeon (Hassibi & Stork 1993) with one order of columns for all rows: Frantar et al. 2023, "GPTQ",
section 3.3, and Frantar & Alistarh 2023, "SparseGPT", section 3.3. With H = XXᵀ + λI and H⁻¹ = UᵀU, U upper
triangular, fixing column j to q leaves e = (w_j − q) / U_jj, and the later columns become W_k − e·U_jk. This is
the exact least-squares update of the later columns, all of them free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: column j and its weights `[O]` → what they are fixed to `[O]`
Round = Callable[[int, Tensor], Tensor]
#: first column of a group, its weights `[O, n]` as the errors before have left them, and U_jj of its columns `[n]`
#: → True where a weight stays `[O, n]`, or None
Enter = Callable[[int, Tensor, Tensor], Tensor | None]


def sweep(
    weight: Tensor,
    factor: Tensor,
    round_column: Round,
    *,
    mask: Tensor | None = None,
    enter: Enter | None = None,
    group: int = 1,
    order: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """Fix the columns of W `[O, K]` one after the other, in float64, under the `[K, K]` of `inverse_factor`; → Ŵ.

    `mask` `[O, K]` is False where a weight is pruned: it is fixed to zero. `enter` is called before the first column
    of every `group`, and may return the mask of that group. `order` `[K]`, not with `enter`, is the order in which
    columns are fixed, and that of the factor. Columns of inputs that are always zero are rounded, and change no other.
    """
    assert order is None or enter is None
    order = torch.arange(weight.shape[1]) if order is None else order
    columns = weight.T[order].double()  # a column of W lies in a row here: what is fixed together is contiguous
    kept = None if mask is None else mask.T[order]
    width, pivots = len(columns), factor.diagonal().flip(0)
    for start, stop in _blocks(width, group, block):
        upper = factor[width - stop : width - start, : width - start].flip(0, 1)  # rows and columns from `start` on
        errors = columns.new_empty(stop - start, columns.shape[1])
        for j in range(start, stop):
            if enter is not None and j % group == 0:
                chosen = enter(j, columns[j : j + group].T, pivots[j : j + group])
                if chosen is not None:
                    kept = torch.ones_like(columns, dtype=torch.bool) if kept is None else kept
                    kept[j : j + group] = chosen.T
            fixed = round_column(int(order[j]), columns[j]).double()
            fixed = fixed if kept is None else torch.where(kept[j], fixed, 0.0)
            i = j - start
            errors[i] = (columns[j] - fixed) / upper[i, i]
            columns[j] = fixed
            columns[j + 1 : stop].addr_(upper[i, i + 1 : stop - start], errors[i], alpha=-1)
        columns[stop:].addmm_(upper[:, stop - start :].T, errors, alpha=-1)
    return columns[order.argsort()].T


def _blocks(columns: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `block` columns, such that a group lies in one, or starts with one when it is longer."""
    whole = group * max(block // group, 1)
    for first in range(0, columns, whole):
        last = min(first + whole, columns)
        for start in range(first, last, block):
            yield start, min(start + block, last)
