"""W → scale_c(o)·table_c(o)[code]: rows of similar weights share a codebook, or share a scale under one codebook.

Yvinec et al. 2023, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings" (JLCM).
Rows are clustered by their distributions: by k-means of their quantile functions, whose distance is the 2-Wasserstein
distance; under one codebook, of the logarithm of their mean square. Codebooks begin as weighted k-means. Codebooks and
codes are then learned together so that the output of the layer stays, under the proximal rule: a code may only move to
a neighbour in the sorted codebook.

The paper permutes rows, so that clusters lie together; that costs nothing only where the consumer of the layer absorbs
the permutation. Here rows stay in their places and each stores the index of its cluster, one byte a row. The paper
descends by stochastic gradients; here the loss is the quadratic tr((W − Ŵ)·H·(W − Ŵ)ᵀ) of all data at once, H = Σ xᵀx,
and every step is exact: columns of codes, codebooks along their preconditioned gradient, scales. Lossy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..compiler.encodings import Arrays, Codebook, Encoding, Fit, pack, packed_size, unpack
from ..compiler.errors import OptionError, did_you_mean
from ..compiler.passes import Context, PassResult, Phase
from ..compiler.program import Program
from ..compiler.protocols import NO_EVIDENCE, Evidence
from ..compiler.reencode import EncodePass, inside
from ..compiler.sites import Site
from ..compiler.statistics import Hessian, Statistic
from .descent import Layer

#: points of a quantile function, rounds of k-means over rows, and of codebook and scales by turns
_QUANTILES, _KMEANS_ROUNDS, _SCALE_ROUNDS = 32, 50, 5
#: the least mean square of a row that counts, where the largest weight is 1
_LEAST_POWER = 1e-12
#: gradient steps of the codebooks in each round
_STEPS = 3


@dataclass(frozen=True)
class ClusteredCodebook(Encoding):
    """`per="codebook"`: each cluster of rows has a codebook; `per="scale"`: one codebook, a scale for each cluster.

    Stored: `codes` uint8 `[O, ceil(I·bits/8)]`, packed; `cluster` uint8 `[O]`; `table` float32 `[C, 2^bits]`, or
    `[1, 2^bits]` and `scale` float32 `[C]`. C is `clusters`, or O where that is less.
    """

    bits: int = 3
    clusters: int = 8
    per: str = "codebook"
    summary: ClassVar[str] = "clustered codebooks"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise OptionError(
                f"ClusteredCodebook has 1 to 8 bits, not {self.bits}",
                where="ClusteredCodebook(bits=…)",
                fix="use 1 … 8",
            )
        if not 1 <= self.clusters <= 256:
            raise OptionError(
                f"ClusteredCodebook has 1 to 256 clusters, not {self.clusters}",
                where="ClusteredCodebook(clusters=…)",
                fix="use 1 … 256: the cluster of a row is one byte",
            )
        if self.per not in ("codebook", "scale"):
            raise OptionError(
                f"per={self.per!r} is not known",
                where="ClusteredCodebook(per=…)",
                fix=did_you_mean(self.per, ("codebook", "scale")),
            )

    def count(self, shape: tuple[int, ...]) -> int:
        """C."""
        return min(self.clusters, shape[0])

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        columns, count, entries = packed_size(prod(shape[1:]), self.bits), self.count(shape), 1 << self.bits
        arrays: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((shape[0], columns), torch.uint8),
            "cluster": ((shape[0],), torch.uint8),
        }
        if self.per == "codebook":
            return arrays | {"table": ((count, entries), torch.float32)}
        return arrays | {"table": ((1, entries), torch.float32), "scale": ((count,), torch.float32)}

    def encode(self, weight: Tensor, fit: Fit | None = None) -> Arrays:
        if fit is not None:
            return fit(self, weight)
        return self.store(self.learn(weight))

    def decode(self, arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
        table = arrays["table"] * arrays["scale"].unsqueeze(1) if self.per == "scale" else arrays["table"]
        first = (arrays["cluster"].int() << self.bits).unsqueeze(1)  # of each row, all tables in a line
        places = first + unpack(arrays["codes"], self.bits, prod(shape[1:]))
        return table.flatten().index_select(0, places.flatten()).reshape(shape)

    def learn(self, weight: Tensor, importance: Tensor | None = None) -> Learned:
        """Clusters and weighted k-means: a small Σ importance · (w − ŵ)², `importance` `[O, I]`."""
        rows = weight.double().reshape(len(weight), -1)
        peak = float(rows.abs().max()) or 1.0
        rows = rows / peak
        importance = torch.ones_like(rows) if importance is None else importance.double()
        count = self.count(tuple(weight.shape))
        cluster = cluster_rows(self._features(rows), count)
        if self.per == "codebook":
            table = torch.zeros(count, 1 << self.bits, dtype=rows.dtype)
            for c in set(cluster.tolist()):
                table[c] = self._kmeans(rows[cluster == c], importance[cluster == c])
            return Learned.nearest(rows, cluster, table, torch.ones(count, dtype=rows.dtype)).times(table=peak)
        scale = _ratio(_total(rows.square(), cluster, count), _total(torch.ones_like(rows), cluster, count)).sqrt()
        for _ in range(_SCALE_ROUNDS):
            own = scale[cluster].unsqueeze(1)
            table = self._kmeans(rows / own, importance * own.square()).unsqueeze(0)
            values = Learned.nearest(rows, cluster, table, scale).values
            fitted = (_total(importance * values * x, cluster, count) for x in (rows, values))
            scale = scale * _ratio(*fitted)
        return Learned.nearest(rows, cluster, table, scale).times(scale=peak)

    def _features(self, rows: Tensor) -> Tensor:
        """What similar rows `[O, I]` have alike `[O, F]`: quantiles, or the magnitude when only that is made up for."""
        if self.per == "scale":
            return rows.square().mean(1, keepdim=True).clamp(min=_LEAST_POWER).log()
        places = torch.linspace(0, 1, _QUANTILES + 2, dtype=rows.dtype)[1:-1]
        return rows.quantile(places, dim=1).T

    def _kmeans(self, values: Tensor, importance: Tensor) -> Tensor:
        """`[R, n]` → an ascending table `[2^bits]`."""
        codebook = Codebook(self.bits, scale="none")
        grouped, ones = values.float().unsqueeze(1), torch.ones(len(values), 1)
        return codebook.learn(grouped, ones, importance.unsqueeze(1))["table"][0, 0].double()

    def store(self, learned: Learned) -> Arrays:
        arrays = {"codes": pack(learned.codes, self.bits), "cluster": learned.cluster.to(torch.uint8)}
        arrays["table"] = learned.table.float()
        return arrays | ({"scale": learned.scale.float()} if self.per == "scale" else {})


@dataclass(frozen=True)
class Learned:
    """`codes` int64 `[O, I]`, `cluster` int64 `[O]`, `table` `[C, 2^bits]` or `[1, 2^bits]`, each ascending, `scale`
    `[C]`: ones, or the scales of the clusters. Tables and scales are float64, and not yet as they are stored."""

    codes: Tensor
    cluster: Tensor
    table: Tensor
    scale: Tensor

    @classmethod
    def nearest(cls, rows: Tensor, cluster: Tensor, table: Tensor, scale: Tensor) -> Learned:
        """Codes of the nearest values, for rows `[O, I]`."""
        own = (table * scale.unsqueeze(1))[cluster]
        return cls(_nearest(rows, own), cluster, table, scale)

    @property
    def tables(self) -> Tensor:
        """The values of each row `[O, 2^bits]`."""
        return (self.table * self.scale.unsqueeze(1))[self.cluster]

    @property
    def values(self) -> Tensor:
        """Ŵ `[O, I]`."""
        return self.tables.gather(1, self.codes)

    def times(self, table: float = 1.0, scale: Tensor | float = 1.0) -> Learned:
        return replace(self, table=self.table * table, scale=self.scale * scale)

    def sorted(self) -> Learned:
        """The same values, in ascending tables."""
        table, order = self.table.sort(-1)
        rank = order.argsort(-1).expand(len(self.scale), -1)
        return replace(self, table=table, codes=rank[self.cluster].gather(1, self.codes))


def cluster_rows(features: Tensor, count: int) -> Tensor:
    """Clusters 0 … count − 1 of rows by their features `[O, F]`, int64 `[O]`; some may be empty.

    k-means that begins with equal parts, in the order of ‖features‖: nothing is drawn.
    """
    order = features.square().sum(1).sort(stable=True).indices
    cluster = torch.empty_like(order)
    cluster[order] = torch.arange(len(order)) * count // len(order)
    for _ in range(_KMEANS_ROUNDS):
        sizes = torch.bincount(cluster, minlength=count).unsqueeze(1)
        centres = torch.zeros(count, features.shape[1], dtype=features.dtype).index_add_(0, cluster, features)
        distances = torch.cdist(features, centres / sizes.clamp(min=1)).masked_fill(sizes.T == 0, torch.inf)
        before, cluster = cluster, distances.argmin(1)
        if torch.equal(before, cluster):
            break
    return cluster


def _nearest(values: Tensor, tables: Tensor) -> Tensor:
    """The index of the nearest entry of ascending tables `[…, 2^bits]` for values `[…, n]`."""
    return torch.searchsorted((tables[..., 1:] + tables[..., :-1]).contiguous() / 2, values.contiguous())


def _total(terms: Tensor, part: Tensor, parts: int) -> Tensor:
    """Σ over each part of the rows `[parts]`; terms `[O, I]`."""
    return torch.zeros(parts, dtype=terms.dtype).index_add_(0, part, terms.sum(1))


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over / under, or 1 where that is not a positive number."""
    return torch.where((over > 0) & (under > 0), over / under, 1.0)


