"""The public conformance kit: does an encoding, or a pass, keep its contract?

Plugin authors run `check_encoding(MyEncoding(…))` and `check_pass(MyPass(…))` in their own tests. Every rule
is a small function in `encoding_rules` or `pass_rules`, its docstring the rule; the lists there are the order
in which they run. The first rule that does not hold raises ConformanceError, which names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .conformance import run
from .encoding_rules import (
    ENCODING_RULES,
    IDEMPOTENT,
    SHAPES,
    TARGET_RULES,
    TENSOR_RULES,
    TRACE_RULES,
    Lowered,
    Shape,
    Stored,
    accepts,
    weights,
)
from .encodings import Encoding
from .errors import ConformanceError
from .pass_rules import PASS_RULES, TRIAL_RULES, Trial, default_models, described
from .passes import Pass, PassResult

__all__ = ["check_encoding", "check_pass"]


def check_encoding(
    encoding: Encoding,
    *,
    shapes: Sequence[Shape] = SHAPES,
    seed: int = 0,
    idempotent: float | None = IDEMPOTENT,
    targets: Sequence[str] = (),
) -> None:
    """Raise ConformanceError when an encoding breaks a rule.

    `shapes` that `layout` refuses with OptionError are left out, and so are weights that `check` refuses; at
    least one shape must remain. `idempotent=None` waives the rule `encode_is_idempotent` for an encoding that
    finds its values by an iterative search. On each of `targets`, such as "onnx", a linear layer of the first
    accepted shape is run too.
    """
    run(ENCODING_RULES, encoding, str(encoding))
    accepted = [shape for shape in shapes if accepts(encoding, shape)]
    if not accepted:
        raise ConformanceError(
            f"layout refuses each of the {len(shapes)} shapes",
            where=f"{encoding}, shapes {[list(shape) for shape in shapes]}",
            fix="pass shapes= that this encoding can store",
        )
    for shape in accepted:
        for kind, weight in weights(shape, seed).items():
            stored = Stored(encoding, kind, weight, seed, idempotent)
            if stored.accepted:
                rules = (*TENSOR_RULES, *TRACE_RULES) if kind == "normal" else TENSOR_RULES
                run(rules, stored, f"{encoding}, {kind} weights of shape {list(shape)}")
    for target in targets:
        layer = Lowered(encoding, accepted[0], seed, target)
        run(TARGET_RULES, layer, f"{encoding}, a linear layer of shape {list(accepted[0])}, target {target!r}")


def check_pass(
    transform: Pass,
    model: nn.Module | None = None,
    example_inputs: Any = None,
    *,
    calibration: Any = None,
    seed: int = 0,
) -> PassResult:
    """Raise ConformanceError when a pass breaks a rule; otherwise return what it reports about the model.

    Without a `model` the pass meets a small perceptron and a small vision transformer; it may refuse one of
    them, in the three lines of a ParetocError. `calibration` defaults to the example inputs.
    """
    run(PASS_RULES, transform, described(transform))
    candidates = default_models() if model is None else [(type(model).__name__, model, example_inputs)]
    results, refusals = [], []
    for name, candidate, example in candidates:
        trial = Trial(transform, candidate, example, calibration, seed)
        refusal = trial.refusal() if model is None else ""
        if refusal:
            refusals.append(f"{name}: {refusal}")
        else:
            run(TRIAL_RULES, trial, f"{described(transform)}, model {name}")
            results.append(trial.result)
    if not results:
        raise ConformanceError(
            f"it refuses every default model: {'; '.join(refusals)}",
            where=described(transform),
            fix="pass model= and example_inputs= that it can transform",
        )
    return results[0]
