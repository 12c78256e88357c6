"""The IR: a flat `torch.fx` graph plus what it means to call it.

A `Program` holds one `fx.GraphModule` whose placeholders are the model's tensor inputs and whose output is a tuple
of tensors; `Interface` maps the user's own arguments and containers to and from that flat form. Weights are
`get_attr` nodes under the model's own parameter names. There is no second graph language.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from .causal import Cache
from .encodings import Encoding, parse_encoding
from .errors import OptionError, ParetocError, PassError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Output(dict[str, Any]):
    """What a loaded model returns where the original returned a `transformers.ModelOutput`.

    Fields are reached by name, attribute or position, as there; the original class is not needed.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


@dataclass(frozen=True)
class Interface:
    """How the user's call maps to the flat graph: argument binding, input tree, output tree.

    `parameters` are the names of the original `forward`; `leaves` lists the flattened inputs, a tensor input by
    its graph name and a specialised constant by its value; `results` lists the flattened outputs, a tensor by its
    position in the graph output and a constant by its value; `defaults` are those of the original `forward`.
    `cache` completes the calls of a causal language model.
    """

    parameters: tuple[str, ...]
    in_spec: pytree.TreeSpec
    leaves: tuple[tuple[str, Any], ...]
    out_spec: pytree.TreeSpec
    results: tuple[tuple[str, Any], ...]
    defaults: tuple[tuple[str, Any], ...] = ()
    cache: Cache | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(value for kind, value in self.leaves if kind == "tensor")

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arrange a call the way the model was captured: positionals and keywords are interchangeable."""
        captured_args, captured_kwargs = self._captured_names
        if len(args) > len(self.parameters):
            raise OptionError(
                f"the model takes {len(self.parameters)} arguments ({', '.join(self.parameters)}), got {len(args)}",
                where="calling the compiled model",
                fix="call it as the original was called when it was captured",
            )
        given = self._constants | dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        given = given if self.cache is None else self.cache.complete(given)
        missing = [n for n in (*captured_args, *captured_kwargs) if n not in given]
        known = {*captured_args, *captured_kwargs}
        extra = [n for n, v in given.items() if n not in known and v is not None and (n, v) not in self.defaults]
        if missing or extra:
            raise OptionError(
                f"the call does not match the captured one: missing {missing or 'nothing'}, extra {extra or 'nothing'}",
                where="calling the compiled model",
                fix=f"pass exactly {[*captured_args, *captured_kwargs]}; recompile with other example inputs to "
                "capture a different call",
            )
        return tuple(given[n] for n in captured_args), {n: given[n] for n in captured_kwargs}

    @cached_property
    def _constants(self) -> dict[str, Any]:
        """The arguments that hold no tensor, by name: a call may leave them out."""
        args, kwargs = pytree.tree_unflatten(list(range(len(self.leaves))), self.in_spec)
        places = dict(zip(self._captured_names[0], args, strict=True)) | kwargs
        return {
            name: pytree.tree_map(lambda i: self.leaves[i][1], place)
            for name, place in places.items()
            if all(self.leaves[i][0] == "constant" for i in pytree.tree_leaves(place))
        }

    @cached_property
    def _captured_names(self) -> tuple[list[str], list[str]]:
        args_spec, kwargs_spec = self.in_spec.children()
        return list(self.parameters[: args_spec.num_children]), list(kwargs_spec.context)

    @cached_property
    def _bare(self) -> bool:
        """No argument is a container, as in most models: calls need not walk trees."""
        return all(leaf.is_leaf() for child in self.in_spec.children() for leaf in child.children())

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The user's arguments → the graph's tensor inputs, in order."""
        bound = self.bind(args, kwargs)
        if self._bare:
            values, spec = [*bound[0], *bound[1].values()], self.in_spec
        else:
            values, spec = pytree.tree_flatten(_arranged(bound, self.in_spec))
        if spec != self.in_spec:
            raise OptionError(
                f"the inputs have the structure {_one_line(spec)}, the captured ones {_one_line(self.in_spec)}",
                where="calling the compiled model",
                fix="pass the same containers as in example_inputs",
            )
        tensors = []
        for value, (kind, expected) in zip(values, self.leaves, strict=True):
            if kind == "tensor":
                if not isinstance(value, Tensor):
                    raise OptionError(
                        f"input {expected!r} must be a tensor, got {type(value).__name__}",
                        where="calling the compiled model",
                        fix="pass a torch.Tensor",
                    )
                tensors.append(value)
            elif isinstance(value, Tensor):
                continue  # an input the model never reads
            elif value != expected:
                raise OptionError(
                    f"the model was captured with the constant {expected!r} where this call passes {value!r}",
                    where="calling the compiled model",
                    fix="recompile with that value in example_inputs",
                )
        return tensors

    def unflatten(self, outputs: Sequence[Tensor]) -> Any:
        """The graph's outputs → the containers the original model returns."""
        leaves = [outputs[value] if kind == "tensor" else value for kind, value in self.results]
        return pytree.tree_unflatten(leaves, self.out_spec)

    def input_names(self) -> list[str]:
        """A readable name for each graph input; one inside containers is called after its place in them."""
        places = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(self.leaves))), self.in_spec))[0]
        names = []
        for (path, _), (kind, value) in zip(places, self.leaves, strict=True):
            if kind == "tensor":
                first = getattr(path[1], "key", None) or self.parameters[path[1].idx]  # type: ignore[attr-defined]
                names.append(value if len(path) == 2 else f"{first}.{_place(path[2:])}")
        return names

    def output_names(self) -> list[str]:
        """A readable, unique name for each graph output, from its place in the output containers."""
        names: dict[int, str] = {}
        paths = [path for path, _ in pytree.tree_flatten_with_path(self.unflatten_placeholder())[0]]
        for path, (kind, value) in zip(paths, self.results, strict=True):
            if kind == "tensor" and value not in names:
                text = _place(path) or "output"
                names[value] = text if text[0].isalpha() else f"output_{text}"
        taken = set(self.inputs)
        unique = []
        for index in sorted(names):
            name = names[index]
            while name in taken:
                name += "_out"
            taken.add(name)
            unique.append(name)
        return unique

    def unflatten_placeholder(self) -> Any:
        return pytree.tree_unflatten(list(range(len(self.results))), self.out_spec)


