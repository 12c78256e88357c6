"""What each channel of an axis is worth: the less, the sooner it may leave.

A criterion gives float64 `[channels]`, at least 0, that add up over the channels that leave and may be compared between
axes. W `[O, K]` is the weight of a layer that reads the axis, a `[K]` its inputs, and j runs over the columns of a
channel: one for a linear layer, those of its kernel positions for a convolution, of its whole width for a head.

    magnitude    Σ w² over every weight along the axis, as a share       Fang et al. 2023, DepGraph, section 3.3
    activation   Σ_j (E|a_j|·‖W[:, j]‖)², as a share                    Sun et al. 2024, Wanda, for whole channels
    taylor       Σ |w·∂L/∂w| over every weight along the axis           Molchanov et al. 2019, first order
    hessian      tr(W_J·([H⁻¹]_JJ)⁻¹·W_Jᵀ) / ‖Wa‖², H = Σ aaᵀ          Hassibi & Stork 1993, OBS; Kurtic et al. 2023
    random       seeded
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from .axes import Axis, Use
from .axis_terms import places
from .calibrate import FlatBatch, Stream
from .cholesky import inverse_factor
from .errors import PassError
from .program import Program, describe
from .sites import Site, site_of
from .statistics import ChannelMean, Hessian, Statistic

#: (flat outputs of the program, number of the calibration batch) → a scalar
Loss = Callable[[Sequence[Tensor], int], Tensor]


@runtime_checkable
class Criterion(Protocol):
    """How the channels of an axis are ranked. A frozen dataclass; its fields are options."""

    @property
    def name(self) -> str:
        """How `criterion=` names it."""

    @property
    def data_free(self) -> bool:
        """Whether it looks at nothing but the weights."""

    def refuse(self, axis: Axis) -> str | None:
        """Why this criterion cannot rank the channels of that axis, or None when it can."""

    def needs(self, axis: Axis) -> list[Statistic]:
        """The statistics of calibration data it wants for this axis; none when it needs no data."""

    def score(self, axis: Axis, found: Mapping[Statistic, Any]) -> Tensor:
        """What each channel is worth, float64 `[channels]`. `found` holds what it needs."""


def measure(
    axes: Sequence[Axis],
    criterion: Criterion,
    batches: Iterable[FlatBatch],
    track: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, _: items,
) -> dict[Axis, Tensor]:
    """What each channel of these axes of one program is worth, float64 `[channels]`.

    The batches advance through the program once; statistics are held for one axis at a time. Raises PassError for an
    axis that the criterion refuses.
    """
    groups: dict[tuple[Statistic, ...], list[Axis]] = defaultdict(list)
    for axis in axes:
        if reason := criterion.refuse(axis):
            raise PassError(reason, where=f"ranking {axis}", fix="use another criterion=, or leave the axis out")
        groups[tuple(criterion.needs(axis))].append(axis)
    if not groups:
        return {}
    scores = {axis: criterion.score(axis, {}) for axis in groups.pop((), [])}
    program = axes[0].program
    nodes = {node.name: node for node in program.graph.nodes}
    first = {needs: min(nodes[str(name)] for s in needs for name in s.nodes) for needs in groups}
    stream = Stream(program, batches if groups else [])
    for needs in track(sorted(groups, key=first.__getitem__), f"ranking by {criterion.name}"):
        found = stream.advance(first[needs], needs)
        scores |= {axis: criterion.score(axis, found) for axis in groups[needs]}
    return scores


@dataclass(frozen=True)
class Reader:
    """A linear layer or convolution that sums over an axis, which lies in dimension 1 of its weight as `use` says. Its
    matrix W `[O, K]` has a column for each of these places and kernel positions."""

    site: Site
    use: Use

    @classmethod
    def of(cls, axis: Axis, node: fx.Node) -> Reader | None:
        """None for an operator of another kind."""
        site = site_of(axis.program, node)
        if site is None or site.kind not in ("linear", "conv"):
            return None
        name = axis.program.weight_name(site.weight)
        use = next((u for u in axis.uses if u.parameter == name and u.dim == 1 and u.sums), None)
        return None if use is None else cls(site, use)

    def weight(self, program: Program) -> Tensor:
        """W, float64, of each group of a convolution `[G, O/G, K]`."""
        groups = self.site.window.groups if self.site.window else 1
        return program.weight_value(self.site.weight).double().reshape(groups, -1, prod(self.site.shape[1:]))

    def hessian(self) -> Hessian:
        """Of its inputs, with a column of ones where it has a bias."""
        return Hessian(self.site.input.name, self.site.window, self.site.bias is not None)

    def columns(self) -> Tensor:
        """The columns of each channel, int64 `[channels, columns of one]`: as many for all."""
        channels = self.use.channels.repeat_interleave(prod(self.site.shape[2:]))
        order = channels.argsort(stable=True)[int((channels < 0).sum()) :]
        return order.reshape(int(channels.max()) + 1, -1)

    def kept(self, orders: Mapping[Axis, Tensor]) -> Tensor:
        """The columns that are left when these axes keep these channels, int64 `[n]`."""
        kernel = prod(self.site.shape[2:])
        left = places(self.use.whole, {axis.atom: order for axis, order in orders.items()})
        return (left[:, None] * kernel + torch.arange(kernel)).flatten()


def readers(axis: Axis) -> list[Reader]:
    """The layers that sum over an axis. Raises PassError when one is neither linear nor a convolution."""
    if reason := unread(axis):
        raise PassError(reason, where=f"reading {axis}", fix="use an axis that linear layers or convolutions read")
    return [reader for node in axis.readers if (reader := Reader.of(axis, node)) is not None]


def unread(axis: Axis) -> str | None:
    """Why the inputs of what reads an axis say nothing about it, or None."""
    if not axis.readers:
        return f"no layer sums over {axis} with a weight"
    other = next((node for node in axis.readers if Reader.of(axis, node) is None), None)
    if other is None:
        return None
    return f"{axis} is read by {describe(other)}, which is neither a linear layer nor a convolution"


class _OfWeights:
    """Ranks by the values along the axis alone."""

    def refuse(self, axis: Axis) -> str | None:
        return None

    def needs(self, axis: Axis) -> list[Statistic]:
        return []


@dataclass(frozen=True)
class Magnitude(_OfWeights):
    """The squared norm of all weights of a channel, in every layer along the axis; the channels sum to 1."""

    name: ClassVar[str] = "magnitude"
    data_free: ClassVar[bool] = True

    def score(self, axis: Axis, found: Mapping[Statistic, Any]) -> Tensor:
        return _share(_along(axis, lambda name: axis.program.get(name).detach().double().square()))


@dataclass(frozen=True)
class Random(_OfWeights):
    """A random order, another for each axis, the same for the same seed; the channels sum to 1."""

    name: ClassVar[str] = "random"
    data_free: ClassVar[bool] = True

    seed: int = 0

    def score(self, axis: Axis, found: Mapping[Statistic, Any]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {axis.name}".encode()))
        return _share(torch.rand(axis.size, generator=generator, dtype=torch.float64))


@dataclass(frozen=True)
class Activation:
    """The size of what a channel brings into the layers that read it; the channels sum to 1."""

    name: ClassVar[str] = "activation"
    data_free: ClassVar[bool] = False

    def refuse(self, axis: Axis) -> str | None:
        return unread(axis)

    def needs(self, axis: Axis) -> list[Statistic]:
        return [self._mean(reader) for reader in readers(axis)]

    def score(self, axis: Axis, found: Mapping[Statistic, Any]) -> Tensor:
        total = torch.zeros(axis.size, dtype=torch.float64)
        for reader in readers(axis):
            columns = reader.weight(axis.program).square().sum(1)
            brought = (columns * found[self._mean(reader)].double().square()).sum(0)
            total += brought[reader.columns()].sum(1)
        return _share(total)

    def _mean(self, reader: Reader) -> ChannelMean:
        return ChannelMean(reader.site.input.name, reader.site.window)


@dataclass(frozen=True)
class Obs:
    """The squared error at the layers that read a channel when it leaves and their other weights, and biases, make up
    for it as well as they can; as a share of the squares of their outputs (about the mean, where there is a bias).

    The least important channels leave in `rounds`, as many in each, and what is left is ranked anew, with the weights
    that have made up for it; 1 ranks all at once. `damp` is the share of the mean of diag(H) that is added to it.
    """

    name: ClassVar[str] = "hessian"
    data_free: ClassVar[bool] = False

    rounds: int = 16
    damp: float = 1e-4

    def refuse(self, axis: Axis) -> str | None:
        return unread(axis)

    def needs(self, axis: Axis) -> list[Statistic]:
        return [reader.hessian() for reader in readers(axis)]

    def score(self, axis: Axis, found: Mapping[Statistic, Any]) -> Tensor:
        parts = [
            _Removal(weight, gram, reader.columns(), energy, self.damp)
            for reader in readers(axis)
            for weight, gram, energy in _parts(reader.weight(axis.program), found[reader.hessian()])
        ]
        score, left = torch.zeros(axis.size, dtype=torch.float64), torch.arange(axis.size)
        least = 0.0
        while len(left):
            errors = torch.stack([part.errors(left) for part in parts]).sum(0)
            leave = errors.argsort(stable=True)[: -(-axis.size // self.rounds)]
            # what leaves later is worth more, whatever it costs by then
            score[left[leave]] = errors[leave].clamp(min=least)
            least = float(score[left[leave]].max()) * (1 + 1e-9)
            for part in parts:
                part.remove(left[leave])
            left = left[torch.ones(len(left), dtype=torch.bool).index_fill(0, leave, False)]
        return score


def _parts(weights: Tensor, grams: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The groups of a layer, W `[O, K]` and H, each with the squares of all their outputs."""
    energy = sum(float(((w @ _centred(h, w.shape[1])) * w).sum()) for w, h in zip(weights, grams, strict=True))
    for weight, gram in zip(weights, grams, strict=True):
        yield weight, gram, energy if energy > 0 else 1.0


