"""Triton kernels on the GPU of this machine: right against float64, and how fast against PyTorch's own.

    python benchmarks/triton_gpu.py [--runs 50] [--only W4A16] [--shapes 4096x4096,28672x8192]
    python benchmarks/triton_gpu.py --operators [--runs 50] [--only rotation]
    TRITON_INTERPRET=1 python benchmarks/triton_gpu.py --models [--only W4A16]

Times are medians of CUDA events around CUDA graphs, in µs, with weights that rotate past the L2 cache. Bandwidth and
peak are measured on the same card first: a copy, and a large bfloat16 product. `error` is the largest
|y − y64| / (|x|·|W|ᵀ), where y64 is the float64 product of the decoded weights and rounded activations.
`--operators` are the kernels that are no linears, against the same in PyTorch: there `error` is the largest
|y − y64| / max|y64|, where y64 is what PyTorch computes from the same inputs in float64, and `bound` is the time to
read them.
`--models` needs no GPU: it runs the whole of all-MiniLM-L6-v2 on one sentence, on its kernels and on the reference.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import paretoc as pc
import torch
from paretoc.compiler.dialect.activations import reference_fake_quantize_dynamic
from torch import Tensor
from torch.nn import functional as F

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
    "W4A16 + 32": ("Sum(Affine(4, 128, scale='float16'), LowRank(32))", ""),
    "W8A8": ("Affine(8)", "int8"),
    "W4A8": ("Affine(4, 128)", "int8"),
    "FP8": ("Float('e4m3')", "e4m3"),
}
#: the kernels that are no linears
OPERATORS = (
    *("rotation", "SiLU · gate + int8", "RMS norm + int8", "attention with sizes", "attention on int8 cache"),
    *("packed attention", "cache to int8", "rerotate"),
)
#: scheme → passes for whole models
MODELS = {
    "W4A16": ["quantize:W4A16"],
    "W4A16 + 32": ["quantize:W4A16,weights=Sum(Affine(4,32),LowRank(32))"],
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
        arrays = encoding.encode(torch.randn(ROWS, self.K) / self.K**0.5)
        self.decoded = encoding.decode(arrays, (ROWS, self.K)).repeat(self.N // ROWS, 1).cuda()
        shapes = [shape for shape, _ in encoding.layout((self.N, self.K)).values()]
        pairs = zip(arrays.values(), shapes, strict=True)
        self.arrays = [a.repeat(shape[0] // a.shape[0], *[1] * (a.ndim - 1)).cuda() for a, shape in pairs]
        self.rank = 0
        if isinstance(encoding, pc.Sum):  # u and v come last
            self.rank, encoding = self.arrays[-2].shape[1], encoding.first
        else:
            self.arrays += [fixed.cuda() for fixed in fixed_arrays(encoding, arrays).values()]
        self.text = str(encoding)
        self.size = sum(a.nbytes for a in self.arrays)

    def quantised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.paretoc_triton.quantize_tokens(x, self.code)  # type: ignore[no-any-return]

    def kernel(self, x: Tensor) -> Callable[[list[Tensor]], Tensor]:
        operators = torch.ops.paretoc_triton
        if self.rank:
            return lambda arrays: operators.weight_only_linear(
                x, arrays[:-2], self.text, self.N, None, F.linear(x, arrays[-1].to(x.dtype)), arrays[-2].to(x.dtype)
            )
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


@dataclass(frozen=True)
class Operator:
    """A kernel on `inputs` and what PyTorch does in its place; `dense` turns the kernel's result into numbers."""

    name: str
    inputs: list[Tensor]
    kernel: Callable[..., Any]
    eager: Callable[..., Tensor]
    dense: Callable[..., Tensor] = lambda y: y

    def error(self) -> float:
        exact = self.eager(*(t.double() if t.is_floating_point() else t for t in self.inputs))
        return float((self.dense(self.kernel(*self.inputs)).double() - exact).abs().max() / exact.abs().max())

    def row(self, card: Card, runs: int) -> str:
        size = sum(t.nbytes for t in self.inputs)
        make = partial(rotating, lambda: [t.clone() for t in self.inputs], size, card.cache)
        ours, eager = (timed(lambda inputs, f=f: f(*inputs), make(), runs) for f in (self.kernel, self.eager))
        best = size / card.bandwidth * 1e6
        return f"{self.name:24s} {ours:9.1f} {best / ours:7.0%} {eager / ours:6.2f} × PyTorch   {self.error():8.1e}"


