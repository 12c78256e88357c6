"""A user's model → a `Program`: `torch.export` with the batch (and, where the model allows, the sequence) left open."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen

from . import dialect  # noqa: F401  # registers the paretoc:: operators that a captured graph may hold
from .causal import CausalLM
from .errors import CaptureError, OptionError
from .program import Arguments, Interface, Program, describe, forward_defaults, forward_parameters, hint, operands
from .quiet import quiet
from .sites import SDPA

Model = nn.Module | ExportedProgram | fx.GraphModule
#: folders whose lines an error does not show
_NOT_THE_USERS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


def capture(model: Model, example_inputs: Any = None, dynamic_shapes: Any = None) -> Program:
    """Capture a model for the given example call.

    `example_inputs`: a tensor, a tuple (positional), a dict (keywords) or `(args, kwargs)`; None only for an
    ExportedProgram that carries its own and for a CausalLM. `dynamic_shapes` in the form of `torch.export.export`
    overrides the default, which leaves open the first axis of every input that shares the batch size, and the second
    axis of integer and of three-dimensional inputs. Raises CaptureError with the line of the model that stopped it.
    """
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise OptionError(
                "dynamic_shapes cannot open an axis that an ExportedProgram has fixed already",
                where="dynamic_shapes=",
                fix="pass dynamic_shapes to torch.export.export, and leave it out here",
            )
        arguments = model.example_inputs if example_inputs is None else as_call(example_inputs)
        if arguments is None:
            raise CaptureError(
                "the ExportedProgram carries no example inputs",
                where="capture",
                fix="pass example_inputs=(…)",
            )
        parameters = _exported_parameters(model)
        program = _program(model, (tuple(arguments[0]), dict(arguments[1])), parameters, [])
        _note_frozen_batch(
            program, "the exported program fixed it; export it again with dynamic_shapes to leave the axis open"
        )
        return program
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(model).__name__}",
            where="capture",
            fix="pass an nn.Module, a torch.export.ExportedProgram or a torch.fx.GraphModule",
        )
    _check_model(model)
    causal = model if isinstance(model, CausalLM) else None
    args, kwargs = as_call(causal.example_inputs if causal and example_inputs is None else example_inputs)
    given = _batch_size(pytree.tree_leaves((args, kwargs)))
    if causal:
        args, kwargs = _widen_batch((), causal.example(args, kwargs))
        dynamic_shapes = causal.dynamic_shapes() if dynamic_shapes is None else dynamic_shapes
    args, kwargs = _distinct((args, kwargs))
    notes: list[str] = []
    _disable_cache(model, args, kwargs, notes)
    with _named_keywords(model, kwargs):
        exported, call = _export(model, (args, kwargs), dynamic_shapes, notes)
        program = _program(exported, call, _parameters(model, args), notes)
    _note_frozen_batch(program, "the model depends on it")
    cache = causal.cache if causal else None
    program.interface = replace(program.interface, defaults=forward_defaults(model), cache=cache)
    traced = _batch_size(pytree.tree_leaves(call))
    program.repeats = traced // given if given and traced else 1
    return program


def as_call(example: Any) -> Arguments:
    """Example inputs in any accepted form → (args, kwargs)."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return example[0], dict(example[1])
        return tuple(example), {}
    raise CaptureError(
        f"example inputs of type {type(example).__name__} are not understood",
        where="example_inputs=",
        fix="pass a tensor, a tuple of positional inputs, or a dict of keyword inputs",
    )


def _distinct(call: Arguments) -> Arguments:
    """A tensor that is passed twice would become one input, and of a view the base would be guarded: copy them."""
    seen: set[int] = set()

    def fresh(leaf: Any) -> Any:
        shared = isinstance(leaf, Tensor) and (id(leaf) in seen or leaf._is_view())
        seen.add(id(leaf))
        return leaf.clone() if shared else leaf

    return pytree.tree_map(fresh, call)  # type: ignore[no-any-return]


@contextmanager
def _named_keywords(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """`torch.export` cannot leave open an axis of what goes to `**kwargs`: give those a name in the signature."""
    signature = inspect.signature(model.forward)
    kinds = {p.kind for p in signature.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds or "forward" in vars(model):
        yield
        return
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in signature.parameters]
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*named, *extra])  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call by parameter name, as `torch.export` wants its shapes: `*args` is one tuple."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit the model: {error}",
            where=f"{type(model).__name__}.forward",
            fix=f"pass example inputs for {', '.join(forward_parameters(model)) or 'its arguments'}",
        ) from error


