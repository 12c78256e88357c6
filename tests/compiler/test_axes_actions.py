"""Axes of one action: how far scales and rotations go on each path between two layers, checked by doing it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paretoc.compiler import axis_views
from paretoc.compiler.axes import Action, Axes, Axis, Use, find_axes
from paretoc.compiler.axis_terms import Atom, cells
from paretoc.compiler.axis_walk import RULES, Walk, unknown
from paretoc.compiler.norms import Norm
from paretoc.compiler.program import Program, operands
from torch import Tensor, fx, nn
from torch.nn import functional as F


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(name)
    spec = importlib.util.spec_from_file_location(f"paretoc_actions_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


checks = _load("test_axes.py")
aten = torch.ops.aten
B, T, C = 2, 5, 8
TOLERANCE = 1e-5


class Between(nn.Module):
    """b(path(a(x))): eight channels on their way from one layer to the next."""

    def __init__(self, path: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.other, self.path = nn.Linear(6, C), nn.Linear(6, C), path
        self.vector, self.position = nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(1, T, C))
        self.b, self.wide, self.narrow = nn.Linear(C, 3), nn.Linear(2 * C, 3), nn.Linear(C // 2, 3)
        self.matrix, self.six = nn.Parameter(torch.randn(C, 3)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self, self.a(x), x)


def two(x: Tensor) -> Tensor:
    return x.reshape(B, T, 2, 4).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(B, T, -1)


def heads(m: Any, v: Tensor, x: Tensor) -> Tensor:
    q = two(m.other(x))
    return m.b(merged(F.scaled_dot_product_attention(q, q, two(v))))


def grouped(m: Any, v: Tensor, x: Tensor) -> Tensor:
    """Two query heads share a key-value head of width 4; the other four channels are keys."""
    k, v = (half.unsqueeze(1).expand(B, 2, T, 4) for half in v.chunk(2, -1))
    return m.b(merged(F.scaled_dot_product_attention(two(m.other(x)), k, v)))


def gated(m: Any, v: Tensor, x: Tensor) -> Tensor:
    left, right = v.chunk(2, -1)
    return m.narrow(left * torch.sigmoid(right))


def by_views(m: Any, v: Tensor, x: Tensor) -> Tensor:
    """Keys and values are the halves of `a`, taken apart by an index."""
    k, v = v.reshape(B, T, 2, 1, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return m.narrow(F.scaled_dot_product_attention(m.other(x)[..., :4].unsqueeze(1), k, v)[:, 0])


def by_head(m: Any, v: Tensor, x: Tensor) -> Tensor:
    """Two heads, each of two keys and two values."""
    parts = v.reshape(B, T, 2, 2, 2)
    k, v = (parts[:, :, :, i].transpose(1, 2) for i in (0, 1))
    q = m.other(x)[..., :4].reshape(B, T, 2, 2).transpose(1, 2)
    return m.narrow(merged(F.scaled_dot_product_attention(q, k, v)))


#: path → at how many places of `a` a channel may be scaled, and may be rotated once norms are folded
PATHS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int, int]] = {
    "nothing": (lambda m, v, x: m.b(v), 8, 8),
    "number": (lambda m, v, x: m.b(-v * 3 / 2), 8, 8),
    "relu": (lambda m, v, x: m.b(F.relu(v)), 8, 0),
    "gelu": (lambda m, v, x: m.b(F.gelu(v)), 0, 0),
    "square": (lambda m, v, x: m.b(v * v), 0, 0),
    "one more": (lambda m, v, x: m.b(v + 1), 0, 0),
    "gate": (lambda m, v, x: m.b(torch.sigmoid(m.other(x)) * v), 8, 0),
    "bilinear": (lambda m, v, x: m.b(v * m.other(x)), 8, 0),
    "gate of its own": (gated, 4, 0),
    "over": (lambda m, v, x: m.b(torch.sigmoid(m.other(x)) / v), 0, 0),
    "vector": (lambda m, v, x: m.b(m.vector * v), 8, 0),
    "weight of each token": (lambda m, v, x: m.b(v * x[:, :, :1]), 8, 8),
    "residual": (lambda m, v, x: m.b(v + m.other(x)), 8, 8),
    "position": (lambda m, v, x: m.b(v + m.position), 8, 8),
    "unknown summand": (lambda m, v, x: m.b(v + F.pad(x, (0, 2))), 0, 0),
    "mean of tokens": (lambda m, v, x: m.b(v.mean(1)), 8, 8),
    "mean of channels": (lambda m, v, x: m.b(v - v.mean(-1, keepdim=True)), 0, 0),
    "largest token": (lambda m, v, x: m.b(v.amax(1)), 0, 0),
    "one token": (lambda m, v, x: m.b(v[:, 0]), 8, 8),
    "picked tokens": (lambda m, v, x: m.b(v[torch.arange(B), x[:, :, 0].argmax(-1)]), 8, 8),
    "rolled": (lambda m, v, x: m.b(v.roll(1, 1)), 8, 8),
    "sum so far": (lambda m, v, x: m.b(v.cumsum(1)), 8, 8),
    "zeros behind": (lambda m, v, x: m.b(F.pad(v, (0, 0, 0, 2))), 8, 8),
    "zeros between channels": (lambda m, v, x: m.wide(F.pad(v, (3, 5))), 8, 8),
    "flat tokens": (lambda m, v, x: m.b(v.reshape(-1, C)).reshape(B, T, 3), 8, 8),
    "half": (lambda m, v, x: m.narrow(v[..., :4]), 8, 8),
    "both halves in one": (lambda m, v, x: m.narrow(v.reshape(B, -1, 4)), 8, 8),
    "a stored matrix": (lambda m, v, x: v @ m.matrix, 8, 8),
    "a layer read twice": (lambda m, v, x: m.b(v) * m.b(m.other(x)), 8, 8),
    "a weight read otherwise too": (lambda m, v, x: m.b(v) + v @ m.b.weight.T, 0, 8),
    "concatenated": (lambda m, v, x: m.wide(torch.cat([v, m.other(x)], -1)), 8, 8),
    "more tokens": (lambda m, v, x: m.b(torch.cat([v, m.other(x)], 1)), 8, 8),
    "class token": (lambda m, v, x: m.b(torch.cat([m.position[:, :1].expand(B, 1, C), v], 1)), 8, 8),
    "heads": (heads, 8, 8),
    "grouped heads": (grouped, 4, 8),
    "keys and values by views": (by_views, 4, 8),
    "keys and values by head": (by_head, 4, 8),
    "matmul": (lambda m, v, x: m.b(torch.softmax(x @ x.mT, -1) @ v), 8, 8),
    "keys": (lambda m, v, x: torch.softmax(v @ v.mT, -1) @ m.b(m.other(x)), 0, 8),
    "an output": (lambda m, v, x: m.b(v).sum(-1, keepdim=True) + v.max(), 0, 0),
    "one layer for all heads": (lambda m, v, x: m.six(merged(F.linear(two(v), m.narrow.weight))), 8, 8),
    "one bias for all heads": (lambda m, v, x: m.six(merged(m.narrow(two(v)))), 8, 8),
    "two readers": (lambda m, v, x: m.b(v) + m.wide(torch.cat([v, v], -1)), 8, 8),
    "norm": (lambda m, v, x: m.b(F.layer_norm(v, (C,), m.vector)), 0, 8),
    "plain norm": (lambda m, v, x: m.b(F.rms_norm(v, (C,))), 0, 8),
    "weight of a norm added": (lambda m, v, x: m.b(F.rms_norm(v, (C,), m.vector) + v * m.vector), 0, 0),
    "norm of each head": (lambda m, v, x: m.b(merged(F.rms_norm(two(v), (4,)))), 0, 8),
}


def place(name: str) -> str:
    return "through_" + name.replace(" ", "_")


class Paths(nn.Module):
    """All paths in one model, each with layers of its own: one capture serves all tests."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleDict({place(name): Between(path) for name, (path, *_) in PATHS.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [path(x) for path in self.paths.values()]


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    program: Program = checks.captured(Paths(), torch.randn(B, T, 6), dynamic_shapes={})
    return program


