"""The stream: values equal a plain run, only what is still read is kept, looking ahead, rewriting on the way, and
weights that several sites share."""

from __future__ import annotations

import pickle
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import paretoc as pc
import pytest
import torch
from paretoc.compiler.calibrate import Observer, Stream, gather
from paretoc.compiler.encodings import Affine, Arrays, Encoding
from paretoc.compiler.errors import PassError
from paretoc.compiler.passes import Context
from paretoc.compiler.protocols import NO_EVIDENCE, Evidence
from paretoc.compiler.reencode import _AHEAD
from paretoc.compiler.sites import Site, weight_sites
from paretoc.compiler.statistics import Derived, Hessian, Statistic
from paretoc.passes import Quantize
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class All(Statistic):
    """Every value, a list of tuples: one for each batch."""

    others: tuple[str | Derived, ...] = ()

    @property
    def nodes(self) -> tuple[str | Derived, ...]:
        return (self.node, *self.others)

    def start(self) -> list[Any]:
        return []

    def update(self, state: Any, *values: Any) -> Any:
        return [*state, values]


@dataclass(frozen=True)
class Doubled(Derived):
    """Twice the value of a node; counts how often it was computed."""

    node: str
    calls: ClassVar[list[str]] = []

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node,)

    def compute(self, *values: Tensor) -> Tensor:
        self.calls.append(self.node)
        return values[0] * 2


def plain(program: Any, batch: list[Tensor]) -> dict[str, Any]:
    """Every value of an ordinary run."""
    values: dict[str, Any] = {}
    with torch.no_grad():
        Observer(program.module, values.__setitem__).run(*batch)
    return values


def computed(program: Any) -> list[Any]:
    """The nodes that depend on the inputs."""
    varying = set(program.placeholders)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(read in varying for read in node.all_input_nodes):
            varying.add(node)
    return [n for n in program.graph.nodes if n in varying]


@pytest.fixture(scope="module")
def vit(models):
    torch.manual_seed(0)
    return pc.capture(models.Vit(depth=2, pool="class").eval(), torch.randn(2, 16, 12))


BATCHES = [[torch.randn(3, 16, 12)], [torch.randn(1, 16, 12)]]


# -- values ----------------------------------------------------------------------------------------------


def test_at_every_place_the_values_are_those_of_a_plain_run(vit):
    stream, want = Stream(vit, BATCHES), [plain(vit, b) for b in BATCHES]
    for node in computed(vit):
        (seen,) = stream.advance(node, [All(node.name)]).values()
        assert len(seen) == 2
        for (value,), expected in zip(seen, want, strict=True):
            torch.testing.assert_close(value, expected[node.name], rtol=0, atol=0)


def test_several_inputs_and_a_mask(captured):
    _, program = captured("BertForSequenceClassification")
    batch = [t.clone() for t in program.example]
    want, stream = plain(program, batch), Stream(program, [batch])
    for node in computed(program)[::7]:
        ((value,),) = stream.advance(node, [All(node.name)])[All(node.name)]
        torch.testing.assert_close(value, want[node.name], rtol=0, atol=0)


def test_a_wrong_value_would_be_noticed(vit):
    node = computed(vit)[10]
    ((value,),) = Stream(vit, BATCHES[:1]).advance(node, [All(node.name)])[All(node.name)]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(value, plain(vit, [BATCHES[0][0] * 1.001])[node.name], rtol=0, atol=0)


