"""θ → Σ wᵢ·θᵢ / Σ wᵢ (linear), or θ → θ + λ·Σ wᵢ·(θᵢ − θ) (task arithmetic): several models, one graph.

Wortsman et al. 2022, "Model soups"; Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2.
Arithmetic in float32. Floating buffers (batch-norm statistics) are merged like weights, integer ones kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..compiler.errors import OptionError, PassError
from ..compiler.passes import Context, Pass, PassResult, Phase
from ..compiler.program import Program

METHODS = ("linear", "task_arithmetic")


@dataclass(frozen=True)
class MergeModels(Pass):
    """Merge the compiled model with `models`: modules, state dicts, or paths of safetensors files.

    linear: `weights` has one entry for the compiled model and one for each of `models` (default: all equal).
    task_arithmetic: the compiled model is the base; `weights` has one entry for each of `models` (default 1), and
    `scale` is λ. A tied weight may be held under any of its names.
    """

    name: ClassVar[str] = "merge_models"
    phase: ClassVar[Phase] = Phase.COMBINE
    positional: ClassVar[str | None] = "method"

    method: str = "linear"
    models: tuple[Any, ...] = ()
    weights: tuple[float, ...] = ()
    scale: float = 1.0

    def __post_init__(self) -> None:
        where = "pass 'merge_models'"
        if self.method not in METHODS:
            raise OptionError(
                f"there is no merge method {self.method!r}", where=where, fix="use " + " or ".join(METHODS)
            )
        object.__setattr__(self, "models", tuple(self.models))
        if not self.models:
            raise OptionError("there is nothing to merge with", where=where, fix="give models=[…]")
        expected = len(self.models) + (self.method == "linear")
        weights = tuple(self.weights) or (1.0,) * expected
        if len(weights) != expected or (self.method == "linear" and sum(weights) == 0):
            raise OptionError(
                f"{len(weights)} weights (sum {sum(weights):g}) do not fit {expected} models",
                where=where,
                fix=f"give {expected} weights that do not sum to zero"
                + (", the first for the compiled model itself" if self.method == "linear" else ""),
            )
        object.__setattr__(self, "weights", weights)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        donors = [_fitted(program, _state(model, index), index) for index, model in enumerate(self.models)]
        cosines = []
        for name, own in program.weights().items():
            if not own.is_floating_point() or name not in donors[0]:
                continue
            others = [donor[name].detach().float() for donor in donors]
            program.set(name, self._merge(own.detach().float(), others).to(own.dtype))
            cosines += [_cosine(own.detach().float(), other) for other in others if own.ndim > 1]
        program.refresh()
        return PassResult(
            matched=[n for n in program.weights() if n in donors[0]],
            metrics={"lowest cosine between a tensor and its counterpart": min(cosines, default=1.0)},
        )

    def _merge(self, own: Tensor, others: list[Tensor]) -> Tensor:
        if self.method == "task_arithmetic":
            return own + self.scale * sum(
                (w * (other - own) for w, other in zip(self.weights, others, strict=True)), torch.zeros_like(own)
            )
        pairs = zip(self.weights, [own, *others], strict=True)
        return sum((w * tensor for w, tensor in pairs), torch.zeros_like(own)) / sum(self.weights)


def _state(model: Any, index: int) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return dict(model.state_dict())
    if isinstance(model, Mapping):
        return dict(model)
    if isinstance(model, (str, Path)):
        try:
            return load_file(model)
        except (OSError, SafetensorError) as error:
            raise OptionError(
                f"the weights {str(model)!r} cannot be read: {str(error).splitlines()[0]}",
                where="pass 'merge_models'",
                fix="give the path of a safetensors file",
            ) from error
    raise OptionError(
        f"models[{index}] is a {type(model).__name__}",
        where="pass 'merge_models'",
        fix="give modules, state dicts or safetensors paths",
    )


def _fitted(program: Program, donor: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The donor's tensors under the names of this program's weights: it may hold a tied one under another name."""
    _check_finite(donor, index)
    held = _by_first_name(program, donor, index)
    first = {name: program.state_names.get(name, name) for name in program.weights()}
    fitted = {name: held[first[name]] for name in first if first[name] in held}
    _check_same_architecture(program, donor, fitted, index)
    return fitted


def _by_first_name(program: Program, donor: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The donor's tensors, each tied weight once, under the first of its names in the original model."""
    names: dict[str, str] = {}
    for name, tensor in donor.items():
        twin = names.setdefault(program.state_names.get(name, name), name)
        if twin != name and not torch.equal(donor[twin], tensor):
            raise PassError(
                f"{twin!r} and {name!r} of models[{index}] differ, and are one tied weight here",
                where="pass 'merge_models'",
                fix="tie them in that model too, or untie them in this one before you compile it",
            )
    return {first: donor[name] for first, name in names.items()}


def _check_same_architecture(
    program: Program, donor: Mapping[str, Tensor], fitted: Mapping[str, Tensor], index: int
) -> None:
    own = program.weights()
    missing = sorted(n for n in own if n in program.state_names and n not in fitted)
    extra = sorted(set(donor) - set(program.state_names)) if program.state_names else []
    shapes = [n for n in fitted if own[n].shape != fitted[n].shape]
    if missing or extra or shapes:
        if shapes:
            name = shapes[0]
            what = f"{name!r} has shape {list(fitted[name].shape)}, here {list(own[name].shape)}"
        else:
            what = f"it lacks {missing[0]!r}" if missing else f"it has {extra[0]!r}, which this model has not"
        raise PassError(
            f"models[{index}] is of another architecture: {what}",
            where=f"pass 'merge_models' ({len(missing)} missing, {len(extra)} extra, {len(shapes)} of other shape)",
            fix="merge models that were fine-tuned from one base",
        )


def _check_finite(donor: Mapping[str, Tensor], index: int) -> None:
    bad = next((n for n, t in donor.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad:
        raise PassError(
            f"{bad!r} of models[{index}] holds NaN or infinite values",
            where="pass 'merge_models'",
            fix="load the right weights",
        )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
