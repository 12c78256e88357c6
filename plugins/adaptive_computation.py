"""W₂·act(W₁·x) → Σ_{n ≤ k(x)} W₂ₙ·act(W₁ₙ·x): a feed-forward layer of N learners, of which each token runs the first k.

Wójcik et al. 2025, "Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference", its first
two phases. The learners are F/N of the hidden channels each, most important first. Per layer, on a sample of its inputs
z and outputs o from calibration data:
    1. the learners are distilled: min mean_k ‖h(z, k) − o‖²
    2. labels: k(z) = argmin_k ‖h(z, k) − o‖² + λk, the price λ such that mean k is the budget; a gate, an MLP on z with
       16 hidden units, is trained on them by cross-entropy
The paper labels by a threshold on ‖h(z, k) − o‖/‖h(z, k − 1) − o‖ and meets the budget by training the whole model on
its task; here no task is needed. Lossy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..compiler.axis_moves import slice_all, take
from ..compiler.errors import CalibrationError, OptionError
from ..compiler.feed_forward import FeedForward, FeedForwardPass, sorted_channels
from ..compiler.passes import Context, PassResult
from ..compiler.program import Program, operands, shape_of
from ..compiler.statistics import Sample, Statistic

aten = torch.ops.aten
FORMS = ("ranked", "masked", "uniform")
#: hidden units of a gate
_GATE = 16
#: shares of tokens are multiples of one in so many
_PARTS = 1024
#: rows of a step, and the share of the sample that is held out for the report
_BATCH, _HELD_OUT = 256, 0.25
#: a layer that saw fewer rows is not trained
_LEAST_ROWS = 16


@dataclass(frozen=True)
class AdaptiveComputation(FeedForwardPass):
    """`budget` is the mean share of the `learners` that a token runs.

    `form` "ranked": of the tokens of a call, those run learner n whom the gate expects to need most, always the same
    share of them. Fewer products on every target, and a budget that data cannot exceed; what a token runs depends on
    the others of the call, in a causal model on later ones too. "masked": each token runs the k that its gate says, by
    itself, as in the paper; what is masked is computed all the same, and the budget drifts with the data. "uniform": no
    gate, every token runs the same learners, those that the budget holds: a narrower layer, to compare with.
    `steps` of Adam for the learners, and for the gate, on the first `rows` tokens that a layer sees.
    """

    name: ClassVar[str] = "adaptive_computation"
    positional: ClassVar[str | None] = "budget"
    needs_calibration: ClassVar[bool] = True

    budget: float = 0.5
    learners: int = 4
    form: str = "ranked"
    steps: int = 300
    rate: float = 1e-3
    rows: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise OptionError(
                f"there is no form {self.form!r}", where="pass 'adaptive_computation'", fix=f"use {' or '.join(FORMS)}"
            )
        if self.learners < 2 or not 1 / self.learners <= self.budget <= 1 or self.steps < 0 or self.rows < _LEAST_ROWS:
            raise OptionError(
                f"a budget of {self.budget} of {self.learners} learners, steps={self.steps}, rows={self.rows}: invalid",
                where="pass 'adaptive_computation'",
                fix="use 2 learners or more, a budget from one of them up to 1, 0 steps or more, 16 rows or more",
            )

    def needs(self, program: Program) -> list[Statistic]:
        return [s for layer in self.layers(program)[0] for s in self._samples(layer)]

    def _samples(self, layer: FeedForward) -> tuple[Sample, Sample]:
        """Of its inputs and outputs, the same rows."""
        inputs, outputs = layer.input.name, layer.site.down.name
        return Sample(inputs, self.rows, per_batch=self.rows), Sample(outputs, self.rows, per_batch=self.rows)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        layers, skipped = self.layers(program)
        skipped |= {layer.path: why for layer in layers if (why := self._refuse(layer))}
        layers = [layer for layer in layers if layer.path not in skipped]
        orders = sorted_channels(layers, "activation", ctx)
        slice_all(program, {layer.axis: order for layer, order in zip(layers, orders, strict=True)})
        reports = []
        for layer in ctx.track(layers, self.name):
            inputs, outputs = (ctx.statistic(sample)[0] for sample in self._samples(layer))
            module = Learners(program, layer, self.learners)
            reports.append(self.train(module, inputs, outputs, ctx.seed))
            (_mask if self.form == "masked" else _rank)(program, module)
        program.refresh()
        metrics = {key: sum(r[key] for r in reports) / len(reports) for key in (reports[0] if reports else {})}
        return PassResult([layer.path for layer in layers], skipped, metrics)

    def train(self, module: Learners, inputs: Tensor, outputs: Tensor, seed: int) -> dict[str, float]:
        """Distil the learners and train the gate, on inputs and outputs `[R, C]`; what held-out rows say."""
        if len(inputs) < _LEAST_ROWS:
            raise CalibrationError(
                f"{module.layer.path!r} saw {len(inputs)} tokens, too few to train {self.learners} learners on",
                where="pass 'adaptive_computation'",
                fix=f"pass calibration= of {_LEAST_ROWS} tokens or more",
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(inputs), generator=generator)
        held, kept = order.tensor_split([int(_HELD_OUT * len(order))])
        start = module.errors(inputs[held], outputs[held])

        def batches() -> list[Tensor]:
            size = min(_BATCH, len(kept))
            return [kept[torch.randint(len(kept), (size,), generator=generator)] for _ in range(self.steps)]

        _descend(module.weights.values(), self.rate, batches(), lambda b: module.errors(inputs[b], outputs[b]).mean())
        if self.form == "uniform":
            module.shares = [float(n < int(self.budget * self.learners + 1e-9)) for n in range(self.learners)]
            return {"relative error": module.uniform(module.errors(inputs[held], outputs[held]), outputs[held])}
        labels = cheapest(module.errors(inputs[kept], outputs[kept]), self.budget)
        module.shares = [float((labels >= n).float().mean()) for n in range(self.learners)]
        module.start_gate(inputs[kept], generator)
        position = torch.empty(len(inputs), dtype=torch.int64).index_copy_(0, kept, labels)
        gate = module.gate.values()
        _descend(gate, 10 * self.rate, batches(), lambda b: F.cross_entropy(module.logits(inputs[b]), position[b]))
        return module.report(inputs[held], outputs[held], start)

    def _refuse(self, layer: FeedForward) -> str:
        if layer.axis.size < self.learners:
            return f"it has {layer.axis.size} hidden channels for {self.learners} learners"
        chain = _chain(layer)
        if any(len(read.users) > 1 for read in _stored([*chain, layer.site.down])):
            return "something else reads its weights too"
        return "" if chain else "it reads something beside its input"


def _chain(layer: FeedForward) -> list[fx.Node]:
    """The nodes from a layer's input to its hidden channels, in order; none when they read anything else."""
    source, found, queue = layer.input, set(), [layer.hidden]
    while queue:
        node = queue.pop()
        if node.op == "call_function" and node is not source and node not in found:
            found.add(node)
            queue += node.all_input_nodes
        elif node.op == "placeholder" and node is not source:
            return []
    return [node for node in layer.site.down.graph.nodes if node in found]


