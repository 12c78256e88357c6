"""What must hold after every pass: interface, shapes, finite numbers, kept sparsity; and how far the outputs moved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .calibrate import FlatBatch, steps
from .encodings import NM
from .errors import VerificationError
from .memory import trim
from .program import Program, describe, example_shape
from .sites import weight_sites


@dataclass(frozen=True)
class Fidelity:
    """Distance to the original: relative L2 error and cosine per output, as mean ± standard error over samples."""

    data: str
    samples: int
    relative_error: dict[str, float]
    standard_error: dict[str, float]
    cosine: dict[str, float]
    sites: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest mean relative error of any output."""
        return max(self.relative_error.values(), default=0.0)


def check(before: Program, after: Program, pass_name: str) -> None:
    """Raise VerificationError when a pass changed the interface or undid what an earlier pass established."""
    where = f"pass {pass_name!r}"
    _check_interface(before, after, where)
    _check_sparsity(before, after, where)
    for node in after.graph.nodes:
        if node.op == "get_attr":
            value = after.get(str(node.target))
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise VerificationError(
                    f"the stored tensor {node.target!r} holds NaN or infinite values",
                    where=where,
                    fix="report this to the author of the pass; meanwhile leave the site out with ignore=",
                )


def _check_interface(before: Program, after: Program, where: str) -> None:
    if before.interface is not after.interface and before.interface != after.interface:
        raise VerificationError("the call signature changed", where=where, fix="a pass must keep the interface")
    if len(before.outputs) != len(after.outputs):
        raise VerificationError(
            f"the model had {len(before.outputs)} outputs and now has {len(after.outputs)}",
            where=where,
            fix="a pass must keep the interface",
        )
    for index, (old, new) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        was, now = example_shape(old), example_shape(new)
        if was != now or old.meta["val"].dtype != new.meta["val"].dtype:
            raise VerificationError(
                f"output {index} was {list(was)} {old.meta['val'].dtype} and is {list(now)} {new.meta['val'].dtype}",
                where=f"{where}, {describe(new)}",
                fix="a pass must keep the interface",
            )


def _check_sparsity(before: Program, after: Program, where: str) -> None:
    now = encodings_by_weight(after)
    read = {n.meta.get("parameter") for n in after.graph.nodes}
    for name, encoding in encodings_by_weight(before).items():
        if not isinstance(encoding, NM) or (name not in now and name not in read):
            continue
        kept = now.get(name, "changed behind its decode")
        if not isinstance(kept, NM) or (kept.n, kept.m) != (encoding.n, encoding.m):
            raise VerificationError(
                f"{name!r} was {encoding.n}:{encoding.m} sparse and now is {kept}",
                where=where,
                fix="run this pass before prune_nm, or leave the site out",
            )


def encodings_by_weight(program: Program) -> dict[str, Any]:
    """Parameter name → its encoding (None: stored as it is)."""
    found = {}
    for site in weight_sites(program):
        name = program.weight_name(site.weight)
        if name is not None:
            found[name] = program.encoding(site.weight)
    return found


def measure(
    original: Program, compiled: Program, batches: Sequence[FlatBatch], data: str, where: str = "the rewritten program"
) -> Fidelity:
    """Run both programs on the same batches and compare outputs and, where shapes still agree, site outputs."""
    names = original.interface.output_names()
    errors: dict[str, list[Tensor]] = {n: [] for n in names}
    cosines: dict[str, list[Tensor]] = {n: [] for n in names}
    sites = {s.node.name: s.path for s in weight_sites(original)}
    squares: dict[str, Tensor] = {}
    samples = 0
    trim()
    for batch in batches:
        for name, (error, cosine) in _compare(original, compiled, batch, sites, squares, where).items():
            errors[name].append(error)
            cosines[name].append(cosine)
        samples += batch[0].shape[0] if batch and batch[0].ndim else 1
        trim()
    return Fidelity(
        data=data,
        samples=samples,
        relative_error={n: float(torch.cat(v).mean()) for n, v in errors.items() if v},
        standard_error={n: _standard_error(torch.cat(v)) for n, v in errors.items() if v},
        cosine={n: float(torch.cat(v).mean()) for n, v in cosines.items() if v},
        sites={p: float((e / s) ** 0.5) if s else 0.0 for p, (e, s, _, _) in squares.items()},
    )