@pytest.fixture(scope="module")
def axes(program: Program) -> dict[str, Axes]:
    return {action: find_axes(program, action) for action in ("scale", "rotate")}


def made_by_a(axes: Axes, name: str) -> list[Axis]:
    """The axes that layer `a` of a path writes."""
    return axes.of(f"paths.{place(name)}.a.weight", 0)


def count(axes: Axes, name: str, action: Action) -> int:
    """At how many places of the weight of `a` a channel is free."""
    uses = [use for axis in made_by_a(axes, name) if axis.free(action) for use in axis.uses]
    return len({place for use in uses if is_a(use, name) for place in (use.channels >= 0).nonzero().flatten().tolist()})


def is_a(use: Use, name: str) -> bool:
    return (use.parameter, use.dim) == (f"paths.{place(name)}.a.weight", 0)


def distances(program: Program, action: Action) -> dict[str, float]:
    """How far the output of each path is off after an action on every axis that is free for it."""
    outputs = zip(checks.changed(program, action, alone=True), program.run(program.example), strict=True)
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in zip(PATHS, outputs, strict=True)}


@pytest.mark.parametrize("action", ["scale", "rotate"])
def test_what_may_be_changed_can_be_changed(program: Program, action: Action) -> None:
    assert {name: off for name, off in distances(program, action).items() if not off < TOLERANCE} == {}


