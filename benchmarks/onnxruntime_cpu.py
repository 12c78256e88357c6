"""Latency and error on a CPU: paretoc on ONNX Runtime against PyTorch and the public quantisers, model by model.

    python benchmarks/onnxruntime_cpu.py minilm bert vit resnet50 [--threads 2] [--runs 20] [--only "NNCF|W8A8"]

Peers: ONNX Runtime's own export and its two quantisers; OpenVINO with NNCF where they are installed (`pip install
openvino nncf`), computing in f32 and in what OpenVINO chooses, bf16 where the CPU can, for inputs of any size and of
one. paretoc: ONNX Runtime's own kernels, and with `paretoc[openvino]` installed OpenVINO's, in f32 and in bf16. All
contenders of a row take turns in one process; the table gives medians, minima in brackets, multiples of PyTorch eager
fp32 (medians, minima) and the relative L2 error of the first output against PyTorch eager. paretoc compiles for the
batch of a row, which decides on kernels; every model takes any batch. MiniLM has its real weights, the others random
ones.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import paretoc as pc
import torch
from _models import Resnet50, arguments, minilm
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from paretoc.compiler.cost import measure
from torch import Tensor

Call = Callable[[], Any]


@dataclass
class Workload:
    """A model, the example it is compiled with, batches to calibrate on, the rows to time, and our recipes."""

    title: str
    model: Any
    example: dict[str, Tensor]
    calibration: list[dict[str, Tensor]]
    batches: tuple[int, ...]
    recipes: dict[str, list[str]]


TRANSFORMER = {
    "fp32": [],
    "W8A8-dynamic": ["quantize:W8A8-dynamic"],
    "W8A8 static": ["quantize:W8A8"],
    "W8A8, smooth and bias": ["smooth:0.8,insert=true", "quantize:W8A8", "correct_bias"],  # as NNCF does by itself
    "W8A8 and attention": ["quantize:W8A8,attention=true"],
    "W8A8 and scores": ["quantize:W8A8,attention=scores"],
    "W8A8 and scores, smooth and bias": ["smooth:0.8,insert=true", "quantize:W8A8,attention=scores", "correct_bias"],
}
#: where norms take most factors, the multiplications of `insert` cost more than they gain
PRE_NORM = {
    "W8A8, smooth and bias": ["smooth", "quantize:W8A8", "correct_bias"],
    "W8A8 and scores, smooth and bias": ["smooth", "quantize:W8A8,attention=scores", "correct_bias"],
}
MERGING = {"merge r=13": ["merge_tokens:13"], "W8A8-dynamic + merge r=13": ["merge_tokens:13", "quantize:W8A8-dynamic"]}
CONVOLUTIONAL = {"fp32": [], "W8A8 static": ["quantize:W8A8"], "W8A8 and bias": ["quantize:W8A8", "correct_bias"]}
#: target → what the table calls it
_TARGETS = {"onnxruntime": "paretoc", "openvino": "paretoc/OV f32", "openvino-bf16": "paretoc/OV bf16"}
SCORES = ("W8A8 and scores", "W8A8 and scores, smooth and bias")
#: recipes that OpenVINO is measured with; ONNX Runtime's own kernels with all but `SCORES`
ELSEWHERE = ("fp32", "W8A8 static", "W8A8, smooth and bias", "W8A8 and bias", *SCORES)


def workload_minilm() -> Workload:
    model, tokenizer = minilm()
    text = "the quick brown fox jumps over a lazy dog while many people watch it in the park today"
    words = text.split(" ")
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(words, 110)) for _ in range(32)]
    encoded = dict(tokenizer(sentences, padding="max_length", max_length=128, truncation=True, return_tensors="pt"))
    batches = [{k: v[i : i + 8] for k, v in encoded.items()} for i in range(0, 32, 8)]
    recipes = {
        n: [f"{p},embeddings=true" if p.startswith("quantize") else p for p in passes]
        for n, passes in TRANSFORMER.items()
    }
    return Workload("MiniLM-L6, 128 tokens", model, batches[0], batches, (1, 8), recipes)


def workload_bert() -> Workload:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig()).eval()
    encoded = {"input_ids": torch.randint(0, 30000, (4, 128)), "attention_mask": torch.ones(4, 128, dtype=torch.long)}
    batches = [{k: v[i : i + 1] for k, v in encoded.items()} for i in range(4)]
    return Workload("BERT-base, 128 tokens", model, batches[0], batches, (1,), TRANSFORMER)


def workload_vit() -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    images = torch.randn(8, 3, 224, 224)
    batches = [{"pixel_values": images[i : i + 2]} for i in range(0, 8, 2)]
    model, recipes = ViTForImageClassification(config).eval(), TRANSFORMER | PRE_NORM | MERGING
    return Workload("ViT-S, 197 tokens", model, {"pixel_values": images}, batches, (1, 8), recipes)


def workload_resnet50() -> Workload:
    images = torch.randn(8, 3, 224, 224)
    batches = [{"x": images[i : i + 2]} for i in range(0, 8, 2)]
    model = Resnet50()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0  # one pass gives every norm the statistics of its input
    with torch.no_grad():
        model.train()(images)
    return Workload("ResNet-50, 224 × 224", model.eval(), {"x": images[:1]}, batches, (1,), CONVOLUTIONAL)


def first(output: Any) -> Tensor:
    """The first tensor of what a model returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, np.ndarray):
        return torch.from_numpy(output)
    return first(next(iter(output.values())) if isinstance(output, Mapping) else output[0])


