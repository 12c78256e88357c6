"""The move on the token axis: put a reduction behind attention blocks and carry the shorter axis to the outputs.

`insert` places nodes; `carry` then walks the graph once, in order: every operator that meets the shorter axis must be
known to act per token, every shape literal on that axis is rewritten, token means become size-weighted, and
whatever forbids the change is named. Unknown operators refuse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from .dialect.activations import ROUNDING
from .errors import PassError
from .program import Program, argument, describe, operands
from .protocols import TokenRule, TokenState
from .sites import SDPA, SOFTMAX, AttentionSite, Block, attention_sites, blocks, protected_tokens, walk_inputs

aten = torch.ops.aten

_POINTWISE = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.mul.Scalar),
    *(aten.gelu.default, aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default),
    *(aten.hardswish.default, aten.relu6.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.exp.default),
    *(aten.clone.default, aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.neg.default),
    *(aten.erf.default, aten.leaky_relu.default, aten.contiguous.default, aten.alias.default),
    *ROUNDING,
}
_PER_ROW = {aten.linear.default, aten.layer_norm.default, aten.rms_norm.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def token_blocks(program: Program) -> list[Block]:
    """The attention blocks of an encoder whose stream is `[B, T, C]` with a fixed T; PassError when there are none."""
    found = blocks(program)
    if not found:
        raise PassError(
            "the model has no attention block with a residual add behind it",
            where="looking for attention sites",
            fix="token reduction is for transformer encoders",
        )
    first = found[0].attention.key.meta["val"].shape[-2]
    for number, block in enumerate(found):
        if number and found[number - 1].residual not in walk_inputs(block.attention.key):
            raise PassError(
                "the keys of this attention do not come from the attention block before it",
                where=describe(block.attention.node),
                fix="token reduction is for one encoder, whose layers stand one behind the other",
            )
        stream = block.residual.meta["val"]
        if block.attention.key.meta["val"].ndim != 4:
            raise PassError(
                f"the keys of the attention have shape {[str(s) for s in block.attention.key.meta['val'].shape]}",
                where=describe(block.attention.node),
                fix="token reduction needs attention over [B, H, T, D]",
            )
        tokens = block.attention.key.meta["val"].shape[-2]
        if stream.ndim != 3 or stream.shape[1] != tokens:
            raise PassError(
                f"attention sees {tokens} tokens where the stream has shape {[str(s) for s in stream.shape]}",
                where=describe(block.residual),
                fix="token reduction needs global attention over a [B, T, C] stream",
            )
        if not isinstance(tokens, int):
            raise PassError(
                "the number of tokens is not fixed",
                where=describe(block.attention.node),
                fix="capture with a fixed sequence length (dynamic_shapes=) to reduce tokens by a fixed number",
            )
        if tokens != first:
            raise PassError(
                f"this attention sees {tokens} tokens and the first one sees {first}",
                where=describe(block.attention.node),
                fix="reduce the tokens of a model once, and only where every layer sees the same ones",
            )
        if block.attention.causal or block.attention.mask is not None:
            raise PassError(
                "the attention is causal" if block.attention.causal else "the attention has a mask over the tokens",
                where=describe(block.attention.node),
                fix="token reduction is for bidirectional encoders, captured without a mask",
            )
    return found


def insert(program: Program, rule: TokenRule, plan: Callable[[int, int, int], int]) -> list[tuple[Block, int, int]]:
    """Put `rule` behind the attention residual of every block where `plan(layer, tokens, protected)` removes tokens.

    Returns (block, tokens before, tokens after) for every block; then call `carry`.
    """
    found = token_blocks(program)
    protected = protected_tokens(program)
    tokens = int(found[0].attention.key.meta["val"].shape[-2])
    size: fx.Node | None = None
    trace = []
    for layer, block in enumerate(found):
        if size is not None:
            _weigh_keys(program, block.attention, size)
        remove = min(plan(layer, tokens, protected), max(rule.limit(tokens, protected), 0))
        if remove <= 0:
            trace.append((block, tokens, tokens))
            continue
        users = list(block.residual.users)
        state = TokenState(block.residual, size, block, tokens, protected)
        reduced = rule.emit(program, state, remove)
        block.residual.replace_all_uses_with(reduced.x, delete_user_cb=set(users).__contains__)
        reduced.x.meta.update(tokens=frozenset([1]), original=block.residual)
        if reduced.size is not None:
            reduced.x.meta["size"] = reduced.size
        size = reduced.size
        trace.append((block, tokens, reduced.tokens))
        tokens = reduced.tokens
    return trace


def _weigh_keys(program: Program, site: AttentionSite, size: fx.Node) -> None:
    """Proportional attention: add log(size) of each key to its logits (ToMe, equation 3)."""
    graph = program.graph
    with graph.inserting_before(site.softmax or site.node):
        bias = graph.call_function(aten.log.default, (size,))
        bias = graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.transpose.int, (bias, 1, 2)), 1))
        if site.softmax is None:
            if site.mask is not None:
                bias = graph.call_function(aten.add.Tensor, (site.mask, bias))
            arguments = list(operands(site.node)) + [None] * (4 - len(operands(site.node)))
            arguments[3] = bias
            site.node.args = tuple(arguments)
            site.node.kwargs = {k: v for k, v in site.node.kwargs.items() if k != "attn_mask"}
        else:
            logits = operands(site.softmax)[0]
            biased = graph.call_function(aten.add.Tensor, (logits, bias))
            bias.meta["tokens"] = frozenset([3])
            biased.meta["val"] = logits.meta["val"]
            site.softmax.update_arg(0, biased)


def carry(program: Program) -> None:
    """Rewrite everything behind the insertions for the shorter token axis, or say what forbids it."""
    _Carry(program).run(*(n.meta["val"] for n in program.placeholders))
    for node in program.graph.nodes:
        node.meta.pop("tokens", None)
        node.meta.pop("size", None)
        node.meta.pop("original", None)
    program.refresh()


class _Carry(fx.Interpreter):
    """Propagates shapes; `meta["tokens"]` of a node is the set of its dimensions that are the shorter token axis."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module, garbage_collect_values=False)  # a mean may need a size from far above
        self.extra_traceback = False  # our errors are three lines
        self.program = program
        self.before = {n: n.meta["val"] for n in program.graph.nodes if "val" in n.meta}
        self.protected = protected_tokens(program)
        self.attention = {n for site in attention_sites(program) for n in (site.node, site.softmax)}

    def run(self, *args: Any) -> Any:  # type: ignore[override]  # the base adds options that are not used here
        self.mode = args[0].fake_mode
        with self.mode, torch.no_grad():
            return super().run(*args)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.mode.from_tensor(super().get_attr(target, args, kwargs), static_shapes=True)

    def run_node(self, n: fx.Node) -> Any:
        shorter = [p for p in n.all_input_nodes if p.meta.get("tokens")]
        if shorter and n.op == "output":
            self._refuse(
                n, f"output {operands(n)[0].index(shorter[0])} has the token axis", "return pooled features only"
            )
        elif shorter and n in self.before:
            n.meta["tokens"] = self._rule(n)
            self._inherit_size(n, shorter)
        value = super().run_node(n)
        n.meta["val"] = value
        return value

    def _inherit_size(self, node: fx.Node, shorter: Sequence[fx.Node]) -> None:
        sizes = [p.meta["size"] for p in shorter if "size" in p.meta]
        if sizes and "size" not in node.meta and node.meta["tokens"] == frozenset([1]):
            node.meta["size"] = sizes[-1]

    def _refuse(self, node: fx.Node, why: str, fix: str) -> None:
        raise PassError(f"the token axis may not shrink: {why}", where=describe(node), fix=fix)

    def _rule(self, node: fx.Node) -> frozenset[int]:
        """The token dimensions of the node's result; rewrites its literals on the way."""
        first = operands(node)[0]
        target = node.target
        if target in _POINTWISE:
            return self._pointwise(node)
        if target in _PER_ROW and self._rank(first) - 1 in _tokens(first):
            self._refuse(
                node, "tokens lie on the axis that it sums over", "a projection along tokens fixes their number"
            )
        if target is operator.getitem or target in _PER_ROW:
            return _tokens(first)
        if target in SDPA:
            return self._attention(node)
        if target in (aten.matmul.default, aten.bmm.default):
            return self._matmul(node)
        if not isinstance(first, fx.Node) or not first.meta.get("tokens"):
            return self._unknown(node)
        rank = self._rank(first)
        axes: frozenset[int] = first.meta["tokens"]
        if target is aten.transpose.int:
            swap = {
                operands(node)[1] % rank: operands(node)[2] % rank,
                operands(node)[2] % rank: operands(node)[1] % rank,
            }
            return frozenset(swap.get(a, a) for a in axes)
        if target is aten.permute.default:
            order = [d % rank for d in operands(node)[1]]
            return frozenset(order.index(a) for a in axes)
        if target is aten.unsqueeze.default:
            at = operands(node)[1] % (rank + 1)
            return frozenset(a + (a >= at) for a in axes)
        if target in _VIEWS:
            return self._view(node, axes)
        if target is aten.expand.default:
            return self._expand(node, axes)
        if target in SOFTMAX:
            if operands(node)[1] % rank in axes and node not in self.attention:
                self._refuse(node, "it normalises over the tokens", "only the softmax of an attention may do that")
            return axes
        if target in (aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.mean.dim) or target in _SPLITS:
            return self._reducing(node, axes, rank)
        return self._unknown(node)

    def _unknown(self, node: fx.Node) -> frozenset[int]:
        self._refuse(
            node,
            f"{node.target} is not known to act on each token by itself",
            "end token reduction before this node with layers=, or leave this model out",
        )
        return frozenset()

    def _rank(self, node: fx.Node) -> int:
        return int(node.meta["val"].ndim)

    def _pointwise(self, node: fx.Node) -> frozenset[int]:
        rank = self.before[node].ndim
        axes: set[int] = set()
        tensors = [a for a in operands(node) if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
        for operand in tensors:
            shift = rank - self._rank(operand)
            axes |= {a + shift for a in operand.meta.get("tokens", ())}
        for operand in tensors:
            shift = rank - self._rank(operand)
            shape, own = operand.meta["val"].shape, operand.meta.get("tokens", ())
            stale = [a for a in axes if a >= shift and a - shift not in own and shape[a - shift] != 1]
            if stale:
                self._refuse(
                    node,
                    f"it combines with {operand.name}, which still has all {shape[stale[0] - shift]} tokens",
                    "a position table or mask that is added behind the reduction is not supported",
                )
        return frozenset(axes)

    def _attention(self, node: fx.Node) -> frozenset[int]:
        query, key, value = operands(node)[:3]
        mask = argument(node, 3, "attn_mask")
        if argument(node, 5, "is_causal", False):
            self._refuse(node, "the attention is causal", "token reduction is for bidirectional encoders")
        old_mask = isinstance(mask, fx.Node) and mask in self.before and self.before[mask].shape[-1] != 1
        if old_mask and not mask.meta.get("tokens"):
            self._refuse(node, "its attention mask has the token axis", "capture the model without a mask")
        rank = self._rank(operands(node)[0])
        for operand in (query, key, value):
            extra = operand.meta.get("tokens", frozenset()) - {rank - 2}
            if extra:
                self._refuse(node, "tokens lie on the head or channel axis", "this attention layout is not supported")
        return _tokens(query)

    def _matmul(self, node: fx.Node) -> frozenset[int]:
        left, right = operands(node)[:2]
        rank = self._rank(left)
        a, b = left.meta.get("tokens", frozenset()), right.meta.get("tokens", frozenset())
        if (rank - 1 in a) != (rank - 2 in b):
            self._refuse(
                node, "a product over tokens meets a fixed size", "a projection along tokens fixes their number"
            )
        if rank - 1 in a and node not in self.attention:
            self._refuse(node, "it sums over the tokens", "only the product of an attention may do that")
        return frozenset({x for x in a if x != rank - 1} | {x for x in b if x == rank - 1})

    def _view(self, node: fx.Node, axes: frozenset[int]) -> frozenset[int]:
        """A view keeps the token axis when one output dimension has the same extent and the same stride of elements."""
        source = operands(node)[0]
        assert isinstance(source, fx.Node)
        old_in, old_out = self._old_shape(source), list(self.before[node].shape)
        moved = {}
        for axis in axes:
            inner = prod(_hints(old_in[axis + 1 :]))
            match = [
                d
                for d, size in enumerate(old_out)
                if _hints([size]) == _hints([old_in[axis]]) and prod(_hints(old_out[d + 1 :])) == inner
            ]
            if not match:
                self._refuse(
                    node,
                    f"a view from {_shown(old_in)} to {_shown(old_out)} mixes tokens with another axis",
                    "models that fold tokens into windows or a grid need all of them",
                )
            moved[axis] = match[0]
        literal = list(operands(node)[1])
        for axis, target in moved.items():
            if isinstance(literal[target], int) and literal[target] != -1:
                literal[target] = source.meta["val"].shape[axis]
        node.update_arg(1, literal)
        return frozenset(moved.values())

    def _old_shape(self, node: fx.Node) -> list[Any]:
        """The shape a node had before the reduction (a reduced stream: that of the token axis it replaced)."""
        if node in self.before:
            return list(self.before[node].shape)
        shape = list(node.meta["val"].shape)
        if (original := node.meta.get("original")) is not None:
            shape[1] = self.before[original].shape[1]
        return shape

    def _expand(self, node: fx.Node, axes: frozenset[int]) -> frozenset[int]:
        source = operands(node)[0]
        assert isinstance(source, fx.Node)
        shift = len(operands(node)[1]) - self._rank(source)
        literal = list(operands(node)[1])
        for axis in axes:
            if isinstance(literal[axis + shift], int) and literal[axis + shift] != -1:
                literal[axis + shift] = source.meta["val"].shape[axis]
        node.update_arg(1, literal)
        return frozenset(a + shift for a in axes)

    def _reducing(self, node: fx.Node, axes: frozenset[int], rank: int) -> frozenset[int]:
        target, source = node.target, operands(node)[0]
        if target is aten.mean.dim:
            return self._mean(node, axes, rank)
        position = 2 if target in _SPLITS else 1
        axis = (operands(node)[position] if len(operands(node)) > position else 0) % rank
        if axis not in axes:
            dropped = target in (aten.select.int, aten.unbind.int)
            return frozenset(a - (dropped and a > axis) for a in axes)
        if target is aten.select.int and 0 <= operands(node)[2] < max(self.protected, 0):
            return frozenset(a - (a > axis) for a in axes if a != axis)
        if target is aten.slice.Tensor:
            start = operands(node)[2] if len(operands(node)) > 2 and operands(node)[2] is not None else 0
            end = operands(node)[3] if len(operands(node)) > 3 and operands(node)[3] is not None else 1 << 62
            step = operands(node)[4] if len(operands(node)) > 4 else 1
            old = self._old_shape(source)[axis]
            if step == 1 and 0 <= start <= end <= self.protected:
                return frozenset(a for a in axes if a != axis)
            if step == 1 and 0 <= start <= self.protected and isinstance(end, int) and end >= old:
                self._slice_size(node, source, start)
                return axes
        self._refuse(
            node,
            f"{node.target} picks tokens by position",
            f"only the {self.protected} leading class tokens keep their place",
        )
        return frozenset()

    def _slice_size(self, node: fx.Node, source: fx.Node, start: int) -> None:
        if start and "size" in source.meta:
            with self.program.graph.inserting_before(node):
                size = self.program.graph.call_function(aten.slice.Tensor, (source.meta["size"], 1, start, 1 << 62))
            self._run_new([size])
            node.meta["size"] = size

    def _mean(self, node: fx.Node, axes: frozenset[int], rank: int) -> frozenset[int]:
        """mean over tokens → Σ size·x / Σ size, so that every original token counts once."""
        dims = sorted(d % rank for d in operands(node)[1])
        keep = bool(operands(node)[2]) if len(operands(node)) > 2 else False
        if not axes & set(dims):
            return frozenset(a - (0 if keep else sum(d < a for d in dims)) for a in axes)
        source = operands(node)[0]
        assert isinstance(source, fx.Node)
        size = source.meta.get("size")
        if dims != [1] or axes != frozenset([1]):
            self._refuse(node, "tokens are averaged together with another axis", "pool over tokens alone")
        if size is not None:
            graph = self.program.graph
            with graph.inserting_before(node):
                weighted = graph.call_function(aten.mul.Tensor, (source, size))
                total = graph.call_function(aten.sum.dim_IntList, (weighted, [1], keep))
                count = graph.call_function(aten.sum.dim_IntList, (size, [1], keep))
                mean = graph.call_function(aten.div.Tensor, (total, count))
            self._run_new([weighted, total, count, mean])
            node.replace_all_uses_with(mean)
        return frozenset()

    def _run_new(self, nodes: Sequence[fx.Node]) -> None:
        """Evaluate nodes inserted behind the interpreter's back."""
        for node in nodes:
            self.env[node] = node.meta["val"] = fx.Interpreter.run_node(self, node)


def _tokens(node: fx.Node) -> frozenset[int]:
    """The dimensions of a value that are the shorter token axis."""
    found: frozenset[int] = node.meta.get("tokens", frozenset())
    return found


def _shown(shape: Sequence[Any]) -> str:
    return str([str(size) for size in shape])


def _hints(sizes: Sequence[Any]) -> list[int]:
    return [s if isinstance(s, int) else int(s.node.hint) for s in sizes]
