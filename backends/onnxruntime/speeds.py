"""How fast each form of a linear layer is: the tables that choose kernels, one for each kind of machine.

A speed is a multiple of the fp32 MatMul of the same shape, for 1, 16 and 128 rows; between them the nearest counts.
`paretoc bench --calibrate` measures this machine (`probe.py`) and keeps the result for later compilations. Until then:

    x86 with VNNI      measured, with AMX and without
    x86 without        stated, from those: half for u8·s8 (pmaddubsw in place of vpdpbusd), two thirds for MatMulNBits
                       at accuracy level 4, which takes 1.4 to 1.5 times as long there (microsoft/onnxruntime#24491)
    OpenVINO           measured on x86 with VNNI, with AMX and without, its floating operators in f32 and in bf16; not
                       known elsewhere
    other CPUs, CUDA   not known: the first form of the table that fits; which operators CUDA has is listed in
                       docs/OperatorKernels.md of ONNX Runtime
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import onnxruntime
import torch

from ...compiler.errors import OptionError
from ...compiler.files import cache_folder, whole_file

ROWS = (1, 16, 128)
#: what counts as faster: of equally exact forms, one that takes less memory is preferred to one faster by less
MARGIN = 1.25
#: on two cores of an x86 CPU with AVX512-VNNI, 1024 × 1024, ONNX Runtime 1.31.1
_MEASURED = {
    "DynamicMatMul": (2.5, 2.6, 3.7),
    "SharedMatMul": (2.8, 2.8, 3.9),
    "RoundedMatMul": (2.8, 2.8, 3.9),  # fused into the same kernel
    "IntegerMatMul": (2.4, 2.2, 2.8),
    "GroupMatMul": (3.6, 1.7, 1.4),
    "BlockMatMul": (2.1, 0.95, 1.0),
    "StoredMatMul": (0.11, 0.2, 0.5),
    "FoldedMatMul": (1.0, 1.0, 1.0),
}
#: on two cores of an x86 CPU with AMX: .75 of the time at 128 and 256 rows of 384, 1.05 at 394, 1.09 at 1024; on one
#: thread it is slower
_JOINT_ROWS = 256
#: on two cores of an x86 CPU with AMX, medians of five measurements
_WITH_AMX = {
    "DynamicMatMul": (1.7, 2.8, 3.6),
    "SharedMatMul": (1.9, 3.1, 3.9),
    "RoundedMatMul": (1.9, 3.1, 3.9),
    "IntegerMatMul": (1.7, 2.5, 2.3),
    "GroupMatMul": (2.2, 1.3, 0.82),
    "BlockMatMul": (1.75, 1.0, 1.0),
    "StoredMatMul": (0.13, 0.22, 0.47),
    "FoldedMatMul": (1.0, 1.0, 1.0),
}
_AMX_PEAKS = {"int8": 2065.0, "fp32": 375.0, "memory": 26.0}
#: OpenVINO by the precision of its floating operators, on that CPU: multiples of its own MatMul, medians of four
#: measurements, and peaks. Between the first two lie 5–11 % of the time of a whole transformer
_OPENVINO_WITH_AMX = {
    "f32": {
        "ShiftedMatMul": (1.6, 2.7, 5.6),
        "RoundedMatMul": (1.7, 2.7, 5.3),
        "IntegerMatMul": (0.69, 0.63, 0.75),
        "StoredMatMul": (1.8, 0.95, 1.05),
    },
    "bf16": {
        "ShiftedMatMul": (1.7, 1.6, 1.9),
        "RoundedMatMul": (1.7, 1.65, 1.8),
        "IntegerMatMul": (0.69, 0.36, 0.23),
        "StoredMatMul": (1.85, 0.72, 0.96),
    },
}
_OPENVINO_AMX_PEAKS = {"f32": _AMX_PEAKS, "bf16": {**_AMX_PEAKS, "fp32": 1750.0}}
#: the same on two cores of a CPU with AVX512-VNNI and AVX512-BF16, a newer one than that of the first table
_OPENVINO = {
    "f32": {
        "ShiftedMatMul": (1.5, 2.7, 3.6),
        "RoundedMatMul": (1.6, 3.0, 3.6),
        "IntegerMatMul": (0.58, 0.72, 0.63),
        "StoredMatMul": (1.65, 0.95, 1.0),
    },
    "bf16": {
        "ShiftedMatMul": (1.15, 1.35, 1.8),
        "RoundedMatMul": (1.25, 1.5, 1.8),
        "IntegerMatMul": (0.44, 0.36, 0.32),
        "StoredMatMul": (1.15, 0.68, 0.79),
    },
}
_OPENVINO_PEAKS = {
    precision: {"int8": 1830.0, "fp32": rate, "memory": 84.0} for precision, rate in (("f32", 451.0), ("bf16", 943.0))
}
#: of the machine of the table: 10⁹ operations a second, 10⁹ bytes a second
_PEAKS = {"int8": 890.0, "fp32": 225.0, "memory": 37.0}
#: form → the share of its speed that is left without VNNI
_WITHOUT_VNNI = dict.fromkeys(("DynamicMatMul", "SharedMatMul", "RoundedMatMul", "IntegerMatMul"), 1 / 2)
_WITHOUT_VNNI |= {"GroupMatMul": 2 / 3}
#: the forms of which the CUDA provider has the operators come first: the others run on the CPU, between two copies
_CUDA = (
    "BlockMatMul", "FoldedMatMul", "StoredMatMul",
    "RoundedMatMul", "GroupMatMul", "SharedMatMul", "IntegerMatMul", "DynamicMatMul",
)  # fmt: skip
#: with the weights decoded once before they are decoded at every call
_UNKNOWN = (*list(_MEASURED)[:-2], "FoldedMatMul", "StoredMatMul")
_OPENVINO_UNKNOWN = ("ShiftedMatMul", "RoundedMatMul", "StoredMatMul", "IntegerMatMul")
#: the table of sessions on ONNX Runtime's own provider
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Speeds:
    """Form, of those that are for this runtime, → multiples of fp32 at `ROWS`, or nothing where they are not known;
    `measured` says on what, or `stated` from where. `peaks` are the rates of the roofline, where they are known, "fp32"
    of products of floats in whatever precision the runtime computes them."""

    table: Mapping[str, Sequence[float]] = field(default_factory=lambda: _MEASURED)
    peaks: Mapping[str, float] = field(default_factory=lambda: _PEAKS)
    measured: str = "two cores of an x86 CPU with AVX512-VNNI, ONNX Runtime 1.31.1"
    stated: str = ""
    #: up to so many rows of its input QAttention is faster, on several threads, than three products and Attention
    joint_rows: int = _JOINT_ROWS

    def known(self, form: str) -> bool:
        return bool(self.table.get(form))

    def of(self, form: str, rows: int) -> float:
        """1 where it is not known: no form is claimed to be faster than fp32."""
        nearest = min(range(len(ROWS)), key=lambda i: abs(math.log(ROWS[i] / max(rows, 1))))
        return self.table[form][nearest] if self.known(form) else 1.0

    def fastest(self, forms: Sequence[str], rows: int) -> str:
        """Forms come in the order of the memory they take; of those in the table the first that is nearly the fastest.
        Where nothing is known of them, the first in the table."""
        forms = [form for form in forms if form in self.table]
        if not any(map(self.known, forms)):
            return min(forms, key=list(self.table).index)
        best = max(self.of(form, rows) for form in forms)
        return next(form for form in forms if self.of(form, rows) * MARGIN >= best)

    def save(self, table: str = _CPU) -> Path:
        """Keep the table for later compilations on this machine, whole or not at all. Raises OptionError."""
        file = cache_file(table)
        fix = "set PARETOC_CACHE to a writable directory"
        with whole_file(file, where="keeping the measured speeds", fix=fix, error=OptionError) as part:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(self), indent=1))
        return file


def cache_file(table: str = _CPU) -> Path:
    """Where this machine's own table is kept, for the versions that it was measured with."""
    name = f"onnxruntime-{onnxruntime.__version__}"
    if table.startswith("OpenVINO"):
        name, table = f"openvino-{_installed('openvino')}", table.partition("-")[2]
    return cache_folder() / f"{name}{'' if table == _CPU else f'-{table}'}.json"