def _parameters(model: nn.Module, args: tuple[Any, ...]) -> tuple[str, ...]:
    """A name for every positional argument of the call and every named one of the model."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(args) - len(names))]
        elif parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return tuple(names)


def _check_model(model: nn.Module) -> None:
    active = [n for n, m in model.named_modules() if isinstance(m, _DROPOUTS) and m.training and m.p > 0]
    if active:
        raise CaptureError(
            f"the model is in training mode and {len(active)} dropout layers are active, the first is {active[0]!r}",
            where=type(model).__name__,
            fix="call model.eval() first",
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CaptureError(
                f"{count} of the {tensor.numel()} values of {name!r} are NaN or infinite",
                where=type(model).__name__,
                fix="load the right weights; a model with broken weights cannot be compressed faithfully",
            )


def _disable_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: list[str]) -> None:
    """A decoder that would return a key-value cache object is captured without it, and the report says so."""
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False) or "use_cache" in kwargs:
        return
    try:
        with torch.no_grad():
            leaves = pytree.tree_leaves(model(*args, **kwargs))
    except Exception:
        return  # the export that follows fails on the same call and says where
    if not all(leaf is None or isinstance(leaf, (Tensor, int, float)) for leaf in leaves):
        kwargs["use_cache"] = False
        notes.append("captured with use_cache=False: the key-value cache is not part of the outputs")


def _batch_size(leaves: Sequence[Any]) -> int | None:
    return next((leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)


def _widen_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """A batch of one would be taken for a constant: repeat it."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if _batch_size(leaves) != 1:
        return args, kwargs
    wide = [
        leaf.repeat(2, *[1] * (leaf.ndim - 1))
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == 1
        else leaf
        for leaf in leaves
    ]
    return pytree.tree_unflatten(wide, spec)  # type: ignore[no-any-return]


def _open_axes(leaf: Any, batch: int | None, *, sequence: bool) -> dict[int, Any] | None:
    if not isinstance(leaf, Tensor):
        return None
    axes: dict[int, Any] = {}
    if batch is not None and leaf.ndim and leaf.shape[0] == batch:
        axes[0] = Dim.AUTO
    whole = not leaf.is_floating_point() and leaf.ndim >= 2
    if sequence and (whole or leaf.ndim == 3) and leaf.shape[1] > 1:
        axes[1] = Dim.AUTO
    return axes


def _export(
    model: nn.Module, call: Arguments, dynamic_shapes: Any, notes: list[str]
) -> tuple[ExportedProgram, Arguments]:
    """The exported model and the call it was traced with."""
    attempts: list[tuple[str, Arguments, Any]] = []
    bound = _bind(model, *call)
    if isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = pytree.tree_map(lambda _: None, bound) | dict(dynamic_shapes)
    if dynamic_shapes is not None:
        attempts.append(("as asked", call, dynamic_shapes))
    else:
        wide = _widen_batch(*call)
        bound = _bind(model, *wide)
        batch = _batch_size(pytree.tree_leaves(wide))
        for label, sequence in (("batch and sequence", True), ("batch only", False)):
            shapes = pytree.tree_map(lambda x, s=sequence: _open_axes(x, batch, sequence=s), bound)
            attempts.append((label, wide, shapes))
        attempts.append(("nothing", call, None))
    first: Exception | None = None
    for label, (args, kwargs), shapes in attempts:
        try:
            with quiet(), torch.no_grad():
                exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes).run_decompositions({})
        except Exception as error:
            first = first or error
            continue
        if first is not None:
            notes.append(f"left open: {label}, because of {_reason(first)}")
        return exported, (args, kwargs)
    assert first is not None
    raise CaptureError(
        f"torch.export could not capture {type(model).__name__}: {_reason(first)}",
        where=_user_line(first) or type(model).__name__,
        fix="rewrite that line without data-dependent control flow or Python side effects, or pass a torch.export "
        "ExportedProgram of your own",
    ) from first


