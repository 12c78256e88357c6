"""A lowered program as files and as an ONNX Runtime session."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from ...compiler.backend import Decoder, Row
from ...compiler.causal import Cache
from ...compiler.cost import node_macs
from ...compiler.errors import ArtifactError, LoweringError, OptionError
from ...compiler.inline import inline_decode
from ...compiler.patches import linear_patches
from ...compiler.program import Program, argument, example_shape, operands
from ...compiler.sites import Site, weight_sites
from ...compiler.streams import center
from ...compiler.sums import split_sums
from .cache import CachedDecoder, row_by_row, share_cache
from .denormals import FLUSHED, flushed
from .integers import representable
from .kernels import Placed, Profiled, explain_session, needed, predicted_rows
from .kernels_openvino import explain_openvino
from .lower import Lowering, required_opset
from .nearest import nearest_fast
from .optimise import optimise
from .parts import Parts, parts_of, rows_of, share_of_run
from .providers import CPU, Provider
from .rule import Target
from .speeds import MARGIN, load_speeds
from .stored import EXTERNAL_BYTES, WEIGHTS, nbytes, write
from .translate import translate

MODEL = "model.onnx"
#: the smallest opset written: one that other runtimes know; for ONNX Runtime's own kernels the one in which attention
#: and norms are one operator
_PORTABLE, _NATIVE = 18, 23
#: session options that travel with a model: a DequantizeLinear before a MatMul must not round the activations, and the
#: signed codes of a product's second factor stay signed
CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1", "session.qdqisint8allowed": "1", **FLUSHED}
#: a protobuf message cannot exceed 2 GiB
_PROTOBUF_LIMIT = (1 << 31) - (1 << 24)


@dataclass
class OnnxExecutable:
    """`settings` is what travels with the artifact: session options, sites with their encodings, example shapes."""

    model: ir.Model | None
    settings: dict[str, Any]
    provider: Provider
    path: Path | None = None
    example: list[Tensor] = field(default_factory=list)

    @classmethod
    def from_program(cls, program: Program, *, contrib: bool, provider: Provider) -> OnnxExecutable:
        program = program.clone()
        linear_patches(program)
        if contrib:
            center(program, untie=False)
        found = weight_sites(program)
        parts = parts_of(program, found) if provider is CPU else None  # OpenVINO takes a whole batch as fast
        share = share_of_run(parts, program)
        rows = {s.path: int(rows_of(s) * share) for s in found if s.kind == "linear"}
        sites = [_placed(program, s) for s in found]
        beside = split_sums(program)
        encodings = [program.encoding(n) for n in program.calls(torch.ops.paretoc.decode.default)]
        traced = inline_decode(program, representable)
        shared = contrib and share_cache(program)
        codes = [
            str(argument(n, 2, "code", "int8")) for n in program.calls(torch.ops.paretoc.fake_quantize_dynamic.default)
        ]
        opset = required_opset(encodings, codes, _NATIVE if contrib else _PORTABLE)
        model = translate(program, opset)
        lowering = Lowering(model, contrib, rows, load_speeds(provider.table))
        lowering.run()
        threaded = share * program.repeats == 1  # a part has one thread
        few = {path for path, count in rows.items() if threaded and count <= lowering.speeds.joint_rows}
        optimise(model, [*beside, *traced], Target(contrib, few))
        example = program.users_example()
        inputs = dict(zip(program.interface.input_names(), example, strict=True))
        settings: dict[str, Any] = {
            "config": CONFIG,
            "sites": [asdict(_chosen(s, lowering)) for s in sites],
            "inputs": [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in inputs.items()],
            "sizes": _sizes(model, inputs),
            "outputs": program.interface.output_names(),
            "shared_cache": shared,
            "parts": None if parts is None else asdict(parts),
        }
        executable = cls(model, settings, provider, example=example)
        executable._check()
        return executable

    @classmethod
    def from_directory(cls, directory: Path, settings: Mapping[str, Any], provider: Provider) -> OnnxExecutable:
        return cls(None, dict(settings), provider, path=directory / Path(settings.get("file", MODEL)).name)

    def _check(self) -> None:
        """The file must be valid ONNX; contrib operators are outside what the checker knows. Large weights stand as
        inputs: the checker takes a model as one message, and several copies of it."""
        assert self.model is not None
        graph = (model := self.model.clone()).graph
        for name, value in list(graph.initializers.items()):
            if nbytes(value) >= EXTERNAL_BYTES:
                value.const_value = None
                graph.inputs.append(graph.initializers.pop(name))
        try:
            onnx.checker.check_model(ir.to_proto(model), full_check=False)
        except onnx.checker.ValidationError as error:
            raise LoweringError(
                f"the exported model is not valid ONNX: {str(error).splitlines()[0]}",
                where="exporting to ONNX",
                fix="report this with the model and the passes",
            ) from error

    # -- running ----------------------------------------------------------------------------------------------------

    def session_options(self) -> onnxruntime.SessionOptions:
        return session_options(self.settings["config"])

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        return self._start(self.session_options())

    @cached_property
    def _fitted(self) -> onnxruntime.InferenceSession:
        """A session for the sizes of the example."""
        return self._start(self._fitted_options())

    def _fitted_options(self) -> onnxruntime.SessionOptions:
        options = self.session_options()
        for name, size in self.settings.get("sizes", {}).items() if self.provider.fits_sizes else ():
            options.add_free_dimension_override_by_name(name, size)
        return options

    def _session_for(self, inputs: Sequence[Tensor]) -> onnxruntime.InferenceSession:
        """The one for the sizes of the example where that is faster and they are these, otherwise the one for any."""
        shapes = [shape for _, _, shape in self.settings["inputs"]]
        fits = self.provider.fits_sizes and [list(t.shape) for t in inputs] == shapes
        return self._fitted if fits else self.session

    @flushed()
    def _start(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        arguments = self.provider.arguments(options)
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
        """Tensors in and out share their memory with ONNX Runtime; nothing is copied on a CPU, but for the outputs of a
        batch that is computed in parts."""
        if self.settings["shared_cache"]:
            return row_by_row(self._run, inputs)
        parts = self._parts.cut(inputs, self._threads) if self._parts and self._threads > 1 else [inputs]
        if len(parts) == 1:
            return self._run(inputs)
        single = self._single
        found = self._workers.map(lambda part: self._run(part, single), parts)
        return [torch.cat(outputs) for outputs in zip(*found, strict=True)]

    @cached_property
    def _parts(self) -> Parts | None:
        kept = self.settings.get("parts")
        return Parts(tuple(kept["inputs"]), kept["samples"], kept["least"]) if kept else None

    @cached_property
    def _threads(self) -> int:
        return torch.get_num_threads()

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="paretoc")

    @cached_property
    def _single(self) -> onnxruntime.InferenceSession:
        """A session that runs on the thread that calls it."""
        options = self.session_options()
        options.intra_op_num_threads = 1
        return self._start(options)

    def _run(self, inputs: Sequence[Tensor], session: onnxruntime.InferenceSession | None = None) -> list[Tensor]:
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
        session = session or self._session_for(inputs)
        try:
            with flushed():
                found = session.run(self.settings["outputs"], needed(session, feeds))
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise OptionError(
                f"the inputs do not fit the compiled model: {str(error).splitlines()[0]}",
                where="calling the compiled model",
                fix="axes that were fixed at capture must keep their size; see CompiledModel.report().notes",
            ) from error
        return [torch.from_numpy(array) for array in found]

    def decoder(self, cache: Cache, batch: int, tokens: int) -> Decoder:
        inputs, outputs = [name for name, _, _ in self.settings["inputs"]], self.settings["outputs"]
        shared = self.settings["shared_cache"]
        return CachedDecoder(self.session, inputs, outputs, cache, batch, tokens, shared=shared)

    def explain(self) -> list[Row]:
        graph = (ir.load(self.path) if self.model is None else self.model).graph
        speeds = load_speeds(self.provider.table)
        profiled = Profiled(self._start, self._fitted_options(), self._example(), speeds)
        if self.provider is CPU:
            return explain_session(profiled, self._sites(), _convolved(graph))
        return explain_openvino(profiled, self._sites(), graph)

    def predict(self) -> list[Row]:
        return predicted_rows(self._sites())

    def _sites(self) -> list[Placed]:
        return [Placed(**site) for site in self.settings["sites"]]

    def stored_bytes(self) -> int:
        return _weight_bytes(self.model) if self.model is not None else _file_bytes(self.path)

    def _example(self) -> dict[str, np.ndarray[Any, Any]]:
        if self.example:
            tensors = self.example
        else:
            tensors = [torch.ones(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in self.settings["inputs"]]
        tensors = [t[:1] for t in tensors] if self.settings["shared_cache"] else tensors
        return {n: t.numpy() for (n, _, _), t in zip(self.settings["inputs"], tensors, strict=True)}

    # -- files ------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> dict[str, Any]:
        """model.onnx, whose large tensors are byte ranges of weights.safetensors."""
        return save_all({MODEL: self}, directory)[MODEL]

    def export(self, path: Path) -> None:
        if self.model is None:
            assert self.path is not None
            onnx.save(onnx.load(self.path), path)
        elif _weight_bytes(self.model) < _PROTOBUF_LIMIT:
            path.write_bytes(ir.to_proto(self.model).SerializeToString(deterministic=True))
        else:
            ir.save(self.model, path, external_data=f"{path.name}.data")


def save_all(executables: Mapping[str, OnnxExecutable], directory: Path) -> dict[str, dict[str, Any]]:
    """Each executable under its file name, over one file of weights; what loading each must know."""
    models = {}
    for file, executable in executables.items():
        if executable.model is None:
            raise ArtifactError("this model was loaded", where="save", fix="copy the artifact's directory instead")
        models[file] = executable.model
    write(models, directory)
    return {file: {**executable.settings, "file": file} for file, executable in executables.items()}


def session_options(config: Mapping[str, str]) -> onnxruntime.SessionOptions:
    """As many threads as PyTorch has; they stop spinning when a run ends, so that other sessions can work."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for key, value in {"session.force_spinning_stop": "1", **config}.items():
        options.add_session_config_entry(key, value)
    return options


