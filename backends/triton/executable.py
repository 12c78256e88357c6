"""A lowered program on its device, and the truth about the kernels that run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ...compiler.backend import Row
from ...compiler.errors import LoweringError
from ...compiler.program import Program, module_path
from ...compiler.sites import weight_sites
from ..eager import EagerExecutable
from .kernels.launch import INTERPRETED
from .lower import Choice, lower, lower_tokens


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
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        lowered = program.clone()
        choices = lower(lowered, capability) | lower_tokens(lowered)
        place(lowered, device)
        return cls(program, lowered, choices, device)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Inputs from any device; outputs where the first input was."""
        outputs = self.lowered.run([t.to(self.device, non_blocking=True) for t in inputs])
        return [o.to(inputs[0].device) for o in outputs] if inputs else outputs

    def explain(self) -> list[Row]:
        """Like the reference's rows, with one more for each token operator."""
        nodes = [site.node for site in weight_sites(self.program)]
        rows = [self._row(row, self.choices.get(n.name)) for row, n in zip(super().explain(), nodes, strict=True)]
        for node in self.program.graph.nodes:
            if node.name in self.choices and node not in nodes:
                row = Row(module_path(node) or node.name, "", str(node.target), False)
                rows.append(self._row(row, self.choices[node.name]))
        return rows

    def _row(self, reference: Row, choice: Choice | None) -> Row:
        if choice is None or not choice.triton:
            return replace(reference, note=choice.note if choice else "PyTorch")
        fast = self.device.type == "cuda"
        note = choice.note if fast else "; ".join(filter(None, [choice.note, "interpreted, for tests"]))
        return replace(reference, kernel=choice.kernel, accelerated=fast, note=note)


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


def place(program: Program, device: torch.device) -> None:
    """Move the weights, and what the graph itself makes, to the device. The original program keeps its own."""
    if device.type == "cpu":
        return
    for name, tensor in program.weights().items():
        program.set(name, tensor.to(device))
    for node in program.graph.nodes:
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, dict(node.kwargs)))
    program.module.recompile()
