"""y = x·Wᵀ → y = q(x)·decode(codes, scales)ᵀ: weights under an encoding, activations rounded on the way in.

| scheme | weights | activations |
|---|---|---|
| W8A8 | int8 per channel | uint8 per tensor, range from calibration |
| W8A8-dynamic | int8 per channel | 8 bit, range found per call: of the tensor, or of each token |
| W8A16 | int8 per channel | as they are |
| W4A16, W3A16, W2A16 | integers in groups of 32 | as they are |
| W4A8 | int4 in groups of 32, of convolutions per channel | 8 bit, range of each such group of a token |
| W4A4 | int4 in groups of 32 | 4 bit, range of each token |
| FP8 | E4M3 per channel | E4M3, range of each token |
| MXFP4, NVFP4 | E2M1 in blocks of 32 or 16, scales E8M0 or E4M3 | as they are |

A convolution has no tokens: dynamic ranges of its input are those of the tensor. Any other weight encoding: `weights=`.
Jacob et al. 2018 (integer inference), Dettmers et al. 2022 (per-channel by per-token). Lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from ..compiler.calibrate import FlatBatch
from ..compiler.dialect.activations import CODES
from ..compiler.encodings import Affine, Encoding, Float, innermost, parse_encoding
from ..compiler.errors import OptionError, ParetocError, PassError, did_you_mean
from ..compiler.passes import Context, PassResult, Phase
from ..compiler.program import Program, operands
from ..compiler.protocols import Fitter, refusal
from ..compiler.reencode import EncodePass, inside, stored_already
from ..compiler.registry import registry
from ..compiler.sensitivity import Sensitivity, Undo, back_off, give_back, measure_losses, relative_error, split
from ..compiler.sites import EMBEDDING, AttentionSite, Site, attention_of
from ..compiler.statistics import Statistic
from .activations import Activations
from .ranges import parse_range


@dataclass(frozen=True)
class Scheme:
    """What a scheme name means."""

    weights: Encoding
    activations: Activations | None
    kinds: tuple[str, ...] = ("linear",)


_ALL = ("linear", "conv")
SCHEMES = {
    "W8A8": Scheme(Affine(8), Activations("static"), _ALL),
    "W8A8-dynamic": Scheme(Affine(8), Activations("dynamic"), _ALL),
    "W8A16": Scheme(Affine(8), None, _ALL),
    "W4A16": Scheme(Affine(4, 32), None),
    "W3A16": Scheme(Affine(3, 32), None),
    "W2A16": Scheme(Affine(2, 32, symmetric=False), None),
    "W4A8": Scheme(Affine(4, 32), Activations("dynamic", "int8", "group"), _ALL),
    "W4A4": Scheme(Affine(4, 32), Activations("dynamic", "int4", "token")),
    "FP8": Scheme(Float("e4m3"), Activations("dynamic", "e4m3", "token"), _ALL),
    "MXFP4": Scheme(Float("e2m1", 32, "e8m0"), None),
    "NVFP4": Scheme(Float("e2m1", 16, "e4m3"), None),
}
_EMBEDDING = Affine(bits=8, group=0)


@dataclass(frozen=True)
class Quantize(EncodePass):
    """Quantise weights and, with schemes other than …A16, the inputs of the operators that read them.

    `weights` replaces the weight encoding of the scheme: an `Encoding`, or its text. `group_size` (weights per scale
    along the input axis) and `symmetric` change that of the scheme. Dynamic activations have a `granularity`, "tensor",
    "token" or "group" (that of the weights), and a `code`, such as "uint4", asymmetric for each token too; static ones
    a `range`: mse (the default), minmax, percentile(99.99) or entropy, see `ranges.py`. `attention=True` also rounds
    to 8 bits what the two products of an attention multiply, in the layers that the chosen sites are in,
    `attention="scores"` queries and keys alone: OpenVINO computes them on integers inside its fused attention.
    `embeddings=True` stores embedding tables as int8 with one scale a row. `fitter` chooses the codes: a name, a name
    with options ("gptq(act_order=True)"), or a `Fitter`; with one that needs data, `sequential` fits every layer to
    the inputs that the layers already quantised give it, and `checkpoint` names a directory that keeps what is
    finished.

    `effective_bits` spends that many stored bits a weight where they help most, on integers of `widths`; it measures
    what each weight costs the outputs, or takes it from `sensitivity` (`paretoc.Sensitivity`, of an earlier result).
    `max_drop` gives sites back, most harmful first, until `compile`'s `metric` falls by no more than that; without a
    metric it bounds the relative error of the outputs on a quarter of the calibration batches, held out.
    """

    name: ClassVar[str] = "quantize"
    phase: ClassVar[Phase] = Phase.QUANTIZE
    positional: ClassVar[str | None] = "scheme"

    scheme: str = "W8A8-dynamic"
    fitter: str | Fitter = "mse"
    group_size: int | None = None
    granularity: str | None = None
    embeddings: bool = False
    symmetric: bool | None = None
    weights: str | Encoding | None = None
    sequential: bool = True
    checkpoint: str | None = None
    effective_bits: float | None = None
    widths: tuple[int, ...] = (2, 3, 4, 8)
    sensitivity: Sensitivity | None = None
    max_drop: float | None = None
    range: str | None = None
    attention: bool | str = False
    code: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise OptionError(
                f"there is no scheme {self.scheme!r}", where="pass 'quantize'", fix=did_you_mean(self.scheme, SCHEMES)
            )
        self._check_group_size()
        self._check_activations()
        if reason := refusal(self.fitted_by(), self.encoding()):
            raise OptionError(reason, where="pass 'quantize'", fix="use fitter=rtn")
        self._check_budget()

    def _check_activations(self) -> None:
        mode = self.activations.mode if self.activations else ""
        eight = self.activations and self.activations.code in ("int8", "uint8")
        for option, given, fits, fix in (
            ("granularity", self.granularity, mode == "dynamic", "use it with W8A8-dynamic, W4A8 or W4A4"),
            ("code", self.code, mode == "dynamic", "use it with W8A8-dynamic, W4A8 or W4A4"),
            ("range", self.range, mode == "static", "use it with W8A8"),
            ("attention", self.attention, eight, "use it with W8A8, W8A8-dynamic or W4A8"),
        ):
            if given and not fits:
                raise OptionError(f"{option}={given} does not apply to {self.scheme}", where="pass 'quantize'", fix=fix)
        if self.attention not in (True, False, "scores"):
            raise OptionError(
                f"attention={self.attention} is not known",
                where="pass 'quantize'",
                fix="use 'true' (both products of an attention) or 'scores' (queries and keys)",
            )
        if self.granularity not in (None, "tensor", "token", "group"):
            raise OptionError(
                f"granularity {self.granularity!r} is not known",
                where="pass 'quantize'",
                fix="use 'tensor' (one range a call), 'token' (one a token) or 'group' (one for each group of weights)",
            )
        if self.activations and self.activations.granularity == "group" and self.activations.group <= 0:
            raise OptionError(
                f"granularity=group needs weights in groups, not {self.encoding()}",
                where="pass 'quantize'",
                fix="use weights such as Affine(4, 32), or granularity=token",
            )
        if self.code is not None and self.code not in CODES:
            raise OptionError(
                f"{self.code!r} is not an activation code", where="pass 'quantize'", fix=did_you_mean(self.code, CODES)
            )
        if self.range is not None:
            parse_range(self.range)
        if self.attention and self.max_drop is not None:
            raise OptionError(
                "max_drop= gives back layers, and cannot give back what attention= rounds",
                where="pass 'quantize'",
                fix="leave one of them out",
            )

    def _check_budget(self) -> None:
        if self.effective_bits is not None and not isinstance(self.encoding(), Affine):
            raise OptionError(
                f"effective_bits= chooses among integers, not {self.encoding()}",
                where="pass 'quantize'",
                fix="leave out weights=",
            )
        for name, value in (("effective_bits", self.effective_bits), ("max_drop", self.max_drop)):
            if value is not None and value < 0:
                raise OptionError(f"{name}={value} is negative", where="pass 'quantize'", fix="use a positive number")

    def _check_group_size(self) -> None:
        size, default = self.group_size, SCHEMES[self.scheme].weights
        grouped = self.weights is None and isinstance(default, Affine) and default.group > 0
        if size is not None and not (grouped and size > 0):
            raise OptionError(
                f"group_size={size} does not apply to {self.weights or self.scheme}",
                where="pass 'quantize'",
                fix="use it with W4A16 and a positive size such as 32, 64 or 128",
            )

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]  # depends on the scheme
        return (self.activations is not None and self.activations.mode == "static") or not self.fitted_by().data_free

    @property
    def activations(self) -> Activations | None:
        chosen = SCHEMES[self.scheme].activations
        given: dict[str, Any] = {"granularity": self.granularity, "range": self.range, "code": self.code}
        chosen = chosen and replace(chosen, **{option: value for option, value in given.items() if value})
        return chosen and replace(chosen, group=getattr(innermost(self.encoding()), "group", 0))

    def fitted_by(self) -> Fitter:
        return registry().fitter(self.fitter) if isinstance(self.fitter, str) else self.fitter

    def encoding(self) -> Encoding:
        if self.weights is not None:
            return parse_encoding(self.weights) if isinstance(self.weights, str) else self.weights
        chosen = SCHEMES[self.scheme].weights
        if not isinstance(chosen, Affine):
            return chosen
        symmetric = chosen.symmetric if self.symmetric is None else self.symmetric
        return replace(chosen, group=self.group_size or chosen.group, symmetric=symmetric)

    def _encoding_at(self, site: Site) -> Encoding:
        """The groups of a scheme lie along the inputs of a linear; a convolution has one scale for each channel."""
        chosen = self.encoding()
        if self.weights is None and site.kind == "conv" and isinstance(chosen, Affine):
            return replace(chosen, group=0)
        return chosen

    def default_kinds(self) -> tuple[str, ...]:
        return SCHEMES[self.scheme].kinds + (("embedding",) if self.embeddings else ())

    def needs(self, program: Program) -> list[Statistic]:
        if self.activations is None:
            return []
        sites = [s for s in self.sites(program) if s.kind != "embedding"]
        read = [operands(node)[index] for node, index in self._residuals(program, sites)]
        scores = self.attention == "scores"
        attended = self.activations.attention_needs(program, self._attentions(sites), scores=scores)
        return [*self.activations.needs(program, [*(s.input for s in sites), *read]), *attended]

    def _residuals(self, program: Program, sites: Sequence[Site]) -> list[tuple[fx.Node, int]]:
        """What is rounded although no site reads it: nothing, where sites may be given back."""
        assert self.activations is not None
        return self.activations.residuals(program, sites) if self.max_drop is None else []

    def _attentions(self, sites: Sequence[Site]) -> list[AttentionSite]:
        """The attentions of the layers that the sites are in, if they are to be rounded."""
        found = [attention_of(s) for s in sites if s.kind == "linear"] if self.attention else []
        return list(dict.fromkeys(a for a in found if a is not None))

    def apply(self, program: Program, ctx: Context) -> PassResult:
        result = PassResult()
        chosen = self.distinct(program, result)
        before = None if self.sequential and self.max_drop is None else program.clone()
        undo = self._undo(program, set(result.matched))
        fitted, held = (ctx.batches, ctx.batches) if self.max_drop is None or ctx.metric else split(ctx.batches)
        ctx = replace(ctx, batches=fitted)
        tables = [s for s in chosen if any(user.target in EMBEDDING for user in s.weight.users)]
        fitter, of_tables = self.fitted_by(), registry().fitter("mse")
        wanted = self._allocated(program, [s for s in chosen if s not in tables], ctx, result)
        jobs = [(s, self._checked(program, s, wanted[s.path], fitter)) for s in chosen if s not in tables]
        rows = [(s, self._checked(program, s, _EMBEDDING, of_tables)) for s in tables]
        matched = set(result.matched)
        self._round_activations(program, [s for s in self.sites(program) if s.path in matched], ctx, result)
        if rows:  # first: in sequence, what reads them is fitted to what they have become
            self.store(program, rows, ctx, of_tables)
        result.warnings += self.store(program, jobs, ctx, fitter, None if self.sequential else before, self.checkpoint)
        if before is not None and self.max_drop is not None:
            self._back_off(before, program, undo, ctx, held, result)
        return result

    def _allocated(
        self, program: Program, sites: Sequence[Site], ctx: Context, result: PassResult
    ) -> dict[str, Encoding]:
        """Site → encoding: the same everywhere, or what the budget of bits allows."""
        if self.effective_bits is None:
            return {s.path: self._encoding_at(s) for s in sites}
        measured = self.sensitivity or measure_losses(
            program, sites, self._candidates, self.fitted_by(), ctx.batches, ctx.track
        )
        chosen = measured.allocate(self.effective_bits, [s.path for s in sites])
        result.sensitivity = measured
        result.metrics["effective_bits"] = measured.effective_bits(chosen)
        return chosen

    def _candidates(self, site: Site) -> list[Encoding]:
        base = self._encoding_at(site)
        assert isinstance(base, Affine)
        default = self.symmetric is None  # two symmetric bits are three levels
        return [replace(base, bits=b, symmetric=b > 2 if default else base.symmetric) for b in self.widths]

    def _round_activations(self, program: Program, sites: Sequence[Site], ctx: Context, result: PassResult) -> None:
        if self.activations is None:
            return
        sites = [s for s in sites if s.kind != "embedding"]
        attentions = self._attentions(sites)
        if self.attention and not attentions:
            raise PassError(
                f"attention={self.attention}, and no attention belongs to the chosen sites",
                where="pass 'quantize'",
                fix="leave attention= out, or widen targets=",
            )
        self.activations.round_inputs(program, sites, self._residuals(program, sites), ctx)
        scores = self.attention == "scores"
        rounded = self.activations.round_scores if scores else self.activations.round_attention
        for attention in attentions:
            if reason := rounded(program, attention, ctx):
                result.skipped[attention.path] = reason
        if attentions:
            program.refresh()

    def _undo(self, program: Program, paths: set[str]) -> dict[str, list[Undo]]:
        """Site → how to give it back."""
        steps: dict[str, list[Undo]] = {}
        if self.max_drop is not None:
            for site in self.sites(program):
                if site.path in paths:
                    steps.setdefault(site.path, []).append(Undo.of(program, site))
        return steps

    def _back_off(
        self,
        original: Program,
        program: Program,
        undo: dict[str, list[Undo]],
        ctx: Context,
        held: Sequence[FlatBatch],
        result: PassResult,
    ) -> None:
        assert self.max_drop is not None
        metric = ctx.metric
        before = 0.0 if metric is None else float(metric(original))

        def drop(candidate: Program) -> float:
            return relative_error(original, candidate, held) if metric is None else before - float(metric(candidate))

        returned, alone = back_off(program, undo, drop, self.max_drop, ctx.track)
        give_back(program, [step for path in returned for step in undo[path]])
        program.refresh()
        for path in returned:
            result.skipped[path] = f"given back for max_drop={self.max_drop}: alone it costs {alone[path]:.3g}"
        result.matched = [path for path in result.matched if path not in returned]
        result.metrics["drop"] = drop(program)

    def refuse(self, program: Program, site: Site) -> str:
        if reason := stored_already(program, site):
            return reason
        table = any(user.target in EMBEDDING for user in site.weight.users)
        if site.kind != "embedding" and table and not self.embeddings:
            return "its weight is also an embedding table; use embeddings=true to quantise it"
        return ""

    def _checked(self, program: Program, site: Site, encoding: Encoding, fitter: Fitter) -> Encoding:
        whole = inside(program.encoding(site.weight), encoding)
        try:
            whole.check(program.weight_value(site.weight))
            if reason := refusal(fitter, whole):
                raise OptionError(reason, fix="use fitter=rtn")
        except ParetocError as error:
            raise OptionError(
                error.what,
                where=f"pass 'quantize', site {site.describe()}",
                fix=f"{error.fix}, or leave it out with ignore={site.path} (another quantize may follow for it)",
            ) from error
        return encoding
