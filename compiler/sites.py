"""What the graph means: the places a pass can act on, each with the model's own names.

Linear, convolution, embedding and norm sites are single operators with a weight. Attention is either the fused
`scaled_dot_product_attention` or the `matmul → softmax → matmul` form. A feed-forward is two linears with an
activation between (or the gated form); a residual add closes a branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .dialect.activations import ROUNDING
from .program import Program, argument, describe, module_class, module_path, operands, shape_of
from .statistics import Window

aten = torch.ops.aten

LINEAR = (aten.linear.default,)
CONV = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)
EMBEDDING = (aten.embedding.default,)
BATCH_NORM = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
NORM = (aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default, *BATCH_NORM)
ACTIVATIONS = (aten.gelu.default, aten.relu.default, aten.silu.default, aten.hardswish.default, aten.relu6.default)
ADD = (aten.add.Tensor,)
SDPA = (aten.scaled_dot_product_attention.default,)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
MATMUL = (aten.matmul.default, aten.bmm.default)

_KINDS = {
    **dict.fromkeys(LINEAR, "linear"),
    **dict.fromkeys(CONV, "conv"),
    **dict.fromkeys(EMBEDDING, "embedding"),
    **dict.fromkeys(NORM, "norm"),
}


@dataclass(frozen=True)
class Site:
    """One operator that reads a weight. `path` is the parameter path without its last part ("…query")."""

    kind: str
    node: fx.Node
    path: str
    weight: fx.Node
    module_class: str

    @property
    def input(self) -> fx.Node:
        """The activation operand."""
        node = operands(self.node)[1 if self.kind == "embedding" else 0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def bias(self) -> fx.Node | None:
        bias = operands(self.node)[2] if self.kind in ("linear", "conv") and len(operands(self.node)) > 2 else None
        return bias if isinstance(bias, fx.Node) else None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(s) for s in shape_of(self.weight))

    @property
    def window(self) -> Window | None:
        """How a convolution slides; None for anything else."""
        if self.kind != "conv":
            return None
        rank = len(self.shape) - 2
        given = operands(self.node)[3:]
        stride, padding, dilation = (
            tuple(int(v) for v in (value if len(value) == rank else value * rank))
            for value in (*given[:3], *((1,), (0,), (1,))[len(given[:3]) :])
        )
        groups = given[-1] if len(given) in (4, 6) else 1
        return Window(self.shape[2:], stride, padding, dilation, int(groups))

    def describe(self) -> str:
        return f"{self.kind} {self.path!r}, {describe(self.node)}"


@dataclass(frozen=True)
class AttentionSite:
    """softmax(q·kᵀ·scale + mask)·v. q, k, v are `[B, H, T, D]` (or `[B·H, T, D]`) values."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    causal: bool
    softmax: fx.Node | None
    path: str

    @property
    def fused(self) -> bool:
        return self.softmax is None


@dataclass(frozen=True)
class FeedForwardSite:
    """down(act(up(x))), or down(act(gate(x)) · up(x))."""

    up: fx.Node
    activation: fx.Node
    down: fx.Node
    path: str


@dataclass(frozen=True)
class Block:
    """An attention with the residual add that closes its branch: where token reduction goes."""

    attention: AttentionSite
    residual: fx.Node


def weight_sites(program: Program) -> list[Site]:
    """Every operator that reads a weight, in graph order."""
    return [site for node in program.graph.nodes if (site := site_of(program, node)) is not None]


def site_of(program: Program, node: fx.Node) -> Site | None:
    """The site of an operator; None when it reads no weight."""
    kind = _KINDS.get(node.target) if isinstance(node.target, torch._ops.OpOverload) else None
    weight = None if kind is None else _weight_operand(node, kind)
    name = program.weight_name(weight)
    if kind is None or name is None or not isinstance(weight, fx.Node):
        return None
    return Site(kind, node, name.rpartition(".")[0], weight, module_class(node))


def _weight_operand(node: fx.Node, kind: str) -> Any:
    index = {"embedding": 0, "norm": 2}.get(kind, 1)
    if node.target in BATCH_NORM:
        index = 1
    if node.target is aten.convolution.default and operands(node)[6]:
        return None  # transposed: its weight is [C, O/groups, …]
    return operands(node)[index] if len(operands(node)) > index else None


def attention_sites(program: Program) -> list[AttentionSite]:
    return _attentions(program.graph)


def _attentions(graph: fx.Graph) -> list[AttentionSite]:
    sites = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in SDPA:
            sites.append(_fused_attention(node))
        elif node.target in SOFTMAX and (site := _open_attention(node)) is not None:
            sites.append(site)
    return sites


def attention_of(site: Site) -> AttentionSite | None:
    """The attention of the layer that a site is in: the one it projects to, otherwise the last before it."""
    last = None
    for attention in _attentions(site.node.graph):
        if site.node in _projections(attention):
            return attention
        if attention.node < site.node:
            last = attention
    return last


def _projections(attention: AttentionSite) -> set[fx.Node]:
    """The linear operators nearest before the queries, keys and values."""
    found: set[fx.Node] = set()
    queue, seen = [attention.query, attention.key, attention.value], set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in LINEAR:
            found.add(node)
        else:
            queue.extend(node.all_input_nodes)
    return found


