"""GPTQ on a large random Llama: peak memory, and a run that is killed half-way and continues to the same bytes.

python benchmarks/large_model.py [--shape 1.1B | 160M | tiny] [--batches 16] [--tokens 512] [--target eager]

Three runs, each a process of its own: uninterrupted; killed (SIGKILL) when half of the checkpoint is written; the same
again, to its end. The last two neither compare the result with the original model nor save it. Peaks are resident
memory of the whole process, in bytes of the float32 weights; "above the libraries" leaves out what is resident when a
tiny model has been compiled and saved, which loads them all. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import paretoc as pc
import torch

#: "1.1B" is that of TinyLlama (Zhang et al. 2024)
SHAPES = {
    "1.1B": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "intermediate_size": 5632},
    "160M": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816},
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "vocab_size": 512,
    },
}
#: inputs that the weights of a decoder layer read: of q, k and v; of o; of gate and up; of down
STEPS_A_LAYER = 4


def compiled_llama(
    shape: str, batches: int, tokens: int, target: str, verify: bool, checkpoint: str | None
) -> pc.CompiledModel:
    """A Llama with random weights, always the same, quantised on random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(num_key_value_heads=4, tie_word_embeddings=False, **SHAPES[shape])
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(0, config.vocab_size, (batches, 1, tokens), generator=generator)
    return pc.compile(
        model,
        pc.Quantize("W4A16", fitter="gptq", checkpoint=checkpoint),
        calibration=[{"input_ids": ids} for ids in batch],
        target=target,
        verify=verify,
    )


def resident(field: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def quantise(options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process; checkpoint and artifact go to the working directory."""
    compiled_llama("tiny", 2, 8, options.target, verify=True, checkpoint=None).save("tiny")
    libraries, start = resident("VmRSS"), time.perf_counter()
    compiled = compiled_llama(
        options.shape, options.batches, options.tokens, options.target, not options.continued, "checkpoint"
    )
    size = sum(t.numel() * t.element_size() for t in compiled.original.weights().values())
    digest = hashlib.sha256()
    for name, value in compiled.program.weights().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().contiguous().numpy().tobytes())
    facts = {"libraries": libraries, "model": size, "compile()": resident("VmHWM"), "sha256": digest.hexdigest()}
    print(f"compiled after {time.perf_counter() - start:.0f} s: {facts}", file=sys.stderr)
    if not options.continued:
        compiled.save("artifact")
        facts["compile() and save()"] = resident("VmHWM")
    return facts | {"seconds": time.perf_counter() - start}


def start(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with exit status {process.returncode}")
    facts: dict[str, Any] = json.loads(output.splitlines()[-1])
    return facts


def kill_half_way(process: subprocess.Popen[str], checkpoint: Path, steps: int) -> int:
    """Kill the process when half of its steps are on disk; returns how many are."""
    while len(list(checkpoint.glob("*.safetensors"))) < steps // 2:
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return len(list(checkpoint.glob("*.safetensors")))


def show(name: str, facts: dict[str, Any]) -> None:
    size, libraries = facts["model"], facts["libraries"]
    print(f"{name}, {facts['seconds']:.0f} s")
    for stage in ("compile()", "compile() and save()"):
        if peak := facts.get(stage):
            print(f"  peak of {stage}: {(peak - libraries) / size:.3f} above the libraries, {peak / size:.3f} in all")
    print(f"  sha256 of all stored arrays: {facts['sha256']}", flush=True)


def main(options: argparse.Namespace, arguments: list[str]) -> None:
    steps = STEPS_A_LAYER * SHAPES[options.shape]["num_hidden_layers"] + 1  # and the head
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        whole = finish(start(Path(scratch) / "whole", ["--in-process", *arguments]))
        size, libraries = (f"{whole[key] / 1e9:.2f} GB" for key in ("model", "libraries"))
        print(f"Llama {options.shape}, {size} in float32; the libraries {libraries}")
        print(f"W4A16 by GPTQ on {options.batches} × {options.tokens} tokens, target {options.target}")
        show("uninterrupted", whole)
        folder, arguments = Path(scratch) / "killed", ["--in-process", "--continued", *arguments]
        done = kill_half_way(start(folder, arguments), folder / "checkpoint", steps)
        print(f"killed after {done} of {steps} steps")
        resumed = finish(start(folder, arguments))
        show("resumed", resumed)
    print("the same bytes" if whole["sha256"] == resumed["sha256"] else "OTHER BYTES")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--target", default="eager")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where checkpoints and artifacts may lie for the time of the runs")
    parser.add_argument("--in-process", action="store_true", help="one run, here; prints its figures as JSON")
    parser.add_argument("--continued", action="store_true", help="with it: fit only")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.in_process:
        print(json.dumps(quantise(chosen)))
    else:
        main(chosen, sys.argv[1:])