class _Removal:
    """W `[O, K]` and H⁻¹ of a layer whose channels, `columns` `[C, n]`, leave one after the other."""

    def __init__(self, weight: Tensor, gram: Tensor, columns: Tensor, energy: float, damp: float) -> None:
        bias = len(gram) - weight.shape[1]
        self.weight = torch.nn.functional.pad(weight, (0, bias))  # what a bias is does not matter
        self.weight[:, gram.diagonal() == 0] = 0.0  # what is never there costs nothing
        factor = inverse_factor(gram, damp)[0].flip(0, 1)
        self.inverse = factor.T @ factor
        self.columns, self.energy = columns, energy

    def errors(self, channels: Tensor) -> Tensor:
        """What each of these costs if it leaves next, float64 `[channels]`."""
        columns = self.columns[channels]
        lower = torch.linalg.cholesky(self.inverse[columns[:, :, None], columns[:, None, :]])
        solved = torch.linalg.solve_triangular(lower, self.weight.T[columns], upper=False)
        error: Tensor = solved.square().sum((1, 2)) / self.energy
        return error

    def remove(self, channels: Tensor) -> None:
        """These leave, and the other weights make up for them."""
        columns = self.columns[channels].flatten()
        lower = torch.linalg.cholesky(self.inverse[columns][:, columns])
        shares = torch.cholesky_solve(self.inverse[columns], lower)
        self.weight -= self.weight[:, columns] @ shares
        self.inverse -= self.inverse[:, columns] @ shares


