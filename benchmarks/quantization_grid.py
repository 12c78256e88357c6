"""Weight-only post-training quantisation: bits × method, on a language model and a sentence encoder.

python benchmarks/quantization_grid.py stories | minilm [--data DIR] [--bits 4 3 2] [--methods rtn gptq …]

Evaluated on the reference backend; ONNX Runtime computes the same (tests). `bytes` are those of the stored arrays of
the quantised weights, as a share of fp32; ± is the standard error of the paired difference to fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paretoc as pc
import torch
from _models import arguments, data_folder, embed, minilm, stories, sts
from scipy.stats import spearmanr
from torch import Tensor

Recipe = Sequence[Any]


def affine(bits: int, group: int) -> str:
    """Symmetric codes, except at two bits, where symmetry would leave three levels."""
    return f"Affine(bits={bits}, group={group}, symmetric={bits > 2})"


def methods(bits: int, group: int, rotate: bool) -> dict[str, Recipe]:
    weights = affine(bits, group)
    floating = f"Affine(bits={bits}, group={group}, symmetric=False, zero='float')"

    def quantize(fitter: str, encoding: str = weights) -> pc.Pass:
        return pc.Quantize("W8A16", weights=encoding, fitter=fitter, targets=("Linear",))

    table: dict[str, Recipe] = {
        "rtn": [quantize("rtn")],
        "mse": [quantize("mse")],
        "gptq": [quantize("gptq")],
        "awq": [{"smooth": {"rule": "awq", "weights": weights}}, quantize("mse")],
        "hqq": [quantize("hqq", floating)],
        "codebook": [quantize("kmeans", f"Codebook(bits={bits}, group={group})")],
    }
    if rotate:
        table["gptq + rotation"] = ["rotate", quantize("gptq")]
    return table


def share(compiled: pc.CompiledModel) -> float:
    """Stored bytes of the encoded weights ÷ their bytes in float32."""
    stored = dense = 0
    for node in compiled.program.calls(torch.ops.paretoc.decode.default):
        shape = tuple(node.args[2])  # type: ignore[arg-type]  # the shape of the weight
        encoding = compiled.program.encoding(node)
        assert encoding is not None
        stored += encoding.nbytes(shape)
        dense += 4 * int(np.prod(shape))
    return stored / dense


def run(
    model: Any,
    calibration: Sequence[Any],
    table: dict[str, Recipe],
    score: Callable[[Any], Tensor],
    show: Callable[[Tensor], str],
    wanted: Sequence[str] | None,
) -> None:
    for name, passes in table.items():
        if wanted and name not in wanted:
            continue
        start = time.perf_counter()
        try:
            compiled = pc.compile(model, passes, calibration=calibration, target="eager", verify=False)
            text = f"{show(score(compiled))}   bytes {share(compiled):.3f}"
        except pc.ParetocError as error:
            text = f"refused: {error.what}"
        print(f"  {name:16s} {text}   {time.perf_counter() - start:.0f} s", flush=True)


def run_stories(folder: Path, widths: Sequence[int], wanted: Sequence[str] | None) -> None:
    """Nats a token on 100 held-out stories; one scale a channel: 172 inputs have no group of 32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "stories260k").eval()
    held_out, calibration = list(stories(folder)), [{"input_ids": t} for t in stories(folder, range(64))]

    def nats(run: Any) -> Tensor:
        """Mean loss of each story."""
        losses = []
        for tokens in held_out:
            with torch.no_grad():
                logits = run(input_ids=tokens).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
        return torch.stack(losses)

    reference = nats(model)
    print(f"stories260k, 100 stories: fp32 {reference.mean():.4f} nats/token")

    def show(losses: Tensor) -> str:
        change = losses - reference
        return f"{losses.mean():.4f}  {change.mean():+.4f} ± {change.std() / len(change) ** 0.5:.4f}"

    for bits in widths:
        print(f"{bits} bits, one scale a channel")
        run(model, calibration, methods(bits, 0, rotate=True), nats, show, wanted)


def run_minilm(folder: Path, widths: Sequence[int], wanted: Sequence[str] | None) -> None:
    """Spearman correlation on STS-B dev; groups of 32. BERT's post-norm residual stream cannot be rotated."""
    model, tokenizer = minilm()
    first, second, scores = sts(folder, "dev")
    train = sts(folder, "train")[0][:256]
    calibration = [dict(tokenizer(train[i : i + 16], padding=True, return_tensors="pt")) for i in range(0, 256, 16)]

    def likeness(run: Any) -> Tensor:
        return (embed(run, tokenizer, first) * embed(run, tokenizer, second)).sum(-1)

    def spearman(values: Any, chosen: Any = slice(None)) -> float:
        return float(spearmanr(values[chosen], np.array(scores)[chosen]).statistic)

    reference = likeness(model).numpy()
    draws = np.random.default_rng(0).integers(0, len(scores), (200, len(scores)))

    def show(values: Tensor) -> str:
        changes = [spearman(values.numpy(), d) - spearman(reference, d) for d in draws]
        return f"{spearman(values.numpy()):.4f}  {np.mean(changes):+.4f} ± {np.std(changes):.4f}"

    print(f"MiniLM-L6, STS-B dev, {len(scores)} pairs: fp32 {spearman(reference):.4f} (± by bootstrap, paired)")
    for bits in widths:
        print(f"{bits} bits, groups of 32")
        run(model, calibration, methods(bits, 32, rotate=False), likeness, show, wanted)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("model", choices=("stories", "minilm"))
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--methods", nargs="+")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    bench = {"stories": run_stories, "minilm": run_minilm}[chosen.model]
    bench(data_folder(chosen.data), chosen.bits, chosen.methods)
