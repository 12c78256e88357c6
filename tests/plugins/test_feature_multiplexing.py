"""Feature multiplexing: the hash as integers say it, one table, exact for what was trained so, the paper's order."""

from __future__ import annotations

import onnx
import paretoc as pc
import paretoc.testing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.plugins import FeatureMultiplexing, UnifiedEmbedding
from paretoc.plugins.feature_multiplexing import hashed_rows, hashes
from paretoc.plugins.hashing import PRIME, coefficients
from torch import Tensor, nn


class Tables(nn.Module):
    """Features of 8, 8 and 4 numbers, from a column of ids each; a head."""

    def __init__(self, counts: tuple[int, ...] = (400, 300, 200)) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, d) for n, d in zip(counts, (8, 8, 4), strict=True))
        self.head = nn.Linear(20, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], -1))


def ids(rows: int, most: int = 200) -> Tensor:
    return torch.randint(0, most, (rows, 3))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 50), st.integers(1, 4), st.integers(1, 10**6))
def test_the_hash_is_exact_in_64_bits(value, feature, lookups, table):
    a, b = hashes(feature, lookups, seed=7)
    found = hashed_rows(torch.tensor([value])[:, None], a, b, table)[0].tolist()
    pairs = [coefficients(7, feature, k)[:2] for k in range(lookups)]
    assert found == [(a * value + b) % PRIME % table for a, b in pairs]  # integers of any size


