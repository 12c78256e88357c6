"""`compile(model, passes)`: capture → combine → canonicalise → passes, each checked → lower. Readable top to bottom."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import torch

from . import schedule, verify
from .artifact import Member, member_name, save_artifact, save_members
from .backend import Backend, Executable, Explanation, Sharing, prepares
from .calibrate import FlatBatch, gather, read_batches
from .capture import Model, as_call, capture
from .cost import Cost, cost
from .errors import CalibrationError, OptionError, ParetocError, PassError, PluginError
from .generate import Generator
from .passes import Context, Pass, PassResult, Phase
from .plain import PlainModule
from .program import Interface, Program
from .recipe import PassLike, parse_passes
from .registry import registry
from .report import Report, build_report

#: batches on which fidelity is measured
_FIDELITY_BATCHES = 8


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `compile`, checked."""

    example_inputs: Any = None
    dynamic_shapes: Any = None
    calibration: Any = None
    target: str = "onnxruntime"
    metric: Callable[[Any], float] | None = None
    seed: int = 0
    verify: bool = True
    progress: bool | None = None
    executor: Executor | None = None


@dataclass(frozen=True)
class PassRecord:
    """One pass in the report: what it did, the cost after it, the distance to the original after it."""

    name: str
    text: str
    options: dict[str, Any]
    result: PassResult
    cost: Cost
    fidelity: verify.Fidelity | None


@dataclass
class Compilation:
    """Everything `compile` produced: the two programs, what each pass did, and the executable."""

    original: Program
    program: Program
    records: list[PassRecord]
    executable: Executable
    batches: list[FlatBatch]
    data: str
    options: Options
    fidelity: verify.Fidelity | None = None


