"""Channels: what may be scaled and rotated on each path between two layers, checked by doing it."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler import channels
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.capture import capture
from paretoc.compiler.channels import ChannelAxis, channel_axes
from paretoc.compiler.orthogonal import rotation
from paretoc.compiler.weights import Operand, WeightEdits
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten
BATCH, TOKENS, WIDTH = 2, 5, 8


class Path(nn.Module):
    """b(path(a(x))): eight channels on their way from one layer to the next."""

    def __init__(self, path) -> None:
        super().__init__()
        self.a, self.other, self.path = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH), path
        self.vector, self.position = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.b, self.wide = nn.Linear(WIDTH, 3), nn.Linear(2 * WIDTH, 3)
        self.narrow = nn.Linear(WIDTH // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self, self.a(x), x)


def heads(m, v, x):
    """Attention over tokens, two heads."""
    v = v.reshape(BATCH, TOKENS, 2, 4).transpose(1, 2)
    q = m.other(x).reshape(BATCH, TOKENS, 2, 4).transpose(1, 2)
    return m.b(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).reshape(BATCH, TOKENS, WIDTH))


def grouped(m, v, x):
    """Two query heads share a key-value head of width 4; the other four channels are keys."""
    k, v = (half.unsqueeze(1).expand(BATCH, 2, TOKENS, 4) for half in v.chunk(2, -1))
    q = m.other(x).reshape(BATCH, TOKENS, 2, 4).transpose(1, 2)
    return m.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(BATCH, TOKENS, WIDTH))


def gated(m, v, x):
    left, right = v.chunk(2, -1)
    return m.narrow(left * torch.sigmoid(right))


#: path → how many of the channels of `a` may be scaled, and rotated
PATHS = {
    "nothing": (lambda m, v, x: m.b(v), 8, 8),
    "number": (lambda m, v, x: m.b(-v * 3 / 2), 8, 8),
    "relu": (lambda m, v, x: m.b(F.relu(v)), 8, 0),
    "gelu": (lambda m, v, x: m.b(F.gelu(v)), 0, 0),
    "square": (lambda m, v, x: m.b(v * v), 0, 0),
    "one more": (lambda m, v, x: m.b(v + 1), 0, 0),
    "gate": (lambda m, v, x: m.b(v * torch.sigmoid(m.other(x))), 8, 0),
    "gate of its own": (gated, 4, 0),
    "over": (lambda m, v, x: m.b(torch.sigmoid(m.other(x)) / v), 0, 0),
    "vector": (lambda m, v, x: m.b(v * m.vector), 8, 0),
    "weight of each token": (lambda m, v, x: m.b(v * x[:, :, :1]), 8, 8),
    "residual": (lambda m, v, x: m.b(v + m.other(x)), 8, 8),
    "position": (lambda m, v, x: m.b(v + m.position), 8, 8),
    "unknown summand": (lambda m, v, x: m.b(v + F.pad(x, (0, 2))), 0, 0),
    "mean of tokens": (lambda m, v, x: m.b(v.mean(1)), 8, 8),
    "mean of channels": (lambda m, v, x: m.b(v - v.mean(-1, keepdim=True)), 0, 0),
    "largest token": (lambda m, v, x: m.b(v.amax(1)), 0, 0),
    "one token": (lambda m, v, x: m.b(v[:, 0]), 8, 8),
    "picked tokens": (lambda m, v, x: m.b(v[torch.arange(BATCH), x[:, :, 0].argmax(-1)]), 8, 8),
    "rolled": (lambda m, v, x: m.b(v.roll(1, 1)), 8, 8),
    "zeros behind": (lambda m, v, x: m.b(F.pad(v, (0, 0, 0, 2))), 8, 8),
    "zeros between channels": (lambda m, v, x: m.wide(F.pad(v, (3, 5))), 0, 0),
    "flat tokens": (lambda m, v, x: m.b(v.reshape(-1, WIDTH)).reshape(BATCH, TOKENS, 3), 8, 8),
    "half": (lambda m, v, x: m.narrow(v[..., :4]), 8, 8),
    "both halves in one": (lambda m, v, x: m.narrow(v.reshape(BATCH, -1, 4)), 0, 0),
    "concatenated": (lambda m, v, x: m.wide(torch.cat([v, m.other(x)], -1)), 8, 8),
    "more tokens": (lambda m, v, x: m.b(torch.cat([v, m.other(x)], 1)), 8, 8),
    "class token": (lambda m, v, x: m.b(torch.cat([m.position[:, :1].expand(BATCH, 1, WIDTH), v], 1)), 8, 8),
    "heads": (heads, 8, 8),
    "grouped heads": (grouped, 4, 4),
    "matmul": (lambda m, v, x: m.b(torch.softmax(x @ x.mT, -1) @ v), 8, 8),
    "keys": (lambda m, v, x: torch.softmax(v @ v.mT, -1) @ m.b(m.other(x)), 0, 0),
    "an output": (lambda m, v, x: m.b(v).sum(-1, keepdim=True) + v.max(), 0, 0),
    "two readers": (lambda m, v, x: m.b(v) + m.wide(torch.cat([v, v], -1)), 8, 8),
    "norm": (lambda m, v, x: m.b(F.layer_norm(v, (WIDTH,), m.vector)), 0, 8),
}


def place(name: str) -> str:
    return "through_" + name.replace(" ", "_")


class Paths(nn.Module):
    """All paths in one model, each with layers of its own: one capture serves all tests."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleDict({place(name): Path(path) for name, (path, *_) in PATHS.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [path(x) for path in self.paths.values()]


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    program = capture(Paths().eval(), torch.randn(BATCH, TOKENS, 6))
    canonicalize(program)
    return program