class OnConstants(nn.Module):
    """A linear that reads a buffer, as for relative positions: its input is the same for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Buffer(torch.randn(5, 8))
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.second(torch.relu(self.first(self.positions))))


def test_values_that_do_not_depend_on_the_batch(reference):
    model, x = OnConstants(), [torch.randn(2, 5, 8), torch.randn(3, 5, 8)]
    program = pc.capture(model, x[0])
    want = plain(program, [x[0]])
    for place in [s.input for s in weight_sites(program)]:
        stream = Stream(program, [[b] for b in x])
        names = [s.input.name for s in weight_sites(program)]
        seen = stream.advance(place, [All(name) for name in names])
        for name in names:
            assert torch.equal(seen[All(name)][0][0], want[name])
            assert len(seen[All(name)]) == 2
    stream = Stream(program, [[b] for b in x])
    stream.advance(program.outputs[0])  # constants can still be asked for when everything has run
    assert torch.equal(stream.advance(program.outputs[0], [All(names[1])])[All(names[1])][0][0], want[names[1]])
    compiled = reference(model, ["quantize:W8A16,fitter=gptq"], x[0], calibration=x)
    torch.testing.assert_close(compiled(x[1]), model(x[1]), rtol=0, atol=0.1)


# -- memory ----------------------------------------------------------------------------------------------


def test_only_what_later_nodes_read_is_kept(vit):
    nodes = list(vit.graph.nodes)
    stream = Stream(vit, BATCHES)
    for place in computed(vit):
        stream.advance(place)
        position = nodes.index(place)
        passed = [n for n in computed(vit) if nodes.index(n) <= position]
        alive = {n for n in passed if any(nodes.index(user) > position for user in n.users)}
        for values in stream.values:
            assert set(values) == alive


def test_the_tensors_themselves_are_freed(vit):
    held: list[weakref.ref[Tensor]] = []

    @dataclass(frozen=True)
    class Watch(Statistic):
        def update(self, state: Any, *values: Tensor) -> Any:
            held.append(weakref.ref(values[0]))

    gelu = vit.calls(torch.ops.aten.gelu.default)
    stream = Stream(vit, BATCHES)
    stream.advance(gelu[0], [Watch(gelu[0].name), Watch(gelu[1].name)])  # the second by looking ahead
    assert [ref() is not None for ref in held] == [True, False] * 2
    stream.advance(gelu[1])
    assert [ref() is not None for ref in held] == [False] * 4


def test_looking_ahead_leaves_nothing_behind(vit):
    near, far = computed(vit)[8], computed(vit)[40]
    looked, straight = Stream(vit, BATCHES), Stream(vit, BATCHES)
    looked.advance(near, [All(far.name)])
    straight.advance(near)
    assert [set(v) for v in looked.values] == [set(v) for v in straight.values]
    assert looked.place is near


# -- looking ahead and back ------------------------------------------------------------------------------


def test_a_statistic_sees_nodes_before_at_and_behind_the_place(vit):
    order = computed(vit)
    norms = vit.calls(torch.ops.aten.layer_norm.default)
    start = norms[0].args[0]  # the residual stream: read again by the add that closes the branch
    (attention, *_) = vit.calls(torch.ops.aten.scaled_dot_product_attention.default)
    statistic = All(norms[0].name, (attention.args[0].name, start.name, order[-1].name))
    stream, want = Stream(vit, BATCHES), [plain(vit, b) for b in BATCHES]
    stream.advance(start)
    (seen,) = stream.advance(norms[0], [statistic]).values()
    for values, expected in zip(seen, want, strict=True):
        for name, value in zip(statistic.nodes, values, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_what_has_gone_by_is_an_error(vit, refused):
    first, second = vit.calls(torch.ops.aten.gelu.default)
    stream = Stream(vit, BATCHES)
    stream.advance(second)
    sentence = f"All looks at {first.name!r}, which has run already and is not kept"
    error = refused(PassError, sentence, lambda: stream.advance(second, [All(second.name, (first.name,))]))
    assert second.name in error.where


def test_progress_is_reported_for_every_advance(vit):
    labels = []

    def track(items: Any, label: str) -> Any:
        labels.append((label, len(list(items))))
        return items

    stream = Stream(vit, BATCHES, track)
    stream.advance(computed(vit)[3])
    stream.advance(computed(vit)[9])
    assert labels == [("calibrating", 2)] * 2


# -- derived values --------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_derived_value_is_computed_once_and_outlives_a_rewrite():
    model, data = Deep(), [torch.randn(2, 8), torch.randn(4, 8)]
    program = pc.capture(model, data[0])
    first, second, third = [s.node for s in weight_sites(program)]
    derived = Doubled(second.name)
    Doubled.calls.clear()
    stream = Stream(program, [[x] for x in data])
    want = [plain(program, [x])[second.name] * 2 for x in data]
    statistics = [All(first.args[0].name, (derived,)), All(first.name, (derived,))]
    before = stream.advance(first.args[0], statistics)
    assert Doubled.calls == [second.name] * 2  # once a batch, for both statistics
    program.encode(first.args[1], Affine(2), Affine(2).encode(model.layers[0].weight.detach()))
    after = stream.advance(third.args[0], [All(third.args[0].name, (derived,))])
    assert Doubled.calls == [second.name] * 2
    for statistic, seen in (before | after).items():
        for (_, twice), original in zip(seen, want, strict=True):
            assert torch.equal(twice, original), statistic
    assert not torch.equal(plain(program, [data[0]])[second.name] * 2, want[0])  # the rewrite did change it
    (alone,) = stream.advance(third, [All(third.name, (derived,))]).values()
    assert torch.equal(alone[1][1], want[1])


def test_gather_gives_a_statistic_all_its_values_at_once(vit):
    names = [n.name for n in computed(vit)]
    derived = Doubled(names[4])
    Doubled.calls.clear()
    statistics = [All(names[9], (names[2], derived)), All(names[9]), All(names[1], (derived, names[1]))]
    seen, want = gather(vit, statistics, BATCHES), [plain(vit, b) for b in BATCHES]
    for batch, expected in enumerate(want):
        one, two, three = (seen[s][batch] for s in statistics)
        assert torch.equal(one[0], expected[names[9]])
        assert torch.equal(one[1], expected[names[2]])
        assert torch.equal(one[2], expected[names[4]] * 2)
        assert torch.equal(two[0], expected[names[9]])
        assert three[2] == expected[names[1]]  # a size
        assert len(three) == 3
    assert Doubled.calls == [names[4]] * 2


# -- fitting on the way ----------------------------------------------------------------------------------


class Recorder:
    """A fitter that rounds, and keeps the evidence of each weight by the shape and sum of the weight."""

    name = "recorder"
    data_free = False

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def refuse(self, encoding: Encoding) -> str | None:
        return None

    def needs(self, site: Site) -> list[Statistic]:
        return [Hessian(site.input.name, site.window)]

    def fit(self, encoding: Encoding, weight: Tensor, evidence: Evidence = NO_EVIDENCE) -> Arrays:
        self.seen.append((weight, evidence[Hessian][0]))
        return encoding.encode(weight)

    def of(self, weight: Tensor) -> Tensor:
        (found,) = [gram for seen, gram in self.seen if seen.shape == weight.shape and torch.equal(seen, weight)]
        return found


def quantized(model: nn.Module, data: list[Tensor], scheme: str = "W8A16", **options: Any) -> tuple[Recorder, Any]:
    recorder = Recorder()
    program = pc.capture(model, data[0])
    transform = Quantize(scheme, weights=Affine(2), fitter=recorder, **options)
    result = transform.apply(program, Context(batches=[[x] for x in data]))
    return recorder, (program, result)


def gram(rows: Tensor) -> Tensor:
    rows = rows.detach().double().reshape(-1, rows.shape[-1])
    return rows.T @ rows


def rounded(weight: Tensor) -> Tensor:
    return Affine(2).decode(Affine(2).encode(weight.detach()), tuple(weight.shape))


@pytest.mark.parametrize("sequential", [True, False])
def test_a_layer_is_fitted_to_what_the_layers_before_make_of_the_data(sequential):
    model, data = Deep(), [torch.randn(20, 8), torch.randn(12, 8)]
    recorder, _ = quantized(model, data, sequential=sequential)
    x = torch.cat(data)
    for layer in model.layers:
        torch.testing.assert_close(recorder.of(layer.weight), gram(x), rtol=1e-5, atol=1e-5)
        x = torch.tanh(F.linear(x, rounded(layer.weight) if sequential else layer.weight, layer.bias))


def test_rounded_inputs_are_what_a_layer_is_fitted_to():
    model, data = Deep(), [torch.randn(20, 8)]
    recorder, _ = quantized(model, data, "W8A8-dynamic")
    x = torch.ops.paretoc.fake_quantize_dynamic(data[0], "tensor", "int8")
    torch.testing.assert_close(recorder.of(model.layers[0].weight), gram(x), rtol=1e-5, atol=1e-5)


class Albert(nn.Module):
    """One layer used three times, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.layer(x))
        return self.head(x)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_shared_weight_meets_the_inputs_of_all_its_uses(sequential):
    model, data = Albert(), [torch.randn(20, 8), torch.randn(12, 8)]
    recorder, (program, result) = quantized(model, data, sequential=sequential)
    x, total = torch.cat(data), torch.zeros(8, 8).double()
    for _ in range(3):
        total += gram(x)
        x = x + torch.tanh(model.layer(x))
    assert len(recorder.seen) == 2
    torch.testing.assert_close(recorder.of(model.layer.weight), total, rtol=1e-5, atol=1e-4)
    after = torch.cat(data)
    for _ in range(3):
        after = after + torch.tanh(F.linear(after, rounded(model.layer.weight), model.layer.bias))
    last = gram(after if sequential else x)
    torch.testing.assert_close(recorder.of(model.head.weight), last, rtol=1e-5, atol=1e-4)
    assert result.matched == ["layer", "layer", "layer", "head"]
    assert len(program.calls(torch.ops.paretoc.decode.default)) == 2


