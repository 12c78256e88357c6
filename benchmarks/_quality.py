"""Two real models with what is lost on them: what the parts of quantization_grid.py share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import paretoc as pc
import torch
from _models import embed, minilm, stories, sts
from scipy.stats import spearmanr
from torch import Tensor

Recipe = Sequence[Any]


def affine(bits: int, group: int) -> str:
    """Symmetric codes, except at two bits, where symmetry would leave three levels."""
    return f"Affine(bits={bits}, group={group}, symmetric={bits > 2})"


def quantize(fitter: str, weights: str) -> pc.Pass:
    return pc.Quantize("W8A16", weights=weights, fitter=fitter, targets=("Linear",))


def stored_bytes(compiled: pc.CompiledModel) -> tuple[int, int]:
    """Bytes of the encoded weights as they are stored, and in float32."""
    stored = dense = 0
    for node in compiled.program.calls(torch.ops.paretoc.decode.default):
        shape = tuple(node.args[2])  # type: ignore[arg-type]  # the shape of the weight
        encoding = compiled.program.encoding(node)
        assert encoding is not None
        stored += encoding.nbytes(shape)
        dense += 4 * int(np.prod(shape))
    return stored, dense


def decoded(compiled: pc.CompiledModel) -> pc.Program:
    """The same function with dense weights, decoded once and not at every call."""
    program = compiled.program.clone()
    for node in program.calls(torch.ops.paretoc.decode.default):
        program.restore(node, program.weight_value(node))
    program.refresh()
    return program


class Stories:
    """stories260k: nats a token, mean over each of 100 held-out stories. One scale a channel: 172 inputs have no group
    of 32."""

    title = "stories260k, 100 held-out stories, one scale a channel: nats/token, change ± standard error"
    group, rotation = 0, "rotate"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / "stories260k").eval()
        self.held_out = list(stories(folder))
        self.calibration = [{"input_ids": tokens} for tokens in stories(folder, range(64))]

    def score(self, run: Any) -> Tensor:
        """Mean loss of each story `[100]`."""
        losses = []
        for tokens in self.held_out:
            with torch.no_grad():
                logits = run(input_ids=tokens).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
        return torch.stack(losses)

    @cached_property
    def reference(self) -> Tensor:
        return self.score(self.model)

    def show(self, losses: Tensor) -> str:
        change = losses - self.reference
        return f"{losses.mean():.4f}  {change.mean():+.4f} ± {change.std() / len(change) ** 0.5:.4f}"


class Sentences:
    """MiniLM-L6: Spearman correlation on STS-B dev; groups of 32. BERT's post-norm residual stream cannot be rotated,
    its heads and what its down projections read can."""

    title = "MiniLM-L6, STS-B dev, groups of 32: Spearman, change ± standard error (paired bootstrap over pairs)"
    group, rotation = 32, "rotate:stream=false,online=true"

    def __init__(self, folder: Path, sentences: int = 256) -> None:
        self.model, self.tokenizer = minilm()
        self.first, self.second, scores = sts(folder, "dev")
        self.scores = np.array(scores)
        train = sts(folder, "train")[0][:sentences]
        self.calibration = [
            dict(self.tokenizer(train[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, sentences, 16)
        ]

    def score(self, run: Any) -> Tensor:
        """Similarity of each pair."""
        return (embed(run, self.tokenizer, self.first) * embed(run, self.tokenizer, self.second)).sum(-1)

    @cached_property
    def reference(self) -> Tensor:
        return self.score(self.model)

    def spearman(self, values: Tensor, chosen: Any = slice(None)) -> float:
        return float(spearmanr(values.numpy()[chosen], self.scores[chosen]).statistic)

    def show(self, values: Tensor) -> str:
        draws = np.random.default_rng(0).integers(0, len(self.scores), (200, len(self.scores)))
        changes = [self.spearman(values, d) - self.spearman(self.reference, d) for d in draws]
        change = self.spearman(values) - self.spearman(self.reference)
        return f"{self.spearman(values):.4f}  {change:+.4f} ± {np.std(changes):.4f}"


Bench = Stories | Sentences


def compiled_by(bench: Bench, passes: Recipe, model: Any = None) -> pc.CompiledModel:
    model = bench.model if model is None else model
    return pc.compile(model, passes, calibration=bench.calibration, target="eager", verify=False, progress=False)
