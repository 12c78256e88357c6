"""Width pruning without training: ResNet-20 on CIFAR-10 and MiniLM on STS-B, every criterion, with and without refit.

    python benchmarks/width.py resnet | tune | minilm | speed | depth | latency

`tune` trains the pruned ResNet-20 for a few epochs on 4000 images in plain PyTorch; `speed` compares the latency of
pruned MiniLMs on ONNX Runtime with their multiply–accumulates; `depth` leaves out layers of MiniLM and stories260k by
influence, by error, the last ones and at random; `latency` prunes MiniLM to latencies that are measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import paretoc as pc
import torch
from _models import Resnet, arguments, cifar, data_folder
from _quality import Sentences, Stories, compiled_by
from paretoc.compiler.cost import cost, measure
from safetensors.torch import load_file
from torch import Tensor

CRITERIA = ("hessian", "activation", "taylor", "magnitude", "random")
MINILM = {
    "FFN width 75 %": "prune_width:0.75,axes=hidden",
    "FFN width 50 %": "prune_width:0.5,axes=hidden",
    "heads 75 %": "prune_width:0.75,axes=heads",
}


def resnet(folder: Path) -> tuple[torch.nn.Module, list[Tensor]]:
    """ResNet-20 and 256 calibration images in batches."""
    model = Resnet(20).eval()
    model.load_state_dict(load_file(folder / "resnet20_cifar10.safetensors"))
    return model, list(cifar(folder, "calib")[0][:256].split(64))


def right(run: Any, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(x).argmax(-1) for x in images.split(250)]) == labels


def paired(got: Tensor, before: Tensor) -> str:
    change = (got.float() - before.float()) * 100
    interval = 1.96 * float(change.std()) / len(change) ** 0.5
    return f"{got.float().mean():.4f}  {change.mean():+.2f} ± {interval:.2f} points"


def pruned(model: torch.nn.Module, recipe: str, batches: Any) -> pc.CompiledModel:
    return pc.compile(model, [recipe], calibration=batches, target="eager", verify=False, progress=False)


def share(compiled: pc.CompiledModel) -> float:
    return cost(compiled.program).macs / cost(compiled.original).macs


def run_resnet(folder: Path, count: int, criteria: list[str]) -> None:
    model, batches = resnet(folder)
    images, labels = (data[:count] for data in cifar(folder, "dev"))
    before = right(model, images, labels)
    print(f"ResNet-20, {count} test images, fp32 {before.float().mean():.4f}; change paired, 95 %", flush=True)
    for left in (0.7, 0.5):
        for criterion in criteria:
            for refit in ("false", "true"):
                recipe = f"prune_width:macs={left},criterion={criterion},refit={refit},round_to=2"
                compiled = pruned(model, recipe, batches)
                got = right(compiled, images, labels)
                print(f"{criterion:10s} refit={refit:5s} MACs {share(compiled):.3f}  {paired(got, before)}", flush=True)


def run_tune(folder: Path, count: int, criteria: list[str], epochs: int = 3, rate: float = 1e-3) -> None:
    model, batches = resnet(folder)
    images, labels = (data[:count] for data in cifar(folder, "dev"))
    x, y = cifar(folder, "calib")
    before = right(model, images, labels)
    for left in (0.7, 0.5):
        compiled = pruned(model, f"prune_width:macs={left},criterion={criteria[0]},round_to=2", batches)
        net = compiled.module()
        print(f"MACs {share(compiled):.3f}, before training {paired(right(net, images, labels), before)}", flush=True)
        optimizer = torch.optim.Adam(net.parameters(), rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * len(x.split(64)))
        generator = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            for chosen in torch.randperm(len(x), generator=generator).split(64):
                inputs = augmented(x[chosen], generator)
                with torch.no_grad():
                    teacher = model(inputs).softmax(-1)
                logits = net(inputs)
                loss = torch.nn.functional.cross_entropy(logits, y[chosen])
                loss = loss + 4 * torch.nn.functional.cross_entropy(logits, teacher)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f"  epoch {epoch + 1}: {paired(right(net, images, labels), before)}", flush=True)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images mirrored, all moved by up to two pixels."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.nn.functional.pad(x, (2, 2, 2, 2))[:, :, 2 + down : 34 + down, 2 + right : 34 + right]


def sentences(folder: Path, count: int) -> Sentences:
    bench = Sentences(folder)
    bench.first, bench.second, bench.scores = bench.first[:count], bench.second[:count], bench.scores[:count]
    return bench


def run_minilm(folder: Path, count: int, criteria: list[str]) -> None:
    bench = sentences(folder, count)
    print(f"{bench.title}; {len(bench.scores)} pairs, fp32 {bench.spearman(bench.reference):.4f}", flush=True)
    for title, recipe in MINILM.items():
        for criterion in criteria:
            for refit in ("false", "true"):
                compiled = compiled_by(bench, [f"{recipe},criterion={criterion},refit={refit}"])
                name, score = f"{title}  {criterion:10s} refit={refit:5s}", bench.show(bench.score(compiled))
                print(f"{name} MACs {share(compiled):.3f}  {score}", flush=True)


def run_speed(folder: Path, count: int, criteria: list[str]) -> None:
    bench, inputs = Sentences(folder), long_sentences()
    whole = pc.compile(bench.model, [], example_inputs=inputs)
    for title, recipe in MINILM.items():
        narrow = pc.compile(bench.model, [f"{recipe},criterion=magnitude,refit=false"], example_inputs=inputs)
        print(f"{title}: MACs {share(narrow):.3f}, latency {compared(whole, narrow, inputs, count)}", flush=True)


def run_depth(folder: Path, count: int, criteria: list[str]) -> None:
    for bench in (sentences(folder, count), Stories(folder)):
        print(f"{bench.title}; whole {bench.show(bench.reference)}", flush=True)
        layers = bench.model.config.num_hidden_layers
        for gone in (1, 2):
            recipes = {name: f"prune_depth:{gone},criterion={name}" for name in ("influence", "error")}
            recipes["last"] = without(range(layers - gone, layers))
            for seed in range(3):
                chosen = torch.randperm(layers, generator=torch.Generator().manual_seed(seed))[:gone]
                recipes[f"random, seed {seed}"] = without(chosen.tolist())
            for name, recipe in recipes.items():
                compiled = compiled_by(bench, [recipe])
                kept = {int(found[1]) for n in compiled.state_dict() if (found := re.search(r"\.layers?\.(\d+)\.", n))}
                left = f"by {name:14s} without {sorted(set(range(layers)) - kept)} of {layers}"
                print(f"{left}  MACs {share(compiled):.3f}  {bench.show(bench.score(compiled))}", flush=True)


def without(layers: Iterable[int]) -> str:
    return f"prune_depth:targets=[{','.join(f'*.layer*.{layer}.*' for layer in layers)}]"


def run_latency(folder: Path, count: int, criteria: list[str]) -> None:
    bench, inputs = Sentences(folder, sentences=64), long_sentences()
    calibration = [{name: batch[name] for name in inputs} for batch in bench.calibration]
    whole = pc.compile(bench.model, [], example_inputs=inputs)
    for recipe in ("prune_width:latency=0.7,criterion=magnitude,refit=false", "prune_depth:latency=0.7,unit=branch"):
        compiled = pc.compile(bench.model, [recipe], example_inputs=inputs, calibration=calibration, verify=False)
        found = compiled.report(latency=False).passes[-1]["metrics"]
        again = compared(whole, compiled, inputs, count)
        print(f"{recipe}: MACs {found['macs']:.3f}, measured {found['latency']:.3f}, again {again}", flush=True)


def compared(whole: Any, pruned: Any, inputs: dict[str, Tensor], runs: int) -> str:
    """Latency as a share of the whole model's."""
    calls = {"whole": lambda: whole(**inputs), "pruned": lambda: pruned(**inputs)}
    times = measure(calls, runs=runs, budget_s=float("inf"))
    before, after = times["whole"], times["pruned"]
    return f"{after.median / before.median:.3f} of medians, {after.minimum / before.minimum:.3f} of minima"


def long_sentences() -> dict[str, Tensor]:
    """8 of 128 tokens."""
    ids = torch.randint(1000, 30000, (8, 128), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


PARTS = {
    "resnet": run_resnet, "tune": run_tune, "minilm": run_minilm,
    "speed": run_speed, "depth": run_depth, "latency": run_latency,
}  # fmt: skip

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--count", type=int, default=4000, help="images, pairs of sentences, or timed runs")
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    PARTS[chosen.part](data_folder(chosen.data), chosen.count, chosen.criteria)
