"""Latency on ONNX Runtime: MiniLM against ONNX Runtime's own quantisers, and a ViT with token merging.

    python benchmarks/latency.py minilm | vit [--threads 2] [--runs 15]

All contenders run interleaved in one process; the figures are medians (minima in brackets) and ratios of medians.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import paretoc as pc
import torch
from _models import arguments, minilm
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static


def interleaved(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, tuple[float, float]]:
    """Name → (median, minimum) in milliseconds."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (median(t), min(t)) for name, t in times.items()}


def show(title: str, times: dict[str, tuple[float, float]], base: str) -> None:
    print(title)
    for name, (middle, least) in times.items():
        print(f"  {name:44s} {middle:8.2f} ms ({least:8.2f})   {times[base][0] / middle:5.2f} × {base}")


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_minilm(runs: int) -> None:
    model, tokenizer = minilm()
    text = "the quick brown fox jumps over a lazy dog while many people watch it in the park today"
    words = text.split(" ")
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(words, 110)) for _ in range(32)]
    encoded = dict(tokenizer(sentences, padding="max_length", max_length=128, truncation=True, return_tensors="pt"))
    example = {k: v[:8] for k, v in encoded.items()}
    calibration = [{k: v[i : i + 8] for k, v in encoded.items()} for i in range(0, 32, 8)]
    recipes = {
        "paretoc fp32": [],
        "paretoc W8A8-dynamic": ["quantize:W8A8-dynamic,embeddings=true"],
        "paretoc W8A8 static": ["quantize:W8A8,embeddings=true"],
        "paretoc W8A8-dynamic per token": ["quantize:W8A8-dynamic,granularity=token,embeddings=true"],
        "paretoc W4A16": ["quantize:W4A16,embeddings=true"],
    }
    compiled = {n: pc.compile(model, p, example_inputs=example, calibration=calibration) for n, p in recipes.items()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plain, peers = root / "fp32.onnx", {}
        pc.compile(model, [], example_inputs=example, target="onnx").export_onnx(plain)
        peers["ORT fp32"] = session(plain)
        quantize_dynamic(plain, root / "dynamic.onnx", weight_type=QuantType.QInt8, per_channel=True)
        peers["ORT quantize_dynamic"] = session(root / "dynamic.onnx")
        numpy_batches = [{k: v.numpy() for k, v in batch.items()} for batch in calibration]
        quantize_static(
            plain, root / "static.onnx", Reader(numpy_batches), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
        )  # fmt: skip
        peers["ORT quantize_static"] = session(root / "static.onnx")
        for batch in (1, 8):
            feed = {k: v[:batch].contiguous() for k, v in example.items()}
            arrays = {k: v.numpy() for k, v in feed.items()}

            def eager(feed: dict[str, Any] = feed) -> Any:
                with torch.inference_mode():
                    return model(**feed)

            calls: dict[str, Callable[[], Any]] = {"PyTorch eager fp32": eager}
            calls |= {n: (lambda s=s, a=arrays: s.run(None, a)) for n, s in peers.items()}
            calls |= {n: (lambda c=c, f=feed: c(**f)) for n, c in compiled.items()}
            show(f"MiniLM-L6, {batch} × 128 tokens", interleaved(calls, runs), "ORT fp32")


def run_vit(runs: int) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    model = ViTForImageClassification(config).eval()
    images = torch.randn(8, 3, 224, 224)
    recipes = {
        "paretoc fp32": [],
        "paretoc merge r=13": ["merge_tokens:13"],
        "paretoc int8": ["quantize:W8A8-dynamic"],
        "paretoc int8 + merge r=13": ["merge_tokens:13", "quantize:W8A8-dynamic"],
    }
    compiled = {n: pc.compile(model, p, example_inputs=images[:1]) for n, p in recipes.items()}
    macs = {n: c.report(latency=False).compiled.macs for n, c in compiled.items()}
    merged = compiled["paretoc merge r=13"]
    print(f"ViT 197 tokens, width 384, 12 blocks: MACs ÷ {macs['paretoc fp32'] / macs['paretoc merge r=13']:.3f}")
    for batch in (1, 3, 8):
        with torch.no_grad():
            difference = (merged(images[:batch]).logits - merged.program(images[:batch]).logits).abs().max()
        print(f"  batch {batch}: largest difference between ONNX Runtime and eager {difference:.1e}")
    for batch in (1, 8):
        x = images[:batch].contiguous()

        def eager(x: torch.Tensor = x) -> Any:
            with torch.inference_mode():
                return model(x)

        calls: dict[str, Callable[[], Any]] = {"PyTorch eager fp32": eager}
        calls |= {n: (lambda c=c, x=x: c(x)) for n, c in compiled.items()}
        times = interleaved(calls, runs)
        show(f"ViT-S, batch {batch}", times, "paretoc fp32")
        print(f"  int8: merging alone gives {times['paretoc int8'][0] / times['paretoc int8 + merge r=13'][0]:.2f} ×")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("model", choices=("minilm", "vit"))
    parser.add_argument("--runs", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    {"minilm": run_minilm, "vit": run_vit}[chosen.model](chosen.runs)
