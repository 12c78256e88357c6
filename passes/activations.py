"""x → q(x): where a scheme rounds activations, and under which ranges.

Inputs of layers, one quantiser for everything that reads them; with static ranges also the residual sums that
convolutions feed. On request also the operands of both products of an attention, q(Q)·q(K)ᵀ and q(P)·q(V), or of the
first alone, its scores. Where many tokens share the attention all P are small: their range is found like that of other
activations; under ranges of tokens or groups it is [0, 1]. Of scores alone static ranges are symmetric about 0, as
kernels that fuse them with the softmax want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..compiler.attention import decompose, operand_places
from ..compiler.dialect.activations import ROUNDING, affine_parameters
from ..compiler.passes import Context
from ..compiler.program import Program, operands, origin, shape_of
from ..compiler.sites import ADD, CONV, LINEAR, AttentionSite, Site, site_of
from ..compiler.statistics import Histogram, SharesHistogram, Statistic, WeightedHistogram
from .ranges import mirrored, parse_range

_PROBABILITIES = torch.tensor([0.0, 1.0])


@dataclass(frozen=True)
class Activations:
    """How activations are rounded. `mode` is "static", unsigned 8 bit under the `range` that `ranges.py` finds on
    calibration data, or "dynamic", with the `code` and `granularity` of `paretoc::fake_quantize_dynamic`;
    "group" is that of `group` channels."""

    mode: str
    code: str = "int8"
    granularity: str = "tensor"
    range: str = "mse"
    group: int = 0

    def needs(self, program: Program, sources: Sequence[fx.Node]) -> list[Statistic]:
        """What calibration has to find out about the values to round."""
        return [self._histogram(program, source) for source in sources] if self.mode == "static" else []

    def attention_needs(self, program: Program, sites: Sequence[AttentionSite], *, scores: bool) -> list[Statistic]:
        """What calibration has to find out about the operands of attentions, or of their scores."""
        if scores:
            return self.needs(program, [x for site in sites for x in (site.query, site.key)])
        read = [x for site in sites for x in (site.query, site.key, site.value)]
        return [*self.needs(program, read), *(_shares(site) for site in sites if self.mode == "static")]

    def residuals(self, program: Program, sites: Sequence[Site]) -> list[tuple[fx.Node, int]]:
        """(sum, operand) where static ranges round the operands of a residual sum too: those that a convolution of
        `sites` feeds. An integer kernel then runs the convolution, the sum and what follows without leaving codes."""
        convolutions = {site.node for site in sites if site.kind == "conv"} if self.mode == "static" else set()
        found = []
        for node in program.calls(*ADD):
            pair = operands(node)[:2]
            if convolutions.intersection(pair) and all(isinstance(o, fx.Node) for o in pair):
                same = [*map(str, shape_of(pair[0]))] == [*map(str, shape_of(pair[1]))]
                found += [(node, index) for index in range(2) if same]
        return found

    def round_inputs(
        self, program: Program, sites: Sequence[Site], residuals: Sequence[tuple[fx.Node, int]], ctx: Context
    ) -> None:
        """Round what layers and residual sums read: one quantiser for each distinct value (q, k, v). A convolution
        sees no tokens: its dynamic range is that of the tensor."""
        whole = replace(self, granularity="tensor")
        readers = [(site.node, 0, whole if site.kind == "conv" else self) for site in sites]
        readers += [(node, index, whole) for node, index in residuals]
        place = {node: number for number, node in enumerate(program.graph.nodes)}
        done: dict[tuple[fx.Node, str], fx.Node] = {}
        for reader, index, how in sorted(readers, key=lambda r: place[r[0]]):
            key = operands(reader)[index], how.granularity
            if key not in done:
                done[key] = how._quantizer(program, key[0], reader, ctx)
            reader.update_arg(index, done[key])

    def round_scores(self, program: Program, site: AttentionSite, ctx: Context) -> str:
        """Round queries and keys; returns why that is not possible, or nothing."""
        if _is_rounded(site):
            return "its products are quantised already"
        for reader, index in operand_places(site)[:2]:
            reader.update_arg(index, self._quantizer(program, operands(reader)[index], reader, ctx, symmetric=True))
        return ""

    def round_attention(self, program: Program, site: AttentionSite, ctx: Context) -> str:
        """Round queries, keys, values and probabilities; returns why that is not possible, or nothing. A fused
        attention is taken apart: call `program.refresh()` behind the last one."""
        if _is_rounded(site):
            return "its products are quantised already"
        for reader, index in operand_places(site):
            reader.update_arg(index, self._quantizer(program, operands(reader)[index], reader, ctx))
        product = decompose(program, site) if site.fused else site.node
        product.update_arg(0, self._rounded_shares(program, site, product, ctx))
        return ""

    def _rounded_shares(self, program: Program, site: AttentionSite, product: fx.Node, ctx: Context) -> fx.Node:
        """The probabilities, behind what rounds them."""
        source = operands(product)[0]
        if self.mode == "dynamic" and self.granularity == "tensor":
            return self._quantizer(program, source, product, ctx)
        bounds = self._range(_shares(site), ctx) if self.mode == "static" else _PROBABILITIES
        return _static(program, source, product, bounds)

    def _quantizer(
        self, program: Program, source: fx.Node, reader: fx.Node, ctx: Context, *, symmetric: bool = False
    ) -> fx.Node:
        if self.mode == "dynamic":
            granularity = f"group{self.group}" if self.granularity == "group" else self.granularity
            return dynamic(program, source, reader, granularity, self.code)
        histogram = self._histogram(program, source)
        bounds = self._symmetric_range(histogram, ctx) if symmetric else self._range(histogram, ctx)
        return _static(program, source, reader, bounds)

    def _histogram(self, program: Program, source: fx.Node) -> Histogram:
        """On which a range is found. Squared errors count as they arrive in the layers that read the value."""
        layers = [site_of(program, user) for user in source.users if user.target in (*LINEAR, *CONV)]
        weights = [site.weight.name for site in layers if site is not None and site.input is source]
        if self.range != "mse" or not weights:
            return Histogram(source.name)
        return WeightedHistogram(source.name, weights=tuple(dict.fromkeys(weights)))

    def _range(self, histogram: Histogram, ctx: Context) -> Tensor:
        return parse_range(self.range)(*ctx.statistic(histogram))

    def _symmetric_range(self, histogram: Histogram, ctx: Context) -> Tensor:
        """Of 127 steps on either side of zero, and one more below that makes 256 codes of them."""
        reach = parse_range(self.range)(*mirrored(*ctx.statistic(histogram))).abs().max()
        return reach / 127 * torch.tensor([-128.0, 127.0])


def _is_rounded(site: AttentionSite) -> bool:
    """Whether a product of it is: queries and probabilities tell, keys and values may be rounded for the cache."""
    reader, index = operand_places(site)[0]
    return any(operands(node)[place].target in ROUNDING for node, place in ((reader, index), (site.node, 0)))


def _shares(site: AttentionSite) -> Histogram:
    """Of the probabilities of an attention: they are a value of the graph where it is not fused."""
    if site.softmax is not None:
        return Histogram(site.softmax.name)
    mask = None if site.mask is None else site.mask.name
    return SharesHistogram(site.query.name, key=site.key.name, mask=mask, scale=site.scale, causal=site.causal)


def dynamic(program: Program, source: fx.Node, reader: fx.Node, granularity: str, code: str) -> fx.Node:
    """`paretoc::fake_quantize_dynamic` of `source`, before `reader`."""
    return _insert(program, torch.ops.paretoc.fake_quantize_dynamic.default, (source, granularity, code), reader)


def _static(program: Program, source: fx.Node, reader: fx.Node, bounds: Tensor) -> fx.Node:
    scale, zero = affine_parameters(*bounds)
    stored = [
        program.attribute(f"activations.{reader.name}.{source.name}.{key}", value, before=reader)
        for key, value in (("scale", scale), ("zero", zero.to(torch.uint8)))
    ]
    return _insert(program, torch.ops.paretoc.fake_quantize.default, (source, *stored), reader)


def _insert(program: Program, target: Any, arguments: tuple[fx.Node | str, ...], reader: fx.Node) -> fx.Node:
    with program.graph.inserting_before(reader):
        node = program.graph.call_function(target, arguments)
    node.meta.update(origin(reader))
    return node
