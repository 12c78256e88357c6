"""The command line: `paretoc compile | explain | bench | axes | plugins`. Heavy libraries load when a verb runs."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import platform
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError, OptionError, ParetocError
from .source import BATCH, Source, as_inputs, made_up_inputs, note, read_arrays, read_batches, read_source, shapes

if TYPE_CHECKING:
    from torch import Tensor

    from .artifact import LoadedModel
    from .cost import Latency
    from .driver import CompiledModel

Calls = dict[str, Callable[[], object]]
#: the times of calls → a warning, or ""
Warned = Callable[[Mapping[str, "Latency"]], str]

_TARGET = "onnxruntime"

_MODEL_HELP = (
    "module:callable, which returns the model, (model, example) or (model, example, calibration); "
    "or a Hugging Face directory"
)
_ARRAYS_HELP = "a .npz or .safetensors file whose arrays are named like the model's inputs (float64 becomes float32)"


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
    _axes_verb(verbs)
    _verb(verbs, "plugins", _plugins, "list the installed plugins and what they offer")
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _compile_verb(verbs: Any) -> None:
    parser = _verb(verbs, "compile", _compile, "compile a model, print the report and save the artifact")
    _model_arguments(parser, _MODEL_HELP, required=True)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="where the artifact goes")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the report, latencies included, as a page")


def _explain_verb(verbs: Any) -> None:
    parser = _verb(verbs, "explain", _explain, "show, per site, its encoding and the kernel that runs it")
    _model_arguments(parser, f"{_MODEL_HELP}, or a saved artifact")


def _bench_verb(verbs: Any) -> None:
    parser = _verb(verbs, "bench", _bench, "measure latency, compiled against uncompressed and PyTorch, interleaved")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the target's kernels here and keep that for later choices"
    )
    _model_arguments(parser, f"{_MODEL_HELP}, or a saved artifact", optional=True)
    parser.add_argument("--runs", type=_positive, default=20, help="timed calls of each contender (20)")
    parser.add_argument("--threads", type=_positive, help="threads of PyTorch and of the backend")


def _axes_verb(verbs: Any) -> None:
    parser = _verb(verbs, "axes", _axes, "list the axes of a model and what may be done to each; draw one")
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--example", metavar="FILE", type=Path, help=f"example inputs: {_ARRAYS_HELP}")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw one axis on its way through the model")
    parser.add_argument("--axis", metavar="N", type=int, help="its number in the table (the one in most parameters)")


def _model_arguments(
    parser: argparse.ArgumentParser, text: str, *, required: bool = False, optional: bool = False
) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?" if optional else None, help=text)
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
        help=f"calibration data, cut into batches of {BATCH}: {_ARRAYS_HELP}",
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
    files = [f"{file.name} {quantity(file.stat().st_size, 'B')}" for file in sorted(Path(arguments.output).iterdir())]
    print(f"saved in {arguments.output}: {', '.join(files)}")


def _explain(arguments: argparse.Namespace) -> None:
    artifact = _artifact(arguments)
    _show((artifact or _compiled(arguments)).explain())


def _bench(arguments: argparse.Namespace) -> None:
    import torch

    from .cost import measure

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.calibrate:
        _calibrate(arguments.target or _TARGET)
        return
    if arguments.model is None:
        raise OptionError("bench was given no model", where="the command line", fix="name one, or use --calibrate")
    artifact = _artifact(arguments)
    calls, inputs, slower = _artifact_call(artifact, arguments) if artifact else _contenders(_compiled(arguments))
    times = measure(calls, runs=arguments.runs, budget_s=float("inf"))
    *others, _ = times
    table = _table("contender", "median ms", "minimum ms", *(f"vs {other}" for other in others))
    for name, time in times.items():
        ratios = (f"{times[other].median / time.median:.3g}×" for other in others)
        table.add_row(name, f"{time.median:.3f}", f"{time.minimum:.3f}", *ratios)
    _show(table)
    print(f"runs: {arguments.runs}, interleaved; threads: {torch.get_num_threads()}; on {_processor()}")
    print(f"inputs: {shapes(inputs)}")
    if warning := slower(times):
        print(f"warning: {warning}")


def _calibrate(target: str) -> None:
    from .backend import Calibrated
    from .registry import registry

    backend = registry().backend(target)
    if not isinstance(backend, Calibrated):
        raise OptionError(
            f"target {target} has nothing to calibrate", where="bench --calibrate", fix="use --target onnxruntime"
        )
    measured = backend.calibrate()
    first = next(iter(measured.speeds.values()))
    table = _table("kernel", *(f"× fp32, {shape}" for shape in first))
    for kernel, speeds in measured.speeds.items():
        table.add_row(kernel, *(f"{speed:.3g}" for speed in speeds.values()))
    _show(table)
    print(f"kept in {measured.kept}; compilations on this machine choose by it")


def _axes(arguments: argparse.Namespace) -> None:
    from .axes import find_axes
    from .axis_drawing import picture, pictured, rows
    from .canonical import canonicalize
    from .capture import capture

    source = read_source(arguments.model)
    given = as_inputs(read_arrays(arguments.example)) if arguments.example else None
    example = _example(source, arguments.model, has_data=False) if given is None else given
    program = capture(source.model, example)
    canonicalize(program)
    axes = find_axes(program)
    chosen = pictured(axes, arguments.axis) if arguments.svg else None
    table = _table("axis", "size", "parameters × dimension", "free for", "forbidden by")
    for row in rows(axes):
        table.add_row(*row)
    _show(table)
    print(f"{100 * axes.coverage():.1f} % of the weights lie on an axis that may be permuted")
    if chosen is not None:
        arguments.svg.write_text(picture(axes, chosen), encoding="utf-8")
        print(f"drawn in {arguments.svg}: {chosen}")


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
    example = as_inputs(read_arrays(arguments.example)) if arguments.example else None
    calibration = read_batches(arguments.calibration) if arguments.calibration else None
    source = read_source(arguments.model)
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
    inputs = made_up_inputs(source.model, name)
    note(f"the inputs are made up: {shapes(inputs)}")
    note("fidelity on real data needs --calibration or --example")
    return inputs


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


def _contenders(compiled: CompiledModel) -> tuple[Calls, dict[str, Tensor], Warned]:
    """What `bench` times, the inputs it is timed with, and what the times warn of."""
    from .report import contenders, original_executable
    from .slower import measured_slower

    done = compiled._compiled()
    original = original_executable(done)
    calls = contenders(done, original)
    named: Calls = {
        "PyTorch eager": calls["pytorch"],
        "uncompressed": calls["original"],
        "compiled": calls["compiled"],
    }
    inputs = dict(zip(done.program.interface.inputs, done.original.example, strict=True))

    def slower(times: Mapping[str, Latency]) -> str:
        return measured_slower(times["compiled"], times["uncompressed"], done.executable, original)

    return named, inputs, slower


def _artifact_call(artifact: LoadedModel, arguments: argparse.Namespace) -> tuple[Calls, dict[str, Tensor], Warned]:
    """An artifact stores the shapes it was captured with, not the inputs: it runs on ones."""
    import torch

    from .capture import as_call

    if arguments.example:
        inputs = artifact.interface.flatten(*as_call(as_inputs(read_arrays(arguments.example))))
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
    return {"artifact": lambda: artifact.executable.run(inputs)}, named, lambda times: ""


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


def _processor() -> str:
    """The processor's name, for the caption of a measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
