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

from ...compiler.errors import PassError

#: column j and its weights `[O]` → what they are fixed to `[O]`
Round = Callable[[int, Tensor], Tensor]
#: first column of a group, its weights `[O, n]` as the errors before have left them, and U_jj of its columns `[n]`
#: → True where a weight stays `[O, n]`, or None
Enter = Callable[[int, Tensor, Tensor], Tensor | None]

#: a column of which the others explain all but this share is not independent of them
_DEPENDENT = 1e-12
#: the least eigenvalue of K correlations that is not zero, over √K: H is a sum of float32 products
_ROUNDING = 1e-7
#: from no damping at all to a Hessian that is all but diagonal
_TRIALS = 16


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


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """H `[K, K]` → U, float64 upper triangular with UᵀU = (H + λI)⁻¹, reversed, and λ / mean(diag H).

    λ begins at `damp` and grows until the sum is safely positive definite. An input that is always zero gets the
    mean of the diagonal instead, so that no error goes to or from it. Raises PassError when H is not finite.

    U comes with its rows and columns reversed: as the inverse of a lower Cholesky factor, computed in one place, since
    a matrix of this size may take as much memory as several layers.
    """
    from scipy.linalg.lapack import dtrtri

    hessian = hessian.double()
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian).all():
        raise PassError(
            "the Hessian of the calibration data is not finite",
            where="Gram matrix of the inputs of a layer",
            fix="look for NaN or infinity in the calibration data, or in the model",
        )
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    diagonal = torch.where(live, diagonal, mean).flip(0)
    share = damp
    for _ in range(_TRIALS):
        lower = hessian.flip(0, 1).T  # in LAPACK's own layout
        damped = diagonal + share * mean
        lower.diagonal().copy_(damped)
        failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty(0, dtype=torch.int32))).info
        if not failed and (lower.diagonal().square() > _DEPENDENT * damped).all():
            break
        share = max(10 * share, 1e-8)
    inverse, _ = dtrtri(lower.numpy(), lower=1, overwrite_c=1)
    return torch.from_numpy(inverse), share


def singular(hessian: Tensor) -> bool:
    """Whether, of the inputs that are ever not zero, some are sums of others as far as H `[K, K]` can tell: the
    correlations have an eigenvalue that float32 does not distinguish from zero."""
    size = hessian.diagonal().double().sqrt()
    size = torch.where(size > 0, size, 1.0)
    correlation = (hessian.double() / size).div_(size.unsqueeze(1)).T  # as above, in one place
    correlation.diagonal().fill_(1 - _ROUNDING * len(size) ** 0.5)
    return bool(torch.linalg.cholesky_ex(correlation, out=(correlation, torch.empty(0, dtype=torch.int32))).info)