def _sizes(model: ir.Model, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Name of an axis that any size fits → its size at the example."""
    return {
        dim.value: size
        for value in model.graph.inputs
        for dim, size in zip(value.shape or (), inputs[str(value.name)].shape, strict=True)
        if isinstance(dim, ir.SymbolicDim) and dim.value is not None
    }


def _placed(program: Program, site: Site) -> Placed:
    encoding = program.encoding(site.weight)
    arrays = program.stored_arrays(site.weight).values() if encoding else [program.weight_value(site.weight)]
    size = sum(a.nbytes for a in arrays)
    bits = getattr(getattr(encoding, "values", encoding), "bits", 8 * size / prod(example_shape(site.weight)))
    macs = node_macs(site.node) // program.repeats
    return Placed(site.path, str(encoding or "dense"), site.kind, _activations(site), macs, size, bits)


def _chosen(site: Placed, lowering: Lowering) -> Placed:
    form, speed = lowering.chosen.get(site.path, ("", None))
    if site.encoding == "dense" or (speed or 0) >= MARGIN:
        return replace(site, form=form, speed=speed)
    rows, speeds, standard = lowering.rows.get(site.path, 1), lowering.speeds, not lowering.contrib
    instead = nearest_fast(site.kind, site.bits, site.activations, rows=rows, speeds=speeds, standard=standard)
    return replace(site, form=form, speed=speed, instead=instead)


def _convolved(graph: ir.Graph) -> dict[str, str]:
    """Name of a value → the convolution, named like its site, whose result it is, activation included."""
    found: dict[str, str] = {}
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Conv":
            found[str(node.outputs[0].name)] = str(node.name)
        elif node.op_type in _ACTIVATIONS and source is not None and source.name in found:
            found[str(node.outputs[0].name)] = found[source.name]
    return found


#: what ONNX Runtime fuses behind a convolution
_ACTIVATIONS = {"Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid"}


def _activations(site: Site) -> str:
    """How the input of a site is quantised: "static", "tensor", "token" or not at all."""
    source = operands(site.node)[0]
    if not isinstance(source, fx.Node) or "paretoc.fake_quantize" not in str(source.target):
        return ""
    return str(source.args[1]) if "dynamic" in str(source.target) else "static"


def _file_bytes(path: Path | None) -> int:
    return sum(f.stat().st_size for f in (path, path.parent / WEIGHTS)) if path else 0


def _weight_bytes(model: ir.Model) -> int:
    return sum(nbytes(v) for v in model.graph.initializers.values())