@dataclass(frozen=True)
class JlcmFit:
    """Codes, codebooks and scales of a `ClusteredCodebook`, by turns, until the error shrinks by less than `tolerance`,
    at most `rounds` times; never worse than its `encode`.

    `reach` is how far a code may move in a sweep over the columns: 1, the proximal rule; 0 keeps the codes. Steps are
    exact, so that none jumps to an extreme: without the rule the error is the same within 1.5 %, where learned codes
    make it a third of what codebooks alone do. `damp` is the share of the mean of diag(H) that is added to it.
    """

    name: ClassVar[str] = "jlcm"
    data_free: ClassVar[bool] = False

    rounds: int = 20
    tolerance: float = 1e-3
    reach: int = 1
    damp: float = 0.01

    def __post_init__(self) -> None:
        for option, least in (("rounds", 1), ("tolerance", 0), ("reach", 0), ("damp", 0)):
            if not getattr(self, option) >= least:
                raise OptionError(
                    f"{option}={getattr(self, option)} is not valid", where="fitter 'jlcm'", fix=f"use {least} or more"
                )

    def refuse(self, encoding: Encoding) -> str | None:
        if isinstance(encoding, ClusteredCodebook):
            return None
        return f"fitter 'jlcm' learns the tables of ClusteredCodebook; {encoding} has none"

    def needs(self, site: Site) -> list[Statistic]:
        return [Hessian(site.input.name, site.window)]

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        assert isinstance(encoding, ClusteredCodebook)
        layer = Layer(weight, evidence, self.damp)
        learned = encoding.learn(weight, layer.rows(layer.curvature))
        error = layer.error(layer.columns(learned.values))
        values = layer.weight  # in the first sweep, columns still to come stand at the weights, not at codes
        for _ in range(self.rounds):
            learned = self._move_codes(layer, learned, values)
            for _ in range(_STEPS):
                learned = _move_tables(layer, learned)
            if encoding.per == "scale":
                learned = _move_scales(layer, learned)
            learned = learned.sorted()
            values = layer.columns(learned.values)
            before, error = error, layer.error(values)
            if error >= before * (1 - self.tolerance):
                break
        exact, shape = Layer(weight, evidence), tuple(weight.shape)
        choices = [encoding.store(learned), encoding.encode(weight)]
        return min(choices, key=lambda arrays: exact.error(exact.columns(encoding.decode(arrays, shape).double())))

    def _move_codes(self, layer: Layer, learned: Learned, values: Tensor) -> Learned:
        """Every column of codes once, each code to the best within reach; Ŵ begins with other values `[g, K, o]`."""
        codes = layer.columns(learned.codes)
        tables = learned.tables.reshape(codes.shape[0], codes.shape[2], -1)

        def choose(column: int, target: Tensor) -> Tensor:
            old = codes[:, column]
            best = _nearest(target.unsqueeze(-1), tables).squeeze(-1)
            codes[:, column] = torch.minimum(torch.maximum(best, old - self.reach), old + self.reach)
            return tables.gather(-1, codes[:, column].unsqueeze(-1)).squeeze(-1)

        layer.sweep(values, choose)
        return replace(learned, codes=layer.rows(codes))


