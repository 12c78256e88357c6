"""Files compiled here, run by another ONNX Runtime: does it load them, and does it compute the same?

    pip install --no-deps --target DIR onnxruntime==1.24.1
    python benchmarks/oldest_runtime.py DIR [DIR …]

MiniLM with its real weights in three schemes, ResNet-50 and a causal Llama with random ones, and a small network in
every form of a linear layer: raw `onnxruntime.InferenceSession`s with the options that travel with the artifact. Each
line gives the largest difference to this environment's runtime, relative to the largest output.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: largest difference allowed: floats are summed in another order, and a code may then round the other way
TOLERANCE = 0.02


#: every form of a linear layer and every width of its weights, as arguments of `Quantize`
SMALL: tuple[dict[str, Any], ...] = (
    {"scheme": "W8A8"},
    {"scheme": "W8A8-dynamic"},
    {"scheme": "W8A8-dynamic", "granularity": "token"},
    {"scheme": "W8A8-dynamic", "granularity": "group", "weights": "Affine(8, 32)"},
    {"scheme": "W4A8"},
    {"scheme": "W4A8", "weights": "Affine(3, 32)"},
    {"scheme": "W4A8", "weights": "Affine(2, 32)"},
    {"scheme": "W4A16"},
    {"scheme": "W2A16"},
    {"scheme": "W8A16"},
    {"scheme": "FP8"},
)


def small(options: dict[str, Any]) -> Any:
    import paretoc as pc
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Linear(128, 96), torch.nn.GELU(), torch.nn.Linear(96, 64), torch.nn.LayerNorm(64)]
    x, model = torch.randn(2, 5, 128), torch.nn.Sequential(*layers).eval()
    return pc.compile(model, pc.Quantize(**options), example_inputs=x, calibration=[x])


def compiled() -> Iterator[tuple[str, Any]]:
    """The models, each with a name."""
    import paretoc as pc
    import torch
    from _models import Resnet50, minilm
    from transformers import LlamaConfig, LlamaForCausalLM

    for options in SMALL:
        yield f"small, {', '.join(options.values())}", small(options)
    model, tokenizer = minilm()
    text = dict(tokenizer(["a fox jumps over the lazy dog", "nothing of the sort"], padding=True, return_tensors="pt"))
    for scheme in ("W8A8", "W8A8-dynamic", "W4A8"):
        passes = [f"quantize:{scheme},embeddings=true"]
        yield f"MiniLM, {scheme}", pc.compile(model, passes, example_inputs=text, calibration=[text], verify=False)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 64, 64)
    resnet = Resnet50().eval()
    yield "ResNet-50, W8A8", pc.compile(resnet, ["quantize:W8A8"], example_inputs=image, calibration=[image])
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=100, max_position_embeddings=64,
    )  # fmt: skip
    causal = pc.CausalLM(LlamaForCausalLM(config).eval())
    yield "Llama with a cache, W4A16", pc.compile(causal, ["quantize:W4A16,group_size=32"], verify=False)


def write(folder: Path) -> None:
    """Each model as a file, with inputs, session options and what this environment's runtime computes."""
    for index, (name, model) in enumerate(compiled()):
        executable = model._compiled().executable
        model.export_onnx(folder / f"{index}.onnx")
        inputs = {
            n: t.numpy() for n, t in zip(model.program.interface.input_names(), model.program.example, strict=True)
        }
        if executable.settings["shared_cache"]:
            inputs = {n: x[:1] for n, x in inputs.items()}  # the kernel continues one row by many tokens
        np.savez(folder / f"{index}.npz", **inputs)
        facts = {"name": name, "config": executable.settings["config"]}
        (folder / f"{index}.json").write_text(json.dumps(facts))


def run(folder: Path) -> dict[str, list[Any]]:
    """Name → first output of every model under this interpreter's runtime, or what it says where it refuses."""
    import onnxruntime

    results: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*.json"), key=lambda f: int(f.stem)):
        facts = json.loads(file.read_text())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        for key, value in facts["config"].items():
            options.add_session_config_entry(key, value)
        try:
            session = onnxruntime.InferenceSession(file.with_suffix(".onnx"), options)
            inputs = np.load(file.with_suffix(".npz"))
            known = [i.name for i in session.get_inputs()]
            results[facts["name"]] = session.run(None, {n: inputs[n] for n in known})[0].tolist()
        except Exception as error:
            results[facts["name"]] = [str(error).splitlines()[0]]
    return results


def elsewhere(folder: Path, runtime: str) -> dict[str, list[Any]]:
    """`run` in a process that finds the runtime in another directory first."""
    call = [sys.executable, __file__, "--run", str(folder)]
    done = subprocess.run(call, env=os.environ | {"PYTHONPATH": runtime}, capture_output=True, check=True, text=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def difference(got: list[Any], want: list[Any]) -> float:
    ours, theirs = (np.array(x, dtype=np.float64) for x in (got, want))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtimes", nargs="*", metavar="DIR", help="where another onnxruntime is installed")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run)))
        return
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        want = run(folder)
        for runtime in arguments.runtimes:
            print(runtime)
            for model, got in elsewhere(folder, runtime).items():
                refused = isinstance(got[0], str)
                distance = float("inf") if refused else difference(got, want[model])
                failed |= not distance <= TOLERANCE
                print(f"  {model:50s} {got[0] if refused else f'{distance:.1e}'}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
