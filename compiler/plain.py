"""A rewritten program as ordinary PyTorch: a module to train, and its weights in a `transformers` model again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .axis_walk import WEIGHTED
from .errors import PassError
from .program import Program

#: fields of a config: the width of a feed-forward, and numbers of heads
_WIDTHS = ("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "n_inner")
_HEADS = ("num_attention_heads", "num_key_value_heads")


class PlainModule(nn.Module):
    """Called like the original model; parameters and buffers have its names, and train in any loop."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        own = program.clone()
        read = {str(n.target): n.users for n in own.graph.nodes if n.op == "get_attr"}
        for name, users in read.items():
            value = own.get(name).detach().clone()
            own.set(name, value)
            weight = name in own.state_names or any(user.target in WEIGHTED for user in users)
            if weight and value.is_floating_point():
                *path, leaf = name.split(".")
                owner = own.module.get_submodule(".".join(path))
                delattr(owner, leaf)
                owner.register_parameter(leaf, nn.Parameter(value))
        self._program = [own]  # in a list: its graph module is no submodule, the modules in that are
        for name, child in own.module.named_children():
            self.add_module(name, child)
        for name, parameter in own.module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in own.module.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (program,) = self._program
        return program.interface.unflatten(program.module(*program.interface.flatten(args, kwargs)))


def rebuild(model: Any, state: Mapping[str, Tensor]) -> Any:
    """A `transformers` model of the same class whose weights are `state`: its config has the widths of these, and as
    many layers. Those that stay take the places of those that left.

    Raises PassError where a config cannot say them: layers of different widths, fewer heads where the width of one
    follows from their number, a layer of which only a part left.
    """
    old = model.state_dict()
    config, stacks = copy.deepcopy(model.config), _stacks(model, state)
    for name, value in state.items():
        for before, after in zip(old[name].shape, value.shape, strict=True) if name in old else ():
            if before != after:
                _resize(config, model.config, name, before, after)
    for kept in stacks.values():
        config.num_hidden_layers = len(kept)
        if vars(config).get("layer_types"):
            config.layer_types = [model.config.layer_types[i] for i in kept]
    fresh = type(model)(config).to(next(iter(old.values())).dtype).train(model.training)
    wanted = fresh.state_dict()
    sources = {name: _source(name, stacks) for name in wanted}
    given = {name: state.get(source, old.get(source)) for name, source in sources.items()}
    known = {*sources.values(), *dict(model.named_buffers())}
    wrong = next((name for name in state if name not in known), None)
    wrong = wrong or next((n for n, value in given.items() if value is None or value.shape != wanted[n].shape), None)
    if wrong is not None:
        raise _refusal(f"{wrong!r} of the program does not fit the model that its widths give")
    for stack, kept in stacks.items():
        if len(fresh.get_submodule(stack)) != len(kept):
            raise _refusal(f"{type(config).__name__} does not say that {stack!r} has {len(kept)} layers")
    for name, _ in fresh.named_parameters():
        if sources[name] not in state and any(name.startswith(f"{stack}.") for stack in stacks):
            raise _refusal(f"{sources[name]!r} left, and not the whole of its layer")
    fresh.load_state_dict(given)
    return fresh


def _stacks(model: Any, state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The lists of all layers, by path, with the numbers of those that have weights left."""
    count = getattr(model.config, "num_hidden_layers", 0)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    left = {name: [i for i in range(count) if any(n.startswith(f"{name}.{i}.") for n in state)] for name in lists}
    return {name: kept for name, kept in left.items() if kept}


def _source(name: str, stacks: Mapping[str, list[int]]) -> str:
    """The name that a weight of the smaller model has in the larger one."""
    for stack, kept in stacks.items():
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        if name.startswith(f"{stack}.") and int(number) < len(kept):
            return f"{stack}.{kept[int(number)]}.{rest}"
    return name


def _resize(config: Any, old: Any, name: str, before: int, after: int) -> None:
    head = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    changed = {field: after for field in _WIDTHS if getattr(old, field, None) == before}
    counts = [field for field in _HEADS if getattr(old, field, 0) * head == before]
    if not changed and counts:
        if not hasattr(old, "head_dim"):
            raise _refusal(f"{type(old).__name__} has no head_dim beside its number of heads, for {name!r}")
        changed = dict.fromkeys(counts, after // head) | {"head_dim": head}
    if not changed:
        raise _refusal(f"no field of {type(old).__name__} is the width {before} of {name!r}")
    for field, width in changed.items():
        if getattr(config, field) not in (getattr(old, field), width):
            raise _refusal(f"its layers have the widths {getattr(config, field)} and {width}, and one {field}")
        setattr(config, field, width)


def _refusal(what: str) -> PassError:
    return PassError(
        f"the model cannot be written in a config: {what}",
        where="putting pruned weights into a transformers model",
        fix="prune whole layers, or widths with ratio= and axes=hidden; CompiledModel.module() needs no config",
    )
