"""Two real models compiled and run on ONNX Runtime: what was gained and what it cost, measured while you wait.

    python benchmarks/demo.py        (or: make demo)

all-MiniLM-L6-v2 with its published weights embeds the sentences of sentences.txt; a small vision transformer is
trained here on scikit-learn's handwritten digits. Nothing is fetched.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import paretoc as pc
import torch
from _models import embed, minilm
from paretoc.compiler.cost import Latency, measure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

SCHEMES = {
    "W8A8 static": ["quantize:W8A8"],
    "W8A8-dynamic + embeddings": ["quantize:W8A8-dynamic,embeddings=true"],
    "2:4 + W4A16": ["prune_nm:2:4", "quantize:W4A16"],
}
REDUCTIONS = {
    "merge r=4": ["merge_tokens:4"],
    "merge r=8": ["merge_tokens:8"],
    "prune keep=0.8": ["prune_tokens:0.8"],
}
PYTORCH, PLAIN = "PyTorch eager", "ONNX Runtime fp32"
#: pairs of sentences.txt that calibrate
CALIBRATION_PAIRS = 16

console = Console(highlight=False)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done, and afterwards how long it took."""
    start = time.perf_counter()
    console.print(f"- {text} …", end=" ", soft_wrap=True)
    yield
    console.print(f"{time.perf_counter() - start:.1f} s")


def show(table: Table) -> None:
    """Lines and colours on a terminal; plain text, one row a line, when piped."""
    console.print()
    if console.is_terminal:
        console.print(table)
    else:
        console.print(table.title, soft_wrap=True)
        table.box, table.pad_edge, table.title = None, False, None
        Console(width=1000, highlight=False).print(table)
    console.print()


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    return made


def size_on_disk(compiled: Any) -> int:
    """Bytes of the model files of a saved artifact (without the report page)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "artifact")
        files = ("model.onnx", "weights.safetensors", "manifest.json")
        return sum((Path(folder) / "artifact" / name).stat().st_size for name in files)


def error_of(values: list[float]) -> float:
    """The standard error of their mean."""
    return stdev(values) / len(values) ** 0.5


def timed(models: dict[str, Any], call: Callable[[Any], Any], runs: int) -> dict[str, Latency]:
    """Every model called in turn, `runs` times, in this process."""

    def bound(model: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return call(model)

        return run

    return measure({name: bound(model) for name, model in models.items()}, runs=runs, budget_s=15)


def speed(times: dict[str, Latency], name: str, base: str) -> float:
    return times[base].median / times[name].median


# -- sentences -----------------------------------------------------------------------------------------------


def sentence_pairs() -> list[tuple[str, str]]:
    lines = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" | ") for line in lines if not line.startswith("#")]
    return [(first, second) for first, second in pairs]


def found(embeddings: Tensor) -> float:
    """The share of sentences, in pairs one after the other, whose nearest neighbour is their other wording."""
    likeness = embeddings @ embeddings.T
    likeness.fill_diagonal_(-1)
    partner = torch.arange(len(embeddings)) ^ 1
    return float((likeness.argmax(-1) == partner).float().mean())


def sentences_demo() -> list[str]:
    console.print("[bold]1. all-MiniLM-L6-v2, 22.7 M parameters, sentence embeddings[/bold]")
    with step("loading the model"):
        model, tokenizer = minilm()
    pairs = sentence_pairs()
    train = [sentence for pair in pairs[:CALIBRATION_PAIRS] for sentence in pair]
    test = [sentence for pair in pairs[CALIBRATION_PAIRS:] for sentence in pair]

    def tokens(sentences: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(sentences, padding=True, return_tensors="pt"))

    calibration = [tokens(train[i : i + 8]) for i in range(0, len(train), 8)]
    models: dict[str, Any] = {PYTORCH: model}
    for name, passes in {PLAIN: [], **SCHEMES}.items():
        with step(f"compiling: {name}"):
            models[name] = pc.compile(
                model, passes, example_inputs=calibration[0], calibration=calibration, progress=False
            )
    with step(f"embedding {len(test)} sentences with each"):
        embedded = {name: embed(each, tokenizer, test) for name, each in models.items()}
        sizes = {name: size_on_disk(each) for name, each in models.items() if name != PYTORCH}
    one, many = tokens(test[:1]), tokens(test[:32])
    with step("measuring latency, all in turn"):
        single = timed(models, lambda each: each(**one), runs=30)
        batch = timed(models, lambda each: each(**many), runs=15)

    words = many["input_ids"].shape[1]
    made = table(
        f"{len(test)} sentences none of which calibrated; {torch.get_num_threads()} threads; median latencies",
        "", "MB on disk", "1 sentence, ms", f"32 × {words} tokens, ms", "cosine to PyTorch", "other wording found",
    )  # fmt: skip
    cosines = {name: (each * embedded[PYTORCH]).sum(-1).tolist() for name, each in embedded.items()}
    for name in models:
        size = f"{sizes[name] / 1e6:.1f}" if name in sizes else ""
        likeness = f"{mean(cosines[name]):.4f} ± {error_of(cosines[name]):.4f}"
        made.add_row(
            name, size, f"{single[name].median:.2f}", f"{batch[name].median:.1f}",
            "" if name == PYTORCH else likeness, f"{found(embedded[name]):.1%}",
        )  # fmt: skip
    show(made)
    for name in SCHEMES:
        console.print(f"{name} runs on {kernels(models[name])}.", soft_wrap=True)
    console.print()
    return [
        f"{name}: {sizes[PLAIN] / sizes[name]:.1f} times smaller on disk; "
        f"{pace(speed(batch, name, PLAIN))} than uncompressed ONNX Runtime and {pace(speed(batch, name, PYTORCH))} "
        f"than PyTorch for 32 sentences, {pace(speed(single, name, PLAIN))} and {pace(speed(single, name, PYTORCH))} "
        f"for one; embeddings at cosine {mean(cosines[name]):.4f} ± {error_of(cosines[name]):.4f} of the original's, "
        f"the other wording found for {found(embedded[name]):.1%} of {len(test)} sentences "
        f"({found(embedded[PYTORCH]):.1%} before)."
        for name in SCHEMES
    ]


def kernels(compiled: pc.CompiledModel) -> str:
    """The kernels that run the linear sites, with their counts, as `explain()` names them."""
    counts: dict[str, int] = {}
    for row in compiled.explain().rows:
        if "Gather" not in row.kernel:
            counts[row.kernel] = counts.get(row.kernel, 0) + 1
    return ", ".join(f"{kernel} at {count} sites" for kernel, count in counts.items())


def pace(ratio: float) -> str:
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


# -- digits --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Vit(nn.Module):
    """Images `[B, 1, 32, 32]` as 64 patches and a class token."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.5 * torch.randn(1, 65, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1197 images to train on and 600 to test, 8 × 8 pixels enlarged to 32 × 32."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 0.6  # roughly centred
    images, labels = F.interpolate(images, scale_factor=4, mode="bilinear"), torch.tensor(data.target)[order]
    return images[:1197], labels[:1197], images[1197:], labels[1197:]


