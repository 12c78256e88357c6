"""The contract of a pass, one rule a function; `paretoc.testing.check_pass` runs them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .calibrate import Observer, gather, read_batches
from .capture import as_call, capture
from .conformance import require, require_frozen, same
from .driver import compile
from .errors import ConformanceError, OptionError, ParetocError
from .passes import Context, Pass, PassResult, Phase, SitePass, build_pass
from .program import Program, example_shape
from .recipe import parse_passes
from .registry import registry
from .sites import weight_sites
from .verify import check as verify_interface


def described(transform: Pass) -> str:
    return f"pass {getattr(transform, 'name', '') or type(transform).__name__!r}"


# -- of the object itself -----------------------------------------------------------------------------------


def pass_is_frozen(transform: Pass) -> None:
    """A pass is a frozen dataclass of hashable options, derived from Pass."""
    require(
        isinstance(transform, Pass),
        f"{type(transform).__name__} is not a Pass",
        "derive it from paretoc.Pass",
    )
    require_frozen(transform)


def pass_has_a_name(transform: Pass) -> None:
    """`name` can be written in the text form: small letters, digits and underscores."""
    good = isinstance(transform.name, str) and re.fullmatch("[a-z][a-z0-9_]*", transform.name)
    require(good, f"{transform.name!r} is not a name for a pass", 'set name: ClassVar[str] = "my_pass"')


def pass_has_a_place(transform: Pass) -> None:
    """`phase` is a Phase; `after`, `before`, `conflicts` are tuples of names; `positional` is an option."""
    require(isinstance(transform.phase, Phase), f"phase is {transform.phase!r}", "use one of paretoc.Phase")
    for rule in ("after", "before", "conflicts"):
        value = getattr(transform, rule)
        require(isinstance(value, tuple), f"{rule} is {value!r}", f'write a tuple: {rule} = ("quantize",)')
    require(
        transform.positional is None or transform.positional in transform.options(),
        f"positional is {transform.positional!r}, the options are {list(transform.options())}",
        "name one of the options, or None",
    )


def pass_takes_its_positional_first(transform: Pass) -> None:
    """The bare value of the text form is the first argument of the class: "quantize:W8A8", `Quantize("W8A8")`."""
    first = next((item.name for item in dataclasses.fields(transform) if not item.kw_only), None)
    require(
        transform.positional in (None, first),
        f"the bare value of the text form sets {transform.positional!r}, the first argument sets {first!r}",
        "declare that option first, or the others as field(kw_only=True)",
    )


def pass_is_registered(transform: Pass) -> None:
    """A plugin offers the class, so that it can be used by name."""
    require(
        registry().passes.get(transform.name) is type(transform),
        f"no plugin offers a pass {transform.name!r}",
        "return the class from the hook paretoc_passes, and install the distribution",
    )


def pass_text_reads_back(transform: Pass) -> None:
    """`describe()` and `options()` build the same pass again, where all options are plain values."""
    if not all(_is_plain(value) for value in transform.options().values()):
        return
    for form in (transform.describe(), {transform.name: transform.options()}):
        built = parse_passes(form)
        require(
            built == [transform],
            f"{form!r} builds {built[0]!r}",
            "let options have the types of their annotations; normalise them in __post_init__",
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def pass_refuses_unknown_options(transform: Pass) -> None:
    """A misspelt option is an OptionError, never silently taken."""
    try:
        build_pass(type(transform), {**transform.options(), "no_such_option": 1})
    except OptionError:
        return
    raise ConformanceError("it takes an option 'no_such_option'", fix="declare options as fields of the dataclass")


# -- the default models -------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """x `[B, 128]` → three linears; returns a dict of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.head = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.middle(torch.relu(self.up(x)))
        return {"features": features, "logits": self.head(torch.relu(features))}


