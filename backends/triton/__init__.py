"""target="triton": the program in PyTorch on an NVIDIA GPU, with Triton kernels where the dialect has work for them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...compiler.backend import Executable
from ...compiler.errors import LoweringError
from ...compiler.program import Program
from ..onnxruntime import Onnx


class Triton:
    """Kernels for encoded weights, quantised activations, rotations, token merging and the attention behind it.

    Without a GPU the kernels run under Triton's interpreter, for tests, when TRITON_INTERPRET=1 is set before Python
    starts. An artifact holds ONNX: loaded again, it runs on ONNX Runtime, and `explain()` says so; the tilings that
    were measured on a GPU serve the next compilation on one of its name, from a file in the user's cache folder too.
    """

    name = "triton"

    def lower(self, program: Program, options: Mapping[str, Any]) -> Executable:
        """Raises LoweringError where Triton is missing, or has nothing to run on."""
        try:
            import triton  # noqa: F401  # is it there?
        except ImportError as error:
            raise LoweringError(
                "Triton is not installed", where="target='triton'", fix="pip install 'paretoc[triton]' (Linux)"
            ) from error
        from .executable import TritonExecutable

        return TritonExecutable.from_program(program)

    def load(self, directory: Path, settings: Mapping[str, Any]) -> Executable:
        rest = dict(settings)
        if (tilings := rest.pop("tilings", None)) is not None and find_spec("triton") is not None:
            from .executable import read_tilings

            read_tilings(tilings)
        return Onnx().load(directory, rest)


__all__ = ["Triton"]