def error(output: Any, reference: Tensor) -> float:
    return float((first(output).double() - reference.double()).norm() / reference.double().norm())


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {k: v.numpy() for k, v in batch.items()}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ort_peers(load: Workload, root: Path) -> Iterator[tuple[str, onnxruntime.InferenceSession]]:
    """ONNX Runtime on the exporter's own graph, and its two quantisers with their recommended settings."""
    plain = root / "fp32.onnx"
    axes = {k: {0: torch.export.Dim("batch")} for k in load.example}
    exported = torch.onnx.export(
        load.model, kwargs=load.example, dynamo=True, dynamic_shapes=axes, optimize=True, verbose=False
    )
    assert exported is not None
    exported.save(plain)
    yield "ORT fp32, PyTorch's export", session(plain)
    convolutional = load.recipes is CONVOLUTIONAL

    def dynamic(target: Path) -> None:
        quantize_dynamic(plain, target, weight_type=QuantType.QInt8, per_channel=True)

    def static(target: Path) -> None:
        quantize_static(
            plain, target, Reader(load.calibration), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=None if convolutional else ["MatMul"],
        )  # fmt: skip

    # quantize_dynamic makes ConvInteger of convolutions, which is slower than fp32
    for quantiser in (static,) if convolutional else (dynamic, static):
        target = root / f"{quantiser.__name__}.onnx"
        try:
            quantiser(target)
            yield f"ORT quantize_{quantiser.__name__}", session(target)
        except Exception as refused:  # a peer's failure is a result
            print(f"ORT quantize_{quantiser.__name__} fails: {str(refused).splitlines()[0]}")


def openvino_models(load: Workload) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name, model, how to compile it)"""
    if not (importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf")):
        return
    import nncf
    import openvino

    converted = openvino.convert_model(load.model, example_input=load.example)
    kind = None if load.recipes is CONVOLUTIONAL else nncf.ModelType.TRANSFORMER
    quantised = nncf.quantize(
        converted, nncf.Dataset(load.calibration, lambda b: {k: v.numpy() for k, v in b.items()}), model_type=kind
    )
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    exact = settings | {"INFERENCE_PRECISION_HINT": "f32"}
    yield "OpenVINO fp32", converted, exact
    yield "OpenVINO bf16", converted, settings
    yield "OpenVINO, NNCF int8", quantised, exact
    yield "OpenVINO, NNCF int8, bf16", quantised, settings


def openvino_peers(
    models: list[tuple[str, Any, dict[str, Any]]], feed: dict[str, Tensor]
) -> Iterator[tuple[str, Call]]:
    """Each as it was converted, for inputs of any size, and for those of this batch."""
    arrays = {k: v.numpy() for k, v in feed.items()}
    for name, model, chosen in models:
        import openvino

        fixed = model.clone()
        fixed.reshape({i.any_name: list(arrays[i.any_name].shape) for i in fixed.inputs})
        for title, variant in ((name, model), (f"{name}, fixed sizes", fixed)):
            compiled = openvino.Core().compile_model(variant, "CPU", chosen)
            yield title, lambda c=compiled: c(arrays)[0]


def run(load: Workload, runs: int, only: str) -> None:
    def wanted(name: str) -> bool:
        return bool(re.search(only, name))

    with tempfile.TemporaryDirectory() as folder:
        peers: dict[str, Callable[[dict[str, Tensor]], Any]] = {}
        for name, started in ort_peers(load, Path(folder)) if wanted("ORT ") else ():
            known = {i.name for i in started.get_inputs()}
            peers[name] = lambda feed, s=started, known=known: s.run(
                None, {k: v.numpy() for k, v in feed.items() if k in known}
            )
        models = [m for m in openvino_models(load) if wanted(m[0])]
    for batch in load.batches:
        feed = {k: v[:batch].contiguous() for k, v in load.example.items()}
        with_openvino = importlib.util.find_spec("openvino") is not None
        ours = {
            f"{_TARGETS[target]} {name}": pc.compile(
                load.model, passes, example_inputs=feed, calibration=load.calibration, target=target
            )
            for target in (_TARGETS if with_openvino else ["onnxruntime"])
            for name, passes in load.recipes.items()
            if (name not in SCORES if target == "onnxruntime" else name in ELSEWHERE)
            and wanted(f"{_TARGETS[target]} {name}")
        }

        def eager(feed: dict[str, Tensor] = feed) -> Any:
            with torch.inference_mode():
                return load.model(**feed)

        reference = first(eager()).clone()
        calls: dict[str, Call] = {"PyTorch eager fp32": eager}
        calls |= {n: (lambda call=call, feed=feed: call(feed)) for n, call in peers.items()}
        calls |= dict(openvino_peers(models, feed))
        calls |= {n: (lambda compiled=compiled, feed=feed: compiled(**feed)) for n, compiled in ours.items()}
        errors = {n: error(call(), reference) for n, call in calls.items()}
        times = measure(calls, runs=runs, budget_s=float("inf"))
        base = times["PyTorch eager fp32"]
        print(f"\n{load.title}, batch {batch}\n{'':50s}{'ms':>9s} {'(min)':>9s}  × eager  (minima)  error")
        for name, time in times.items():
            print(
                f"  {name:48s}{time.median:9.2f} ({time.minimum:7.2f})  {base.median / time.median:6.2f}"
                f"    ({base.minimum / time.minimum:5.2f})   {errors[name]:.1e}",
                flush=True,
            )


WORKLOADS = {"minilm": workload_minilm, "bert": workload_bert, "vit": workload_vit, "resnet50": workload_resnet50}

if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(WORKLOADS)}; all without one")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", default="", help="contenders whose names match this regular expression")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for name in chosen.models or WORKLOADS:
        if name not in WORKLOADS:
            parser.error(f"there is no model {name!r}, there are {', '.join(WORKLOADS)}")
        torch.manual_seed(0)
        run(WORKLOADS[name](), chosen.runs, chosen.only)
