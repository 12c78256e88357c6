"""Residual blocks: where a program computes x + f(x), and the program without f.

    branch   x + f(x) → x, in a post-norm model LN(x + f(x)) → LN(x): an attention, a feed-forward, some convolutions
    layer    all branches of one module of a numbered list, with the norms between them

Exact where f is 0. The influence of a block is 1 − mean cos(x, y) over tokens, y what it makes of x: Men et al. 2024,
ShortGPT, equation 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Any, Literal

from torch import Tensor, fx
from torch.nn import functional as F

from .program import Program, describe, example_shape, module_path, operands
from .sites import ADD, Site, site_of, walk_inputs, weight_sites
from .statistics import Statistic

Unit = Literal["branch", "layer"]
UNITS: tuple[Unit, ...] = ("branch", "layer")
#: the kinds of sites that make a block one: a norm alone is none
LAYERS = ("linear", "conv")


@dataclass(frozen=True, eq=False)
class Residual:
    """A block that makes `result` of `source`, a value of the same shape, through the nodes `between`, with the
    result. `gone` is what nothing reads without it, `paths` those of its layers.

    `path` is that of the last layer of a branch, or of the module that is a layer.
    """

    path: str
    source: fx.Node = field(repr=False)
    result: fx.Node = field(repr=False)
    between: frozenset[fx.Node] = field(repr=False)
    gone: frozenset[fx.Node] = field(repr=False)
    paths: tuple[str, ...] = field(repr=False)

    @classmethod
    def of(cls, program: Program, source: fx.Node, result: fx.Node) -> Residual | None:
        """None where no layer makes the one of the other."""
        between = _between(source, result)
        if between <= {result}:
            return None  # nothing stands beside the source
        gone = _gone(source, between)
        sites = (site_of(program, node) for node in sorted(gone))
        paths = tuple(dict.fromkeys(site.path for site in sites if site is not None and site.kind in LAYERS))
        return cls(paths[-1], source, result, between, gone, paths) if paths else None

    def refusal(self) -> str | None:
        """Why it may not leave, or None."""
        outside = (user for node in self.between - {self.result} for user in node.users if user not in self.between)
        reader = next(outside, None)
        return None if reader is None else f"what it computes inside is read by {describe(reader)}"


def residual_blocks(program: Program, unit: Unit) -> tuple[list[Residual], dict[str, str]]:
    """The blocks that may leave, in graph order, and by path why others may not."""
    branches: list[Residual] = []
    refused: dict[str, str] = {}
    for add in program.calls(*ADD):
        summands = operands(add)[:2]
        if add.kwargs or not all(_is_activation(s) and example_shape(s) == example_shape(add) for s in summands):
            continue
        found = [block for summand in summands if (block := Residual.of(program, summand, add)) is not None]
        if not found and len(layers := {site for s in summands if (site := _last_layer(program, s))}) == 2:
            refused[max(layers, key=lambda site: site.node).path] = "what goes in stands on neither side of its sum"
        for block in found:
            inner = any(branch.result in block.between for branch in branches)
            if reason := "it holds other blocks" if inner else block.refusal():
                refused[block.path] = reason
            else:
                branches.append(block)
    inside = {path for branch in branches for path in branch.paths}
    refused = {path: why for path, why in refused.items() if path not in inside}
    return (branches, refused) if unit == "branch" else _layers(program, branches, refused)


def remove(program: Program, blocks: Iterable[Residual]) -> None:
    """Leave out blocks of the program, or of one that it is a copy of, in place: what went into each stands for it."""
    _bypass(program, blocks)
    program.refresh()


def without(program: Program, blocks: Iterable[Residual]) -> Program:
    """A copy that leaves out blocks of the program, ready to run: no shape has changed."""
    trial = program.clone()
    _bypass(trial, blocks)
    trial.graph.eliminate_dead_code()
    trial.module.recompile()
    return trial


def _bypass(program: Program, blocks: Iterable[Residual]) -> None:
    nodes = {node.name: node for node in program.graph.nodes}
    stands: dict[str, str] = {}
    for block in sorted(blocks, key=lambda block: block.result):
        source = stands.get(block.source.name, block.source.name)
        stands[block.result.name] = source
        nodes[block.result.name].replace_all_uses_with(nodes[source])
        for node in sorted(block.gone, reverse=True):  # an attention could be random, which keeps it alive
            program.graph.erase_node(nodes[node.name])


def _layers(
    program: Program, branches: Sequence[Residual], refused: Mapping[str, str]
) -> tuple[list[Residual], dict[str, str]]:
    """The branches of each module as one block, with what of the module follows them."""
    layers: list[Residual] = []
    reasons, sites = dict(refused), weight_sites(program)
    for name, group in groupby(branches, key=_module):
        held = list(group)
        block = Residual.of(program, held[0].source, _end(held[-1].result, name))
        if not name or block is None:
            reasons[held[0].path] = "it is in no numbered list of modules"
            continue
        stays = [site.path for site in sites if _in(name, site.path) and site.node not in block.gone]
        reason = (
            next((f"{path}: {why}" for path, why in refused.items() if _in(name, path)), None)
            or ("it runs several times" if len(block.paths) < sum(len(branch.paths) for branch in held) else None)
            or (f"{stays[0]} is not between its input and its output" if stays else None)
            or block.refusal()
        )
        if reason is None:
            layers.append(replace(block, path=name))
        else:
            reasons[name] = reason
    return layers, reasons


def _module(branch: Residual) -> str:
    """The module of a numbered list that a branch is in: "encoder.layer.3"; "" for none."""
    parts = zip(*(path.split(".") for path in (*branch.paths, module_path(branch.result))), strict=False)
    common = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, parts)]
    numbers = [place for place, part in enumerate(common, 1) if part.isdecimal()]
    return ".".join(common[: numbers[-1]]) if numbers else ""


def _in(module: str, path: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _end(result: fx.Node, module: str) -> fx.Node:
    """The last value of a module, from that of its last branch on: behind the norm of a post-norm model."""
    while len(result.users) == 1 and _in(module, module_path(user := next(iter(result.users)))):
        if not _is_activation(user) or example_shape(user) != example_shape(result):
            break
        result = user
    return result


def _is_activation(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and operand.op != "get_attr" and isinstance(operand.meta.get("val"), Tensor)


def _between(source: fx.Node, result: fx.Node) -> frozenset[fx.Node]:
    """The nodes on the paths from one value to another, which is among them; none where there is no path."""
    if not source < result:
        return frozenset()
    reached, node = {source}, source
    while node is not result:
        node = node.next
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    found, queue = {source}, [result] if result in reached else []
    while queue:
        node = queue.pop()
        if node in reached and node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return frozenset(found - {source})


def _gone(source: fx.Node, between: Iterable[fx.Node]) -> frozenset[fx.Node]:
    """The nodes between, and all that they alone read; an input of the model stays."""
    gone = set(between)
    queue = list(gone)
    while queue:
        for read in queue.pop().all_input_nodes:
            if read is not source and read.op != "placeholder" and read not in gone and gone.issuperset(read.users):
                gone.add(read)
                queue.append(read)
    return frozenset(gone)


def _last_layer(program: Program, node: fx.Node) -> Site | None:
    """The layer that is nearest before a value, with it."""
    sites = (site_of(program, before) for before in (node, *walk_inputs(node)))
    return next((site for site in sites if site is not None and site.kind in LAYERS), None)


@dataclass(frozen=True)
class Influence(Statistic):
    """1 − mean cos(x, y) of the tokens `[B, T, C]` at `node` and at `result`; of whole samples of any other rank."""

    result: str

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.node, self.result

    def update(self, state: Any, *values: Tensor) -> Any:
        x, y = (v.double() if v.ndim == 3 else v.double().flatten(1) for v in values)
        alike = F.cosine_similarity(x, y, dim=-1)
        total, count = state or (0.0, 0)
        return total + float(alike.sum()), count + alike.numel()

    def finish(self, state: Any) -> float:
        total, count = state
        return max(float(1.0 - total / count), 0.0)
