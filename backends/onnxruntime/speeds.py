"""How fast each form of a linear layer is: the table that chooses kernels.

A speed is a multiple of the fp32 MatMul of the same shape, for 1, 16 and 128 rows; between them the nearest counts.
`paretoc bench --calibrate` measures this machine (`probe.py`) and keeps the result for later compilations.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnxruntime

from ...compiler.errors import OptionError
from ...compiler.files import whole_file

ROWS = (1, 16, 128)
#: what counts as faster: of equally exact forms, one that takes less memory is preferred to one faster by less
MARGIN = 1.25
#: on two cores of an x86 CPU with AVX512-VNNI, 1024 × 1024, ONNX Runtime 1.31.1
_MEASURED = {
    "DynamicMatMul": (2.5, 2.6, 3.7),
    "SharedMatMul": (2.8, 2.8, 3.9),
    "IntegerMatMul": (2.4, 2.2, 2.8),
    "GroupMatMul": (3.6, 1.7, 1.4),
    "BlockMatMul": (2.1, 0.95, 1.0),
    "StoredMatMul": (0.11, 0.2, 0.5),
    "FoldedMatMul": (1.0, 1.0, 1.0),
}


#: of the same machine: 10⁹ operations a second, 10⁹ bytes a second
_PEAKS = {"int8": 890.0, "fp32": 225.0, "memory": 37.0}


@dataclass(frozen=True)
class Speeds:
    """Form → multiples of fp32 at `ROWS`; `measured` says on what. `peaks` are the rates of the roofline."""

    table: Mapping[str, Sequence[float]] = field(default_factory=lambda: _MEASURED)
    peaks: Mapping[str, float] = field(default_factory=lambda: _PEAKS)
    measured: str = "two cores of an x86 CPU with AVX512-VNNI, ONNX Runtime 1.31.1"

    def of(self, form: str, rows: int) -> float:
        nearest = min(range(len(ROWS)), key=lambda i: abs(math.log(ROWS[i] / max(rows, 1))))
        return self.table[form][nearest]

    def fastest(self, forms: Sequence[str], rows: int) -> str:
        """Forms come in the order of the memory they take; the first that is nearly the fastest."""
        best = max(self.of(form, rows) for form in forms)
        return next(form for form in forms if self.of(form, rows) * MARGIN >= best)

    def save(self) -> Path:
        """Keep the table for later compilations on this machine, whole or not at all. Raises OptionError."""
        file = cache_file()
        fix = "set PARETOC_CACHE to a writable directory"
        with whole_file(file, where="keeping the measured speeds", fix=fix, error=OptionError) as part:
            file.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(self), indent=1))
        return file


def cache_file() -> Path:
    """Where this machine's own table is kept: in PARETOC_CACHE, else in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    folder = Path(os.environ.get("PARETOC_CACHE", Path(base) / "paretoc"))
    return folder / f"onnxruntime-{onnxruntime.__version__}.json"


def load_speeds() -> Speeds:
    """The table measured on this machine with this ONNX Runtime, else the one that ships."""
    try:
        read = json.loads(cache_file().read_text())
        table = {str(k): [float(v) for v in row] for k, row in read["table"].items()}
        peaks = {k: float(read["peaks"][k]) for k in _PEAKS}
        found = Speeds(table, peaks, str(read["measured"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Speeds()
    whole = found.table.keys() >= _MEASURED.keys() and all(len(row) == len(ROWS) for row in found.table.values())
    return found if whole else Speeds()