def _reason(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _user_line(error: BaseException | None) -> str:
    """The innermost frame of the traceback that lies in neither torch nor paretoc."""
    found = ""
    while error is not None and not found:
        for frame in traceback.extract_tb(error.__traceback__):
            if not frame.filename.startswith(("<", *_NOT_THE_USERS)):
                found = f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
        error = error.__cause__ or error.__context__
    return found


def _exported_parameters(exported: ExportedProgram) -> tuple[str, ...]:
    args_spec, kwargs_spec = exported.call_spec.in_spec.children()
    named = forward_parameters(exported.module(check_guards=False))
    positional = [named[i] if i < len(named) else f"input_{i}" for i in range(args_spec.num_children)]
    return (*positional, *(k for k in kwargs_spec.context if k not in positional))


def _program(exported: ExportedProgram, call: Arguments, parameters: tuple[str, ...], notes: list[str]) -> Program:
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    graph.set_codegen(CodeGen())
    leaves, in_spec = pytree.tree_flatten(call)
    kinds: list[tuple[str, Any]] = []
    example: list[Tensor] = []
    for node, leaf in zip([n for n in graph.nodes if n.op == "placeholder"], leaves, strict=True):
        if isinstance(leaf, Tensor):
            _settle_shape(node)
            kinds.append(("tensor", node.name))
            example.append(leaf)
            continue
        kinds.append(("constant", leaf))
        if node.users:
            node.replace_all_uses_with(leaf)  # a specialised Python constant
        graph.erase_node(node)
    _check_inference(graph)
    results = _flatten_outputs(graph)
    interface = Interface(parameters, in_spec, tuple(kinds), exported.call_spec.out_spec, results)
    flat = fx.GraphModule(module, _merge_constants(graph))
    program = Program(flat, interface, example, [], notes, _state_names(exported.state_dict))
    program.dynamic = [_open_dimensions(n) for n in program.placeholders]
    program.refresh()
    return program


def _state_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name in a state dict → the first name of the same tensor."""
    first: dict[Any, str] = {}
    # by memory, not identity: a saved ExportedProgram comes back with one object for each name. Empty tensors have none
    places = {n: (t.data_ptr() or id(t), t.dtype, t.shape, t.stride()) for n, t in state.items()}
    return {name: first.setdefault(place, name) for name, place in places.items()}


def _check_inference(graph: fx.Graph) -> None:
    """Refuse a graph that draws random numbers to drop activations, or that changes the model's own buffers."""
    for node in graph.nodes:
        name, args = str(node.target), operands(node)
        drops = name.startswith("aten.native_dropout") or (name == "aten.dropout.default" and args[2])
        if (drops and args[1]) or (node.target in SDPA and len(args) > 4 and args[4]):
            what = "the model is in training mode and a dropout is active"
        elif name.startswith("aten.copy_.") and isinstance(args[0], fx.Node) and args[0].op == "get_attr":
            what = f"the model changes its own {args[0].target!r} while it runs"
        else:
            continue
        raise CaptureError(
            what, where=describe(node), fix="call model.eval() first; a model with state cannot be compiled"
        )


def _flatten_outputs(graph: fx.Graph) -> tuple[tuple[str, Any], ...]:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    tensors: list[fx.Node] = []
    results: list[tuple[str, Any]] = []
    for value in pytree.tree_leaves(operands(output)[0]):
        if not isinstance(value, fx.Node):
            results.append(("constant", value))
            continue
        if not isinstance(value.meta.get("val"), Tensor):
            raise CaptureError(
                f"output {len(results)} of the model is a number computed from the input shapes, not a tensor",
                where=describe(value),
                fix="return tensors only",
            )
        if value not in tensors:
            tensors.append(value)
        results.append(("tensor", tensors.index(value)))
    output.args = (tuple(tensors),)
    return tuple(results)


def _merge_constants(graph: fx.Graph) -> fx.Graph:
    """One get_attr node per stored tensor."""
    first: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            kept = first.setdefault(str(node.target), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)
    return graph


def _settle_shape(node: fx.Node) -> None:
    """Write an axis that the model fixed, which `torch.export` leaves as a symbol of known value, as a number."""
    value = node.meta["val"]
    sizes = [s if isinstance(s, int) or s.node.maybe_as_int() is None else int(s) for s in value.shape]
    with value.fake_mode:
        node.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)


def _open_dimensions(node: fx.Node) -> dict[int, str]:
    shape = node.meta["val"].shape
    return {axis: f"{node.name}_{axis}" for axis, size in enumerate(shape) if not isinstance(size, int)}


def _note_frozen_batch(program: Program, reason: str) -> None:
    sizes = [n.meta["val"].shape for n in program.placeholders]
    batch = next((hint(s[0]) for s in sizes if s), None)
    for node, opened in zip(program.placeholders, program.dynamic, strict=True):
        shape = node.meta["val"].shape
        if shape and hint(shape[0]) == batch and 0 not in opened:
            program.notes.append(f"the batch axis of {node.name!r} is fixed at {batch}: {reason}")
