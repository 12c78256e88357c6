"""A lowered program as files and as an ONNX Runtime session."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from safetensors.numpy import save_file
from torch import Tensor, fx

from ...compiler.backend import Row
from ...compiler.errors import ArtifactError, LoweringError, OptionError
from ...compiler.inline import inline_decode
from ...compiler.program import Program, argument, operands
from ...compiler.sites import SDPA, Site, weight_sites
from ...compiler.sums import split_sums
from .integers import representable
from .kernels import explain_session
from .lower import Lowering, required_opset
from .optimise import optimise
from .translate import translate

MODEL, WEIGHTS = "model.onnx", "weights.safetensors"
#: the smallest opset written, and the one in which attention is a single operator
_BASE_OPSET, _ATTENTION_OPSET = 18, 23
#: tensors smaller than this stay inside model.onnx
_EXTERNAL_BYTES = 1024
#: a protobuf message cannot exceed 2 GiB
_PROTOBUF_LIMIT = (1 << 31) - (1 << 24)


@dataclass
class OnnxExecutable:
    """`settings` is what travels with the artifact: session options, sites with their encodings, example shapes."""

    model: ir.Model | None
    settings: dict[str, Any]
    target: str
    path: Path | None = None
    example: list[Tensor] = field(default_factory=list)

    @classmethod
    def from_program(cls, program: Program, *, target: str, options: Mapping[str, Any]) -> OnnxExecutable:
        program = program.clone()
        sites = [
            [s.path, str(program.encoding(s.weight) or "dense"), s.kind, _activations(s)] for s in weight_sites(program)
        ]
        beside = split_sums(program)
        encodings = [program.encoding(n) for n in program.calls(torch.ops.paretoc.decode.default)]
        traced = inline_decode(program, representable)
        wants_attention = target == "onnxruntime" and program.calls(*SDPA)
        codes = [
            str(argument(n, 2, "code", "int8")) for n in program.calls(torch.ops.paretoc.fake_quantize_dynamic.default)
        ]
        opset = required_opset(encodings, codes, _ATTENTION_OPSET if wants_attention else _BASE_OPSET)
        model = translate(program, opset)
        Lowering(model, target).run()
        optimise(model, [*beside, *traced])
        settings: dict[str, Any] = {
            "config": {"session.qdq_matmulnbits_accuracy_level": "1"},
            # folding would turn traced codes into dense float weights when the session starts
            "disabled_optimizers": ["ConstantFolding"] if traced else [],
            "sites": sites,
            "inputs": [
                [n.name, str(t.dtype).removeprefix("torch."), list(t.shape)]
                for n, t in zip(program.placeholders, program.example, strict=True)
            ],
            "outputs": program.interface.output_names(),
        }
        executable = cls(model, settings, target, example=list(program.example))
        executable._check()
        return executable

    @classmethod
    def from_directory(cls, directory: Path, settings: Mapping[str, Any]) -> OnnxExecutable:
        return cls(None, dict(settings), "onnxruntime", path=directory / MODEL)

    def _check(self) -> None:
        """The file must be valid ONNX; contrib operators are outside what the checker knows."""
        assert self.model is not None
        if _weight_bytes(self.model) < _PROTOBUF_LIMIT:
            try:
                onnx.checker.check_model(ir.to_proto(self.model), full_check=False)
            except onnx.checker.ValidationError as error:
                raise LoweringError(
                    f"the exported model is not valid ONNX: {str(error).splitlines()[0]}",
                    where="exporting to ONNX",
                    fix="report this with the model and the passes",
                ) from error

    # -- running ----------------------------------------------------------------------------------------------------

    def session_options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in self.settings["config"].items():
            options.add_session_config_entry(key, value)
        return options

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        return self._start(self.session_options())

    def _start(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        arguments = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": self.settings["disabled_optimizers"]}
        try:
            if self.path is not None:
                return onnxruntime.InferenceSession(str(self.path), options, **arguments)
            assert self.model is not None
            if _weight_bytes(self.model) < _PROTOBUF_LIMIT:
                return onnxruntime.InferenceSession(ir.to_proto(self.model).SerializeToString(), options, **arguments)
            self._spill = tempfile.TemporaryDirectory()
            self.save(Path(self._spill.name))
            return onnxruntime.InferenceSession(str(Path(self._spill.name) / MODEL), options, **arguments)
        except Exception as error:
            kind = ArtifactError if self.path is not None else LoweringError
            raise kind(
                f"ONNX Runtime {onnxruntime.__version__} refuses the model: {str(error).splitlines()[0]}",
                where=str(self.path or "starting the session"),
                fix="update onnxruntime, or compile with target='onnx'",
            ) from error

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in and out share their memory with ONNX Runtime; nothing is copied on a CPU."""
        feeds = {}
        for (name, dtype, shape), tensor in zip(self.settings["inputs"], inputs, strict=True):
            if str(tensor.dtype).removeprefix("torch.") != dtype or tensor.ndim != len(shape):
                raise OptionError(
                    f"input {name!r} has dtype {tensor.dtype} and {tensor.ndim} axes; the model takes {dtype} with "
                    f"{len(shape)}",
                    where="calling the compiled model",
                    fix="convert the input, or recompile with inputs like these",
                )
            feeds[name] = tensor.detach().cpu().contiguous().numpy()
        feeds = {k: v for k, v in feeds.items() if k in self._fed}
        try:
            return [torch.from_numpy(o) for o in self.session.run(self.settings["outputs"], feeds)]
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise OptionError(
                f"the inputs do not fit the compiled model: {str(error).splitlines()[0]}",
                where="calling the compiled model",
                fix="axes that were fixed at capture must keep their size; see CompiledModel.report().notes",
            ) from error

    @cached_property
    def _fed(self) -> set[str]:
        return {i.name for i in self.session.get_inputs()}

    def explain(self) -> list[Row]:
        return explain_session(self._start, self.session_options(), self.settings, self._example())

    def stored_bytes(self) -> int:
        return _weight_bytes(self.model) if self.model is not None else _file_bytes(self.path)

    def _example(self) -> dict[str, np.ndarray[Any, Any]]:
        if self.example:
            tensors = self.example
        else:
            tensors = [torch.ones(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in self.settings["inputs"]]
        return {n: t.numpy() for (n, _, _), t in zip(self.settings["inputs"], tensors, strict=True) if n in self._fed}

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> dict[str, Any]:
        """model.onnx, whose large tensors are byte ranges of weights.safetensors."""
        if self.model is None:
            raise ArtifactError("this model was loaded", where="save", fix="copy the artifact's directory instead")
        stored = {n: v for n, v in self.model.graph.initializers.items() if _nbytes(v) >= _EXTERNAL_BYTES}
        save_file({n: _raw(v) for n, v in sorted(stored.items())}, directory / WEIGHTS)
        (directory / WEIGHTS).chmod(0o644)  # safetensors makes it readable by its owner only
        offsets = _offsets(directory / WEIGHTS)
        kept = {n: v.const_value for n, v in stored.items()}
        try:
            for name, value in stored.items():
                tensor = kept[name]
                assert tensor is not None
                begin, end = offsets[name]
                value.const_value = ir.ExternalTensor(
                    WEIGHTS, begin, end - begin, tensor.dtype, shape=tensor.shape, name=name, base_dir=directory
                )
            (directory / MODEL).write_bytes(ir.to_proto(self.model).SerializeToString(deterministic=True))
        finally:
            for name, value in stored.items():
                value.const_value = kept[name]
        onnx.checker.check_model(str(directory / MODEL), full_check=False)
        return self.settings

    def export(self, path: Path) -> None:
        if self.model is None:
            assert self.path is not None
            onnx.save(onnx.load(self.path), path)
        elif _weight_bytes(self.model) < _PROTOBUF_LIMIT:
            path.write_bytes(ir.to_proto(self.model).SerializeToString(deterministic=True))
        else:
            ir.save(self.model, path, external_data=f"{path.name}.data")


def _activations(site: Site) -> str:
    """How the input of a site is quantised: "static", "tensor", "token" or not at all."""
    source = operands(site.node)[0]
    if not isinstance(source, fx.Node) or "paretoc.fake_quantize" not in str(source.target):
        return ""
    return str(source.args[1]) if "dynamic" in str(source.target) else "static"


def _nbytes(value: ir.Value) -> int:
    return int(value.const_value.nbytes) if value.const_value is not None else 0


def _file_bytes(path: Path | None) -> int:
    return sum(f.stat().st_size for f in path.parent.glob("*") if f.name in (MODEL, WEIGHTS)) if path else 0


def _weight_bytes(model: ir.Model) -> int:
    return sum(_nbytes(v) for v in model.graph.initializers.values())


def _raw(value: ir.Value) -> np.ndarray[Any, Any]:
    """A tensor's bytes in a dtype and shape that safetensors knows; ONNX reads the bytes, packed or not."""
    tensor = value.const_value
    assert tensor is not None
    array = tensor.numpy()
    if array.dtype.name in _SAFE:
        return np.ascontiguousarray(array)
    return np.frombuffer(tensor.tobytes(), dtype=np.uint8)


_SAFE = {"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"}


def _offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor lies in a safetensors file: (first byte, one past the last)."""
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        entries = json.loads(stream.read(header))
    base = 8 + header
    return {
        n: (base + e["data_offsets"][0], base + e["data_offsets"][1]) for n, e in entries.items() if n != "__metadata__"
    }
