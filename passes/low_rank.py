"""W·x → U·(V·x), W `[O, K]`, U `[O, r]`, V `[r, K]`, r·(O + K) < O·K: one layer becomes two thin ones.

U·V is the matrix of rank r nearest to W in ‖(W − U·V)·R‖: the truncated singular value decomposition of W·R, times R⁻¹.

    svd        R = I, nearest to the weight itself
    asvd       R = diag(mean|x_j|^alpha): Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition"
    whitened   R·Rᵀ = H = Σ xᵀx, nearest at the output: Wang et al. 2024, "SVD-LLM", section 3.1

A convolution becomes one of r channels with a 1 × 1 convolution behind it. Lossy: under `whitened`, undamped, the
squared error of a layer's output on the data is the sum of the squared singular values of W·R that are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ..compiler.backend import channel_multiple
from ..compiler.calibrate import Stream
from ..compiler.cost import node_macs, parameter_count
from ..compiler.encodings.residual import energies, factors
from ..compiler.errors import OptionError, PassError
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program, operands
from ..compiler.reencode import refusal
from ..compiler.registry import registry
from ..compiler.sensitivity import knapsack
from ..compiler.sites import Site
from ..compiler.statistics import ChannelMean, Hessian, Statistic, Window
from .fit.lowrank import whitened

aten = torch.ops.aten

METHODS = ("svd", "asvd", "whitened")
_SIZES = ("keep", "rank", "energy", "parameters", "macs")
_SPLIT = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True, eq=False)
class Layer:
    """What is factored together: one weight at all its readers, or the weights of several sites that read one input,
    one above the other. `shapes` are those of the weights, by name; `inputs` what the sites read, and how."""

    sites: tuple[Site, ...]
    shapes: Mapping[str, tuple[int, ...]]
    inputs: tuple[tuple[str, Window | None], ...]

    @cached_property
    def height(self) -> int:
        """O, of all weights."""
        return sum(shape[0] for shape in self.shapes.values())

    @cached_property
    def width(self) -> int:
        """K, kernel positions too."""
        return prod(self.sites[0].shape[1:])

    def matrix(self, program: Program) -> Tensor:
        """float64 `[O, K]`."""
        return torch.cat([program.get(name).detach().double().flatten(1) for name in self.shapes])

    def parameters(self, rank: int | None) -> int:
        """Numbers in the factors; without a rank, in the weights."""
        return self.height * self.width if rank is None else rank * (self.height + self.width)

    def macs(self, rank: int | None) -> int:
        """Multiply–accumulates of its sites at the example inputs."""
        if rank is None:
            return sum(node_macs(site.node) for site in self.sites)
        rows = {site.node: node_macs(site.node) // prod(site.shape) for site in self.sites}
        first = {(site.input, site.window): rows[site.node] for site in self.sites}
        return rank * (sum(rows[s.node] * s.shape[0] for s in self.sites) + self.width * sum(first.values()))

    def ranks(self, multiple: int) -> list[int]:
        """The multiples that save something, smallest first."""
        return [r for r in range(multiple, self.width, multiple) if self.parameters(r) < self.parameters(None)]


@dataclass(frozen=True)
class Factorize(SitePass):
    """One of these says how small: `keep`, the share of its parameters that each layer keeps; `rank`, of every layer;
    `energy`, the share of its squared output that each layer keeps at least; `parameters` or `macs`, the share of the
    model's own that the model keeps, spent where a rank saves most relative output error.

    Ranks are multiples of `round_to`, by default of what the kernels of the target like; 32 lets groups of 32 be
    quantised afterwards. `shared` lets the sites that read one input (q, k, v) share their first factor. `sequential`
    fits each layer to the inputs that the factored layers before it give. `damp` is the share of the mean of diag(H)
    that is added to it. Layers that no rank makes smaller are left and listed.
    """

    name: ClassVar[str] = "low_rank"
    phase: ClassVar[Phase] = Phase.FACTOR
    positional: ClassVar[str | None] = "keep"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    keep: float | None = None
    method: str = "whitened"
    rank: int | None = None
    energy: float | None = None
    parameters: float | None = None
    macs: float | None = None
    shared: bool = False
    sequential: bool = True
    alpha: float = 0.5
    damp: float = 0.01
    round_to: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "pass 'low_rank'"
        if self.method not in METHODS:
            raise OptionError(f"no method is called {self.method!r}", where=where, fix=f"use {', '.join(METHODS)}")
        given = [size for size in _SIZES if getattr(self, size) is not None]
        if len(given) != 1:
            raise OptionError(
                f"{' and '.join(given) or 'nothing'} says how small the model shall be",
                where=where,
                fix=f"give one of {', '.join(_SIZES)}, such as low_rank:0.7",
            )
        for option in given:
            if option != "rank" and not 0 < getattr(self, option) < 1:
                raise OptionError(
                    f"{option}={getattr(self, option)} is no share", where=where, fix="use a number between 0 and 1"
                )
        for option, least in (("rank", 1), ("round_to", 1), ("damp", 0), ("alpha", 0)):
            value = getattr(self, option)
            if value is not None and not value >= least:
                raise OptionError(f"{option}={value} is not valid", where=where, fix=f"use {least} or more")

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # depends on the method
        return self.method != "svd"

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        ranks = self._ranks(program, self._layers(program, result), ctx, result)
        if not ranks:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(result.skipped.items())[:3])
            raise PassError(
                f"no layer becomes smaller: {reasons}", where="pass 'low_rank'", fix="widen targets=, or ask for less"
            )
        before, after, lost = 0, 0, 0.0
        watched = program if self.sequential else program.clone()
        for layer, metric, doubt in self._observed(watched, list(ranks), ctx):
            matrix, rank = layer.matrix(program), ranks[layer]
            white, back = whitened(matrix, metric, self.damp)
            u, v = factors(white, rank)
            lost += float((white - u @ v).square().sum() / white.square().sum().clamp(min=1e-300))
            before, after = before + layer.parameters(None), after + layer.parameters(rank)
            _split(program, layer, u, v @ back)
            result.matched += [site.path for site in layer.sites]
            result.warnings += [f"{layer.sites[0].path}: {doubt}"] if doubt else []
        result.metrics = {
            "mean rank": sum(ranks.values()) / len(ranks),
            "share of their parameters": after / before,
            "relative error of a layer": (lost / len(ranks)) ** 0.5,
        }
        program.refresh()
        return result

    # -- which layers ---------------------------------------------------------------------------------------------

    def _layers(self, program: Program, result: PassResult) -> list[Layer]:
        """In graph order; what cannot be split is listed in the result."""
        groups: dict[Any, list[Site]] = defaultdict(list)
        for site in self.sites(program):
            if reason := self._refuse(program, site):
                result.skipped[site.path] = reason
            elif self.shared and len(site.weight.users) == 1:
                groups[site.input, site.window].append(site)
            else:
                groups[site.weight].append(site)
        layers = []
        for sites in groups.values():
            shapes = {str(site.weight.target): site.shape for site in sites}
            inputs = dict.fromkeys((site.input.name, site.window) for site in sites)
            layers.append(Layer(tuple(sites), shapes, tuple(inputs)))
        return sorted(layers, key=lambda layer: layer.sites[0].input)

    def _refuse(self, program: Program, site: Site) -> str:
        if site.node.target not in _SPLIT:
            return f"{site.node.target} is not split"
        if site.window is not None and site.window.groups != 1:
            return "grouped convolution"
        if (encoding := program.encoding(site.weight)) is not None:
            return f"already stored as {encoding}"
        return refusal(program, site)

    # -- which ranks ----------------------------------------------------------------------------------------------

    def _ranks(self, program: Program, layers: Sequence[Layer], ctx: Context, result: PassResult) -> dict[Layer, int]:
        """Layer → rank, of those that become smaller."""
        budget = self.parameters is not None or self.macs is not None
        wanted = (self._spent if budget else self._wanted)(program, layers, ctx)
        ranks = {}
        for layer, rank in wanted.items():
            if rank is not None and layer.parameters(rank) < layer.parameters(None):
                ranks[layer] = rank
                continue
            shape = f"{layer.height} × {layer.width}"
            reason = f"rank {rank} of a matrix of {shape} saves nothing" if rank else "the budget leaves it whole"
            result.skipped |= {site.path: reason for site in layer.sites}
        return ranks

    def _wanted(self, program: Program, layers: Sequence[Layer], ctx: Context) -> Mapping[Layer, int | None]:
        if self.rank is not None:
            return dict.fromkeys(layers, self.rank)
        multiple = self._multiple(ctx)
        if self.keep is not None:
            most = {layer: int(self.keep * layer.parameters(None) / layer.parameters(1)) for layer in layers}
            return {layer: max(rank // multiple, 1) * multiple for layer, rank in most.items()}
        assert self.energy is not None
        return {
            layer: max(-(-int((tail > 1 - self.energy).sum()) // multiple), 1) * multiple
            for layer, tail in self._tails(program, layers, ctx).items()
        }

    def _spent(self, program: Program, layers: Sequence[Layer], ctx: Context) -> Mapping[Layer, int | None]:
        """min Σ relative squared error of the layers' outputs, within the budget: None is a layer left as it is."""
        if self.macs is None:
            option, share, size, total = "parameters", self.parameters, Layer.parameters, parameter_count(program)
        else:
            option, share, size, total = "macs", self.macs, Layer.macs, sum(map(node_macs, program.graph.nodes))
        assert share is not None
        offered: list[list[int | None]] = [[None, *layer.ranks(self._multiple(ctx))] for layer in layers]
        sizes = [[size(layer, rank) for rank in ranks] for layer, ranks in zip(layers, offered, strict=True)]
        fixed = total - sum(ranks[0] for ranks in sizes)
        least = (fixed + sum(map(min, sizes))) / total
        if least > share:
            raise PassError(
                f"{option}={share} cannot be reached: the least that the smallest ranks leave is {least:.4f}",
                where="pass 'low_rank'",
                fix=f"ask for {least:.4f} or more, widen targets=, or lower round_to",
            )
        tails = self._tails(program, layers, ctx)
        losses = [
            [0.0 if rank is None else float(tails[layer][rank]) for rank in ranks]
            for layer, ranks in zip(layers, offered, strict=True)
        ]
        chosen = knapsack(losses, sizes, share * total - fixed)
        return {layer: ranks[i] for layer, ranks, i in zip(layers, offered, chosen, strict=True)}

    def _multiple(self, ctx: Context) -> int:
        return self.round_to or channel_multiple(registry().backend(ctx.target))

    def _tails(self, program: Program, layers: Sequence[Layer], ctx: Context) -> dict[Layer, Tensor]:
        """Layer → the share of its squared output that is lost at rank 0, 1, …, on the inputs of the whole model."""
        tails = {}
        for layer, metric, _ in self._observed(program, layers, ctx):
            energy = energies(whitened(layer.matrix(program), metric, self.damp)[0])
            tails[layer] = energy.flip(0).cumsum(0).flip(0) / energy.sum().clamp(min=1e-300)
        return tails

    # -- what they see --------------------------------------------------------------------------------------------

    def _observed(
        self, program: Program, layers: Sequence[Layer], ctx: Context
    ) -> Iterator[tuple[Layer, Tensor, str | None]]:
        """Each layer with R·Rᵀ, float64 `[K, K]`, as it is when its turn comes, and what makes it doubtful."""
        nodes = {n.name: n for n in program.graph.nodes}
        stream = Stream(program, ctx.batches if self.needs_calibration else [])
        for layer in ctx.track(layers, self.name):
            if self.method == "svd":
                yield layer, torch.eye(layer.width, dtype=torch.float64), None
                continue
            kind = Hessian if self.method == "whitened" else ChannelMean
            wanted: list[Statistic] = [kind(name, window) for name, window in layer.inputs]
            found = stream.advance(nodes[layer.inputs[0][0]], wanted)
            seen: Tensor = wanted[0].combine([found[statistic] for statistic in wanted]).double()
            metric = seen[0] if self.method == "whitened" else (seen ** (2 * self.alpha)).diag()
            yield layer, metric, wanted[0].doubt(seen)