@pytest.mark.parametrize("name", PATHS)
def test_how_far_an_action_goes(axes: dict[str, Axes], name: str) -> None:
    assert count(axes["scale"], name, "scale") == PATHS[name][1]
    assert count(axes["rotate"], name, "fold") == PATHS[name][2]


def test_heads_and_their_width_are_one_axis_where_nothing_parts_them(axes: dict[str, Axes]) -> None:
    (whole,) = made_by_a(axes["scale"], "heads")
    assert [str(use) for use in whole.uses if use.sums] == [f"paths.{place('heads')}.b.weight.1"]
    assert whole.size == C
    outer, width = made_by_a(axes["rotate"], "heads")
    assert (outer.size, width.size) == (2, 4)
    assert "each of its channels is multiplied by another number (node " in str(outer.why("rotate"))
    assert width.uses[0].channels.tolist() == [0, 1, 2, 3] * 2


def test_a_channel_that_several_columns_read(axes: dict[str, Axes]) -> None:
    (keys, values) = made_by_a(axes["scale"], "grouped heads")
    assert str(keys.why("scale")).startswith("queries and keys are multiplied along it")
    (use,) = (use for use in values.uses if use.sums)
    assert use.channels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    (axis,) = made_by_a(axes["rotate"], "concatenated")
    assert [use.channels.tolist() for use in axis.uses if use.sums] == [[*range(8), *[-1] * 8]]


def test_a_norm_says_what_it_has_to_lose_before_a_rotation(axes: dict[str, Axes]) -> None:
    (axis,) = made_by_a(axes["rotate"], "norm")
    assert str(axis.why("rotate")).startswith("a norm multiplies each channel by a weight of its own (node layer_norm")
    (output,) = axes["rotate"].of(f"paths.{place('norm')}.b.weight", 1)
    assert output is not axis and output.free("fold") and not output.free("rotate")
    (plain,) = made_by_a(axes["rotate"], "plain norm")
    assert plain in axes["rotate"].of(f"paths.{place('plain_norm')}.b.weight", 1)


def test_the_bias_of_a_norm_does_not_arrive_everywhere(axes: dict[str, Axes]) -> None:
    stopped = {name for name in PATHS if any(a.why("offset") for a in made_by_a(axes["rotate"], name))}
    assert {"number", "residual", "zeros behind", "sum so far", "heads", "weight of each token"} <= stopped
    assert not stopped & {"nothing", "mean of tokens", "one token", "rolled", "concatenated", "flat tokens", "half"}


def test_an_unknown_operator_pins_its_own_weights(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.linear.default, unknown)
    found = find_axes(program, "scale").of(f"paths.{place('nothing')}.a.weight", 0)
    assert {str(axis.why("scale")).rpartition(" (")[0] for axis in found} == {
        "aten.linear.default is not known to treat all channels alike"
    }


