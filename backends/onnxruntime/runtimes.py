"""What runs an ONNX model: ONNX Runtime's own kernels for CPUs, or OpenVINO (`runtime_openvino.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnxruntime
import torch

from ...compiler.errors import OptionError
from .denormals import flushed

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Start:
    """What a session is started with: the model, as the bytes of an ONNX file or the path of one, its session options,
    the sizes of its inputs where it is to know them, and its threads, without a number as many as PyTorch has."""

    model: bytes | Path
    config: Mapping[str, str]
    sizes: Mapping[str, Sequence[int]] | None = None
    threads: int | None = None


class Session(Protocol):
    """A model that is ready to run. Calls may come from several threads."""

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs of these names, which share no memory with later ones. Of the feeds, those that no input of the
        model is called like are left out: an input that nothing reads is none. Raises OptionError where a feed does
        not fit."""


class Runtime(Protocol):
    @property
    def version(self) -> str:
        """Its name and version."""

    @property
    def table(self) -> str:
        """What `speeds.py` calls its table."""

    @property
    def fits_sizes(self) -> bool:
        """Whether a session that knows the sizes of its inputs is faster than one for any."""

    @property
    def signed(self) -> bool:
        """Whether it multiplies codes about zero faster when they are signed."""

    def start(self, start: Start) -> Session:
        """Raises LoweringError where the runtime is not installed, and what it raises of a model that it refuses."""


class OrtSession:
    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.inputs = {i.name for i in session.get_inputs()}

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        fed = {name: array for name, array in feeds.items() if name in self.inputs}
        try:
            with flushed():
                return self.session.run(outputs, fed)  # type: ignore[no-any-return]
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise unfit(str(error)) from error


class OrtCpu:
    version = f"ONNX Runtime {onnxruntime.__version__}"
    table = "CPUExecutionProvider"
    fits_sizes = signed = False

    @flushed()
    def start(self, start: Start) -> OrtSession:
        return OrtSession(inference_session(start.model, session_options(start.config, start.threads)))


CPU = OrtCpu()


def session_options(config: Mapping[str, str], threads: int | None = None) -> onnxruntime.SessionOptions:
    """The threads stop spinning when a run ends, so that other sessions can work."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    for key, value in {"session.force_spinning_stop": "1", **config}.items():
        options.add_session_config_entry(key, value)
    return options


def inference_session(model: bytes | Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """On the CPU."""
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=[CPU.table])


def unfit(said: str) -> OptionError:
    return OptionError(
        f"the inputs do not fit the compiled model: {said.strip().splitlines()[0]}",
        where="calling the compiled model",
        fix="axes that were fixed at capture must keep their size; see CompiledModel.report().notes",
    )