def _installed(package: str) -> str:
    """Its version, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def load_speeds(table: str = _CPU) -> Speeds:
    """The table of a runtime or a provider of one, measured on this machine, else the one that ships for such a
    machine."""
    default = shipped(table)
    try:
        file = cache_file(table)
        status = file.stat()
    except OSError:
        return default
    return _read(file, (status.st_mtime_ns, status.st_ino), frozenset(default.table)) or default


def shipped(table: str = _CPU) -> Speeds:
    """The table that ships for this machine."""
    if table == "CUDAExecutionProvider":
        return _unknown(_CUDA, "no speeds are known for CUDA, where MatMulNBits runs and 8-bit activations do not")
    flags = cpu_flags()
    if table != _CPU:
        return _shipped_openvino(table.partition("-")[2], flags)
    if "amx_int8" in flags:
        return Speeds(_WITH_AMX, _AMX_PEAKS, "two cores of an x86 CPU with AMX, ONNX Runtime 1.31.1")
    if flags & {"avx512_vnni", "avx_vnni"}:
        return Speeds()
    if "avx2" in flags:
        without = {form: tuple(v * _WITHOUT_VNNI.get(form, 1.0) for v in row) for form, row in _MEASURED.items()}
        return Speeds(
            without, {}, "", "the speed is stated, not measured: that of a CPU with VNNI, u8·s8 at half of it"
        )
    return _unknown(_UNKNOWN, "no speeds are known for this machine")


def _shipped_openvino(precision: str, flags: Collection[str]) -> Speeds:
    if "amx_int8" in flags:
        where = "two cores of an x86 CPU with AMX, OpenVINO 2026.4"
        return Speeds(_OPENVINO_WITH_AMX[precision], _OPENVINO_AMX_PEAKS[precision], where, joint_rows=0)
    if "avx512_vnni" not in flags:
        return _unknown(_OPENVINO_UNKNOWN, "no speeds of OpenVINO are known for this machine")
    known = precision if "avx512_bf16" in flags else "f32"  # what it computes in there
    where = "two cores of an x86 CPU with AVX512-VNNI, OpenVINO 2026.4"
    return Speeds(_OPENVINO[known], _OPENVINO_PEAKS[known], where, joint_rows=0)


def _unknown(order: Sequence[str], stated: str) -> Speeds:
    return Speeds(dict.fromkeys(order, ()), {}, "", stated, joint_rows=0)


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in the words of Linux on x86; elsewhere no more than PyTorch says of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ["flags: avx2"] if torch.backends.cpu.get_cpu_capability().startswith("AVX") else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


@cache
def _read(file: Path, stamp: tuple[int, int], forms: frozenset[str]) -> Speeds | None:
    """The table in a file, read once for each of its states; None when it is damaged or lacks one of the forms."""
    try:
        read = json.loads(file.read_text())
        table = {str(k): [float(v) for v in row] for k, row in read["table"].items()}
        peaks = {k: float(read["peaks"][k]) for k in _PEAKS}
        found = Speeds(table, peaks, str(read["measured"]), joint_rows=int(read["joint_rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = found.table.keys() >= forms and all(len(row) == len(ROWS) for row in found.table.values())
    return found if whole else None