def _move_tables(layer: Layer, learned: Learned) -> Learned:
    """One step of every codebook along its gradient, each entry under its own curvature; the best length."""
    own = learned.scale[learned.cluster].unsqueeze(1)
    part = learned.cluster if len(learned.table) > 1 else torch.zeros_like(learned.cluster)
    places = (part.unsqueeze(1) * learned.table.shape[1] + learned.codes).flatten()
    slope = layer.slope(layer.columns(learned.values))
    down, curvature = (
        torch.zeros(learned.table.numel(), dtype=own.dtype).index_add_(0, places, terms.flatten())
        for terms in (-layer.rows(slope) * own, layer.rows(layer.curvature) * own.square())
    )
    change = torch.where(curvature > 0, down / curvature, 0.0).reshape(learned.table.shape)
    direction = layer.columns(change[part].gather(1, learned.codes) * own)
    lengths = layer.steps(slope, direction, part, len(change))
    return replace(learned, table=learned.table + lengths.unsqueeze(1) * change)


def _move_scales(layer: Layer, learned: Learned) -> Learned:
    """The best scale of every cluster; it stays where that is not positive."""
    values = layer.columns(learned.values)
    factor = 1 + layer.steps(layer.slope(values), values, learned.cluster, len(learned.scale))
    return learned.times(scale=torch.where(factor > 0, factor, 1.0))


@dataclass(frozen=True)
class Jlcm(EncodePass):
    """Store each weight as `ClusteredCodebook(bits, clusters, per)`, learned from calibration data.

    Layers are fitted in order, each to the inputs that the layers already encoded give it, in at most `rounds` rounds.
    Weights that something else reads too (an embedding), that are encoded already, or that follow an N:M pattern, are
    left and listed.
    """

    name: ClassVar[str] = "jlcm"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    positional: ClassVar[str | None] = "bits"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    needs_calibration: ClassVar[bool] = True

    bits: int = 3
    clusters: int = 8
    per: str = "codebook"
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoding(), self.fitter()  # refuse what is out of range

    def encoding(self) -> ClusteredCodebook:
        return ClusteredCodebook(self.bits, self.clusters, self.per)

    def fitter(self) -> JlcmFit:
        return JlcmFit(self.rounds)

    def refuse(self, program: Program, site: Site) -> str:
        encoding = inside(program.encoding(site.weight), self.encoding())
        return super().refuse(program, site) or self.fitter().refuse(encoding) or ""

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        jobs = [(site, self.encoding()) for site in self.distinct(program, result)]
        result.warnings += self.store(program, jobs, ctx, self.fitter())
        return result
