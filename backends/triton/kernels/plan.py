"""Which tiling runs a product: the fastest that fits, timed once on a GPU; elsewhere the first of its plan.

A plan lists the tilings of one class of shapes, the most promising first, and ends with the reference in PyTorch: where
that is the fastest, or nothing else fits into the GPU, it runs. What was measured is data (`dump`, `merge`) that
travels with an artifact; with the same table, the same sums are added in the same order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .launch import Tiling

#: no kernel: the weight is decoded, and multiplied by what PyTorch has
REFERENCE = Tiling("decode + linear in PyTorch", 0, 0, 0)
#: the largest numbers of tokens of the classes of shapes after that of one token
_CLASSES = (16, 64, 512, 4096)
_MANY = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What may run one class of shapes: `key` names it, `tilings` come in the order in which they are tried."""

    key: str
    tilings: tuple[Tiling, ...]


def tokens_class(M: int) -> int:
    """The largest number of tokens that is tiled like M."""
    return 1 if M == 1 else next((bound for bound in _CLASSES if bound >= M), _MANY)


def plan(operator: str, tokens: int, N: int, K: int, kinds: Sequence[object], tilings: Sequence[Tiling]) -> Plan:
    """`tokens` is a class; `kinds` are encodings and types that make another kernel of the same shape."""
    text = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
    return Plan(f"{operator} {'many' if tokens == _MANY else tokens} × {N} × {K}, {text}", (*tilings, REFERENCE))


def can_time(x: Tensor) -> bool:
    """Whether kernels on x can be timed here and now: not while `torch.compile` traces or a CUDA graph is captured."""
    return type(x) is Tensor and x.is_cuda and not torch.cuda.is_current_stream_capturing()


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call on the GPU."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


@dataclass
class Tunings:
    """Per plan, the tiling that was fastest, and those that do not fit with the reason."""

    best: dict[str, Tiling] = field(default_factory=dict)
    refused: dict[str, dict[Tiling, str]] = field(default_factory=dict)

    def pick(self, plan: Plan) -> Tiling:
        refused = self.refused.get(plan.key, {})
        best = self.best.get(plan.key)
        if best in plan.tilings and best not in refused:
            return best
        return next(tiling for tiling in plan.tilings if tiling not in refused)

    def run(self, plan: Plan, x: Tensor, call: Callable[[Tiling], Tensor]) -> Tensor:
        """`call` with the tiling for x. One that asks for more than the GPU has is left out, which is said."""
        if plan.key not in self.best and can_time(x):
            times = {tiling: self._time(plan, tiling, call) for tiling in plan.tilings}
            self.best[plan.key] = min(times, key=lambda tiling: times[tiling])
        while True:
            try:
                return call(self.pick(plan))
            except OutOfResources as error:
                self._refuse(plan, self.pick(plan), error)

    def note(self, plan: Plan) -> str:
        """What explain() must say."""
        return "; ".join(self.refused.get(plan.key, {}).values())

    def _time(self, plan: Plan, tiling: Tiling, call: Callable[[Tiling], Tensor]) -> float:
        try:
            return milliseconds(lambda: call(tiling))
        except OutOfResources as error:
            self._refuse(plan, tiling, error)
            return math.inf

    def _refuse(self, plan: Plan, tiling: Tiling, error: OutOfResources) -> None:
        reason = f"{tiling} needs {error.required} of {error.name}, this GPU has {error.limit}"
        self.refused.setdefault(plan.key, {})[tiling] = reason
        if len(self.refused[plan.key]) == 1:
            warnings.warn(f"{plan.key}: {reason}; another runs instead, see explain()", stacklevel=2)

    def dump(self) -> dict[str, Any]:
        """JSON."""
        return {key: asdict(tiling) for key, tiling in sorted(self.best.items())}

    def merge(self, table: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what `dump` gave. Entries that are not in a plan of this version are never picked.

        Raises TypeError for what is no table of tilings.
        """
        self.best |= {key: Tiling(**tiling) for key, tiling in table.items()}


#: those of this process
TUNINGS = Tunings()
