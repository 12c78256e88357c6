"""What the compiler makes of each kernel for GPUs that are not here: tensor cores, wide loads, no spills, small enough.

The shapes are those of layers of a large language model; see aot.py for how a launch is compiled without running.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: bytes of shared memory that one block may have, by compute capability
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
#: the instructions of the tensor cores, as PTX
TENSOR = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync", 100: r"tcgen05\.mma|mma\.sync"}
ALL, FLOAT8 = [80, 90, 100], [90, 100]


def tensor(*shape: int, dtype: str = "float16") -> dict[str, Any]:
    return {"shape": shape, "dtype": dtype}


def case(name: str, operator: str, arguments: list[Any], capabilities: list[int] = ALL) -> dict[str, Any]:
    return {"name": name, "operator": operator, "arguments": arguments, "capabilities": capabilities}


def weight(text: str) -> list[Any]:
    """The operator's arguments for a weight `[4096, 4096]`; aot.py turns the text into arrays."""
    return [{"weight": text, "shape": [4096, 4096]}, text, 4096, None]


def corrected(M: int, rank: int) -> list[Any]:
    """The thin product of a low-rank correction, and its other factor."""
    return [tensor(M, rank), tensor(4096, rank)]


def codes(M: int, dtype: str = "int8", groups: int = 1) -> list[Any]:
    return [tensor(M, 4096, dtype=dtype), tensor(M, groups, dtype="float32"), None, 8]


def cached(dtype: str, width: int, code: str = "int8") -> list[Any]:
    """One query of 32 heads of width 128 on 4096 keys of 8 heads, in codes."""
    codes = tensor(1, 8, 4096, width, dtype=dtype)
    return [tensor(1, 32, 1, 128), codes, codes, None, False, 0.09, code]


