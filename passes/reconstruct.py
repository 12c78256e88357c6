"""min ‖B̂(x̂) − B(x)‖² block by block: rounding, scales, tables and biases of a block learned together by gradient.

B is a block before quantisation on its own inputs x, B̂ the stored block on the inputs x̂ that the stored blocks before
it give. Li et al. 2021, "BRECQ", section 3 (the block as the unit of reconstruction); Cheng et al. 2024, "Optimize
Weight Rounding via Signed Gradient Descent" (rounding and ranges together, by the sign of the gradient, in steps that
fall to zero). Gradients pass rounding straight through. Lossy; it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..compiler.calibrate import Stream
from ..compiler.encodings import Affine, Arrays, Encoding, Parameters
from ..compiler.errors import OptionError, PassError
from ..compiler.passes import Context, PassResult, Phase, SitePass
from ..compiler.program import Program
from ..compiler.sites import Site, weight_sites


@dataclass(frozen=True)
class Reconstruct(SitePass):
    """Learn what the stored weights of a block hold, against the block as it was before the first quantisation.

    A block is `branches` residual branches in a row: 2 are a transformer layer, 0 is the whole model; a layer outside
    all branches is a block of its own. Each sees `steps` batches. `rate` is how far the first step goes, in codes, or
    as a share of a scale or table; the steps shrink to nothing. Integer codes move, every stored array of floating
    point, and biases. A block that is no nearer afterwards, on the calibration data, stays as it was.
    """

    name: ClassVar[str] = "reconstruct"
    phase: ClassVar[Phase] = Phase.LOWER
    before: ClassVar[tuple[str, ...]] = ("correct_bias",)
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    needs_calibration: ClassVar[bool] = True
    positional: ClassVar[str | None] = "steps"

    steps: int = 200
    branches: int = 2
    rate: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, valid, fix in (
            ("steps", self.steps >= 1, "use a number of batches such as 200"),
            ("branches", self.branches >= 0, "use 2 for a transformer layer, 0 for the whole model"),
            ("rate", self.rate > 0, "use a share of a code such as 0.005"),
        ):
            if not valid:
                raise OptionError(f"{option}={getattr(self, option)} is not valid", where="pass 'reconstruct'", fix=fix)

    def apply(self, program: Program, ctx: Context) -> PassResult:
        if ctx.reference is None:
            raise PassError(
                "there is nothing to compare with: no pass has quantised the model",
                where="pass 'reconstruct'",
                fix="put it behind quantize",
            )
        result, errors = PassResult(), []
        exact, stored = Stream(ctx.reference, ctx.batches), Stream(program, ctx.batches)
        chosen = {site.node: site for site in self.sites(program)}
        for block in ctx.track(list(_blocks(program, ctx.reference, self.branches)), self.name):
            learned = _Learned(program, ctx.reference, block)
            for site in (chosen[node] for node in block.sites if node in chosen):
                if reason := learned.add(site):
                    result.skipped[site.path] = reason
                else:
                    result.matched.append(site.path)
            if learned.weights:
                errors.append(self._learn(learned, _Problem(block, stored, exact), ctx.seed))
        if not errors:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(result.skipped.items())[:3])
            raise PassError(
                f"no weight can be learned: {reasons}",
                where="pass 'reconstruct'",
                fix="widen targets=, or put it behind a quantize that stores them",
            )
        before, after = torch.tensor(errors).mean(0).tolist()
        result.metrics = {"block error before": before, "block error after": after}
        return result

    def _learn(self, learned: _Learned, problem: _Problem, seed: int) -> tuple[float, float]:
        """(relative error of the block before, and after)"""
        before, old = problem.error(), learned.stored()
        generator, order = torch.Generator().manual_seed(seed), list[int]()
        for step in range(self.steps):
            order = order or torch.randperm(problem.batches, generator=generator).tolist()
            loss = problem.loss(order.pop(), learned.values())
            gradients = torch.autograd.grad(loss, learned.leaves, materialize_grads=True)
            rate = self.rate * (1 - step / self.steps)
            with torch.no_grad():
                for leaf, gradient in zip(learned.leaves, gradients, strict=True):
                    leaf -= rate * gradient.sign()
        learned.store(learned.found())
        after = problem.error()
        if not after < before:
            learned.store(old)
        return before, min(before, after)


@dataclass(frozen=True)
class _Block:
    """Nodes behind `start` up to `stop`: the sites there, the values made of them that go on behind `stop`, and whether
    there were ever several such."""

    start: fx.Node
    stop: fx.Node
    sites: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    branched: bool


def _blocks(program: Program, reference: Program, branches: int) -> Iterator[_Block]:
    """The parts of the graph, `branches` in a row that branch together; one that does not branch stays alone."""
    joined: list[_Block] = []
    for part in _parts(program, {node.name for node in reference.graph.nodes}):
        if branches and joined and (len(joined) == branches or not (part.branched and joined[-1].branched)):
            yield _joined(joined)
            joined = []
        joined.append(part)
    yield _joined(joined)


def _joined(parts: Sequence[_Block]) -> _Block:
    first, last = parts[0], parts[-1]
    return replace(last, start=first.start, sites=tuple(node for part in parts for node in part.sites))


def _parts(program: Program, known: Container[str]) -> Iterator[_Block]:
    """The graph cut behind sites where one value, known to the reference, alone carries on what they have made."""
    chosen = {site.node for site in weight_sites(program) if site.kind in Reconstruct.kinds}
    nodes = list(program.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    last = {n: max((place[user] for user in n.users if user.op != "output"), default=-1) for n in nodes}
    made: set[fx.Node] = set()
    live: set[fx.Node] = set()
    sites: list[fx.Node] = []
    start, cut, branched = program.placeholders[-1], None, False
    for node in nodes[:-1]:
        if node in chosen:
            if cut is not None:
                yield cut
                start, cut, sites, branched = cut.stop, None, [], False
            sites.append(node)
        if node in chosen or any(read in made for read in node.all_input_nodes):
            made.add(node)
            live.add(node)
        live = {n for n in live if last[n] > place[node]}
        branched |= len(live) > 1
        if sites and len(live) == 1 and all(n.name in known for n in live):
            cut = _Block(start, node, tuple(sites), tuple(live), branched)
    ends = tuple(n for n in program.outputs if n in made and place[n] > place[start] and n.name in known)
    yield _Block(start, nodes[-2], tuple(sites), ends, branched)


class _Problem:
    """‖B̂ − B‖² of one block, on batches that have come up to it."""

    def __init__(self, block: _Block, stored: Stream, exact: Stream) -> None:
        self.block, self.stream = block, stored
        names = {n.name: n for n in exact.program.graph.nodes}
        stored.advance(block.start)
        exact.advance(max(names[n.name] for n in block.ends))
        self.targets = [{n: values[names[n.name]] for n in block.ends} for values in exact.values]
        self.power = sum(float(t.double().square().sum()) for ends in self.targets for t in ends.values())
        self.batches = len(self.targets)

    def loss(self, batch: int, given: dict[fx.Node, Tensor]) -> Tensor:
        found = self.stream.replay(batch, self.block.stop, given)
        losses = [(found[n] - target).square().mean() for n, target in self.targets[batch].items()]
        return torch.stack(losses).sum()

    def error(self) -> float:
        """√(Σ‖B̂ − B‖² / Σ‖B‖²) of what is stored."""
        total = 0.0
        with torch.no_grad():
            for batch, target in enumerate(self.targets):
                found = self.stream.replay(batch, self.block.stop, {})
                total += sum(float((found[n] - t).double().square().sum()) for n, t in target.items())
        return (total / self.power) ** 0.5 if self.power else 0.0


class _Learned:
    """The weights and biases of a block as functions of `leaves`, which begin at zero."""

    def __init__(self, program: Program, reference: Program, block: _Block) -> None:
        self.program, self.reference, self.block = program, reference, block
        self.exact = {site.node.name: site.weight for site in weight_sites(reference)}
        self.leaves: list[Tensor] = []
        self.weights: dict[fx.Node, _Rounded | _Decoded] = {}
        self.biases: dict[fx.Node, _Moved] = {}

    def add(self, site: Site) -> str:
        """Learn the weight of this site, and its bias; or why not."""
        encoding, block = self.program.encoding(site.weight), self.block
        if encoding is None:
            return "its weight is stored as it is"
        if site.node.name not in self.exact:
            return "it did not exist before quantisation"
        if any(not block.start < user <= block.stop for user in site.weight.users):
            return "its weight is shared with another block"
        if site.weight not in self.weights:
            arrays = self.program.stored_arrays(site.weight)
            if isinstance(encoding, Affine):
                exact = self.reference.weight_value(self.exact[site.node.name])
                self.weights[site.weight] = _Rounded(encoding, arrays, exact, self.leaves)
            else:
                self.weights[site.weight] = _Decoded(encoding, arrays, site.shape, self.leaves)
        bias = site.bias
        if bias is not None and bias.op == "get_attr" and len(bias.users) == 1:
            self.biases[bias] = _Moved(self.program.get(str(bias.target)).detach(), self.leaves)
        return ""

    def values(self) -> dict[fx.Node, Tensor]:
        """Node → its value, with gradients to the leaves."""
        return {node: part.value() for node, part in (*self.weights.items(), *self.biases.items())}

    def stored(self) -> dict[str, Tensor]:
        """What the program stores of them now, by name."""
        return {name: self.program.get(name) for name in self.found()}

    @torch.no_grad()
    def found(self) -> dict[str, Tensor]:
        """What it would store with the leaves as they are."""
        arrays = {self.program.weight_name(node): weight.arrays() for node, weight in self.weights.items()}
        tensors = {f"{name}.{key}": value for name, stored in arrays.items() for key, value in stored.items()}
        return tensors | {str(node.target): bias.value() for node, bias in self.biases.items()}

    def store(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.program.set(name, value)


def _leaf(like: Tensor, leaves: list[Tensor]) -> Tensor:
    leaves.append(torch.zeros(like.shape, requires_grad=True))
    return leaves[-1]


class _Moved:
    """a + t·m, m the mean of |a| along its last axis."""

    def __init__(self, start: Tensor, leaves: list[Tensor]) -> None:
        self.start, self.unit = start, start.float().abs().mean(-1, keepdim=True)
        self.move = _leaf(start, leaves)

    def value(self) -> Tensor:
        return (self.start + self.unit * self.move).to(self.start.dtype)


class _Decoded:
    """Any encoding: the codes stay, what is stored in floating point moves."""

    def __init__(self, encoding: Encoding, start: Arrays, shape: tuple[int, ...], leaves: list[Tensor]) -> None:
        self.encoding, self.start, self.shape = encoding, start, shape
        self.moved = {key: _Moved(array, leaves) for key, array in start.items() if array.is_floating_point()}

    def arrays(self) -> Arrays:
        return self.start | {key: moved.value() for key, moved in self.moved.items()}

    def value(self) -> Tensor:
        return self.encoding.decode(self.arrays(), self.shape)


class _Rounded:
    """Integer codes: s·eᵗ·(round(u + v) − z). u is w/s, or the code itself where a fitter chose another than the
    nearest. Scales that are not stored as numbers stay."""

    def __init__(self, encoding: Affine, start: Arrays, exact: Tensor, leaves: list[Tensor]) -> None:
        self.encoding, self.shape = encoding, tuple(exact.shape)
        codes, self.parameters = encoding.load(start, self.shape)
        scale = self.parameters["scale"]
        self.unit = self.parameters | {"scale": torch.ones_like(scale)}
        at = encoding.dequantize(codes.float(), self.unit)
        rest = encoding.grouped(exact) / scale.unsqueeze(-1) - at
        self.latent = at + torch.where(rest.abs() < 0.5, rest, 0.0)
        self.move = _leaf(self.latent, leaves)
        free = encoding.scale in ("float32", "float16")
        self.growth = _leaf(scale, leaves) if free else torch.zeros(())

    def _rounded(self) -> tuple[Tensor, Parameters]:
        latent = self.latent + self.move
        codes = self.encoding.quantize(latent.detach(), self.unit) + (latent - latent.detach())
        return codes, self.parameters | {"scale": self.parameters["scale"] * self.growth.exp()}

    def arrays(self) -> Arrays:
        return self.encoding.store(*self._rounded(), self.shape)

    def value(self) -> Tensor:
        return self.encoding.dequantize(*self._rounded()).reshape(self.shape)