def operator_cases(device: str, shrink: int = 1) -> list[Operator]:
    """Every kernel that is no linear, in the shapes of a large model divided by `shrink`."""
    ours, dtype = torch.ops.paretoc_triton, torch.float32 if shrink > 1 else torch.bfloat16

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def tokens(made: tuple[Tensor, Tensor]) -> Tensor:
        return made[0].float() * made[1]

    def cached(made: tuple[Tensor, Tensor]) -> Tensor:
        return made[0].float() * made[1].unsqueeze(-1)

    def packed(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
        parts = [[t[a:b].transpose(0, 1) for t in (q, k, v)] + [size[a:b].to(q.dtype)] for a, b in spans]
        return torch.cat([F.scaled_dot_product_attention(*p[:3], p[3][None, None]).transpose(0, 1) for p in parts])

    def turned(k: Tensor) -> Tensor:
        angles = (shift.double()[:, None] * frequencies.double()).repeat(1, 2)
        half = torch.cat([-k[..., width // 2 :], k[..., : width // 2]], -1)
        return k * angles.cos().to(k.dtype) + half * angles.sin().to(k.dtype)

    M, C, wide, T, width = 512 // shrink, 4096 // shrink**2, 14336 // shrink**2, 4096 // shrink, 128 // shrink
    B, H, patches, side = max(8 // shrink, 1), max(16 // shrink, 2), 577 // shrink, int(C**0.5)
    heads = [normal(B, H, patches, 64) for _ in range(3)]
    sizes = torch.randint(1, 9, (B, 1, 1, patches), device=device).log().to(dtype)
    cache = normal(1, 8, T, width)
    codes, scales = ours.quantize_cache(cache, "int8")
    shift = torch.arange(T, device=device) - T // 2
    frequencies = 1e4 ** -torch.linspace(0, 1, width // 2, device=device)
    spans = [(0, T // 8), (T // 8, T // 2), (T // 2, T)]
    starts = torch.tensor([0, *(end for _, end in spans)], dtype=torch.int32, device=device)
    rounded = partial(reference_fake_quantize_dynamic, granularity="token")
    return [
        Operator(
            "rotation",
            [normal(M, C), normal(side, side) / side**0.5, normal(side, side) / side**0.5],
            ours.rotate,
            lambda x, left, right: (left @ (x.unflatten(-1, (side, side)) @ right)).flatten(-2),
        ),
        Operator(
            "SiLU · gate + int8",
            [normal(M, wide), normal(M, wide)],
            lambda x, gate: ours.quantize_tokens(x, "int8", 0, "silu", gate=gate),
            lambda x, gate: rounded(F.silu(x) * gate),
            tokens,
        ),
        Operator(
            "RMS norm + int8",
            [normal(M, C), normal(C)],
            lambda x, w: ours.quantize_tokens(x, "int8", 0, "rms", w, None, 1e-6),
            lambda x, w: rounded(F.rms_norm(x, (C,), w, 1e-6)),
            tokens,
        ),
        Operator(
            "attention with sizes",
            [*heads, sizes],
            lambda q, k, v, b: ours.attention(q, k, v, b, False, 0.125),
            F.scaled_dot_product_attention,
        ),
        Operator(
            "attention on int8 cache",
            [normal(1, 32, 1, width), codes, scales],
            lambda q, c, s: ours.attention(q, c, c, None, False, width**-0.5, "int8", s, s),
            lambda q, c, s: F.scaled_dot_product_attention(
                q, *[(c * s.unsqueeze(-1)).to(q.dtype)] * 2, enable_gqa=True
            ),
        ),
        Operator(
            "packed attention",
            [*(normal(T, H, 64) for _ in range(3)), torch.rand(T, device=device)],
            lambda q, k, v, b: ours.packed_attention(q, k, v, starts, starts, T // 2, b, False, 0.125),
            packed,
        ),
        Operator("cache to int8", [cache], lambda k: ours.quantize_cache(k, "int8"), rounded, cached),
        Operator("rerotate", [cache], lambda k: ours.rerotate(k, shift, frequencies), turned),
    ]


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
    names = sorted({*SCHEMES, *MODELS, *OPERATORS})
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--only", choices=names, action="append", help="a scheme; may be given again")
    parser.add_argument("--operators", action="store_true", help="the kernels that are no linears")
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
    from paretoc.backends.triton import operators  # noqa: F401  # makes them

    torch.manual_seed(0)
    card = measured_card(options.runs)
    print(f"{card.name}, PyTorch {torch.__version__}, Triton {triton.__version__}, medians of {options.runs} runs")
    print(f"copy {card.bandwidth / 1e9:.0f} GB/s, bfloat16 {card.peak / 1e12:.0f} TFLOP/s")
    if options.operators:
        print("operator                        µs   bound  speed-up          error")
        for case in operator_cases("cuda"):
            if options.only is None or case.name in options.only:
                print(case.row(card, options.runs), flush=True)
        return
    print("scheme          N × K         M        µs   bound  speed-up        error   against")
    for shape in options.shapes.split(","):
        N, K = map(int, shape.split("x"))
        for scheme in SCHEMES if options.only is None else [s for s in options.only if s in SCHEMES]:
            layer = Layer(scheme, N, K)
            for M in TOKENS:
                print(row(layer, M, card, options.runs), flush=True)


if __name__ == "__main__":
    main()