@pytest.mark.parametrize("sequential", [True, False])
def test_a_tied_table_is_rounded_first_and_what_reads_it_is_fitted_to_that(models, sequential):
    model, ids = models.TiedLanguageModel().eval(), torch.randint(0, 48, (3, 5))
    recorder, (program, _) = quantized(model, [ids], embeddings=True, sequential=sequential)
    table = program.weight_value(next(s for s in weight_sites(program) if s.kind == "embedding").weight)
    assert len(recorder.seen) == 1  # the table is not the fitter's
    inputs = table if sequential else model.embedding.weight
    torch.testing.assert_close(recorder.of(model.middle.weight), gram(inputs[ids]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(gram(table[ids]), gram(model.embedding.weight[ids]), rtol=1e-5, atol=1e-5)


def test_a_tied_head_without_its_table_is_left_out(models):
    model, ids = models.TiedLanguageModel().eval(), torch.randint(0, 48, (3, 5))
    recorder, (_, result) = quantized(model, [ids])
    assert result.matched == ["middle"]
    torch.testing.assert_close(recorder.of(model.middle.weight), gram(model.embedding(ids)), rtol=1e-5, atol=1e-5)


class Workers(ThreadPoolExecutor):
    """Two threads, to which tasks travel as to other processes; keeps them in order, and how many were done before."""

    def __init__(self) -> None:
        super().__init__(2)
        self.given: list[Future[Any]] = []
        self.done: list[int] = []

    def submit(self, *task: Any, **options: Any) -> Any:
        self.done.append(sum(future.done() for future in self.given))
        self.given.append(super().submit(*pickle.loads(pickle.dumps(task)), **options))
        return self.given[-1]


@pytest.mark.parametrize("sequential", [True, False])
def test_an_executor_fits_the_same(sequential):
    model, data = Deep(9), [torch.randn(20, 8), torch.randn(12, 8)]
    transform, stored = Quantize("W8A16", weights=Affine(2), fitter="gptq", sequential=sequential), []
    with Workers() as workers:
        for executor in (None, workers):
            program = pc.capture(model, data[0])
            transform.apply(program, Context(batches=[[x] for x in data], executor=executor))
            stored.append(program.weights())
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(value, stored[1][name]) for name, value in stored[0].items())
    assert len(workers.given) == 9
    least = 0 if sequential else _AHEAD
    assert all(done >= count - least for count, done in enumerate(workers.done))


def test_layers_that_read_one_input_are_fitted_together(captured):
    _, program = captured("BertForSequenceClassification")
    recorder, advances = Recorder(), []

    class Counting(Stream):
        def advance(self, place: Any, statistics: Any = ()) -> Any:
            advances.append(len(statistics))
            return super().advance(place, statistics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paretoc.compiler.reencode.Stream", Counting)
        transform = Quantize("W8A16", fitter=recorder, targets=("*encoder.layer.0.*",))
        transform.apply(program, Context(batches=[[t.clone() for t in program.example]]))
    assert len(recorder.seen) == 6
    assert advances == [1, 1, 1, 1]  # q, k and v; out; up; down: one Gram matrix each
