"""Narrower feed-forward layers of two real models that were not trained for it, and one file that serves every width.

Parts: stories, minilm (what is lost), adaptive (conditional computation on stories), file (bytes, memory, latency).
Noise is the standard error of the paired difference over stories or a bootstrap over sentence pairs; three draws of
calibration data, or three seeds of a random choice.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import paretoc as pc
import torch
from _models import arguments, data_folder
from _quality import Sentences, Stories
from paretoc.compiler.calibrate import gather, read_batches
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.cost import measure
from paretoc.plugins import AdaptiveComputation, CoreNeurons, MatFormer

SEEDS = range(3)
ORDERS = ("activation", "hessian", "magnitude")
WIDTHS = (0.125, 0.25, 0.5, 1.0)


class Trial:
    """One model, captured once, on which passes are tried."""

    def __init__(self, bench: Stories | Sentences) -> None:
        self.bench = bench
        self.program = pc.capture(bench.model, bench.calibration[0])
        canonicalize(self.program)

    def after(self, step: pc.Pass, batches: list[Any]) -> tuple[pc.Program, pc.PassResult]:
        program, read = self.program.clone(), read_batches(self.program, batches)
        with torch.random.fork_rng():
            result = step.apply(program, pc.Context(gather(program, step.needs(program), read), batches=read))
        return program, result

    def drawn(self, seed: int, count: int) -> list[Any]:
        chosen = np.random.default_rng(seed).permutation(len(self.bench.calibration))[:count]
        return [self.bench.calibration[i] for i in chosen]

    def show(self, step: pc.Pass, batches: list[Any], note: str = "") -> None:
        program, result = self.after(step, batches)
        with torch.no_grad():
            figure = self.bench.show(self.bench.score(program))
        metrics = ", ".join(f"{k} {v:.3f}" for k, v in result.metrics.items() if "error" in k)
        print(f"{step.describe():60s} {note:8s} {figure}  {metrics}", flush=True)


def fixed(width: float, order: str) -> MatFormer:
    return MatFormer(width, order=order, granularities=(width,))


def sliced(trial: Trial, widths: Iterable[float], orders: Iterable[str], count: int) -> None:
    """The first channels as they are, chosen at random, and sorted."""
    for width in widths:
        trial.show(fixed(width, "trained"), trial.drawn(0, 1), "raw")
        for order in orders:
            for seed in SEEDS if order == "activation" else SEEDS[:1]:
                trial.show(fixed(width, order), trial.drawn(seed, count), f"draw {seed}")
        for seed in SEEDS:
            trial.show(fixed(width, f"random(seed={seed})"), trial.drawn(0, 1))


def stories(bench: Stories) -> None:
    trial = Trial(bench)
    print(bench.title.split(",")[0], f"{len(bench.held_out)} stories, nats/token, change ± standard error")
    sliced(trial, (0.75, 0.5), ORDERS, 24)
    for keep in (0.4, 0.8):
        for absolute in (False, True):
            for seed in SEEDS:
                trial.show(CoreNeurons(keep, absolute=absolute), trial.drawn(seed, 24), f"draw {seed}")
        for seed in SEEDS:
            trial.show(fixed(keep, f"random(seed={seed})"), trial.drawn(0, 1))


def minilm(bench: Sentences) -> None:
    print(f"MiniLM-L6, the first {len(bench.first)} pairs of STS-B dev, Spearman, change ± standard error")
    sliced(Trial(bench), (0.5,), ORDERS, 8)


def adaptive(trial: Trial, count: int) -> None:
    """At the same share of the products of the learners; for "uniform" there is no gate."""
    for budget in (0.5, 0.75):
        for form in ("uniform", "masked", "ranked"):
            trial.show(AdaptiveComputation(budget, form=form), trial.drawn(0, count))


_MEMORY = """
import sys, torch, paretoc as pc
torch.set_num_threads(1)
folder, *members = sys.argv[1:]
x = {name: torch.ones(1, 16, dtype=torch.int64) for name in ("input_ids", "token_type_ids", "attention_mask")}
def memory():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    held = {l.split(":")[0]: int(l.split()[1]) for l in lines[1:]}
    return held["Rss"] / 1024, held["Private_Dirty"] / 1024