@pytest.fixture(scope="module")
def axes(program):
    return {action: channel_axes(program, action) for action in ("scale", "rotate")}


def weight(name: str) -> str:
    return f"paths.{place(name)}.a.weight"


def axis_of(axes: list[ChannelAxis], name: str) -> ChannelAxis:
    """The axis that layer `a` of a path writes."""
    return next(
        axis
        for axis in axes
        if any(use.operand.source and str(use.operand.source.target) == weight(name) for use in axis.writers)
    )


def changed(program, axis: ChannelAxis, action: str):
    """The program with the free channels changed: writers times M, readers times M⁻ᵀ, M random, block by block."""
    program, free, width = program.clone(), axis.free, axis.width if action == "rotate" else 1
    blocks = torch.stack([0.5 + torch.rand(1, 1, dtype=torch.float64) for _ in range(axis.size)])
    if action == "rotate":
        blocks = torch.stack([rotation(width, "random", 0)] * (axis.size // width))
    edits = WeightEdits(program)
    nodes = {n.name: n for n in program.graph.nodes}
    for uses, by in ((axis.writers, blocks), (axis.readers, blocks.inverse().mT)):
        for use in uses:
            operand = Operand(nodes[use.operand.node.name], use.operand.index, use.operand.leaf)
            value = edits[operand].movedim(use.dim, -1).clone()
            for start in range(0, len(use.channels), width):
                held = use.channels[start : start + width]
                if (held >= 0).all() and free[held].all():
                    place = slice(start, start + width)
                    value[..., place] = value[..., place] @ by[held[0] // width]
            edits[operand] = value.movedim(-1, use.dim)
    edits.commit()
    return program


def distance(program, other) -> float:
    pairs = zip(program.run(program.example), other.run(program.example), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", PATHS)
def test_what_may_be_changed_can_be_changed(program, axes, name):
    for action, count in zip(("scale", "rotate"), PATHS[name][1:], strict=True):
        axis = axis_of(axes[action], name)
        assert int(axis.free.sum()) == count, (action, list(map(str, axis.pins)))
        assert axis.readers or axis.pins or axis.norms
        whole = all(len(use.channels) % axis.width == 0 for use in axis.readers)
        if not axis.norms and (action == "scale" or whole):
            other = changed(program, axis, action)
            assert distance(program, other) < 1e-5, action
            assert not count or not torch.equal(other.get(weight(name)), program.get(weight(name)))


@pytest.mark.parametrize(
    ("rules", "target", "name", "action"),
    [
        ("_SAME", aten.gelu.default, "gelu", "scale"),
        ("_SAME", aten.gelu.default, "gelu", "rotate"),
        ("_MOVES", aten.amax.default, "largest token", "rotate"),
        ("_SAME", aten.sigmoid.default, "gate of its own", "scale"),
    ],
)
def test_a_wrong_rule_is_found(monkeypatch, program, rules, target, name, action):
    """What is measured above is not small when a rule is wrong."""
    monkeypatch.setattr(channels, rules, getattr(channels, rules) | {target})
    monkeypatch.setattr(channels._Walk, "_multiply", lambda self, node: self._of(node.args[0]))
    axis = axis_of(channel_axes(program, action), name)
    assert axis.free.all()
    assert distance(program, changed(program, axis, action)) > 1e-2


def test_a_forgotten_output_is_found(monkeypatch, program):
    monkeypatch.setattr(channels._Walk, "_pin", lambda *_: None)
    axis = axis_of(channel_axes(program, "scale"), "an output")
    assert distance(program, changed(program, axis, "scale")) > 1e-2


def test_heads_may_not_be_mixed(program, axes):
    axis = axis_of(axes["rotate"], "heads")
    assert axis.width == 4
    mixed = ChannelAxis(axis.size, axis.writers, axis.readers)
    assert mixed.width == 8
    assert distance(program, changed(program, mixed, "rotate")) > 1e-2


def test_a_pin_says_why_and_where(axes):
    (pin,) = axis_of(axes["scale"], "gelu").pins
    assert str(pin) == "aten.gelu.default does not commute with scaling (node gelu)"
    grouped_heads = axis_of(axes["scale"], "grouped heads")
    assert str(grouped_heads.pinned(torch.tensor([1]))).startswith("an attention compares queries and keys")
    assert grouped_heads.pinned(torch.tensor([4, 7])) is None


def test_a_channel_that_several_columns_read(axes):
    (use,) = axis_of(axes["scale"], "grouped heads").readers
    assert use.channels.tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    use = axis_of(axes["rotate"], "concatenated").readers[0]
    assert use.channels.tolist() == [*range(8), *[-1] * 8]


def test_a_convolution_writes_its_output_channels():
    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, WIDTH, 3), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).mean((2, 3)))

    program = capture(Picture().eval(), torch.randn(2, 3, 6, 6))
    canonicalize(program)
    scaled, rotated = (channel_axes(program, action)[0] for action in ("scale", "rotate"))
    assert scaled.free.all()
    assert distance(program, changed(program, scaled, "scale")) < 1e-5
    assert not rotated.free.any()
