"""MiniLM-L6 in thin factors: what each method loses at equal parameters, and the speed on ONNX Runtime.

Quality: STS-B dev (1500 pairs), every linear of the encoder; change of the Spearman correlation, and the mean distance
of the embeddings to the original's; over draws of 256 training sentences to calibrate with. A claim holds when it does
on every draw. Speed: 8 × 128 tokens, both sessions in turn, against the ratio of multiply–accumulates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paretoc as pc
import torch
from _models import arguments, data_folder, embed, sts
from _quality import Sentences
from paretoc.compiler.cost import measure
from torch import Tensor

TARGETS = ("encoder.layer.*",)
METHODS = ("svd", "asvd", "whitened")
SENTENCES, DRAWS = 256, 3


class Quality:
    def __init__(self, folder: Any, pairs: int) -> None:
        self.bench = Sentences(folder, 0)
        self.bench.first, self.bench.second = self.bench.first[:pairs], self.bench.second[:pairs]
        self.bench.scores = self.bench.scores[:pairs]
        self.train = sts(folder, "train")[0]
        self.exact = self.embeddings(self.bench.model)
        self.whole = self.bench.spearman(self.similarity(self.exact))
        print(f"STS-B dev, {len(self.bench.first)} pairs, Spearman {self.whole:.4f}: change, mean distance")

    def embeddings(self, model: Any) -> Tensor:
        return embed(model, self.bench.tokenizer, self.bench.first + self.bench.second)

    def similarity(self, embeddings: Tensor) -> Tensor:
        first, second = embeddings.chunk(2)
        return (first * second).sum(-1)

    def calibration(self, draw: int) -> list[dict[str, Tensor]]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(draw))[:SENTENCES].tolist()
        chosen = [self.train[i] for i in order]
        return [
            dict(self.bench.tokenizer(chosen[i : i + 16], padding=True, return_tensors="pt"))
            for i in range(0, SENTENCES, 16)
        ]

    def lost(self, step: pc.Pass, draw: int) -> tuple[float, float]:
        """(change of Spearman, mean distance of an embedding), printed."""
        options = {"calibration": self.calibration(draw), "target": "eager", "verify": False, "progress": False}
        compiled = pc.compile(self.bench.model, [step], **options)
        found = self.embeddings(compiled.program)
        change = self.bench.spearman(self.similarity(found)) - self.whole
        distance = float((found - self.exact).norm(dim=-1).mean())
        share = compiled.report(latency=False).passes[-1]["metrics"]["share of their parameters"]
        print(f"  draw {draw}, {step.describe()}: share {share:.3f}, {change:+.4f}, {distance:.4f}", flush=True)
        return change, distance


def quality(bench: Quality, keeps: Sequence[float]) -> None:
    for keep in keeps:
        found = {
            method: [bench.lost(step(keep, method), draw) for draw in range(1 if method == "svd" else DRAWS)]
            for method in METHODS
        }
        for worse, better in (("svd", "asvd"), ("asvd", "whitened")):
            pairs = [(w, b) for w, b in zip(found[worse] * DRAWS, found[better], strict=False)]
            holds = [all(b[i] * sign > w[i] * sign for w, b in pairs) for i, sign in ((0, 1), (1, -1))]
            print(f"keep {keep}: {better} better than {worse} on every draw: Spearman {holds[0]}, distance {holds[1]}")


def other_options(bench: Quality) -> None:
    for options in ({}, {"sequential": False}, {"shared": True}, {"damp": 0.0}, {"damp": 0.1}):
        bench.lost(step(0.5, "whitened", **options), 0)
    budget = share_of_the_model(bench.bench.model, 0.5)
    bench.lost(step(None, "whitened", parameters=budget), 0)


def step(keep: float | None, method: str, **options: Any) -> pc.Pass:
    return pc.Factorize(keep, method, round_to=8, targets=TARGETS, **options)


def share_of_the_model(model: Any, keep: float) -> float:
    """The share of the model's parameters that is left when every linear of the encoder keeps `keep` of its own."""
    example = {"input_ids": torch.ones(1, 8, dtype=torch.int64), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    compiled = pc.compile(model, [step(keep, "svd")], example_inputs=example, target="eager", verify=False)
    report = compiled.report(latency=False)
    return report.compiled.parameters / report.original.parameters


def speed(model: Any, keeps: Sequence[float], runs: int) -> None:
    ids = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    recipes = {"whole": [], **{f"keep {keep}": [step(keep, "svd")] for keep in keeps}}
    compiled = {name: pc.compile(model, passes, example_inputs=call, verify=False) for name, passes in recipes.items()}
    macs = {name: one.report(latency=False).compiled.macs for name, one in compiled.items()}
    calls = {name: (lambda one=one: one(**call)) for name, one in compiled.items()}
    times = measure(calls, runs=runs, budget_s=float("inf"))
    for name, time in times.items():
        gained, ideal = times["whole"].median / time.median, macs["whole"] / macs[name]
        print(f"{name}: {time.median:.1f} ms (least {time.minimum:.1f}), × {gained:.2f}, fewer MACs × {ideal:.2f}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("part", nargs="*", default=["quality", "options", "speed"])
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--runs", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if {"quality", "options"} & set(given.part):
        bench = Quality(data_folder(given.data), given.pairs)
        if "quality" in given.part:
            quality(bench, given.keep)
        if "options" in given.part:
            other_options(bench)
    if "speed" in given.part:
        from _models import minilm

        speed(minilm()[0], given.keep, given.runs)


if __name__ == "__main__":
    main()
