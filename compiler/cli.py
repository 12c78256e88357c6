"""The command line: `paretoc compile | explain | bench | plugins`. Heavy libraries load when a verb runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, CalibrationError, OptionError, ParetocError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from .artifact import LoadedModel
    from .driver import CompiledModel

Calls = dict[str, Callable[[], object]]

_TARGET = "onnxruntime"
#: samples in one batch of a --calibration file
_BATCH = 8
#: the inputs made up for a checkpoint: samples, and at most so many tokens
_SAMPLES, _TOKENS = 2, 64

_MODEL_HELP = (
    "module:callable, which returns the model, (model, example) or (model, example, calibration); "
    "or a Hugging Face directory"
)
_ARRAYS_HELP = (
    "a .npz or .safetensors file whose arrays are named like the model's inputs (float64 becomes float32)"
)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. 0: done; 2: a ParetocError, told in three lines on stderr."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "→" on an ASCII terminal is no reason to stop
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments.run(arguments)
            sys.stdout.flush()
        except ParetocError as error:
            if arguments.debug:
                raise
            # built anew: torch.fx adds lines of its own to the message of whatever passes through it
            print(f"error: {type(error)(error.what, where=error.where, fix=error.fix)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


# -- what may be written -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paretoc", description="Turn a trained model into a smaller and faster one, and prove it."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("paretoc"))
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _compile_verb(verbs)
    _explain_verb(verbs)
    _bench_verb(verbs)
    _verb(verbs, "plugins", _plugins, "list the installed plugins and what they offer")
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _compile_verb(verbs: Any) -> None:
    parser = _verb(verbs, "compile", _compile, "compile a model, print the report and save the artifact")
    _model_arguments(parser, _MODEL_HELP, required=True)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="where the artifact goes")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write the report, latencies included, as a page"
    )


def _explain_verb(verbs: Any) -> None:
    parser = _verb(verbs, "explain", _explain, "show, per site, its encoding and the kernel that runs it")
    _model_arguments(parser, f"{_MODEL_HELP}, or a saved artifact")


def _bench_verb(verbs: Any) -> None:
    parser = _verb(
        verbs, "bench", _bench, "measure latency, compiled against uncompressed and PyTorch, interleaved"
    )
    _model_arguments(parser, f"{_MODEL_HELP}, or a saved artifact")
    parser.add_argument("--runs", type=_positive, default=20, help="timed calls of each contender (20)")
    parser.add_argument("--threads", type=_positive, help="threads of PyTorch and of the backend")


def _model_arguments(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument(
        "--passes",
        metavar="PASS",
        nargs="+",
        default=[],
        required=required,
        help="quantize:W8A8 …, or a YAML recipe",
    )
    parser.add_argument("--example", metavar="FILE", type=Path, help=f"example inputs: {_ARRAYS_HELP}")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help=f"calibration data, cut into batches of {_BATCH}: {_ARRAYS_HELP}",
    )
    parser.add_argument("--target", help=f"the backend ({_TARGET})")
    parser.add_argument("--seed", type=int, default=0, help="for everything random (0)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


# -- the verbs -----------------------------------------------------------------------------------------------


def _compile(arguments: argparse.Namespace) -> None:
    from .artifact import check_output
    from .report import quantity

    check_output(arguments.output)
    compiled = _compiled(arguments)
    # saved before latencies are measured: the same call gives the same bytes
    compiled.save(arguments.output)
    report = compiled.report()
    _show(report)
    if arguments.html:
        report.to_html(arguments.html)
    files = [
        f"{file.name} {quantity(file.stat().st_size, 'B')}"
        for file in sorted(Path(arguments.output).iterdir())
    ]
    print(f"saved in {arguments.output}: {', '.join(files)}")


def _explain(arguments: argparse.Namespace) -> None:
    artifact = _artifact(arguments)
    _show((artifact or _compiled(arguments)).explain())


def _bench(arguments: argparse.Namespace) -> None:
    import torch

    from .cost import measure

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    artifact = _artifact(arguments)
    calls, inputs = _artifact_call(artifact, arguments) if artifact else _contenders(_compiled(arguments))
    times = measure(calls, runs=arguments.runs, budget_s=float("inf"))
    *others, _ = times
    table = _table("contender", "median ms", "minimum ms", *(f"vs {other}" for other in others))
    for name, time in times.items():
        ratios = (f"{times[other].median / time.median:.3g}×" for other in others)
        table.add_row(name, f"{time.median:.3f}", f"{time.minimum:.3f}", *ratios)
    _show(table)
    print(f"runs: {arguments.runs}, interleaved; threads: {torch.get_num_threads()}; on {_processor()}")
    print(f"inputs: {_shapes(inputs)}")


def _plugins(arguments: argparse.Namespace) -> None:
    from .registry import registry

    known = registry()
    plugins = _table("plugin", "distribution", "state")
    for plugin in known.plugins:
        plugins.add_row(plugin.name, plugin.distribution, plugin.problem or "ok")
    offers = _table("kind", "name", "what it is")
    kinds: dict[str, Mapping[str, Any]] = {
        "pass": known.passes,
        "encoding": known.encodings,
        "fitter": known.fitters,
        "token rule": known.token_rules,
        "target": known.backends,
    }
    for kind, members in kinds.items():
        for name, member in sorted(members.items()):
            offers.add_row(kind, name, _first_line(member))
    _show(plugins)
    print()
    _show(offers)


def _first_line(member: Any) -> str:
    """The first docstring line; "" for none, and for the signature that a dataclass writes in its place."""
    kind = member if isinstance(member, type) else type(member)
    lines = (kind.__doc__ or "").strip().splitlines()
    return lines[0] if lines and not lines[0].startswith(f"{kind.__name__}(") else ""


# -- compiling and timing ------------------------------------------------------------------------------------


def _compiled(arguments: argparse.Namespace) -> CompiledModel:
    """MODEL, compiled as asked; what can be checked without loading it comes first."""
    from .driver import compile as compile_model
    from .recipe import parse_passes
    from .registry import registry

    passes, target = parse_passes(arguments.passes), arguments.target or _TARGET
    registry().backend(target)
    example = _inputs(_arrays(arguments.example)) if arguments.example else None
    calibration = _batches(arguments.calibration) if arguments.calibration else None
    source = _source(arguments.model)
    if calibration is None:
        calibration = source.calibration
    if example is None:
        example = _example(source, arguments.model, has_data=calibration is not None)
    return compile_model(
        source.model,
        passes,
        example_inputs=example,
        calibration=calibration,
        target=target,
        seed=arguments.seed,
    )


def _example(source: Source, name: str, *, has_data: bool) -> Any:
    """The source's own inputs; None where the compiler finds some in the data or in the model itself."""
    if source.example is not None or has_data or hasattr(source.model, "example_inputs"):
        return source.example
    if not source.checkpoint:
        raise OptionError(
            "there are no example inputs to capture the model with",
            where=f"MODEL {name!r}",
            fix="return (model, example_inputs) from the callable, or give --example FILE",
        )
    inputs = _made_up_inputs(source.model, name)
    _note(f"the inputs are made up: {_shapes(inputs)}")
    _note("fidelity on real data needs --calibration or --example")
    return inputs


