"""y = x·Wᵀ → y = q(x)·decode(codes, scales)ᵀ: weights stored as integers, activations rounded to 8 bits on the way in.

| scheme | weights | activations |
|---|---|---|
| W8A8 | int8 per channel | uint8 per tensor, range from calibration |
| W8A8-dynamic | int8 per channel | 8 bit, range found per call: of the tensor, or of each token |
| W8A16 | int8 per channel | as they are |
| W4A16 | int4 in groups of 32, 64 or 128 | as they are |

Jacob et al. 2018 (integer inference), Dettmers et al. 2022 (per-channel by per-token). Lossy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.encodings import NM, Affine, Arrays, Dense, Encoding
from ..compiler.errors import OptionError, ParetocError, PassError, did_you_mean
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.protocols import Fitter
from ..compiler.registry import registry
from ..compiler.sites import Site, weight_sites
from ..compiler.statistics import MinMax, Statistic


@dataclass(frozen=True)
class Scheme:
    """What a scheme name means. `activations`: "static", "dynamic" or None."""

    bits: int
    group: int
    activations: str | None
    kinds: tuple[str, ...]


SCHEMES = {
    "W8A8": Scheme(8, 0, "static", ("linear", "conv")),
    "W8A8-dynamic": Scheme(8, 0, "dynamic", ("linear", "conv")),
    "W8A16": Scheme(8, 0, None, ("linear", "conv")),
    "W4A16": Scheme(4, 32, None, ("linear",)),
}
_EMBEDDING = Affine(bits=8, group=0)


@dataclass(frozen=True)
class Quantize(SitePass):
    """Quantise weights and, with A8 schemes, the inputs of the operators that read them.

    `group_size` (weights per scale along the input axis) applies to W4A16. `granularity` "tensor" or "token" applies
    to W8A8-dynamic. `embeddings=True` stores embedding tables as int8 with one scale a row. `fitter` names how
    codes are chosen.
    """

    name: ClassVar[str] = "quantize"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    positional: ClassVar[str | None] = "scheme"

    scheme: str = "W8A8-dynamic"
    fitter: str = "mse"
    group_size: int | None = None
    granularity: str = "tensor"
    embeddings: bool = False
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise OptionError(
                f"there is no scheme {self.scheme!r}", where="pass 'quantize'", fix=did_you_mean(self.scheme, SCHEMES)
            )
        if self.group_size is not None and (SCHEMES[self.scheme].group == 0 or self.group_size <= 0):
            raise OptionError(
                f"group_size={self.group_size} does not apply to {self.scheme}",
                where="pass 'quantize'",
                fix="use it with W4A16 and a positive size such as 32, 64 or 128",
            )
        if self.granularity not in ("tensor", "token"):
            raise OptionError(
                f"granularity {self.granularity!r} is not known",
                where="pass 'quantize'",
                fix="use 'tensor' (one range a call, the fast kernel on ONNX Runtime) or 'token' (one range a token)",
            )
        reason = self._fitter().refuse(self.weight_encoding())
        if reason:
            raise OptionError(reason, where="pass 'quantize'", fix="use fitter=rtn")

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # depends on the scheme
        return SCHEMES[self.scheme].activations == "static"

    def _fitter(self) -> Fitter:
        return registry().fitter(self.fitter)

    def weight_encoding(self) -> Affine:
        scheme = SCHEMES[self.scheme]
        return Affine(bits=scheme.bits, group=self.group_size or scheme.group, symmetric=self.symmetric)

    def default_kinds(self) -> tuple[str, ...]:
        return SCHEMES[self.scheme].kinds + (("embedding",) if self.embeddings else ())

    def needs(self, program: Program) -> list[Statistic]:
        if not self.needs_calibration:
            return []
        return [MinMax(s.input.name) for s in self.sites(program) if s.kind != "embedding"]

    def apply(self, program: Program, ctx: Context) -> PassResult:
        selection = self.select(program)
        result = PassResult()
        jobs: dict[str, tuple[Site, Encoding]] = {}
        used_by = _kinds_by_weight(program)
        for site in selection.sites:
            name = program.weight_name(site.weight)
            assert name is not None
            encoding = self._encoding_for(program, site, used_by[name], result)
            if encoding is not None:
                jobs.setdefault(name, (site, encoding))
        fit = partial(_fit, self._fitter())
        stored = ctx.map(fit, [(s, e, program.weight_value(s.weight)) for s, e in jobs.values()], "quantising")
        quantised = {site.node for site in selection.sites if program.weight_name(site.weight) in jobs}
        for (site, encoding), arrays in zip(jobs.values(), stored, strict=True):
            program.encode(site.weight, encoding, arrays)
        for site in weight_sites(program):
            if site.node in quantised:
                result.matched.append(site.path)
        self._quantize_inputs(program, [s for s in selection.sites if s.node in quantised], ctx)
        program.refresh()
        if not jobs:
            raise PassError(
                "nothing was quantised: " + "; ".join(f"{p}: {r}" for p, r in list(result.skipped.items())[:3]),
                where="pass 'quantize'",
                fix="widen targets=, or use embeddings=true",
            )
        return result

    def _encoding_for(self, program: Program, site: Site, kinds: set[str], result: PassResult) -> Encoding | None:
        current = program.encoding(site.weight)
        values = current.values if isinstance(current, NM) else current
        if values is not None and not isinstance(values, Dense):
            result.skipped[site.path] = f"already stored as {current}"
            return None
        if site.kind != "embedding" and "embedding" in kinds and not self.embeddings:
            result.skipped[site.path] = "its weight is also an embedding table; use embeddings=true to quantise it"
            return None
        wanted = _EMBEDDING if "embedding" in kinds else self.weight_encoding()
        encoding = dataclasses.replace(current, values=wanted) if isinstance(current, NM) else wanted
        try:
            encoding.check(program.weight_value(site.weight))
        except ParetocError as error:
            raise OptionError(
                error.what,
                where=f"pass 'quantize', site {site.describe()}",
                fix=f"{error.fix}, or leave it out with ignore={site.path} (another quantize may follow for it)",
            ) from error
        return encoding

    def _quantize_inputs(self, program: Program, sites: list[Site], ctx: Context) -> None:
        """One quantiser for each distinct input, shared by everything that reads it (q, k, v)."""
        activations = SCHEMES[self.scheme].activations
        if activations is None:
            return
        done: dict[fx.Node, fx.Node] = {}
        for site in sites:
            if site.kind == "embedding":
                continue
            source = site.input
            if source not in done:
                done[source] = self._quantizer(program, source, site, ctx)
            site.node.update_arg(0, done[source])

    def _quantizer(self, program: Program, source: fx.Node, site: Site, ctx: Context) -> fx.Node:
        graph = program.graph
        if SCHEMES[self.scheme].activations == "dynamic":
            with graph.inserting_before(site.node):
                node = graph.call_function(torch.ops.paretoc.fake_quantize_dynamic.default, (source, self.granularity))
        else:
            scale, zero = _uint8_range(ctx.statistic(MinMax(source.name)))
            stored = [
                program.attribute(f"activations.{source.name}.{key}", value, before=site.node)
                for key, value in (("scale", scale), ("zero", zero))
            ]
            with graph.inserting_before(site.node):
                node = graph.call_function(torch.ops.paretoc.fake_quantize.default, (source, *stored))
        node.meta.update({k: site.node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in site.node.meta})
        return node


def _fit(fitter: Fitter, job: tuple[Site, Encoding, Tensor]) -> Arrays:
    _, encoding, weight = job
    return encoding.encode(weight, fitter.fit)


def _kinds_by_weight(program: Program) -> dict[str, set[str]]:
    """Parameter name → the kinds of the sites that read it (tied weights have several)."""
    kinds: dict[str, set[str]] = {}
    for site in weight_sites(program):
        kinds.setdefault(str(program.weight_name(site.weight)), set()).add(site.kind)
    return kinds


def _uint8_range(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """(min, max) → scale float32 [] and zero uint8 [] of an unsigned code that stores 0 exactly."""
    low, high = bounds[0].clamp(max=0), bounds[1].clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale).clamp(0, 255).to(torch.uint8)