def _split(program: Program, layer: Layer, u: Tensor, v: Tensor) -> None:
    """Put U and V behind each other at all sites, as the layers `0` and `1` of an `nn.Sequential` in place of one."""
    mixes = dict(zip(layer.shapes, torch.split(u, [shape[0] for shape in layer.shapes.values()]), strict=True))
    weights: dict[str, fx.Node] = {}
    first: dict[Any, fx.Node] = {}

    def stored(name: str, value: Tensor, site: Site) -> fx.Node:
        if name not in weights:
            dtype = site.weight.meta["val"].dtype
            weights[name] = program.attribute(name, value.to(dtype).contiguous(), before=site.node)
        return weights[name]

    base = _base(layer.sites[0])
    for site in layer.sites:
        key, kernel = (site.input, site.window), site.shape[2:]
        if key not in first:
            thin = stored(f"{base}0.weight", v.reshape(-1, *site.shape[1:]), site)
            rest = (None, *operands(site.node)[3:]) if kernel else ()
            with program.graph.inserting_before(site.node):
                first[key] = program.graph.call_function(site.node.target, (site.input, thin, *rest))  # type: ignore[arg-type]
            first[key].meta.update(site.node.meta)
        mix = mixes[str(site.weight.target)].reshape(site.shape[0], -1, *(1 for _ in kernel))
        bias = site.bias
        if bias is not None and str(bias.target) == f"{_base(site)}bias" and len(bias.users) == 1:
            bias = stored(f"{_base(site)}1.bias", program.get(str(bias.target)), site)
        site.node.args = (first[key], stored(f"{_base(site)}1.weight", mix, site), *([] if bias is None else [bias]))


def _base(site: Site) -> str:
    """The name of a weight up to its last part."""
    return str(site.weight.target).removesuffix("weight")
