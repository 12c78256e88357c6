"""Compile kernels ahead of time for GPUs that need not be there: what `launch` was asked to run, to machine code.

    python aot.py CASES.json RESULTS.json

A case is {"name": …, "operator": "weight_only.weight_only_linear", "capabilities": [80, …], "arguments": […]}, where a
tensor is {"shape": […], "dtype": "float16"} and the arrays of a weight {"shape": […], "weight": "Affine(4, 32)"}. The
operator runs on CPU tensors; every kernel it launches is recorded with
its arguments and compiled for each capability, specialised like Triton's own launcher does. The first case of each
operator is also traced by `torch.compile`, with its first axis left open. A process of its own, because kernels that
were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paretoc.compiler.encodings import parse_encoding

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def materialise(value: Any) -> Any:
    """JSON → arguments: tensors are not initialised, names of floating types are types."""
    if isinstance(value, dict) and "weight" in value:
        from paretoc.backends.triton.kernels.weights import fixed_arrays

        encoding = parse_encoding(value["weight"])
        layout = encoding.layout(tuple(value["shape"]))
        arrays = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        return [*arrays.values(), *fixed_arrays(encoding, arrays).values()]
    if isinstance(value, dict):
        return torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]))
    return getattr(torch, value) if value in ("float16", "bfloat16", "float32") else value


def recorded(operator: str, arguments: list[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The (kernel, arguments) that the operator launches."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel: Any, *, grid: Any, warmup: bool, **given: Any) -> None:
        unknown = given.keys() - kernel.arg_names - {"num_warps", "num_stages"}
        assert not unknown, f"{kernel.__name__} does not take {unknown}"  # the interpreter drops them
        launches.append((kernel, given))

    module, name = operator.split(".")
    function = getattr(importlib.import_module(f"paretoc.backends.triton.kernels.{module}"), name)
    run, JITFunction.run = JITFunction.run, record
    try:
        function(*map(materialise, arguments))
    finally:
        JITFunction.run = run
    return launches


class Traced(KeyboardInterrupt):
    """The graph is seen: nothing has to run. (No Exception, which Dynamo would wrap.)"""


def traced(operator: str, arguments: list[Any]) -> list[str]:
    """What inductor would be given: the operators of the graph behind AOTAutograd."""
    from torch._dynamo.backends.common import aot_autograd

    module, name = operator.split(".")
    importlib.import_module(f"paretoc.backends.triton.kernels.{module}")
    function = getattr(torch.ops.paretoc_triton, name)
    given, seen = list(map(materialise, arguments)), []
    torch._dynamo.maybe_mark_dynamic(given[0], 0)

    def see(graph: Any, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        raise Traced

    with contextlib.suppress(Traced):
        torch.compile(lambda a: function(*a), backend=aot_autograd(fw_compiler=see), fullgraph=True)(given)
    return seen


def compiled(kernel: Any, given: dict[str, Any], capability: int) -> dict[str, Any]:
    """One kernel for one architecture → its PTX and what its machine code takes."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {name: given[name] for name in ("num_warps", "num_stages") if name in given}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        pointer = isinstance(value, torch.Tensor)
        signature[parameter.name] = (
            f"*{_TYPES[value.dtype]}" if pointer else "fp32" if isinstance(value, float) else "i32"
        )
        if pointer or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {"kernel": kernel.__name__, "ptx": binary.asm["ptx"], "shared": binary.metadata.shared} | resources(
        binary.asm["cubin"]
    )


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers and bytes of stack (where spilled registers go) of a kernel in machine code."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
    }


def main(cases: Path, results: Path) -> None:
    found, graphs = [], {}
    for case in json.loads(cases.read_text()):
        if case["operator"] not in graphs:
            graphs[case["operator"]] = traced(case["operator"], case["arguments"])
        for kernel, given in recorded(case["operator"], case["arguments"]):
            for capability in case["capabilities"]:
                found.append({"case": case["name"], "capability": capability} | compiled(kernel, given, capability))
    results.write_text(json.dumps({"builds": found, "graphs": graphs}))


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # Dynamo would like a GPU, to see which arguments a kernel writes
    main(Path(sys.argv[1]), Path(sys.argv[2]))
