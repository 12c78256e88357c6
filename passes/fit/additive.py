"""min tr((W − Ŵ)·H·(W − Ŵ)ᵀ), H = Σ xᵀx, over the codes, codebooks and scales of `Additive`, by turns.

AQLM (Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization", section 3),
without its fine-tuning of blocks. Codes: beam search, one group of weights after the other, every codebook in its
turn, all else fixed. Codebooks: the least squares that the paper approaches by Adam, by conjugate gradients. Scales:
least squares of each row. It starts from the k-means of `encode`, and no step makes the error larger; what is stored
is rounded in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...compiler.encodings import Additive, Arrays, Encoding
from ...compiler.encodings.additive import look_up
from ...compiler.errors import OptionError
from ...compiler.protocols import NO_EVIDENCE, Evidence, found
from ...compiler.sites import Site
from ...compiler.statistics import Hessian, Statistic

#: the most scores of beam search held at a time
_CHUNK = 1 << 24
#: the share of the squared gradient at which conjugate gradients stop: float32 holds no less
_CONVERGED = 1e-9


@dataclass(frozen=True)
class AdditiveFit:
    """`beam` candidates are kept while the codes of a group are searched; 1 is coordinate descent. Rounds of codes,
    codebooks (`steps` conjugate gradients) and scales follow each other until the error shrinks by less than
    `tolerance`, at most `rounds` times. `damp` is the share of the mean of diag(H) that is added to it.
    """

    name: ClassVar[str] = "additive"
    data_free: ClassVar[bool] = False

    beam: int = 1
    rounds: int = 10
    tolerance: float = 0.01
    steps: int = 10
    damp: float = 0.01

    def __post_init__(self) -> None:
        for option, least in (("beam", 1), ("rounds", 1), ("steps", 1), ("damp", 0)):
            if getattr(self, option) < least:
                raise OptionError(
                    f"{option}={getattr(self, option)} is not valid",
                    where="fitter 'additive'",
                    fix=f"use {least} or more",
                )

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(encoding, Additive):
            return None
        return f"fitter 'additive' learns additive codebooks; {encoding} has none"

    def needs(self, site: Site) -> list[Statistic]:
        return [Hessian(site.input.name, site.window)]

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        assert isinstance(encoding, Additive)
        shape = tuple(weight.shape)
        codes, books, scale = encoding.load(encoding.encode(weight), shape)
        problem = Problem(weight.float().reshape(shape[0], -1), damped(found(evidence, Hessian), self.damp))
        answer = Answer(codes.long(), books, scale)
        error = problem.error(answer)
        for _ in range(self.rounds):
            trial = self._round(problem, answer)
            before, reached = error, problem.error(trial)
            if reached < error:
                answer, error = trial, reached
            if not reached < before * (1 - self.tolerance):
                break
        return encoding.store(answer.codes, answer.books, encoding.round_scale(answer.scale))

    def _round(self, problem: Problem, answer: Answer) -> Answer:
        answer = fit_codebooks(problem, answer, self.steps)
        answer = fit_scales(problem, answer)
        return search_codes(problem, answer, self.beam)


@dataclass(frozen=True)
class Answer:
    """Codes int64 `[O, M, G]`, codebooks `[M, L, d]`, scales `[O, 1]`."""

    codes: Tensor
    books: Tensor
    scale: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """Σ_m C_m[code], not yet scaled `[O, K]`."""
        return look_up(self.codes, self.books)


@dataclass(frozen=True)
class Problem:
    """W `[O, K]`, and for each `O / groups` rows the H `[groups, K, K]` of their inputs."""

    weight: Tensor
    hessian: Tensor

    def by_group(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(self.hessian), -1, rows.shape[-1])

    def weigh(self, rows: Tensor) -> Tensor:
        """X `[O, K]` → X·H."""
        return (self.by_group(rows) @ self.hessian).reshape(rows.shape)

    def error(self, answer: Answer) -> float:
        rest = self.weight - answer.rows * answer.scale
        return float((self.weigh(rest).double() * rest).sum())


def damped(hessian: Tensor, share: float) -> Tensor:
    """H `[groups, K, K]` → float32, with a share of the mean of its diagonal added, and that mean 1."""
    hessian = hessian.double()
    mean = hessian.diagonal(dim1=1, dim2=2).mean().clamp(min=torch.finfo(torch.float64).tiny)
    return (hessian / mean + share * torch.eye(hessian.shape[-1], dtype=torch.float64)).float()


def fit_scales(problem: Problem, answer: Answer) -> Answer:
    """The s of each row that minimises (w − s·v)·H·(w − s·v)ᵀ; it stays where that is not positive."""
    weighed = problem.weigh(answer.rows)
    over, under = ((weighed * x).sum(1, keepdim=True) for x in (problem.weight, answer.rows))
    return Answer(answer.codes, answer.books, torch.where((over > 0) & (under > 0), over / under, answer.scale))


def fit_codebooks(problem: Problem, answer: Answer, steps: int) -> Answer:
    """Least squares in the codebooks, by conjugate gradients preconditioned with the diagonal."""
    codes, scale = answer.codes, answer.scale / answer.scale.max()

    def scatter(rows: Tensor) -> Tensor:
        """`[O, K]` → the sum over all places where a code stands `[M, L, d]`: the transpose of `look_up`."""
        groups = rows.reshape(-1, answer.books.shape[-1])
        total = torch.zeros_like(answer.books)
        for m, book in enumerate(total):
            book.index_add_(0, codes[:, m].flatten(), groups)
        return total

    diagonal = problem.by_group(torch.ones_like(problem.weight)) * problem.hessian.diagonal(dim1=1, dim2=2)[:, None]
    condition = scatter(scale.square() * diagonal.reshape(problem.weight.shape))
    condition = torch.where(condition > 0, condition, 1.0)  # an entry that no code uses stays
    books = answer.books
    rest = scatter(scale.square() * problem.weigh(problem.weight / answer.scale - answer.rows))
    direction = rest / condition
    size = (rest * direction).sum()
    least = _CONVERGED * size
    for _ in range(steps):
        if size <= least:  # what is left is rounding, and several codebooks have directions that change nothing
            break
        image = scatter(scale.square() * problem.weigh(look_up(codes, direction)))
        step = size / (direction * image).sum()
        books = books + step * direction
        rest = rest - step * image
        scaled = rest / condition
        before, size = size, (rest * scaled).sum()
        direction = scaled + size / before * direction
    return Answer(codes, books, answer.scale)


def search_codes(problem: Problem, answer: Answer, beam: int) -> Answer:
    """New codes for one group of weights after the other. Rows do not meet: they are searched in chunks."""
    weight, codes = problem.by_group(problem.weight / answer.scale), answer.codes
    codes = codes.reshape(*weight.shape[:2], *codes.shape[1:])
    size = max(1, _CHUNK // (len(weight) * beam * answer.books.shape[1]))
    found = [
        _search(part, problem.hessian, answer.books, old.clone(), beam)
        for part, old in zip(torch.split(weight, size, 1), torch.split(codes, size, 1), strict=True)
    ]
    return Answer(torch.cat(found, 1).reshape(answer.codes.shape), answer.books, answer.scale)


def _search(weight: Tensor, hessian: Tensor, books: Tensor, codes: Tensor, beam: int) -> Tensor:
    """W, scaled, `[groups, o, K]`, codes `[groups, o, M, G]` → better codes.

    With v the values of one group of weights and B the block of H there, the error is v·B·vᵀ − 2·v·l and a constant,
    l = ((W − Ŵ)·H there) + v₀·B.
    """
    count, places = codes.shape[2:]
    width, entries = books.shape[-1], books.shape[1]
    values = look_up(codes.flatten(0, 1), books).reshape(weight.shape)
    pull = (weight - values) @ hessian
    for place in range(places):
        span = slice(place * width, (place + 1) * width)
        block, old = hessian[:, span, span], values[..., span]
        linear = (pull[..., span] + old @ block).unsqueeze(2)
        chosen, sums = codes[..., None, :, place], old.unsqueeze(2)  # of each candidate: [groups, o, beam, M or d]
        for m in range(count):
            base = sums - books[m][chosen[..., m]]
            rest = linear - (base.flatten(1, 2) @ block).reshape(base.shape)
            scores = -(base * (linear + rest)).sum(-1, keepdim=True) - 2 * rest @ books[m].T
            scores += ((books[m] @ block) * books[m]).sum(-1)[:, None, None]
            best = scores.flatten(2).topk(min(beam, scores.shape[2] * entries), largest=False).indices
            parent, code = (best // entries).unsqueeze(-1), best % entries
            chosen = chosen.gather(2, parent.expand(-1, -1, -1, count))
            chosen[..., m] = code
            sums = base.gather(2, parent.expand(-1, -1, -1, width)) + books[m][code]
        codes[..., place] = chosen[:, :, 0]
        pull -= (sums[:, :, 0] - old) @ hessian[:, span]
    return codes
