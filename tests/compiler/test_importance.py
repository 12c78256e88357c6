"""What channels are worth: every criterion against a slow computation of its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.compiler.axes import Axis, find_axes
from paretoc.compiler.axis_kinds import axis_kinds
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.importance import Activation, Magnitude, Obs, Random, Taylor, measure
from paretoc.compiler.program import Program
from paretoc.compiler.registry import registry
from torch import Tensor, nn
from torch.nn import functional as F


class Convolutions(nn.Module):
    """A convolution that reads 6 channels, of 3 at a time in two groups if `groups` is 2."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1, stride=2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3, bias=bias))


def captured(model: nn.Module, x: Tensor) -> Program:
    program = pc.capture(model.eval(), (x,))
    canonicalize(program)
    return program


def one(program: Program, kind: str) -> Axis:
    return next(axis for axis, found in axis_kinds(find_axes(program)).items() if found == kind)


def rows(program: Program, node: Any, batches: list[Tensor]) -> Tensor:
    """What a layer reads, from all batches."""
    seen = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n is node.all_input_nodes[0]:
                seen.append(value.double())
            return value

    with torch.no_grad():
        for x in batches:
            Watch(program.module).run(x)
    return torch.cat(seen)


def layer(program: Program, name: str) -> Any:
    return next(n for n in program.graph.nodes if any(str(r.target) == f"{name}.weight" for r in n.all_input_nodes))


def loss_without(x: Tensor, y: Tensor, columns: list[int], bias: bool) -> float:
    """The squared error of the best linear map from the other columns of x `[N, K]` to y `[N, O]`."""
    ones = torch.ones(len(x), int(bias), dtype=x.dtype)
    left = torch.cat([x[:, [k for k in range(x.shape[1]) if k not in columns]], ones], 1)
    return float((left @ torch.linalg.lstsq(left, y, driver="gelsd").solution - y).square().sum())


#: name → (model, example, kind, reader, columns of a channel, inputs of the reader `[groups, N, K]`)
Case = tuple[nn.Module, Tensor, str, str, Callable[[int], list[int]], Callable[[Tensor], Tensor]]


