"""Cholesky factors of a Gram matrix H = Σ xᵀx, damped by λI as much as it takes, and whether it is singular."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import PassError

#: a column of which the others explain all but this share is not independent of them
_DEPENDENT = 1e-12
#: the least eigenvalue of K correlations that is not zero, over √K: H is a sum of float32 products
_ROUNDING = 1e-7
#: from no damping at all to a Hessian that is all but diagonal
_TRIALS = 16


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
    if not hessian.sum().isfinite():
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