import onnxruntime
before, kept = memory(), []
for member in members:
    kept.append(pc.load(folder, float(member)))
    kept[-1](**x)
    after = memory()
    print(f"  {len(kept)} loaded: RSS +{after[0] - before[0]:.0f} MB, of it private {after[1] - before[1]:.0f} MB")
"""


def file(bench: Sentences, runs: int) -> None:
    """MiniLM at four widths in one artifact, against four artifacts."""
    for name, more in (("fp32", []), ("W8A8-dynamic", ["quantize:W8A8-dynamic"]), ("W4A16", ["quantize:W4A16"])):
        batches = bench.calibration[:4]
        models = {
            w: pc.compile(bench.model, [f"matformer:{w},order=activation", *more], calibration=batches, verify=False)
            for w in (WIDTHS if not more else WIDTHS[-2:])
        }
        with tempfile.TemporaryDirectory() as folder:
            pc.save(models, Path(folder) / "nested")
            for width, compiled in models.items():
                compiled.save(Path(folder) / f"{width}")
            sizes = {f.name: sum(g.stat().st_size for g in f.glob("*.*nsors")) for f in sorted(Path(folder).iterdir())}
            figures = ", ".join(f"{key} {size / 1e6:.1f} MB" for key, size in sizes.items())
            print(f"{name}: weights.safetensors {figures}", flush=True)
            if not more:
                members = [str(w) for w in reversed(WIDTHS)]
                subprocess.run([sys.executable, "-c", _MEMORY, str(Path(folder) / "nested"), *members], check=True)
        if not more:
            latency(bench, dict(models), batches, runs)


def latency(bench: Sentences, models: dict[Any, pc.CompiledModel], batches: list[Any], runs: int) -> None:
    """8 × 128 tokens on ONNX Runtime, by width and with half of the learners a token."""
    for form in ("uniform", "ranked"):
        step = AdaptiveComputation(0.5, form=form, steps=1, rows=256)
        models[form] = pc.compile(bench.model, [step], calibration=batches, verify=False)
    mask = torch.ones(8, 128, dtype=torch.int64)
    x = {"input_ids": torch.randint(1000, 20000, (8, 128)), "token_type_ids": 0 * mask, "attention_mask": mask}
    calls = {str(name): lambda m=m: m(**x) for name, m in models.items()}  # type: ignore[misc]
    times = measure(calls, runs=runs, budget_s=float("inf"))
    full = times["1.0"]
    for name, time in times.items():
        macs = models[float(name) if name[0].isdigit() else name].report(latency=False).to_dict()["compiled"]["macs"]
        faster = f"{full.median / time.median:.2f} × (minima {full.minimum / time.minimum:.2f} ×)"
        print(f"  {name:8s} {time.median:7.1f} ms, {faster}, {macs / 1e6:.0f} M MACs")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", default=["stories", "minilm", "adaptive", "file"])
    parser.add_argument("--held-out", type=int, default=100, help="stories")
    parser.add_argument("--pairs", type=int, default=1500, help="sentence pairs")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = data_folder(options.data)
    for part in options.parts:
        print(f"-- {part}", flush=True)
        if part in ("stories", "adaptive"):
            small = Stories(folder)
            small.held_out = small.held_out[-options.held_out :]
        if part in ("minilm", "file"):
            large = Sentences(folder)
            large.first, large.second = large.first[: options.pairs], large.second[: options.pairs]
            large.scores = large.scores[: options.pairs]
        if part == "stories":
            stories(small)
        elif part == "minilm":
            minilm(large)
        elif part == "adaptive":
            adaptive(Trial(small), 64)
        else:
            file(large, options.runs)


if __name__ == "__main__":
    main()
