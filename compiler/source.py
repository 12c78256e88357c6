"""What the command line is given: MODEL as a callable or a checkpoint, inputs from files or made up."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CalibrationError, OptionError, ParetocError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

#: samples in one batch of a --calibration file
BATCH = 8
#: the inputs made up for a checkpoint: samples, and at most so many tokens
_SAMPLES, _TOKENS = 2, 64


# -- MODEL: a callable or a checkpoint ----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A model with what came with it. `checkpoint`: it has a config that example inputs can be made from."""

    model: Any
    example: Any = None
    calibration: Any = None
    checkpoint: bool = False


def read_source(name: str) -> Source:
    directory = Path(name)
    if (directory / "manifest.json").is_file():
        raise OptionError(
            f"{name!r} is compiled already",
            where="MODEL",
            fix="compile the original; explain, bench or load this one",
        )
    if (directory / "config.json").is_file():
        return _checkpoint(directory)
    if directory.is_dir():
        raise OptionError(
            f"the directory {name!r} holds neither config.json nor manifest.json",
            where="MODEL",
            fix="give a Hugging Face directory or a saved artifact",
        )
    if ":" not in name:
        raise OptionError(
            f"there is no directory {name!r}", where="MODEL", fix="give a directory, or write module:callable"
        )
    return _from_callable(name)


def _from_callable(name: str) -> Source:
    """`module:callable`; the current directory is searched too, as `python -m` does."""
    from torch.export import ExportedProgram
    from torch.nn import Module

    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _attempt(f"importing {module_name!r}", name, lambda: importlib.import_module(module_name))
    try:
        found = attrgetter(attribute)(module)
    except AttributeError as error:
        raise OptionError(
            f"{module_name!r} has no {attribute!r}",
            where=f"MODEL {name!r}",
            fix=did_you_mean(attribute, (key for key, value in vars(module).items() if callable(value))),
        ) from error
    made = found if isinstance(found, Module) else _attempt(f"calling {attribute!r}", name, found)
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], Module | ExportedProgram):
        shown = ", ".join(type(part).__name__ for part in parts)
        raise OptionError(
            f"{attribute!r} returned ({shown})",
            where=f"MODEL {name!r}",
            fix="return the model, (model, example_inputs) or (model, example_inputs, calibration)",
        )
    return Source(*parts)


def _checkpoint(directory: Path) -> Source:
    """A Hugging Face directory, in float32, by the class its config names; local files, no code from it."""
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            f"a checkpoint needs the package transformers: {error}",
            where=f"MODEL {str(directory)!r}",
            fix="pip install 'paretoc[transformers]'",
        ) from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()

    def read() -> tuple[Any, dict[str, Any]]:
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(directory, **local)
        architecture = (config.architectures or ["AutoModel"])[0]
        cls = getattr(transformers, architecture, transformers.AutoModel)
        read: tuple[Any, dict[str, Any]] = cls.from_pretrained(
            directory, dtype="float32", output_loading_info=True, **local
        )
        return read

    model, information = _attempt("loading the checkpoint", str(directory), read)
    missing = sorted(information["missing_keys"])
    if missing:
        note(f"{len(missing)} weights are not in the checkpoint and are random, the first is {missing[0]!r}")
    return Source(model.eval(), checkpoint=True)


def _attempt(what: str, name: str, action: Callable[[], Any]) -> Any:
    """Run code that is not ours, so that what goes wrong there is told in three lines."""
    try:
        return action()
    except ParetocError:
        raise
    except Exception as error:
        raise OptionError(
            f"{what} failed: {_reason(error)}",
            where=f"MODEL {name!r}",
            fix="correct it there; --debug shows the traceback",
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


# -- inputs: made up, or read from files ---------------------------------------------------------------------


def made_up_inputs(model: Any, name: str) -> dict[str, Tensor]:
    """Random inputs of the shapes that a transformers config states."""
    import torch

    from .program import forward_parameters

    taken, config = forward_parameters(model), model.config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    if "pixel_values" in taken and (model.main_input_name == "pixel_values" or hasattr(model, "get_text_features")):
        inputs["pixel_values"] = torch.randn(_image_shape(config), generator=generator)
    if model.main_input_name == "input_features":
        shape = (_SAMPLES, config.num_mel_bins, 2 * config.max_source_positions)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "")):
        if ids in taken:
            inputs[ids] = _token_ids(config.get_text_config(), generator)
        if ids in taken and mask in taken:
            inputs[mask] = torch.ones_like(inputs[ids])
    if not inputs:
        raise OptionError(
            f"no inputs can be made up for {type(model).__name__}, which takes {model.main_input_name!r}",
            where=f"MODEL {name!r}",
            fix="give --example FILE",
        )
    return inputs


def _image_shape(config: Any) -> tuple[int, ...]:
    """`[B, C, height, width]`; 224 where the config leaves the size open."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return _SAMPLES, getattr(vision, "num_channels", 3), height, width


def _token_ids(config: Any, generator: Any) -> Tensor:
    """`[B, T]` from the whole vocabulary. Half the positions at most: some models offset them."""
    import torch

    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    tokens = min([_TOKENS, *(limit // 2 for limit in limits if limit)])
    return torch.randint(config.vocab_size, (_SAMPLES, tokens), generator=generator)


def read_arrays(file: Path) -> dict[str, Tensor]:
    """The named arrays of a .npz or .safetensors file; neither executes anything when read."""
    import torch
    from safetensors.numpy import load_file

    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {".npz": _npz, ".safetensors": load_file}
    if file.suffix not in readers:
        raise OptionError(
            f"{str(file)!r} is neither .npz nor .safetensors",
            where="--example/--calibration",
            fix="write it with numpy.savez or safetensors",
        )
    try:
        arrays = {name: torch.from_numpy(array.copy()) for name, array in readers[file.suffix](file).items()}
    except Exception as error:  # each library has its own, down to zipfile and struct
        raise OptionError(
            f"{str(file)!r} cannot be read: {_reason(error)}",
            where="--example/--calibration",
            fix="write named arrays of numbers with numpy.savez or safetensors",
        ) from error
    return {name: array.float() if array.dtype is torch.float64 else array for name, array in arrays.items()}


def _npz(file: Path) -> dict[str, Any]:
    import numpy

    with file.open("rb") as stream, numpy.load(stream, allow_pickle=False) as arrays:
        return dict(arrays)


def as_inputs(arrays: dict[str, Tensor]) -> Any:
    """Keyword inputs; positional ones for the names that `numpy.savez` gives to arrays without a name."""
    unnamed = [f"arr_{index}" for index in range(len(arrays))]
    return tuple(arrays[name] for name in unnamed) if sorted(arrays) == sorted(unnamed) else arrays


def read_batches(file: Path) -> list[Any]:
    """Every array cut along its first axis."""
    arrays = read_arrays(file)
    lengths = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise CalibrationError(
            f"the arrays do not hold the same number of samples: {shapes(arrays) or 'there is none'}",
            where=f"--calibration {str(file)!r}",
            fix="give arrays whose first axes have one length, at least one sample",
        )
    starts = range(0, lengths.pop(), BATCH)
    return [as_inputs({name: array[start : start + BATCH] for name, array in arrays.items()}) for start in starts]


# -- what is said about them ----------------------------------------------------------------------------------


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def shapes(tensors: Mapping[str, Tensor]) -> str:
    shown = (f"{n} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for n, t in tensors.items())
    return ", ".join(shown)