def test_each_feature_and_lookup_has_a_hash_of_its_own():
    every = [hashed_rows(torch.arange(1000)[:, None], *hashes(t, 2, 0), 10**6) for t in range(4)]
    columns = torch.cat(every, 1).T.tolist()
    for i, one in enumerate(columns):
        for other in columns[i + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 5


def test_the_layer_is_the_equation_and_onnx_runs_it_on_large_ids():
    model = nn.Sequential(UnifiedEmbedding(50, 3, [2, 1, 3], seed=5), nn.Linear(18, 2)).eval()
    values = torch.randint(0, 2**31 - 1, (6, 3))
    table, rows = model[0].weight.detach(), []
    for row in values.tolist():
        looked_up = []
        for feature, (value, count) in enumerate(zip(row, (2, 1, 3), strict=True)):
            for lookup in range(count):
                a, b, _ = coefficients(5, feature, lookup)
                looked_up.append(table[(a * value + b) % PRIME % 50])
        rows.append(torch.cat(looked_up))
    torch.testing.assert_close(model[0](values).detach(), torch.stack(rows))
    compiled = pc.compile(model, [], example_inputs=values[:2], target="onnx")
    torch.testing.assert_close(compiled(values), model(values).detach(), rtol=1e-5, atol=1e-6)


def test_tables_that_were_trained_so_are_stored_exactly(tmp_path):
    model, size = Tables().eval(), 160
    shared = torch.randn(size, 4)
    with torch.no_grad():
        for feature, table in enumerate(model.tables):
            a, b = hashes(feature, table.embedding_dim // 4, 3)
            place = hashed_rows(torch.arange(table.num_embeddings)[:, None], a, b, size)
            table.weight.copy_(shared[place].flatten(1))
    numbers = 400 * 8 + 300 * 8 + 200 * 4
    step = FeatureMultiplexing(numbers / (4 * size), seed=3)
    compiled = pc.compile(model, [step], example_inputs=ids(2), target="onnx")
    torch.testing.assert_close(compiled.program.weights()["feature_multiplexing.weight"], shared)
    report = compiled.report(latency=False)
    assert report.passes[-1]["metrics"]["relative error"] < 1e-7
    x = ids(7)
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-6)
    other = FeatureMultiplexing(numbers / (4 * size), seed=4)
    assert not torch.allclose(pc.compile(model, [other], example_inputs=x, target="eager")(x), model(x), atol=0.1)
    compiled.export_onnx(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {node.op_type for node in graph.node} >= {"Mul", "Add", "Mod", "Gather"}
    assert max(len(i.dims) and i.dims[0] for i in graph.initializer) == size
    assert (tmp_path / "model.onnx").stat().st_size < 4 * numbers / 3


def test_other_tables_become_means(reference):
    model = Tables((40, 30, 20))
    compiled = reference(model, [FeatureMultiplexing(5.0, width=2)], ids(2, 20))
    size = round((40 * 8 + 30 * 8 + 20 * 4) / 5 / 2)
    found: dict[int, list[Tensor]] = {}
    for feature, table in enumerate(model.tables):
        a, b = hashes(feature, table.embedding_dim // 2, 0)
        for value, row in enumerate(table.weight.detach()):
            for part, place in zip(row.split(2), hashed_rows(torch.tensor(value), a, b, size).tolist(), strict=True):
                found.setdefault(place, []).append(part)
    expected = torch.stack([torch.stack(found.get(i, [torch.zeros(2)])).mean(0) for i in range(size)])
    torch.testing.assert_close(
        compiled.program.weights()["feature_multiplexing.weight"], expected, rtol=1e-5, atol=1e-6
    )


def test_the_pass_conforms():
    pc.testing.check_pass(FeatureMultiplexing(4.0), Tables(), ids(4))


def test_what_it_leaves_and_refuses(models, reference, refused):
    class Padded(Tables):
        def __init__(self) -> None:
            super().__init__()
            self.tables[1] = nn.Embedding(300, 8, padding_idx=0)

    compiled = reference(Padded(), [FeatureMultiplexing(4.0)], ids(2))
    assert compiled.report(latency=False).passes[-1]["skipped"] == {"tables.1": "row 0 is padding"}
    call = lambda: reference(Tables(), [FeatureMultiplexing(4.0, width=3)], ids(2))  # noqa: E731
    error = refused(pc.OptionError, "rows of 3 do not fill 'tables.0.weight', which is 8 wide", call)
    assert error.fix == "use a width that divides 4"
    tied = lambda: reference(models.TiedLanguageModel(), ["feature_multiplexing"], torch.randint(0, 48, (2, 5)))  # noqa: E731
    refused(pc.PassError, "no table can be shared: ", tied)
    for options in ({"compression": 0.5}, {"width": -1}):
        refused(pc.OptionError, "is not valid", lambda options=options: FeatureMultiplexing(**options))


def test_one_table_holds_more_than_tables_of_equal_parts(lookups=2):
    """Regression on three features of 20, 20 and 400 values, 120 rows of 4 in all, paired over five seeds: a table for
    each feature has room for 40 values, and collides where one shared by all does not."""
    counts, changes = (20, 20, 400), []
    for seed in range(5):
        torch.manual_seed(seed)
        odds = [1 / torch.arange(1, n + 1) ** 0.7 for n in counts]
        x = torch.stack([torch.multinomial(o, 3000, replacement=True) for o in odds], 1)
        truth = sum(torch.randn(n)[x[:, i]] for i, n in enumerate(counts))
        errors = []
        for shared in (True, False):
            if shared:
                first = UnifiedEmbedding(120 * lookups, 4 // lookups, [lookups] * 3, seed)
                inputs = x
            else:
                first = nn.Sequential(nn.Embedding(120, 4), nn.Flatten())
                inputs = torch.stack(
                    [hashed_rows(x[:, i], *(h[0] for h in hashes(i, 1, seed)), 40) + 40 * i for i in range(3)], 1
                )
                inputs[:, :2] = x[:, :2] + torch.tensor([0, 40])  # these fit
            model = nn.Sequential(first, nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1))
            nn.init.normal_(next(first.parameters()), std=0.3)
            optimiser = torch.optim.Adam(model.parameters(), 1e-2)
            for _ in range(8):
                for batch in torch.randperm(2000).split(100):
                    optimiser.zero_grad()
                    (model(inputs[batch])[:, 0] - truth[batch]).square().mean().backward()
                    optimiser.step()
            with torch.no_grad():
                errors.append(float((model(inputs[2000:])[:, 0] - truth[2000:]).square().mean()))
        changes.append(errors[0] - errors[1])
    change = torch.tensor(changes)
    assert change.mean() < -2 * change.std() / len(change) ** 0.5, change
