"""(counts, edges) → (low, high): which range of an activation its codes shall cover, found on a `Histogram` of it.

| range | what it minimises or keeps |
|---|---|
| minmax | nothing is clipped |
| percentile(p) | p % of the values, as many left out at either end |
| mse | Σ_c ‖W_:c‖²·(q(x_c) − x_c)²: rounding against clipping, as the layers that read channel c see them |
| entropy | KL(P ‖ Q), P the distribution clipped, Q the same under the codes |

The entropy search is that of TensorRT (Migacz 2017, "8-bit Inference with TensorRT") for a range on both sides of 0.
Values that are 0 do not count, and every range contains 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..compiler.dialect.activations import affine_parameters, reference_fake_quantize
from ..compiler.errors import OptionError, did_you_mean

#: (counts float64 `[N]`, edges float64 `[N + 1]`) → float32 `[2]`
Range = Callable[[Tensor, Tensor], Tensor]

_LEVELS = 256
#: shares of the full range that are tried
_SHARES = torch.arange(1, 129, dtype=torch.float64) / 128
_ROUNDS = 4


def mirrored(counts: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The histogram of x and −x together; values are spread evenly in a bin."""
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    both = torch.cat([edges, -edges]).sort().values
    inside = torch.from_numpy(np.interp(both, edges, below)).diff()
    return inside + inside.flip(0), both


def minmax(counts: Tensor, edges: Tensor) -> Tensor:
    """The least and the greatest value."""
    return edges[[0, -1]].float()


def percentile(counts: Tensor, edges: Tensor, percent: float = 99.999) -> Tensor:
    """The range that leaves (100 − percent)/2 % of the values out at either end; values are spread evenly in a bin."""
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tail = below[-1] * (1 - percent / 100) / 2
    low, high = _position(below, edges, tail), _position(below, edges, below[-1] - tail)
    return torch.stack([low.clamp(max=0), high.clamp(min=0)]).float()


def _position(below: Tensor, edges: Tensor, rank: Tensor) -> Tensor:
    """Where `rank` values lie below."""
    bin = int(torch.searchsorted(below, rank).clamp(1, len(edges) - 1))
    inside = (rank - below[bin - 1]) / (below[bin] - below[bin - 1]).clamp(min=1e-300)
    return edges[bin - 1] + inside * (edges[bin] - edges[bin - 1])


def mse(counts: Tensor, edges: Tensor) -> Tensor:
    """The range with the least squared error: each end in turn, a few times, over shares of the least or greatest
    value."""
    full, bounds = minmax(counts, edges), minmax(counts, edges)
    for end in [0, 1] * _ROUNDS:
        candidates = bounds.repeat(len(_SHARES), 1)
        candidates[:, end] = full[end] * _SHARES
        bounds = candidates[squared_errors(counts, edges, candidates).argmin()]
    return bounds


def squared_errors(counts: Tensor, edges: Tensor, candidates: Tensor) -> Tensor:
    """Σ counts·(q(x) − x)² under each range of `[A, 2]`, x the middle of a bin: float64 `[A]`."""
    used = counts > 0
    middles = ((edges[:-1] + edges[1:]) / 2)[used].float()
    scale, zero = affine_parameters(candidates[:, :1], candidates[:, 1:])
    return (reference_fake_quantize(middles, scale, zero) - middles).double().square() @ counts[used]


def entropy(counts: Tensor, edges: Tensor) -> Tensor:
    """The range −t … t, of which only what holds values, under whose codes the distribution changes least."""
    full, reach = (0, len(counts)), edges.abs().max()
    cuts = [tuple(torch.searchsorted(edges, reach * share * edges.new_tensor([-1, 1])).tolist()) for share in _SHARES]
    tried = [(start, min(stop, len(counts))) for start, stop in cuts if stop - start > _LEVELS]
    start, stop = min([full, *tried], key=lambda cut: divergence(counts, *cut))
    return edges[[start, stop]].float()


def divergence(counts: Tensor, start: int, stop: int) -> float:
    """KL(P ‖ Q) over bins start … stop: P holds what is clipped in its outermost bins; Q spreads the count of each
    code, without what is clipped, over the bins of the code that are not empty in P."""
    inside, size = counts[start:stop], stop - start
    clipped = inside.clone()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    code = torch.arange(size) * _LEVELS // size
    full = (clipped > 0).double()
    total, bins = (counts.new_zeros(_LEVELS).index_add_(0, code, x) for x in (inside, full))
    spread = (total / bins.clamp(min=1))[code] * full
    p, q = (x[clipped > 0] / x.sum().clamp(min=1) for x in (clipped, spread))
    return float((p * (p / q).log()).sum())


_RANGES = {"minmax": minmax, "percentile": percentile, "mse": mse, "entropy": entropy}


def parse_range(text: str) -> Range:
    """A range by name; "percentile(99.9)" with its number. Raises OptionError."""
    name, bracket, number = text.partition("(")
    if name not in _RANGES:
        raise OptionError(f"there is no range {text!r}", where="range=", fix=did_you_mean(name, _RANGES))
    if not bracket:
        return _RANGES[name]
    percent = _percent(number.removesuffix(")")) if name == "percentile" and number.endswith(")") else None
    if percent is None:
        raise OptionError(
            f"{text!r} is not a range", where="range=", fix="write percentile(99.99), a number above 0 and up to 100"
        )
    return partial(percentile, percent=percent)


def _percent(text: str) -> float | None:
    try:
        percent = float(text)
    except ValueError:
        return None
    return percent if 0 < percent <= 100 else None
