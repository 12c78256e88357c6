"""Which tiling runs a product: the fastest that fits, timed once on a GPU; elsewhere the first of its plan.

A plan lists the tilings of one class of shapes, the most promising first, and ends with the reference in PyTorch: where
that is the fastest, or nothing else fits into the GPU, it runs. What was measured is data (`dump`, `merge`) that
travels with an artifact, and is kept in a file for other processes on a GPU of the same name under the same Triton;
with the same table, the same sums are added in the same order.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ....compiler.errors import ArtifactError
from ....compiler.files import cache_folder, whole_file
from .launch import Tiling

#: no kernel: weights are decoded, and PyTorch computes the rest
REFERENCE = Tiling("PyTorch", 0, 0, 0)
#: the largest numbers of tokens of the classes of shapes after that of one token
_CLASSES = (16, 64, 512, 4096)
_MANY = 1 << 30
T = TypeVar("T")


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


def device_name() -> str:
    """The GPU, or "" where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def cache_file() -> Path:
    """Where what was measured on this GPU is kept between processes."""
    return cache_folder() / f"triton-{triton.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', device_name())}.json"


@dataclass
class Tunings:
    """Per plan, the tiling that was fastest, and those that do not fit with the reason. `shared`: with other processes
    of this machine."""

    best: dict[str, Tiling] = field(default_factory=dict)
    refused: dict[str, dict[Tiling, str]] = field(default_factory=dict)
    shared: bool = False

    def pick(self, plan: Plan) -> Tiling:
        refused = self.refused.get(plan.key, {})
        best = self.best.get(plan.key)
        if best in plan.tilings and best not in refused:
            return best
        return next(tiling for tiling in plan.tilings if tiling not in refused)

    def run(self, plan: Plan, x: Tensor, call: Callable[[Tiling], T]) -> T:
        """`call` with the tiling for x. One that asks for more than the GPU has is left out, which is said."""
        if not self._knows(plan) and can_time(x):
            if self.shared:
                self._recall()
            if not self._knows(plan):
                times = {tiling: self._time(plan, tiling, call) for tiling in plan.tilings}
                self.best[plan.key] = min(times, key=lambda tiling: times[tiling])
                if self.shared:
                    self._keep()
        while True:
            try:
                return call(self.pick(plan))
            except OutOfResources as error:
                self._refuse(plan, self.pick(plan), error)

    def note(self, plan: Plan) -> str:
        """What explain() must say."""
        return "; ".join(self.refused.get(plan.key, {}).values())

    def _knows(self, plan: Plan) -> bool:
        return self.best.get(plan.key) in plan.tilings

    def _recall(self) -> None:
        """Add what other processes have measured; a file that cannot be read is as none."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            self.merge(json.loads(cache_file().read_text()) | self.dump())

    def _keep(self) -> None:
        """For other processes. Where nothing can be written, each measures for itself."""
        file, fix = cache_file(), "set PARETOC_CACHE to a writable directory"
        with suppress(ArtifactError), whole_file(file, where="keeping the measured tilings", fix=fix) as part:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self.dump(), indent=1))

    def _time(self, plan: Plan, tiling: Tiling, call: Callable[[Tiling], object]) -> float:
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
TUNINGS = Tunings(shared=True)
