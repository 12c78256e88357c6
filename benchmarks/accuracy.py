"""What the schemes cost in accuracy, on real weights and data, run on ONNX Runtime.

python benchmarks/accuracy.py minilm | resnet | stories [--data DIR]
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import paretoc as pc
import torch
from _models import Resnet, arguments, cifar, data_folder, embed, minilm, stories, sts
from safetensors.torch import load_file
from scipy.stats import spearmanr

MINILM = {
    "fp32": [],
    "W8A8-dynamic": ["quantize:W8A8-dynamic,embeddings=true"],
    "W8A8-dynamic per token": ["quantize:W8A8-dynamic,granularity=token,embeddings=true"],
    "W8A8 static": ["quantize:W8A8,embeddings=true"],
    **{
        f"W8A8 static, range {name}": [f"quantize:W8A8,embeddings=true,range={name}"]
        for name in ("minmax", "percentile", "entropy")
    },
    "W8A8 static, smooth and bias": ["smooth:0.8,insert=true", "quantize:W8A8,embeddings=true", "correct_bias"],
    "W8A8 static, attention too": ["quantize:W8A8,embeddings=true,attention=true"],
    "W8A8 static, scores too": ["quantize:W8A8,embeddings=true,attention=scores"],
    **{f"keys and values {code}": [f"quantize_cache:{code}"] for code in ("int8", "e4m3", "int4")},
    "W8A16": ["quantize:W8A16"],
    "W4A16 group 32": ["quantize:W4A16,group_size=32,fitter=mse"],
    "W4A16 group 32, int8 embeddings": ["quantize:W4A16,group_size=32,fitter=mse,embeddings=true"],
    "2:4 magnitude": ["prune_nm:2:4"],
    "2:4 + W4A16": ["prune_nm:2:4", "quantize:W4A16,embeddings=true"],
}

RESNET = {
    "W8A8, rounded": ["quantize:W8A8,fitter=rtn"],
    "W8A8": ["quantize:W8A8"],
    "W8A8, range minmax": ["quantize:W8A8,range=minmax"],
    "W8A8, bias": ["quantize:W8A8", "correct_bias"],
    "W8A8-dynamic": ["quantize:W8A8-dynamic"],
    "W4A8": ["quantize:W4A8"],
    "W4A8, gptq, bias and deviation": ["quantize:W4A8,fitter=gptq", "correct_bias:deviation=true"],
    "W4A8, adaround, bias": ["quantize:W4A8,fitter=adaround", "correct_bias"],
}


def size_on_disk(compiled: Any) -> int:
    """Bytes of the model files of a saved artifact (without the report page)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "artifact")
        files = ("model.onnx", "weights.safetensors", "manifest.json")
        return sum(os.path.getsize(Path(folder) / "artifact" / name) for name in files)


def run_minilm(folder: Path) -> None:
    model, tokenizer = minilm()
    first, second, scores = sts(folder, "dev")
    train = sts(folder, "train")[0][:128]
    calibration = [dict(tokenizer(train[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 128, 16)]

    def spearman(run: Any) -> float:
        a, b = embed(run, tokenizer, first), embed(run, tokenizer, second)
        return float(spearmanr((a * b).sum(-1).numpy(), scores).statistic)

    reference = 0
    print(f"MiniLM-L6, STS-B dev, {len(scores)} pairs; PyTorch fp32 Spearman {spearman(model):.4f}")
    for label, passes in MINILM.items():
        compiled = pc.compile(model, passes, example_inputs=calibration[0], calibration=calibration)
        size = size_on_disk(compiled)
        reference = reference or size
        print(
            f"{label:34s} Spearman {spearman(compiled):.4f}  {size / 1e6:7.2f} MB  {size / reference:.4f}", flush=True
        )


def run_resnet(folder: Path) -> None:
    images, labels = cifar(folder, "dev")
    calibration = [cifar(folder, "calib")[0][i : i + 64] for i in range(0, 512, 64)]
    for depth in (20, 32):
        model = Resnet(depth).eval()
        model.load_state_dict(load_file(folder / f"resnet{depth}_cifar10.safetensors"))
        with torch.no_grad():
            right = torch.cat([model(x).argmax(-1) for x in images.split(256)]) == labels
        print(f"ResNet-{depth} fp32 top-1 {right.float().mean():.4f}")
        for text, passes in RESNET.items():
            compiled = pc.compile(model, passes, example_inputs=calibration[0], calibration=calibration)
            got = torch.cat([compiled(x).argmax(-1) for x in images.split(256)]) == labels
            change = got.float() - right.float()
            error = change.std() / len(change) ** 0.5
            paired = f"{change.mean() * 100:+.2f} ± {1.96 * error * 100:.2f} points"
            print(f"  {text:34s} top-1 {got.float().mean():.4f}  paired change {paired} (95 %)", flush=True)


def run_stories(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "stories260k").eval()
    held_out = list(stories(folder))

    def nats(run: Any) -> float:
        total, count = 0.0, 0
        for tokens in held_out:
            with torch.no_grad():
                logits = run(input_ids=tokens).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
            count += tokens.shape[1] - 1
        return total / count

    reference = nats(model)
    print(f"stories260k, 100 stories; PyTorch fp32 {reference:.4f} nats/token")
    recipes = [
        ["quantize:W8A16"],
        ["quantize:W8A16,embeddings=true"],
        ["quantize:W4A16,group_size=32,ignore=*.down_proj", "quantize:W8A16"],  # 172 inputs: no group of 32
        ["quantize:W8A8-dynamic"],
    ]
    for passes in recipes:
        compiled = pc.compile(model, passes, example_inputs={"input_ids": held_out[0]})
        loss = nats(compiled)
        print(f"  {' + '.join(passes):66s} {loss:.4f}  {loss - reference:+.4f}", flush=True)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("model", choices=("minilm", "resnet", "stories"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    {"minilm": run_minilm, "resnet": run_resnet, "stories": run_stories}[chosen.model](data_folder(chosen.data))
