"""Triton kernels on the GPU of this machine: right against float64, and how fast against PyTorch's own.

    python benchmarks/triton_gpu.py [--runs 50] [--only W4A16] [--shapes 4096x4096,28672x8192]
    TRITON_INTERPRET=1 python benchmarks/triton_gpu.py --models [--only W4A16]

Times are medians of CUDA events around CUDA graphs, in µs, with weights that rotate past the L2 cache. Bandwidth and
peak are measured on the same card first: a copy, and a large bfloat16 product. `error` is the largest
|y − y64| / (|x|·|W|ᵀ), where y64 is the float64 product of the decoded weights and rounded activations.
`--models` needs no GPU: it runs the whole of all-MiniLM-L6-v2 on one sentence, on its kernels and on the reference.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import paretoc as pc
import torch
from torch import Tensor

TOKENS = (1, 4, 16, 512, 4096)
#: rows of the weights that are encoded
ROWS = 128
SHAPES = "4096x4096,14336x4096,28672x8192"
#: scheme → (weights, activations)
SCHEMES = {
    "W4A16": ("Affine(4, 128, scale='float16')", ""),
    "W8A16": ("Affine(8)", ""),
    "W2A16": ("Affine(2, 64, symmetric=False, scale='float16')", ""),
    "MXFP4": ("Float('e2m1', 32, 'e8m0')", ""),
    "NVFP4": ("Float('e2m1', 16, 'e4m3')", ""),
    "NF4": ("NF4(64, scale='float16')", ""),
    "2 × 8 bit": ("Additive(2, 8, 8)", ""),
    "2:4 W4A16": ("NM(2, 4, values=Affine(4, 128, scale='float16'))", ""),
    "4:8 W4A16": ("NM(4, 8, values=Affine(4, 128, scale='float16'))", ""),
    "W8A8": ("Affine(8)", "int8"),
    "W4A8": ("Affine(4, 128)", "int8"),
    "FP8": ("Float('e4m3')", "e4m3"),
}


#: scheme → passes for whole models
MODELS = {
    "W4A16": ["quantize:W4A16"],
    "W8A8": ["quantize:W8A8"],
    "W8A8 token": ["quantize:W8A8-dynamic,granularity=token"],
    "W4A8": ["quantize:W4A8"],
    "FP8": ["quantize:FP8"],
    "2:4 W4A16": ["prune_nm:2:4", "quantize:W4A16,fitter=rtn"],
    "NF4": ["quantize:W4A16,weights=NF4(64),fitter=rtn"],
    "2 × 8 bit": ["quantize:W4A16,weights=Additive(2),fitter=rtn"],
}


@dataclass(frozen=True)
class Card:
    """What this GPU does: bytes a second copied, operations a second in bfloat16, bytes of cache."""

    name: str
    bandwidth: float
    peak: float
    cache: int


def timed(call: Callable[[Any], object], inputs: list[Any], runs: int) -> float:
    """Median µs of a call: a CUDA graph of one call for each input, replayed, so that nobody waits for Python."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):  # compiles, and lets libraries choose, before the capture
        for value in inputs[:3]:
            call(value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for value in inputs:
            call(value)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for first, last in events:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return 1e3 * median(first.elapsed_time(last) for first, last in events) / len(inputs)


def measured_card(runs: int) -> Card:
    properties = torch.cuda.get_device_properties(0)
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = timed(lambda target: target.copy_(big), [torch.empty_like(big)], runs)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = timed(lambda b: a @ b, [a.clone()], runs)
    return Card(properties.name, 2 * big.numel() / copy * 1e6, 2 * 8192**3 / product * 1e6, properties.L2_cache_size)


def rotating(make: Callable[[], Any], size: int, cache: int) -> list[Any]:
    """Enough copies of what `make` makes (`size` bytes) that none is still in the cache when its turn comes again."""
    return [make() for _ in range(min(max(4, 2 * cache // size + 1), 64))]


@dataclass
class Layer:
    """One weight under one scheme, with its kernel and PyTorch's nearest equivalent. Rows repeat: quick to encode."""

    scheme: str
    N: int
    K: int

    def __post_init__(self) -> None:
        from paretoc.backends.triton.kernels.weights import fixed_arrays

        text, self.code = SCHEMES[self.scheme]
        encoding = pc.parse_encoding(text)
        self.text = str(encoding)
        arrays = encoding.encode(torch.randn(ROWS, self.K) / self.K**0.5)
        self.decoded = encoding.decode(arrays, (ROWS, self.K)).repeat(self.N // ROWS, 1).cuda()
        shapes = [shape for shape, _ in encoding.layout((self.N, self.K)).values()]
        pairs = zip(arrays.values(), shapes, strict=True)
        self.arrays = [a.repeat(shape[0] // a.shape[0], *[1] * (a.ndim - 1)).cuda() for a, shape in pairs]
        self.arrays += [fixed.cuda() for fixed in fixed_arrays(encoding, arrays).values()]
        self.size = sum(a.nbytes for a in self.arrays)

    def quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.paretoc_triton.quantize_tokens(x, self.code)  # type: ignore[no-any-return]

    def kernel(self, x: Tensor) -> Callable[[list[Tensor]], Tensor]:
        operators = torch.ops.paretoc_triton
        if not self.code:
            return lambda arrays: operators.weight_only_linear(x, arrays, self.text, self.N, None)
        codes, scale = self.quantised(x)
        return lambda arrays: operators.quantized_linear(
            codes, scale, None, 8, arrays, self.text, self.N, None, x.dtype
        )

    def error(self, x: Tensor) -> float:
        y, rounded = self.kernel(x)(self.arrays), x.double()
        if self.code:
            codes, scale = self.quantised(x)
            rounded = codes.double() * scale.double()
        weight = self.decoded.double()
        return float(((y.double() - rounded @ weight.T).abs() / (rounded.abs() @ weight.abs().T)).max())

    def peer(self, x: Tensor, cache: int) -> tuple[str, Callable[[Tensor], Tensor], list[Tensor]] | None:
        """PyTorch's product of the same types, for a weight that is passed; None where it has none."""
        if not self.code:
            return None
        codes, scale = self.quantised(x)
        wide = self.decoded.new_ones(1, self.N)
        if self.code == "int8" and x.shape[0] > 16:  # what torch._int_mm asks for
            ones = torch.ones(self.K, self.N, dtype=torch.int8, device="cuda")
            weights = rotating(ones.clone, ones.nbytes, cache)
            return "torch._int_mm", lambda w: torch._int_mm(codes, w), weights
        if self.code == "e4m3" and torch.cuda.get_device_capability() >= (8, 9):
            weights = rotating(lambda: self.decoded.to(torch.float8_e4m3fn), self.N * self.K, cache)
            return (
                "torch._scaled_mm",
                lambda w: torch._scaled_mm(codes, w.T, scale, wide, out_dtype=torch.bfloat16),
                weights,
            )
        return None


def row(layer: Layer, M: int, card: Card, runs: int) -> str:
    x = torch.randn(M, layer.K, dtype=torch.bfloat16, device="cuda")
    ours = timed(layer.kernel(x), rotating(lambda: [a.clone() for a in layer.arrays], layer.size, card.cache), runs)
    dense = layer.decoded.bfloat16()
    bf16 = timed(lambda w: x @ w.T, rotating(dense.clone, dense.nbytes, card.cache), runs)
    best = max((layer.size + x.nbytes + 2 * M * layer.N) / card.bandwidth, 2 * M * layer.N * layer.K / card.peak) * 1e6
    found = layer.peer(x, card.cache)
    peer = ""
    if found is not None:
        name, call, weights = found
        peer = f"{timed(call, weights, runs) / ours:5.2f} × {name}"
    return (
        f"{layer.scheme:10s} {layer.N:6d} × {layer.K:<6d} {M:5d} {ours:9.1f} {best / ours:7.0%} "
        f"{bf16 / ours:6.2f} × bf16   {layer.error(x):8.1e}   {peer}"
    )


def compare_models(only: list[str] | None) -> None:
    """Whole models: the largest |y − reference| / max|reference|, and the kernels with the number of their sites."""
    from _models import minilm

    model, tokenizer = minilm()
    inputs = dict(tokenizer("The kernels and the reference agree.", return_tensors="pt"))
    print(f"all-MiniLM-L6-v2, 1 × {inputs['input_ids'].shape[1]} tokens, PyTorch {torch.__version__}")
    for name, steps in MODELS.items():
        if only and name not in only:
            continue
        options = {"example_inputs": inputs, "calibration": [inputs], "verify": False}
        compiled = pc.compile(model, steps, target="triton", **options)
        y, reference = compiled(**inputs)[0], compiled.program(**inputs)[0]
        kernels = Counter(row.kernel for row in compiled.explain().rows if row.encoding != "dense")
        error = float((y - reference).abs().max() / reference.abs().max())
        print(f"{name:10s} {error:8.1e}   {dict(kernels)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({*SCHEMES, *MODELS})
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--only", choices=names, action="append", help="a scheme; may be given again")
    parser.add_argument("--models", action="store_true", help="whole models, right but not timed")
    parser.add_argument("--shapes", default=SHAPES, help="N x K of the weights")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.models:
        compare_models(options.only)
        return
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU: nothing to measure")
    import triton
    from paretoc.backends.triton import lower  # noqa: F401  # makes the operators

    torch.manual_seed(0)
    card = measured_card(options.runs)
    print(f"{card.name}, PyTorch {torch.__version__}, Triton {triton.__version__}, medians of {options.runs} runs")
    print(f"copy {card.bandwidth / 1e9:.0f} GB/s, bfloat16 {card.peak / 1e12:.0f} TFLOP/s")
    print("scheme          N × K         M        µs   bound  speed-up        error   against")
    for shape in options.shapes.split(","):
        N, K = map(int, shape.split("x"))
        for scheme in SCHEMES if options.only is None else [s for s in options.only if s in SCHEMES]:
            layer = Layer(scheme, N, K)
            for M in TOKENS:
                print(row(layer, M, card, options.runs), flush=True)


if __name__ == "__main__":
    main()
