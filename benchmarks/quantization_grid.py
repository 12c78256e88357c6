"""Weight-only post-training quantisation, bits × method, on a language model and a sentence encoder; published orders.

python benchmarks/quantization_grid.py [PART …] [--data DIR] [--bits 4 3 2] [--methods rtn …]

Parts: stories, orders, mixed, recipes, minilm; without one, all. Run on the reference backend; ONNX Runtime computes
the same (tests). `bytes` are those of the stored arrays of the quantised weights, and their share of fp32; ± is the
standard error of the paired difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import paretoc as pc
import torch
from _models import arguments, data_folder
from _quality import Bench, Recipe, Sentences, Stories, affine, compiled_by, decoded, quantize, stored_bytes
from mixed_precision import mixed
from quantization_orders import orders


def methods(bits: int, group: int, rotate: str) -> dict[str, Recipe]:
    weights = affine(bits, group)
    floating = f"Affine(bits={bits}, group={group}, symmetric=False, zero='float')"
    return {
        "rtn": [quantize("rtn", weights)],
        "mse": [quantize("mse", weights)],
        "gptq": [quantize("gptq", weights)],
        "awq": [{"smooth": {"rule": "awq", "weights": weights}}, quantize("mse", weights)],
        "hqq": [quantize("hqq", floating)],
        "gptq + rotation": [rotate, quantize("gptq", weights)],
        "codebook": [quantize("kmeans", f"Codebook(bits={bits}, group={group})")],
    }


#: MiniLM: the fewest bits for which little is lost
RECIPES: dict[str, Recipe] = {
    "W2A16": [
        {"quantize": {"scheme": "W2A16", "weights": "Affine(bits=2, group=32, symmetric=False, scale='float16')"}},
        "reconstruct:100",
    ],
    "W4A8": ["quantize:W4A8", "reconstruct:100"],
    "W4A4": ["rotate:stream=false,online=true", "quantize:W4A4,code=uint4,fitter=gptq", "reconstruct:100"],
}


def recipes(bench: Sentences) -> None:
    print(f"{bench.title}\n{'fp32':24s} {bench.show(bench.reference)}", flush=True)
    for name, passes in RECIPES.items():
        measure(bench, name, passes)


def grid(bench: Bench, widths: Sequence[int], wanted: Sequence[str] | None) -> None:
    print(f"{bench.title}\n{'fp32':24s} {bench.show(bench.reference)}", flush=True)
    for bits in widths:
        for name, passes in methods(bits, bench.group, bench.rotation).items():
            if wanted and name not in wanted:
                continue
            measure(bench, f"{bits} bits {name}", passes)


def measure(bench: Bench, name: str, passes: Recipe) -> None:
    start = time.perf_counter()
    try:
        compiled = compiled_by(bench, passes)
        stored, dense = stored_bytes(compiled)
        text = f"{bench.show(bench.score(decoded(compiled)))}   bytes {stored} = {stored / dense:.3f}"
    except pc.ParetocError as error:
        text = f"refused: {error.what}"
    print(f"{name:24s} {text}   {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--methods", nargs="+")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    folder = data_folder(chosen.data)
    parts: dict[str, Callable[[], None]] = {
        "stories": lambda: grid(Stories(folder), chosen.bits, chosen.methods),
        "orders": lambda: orders(Stories(folder), Sentences(folder)),
        "mixed": lambda: mixed(Stories(folder)),
        "recipes": lambda: recipes(Sentences(folder)),
        "minilm": lambda: grid(Sentences(folder), chosen.bits, chosen.methods),
    }
    for part in chosen.parts or parts:
        if part not in parts:
            parser.error(f"there is no part {part!r}, there are {', '.join(parts)}")
        parts[part]()


if __name__ == "__main__":
    main()