@dataclass
class CompiledModel(Generator):
    """A drop-in replacement for the model it was compiled from: same call, same output containers.

    Without example inputs the capture, and so every error about the model, waits for the first call.
    """

    _model: Any
    _passes: list[Pass]
    _options: Options
    _done: Compilation | None = field(default=None, repr=False)
    _report: Report | None = field(default=None, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        done = self._compiled((args, kwargs))
        inputs = done.program.interface.flatten(args, kwargs)
        return done.program.interface.unflatten(done.executable.run(inputs))

    def _runs(self) -> tuple[Interface, Executable]:
        return self.program.interface, self._compiled().executable

    def _compiled(self, call: tuple[Any, Any] | None = None) -> Compilation:
        if self._done is None:
            example = self._options.example_inputs if call is None or self._options.example_inputs is not None else call
            if example is None and not hasattr(self._model, "example_inputs"):
                raise OptionError(
                    "the model is not captured yet",
                    where="compile(…) was given neither example_inputs nor calibration",
                    fix="call the compiled model once, or pass example_inputs=",
                )
            self._done = _compile(self._model, self._passes, self._options, example)
            self._model = None
        return self._done

    @property
    def program(self) -> Program:
        """The rewritten program."""
        return self._compiled().program

    @property
    def original(self) -> Program:
        """The program as captured, before any pass."""
        return self._compiled().original

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors of the rewritten program, a plain dict under the names of the original model."""
        return self.program.state_dict()

    def module(self) -> torch.nn.Module:
        """The rewritten program as ordinary PyTorch, with parameters to train; may be compiled again."""
        return PlainModule(self.program)

    def report(self, *, latency: bool = True) -> Report:
        """Per pass and in total: bytes, MACs, parameters, tokens, fidelity; and latency, measured now, interleaved."""
        if self._report is None or (latency and not self._report.latency):
            self._report = build_report(self._compiled(), latency=latency)
        return self._report

    def explain(self) -> Explanation:
        """Per site: the encoding it got and the kernel that really runs it."""
        done = self._compiled()
        return Explanation(done.options.target, done.executable.explain())

    def save(self, directory: Any) -> None:
        """Write model.onnx, weights.safetensors, manifest.json and report.html, all or nothing."""
        save_artifact(directory, self._member())

    def export_onnx(self, path: Any) -> None:
        """Write one self-contained ONNX file."""
        from .artifact import export_file

        export_file(path, self._compiled().executable)

    def _member(self) -> Member:
        done = self._compiled()
        facts = {
            "target": done.options.target,
            "seed": done.options.seed,
            "passes": [r.text for r in done.records],
            "encodings": {n: str(e) for n, e in verify.encodings_by_weight(done.program).items() if e is not None},
        }
        report = build_report(done, latency=False)  # measured times would make equal artifacts differ
        return Member(done.executable, done.program, facts, report)


def save(models: Mapping[Any, CompiledModel], directory: Any) -> None:
    """Write several compiled models, by name or number, as one artifact: a graph each, and what they share once.

    A weight that is the beginning of another along one axis, as in the narrower of two nested models, is a range of
    that one's bytes. `load(directory, name)` reads one of them. Raises OptionError for a target that cannot do so.
    """
    members = {member_name(name): model._member() for name, model in models.items()}
    targets = {member.facts["target"] for member in members.values()}
    backend = registry().backend(next(iter(targets), ""))
    if len(targets) > 1 or not isinstance(backend, Sharing):
        raise OptionError(
            f"models for {' and '.join(sorted(targets))} cannot share one artifact",
            where="save",
            fix="compile all of them for one target: onnxruntime, onnx or eager",
        )
    save_members(directory, members, backend)


def compile(
    model: Model,
    passes: PassLike | Sequence[PassLike] = (),
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    target: str = "onnxruntime",
    tune: Any = None,
    metric: Callable[[Any], float] | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: bool | None = None,
    executor: Executor | None = None,
) -> CompiledModel:
    """Turn a trained model into a smaller, faster one that is called in the same way.

    `passes`: objects, text ("quantize:W4A16,group_size=32"), dicts, or a YAML recipe. `example_inputs`: a tensor, a
    tuple, a dict of keywords; taken from `calibration`, or from the first call, when absent. `calibration`: batches
    for passes that need data. `metric(model) -> float` is evaluated on the original and the compiled model for the
    report. `executor`: any `concurrent.futures.Executor` for the work that is parallel over weights. `progress`:
    None shows a bar on a terminal. Raises ParetocError, in three lines, for everything that cannot be done.
    """
    chosen = parse_passes(passes)
    schedule.check(chosen)
    registry().backend(target)
    if tune is not None:
        raise OptionError(
            "tune= is not supported yet",
            where="compile",
            fix="fine-tune the model before compiling it, and leave tune out",
        )
    if calibration is not None and hasattr(calibration, "__next__"):
        calibration = list(calibration)
    if example_inputs is None and calibration is not None and not isinstance(model, torch.export.ExportedProgram):
        example_inputs = _first_batch(model, calibration)
    options = Options(example_inputs, dynamic_shapes, calibration, target, metric, seed, verify, progress, executor)
    compiled = CompiledModel(model, chosen, options)
    if example_inputs is not None or hasattr(model, "example_inputs"):
        compiled._compiled()
    return compiled


def _first_batch(model: Any, calibration: Any) -> Any:
    if callable(calibration) and not isinstance(calibration, Iterable):
        seen: list[Any] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            with torch.no_grad():
                return model(*args, **kwargs)

        calibration(stand_in)
        return seen[0] if seen else None
    if not isinstance(calibration, Iterable) or isinstance(calibration, (torch.Tensor, Mapping)):
        return None
    first = next(iter(calibration), None)
    if first is None:
        raise CalibrationError(
            "the calibration data is empty",
            where="calibration=",
            fix="pass at least one batch; a generator that was already used up is empty too",
        )
    return _without_label(model, first) if isinstance(first, (tuple, list)) else first


def _without_label(model: Any, batch: Sequence[Any]) -> Any:
    """Of a labelled batch `(x, y)` what `forward` takes by position; `read_batches` reads the others likewise."""
    args, kwargs = as_call(batch)
    if isinstance(model, torch.nn.Module):
        kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            args = args[: sum(k <= inspect.Parameter.POSITIONAL_OR_KEYWORD for k in kinds)]
    return args, kwargs


def _compile(model: Any, passes: list[Pass], options: Options, example: Any) -> Compilation:
    with torch.random.fork_rng(), Progress(options.progress) as progress:
        torch.manual_seed(options.seed)
        original = capture(model, example, options.dynamic_shapes)
        batches, data = _batches(original, options)
        backend = registry().backend(options.target)
        program, records, reference = original.clone(), [], None
        for step, wanted in _prepared(_with_canonicalize(passes), backend):
            before = program
            if step.phase is Phase.QUANTIZE and reference is None:
                reference = before
            try:
                program, result = _apply(step, program, batches, options, progress, reference)
            except PassError as refused:
                if wanted or refused.__cause__ is not None:  # asked for, or broken
                    raise
                continue
            if options.verify:
                verify.check(before, program, step.name)
            where = f"pass {step.name!r}"
            distance = (
                verify.measure(original, program, batches[:_FIDELITY_BATCHES], data, where) if options.verify else None
            )
            records.append(PassRecord(step.name, step.describe(), step.options(), result, cost(program), distance))
        executable = backend.lower(program, {"seed": options.seed})
    last = records[-1].fidelity if records else None
    return Compilation(original, program, records, executable, batches, data, options, last)


def _with_canonicalize(passes: list[Pass]) -> list[Pass]:
    """Every compile canonicalises once: after models are combined, before anything else."""
    if any(p.phase is Phase.CANONICALIZE for p in passes):
        return passes
    combining = [p for p in passes if p.phase < Phase.CANONICALIZE]
    return [*combining, registry().pass_class("canonicalize")(), *(p for p in passes if p not in combining)]


def _prepared(passes: list[Pass], backend: Backend) -> list[tuple[Pass, bool]]:
    """The passes, and whether the user wants each. Before weights are rounded come those that the backend's kernels
    like and that change nothing by themselves, where they apply and conflict with nothing."""
    place = next((i for i, p in enumerate(passes) if p.phase >= Phase.TRANSFORM), len(passes))
    steps = [(p, True) for p in passes]
    if not any(p.phase is Phase.QUANTIZE for p in passes):
        return steps
    for name in prepares(backend):
        added = registry().pass_class(name)()
        clear = not any(p.name == name or name in p.conflicts or p.name in added.conflicts for p in passes)
        steps[place:place] = [(added, False)] if clear else []
    return steps


def _batches(program: Program, options: Options) -> tuple[list[FlatBatch], str]:
    if options.calibration is None:
        return [program.users_example()], "the example inputs"
    batches = read_batches(program, options.calibration)
    return batches, "the calibration data"


def _apply(
    step: Pass,
    program: Program,
    batches: list[FlatBatch],
    options: Options,
    progress: Progress,
    reference: Program | None,
) -> tuple[Program, PassResult]:
    hook = registry().manager.hook
    program = program.clone()
    statistics = step.needs(program)
    if step.needs_calibration and options.calibration is None:
        raise CalibrationError(
            f"the pass {step.describe()!r} needs calibration data",
            where=f"pass {step.name!r}",
            fix="pass calibration=[batch, …] to compile, or use a data-free scheme such as quantize:W8A8-dynamic",
        )
    gathered = gather(program, statistics, batches, progress.track)
    workers = options.executor
    context = Context(
        gathered, options.seed, options.target, workers, progress.track, batches, reference, options.metric
    )
    _observe(hook.before_pass, transform=step, program=program)
    try:
        result = step.apply(program, context)
    except ParetocError:
        raise
    except Exception as error:
        raise PassError(
            f"{type(error).__name__}: {error}",
            where=f"pass {step.describe()!r}",
            fix="this is a bug in the pass; report it to its author with the traceback above",
        ) from error
    _observe(hook.after_pass, transform=step, program=program, result=result)
    return program, result


def _observe(hook: Callable[..., Any], **facts: Any) -> None:
    """Tell the plugins that watch; one that fails is an error of that plugin."""
    try:
        hook(**facts)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"a plugin that watches the compilation raised {type(error).__name__}: {error}",
            where=f"{frame.filename}:{frame.lineno} in {frame.name}",
            fix="report it to the plugin's author, or disable it: PARETOC_PLUGINS=-NAME",
        ) from error


class Progress:
    """A `rich` progress bar on a terminal; silent when piped, or when told so."""

    def __init__(self, wanted: bool | None) -> None:
        self.shown = sys.stderr.isatty() if wanted is None else wanted
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def track(self, items: Iterable[Any], label: str) -> Iterable[Any]:
        if self.bar is None:
            return items
        return self.bar.track(items, description=label)  # type: ignore[no-any-return]