def _place(path: Sequence[Any]) -> str:
    """A path into nested containers as text: "present.0.key"."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)


def _arranged(value: Any, spec: pytree.TreeSpec) -> Any:
    """The value with its dictionaries in the order of the spec: the order of keys is no structure."""
    if spec.is_leaf():
        return value
    children = spec.children()
    if spec.type is dict and isinstance(value, dict) and set(value) == set(spec.context):
        return {key: _arranged(value[key], child) for key, child in zip(spec.context, children, strict=True)}
    if spec.type in (tuple, list) and type(value) is spec.type and len(value) == len(children):
        return spec.type(_arranged(v, child) for v, child in zip(value, children, strict=True))
    return value


def _one_line(spec: pytree.TreeSpec) -> str:
    return " ".join(str(spec).split())


@dataclass
class Program:
    """A captured model: `module` (flat fx graph), `interface`, and the example the shapes were traced with.

    `example` is the flat list of example input tensors; `dynamic` gives, per input, the dimensions left symbolic
    with their names; `notes` are facts the report must tell (for example a dimension that had to be frozen);
    `state_names` gives every name in the original model's state dict the first name of the same tensor: a tied weight
    has several, of which the graph reads one. `repeats` is 2 when a batch of one was repeated to keep its axis open.
    """

    module: fx.GraphModule
    interface: Interface
    example: list[Tensor]
    dynamic: list[dict[int, str]]
    notes: list[str] = field(default_factory=list)
    state_names: Mapping[str, str] = field(default_factory=dict)
    repeats: int = 1

    # -- the graph ------------------------------------------------------------------------------------------------

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        node: fx.Node = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        return node

    @property
    def outputs(self) -> list[fx.Node]:
        return list(operands(self.output)[0])

    def calls(self, *targets: Any) -> list[fx.Node]:
        """Call nodes of the given operators, in graph order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def users_example(self) -> list[Tensor]:
        """The example inputs as the user gave them."""
        narrow = [0 in opened and self.repeats > 1 for opened in self.dynamic]
        pairs = zip(self.example, narrow, strict=True)
        return [t[: t.shape[0] // self.repeats].contiguous() if n else t for t, n in pairs]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The reference execution: flat inputs → flat outputs, in PyTorch."""
        with torch.no_grad():
            return list(self.module(*inputs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.interface.unflatten(self.run(self.interface.flatten(args, kwargs)))

    def clone(self) -> Program:
        """A copy whose graph can be rewritten freely; the weights are shared until replaced."""
        module = fx.GraphModule(self.module, copy_graph(self.graph))
        return Program(
            module,
            self.interface,
            self.example,
            [dict(d) for d in self.dynamic],
            list(self.notes),
            dict(self.state_names),
            self.repeats,
        )

    def refresh(self) -> None:
        """After surgery: drop dead nodes and unused weights, re-derive every shape, regenerate the code."""
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.delete_all_unused_submodules()
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        for name in [n for n, _ in self._stored() if n not in used]:
            self.unset(name)
        self.propagate_shapes()
        self.module.recompile()

    def propagate_shapes(self) -> None:
        """Re-run the fake (shape) kernels of every node with the symbolic input shapes of the capture."""
        _ShapePropagation(self.module).run(*(n.meta["val"] for n in self.placeholders))

    # -- weights --------------------------------------------------------------------------------------------------

    def _owner(self, name: str, *, create: bool = False) -> tuple[torch.nn.Module, str]:
        *path, leaf = name.split(".")
        module: torch.nn.Module = self.module
        for part in path:
            if create and not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        return module, leaf

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_parameters(remove_duplicate=False)
        yield from self.module.named_buffers(remove_duplicate=False)

    def get(self, name: str) -> Tensor:
        """The tensor stored under a parameter name."""
        owner, leaf = self._owner(name)
        return getattr(owner, leaf)  # type: ignore[no-any-return]

    def set(self, name: str, value: Tensor) -> None:
        """Store a tensor under a parameter name. Other programs that share the old tensor keep it."""
        owner, leaf = self._owner(name, create=True)
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        owner.register_buffer(leaf, value.detach())

    def unset(self, name: str) -> None:
        """Forget a stored tensor."""
        owner, leaf = self._owner(name)
        delattr(owner, leaf)

    def weights(self) -> dict[str, Tensor]:
        """Every stored tensor the graph reads, by name, in graph order."""
        names = dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "get_attr")
        return {name: self.get(name) for name in names}

    def state_dict(self) -> dict[str, Tensor]:
        """Every stored tensor, a tied weight under each name that it has in the original model."""
        stored = self.weights()
        return stored | {name: stored[first] for name, first in self.state_names.items() if first in stored}

    def attribute(self, name: str, value: Tensor, *, before: fx.Node) -> fx.Node:
        """Store `value` under `name` and return a `get_attr` node for it, placed before `before`."""
        self.set(name, value)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.fake(value)
        return node

    def fake(self, value: Tensor) -> Tensor:
        """The shape-only stand-in of a real tensor, in the capture's own fake mode."""
        mode = self.placeholders[0].meta["val"].fake_mode
        return cast(Tensor, mode.from_tensor(value, static_shapes=True))

    # -- encodings ------------------------------------------------------------------------------------------------

    def encoding(self, node: fx.Node) -> Encoding | None:
        """The encoding of a weight operand, or None when it is stored as it is (or is not a weight)."""
        if node.op == "call_function" and node.target is torch.ops.paretoc.decode.default:
            return parse_encoding(str(operands(node)[1]))
        return None

    def weight_name(self, node: Any) -> str | None:
        """The parameter name behind a weight operand, encoded or not."""
        if not isinstance(node, fx.Node):
            return None
        if node.op == "get_attr":
            return str(node.target)
        if self.encoding(node) is not None:
            return str(node.meta["parameter"])
        return None

    def weight_value(self, node: fx.Node) -> Tensor:
        """The dense value of a weight operand: shape as in the original model."""
        if node.op == "get_attr":
            return self.get(str(node.target)).detach()
        encoding = self.encoding(node)
        if encoding is None:
            raise PassError(f"node {node.name!r} is not a weight", where=describe(node), fix="pass a weight operand")
        return encoding.decode(self.stored_arrays(node), tuple(operands(node)[2]))

    def stored_arrays(self, node: fx.Node) -> dict[str, Tensor]:
        """The named arrays an encoded weight is stored as."""
        arrays, encoding, shape = operands(node)[:3]
        layout = parse_encoding(str(encoding)).layout(tuple(shape))
        return {name: self.get(str(array.target)) for name, array in zip(layout, arrays, strict=True)}

    def encode(self, weight: fx.Node, encoding: Encoding, arrays: Mapping[str, Tensor]) -> fx.Node:
        """Replace a weight operand, at all its consumers, by `decode(arrays)`; returns the decode node."""
        name, value, users = self.weight_name(weight), self.weight_value(weight), list(weight.users)
        with self.graph.inserting_before(min(users)):
            decode = self.graph.call_function(
                torch.ops.paretoc.decode.default, ([], str(encoding), list(value.shape), value.dtype)
            )
        weight.replace_all_uses_with(decode)
        for stale in [weight, *weight.all_input_nodes]:
            if not stale.users:  # an array may be shared with other weights
                self.graph.erase_node(stale)
                if stale.op == "get_attr":
                    self.unset(str(stale.target))
        order = encoding.layout(tuple(value.shape))
        stored = [self.attribute(f"{name}.{key}", arrays[key], before=decode) for key in order]
        decode.update_arg(0, stored)
        decode.meta.update(val=self.fake(value), parameter=name, nn_module_stack=min(users).meta.get("nn_module_stack"))
        return decode

    def restore(self, decode: fx.Node, value: Tensor) -> fx.Node:
        """The inverse of `encode`: the weight `value` stands dense again, at all its consumers; returns its node."""
        name, arrays = str(decode.meta["parameter"]), decode.all_input_nodes
        self.set(name, value)  # in place of the stored arrays, whose names begin with this one
        with self.graph.inserting_before(decode):
            weight = self.graph.get_attr(name)
        weight.meta["val"] = self.fake(value)
        decode.replace_all_uses_with(weight)
        for stale in (decode, *arrays):
            if not stale.users:
                self.graph.erase_node(stale)
        return weight


def _recurrent_shape(x: Tensor, state: Any, parameters: Any, *options: Any) -> tuple[Tensor, ...]:
    """lstm, gru: (x `[B, T, I]` or `[T, B, I]`, initial state(s) `[L·D, B, H]`, …) → (output, final state(s))."""
    states = (state,) if isinstance(state, Tensor) else tuple(state)
    bidirectional = options[4]
    width = parameters[1].shape[1] * (2 if bidirectional else 1)
    return (x.new_empty(*x.shape[:-1], width), *(torch.empty_like(s) for s in states))


#: shape rules for operators whose own fail on symbolic sizes
_SHAPE_RULES: dict[Any, Any] = {
    torch.ops.aten.lstm.input: _recurrent_shape,
    torch.ops.aten.gru.input: _recurrent_shape,
}


class _ShapePropagation(fx.Interpreter):
    """Runs every node on fake tensors and stores what comes out as its `meta["val"]`."""

    def run(self, *args: Any) -> Any:  # type: ignore[override]  # the base adds options that are not used here
        self.mode = args[0].fake_mode
        self.extra_traceback = False  # our errors are three lines
        with self.mode, torch.no_grad():
            return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except ParetocError:
            raise
        except Exception as error:
            raise PassError(
                f"shapes no longer fit after the rewrite: {str(error).splitlines()[0]}",
                where=describe(n),
                fix="the pass that ran last changed a shape that this node relies on",
            ) from error
        n.meta["val"] = result
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        rule = _SHAPE_RULES.get(target)
        return super().call_function(target, args, kwargs) if rule is None else rule(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value, static_shapes=True)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that keeps every node's metadata (shapes, provenance, parameter names)."""
    fresh = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = fresh.graph_copy(graph, mapping)
    fresh.output(result)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    return fresh


def operands(node: Any) -> tuple[Any, ...]:
    """A node's positional arguments, free of the union type that fx gives them."""
    return tuple(node.args)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def module_path(node: fx.Node) -> str:
    """The path of the submodule that made this node, in the user's model ("" for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(path) for path, _ in reversed(list(stack.values()))), "")


def module_class(node: fx.Node) -> str:
    """The class name of the submodule that made this node."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [cls if isinstance(cls, str) else cls.__qualname__ for _, cls in stack.values()]
    return names[-1].rsplit(".", 1)[-1] if names else ""


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's source that made this node, as `file:line in function`; "" when it has none
    (a layer of PyTorch in an `nn.Sequential`)."""
    frames = [ln.strip() for ln in (node.meta.get("stack_trace") or "").splitlines() if ln.strip().startswith("File ")]
    user = [f for f in frames if "/torch/" not in f]
    if not user:
        return ""
    file, line, *rest = user[-1].removeprefix("File ").split(", ")
    return f"{file.strip(chr(34))}:{line.removeprefix('line ')} {' '.join(rest)}"


def origin(node: fx.Node) -> dict[str, Any]:
    """The part of a node's `meta` that says which module and which line of the user's source it comes from."""
    return {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}


def describe(node: fx.Node) -> str:
    """A node for an error message: operator, module path, source line."""
    parts = [f"node {node.name} ({node.target})"]
    if path := module_path(node):
        parts.append(f"in {path}")
    if line := source_line(node):
        parts.append(f"from {line}")
    return " ".join(parts)


def shape_of(node: Any) -> tuple[int | torch.SymInt, ...]:
    """The (possibly symbolic) shape of a node's value."""
    return tuple(node.meta["val"].shape)


def example_shape(node: Any) -> tuple[int, ...]:
    """The shape of a node's value at the example inputs: symbols replaced by their example sizes."""
    return tuple(hint(s) for s in shape_of(node))


def hint(size: int | torch.SymInt) -> int:
    """A size at the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


def forward_defaults(model: Any) -> tuple[tuple[str, Any], ...]:
    """The plain default values of a model's forward parameters."""
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple((p.name, p.default) for p in parameters if isinstance(p.default, (bool, int, float, str)))


def forward_parameters(model: Any) -> tuple[str, ...]:
    """The names of a model's forward parameters, in order."""
    forward = model.forward if isinstance(model, torch.nn.Module) else model
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)