def test_encoded_weights(reference: Callable[..., Any]) -> None:
    """The values of a pruned weight may be scaled, not mixed; codes may not be changed at all."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)), torch.randn(2, 32)
    pruned = reference(checks.lively(model), ["prune_nm"], (x,)).program
    (axis,) = find_axes(pruned, "scale").of("1.weight", 1)
    assert axis.free("scale")
    (axis,) = find_axes(pruned, "rotate").of("1.weight", 1)
    assert "the pattern of its zeros would not survive" in str(axis.why("fold"))
    quantised = reference(model, ["quantize:W8A16"], (x,)).program
    (axis,) = find_axes(quantised, "scale").of("1.weight", 1)
    assert "its weight is already stored as Affine(bits=8, group=0)" in str(axis.why("scale"))


# -- wrong rules are found ----------------------------------------------------------------------------------------


def _passes(w: Walk, node: fx.Node) -> Any:
    return list(w.of(operands(node)[0]))


def _reduced(w: Walk, node: fx.Node) -> Any:
    x = w.of(operands(node)[0])
    return [x[0], x[2]]


def _bias_follows(w: Walk, node: fx.Node) -> Any:
    x, weight = (w.of(value) for value in operands(node)[:2])
    w.same(x[-1], weight[1], node)
    w.broadcast(node, [weight[:1], w.given(node, 2, "bias")])
    w.reads(node, weight[1])
    w.writes(node, weight[0])
    return [*x[:-1], weight[0]]


def _heads_mixed(w: Walk, node: fx.Node) -> Any:
    q, k, v = (w.of(value) for value in operands(node)[:3])
    w.bend([*q, *k], node)
    return [*v[:2], q[2], v[3]]


def _handed_on(w: Walk, norm: Norm) -> Any:
    return list(w.of(norm.input))


def _side_by_side_once(axes: Axes, action: Action) -> list[tuple[Atom, ...]]:
    """Free atoms are one axis where they stand side by side for the first time, whether they do so again or not."""
    found: dict[Atom, tuple[Atom, ...]] = {}
    for cell in (cell for _, dims in axes._walk.stored for dim in dims for cell in cells(dim)):
        new = tuple(atom for atom in cell if atom not in found)
        free = tuple(atom for atom in new if action not in atom.pins)
        found |= {atom: free if atom in free else (atom,) for atom in new}
    return list(dict.fromkeys(found.values()))


_stacked = axis_views._stacked
#: planted rule → (owner, name or operator, what stands there instead, path and action that find it)
PLANTED: dict[str, tuple[Any, Any, Any, str, Action]] = {
    "an activation that is homogeneous": (RULES, aten.gelu.default, _passes, "gelu", "scale"),
    "an activation that is linear": (RULES, aten.gelu.default, _passes, "gelu", "rotate"),
    "a maximum that is linear": (RULES, aten.amax.default, _reduced, "largest token", "rotate"),
    "a bias that is scaled": (RULES, aten.linear.default, _bias_follows, "one bias for all heads", "scale"),
    "heads that are mixed": (RULES, aten.scaled_dot_product_attention.default, _heads_mixed, "heads", "rotate"),
    "a square that is scaled once": (Walk, "product", Walk.broadcast, "square", "scale"),
    "a norm that hands a scale on": (Walk, "_normed", _handed_on, "norm", "scale"),
    "a weight that is shared and has values of its own": (
        Walk, "_splits", lambda *_: True, "a weight read otherwise too", "rotate",
    ),
    "parts in another order": (
        axis_views, "_stacked", lambda *given: _stacked(*given)[::-1], "keys and values by views", "scale",
    ),
    "heads and width that part": (Axes, "_together", _side_by_side_once, "one layer for all heads", "scale"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_wrong_rules_are_found(planted: str, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, path, action = PLANTED[planted]
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, name, wrong)
    else:
        monkeypatch.setattr(owner, name, wrong)
    assert distances(program, action)[path] > 100 * TOLERANCE
