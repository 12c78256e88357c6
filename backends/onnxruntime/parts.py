"""A batch in parts: as many threads as PyTorch has, each computing a few samples alone.

One thread on samples that fit its cache, with nothing to wait for, is faster than all threads on every operator of the
whole batch: MiniLM on 8 texts of 128 tokens takes .85 of the time, a ViT-S on 8 images .94 (2 threads; see
`benchmarks/onnxruntime_cpu.py`). Only where `mixes_samples` finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

import numpy as np
import torch
from torch import Tensor

from ...compiler.cost import cost
from ...compiler.program import Program, example_shape
from ...compiler.samples import mixes_samples
from ...compiler.sites import Site

#: products of a matrix want so many rows
_ROWS = 256
#: multiply–accumulates that are worth a thread of their own
_WORK = 1 << 27


@dataclass(frozen=True)
class Parts:
    """How a batch is cut: `inputs`, those that begin with it; `samples` that a thread takes at once; `least`, fewer are
    not worth it."""

    inputs: tuple[int, ...]
    samples: int
    least: int

    def cut(self, inputs: Sequence[Tensor], threads: int) -> list[list[Tensor]]:
        """The inputs of every part; of one part when the batch is too small, or its inputs are not of one size."""
        sizes = {len(inputs[index]) for index in self.inputs}
        batch = sizes.pop() if len(sizes) == 1 else 0
        samples = min(self.samples, ceil(batch / threads))
        if samples < max(self.least, 1) or samples >= batch:
            return [list(inputs)]
        starts = range(0, batch, samples)
        return [[x[i : i + samples] if n in self.inputs else x for n, x in enumerate(inputs)] for i in starts]


def joined(found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The outputs of a batch, from those of its parts. One thread copies: threads of PyTorch that have copied go on
    spinning for a while, and the next call waits for the CPU: it would take 1.3 times as long for 8 × 128 tokens of
    MiniLM on two cores."""
    return [torch.from_numpy(np.concatenate([o.numpy() for o in outputs])) for outputs in zip(*found, strict=True)]


def parts_of(program: Program, sites: Sequence[Site]) -> Parts | None:
    """How to cut the batches of a program; None when samples depend on one another."""
    if program.interface.cache is not None or mixes_samples(program):
        return None
    inputs = tuple(index for index, opened in enumerate(program.dynamic) if 0 in opened)
    batch = len(program.users_example()[inputs[0]])
    rows = max((rows_of(site) for site in sites if site.kind in ("linear", "conv")), default=0)
    rows = max(rows // program.repeats // max(batch, 1), 1)
    macs = max(cost(program).macs // max(batch, 1), 1)
    return Parts(inputs, ceil(_ROWS / rows), ceil(_WORK / macs))


def rows_of(site: Site) -> int:
    """How many rows of its input a site multiplies with its weight, at the example inputs."""
    shape = example_shape(site.node)
    return prod(shape[:-1]) if site.kind == "linear" else prod(shape) // shape[1]


def share_of_run(parts: Parts | None, program: Program) -> Fraction:
    """Of the rows that a site multiplies at the example inputs, those of one run."""
    if parts is None:
        return Fraction(1, program.repeats)
    example, first = program.users_example(), parts.inputs[0]
    run = parts.cut(example, torch.get_num_threads())[0]
    return Fraction(len(run[first]), max(len(example[first]), 1) * program.repeats)