def _centred(gram: Tensor, width: int) -> Tensor:
    """Σ aaᵀ `[K, K]`, about the mean where H has a column of ones."""
    if len(gram) == width:
        return gram
    sums = gram[-1, :width]
    return gram[:width, :width] - torch.outer(sums, sums) / gram[-1, -1]


@dataclass(frozen=True)
class Taylor:
    """How much a loss changes to first order when the weights of a channel go to zero, each for itself: Σ |w·∂L/∂w|,
    the mean over batches.

    `loss` is given the flat outputs and the number of the calibration batch. By default it is Σ r·y over all floating
    outputs with random signs r, drawn from `seed`: it asks for no labels, and E(∂L/∂w)² is the diagonal of the
    Gauss–Newton matrix of Σ y².
    """

    name: ClassVar[str] = "taylor"
    data_free: ClassVar[bool] = False

    loss: Loss | None = None
    seed: int = 0

    def refuse(self, axis: Axis) -> str | None:
        return None

    def needs(self, axis: Axis) -> list[Statistic]:
        inputs = tuple(node.name for node in axis.program.placeholders)
        return [_FirstOrder(inputs[0], inputs, self.seed, axis.program, self.loss)]

    def score(self, axis: Axis, found: Mapping[Statistic, Any]) -> Tensor:
        (moved,) = (found[need] for need in self.needs(axis))
        return _along(axis, moved.__getitem__)


@dataclass(frozen=True)
class _FirstOrder(Statistic):
    """|w·∂L/∂w| of every weight, float64, by name: the mean over batches."""

    inputs: tuple[str, ...]
    seed: int
    program: Program = field(compare=False)
    loss: Loss | None = field(compare=False)

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.inputs

    def update(self, state: Any, *values: Tensor) -> Any:
        totals: dict[str, Any] = state[0] if state else {}
        count = state[1] if state else 0
        weights = {n: w.detach().clone() for n, w in self.program.weights().items() if w.is_floating_point()}
        with torch.enable_grad():
            leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
            outputs = torch.func.functional_call(self.program.module, leaves, tuple(values))
            loss = self._random(outputs, count) if self.loss is None else self.loss(outputs, count)
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for (name, weight), gradient in zip(leaves.items(), gradients, strict=True):
            totals[name] = totals.get(name, 0.0) + (weight.detach() * gradient).abs().double()
        return totals, count + 1

    def finish(self, state: Any) -> dict[str, Tensor]:
        totals, count = state
        return {name: total / count for name, total in totals.items()}

    def _random(self, outputs: Sequence[Tensor], batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + batch)
        floating = [y for y in outputs if y.is_floating_point()]
        signs = [torch.randint(0, 2, y.shape, generator=generator) * 2 - 1 for y in floating]
        return torch.stack([(y * r).sum() for y, r in zip(floating, signs, strict=True)]).sum()


def _along(axis: Axis, values: Callable[[str], Tensor]) -> Tensor:
    """Values of each weight along an axis, summed to its channels, float64 `[channels]`."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for use in axis.uses:
        if axis.program.get(use.parameter).is_floating_point():
            places = values(use.parameter).movedim(use.dim, 0).reshape(len(use.channels), -1).sum(1)
            held = use.channels >= 0
            total.index_add_(0, use.channels[held], places[held])
    return total


def _share(values: Tensor) -> Tensor:
    return values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