class Layer(nn.Module):
    """One transformer layer: pre-norm, two heads, fused attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        hidden: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return hidden


class VisionTransformer(nn.Module):
    """Images `[B, 3, 16, 16]` → 16 patches and a class token of width 32 → two layers → logits `[B, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.layers = nn.Sequential(Layer(32), Layer(32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.layers(x))[:, 0])
        return logits


def default_models() -> list[tuple[str, nn.Module, Any]]:
    """Name, model, example inputs; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models: list[tuple[nn.Module, Any]] = [
            (Perceptron().eval(), torch.randn(4, 128)),
            (VisionTransformer().eval(), torch.randn(4, 3, 16, 16)),
        ]
    return [(type(model).__name__, model, example) for model, example in models]


# -- of a pass on a model -----------------------------------------------------------------------------------


class Trial:
    """One pass on one model. `before` is the program that the pass is given, `after` what it makes of it."""

    def __init__(self, transform: Pass, model: nn.Module, example: Any, calibration: Any, seed: int) -> None:
        self.transform, self.model, self.example, self.seed = transform, model, example, seed
        self.calibration = [example] if calibration is None else calibration
        self.before = capture(model, example)
        if transform.phase > Phase.CANONICALIZE:
            registry().pass_class("canonicalize")().apply(self.before, Context())
        self.inputs = self.before.example
        self.graph = str(self.before.graph)
        self.weights = {name: tensor.clone() for name, tensor in self.before.weights().items()}
        self.outputs = self.before.run(self.inputs)

    def apply(self, transform: Pass) -> tuple[Program, PassResult]:
        """As the driver does it: on a clone, with the statistics that the pass asks for."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            program = self.before.clone()
            statistics = transform.needs(program)
            wanted = statistics or transform.needs_calibration
            batches = read_batches(program, self.calibration) if wanted else []
            context = Context(gather(program, statistics, batches), self.seed, batches=batches)
            return program, transform.apply(program, context)

    @cached_property
    def _applied(self) -> tuple[Program, PassResult]:
        return self.apply(self.transform)

    @property
    def after(self) -> Program:
        return self._applied[0]

    @property
    def result(self) -> PassResult:
        return self._applied[1]

    def refusal(self) -> str:
        """Why the pass refuses this model, if it does; any other error is left for the rules to meet."""
        try:
            _ = self._applied
        except ParetocError as error:
            return error.what
        except Exception:
            return ""
        return ""


def _difference(a: Program, b: Program) -> str:
    """What differs between two programs: "" when nothing does."""
    if str(a.graph) != str(b.graph):
        return "the graph"
    left, right = a.weights(), b.weights()
    changed = [name for name in left if not same([left[name]], [right[name]])]
    return f"the tensor {changed[0]!r}" if changed else ""


def interface_is_kept(trial: Trial) -> None:
    """Same inputs; outputs of the same number, shapes and dtypes; stored tensors finite; N:M kept."""
    verify_interface(trial.before, trial.after, trial.transform.name)
    for index, (old, new) in enumerate(zip(trial.outputs, trial.after.run(trial.inputs), strict=True)):
        require(
            (old.shape, old.dtype) == (new.shape, new.dtype),
            f"output {index} was {list(old.shape)} {old.dtype} and is {list(new.shape)} {new.dtype}",
            "keep shape and dtype of every output",
        )


def outputs_are_finite(trial: Trial) -> None:
    """An output that was finite is finite."""
    for index, (old, new) in enumerate(zip(trial.outputs, trial.after.run(trial.inputs), strict=True)):
        require(
            not torch.isfinite(old).all() or torch.isfinite(new).all(),
            f"output {index} holds NaN or infinite values",
            "look for an overflow or a division by zero in what was added to the graph",
        )


def original_is_untouched(trial: Trial) -> None:
    """The program before the pass shares its weights: its graph, weights and outputs stay the same bits."""
    _ = trial.after
    now = trial.before.weights()
    written = [name for name, tensor in trial.weights.items() if not same([tensor], [now[name]])]
    require(
        not written,
        f"the pass wrote into {''.join(written[:1])!r} of the original program",
        "use program.set(name, new_tensor) instead of an operation in place",
    )
    unchanged = str(trial.before.graph) == trial.graph and same(trial.outputs, trial.before.run(trial.inputs))
    require(unchanged, "the graph of the original program changed", "rewrite only the program that apply is given")


def pass_is_deterministic(trial: Trial) -> None:
    """Same program, same seed: the same graph and the same bits."""
    again, _ = trial.apply(trial.transform)
    difference = _difference(trial.after, again)
    require(
        not difference,
        f"applying it twice with one seed differs in {difference}",
        "draw from torch's global generator, or seed your own with ctx.seed",
    )


def changes_are_reported(trial: Trial) -> None:
    """`matched` lists what was changed, by site path; a pass over sites changes at least one here."""
    result = trial.result
    require(isinstance(result, PassResult), f"apply returns {type(result).__name__}", "return a PassResult")
    if isinstance(trial.transform, SitePass):
        known = {site.path for site in weight_sites(trial.before)}
        unknown = [path for path in result.matched if path not in known]
        require(not unknown, f"it reports {unknown[:1]}, which is no site of the model", "report site.path")
        require(result.matched, "it changed no site", "pass a model= with sites that it acts on")
    silent = not (result.matched or result.metrics or result.warnings)
    stored = set(trial.after.weights()) == set(trial.weights) and _calls(trial.after) == _calls(trial.before)
    require(not silent or stored, "it changed the program and reports nothing", "fill in PassResult.matched")


def _calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.nodes)


def targets_are_respected(trial: Trial) -> None:
    """A pass over sites leaves what `ignore` names, and refuses a target that matches nothing."""
    transform = trial.transform
    if not isinstance(transform, SitePass):
        return
    fix = "take the sites from self.sites(program)"
    left, *others = trial.result.matched
    if others:  # alone, it may well refuse to do nothing
        _, result = trial.apply(dataclasses.replace(transform, ignore=(*transform.ignore, left)))
        require(left not in result.matched, f"it changed {left!r} in spite of ignore=", fix)
    try:
        trial.apply(dataclasses.replace(transform, targets=("no such site",)))
    except OptionError:
        return
    raise ConformanceError("it takes a target that matches nothing", fix=fix)


def graph_is_tidy(trial: Trial) -> None:
    """No node and no stored tensor without a reader: the size in the report is the size of the model."""
    program, fix = trial.after, "end apply with program.refresh()"
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    stored = [*program.module.named_parameters(), *program.module.named_buffers()]
    dead = [name for name, _ in stored if name not in read]
    require(not dead, f"nothing reads the stored tensor {''.join(dead[:1])!r}", fix)
    require(not program.clone().graph.eliminate_dead_code(), "the graph holds nodes that nothing reads", fix)


def shapes_are_true(trial: Trial) -> None:
    """Every node's recorded shape and dtype are those of the value that it computes."""
    values: dict[str, Any] = {}
    with torch.no_grad():
        Observer(trial.after.module, values.__setitem__).run(*trial.inputs)
    wrong = [n.name for n in trial.after.graph.nodes if not _is_recorded(n, values[n.name])]
    require(
        not wrong,
        f"the recorded shape of node {''.join(wrong[:1])!r} is not that of its value",
        "end apply with program.refresh()",
    )


def _is_recorded(node: fx.Node, value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    recorded = node.meta.get("val")
    return isinstance(recorded, Tensor) and recorded.dtype == value.dtype and example_shape(node) == tuple(value.shape)


def clone_is_equal(trial: Trial) -> None:
    """A clone of the rewritten program, refreshed, computes the same bits."""
    clone = trial.after.clone()
    clone.refresh()
    require(
        same(trial.after.run(trial.inputs), clone.run(trial.inputs)),
        "a clone of the rewritten program computes something else",
        "keep what the graph needs in the graph and in program.set, not in attributes of your own",
    )


def other_batches_run(trial: Trial) -> None:
    """Batches of 1 and 3 give outputs of the shapes that the original gives."""
    if not all(0 in opened for opened in trial.before.dynamic):
        return
    fix = "take sizes from the graph, not from the example"
    for size in (1, 3):
        inputs = [tensor[torch.arange(size) % tensor.shape[0]] for tensor in trial.inputs]
        expected = [list(output.shape) for output in trial.before.run(inputs)]
        try:
            found = [list(output.shape) for output in trial.after.run(inputs)]
        except Exception as error:
            raise ConformanceError(f"it fails at batch size {size}: {error}", fix=fix) from error
        require(found == expected, f"at batch size {size} the outputs are {found}, not {expected}", fix)


def compile_takes_it(trial: Trial) -> None:
    """`compile(model, [transform])` returns the containers of the model, a report and an explanation."""
    compiled = compile(
        trial.model,
        [trial.transform],
        example_inputs=trial.example,
        calibration=trial.calibration if trial.transform.needs_calibration else None,
        target="eager",
        seed=trial.seed,
        progress=False,
    )
    args, kwargs = as_call(trial.example)
    with torch.no_grad():
        expected, found = trial.model(*args, **kwargs), compiled(*args, **kwargs)
    require(
        pytree.tree_structure(expected) == pytree.tree_structure(found),
        f"the model returns {type(expected).__name__}, the compiled model {type(found).__name__}",
        "leave program.interface alone",
    )
    require(str(compiled.report(latency=False)) and str(compiled.explain()), "the report is empty", "fill it")


PASS_RULES: tuple[Callable[[Pass], None], ...] = (
    pass_is_frozen,
    pass_has_a_name,
    pass_has_a_place,
    pass_takes_its_positional_first,
    pass_is_registered,
    pass_text_reads_back,
    pass_refuses_unknown_options,
)
TRIAL_RULES: tuple[Callable[[Trial], None], ...] = (
    interface_is_kept,
    outputs_are_finite,
    original_is_untouched,
    pass_is_deterministic,
    changes_are_reported,
    targets_are_respected,
    graph_is_tidy,
    shapes_are_true,
    clone_is_equal,
    other_batches_run,
    compile_takes_it,
)