def _fused_attention(node: fx.Node) -> AttentionSite:
    query, key, value = operands(node)[:3]
    mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    scale: Any = node.kwargs.get("scale") or float(shape_of(query)[-1]) ** -0.5
    return AttentionSite(node, query, key, value, mask, float(scale), bool(causal), None, module_path(node))


def _open_attention(softmax: fx.Node) -> AttentionSite | None:
    """Match matmul → (scale, mask)* → softmax → (copies)* → matmul around a softmax."""
    mask, scale = None, 1.0
    logits = operands(softmax)[0]
    while isinstance(logits, fx.Node) and logits.target not in MATMUL:
        if logits.target in ADD and mask is None and isinstance(operands(logits)[1], fx.Node):
            mask = operands(logits)[1]
        elif logits.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(operands(logits)[1], (int, float)):
            scale *= float(operands(logits)[1])
        elif logits.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(operands(logits)[1], (int, float)):
            scale /= float(operands(logits)[1])
        elif logits.target not in (aten.view.default, aten.reshape.default, aten.to.dtype, aten._to_copy.default):
            return None
        logits = operands(logits)[0]
    out = softmax
    while len(users := _real_users(out)) == 1 and out.target not in MATMUL:
        out = users[0]
        copies = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.view.default, aten.reshape.default)
        if out.target not in (*MATMUL, *copies, *ROUNDING):
            return None
    if not isinstance(logits, fx.Node) or out.target not in MATMUL:
        return None
    query, transposed = operands(logits)[:2]
    value = operands(out)[1]
    key = _untransposed(transposed)
    if key is None:
        return None
    return AttentionSite(out, query, key, value, mask, scale, False, softmax, module_path(softmax))


def _real_users(node: fx.Node) -> list[fx.Node]:
    """The users that compute something: not the assertions that a fresh capture holds."""
    return [u for u in node.users if not str(u.target).startswith("aten._assert")]


def _untransposed(node: Any) -> fx.Node | None:
    """What a transposition of the last two axes was applied to."""
    if not isinstance(node, fx.Node) or node.target not in (aten.transpose.int, aten.permute.default):
        return None
    rank = len(shape_of(node))
    axes = list(range(rank))
    axes[-2:] = axes[:-3:-1]
    if node.target is aten.transpose.int:
        swapped = {int(a) % rank for a in operands(node)[1:3]} == {rank - 1, rank - 2}
    else:
        swapped = [int(a) % rank for a in operands(node)[1]] == axes
    return operands(node)[0] if swapped else None


def feed_forward_sites(program: Program) -> list[FeedForwardSite]:
    sites = []
    for node in program.calls(*ACTIVATIONS):
        up = operands(node)[0]
        down = next(iter(node.users), None)
        if down is not None and down.target is aten.mul.Tensor:
            down = next(iter(down.users), None)
        if down is not None and down.target in LINEAR and isinstance(up, fx.Node) and up.target in LINEAR:
            sites.append(FeedForwardSite(up, node, down, module_path(down)))
    return sites


def blocks(program: Program) -> list[Block]:
    """Attention sites whose branch ends in a residual add, in graph order."""
    found = []
    for site in attention_sites(program):
        residual = _closing_add(site)
        if residual is not None:
            found.append(Block(site, residual))
    return found


def _closing_add(site: AttentionSite) -> fx.Node | None:
    """Follow the attention output along its only user to the add whose other operand did not come from it."""
    node = site.node
    for _ in range(16):
        users = _real_users(node)
        if len(users) != 1:
            return None
        node, previous = users[0], node
        if node.target in ADD and all(isinstance(a, fx.Node) for a in operands(node)[:2]):
            other = operands(node)[1] if operands(node)[0] is previous else operands(node)[0]
            if isinstance(other, fx.Node) and other.op != "get_attr" and _same_rank(other, node):
                return node
    return None


def _same_rank(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    return isinstance(left, Tensor) and isinstance(right, Tensor) and left.ndim == right.ndim


def residual_adds(program: Program) -> list[fx.Node]:
    """Adds that close a residual branch: one operand lies on every path to the other."""
    adds = []
    for node in program.calls(*ADD):
        summands = [a for a in operands(node)[:2] if isinstance(a, fx.Node) and a.op == "call_function"]
        if len(summands) == 2 and any(len(a.users) > 1 for a in summands):
            adds.append(node)
    return adds


def class_token(program: Program) -> fx.Node | None:
    """The `cat([token.expand(B, p, C), patches], dim=1)` that puts learned tokens in front, if the model has one."""
    for node in program.calls(aten.cat.default):
        parts = operands(node)[0]
        axis = operands(node)[1] if len(operands(node)) > 1 else 0
        if axis == 1 and isinstance(parts, (list, tuple)) and len(parts) >= 2 and _is_learned(parts[0]):
            return node
    return None


def protected_tokens(program: Program) -> int:
    """How many learned tokens (class, distillation, registers) stand in front of the sequence."""
    node = class_token(program)
    if node is None:
        return 0
    count = 0
    for part in operands(node)[0]:
        if not _is_learned(part):
            break
        count += int(shape_of(part)[1])
    return count


def _is_learned(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.target in (aten.expand.default, aten.repeat.default, aten.add.Tensor):
        node = operands(node)[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def walk_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """A node's ancestors, nearest first."""
    seen = {node}
    queue = [node]
    while queue:
        for parent in queue.pop(0).all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
                yield parent