def _stored(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The parameters that nodes read."""
    return [read for node in nodes for read in node.all_input_nodes if read.op == "get_attr"]


class Learners:
    """A feed-forward layer as N learners: h(z, k) = b₂ + Σ_{n ≤ k} W₂ₙ·act(W₁ₙ·z), with a gate.

    `weights` are the layer's parameters, by name, in float32; the hidden channels of learner n are those from
    `bounds[n]` to `bounds[n + 1]`; `shares[n]` is how many of the tokens run it.
    """

    def __init__(self, program: Program, layer: FeedForward, count: int) -> None:
        self.layer, self.nodes = layer, _chain(layer)
        names = [str(read.target) for read in _stored([*self.nodes, layer.site.down])]
        self.weights = {name: program.get(name).detach().float().clone() for name in names}
        self.bounds = [round(n * layer.axis.size / count) for n in range(count + 1)]
        self.gate: dict[str, Tensor] = {}
        self.shares = [1.0] * count

    def hidden(self, z: Tensor) -> Tensor:
        """z `[R, C]` → `[R, F]`."""
        values = {self.layer.input: z} | {read: self.weights[str(read.target)] for read in _stored(self.nodes)}
        for node in self.nodes:
            args, kwargs = fx.node.map_arg((operands(node), node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[self.layer.hidden]

    def outputs(self, z: Tensor) -> Tensor:
        """h(z, 1) … h(z, N): `[N, R, C]`."""
        _, down, *bias = operands(self.layer.site.down)
        hidden, weight = self.hidden(z), self.weights[str(down.target)]
        parts = [hidden[:, a:b] @ weight[:, a:b].T for a, b in pairwise(self.bounds)]
        total = torch.stack(parts).cumsum(0)
        return total + self.weights[str(bias[0].target)] if bias and bias[0] is not None else total

    def errors(self, z: Tensor, o: Tensor) -> Tensor:
        """‖h(z, k) − o‖² `[N, R]`."""
        return (self.outputs(z) - o).square().sum(-1)

    def start_gate(self, z: Tensor, generator: torch.Generator) -> None:
        """Inputs of the gate are brought to mean 0 and variance 1 by its first layer."""
        mean, deviation = z.mean(0), z.std(0, correction=0).clamp(min=1e-6)
        first = torch.randn(_GATE, z.shape[1], generator=generator) / z.shape[1] ** 0.5 / deviation
        last = torch.zeros(len(self.shares), _GATE)
        self.gate = {"0.weight": first, "0.bias": -first @ mean, "1.weight": last, "1.bias": last[:, 0].clone()}

    def logits(self, z: Tensor) -> Tensor:
        """Of k = 1 … N: `[R, N]`."""
        gate = self.gate
        return F.linear(F.gelu(F.linear(z, gate["0.weight"], gate["0.bias"])), gate["1.weight"], gate["1.bias"])

    def uniform(self, errors: Tensor, o: Tensor) -> float:
        """The relative error when all tokens run as many learners as they do on average."""
        cost = sum(self.shares) - 1  # counted from 0
        low, part = int(cost), cost - int(cost)
        between = (1 - part) * errors[low] + part * errors[min(low + 1, len(errors) - 1)]
        return sqrt(between.sum() / o.square().sum())

    def report(self, z: Tensor, o: Tensor, start: Tensor) -> dict[str, float]:
        """Relative errors of the outputs: with the k of the gate, with the same k for all tokens at the same cost, and
        that before distillation; and the mean share of the learners that the gate asks for."""
        errors = self.errors(z, o)
        chosen = self.logits(z).argmax(1)
        return {
            "relative error": sqrt(errors.gather(0, chosen[None]).sum() / o.square().sum()),
            "relative error, equal for all tokens": self.uniform(errors, o),
            "relative error, equal for all tokens, not distilled": self.uniform(start, o),
            "share of learners": float((chosen + 1).float().mean()) / len(self.shares),
        }


def _descend(
    parameters: Iterable[Tensor], rate: float, batches: list[Tensor], loss: Callable[[Tensor], Tensor]
) -> None:
    """Adam, the rate falling to nothing; in place."""
    leaves = list(parameters)
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        optimiser = torch.optim.Adam(leaves, rate)
        for step, batch in enumerate(batches):
            optimiser.param_groups[0]["lr"] = rate * (1 - step / len(batches))
            optimiser.zero_grad()
            loss(batch).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for leaf in leaves:
        leaf.requires_grad_(False)


def cheapest(errors: Tensor, budget: float) -> Tensor:
    """errors `[N, R]` → the number of learners of each token, from 0 for one, int64 `[R]`: argmin_k error + λ·k with
    the least price λ ≥ 0 at which the mean share is within the budget, found by bisection."""
    count = torch.arange(len(errors), dtype=torch.float64)[:, None]
    limit = budget * len(errors) - 1 + 1e-9

    def choose(price: float) -> Tensor:
        return (errors.double() + price * count).argmin(0)

    low, high = 0.0, float(errors.max()) + 1.0
    if choose(low).double().mean() <= limit:
        return choose(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(middle).double().mean() <= limit else (middle, high)
    return choose(high)


# -- the graph --------------------------------------------------------------------------------------------------------


class _Writer:
    """Puts nodes in front of the last linear layer of a feed-forward layer."""

    def __init__(self, program: Program, module: Learners) -> None:
        self.program, self.module, self.layer = program, module, module.layer
        self.down = self.layer.site.down

    def call(self, target: Any, *args: Any) -> fx.Node:
        with self.program.graph.inserting_before(self.down):
            node = self.program.graph.call_function(target, args)
        node.meta["nn_module_stack"] = self.down.meta.get("nn_module_stack")
        return node

    def store(self, name: str, value: Tensor) -> fx.Node:
        value = value.to(self.down.meta["val"].dtype) if value.is_floating_point() else value
        return self.program.attribute(name, value.contiguous(), before=self.down)

    def gate(self, z: fx.Node) -> fx.Node:
        """z `[…, C]` → logits `[…, N]`."""
        weights = {key: self.store(f"{self.layer.path}.gate.{key}", value) for key, value in self.module.gate.items()}
        hidden = self.call(aten.linear.default, z, weights["0.weight"], weights["0.bias"])
        return self.call(
            aten.linear.default, self.call(aten.gelu.default, hidden), weights["1.weight"], weights["1.bias"]
        )

    def learners(self, number: int, channels: range, z: fx.Node) -> fx.Node:
        """The learners of some hidden channels; the first ones have the bias."""
        _, weight, *bias = operands(self.down)
        mapping: dict[Any, fx.Node] = {self.layer.input: z}
        for read in _stored([*self.module.nodes, self.down]):
            if number == 0 or read not in bias:
                owner, _, leaf = str(read.target).rpartition(".")
                value = self.module.weights[str(read.target)]
                value = take(self.layer.axis, str(read.target), value, torch.tensor(channels))
                mapping[read] = self.store(f"{owner}.learners.{number}.{leaf}", value)
        for node in self.module.nodes:
            with self.program.graph.inserting_before(self.down):
                mapping[node] = self.program.graph.node_copy(node, mapping.__getitem__)
        return self.call(aten.linear.default, mapping[self.layer.hidden], mapping[weight], *map(mapping.get, bias))


def _mask(program: Program, module: Learners) -> None:
    """Hidden channels of learners beyond k(z) are set to 0."""
    write = _Writer(program, module)
    for name, value in module.weights.items():
        program.set(name, value.to(program.get(name).dtype))
    sizes = torch.tensor([b - a for a, b in pairwise(module.bounds)])
    learner = torch.arange(len(sizes)).repeat_interleave(sizes)
    last = write.call(aten.argmax.default, write.gate(write.layer.input), -1, True)
    runs = write.call(aten.le.Tensor, write.store(f"{write.layer.path}.learner", learner), last)
    write.down.update_arg(0, write.call(aten.where.ScalarOther, runs, write.layer.hidden, 0.0))


def _rank(program: Program, module: Learners) -> None:
    """All tokens run the first learners, ⌈share · tokens⌉ of them each further one: those of the largest mean k."""
    write, z = _Writer(program, module), module.layer.input
    rows = write.call(aten.reshape.default, z, [-1, shape_of(z)[-1]])
    (channels, _), *further = _segments(module)
    total = write.learners(0, channels, rows)
    tokens = write.call(aten.sym_size.int, rows, 0)
    order = _order(write, rows, tokens) if further else None
    for number, (channels, parts) in enumerate(further, start=1):
        whole = write.call(operator.add, write.call(operator.mul, tokens, parts), _PARTS - 1)
        count = write.call(operator.floordiv, whole, _PARTS)
        index = write.call(aten.slice.Tensor, order, 0, 0, count)
        part = write.learners(number, channels, write.call(aten.index_select.default, rows, 0, index))
        total = write.call(aten.index_put.default, total, [index], part, True)
    if (rank := len(shape_of(z))) != 2:
        sizes = [write.call(aten.sym_size.int, z, axis) for axis in range(rank - 1)]
        total = write.call(aten.reshape.default, total, [*sizes, shape_of(write.down)[-1]])
    write.down.replace_all_uses_with(total)
    program.graph.erase_node(write.down)


def _order(write: _Writer, rows: fx.Node, tokens: fx.Node) -> fx.Node:
    """The tokens by their mean k under the gate, the largest first `[S]`."""
    levels = torch.arange(1.0, len(write.module.shares) + 1)
    likely = write.call(aten.softmax.int, write.gate(rows), -1)
    score = write.call(aten.matmul.default, likely, write.store(f"{write.layer.path}.levels", levels))
    return write.call(operator.getitem, write.call(aten.topk.default, score, tokens), 1)


def _segments(module: Learners) -> list[tuple[range, int]]:
    """Hidden channels that the same tokens need, and how many parts of the tokens those are."""
    found: list[tuple[range, int]] = []
    for (start, stop), share in zip(pairwise(module.bounds), module.shares, strict=True):
        parts = round(share * _PARTS)
        if found and found[-1][1] == parts:
            found[-1] = range(found[-1][0].start, stop), parts
        elif parts:
            found.append((range(start, stop), parts))
    return found