def _contenders(compiled: CompiledModel) -> tuple[Calls, dict[str, Tensor]]:
    """What `bench` times, and the inputs it is timed with."""
    from .report import contenders

    done = compiled._compiled()
    calls = contenders(done)
    named: Calls = {
        "PyTorch eager": calls["pytorch"],
        "uncompressed": calls["original"],
        "compiled": calls["compiled"],
    }
    return named, dict(zip(done.program.interface.inputs, done.original.example, strict=True))


def _artifact_call(artifact: LoadedModel, arguments: argparse.Namespace) -> tuple[Calls, dict[str, Tensor]]:
    """An artifact stores the shapes it was captured with, not the inputs: it runs on ones."""
    import torch

    from .capture import as_call

    if arguments.example:
        inputs = artifact.interface.flatten(*as_call(_inputs(_arrays(arguments.example))))
    elif "inputs" in artifact.manifest["settings"]:
        stored = artifact.manifest["settings"]["inputs"]
        inputs = [torch.ones(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in stored]
    else:
        raise ArtifactError(
            "the artifact does not say what its inputs look like",
            where=arguments.model,
            fix="give --example FILE",
        )
    named = dict(zip(artifact.interface.inputs, inputs, strict=True))
    return {"artifact": lambda: artifact.executable.run(inputs)}, named


# -- MODEL: a callable, a checkpoint, an artifact ------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A model with what came with it. `checkpoint`: it has a config that example inputs can be made from."""

    model: Any
    example: Any = None
    calibration: Any = None
    checkpoint: bool = False


def _source(name: str) -> Source:
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


def _artifact(arguments: argparse.Namespace) -> LoadedModel | None:
    """The saved artifact that MODEL names, or None when it names something else."""
    if not (Path(arguments.model) / "manifest.json").is_file():
        return None
    from .artifact import load

    given = [option for option in ("passes", "calibration", "target") if getattr(arguments, option)]
    if given:
        raise OptionError(
            f"--{given[0]} does not apply to {arguments.model!r}, which is compiled already",
            where="MODEL",
            fix=f"leave --{given[0]} out, or give the original model",
        )
    return load(arguments.model)


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
        _note(f"{len(missing)} weights are not in the checkpoint and are random, the first is {missing[0]!r}")
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


def _made_up_inputs(model: Any, name: str) -> dict[str, Tensor]:
    """Random inputs of the shapes that a transformers config states."""
    import torch

    from .program import forward_parameters

    taken, config = forward_parameters(model), model.config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    if "pixel_values" in taken and (
        model.main_input_name == "pixel_values" or hasattr(model, "get_text_features")
    ):
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


def _arrays(file: Path) -> dict[str, Tensor]:
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


def _inputs(arrays: dict[str, Tensor]) -> Any:
    """Keyword inputs; positional ones for the names that `numpy.savez` gives to arrays without a name."""
    unnamed = [f"arr_{index}" for index in range(len(arrays))]
    return tuple(arrays[name] for name in unnamed) if sorted(arrays) == sorted(unnamed) else arrays


def _batches(file: Path) -> list[Any]:
    """Every array cut along its first axis."""
    arrays = _arrays(file)
    lengths = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise CalibrationError(
            f"the arrays do not hold the same number of samples: {_shapes(arrays) or 'there is none'}",
            where=f"--calibration {str(file)!r}",
            fix="give arrays whose first axes have one length, at least one sample",
        )
    starts = range(0, lengths.pop(), _BATCH)
    return [
        _inputs({name: array[start : start + _BATCH] for name, array in arrays.items()}) for start in starts
    ]


# -- what is shown -------------------------------------------------------------------------------------------


def _show(value: Any) -> None:
    """Colours and lines on a terminal; plain text, one row a line, when piped."""
    from rich.console import Console, ConsoleRenderable
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal and isinstance(value, ConsoleRenderable):
        console.print(value)
    elif isinstance(value, Table):
        value.box, value.pad_edge, console.width = None, False, 1000
        console.print(value)
    else:
        print(value)


def _table(*headings: str) -> Any:
    from rich.table import Table

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    shown = (f"{n} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for n, t in tensors.items())
    return ", ".join(shown)


def _processor() -> str:
    """The processor's name, for the caption of a measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