def trained(images: Tensor, labels: Tensor, epochs: int = 14, batch: int = 64, rate: float = 1e-3) -> Vit:
    """AdamW, one cycle. On one thread: operators as small as these gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Vit()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


def digits_demo() -> list[str]:
    console.print("[bold]2. A vision transformer, 65 tokens, 6 blocks, handwritten digits[/bold]")
    images, labels, test_images, test_labels = digits()
    with step("training it on 1197 images"):
        model = trained(images, labels)
    models: dict[str, Any] = {PYTORCH: model}
    with step(f"compiling: uncompressed, {', '.join(REDUCTIONS)}"):
        for name, passes in {PLAIN: [], **REDUCTIONS}.items():
            models[name] = pc.compile(model, passes, example_inputs=images[:2], progress=False)
    with step(f"classifying {len(test_images)} test images with each"), torch.inference_mode():
        right = {
            name: (torch.cat([each(x).argmax(-1) for x in test_images.split(100)]) == test_labels).float()
            for name, each in models.items()
        }
    with step("measuring latency, all in turn"):
        times = timed(models, lambda each: each(test_images[:64]), runs=15)
    costs = {name: each.report(latency=False).compiled for name, each in models.items() if name != PYTORCH}

    made = table(
        f"{len(test_images)} test images; {torch.get_num_threads()} threads; median latencies",
        "", "tokens per block", "MMACs an image", "64 images, ms", "accuracy", "change, points",
    )  # fmt: skip
    changes = {}
    for name in models:
        change = (100 * (right[name] - right[PYTORCH])).tolist()
        changes[name] = f"{mean(change):+.2f} ± {error_of(change):.2f}"
        cost = costs.get(name, costs[PLAIN])
        made.add_row(
            name, " ".join(map(str, cost.tokens)), f"{cost.macs / 2 / 1e6:.1f}", f"{times[name].median:.1f}",
            f"{right[name].mean():.1%} ± {100 * error_of(right[name].tolist()):.1f}",
            "" if name in (PYTORCH, PLAIN) else changes[name],
        )  # fmt: skip
    show(made)
    return [
        f"{name}: {costs[PLAIN].tokens[-1]} tokens become {costs[name].tokens[-1]} in the last block, "
        f"MACs are divided by {costs[PLAIN].macs / costs[name].macs:.2f}; {pace(speed(times, name, PLAIN))} than "
        f"uncompressed ONNX Runtime and {pace(speed(times, name, PYTORCH))} than PyTorch for 64 images; "
        f"accuracy changes by {changes[name]} points."
        for name in REDUCTIONS
    ]


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    told = sentences_demo() + digits_demo()
    console.print("[bold]What was gained, what it cost[/bold]")
    for line in told:
        console.print(f"- {line}", soft_wrap=not console.is_terminal)
    console.print(
        "± is one standard error. ONNX Runtime has no kernel for n:m sparsity: on it, 2:4 by itself saves nothing. "
        f"All of this took {time.perf_counter() - start:.0f} s.",
        soft_wrap=not console.is_terminal,
    )


if __name__ == "__main__":
    main()