def cases(models: Any) -> dict[str, Case]:
    torch.manual_seed(0)
    flat: Callable[[Tensor], Tensor] = lambda x: x.reshape(1, -1, x.shape[-1])  # noqa: E731  # beside the others

    def unfolded(groups: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack(
            [F.unfold(part, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1) for part in x.chunk(groups, 1)]
        )

    image = torch.randn(4, 2, 6, 6)
    of_kernel: Callable[[int], list[int]] = lambda c: list(range(9 * c, 9 * c + 9))  # noqa: E731
    vit = models.Vit(tokens=4, depth=1)
    return {
        "bias": (mlp(), torch.randn(4, 5), "hidden", "2", lambda c: [c], flat),
        "no bias": (mlp(bias=False), torch.randn(4, 5), "hidden", "2", lambda c: [c], flat),
        "convolution": (Convolutions(), image, "hidden", "second", of_kernel, unfolded(1)),
        "heads": (
            *(vit, torch.randn(4, 4, 12), "heads", "blocks.0.attention.out"),
            *(lambda c: list(range(8 * c, 8 * c + 8)), flat),
        ),
    }


@pytest.mark.parametrize("name", ["bias", "no bias", "convolution", "heads"])
def test_hessian_is_the_error_of_the_best_refit(models: Any, name: str) -> None:
    """OBS predicts what least squares over the other columns then leaves; all at once, and one after the other."""
    model, example, kind, reader, columns, inputs = cases(models)[name]
    batches = [torch.randn(16, *example.shape[1:]) for _ in range(8)]
    program = captured(model, example)
    axis, node = one(program, kind), layer(program, reader)
    (x,) = inputs(rows(program, node, batches))
    weight = program.get(f"{reader}.weight").detach().double().flatten(1)
    y, bias = x @ weight.T, name != "no bias"
    energy = float((y - y.mean(0) if bias else y).square().sum())
    want = [loss_without(x, y, columns(c), bias) / energy for c in range(axis.size)]
    got = measure([axis], Obs(rounds=1, damp=0.0), [[b] for b in batches])[axis]
    torch.testing.assert_close(got.sort().values, torch.tensor(sorted(want)).double(), rtol=1e-3, atol=1e-7)
    assert sorted(range(axis.size), key=want.__getitem__) == got.argsort(stable=True).tolist()
    gone: list[int] = []
    for _ in range(axis.size):  # greedily: the one whose leaving, besides those before, costs least
        left = [c for c in range(axis.size) if c not in gone]
        gone.append(min(left, key=lambda c: loss_without(x, y, [k for g in (*gone, c) for k in columns(g)], bias)))
    got = measure([axis], Obs(rounds=axis.size, damp=0.0), [[b] for b in batches])[axis]
    assert got.argsort(stable=True).tolist() == gone


def test_hessian_of_a_grouped_reader_adds_its_groups() -> None:
    batches = [torch.randn(16, 2, 6, 6) for _ in range(4)]
    program = captured(Convolutions(groups=2), batches[0])
    node = layer(program, "second")
    (axis,) = (a for a in find_axes(program) if node in a.readers)
    x = rows(program, node, batches)
    want, energy = torch.zeros(3), 0.0
    for part, weight in zip(x.chunk(2, 1), program.get("second.weight").detach().double().chunk(2), strict=True):
        columns = F.unfold(part, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
        y = columns @ weight.flatten(1).T
        energy += float((y - y.mean(0)).square().sum())
        want += torch.tensor([loss_without(columns, y, list(range(9 * c, 9 * c + 9)), True) for c in range(3)])
    got = measure([axis], Obs(rounds=1, damp=0.0), [[b] for b in batches])[axis]
    torch.testing.assert_close(got, want.double() / energy, rtol=1e-3, atol=0.0)


def test_activation_is_mean_times_column_norm() -> None:
    batches = [torch.randn(16, 2, 6, 6) for _ in range(3)]
    program = captured(Convolutions(), batches[0])
    axis = one(program, "hidden")
    columns = F.unfold(rows(program, layer(program, "second"), batches), 3, padding=1, stride=2)
    mean = columns.abs().transpose(1, 2).flatten(0, 1).mean(0)
    brought = (mean * program.get("second.weight").detach().flatten(1).double().norm(dim=0)).square()
    want = torch.stack([brought[9 * c : 9 * c + 9].sum() for c in range(6)])
    got = measure([axis], Activation(), [[b] for b in batches])[axis]
    torch.testing.assert_close(got, want / want.sum(), rtol=1e-5, atol=0.0)


def test_magnitude_counts_every_weight_along_the_axis() -> None:
    program = captured(mlp(), torch.randn(4, 5))
    axis = one(program, "hidden")
    up, bias, down = (program.get(name).detach().double() for name in ("0.weight", "0.bias", "2.weight"))
    want = up.square().sum(1) + bias.square() + down.square().sum(0)
    torch.testing.assert_close(measure([axis], Magnitude(), [])[axis], want / want.sum())


def test_taylor_is_weight_times_gradient_of_the_loss() -> None:
    model, batches = mlp(), [torch.randn(6, 5) for _ in range(2)]
    labels = [torch.randint(0, 3, (6,)) for _ in batches]
    program = captured(model, batches[0])
    axis = one(program, "hidden")

    def loss(outputs: Any, batch: int) -> Tensor:
        return F.cross_entropy(outputs[0], labels[batch])

    want = torch.zeros(8).double()
    for x, y in zip(batches, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        moved = {name: (p * p.grad).detach().abs().double() for name, p in model.named_parameters()}
        want += (moved["0.weight"].sum(1) + moved["0.bias"] + moved["2.weight"].sum(0)) / 2
    got = measure([axis], Taylor(loss), [[b] for b in batches])[axis]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_taylor_without_a_loss_sees_what_the_outputs_see() -> None:
    """The default loss is random in its signs, the same for the same seed, and blind to what no output reads."""
    model, batches = mlp(), [[torch.randn(6, 5)] for _ in range(4)]
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0  # what the channel is made of has no gradient, what reads it is 0
    axis = one(captured(model, batches[0][0]), "hidden")
    first, again, other = (measure([axis], Taylor(seed=s), batches)[axis] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first[3] == 0 and (first > 0).sum() == 7


def test_random_orders_are_seeded_and_differ_between_axes() -> None:
    program = captured(nn.Sequential(mlp(), nn.GELU(), nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(2, 5))
    axes = [axis for axis, kind in axis_kinds(find_axes(program)).items() if kind == "hidden" and axis.size == 8]
    one_, two = measure(axes, Random(), []).values()
    again, seeded = measure(axes[:1], Random(), [])[axes[0]], measure(axes[:1], Random(1), [])[axes[0]]
    assert torch.equal(one_, again)
    assert not torch.equal(one_.argsort(), two.argsort()) and not torch.equal(one_.argsort(), seeded.argsort())


def test_what_is_never_there_costs_nothing() -> None:
    model, batches = mlp(bias=False), [[torch.randn(32, 5)] for _ in range(2)]
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, 0.0  # GELU of 0 is 0
    axis = one(captured(model, batches[0][0]), "hidden")
    assert measure([axis], Obs(), batches)[axis].argsort()[0] == 2
    assert measure([axis], Obs(), batches)[axis][2] == 0


def test_an_axis_that_no_layer_reads_is_refused(refused: Any) -> None:
    program = captured(mlp(), torch.randn(4, 5))
    output = find_axes(program).one("2.weight", 0)
    error = refused(PassError, "no layer sums over 2.weight.0", lambda: measure([output], Obs(), []))
    assert "another criterion" in error.fix


def test_a_reader_of_another_kind_is_refused(refused: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2))
    axis = one(captured(model, torch.randn(2, 2, 4, 4)), "hidden")
    refused(PassError, "neither a linear layer nor a convolution", lambda: measure([axis], Activation(), []))
    assert measure([axis], Magnitude(), [])[axis].sum() == pytest.approx(1.0)


def test_criteria_are_found_by_name(refused: Any) -> None:
    assert registry().criterion("random(seed=3)") == Random(3)
    refused(OptionError, "there is no criterion called 'hesian'", lambda: registry().criterion("hesian"))
    refused(OptionError, "has no option 'sed'", lambda: registry().criterion("random(sed=3)"))