LINEAR, QUANTIZED, TOKENS = (
    "weight_only.weight_only_linear",
    "quantized.quantized_linear",
    "quantize.quantize_tokens",
)
PLACES = [tensor(8, 273, dtype="int64"), tensor(8, 16, dtype="int64"), tensor(8, 16, dtype="int64")]
RANGE = [tensor(dtype="float32"), tensor(dtype="uint8"), 8]
MERGE = [tensor(8, 577, 1024), tensor(8, 577, 1, dtype="float32"), *PLACES]
HEADS = [tensor(8, 16, 577, 64)] * 3
KEYS = tensor(4096, dtype="float32")
PACKED = [*[tensor(4096, 16, 64)] * 3, *[tensor(9, dtype="int32")] * 2]
KEY_SCALES = [tensor(1, 8, 4096, dtype="float32")] * 2
CODES = [tensor(1, 8, 4096, 64, dtype="uint8"), tensor(1, 8, 4096, 128, dtype="int8")]
SHIFT = [tensor(4096, dtype="int64"), tensor(64, dtype="float32")]
CASES = [
    case("W4A16 decode", LINEAR, [tensor(1, 4096), *weight("Affine(4, 32)")]),
    case("W4A16 skinny", LINEAR, [tensor(16, 4096), *weight("Affine(4, 32)")], [80]),
    case("W4A16 prefill", LINEAR, [tensor(512, 4096), *weight("Affine(4, 32)")]),
    case("W2A16 decode", LINEAR, [tensor(1, 4096), *weight("Affine(2, 32, symmetric=False)")], [90]),
    case("MXFP4 decode", LINEAR, [tensor(1, 4096), *weight("Float('e2m1', 32, 'e8m0')")], [90]),
    case("NVFP4 prefill", LINEAR, [tensor(512, 4096, dtype="bfloat16"), *weight("Float('e2m1', 16, 'e4m3')")], [90]),
    case("2:4 int4 decode", LINEAR, [tensor(1, 4096), *weight("NM(2, 4, values=Affine(4, 32))")], [90]),
    case("2:4 int4 prefill", LINEAR, [tensor(512, 4096), *weight("NM(2, 4, values=Affine(4, 32))")], [90]),
    case("4:8 int4 decode", LINEAR, [tensor(1, 4096), *weight("NM(4, 8, values=Affine(4, 32))")], [90]),
    case("1:4 int8 prefill", LINEAR, [tensor(512, 4096), *weight("NM(1, 4, values=Affine(8))")], [90]),
    case("additive decode", LINEAR, [tensor(1, 4096), *weight("Additive(2, 8, 8)")], [90]),
    case("NF4 decode", LINEAR, [tensor(1, 4096), *weight("NF4(64)")], [90]),
    case("codebook prefill", LINEAR, [tensor(512, 4096), *weight("Codebook(4)")], [80]),
    case("W4A16 + rank 32 decode", LINEAR, [tensor(1, 4096), *weight("Affine(4, 32)"), *corrected(1, 32)], [90]),
    case("W4A16 + rank 32 prefill", LINEAR, [tensor(512, 4096), *weight("Affine(4, 32)"), *corrected(512, 32)]),
    case("W4A8 + rank 100", QUANTIZED, [*codes(512), *weight("Affine(4)"), "float16", *corrected(512, 100)], [90]),
    case("W8A8 prefill", QUANTIZED, [*codes(512), *weight("Affine(8)"), "float16"]),
    case("W4A8 skinny", QUANTIZED, [*codes(16), *weight("Affine(4, 32)"), "float16"], [80]),
    case("W4A8 groups prefill", QUANTIZED, [*codes(512, groups=128), *weight("Affine(4, 32)"), "float16"]),
    case("FP8 prefill", QUANTIZED, [*codes(512, "float8_e4m3fn"), *weight("Float('e4m3')"), "bfloat16"], FLOAT8),
    case("norm + int8", TOKENS, [tensor(512, 4096), "int8", 0, "rms", tensor(4096), None, 1e-5]),
    case("norm + int8 groups", TOKENS, [tensor(512, 4096), "int8", 32, "rms", tensor(4096), None, 1e-5], [90]),
    case("int4 groups", "quantize.round_tokens", [tensor(512, 4096), "int4", 32], [90]),
    case("uint8", "quantize.round_range", [tensor(512, 4096), *RANGE], [80]),
    case("match", "tokens.bipartite_match", [tensor(8, 577, 64), 16, 1]),
    case("merge", "tokens.merge_tokens", MERGE),
    case("E4M3", TOKENS, [tensor(512, 4096), "e4m3"], [90]),
    case("SiLU · gate + int8", TOKENS, [tensor(512, 14336), "int8", 0, "silu", *[None] * 2, 0.0, tensor(512, 14336)]),
    case("GELU + uint8", "quantize.quantize_range", [tensor(512, 4096), *RANGE, "gelu"], [90]),
    case("rotation 64 × 64", "rotation.rotate", [tensor(512, 4096), tensor(64, 64), tensor(64, 64)]),
    case("rotation 64 × 172", "rotation.rotate", [tensor(512, 11008), tensor(64, 64), tensor(172, 172)], [90]),
    case("rotation 112 × 128", "rotation.rotate", [tensor(1, 14336), tensor(112, 112), tensor(128, 128)], [80]),
    case("rotation to int8", "rotation.rotate_tokens", [tensor(512, 4096), *[tensor(64, 64)] * 2, "int8"], [80, 90]),
    case("attention with sizes", "attention.attention", [*HEADS, tensor(8, 1, 1, 577), False, 0.125]),
    case("attention on int8", "attention.attention", [*cached("int8", 128), *KEY_SCALES], [80, 90]),
    case("attention on int4", "attention.attention", [*cached("uint8", 64, "int4"), *KEY_SCALES], [90]),
    case("packed attention", "attention.packed_attention", [*PACKED, 577, KEYS, False, 0.125], [80, 90]),
    case("causal packed attention", "attention.packed_attention", [*PACKED, 577, None, True, 0.125], [90]),
    case("cache to int8", "cache.quantize_cache", [tensor(1, 8, 4096, 128), "int8"], [80, 90]),
    case("cache to int4", "cache.quantize_cache", [tensor(1, 8, 4096, 128), "int4"], [90]),
    case("cache to E4M3", "cache.quantize_cache", [tensor(1, 8, 4096, 128), "e4m3"], [90]),
    case("int4 cache", "cache.decode_cache", [CODES[0], KEY_SCALES[0], "int4", "float16"], [90]),
    case("rerotate", "cache.rerotate", [tensor(1, 8, 4096, 128), *SHIFT], [80]),
    case("rerotate int8", "cache.rerotate_codes", [CODES[1], KEY_SCALES[0], "int8", *SHIFT], [90]),
]
#: what must use tensor cores; nothing else may
MULTIPLIERS = ("matmul_kernel", "quantized_matmul_kernel", "match_kernel", "rotation_kernel", "attention_kernel")
#: what need not load 16 bytes at once: a step is one group, 16 bytes a row for two threads; 16 bytes come of 4
NARROW = ("W4A8 skinny", "int4 cache")
BUILDS = [(c["name"], capability) for c in CASES for capability in c["capabilities"]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """What a process that does not interpret has compiled and traced; Triton's cache stays for the next run."""
    folder = tmp_path_factory.mktemp("aot")
    assert pytestconfig.cache is not None
    (folder / "cases.json").write_text(json.dumps(CASES))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("aot.py"), folder / "cases.json", folder / "results.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def builds(results: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """(case, capability) → its PTX and resources."""
    return {(b["case"], b["capability"]): b for b in results["builds"]}


def uses_tensor_cores(build: dict[str, Any]) -> bool:
    return re.search(TENSOR[build["capability"]], build["ptx"]) is not None


def wide_loads(build: dict[str, Any]) -> int:
    """Loads of 16 bytes from global memory: into registers, or into shared memory."""
    return len(
        re.findall(r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg\.shared\.global \[.*\], \[.*\], 0x10", build["ptx"])
    )


def spills(build: dict[str, Any]) -> bool:
    """Whether registers go to memory."""
    return build["stack"] > 0


@pytest.mark.parametrize(("name", "capability"), BUILDS, ids=[f"{n} sm_{c}" for n, c in BUILDS])
def test_a_kernel_is_built_well(builds, name, capability):
    build = builds[name, capability]
    assert wide_loads(build) > 0 or name in NARROW
    assert not spills(build)
    assert build["shared"] <= SHARED[capability]
    assert f".target sm_{capability}" in build["ptx"]
    assert uses_tensor_cores(build) == (build["kernel"] in MULTIPLIERS)


@pytest.mark.parametrize(
    ("name", "capability", "instruction"),
    [
        ("W4A16 skinny", 80, r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"),
        ("W4A16 prefill", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.f16\.f16"),
        ("W4A16 prefill", 100, r"tcgen05\.mma"),
        ("NVFP4 prefill", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.bf16\.bf16"),
        ("W8A8 prefill", 80, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"),
        ("W8A8 prefill", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.s32\.s8\.s8"),
        ("W4A8 skinny", 80, r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"),
        ("W4A8 groups prefill", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.s32\.s8\.s8"),
        ("W4A16 + rank 32 prefill", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.f16\.f16"),
        ("rotation 64 × 64", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.f16\.f16"),
        ("attention with sizes", 80, r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"),
        ("attention with sizes", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32\.f16\.f16"),
        ("attention with sizes", 100, r"tcgen05\.mma"),
        ("FP8 prefill", 90, r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.e4m3\.e4m3"),
    ],
)
def test_the_tensor_cores_multiply_in_the_type_that_is_stored(builds, name, capability, instruction):
    assert re.search(instruction, builds[name, capability]["ptx"])


@pytest.mark.parametrize("operator", sorted({case["operator"] for case in CASES}))
def test_inductor_sees_the_kernel_and_cuda_graphs_capture_it(results, operator):
    seen = results["graphs"][operator]
    assert seen.count("triton_kernel_wrapper_functional") == 1
    assert not any("paretoc" in name for name in seen)  # nothing opaque is left


def test_the_checks_see_what_is_wrong(builds):
    good = builds["W4A16 decode", 90]
    assert not uses_tensor_cores(good) and uses_tensor_cores(builds["W4A16 prefill", 90])
    assert spills(good | {"stack": 8}) and not spills(good)
    narrow = good["ptx"].replace("v4.b32", "b32")
    assert wide_loads(good | {"ptx": narrow}) == 0
