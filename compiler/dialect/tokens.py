"""Token reduction: x `[B, T, C]` → fewer tokens. Counts are static; the first `protected` tokens are never touched.

Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3. The tokens are split alternately into A (even) and
B (odd); each token of A finds its most similar in B, and the r most similar pairs become one token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.library.custom_op("paretoc::bipartite_match", mutates_args=())
def bipartite_match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """metric `[B, T, D]` → (unmerged `[B, Ta−r]`, source `[B, r]`, destination `[B, r]`), int64.

    `unmerged` (ascending) and `source` index A, `destination` indexes B. Cosine similarity. Among the protected
    leading tokens, those in A never become a source and those in B never a destination.
    """
    return reference_bipartite_match(metric, r, protected)


def check_match(tokens: int, r: int, protected: int) -> None:
    movable, receivers = (tokens + 1) // 2 - (protected + 1) // 2, tokens // 2 - protected // 2
    if receivers <= 0 or not 0 <= r <= movable:
        raise ValueError(
            f"r={r} is out of range: of {tokens} tokens, {protected} protected, "
            f"{max(movable, 0)} may move to {max(receivers, 0)}"
        )


def reference_bipartite_match(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    check_match(metric.shape[1], r, protected)
    metric = normalize(metric.float(), dim=-1)
    in_a, in_b = (protected + 1) // 2, protected // 2
    scores = metric[:, ::2][:, in_a:] @ metric[:, 1::2][:, in_b:].transpose(-1, -2)
    return select_pairs(*scores.max(-1), r, protected)


def select_pairs(best: Tensor, partner: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scores of the movable tokens of A, and their partners among the receivers, `[B, A]` → the result of the
    match: the r best pairs."""
    in_a, in_b = (protected + 1) // 2, protected // 2
    order = torch.sort(best, dim=-1, descending=True, stable=True).indices
    source, rest = order[:, :r], order[:, r:].sort(-1).values
    leading = torch.arange(in_a, device=best.device).expand(best.shape[0], in_a)
    unmerged = torch.cat([leading, rest + in_a], dim=1)
    return unmerged, source + in_a, partner.gather(1, source) + in_b


@bipartite_match.register_fake
def _(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    check_match(metric.shape[1], r, protected)
    batch, half = metric.shape[0], (metric.shape[1] + 1) // 2
    kinds = {"dtype": torch.int64, "device": metric.device}
    return (
        torch.empty(batch, half - r, **kinds),  # type: ignore[call-overload]
        torch.empty(batch, r, **kinds),  # type: ignore[call-overload]
        torch.empty(batch, r, **kinds),  # type: ignore[call-overload]
    )


@torch.library.custom_op("paretoc::merge_tokens", mutates_args=())
def merge_tokens(
    x: Tensor, size: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    """x `[B, T, C]`, size `[B, T, 1]` → x' `[B, T−r, C]`, size' `[B, T−r, 1]`: size-weighted means.

    Unmerged tokens of A come first, then B, so a protected token 0 stays first.
    """
    return reference_merge_tokens(x, size, unmerged, source, destination)


def reference_merge_tokens(
    x: Tensor, size: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    def merge(value: Tensor) -> Tensor:
        a, b = value[:, ::2], value[:, 1::2]
        width = value.shape[-1]
        moved = a.gather(1, source.unsqueeze(-1).expand(-1, -1, width))
        b = b.scatter_add(1, destination.unsqueeze(-1).expand(-1, -1, width), moved)
        return torch.cat([a.gather(1, unmerged.unsqueeze(-1).expand(-1, -1, width)), b], dim=1)

    total = merge(size)
    return merge(x * size) / total, total


@merge_tokens.register_fake
def _(x: Tensor, size: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
    tokens = x.shape[1] - source.shape[1]
    return x.new_empty(x.shape[0], tokens, x.shape[2]), size.new_empty(x.shape[0], tokens, 1)


@torch.library.custom_op("paretoc::keep_tokens", mutates_args=())
def keep_tokens(x: Tensor, scores: Tensor, keep: int, protected: int, fuse: bool) -> Tensor:
    """x `[B, T, C]`, scores `[B, T]` → `[B, protected + keep (+ 1), C]`: the protected and the best tokens, in order.

    With `fuse`, one more token carries the score-weighted sum of those dropped (Liang et al. 2022, EViT, section 3.2).
    """
    return reference_keep_tokens(x, scores, keep, protected, fuse)


def _check_keep(tokens: int, keep: int, protected: int) -> None:
    if not 0 <= keep <= tokens - protected:
        raise ValueError(
            f"keep={keep} is out of range: of {tokens} tokens, {protected} protected, "
            f"{max(tokens - protected, 0)} can be kept"
        )


def reference_keep_tokens(x: Tensor, scores: Tensor, keep: int, protected: int, fuse: bool) -> Tensor:
    _check_keep(x.shape[1], keep, protected)
    order = torch.sort(scores[:, protected:], dim=-1, descending=True, stable=True).indices + protected
    width = x.shape[-1]
    kept, dropped = order[:, :keep].sort(-1).values, order[:, keep:]
    parts = [x[:, :protected], x.gather(1, kept.unsqueeze(-1).expand(-1, -1, width))]
    if fuse:
        weight = scores.gather(1, dropped).unsqueeze(-1)
        parts.append((x.gather(1, dropped.unsqueeze(-1).expand(-1, -1, width)) * weight).sum(1, keepdim=True))
    return torch.cat(parts, dim=1)


@keep_tokens.register_fake
def _(x: Tensor, scores: Tensor, keep: int, protected: int, fuse: bool) -> Tensor:
    _check_keep(x.shape[1], keep, protected)
    return x.new_empty(x.shape[0], protected + keep + int(fuse), x.shape[2])
