"""A lowered program as files and as a session of what runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from ...compiler.backend import Decoder, Row
from ...compiler.causal import Cache
from ...compiler.cost import node_macs
from ...compiler.errors import ArtifactError, LoweringError, OptionError, ParetocError
from ...compiler.inline import inline_decode
from ...compiler.patches import linear_patches
from ...compiler.program import Program, argument, example_shape, operands
from ...compiler.sites import Site, weight_sites
from ...compiler.streams import center
from ...compiler.sums import split_sums
from .cache import GrowingDecoder, SharedDecoder, row_by_row, share_cache
from .denormals import FLUSHED
from .integers import representable
from .kernels import PROFILED_CALLS, Placed, explain_session, predicted_rows, profile
from .kernels_openvino import explain_openvino
from .lower import Lowering, required_opset
from .nearest import nearest_fast
from .optimise import optimise
from .parts import Parts, joined, parts_of, rows_of, share_of_run
from .rule import Target
from .runtime_openvino import OpenVino
from .runtimes import CPU, OrtSession, Runtime, Session, Start
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
    runtime: Runtime
    path: Path | None = None
    example: list[Tensor] = field(default_factory=list)

    @classmethod
    def from_program(cls, program: Program, *, contrib: bool, runtime: Runtime) -> OnnxExecutable:
        program = program.clone()
        linear_patches(program)
        if contrib:
            center(program, untie=False)
        found = weight_sites(program)
        parts = parts_of(program, found) if runtime is CPU else None  # OpenVINO takes a whole batch as fast
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
        lowering = Lowering(model, contrib, rows, load_speeds(runtime.table))
        lowering.run()
        threaded = share * program.repeats == 1  # a part has one thread
        few = {path for path, count in rows.items() if threaded and count <= lowering.speeds.joint_rows}
        optimise(model, [*beside, *traced], Target(contrib, few, runtime.signed))
        example = program.users_example()
        inputs = dict(zip(program.interface.input_names(), example, strict=True))
        settings: dict[str, Any] = {
            "config": CONFIG,
            "sites": [asdict(_chosen(s, lowering)) for s in sites],
            "inputs": [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in inputs.items()],
            "outputs": program.interface.output_names(),
            "shared_cache": shared,
            "parts": None if parts is None else asdict(parts),
        }
        executable = cls(model, settings, runtime, example=example)
        executable._check()
        return executable

    @classmethod
    def from_directory(cls, directory: Path, settings: Mapping[str, Any], runtime: Runtime) -> OnnxExecutable:
        return cls(None, dict(settings), runtime, path=directory / Path(settings.get("file", MODEL)).name)

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

    @cached_property
    def session(self) -> Session:
        return self._session(self._start())

    @cached_property
    def _fitted(self) -> Session:
        """A session for the sizes of the example."""
        return self._session(self._start(fitted=True))

    def _session_for(self, inputs: Sequence[Tensor]) -> Session:
        """The one for the sizes of the example where that is faster and they are these, otherwise the one for any."""
        shapes = [shape for _, _, shape in self.settings["inputs"]]
        fits = self.runtime.fits_sizes and [list(t.shape) for t in inputs] == shapes
        return self._fitted if fits else self.session

    def _start(self, *, fitted: bool = False, threads: int | None = None) -> Start:
        sizes = {name: shape for name, _, shape in self.settings["inputs"]} if fitted else None
        return Start(self._content(), self.settings["config"], sizes, threads)

    def _content(self) -> bytes | Path:
        """The model as a session takes it."""
        if self.path is not None:
            return self.path
        assert self.model is not None
        if _weight_bytes(self.model) < _PROTOBUF_LIMIT:
            return bytes(ir.to_proto(self.model).SerializeToString())
        return Path(self._spilled.name) / MODEL

    @cached_property
    def _spilled(self) -> tempfile.TemporaryDirectory[str]:
        """A model that is too large for one message, in files."""
        folder = tempfile.TemporaryDirectory()
        self.save(Path(folder.name))
        return folder

    def _session(self, start: Start) -> Session:
        with self._refused():
            return self.runtime.start(start)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """What a runtime raises of a model is said to be that."""
        version = self.runtime.version
        try:
            yield
        except ParetocError:
            raise
        except Exception as error:
            kind = ArtifactError if self.path is not None else LoweringError
            raise kind(
                f"{version} refuses the model: {str(error).strip().splitlines()[0]}",
                where=str(self.path or "starting the session"),
                fix=f"update {version.rpartition(' ')[0]}, or compile with another target",
            ) from error

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Tensors in and out share their memory with ONNX Runtime; nothing is copied on a CPU, but for the outputs of a
        batch that is computed in parts, and those of OpenVINO."""
        if self.settings["shared_cache"]:
            return row_by_row(self._run, inputs)
        parts = self._parts.cut(inputs, self._threads) if self._parts and self._threads > 1 else [inputs]
        if len(parts) == 1:
            return self._run(inputs)
        single = self._single
        return joined(list(self._workers.map(lambda part: self._run(part, single), parts)))

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
    def _single(self) -> Session:
        """A session that runs on the thread that calls it."""
        return self._session(self._start(threads=1))

    def _run(self, inputs: Sequence[Tensor], session: Session | None = None) -> list[Tensor]:
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
        found = (session or self._session_for(inputs)).run(self.settings["outputs"], feeds)
        return [torch.from_numpy(array) for array in found]

    def decoder(self, cache: Cache, batch: int, tokens: int) -> Decoder:
        inputs, outputs = [name for name, _, _ in self.settings["inputs"]], self.settings["outputs"]
        if not self.settings["shared_cache"]:
            return GrowingDecoder(self.session, inputs, outputs, cache.zeros(batch, 0))
        assert isinstance(self.session, OrtSession), "no other runtime has the operator"
        return SharedDecoder(self.session, inputs, outputs, cache.zeros(batch, tokens))

    def profiled(self) -> tuple[onnx.GraphProto, list[dict[str, Any]]]:
        """The graph that ONNX Runtime makes of this one, and the events of a few calls."""
        with self._refused():
            return profile(self._start(), self._example())

    def explain(self) -> list[Row]:
        graph = (ir.load(self.path) if self.model is None else self.model).graph
        speeds, sites = load_speeds(self.runtime.table), self._sites()
        if not isinstance(self.runtime, OpenVino):
            return explain_session(*self.profiled(), sites, _convolved(graph), speeds)
        with self._refused():
            session = self.runtime.start(self._start(fitted=True), profiled=True)
            return explain_openvino(session.profile(self._example(), PROFILED_CALLS), sites, graph, speeds)

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
