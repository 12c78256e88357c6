"""min tr((W − Ŵ)·H·(W − Ŵ)ᵀ), H = Σ xᵀx: columns rounded in turn, the error of each spread over those that follow.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; the column
sweep is in `obs.py`. The scales of a group are searched (`mse.py`) when its first column is reached, on the weights
as the errors so far have left them. `importance="attention"` weighs the tokens of H as RSQ does (Sung et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.cholesky import inverse_factor
from ...compiler.encodings import Arrays, Encoding, Parameters, Scaled
from ...compiler.errors import OptionError
from ...compiler.program import example_shape
from ...compiler.protocols import NO_EVIDENCE, Evidence, warn
from ...compiler.sites import Site, attention_of
from ...compiler.statistics import AttentionReceived, Derived, Hessian, Statistic, WeightedHessian
from .matrix import Matrix, refusal
from .mse import best_shrink
from .obs import sweep

#: weights that are swept together
_SWEPT = 1 << 23


@dataclass(frozen=True)
class Gptq:
    """Column-wise rounding with error feedback, for encodings with scales and N:M patterns of such.

    `act_order` takes the inputs with the largest Σx² first; like `static_groups` it finds all scales before. `damp` is
    the share of the mean of diag(H) that is added to it, `block` how many columns are updated one by one. `norm` is
    that of the clip search, None for full ranges; `clip_by_cost` weighs each weight in it by what its rounding costs
    in the output. `importance="attention"` counts a token by the attention it receives, the least `r_min` times the
    most; where a layer reads no tokens of an attention all count alike, with a warning.
    """

    name: ClassVar[str] = "gptq"
    data_free: ClassVar[bool] = False

    act_order: bool = False
    damp: float = 0.01
    block: int = 128
    norm: float | None = 2.4
    static_groups: bool = False
    clip_by_cost: bool = False
    importance: str | None = None
    r_min: float = 0.005

    def __post_init__(self) -> None:
        for option, valid, fix in (
            ("damp", self.damp >= 0, "use a share of the mean of diag(H) such as 0.01"),
            ("block", self.block >= 1, "use a number of columns such as 128"),
            ("norm", self.norm is None or self.norm > 0, "use 2.4, or None for full ranges"),
            ("importance", self.importance in (None, "attention"), "use 'attention' or None"),
            ("r_min", 0 < self.r_min <= 1, "use a share of the largest importance such as 0.005"),
        ):
            if not valid:
                raise OptionError(f"{option}={getattr(self, option)!r} is not valid", where="fitter 'gptq'", fix=fix)

    def refuse(self, encoding: Encoding) -> str | None:
        return refusal(self.name, encoding)

    def needs(self, site: Site) -> list[Statistic]:
        importance = self.token_importance(site)
        if importance is None:
            return [Hessian(site.input.name, site.window)]
        return [WeightedHessian(site.input.name, importance=importance)]

    def token_importance(self, site: Site) -> Derived | None:
        """What the tokens that this site reads are worth `[B, T]`, or None when all are worth the same."""
        attention = attention_of(site) if self.importance == "attention" and site.kind == "linear" else None
        if attention is None:
            return None
        keys, rows = example_shape(attention.key), example_shape(site.input)[:-1]
        if len(keys) != 4 or rows not in ((keys[0], keys[2]), (keys[0] * keys[2],)):
            return None
        mask = attention.mask.name if attention.mask is not None else None
        return AttentionReceived(
            attention.query.name, attention.key.name, mask, attention.scale, attention.causal, self.r_min
        )

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        if self.importance is not None and not any(issubclass(kind, WeightedHessian) for kind in evidence):
            warn("what it reads are no tokens of an attention: all count alike")
        matrix = Matrix(encoding, weight)
        parts, damping = [], self.damp
        whole = self.static_groups or self.act_order or matrix.whole
        grams = matrix.grams(evidence)
        fixed = self._search(matrix.values, matrix.grouped, _costs(matrix, grams)) if whole else None
        codes = torch.zeros_like(matrix.dense)
        for rows, gram in grams:
            order = gram.diagonal().argsort(descending=True, stable=True) if self.act_order else None
            factor, share = inverse_factor(gram if order is None else gram[order][:, order], self.damp)
            damping = max(damping, share)
            for some in _slices(rows, gram.shape[0]):
                parts.append(_Rounding(self, matrix, some, fixed, codes[some]))
                self._sweep(parts[-1], factor, order)
        if damping > self.damp:
            warn(f"{damping:.3g} of the mean of the diagonal of the Hessian was added to it, to invert it")
        return matrix.store(codes, _joined(parts) if fixed is None else fixed)

    def _sweep(self, rounding: _Rounding, factor: Tensor, order: Tensor | None) -> None:
        sweep(
            rounding.dense,
            factor,
            rounding,
            mask=rounding.mask,
            enter=rounding.enter if rounding.fixed is None else None,
            group=rounding.group,
            order=order,
            block=self.block,
        )

    def _search(self, values: Scaled, grouped: Tensor, cost: Tensor) -> Parameters:
        if self.norm is None:
            return values.parameters(grouped)
        return values.parameters(grouped, best_shrink(values, grouped, self.norm, cost if self.clip_by_cost else None))


def _slices(rows: slice, width: int) -> list[slice]:
    """Rows that are swept together: their float64 copy takes 64 MiB at most."""
    step = max(_SWEPT // width, 1)
    return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


class _Rounding:
    """Rounds the columns of some rows of a matrix, each under the parameters of its group, into `codes`."""

    def __init__(self, fitter: Gptq, matrix: Matrix, rows: slice, fixed: Parameters | None, codes: Tensor) -> None:
        self.fitter, self.values, self.group, self.fixed = fitter, matrix.values, matrix.group, fixed
        self.dense = matrix.dense[rows]
        self.mask = None if matrix.mask is None else matrix.mask[rows]
        self.codes = codes
        self.groups: list[Parameters] = []
        if fixed is not None:
            own = fixed if matrix.grid[0] == 1 else {k: v[rows] for k, v in fixed.items()}
            self.groups = [{k: v[:, g : g + 1] for k, v in own.items()} for g in range(matrix.grid[1])]

    def enter(self, start: int, weights: Tensor, pivots: Tensor) -> None:
        """Find the parameters of the group that begins at this column."""
        cost = (pivots**-2).float().expand_as(weights)
        weights = weights.float()
        if self.mask is not None:
            kept = self.mask[:, start : start + self.group]
            weights, cost = (x[kept].reshape(len(x), -1) for x in (weights, cost))
        self.groups.append(self.fitter._search(self.values, weights.unsqueeze(1), cost.unsqueeze(1)))

    def __call__(self, column: int, weights: Tensor) -> Tensor:
        parameters = self.groups[column // self.group]
        grouped = weights.float().reshape(len(parameters["scale"]), 1, -1)
        codes = self.values.quantize(grouped, parameters)
        self.codes[:, column] = codes.reshape(-1)
        return self.values.dequantize(codes, parameters).reshape(-1)


def _costs(matrix: Matrix, grams: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """Σx² of the input of each kept weight `[R, G, n]`: what its rounding costs while no other weight moves."""
    dense = torch.cat([gram.diagonal().float().expand_as(matrix.dense[rows]) for rows, gram in grams])
    return matrix.packed(dense).reshape(matrix.grid)


def _joined(parts: Sequence[_Rounding]) -> Parameters:
    """The parameters of all rows and groups `[R, G]`."""
    rows = [{k: torch.cat([group[k] for group in part.groups], 1) for k in part.groups[0]} for part in parts]
    return {k: torch.cat([one[k] for one in rows]) for k in rows[0]}