def _compare(
    original: Program,
    compiled: Program,
    batch: FlatBatch,
    sites: dict[str, str],
    squares: dict[str, Tensor],
    where: str,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Output → its distances on one batch; those of the sites are added to `squares`."""
    want: Sequence[Tensor] = ()
    got: Sequence[Tensor] = ()
    for name, a, b in _together(original, compiled, batch, sites):
        if name == _OUTPUT:
            want, got = a, b
        elif isinstance(a, Tensor) and a.shape == b.shape and a.is_floating_point():
            total = squares.setdefault(sites[name], torch.zeros(4, dtype=torch.float64))
            total += _products(a, b).sum(0)
            if a.numel() > _SLICE:
                trim()  # what the decoding of its weight left behind
    names = original.interface.output_names()
    _check_finite(names, want, got, where)
    return {n: _distance(a, b) for n, a, b in zip(names, want, got, strict=True) if a.is_floating_point()}


#: values that are compared at once
_SLICE = 1 << 18
#: stands for the name of the node that returns the outputs
_OUTPUT = ""


@torch.no_grad()
def _together(
    original: Program, compiled: Program, batch: FlatBatch, names: Collection[str]
) -> Iterator[tuple[str, Any, Any]]:
    """The values of the named nodes that both programs have, and their outputs, side by side as both run: of the
    others nothing is held, and of these only what the two compute in another order."""
    named = {_name(n) for n in compiled.graph.nodes} & {*names, _OUTPUT}
    other, ahead = steps(compiled, batch), {}
    for node, value in steps(original, batch):
        if _name(node) in named:
            while _name(node) not in ahead:
                met, ahead_value = next(other)
                if _name(met) in named:
                    ahead[_name(met)] = ahead_value
            yield _name(node), value, ahead.pop(_name(node))


def _name(node: fx.Node) -> str:
    return _OUTPUT if node.op == "output" else node.name


def _check_finite(names: Sequence[str], want: Sequence[Tensor], got: Sequence[Tensor], where: str) -> None:
    """No output may be NaN or infinite where the original's is not."""
    for name, a, b in zip(names, want, got, strict=True):
        if not b.is_floating_point():
            continue
        for what, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
            if (test(b) & ~test(a)).any():
                raise VerificationError(f"output {name!r} is {what}", where=where, fix="leave out this pass")


def _distance(want: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Relative L2 error and cosine of every sample (rows of the first axis), float64 `[B]`."""
    finite = torch.isfinite(want) & torch.isfinite(got)
    if not finite.all():
        want, got = torch.where(finite, want, 0.0), torch.where(finite, got, 0.0)
    moved, own, other, common = _products(want, got).unbind(1)
    norm = own.sqrt().clamp(min=1e-30)
    return moved.sqrt() / norm, common / (norm * other.sqrt()).clamp(min=1e-30)


def _products(want: Tensor, got: Tensor) -> Tensor:
    """Σ(a − b)², Σa², Σb² and Σab of every sample, float64 `[B, 4]`; in slices, as logits may be many."""
    rows = want.shape[0] if want.ndim else 1
    total = torch.zeros(rows, 4, dtype=torch.float64)
    flat = (x.reshape(rows, x.numel() // max(rows, 1)) for x in (want, got))
    sliced = (torch.split(x, max(_SLICE // max(rows, 1), 1), 1) for x in flat)
    for a, b in zip(*sliced, strict=True):
        a, b = a.double(), b.double()
        total += torch.stack([(a - b).square().sum(1), a.square().sum(1), b.square().sum(1), (a * b).sum(1)], 1)
    return total


def _standard_error(values: Tensor) -> float:
    return float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else 0.0
