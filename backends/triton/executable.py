"""A lowered program on its device, and the truth about the kernels that run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ...compiler.backend import Row
from ...compiler.errors import ArtifactError, LoweringError
from ...compiler.program import Program, module_path
from ...compiler.sites import weight_sites
from ..eager import EagerExecutable
from .kernels.launch import INTERPRETED
from .kernels.plan import REFERENCE, TUNINGS, device_name
from .lower import Capability, Choice, lower
from .operators import lower_operators

#: the first compute capability that Triton compiles for
_LEAST = (8, 0)


@dataclass
class TritonExecutable(EagerExecutable):
    """`lowered` is `program` with kernels, its weights on `device`; `choices` says what was chosen for each node, by
    the names that they have in `program`."""

    lowered: Program
    choices: dict[str, Choice]
    device: torch.device

    @classmethod
    def from_program(cls, program: Program) -> TritonExecutable:
        device = _device()
        lowered = program.clone()
        capability = _capability(device)
        choices = lower_operators(lowered, capability) | lower(lowered, capability)
        place(lowered, device)
        return cls(program, lowered, choices, device)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs from any device; outputs where the first input was."""
        outputs = self.lowered.run([t.to(self.device, non_blocking=True) for t in inputs])
        return [o.to(inputs[0].device) for o in outputs] if inputs else outputs

    def save(self, directory: Path) -> dict[str, Any]:
        """Like the reference's; the manifest remembers the tilings that were measured on this GPU."""
        tilings = {"tilings": {device_name(): TUNINGS.dump()}} if TUNINGS.best else {}
        return super().save(directory) | tilings

    def explain(self) -> list[Row]:
        """Like the reference's rows, with one more for each other operator that has, or lacks, a kernel."""
        nodes = [site.node for site in weight_sites(self.program)]
        rows = [self._row(row, self.choices.get(n.name)) for row, n in zip(super().explain(), nodes, strict=True)]
        for node in self.program.graph.nodes:
            if node.name in self.choices and node not in nodes:
                row = Row(module_path(node) or node.name, "", str(node.target), False)
                rows.append(self._row(row, self.choices[node.name]))
        return rows

    def _row(self, reference: Row, choice: Choice | None) -> Row:
        if choice is None:
            return replace(reference, note="PyTorch")
        kernel, notes = choice.kernel, [choice.note]
        if choice.plan is not None:
            tiling = TUNINGS.pick(choice.plan)
            kernel = "" if tiling == REFERENCE else str(tiling)
            notes.append(TUNINGS.note(choice.plan))
        fast = self.device.type == "cuda" and kernel != ""
        if kernel and not fast:
            notes.append("interpreted, for tests")
        note = "; ".join(filter(None, notes))
        return replace(reference, kernel=kernel or reference.kernel, accelerated=fast, note=note)


def _device() -> torch.device:
    if isinstance(tl.sum, InterpretedFunction) != INTERPRETED:
        raise LoweringError(
            "TRITON_INTERPRET was changed after Triton had been imported",
            where="target='triton'",
            fix="set it before Python starts",
        )
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LoweringError(
            "there is no GPU, and Triton's interpreter was not asked for",
            where="target='triton'",
            fix="run on a machine with an NVIDIA GPU and PyTorch for CUDA, or set TRITON_INTERPRET=1 (slow: for tests)",
        )
    return torch.device("cuda", torch.cuda.current_device())


def _capability(device: torch.device) -> Capability:
    if device.type == "cpu":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST:
        raise LoweringError(
            f"the GPU has compute capability {capability[0]}.{capability[1]}, Triton needs {_LEAST[0]}.{_LEAST[1]}",
            where=f"target='triton' on {device_name()}",
            fix="use target='onnxruntime', or a GPU of the generation of the A100 or later",
        )
    return capability


def read_tilings(tables: Any) -> None:
    """Take over what an artifact's manifest remembers of this GPU. Raises ArtifactError."""
    try:
        TUNINGS.merge(tables.get(device_name(), {}))
    except (TypeError, AttributeError) as error:
        raise ArtifactError(
            "the tilings are not those of a triton artifact", where="manifest.json", fix="save the model again"
        ) from error


def place(program: Program, device: torch.device) -> None:
    """Move the weights, and what the graph itself makes, to the device. The original program keeps its own."""
    if device.type == "cpu":
        return
    for name, tensor in program.weights().items():
        program.set(name, tensor.to(device))
    for node in program.graph.nodes:
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, dict(node.kwargs)))
    program.module.recompile()
