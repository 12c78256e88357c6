"""Edits of weights: what is shared stays shared while it is equal, names stay with their modules."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.capture import capture
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.sites import weight_sites
from paretoc.compiler.weights import Operand, WeightEdits, is_stored
from torch import Tensor, nn


class Tied(nn.Module):
    """table(ids) → head, one tensor under two names; `a` and `b` are one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.table(ids))))


@pytest.fixture(scope="module")
def tied():
    torch.manual_seed(0)
    program = capture(Tied().eval(), torch.randint(0, 6, (2, 3)))
    canonicalize(program)
    return program


def operands(program) -> dict[str, Operand]:
    """The four weight operands: of the table, of the two calls of one module, of the head."""
    first, *others = weight_sites(program)
    found = [Operand(first.node, 0), *(Operand(site.node, 1) for site in others)]
    return dict(zip(("table", "first", "second", "head"), found, strict=True))


def test_a_change_to_all_readers_keeps_one_tensor(tied):
    program = tied.clone()
    edits = WeightEdits(program)
    for name in ("first", "second"):
        assert operands(program)[name].shared()
        edits[operands(program)[name]] = edits[operands(program)[name]] * 2
    assert edits.commit() == []
    program.refresh()
    assert torch.equal(program.get("twice.weight"), tied.get("twice.weight") * 2)
    assert len(program.weights()) == len(tied.weights())


def test_different_changes_untie_and_each_module_keeps_its_name(tied):
    program = tied.clone()
    table, head = (operands(program)[name] for name in ("table", "head"))
    name = str(head.source.target)
    old, edits = tied.get(name).double(), WeightEdits(program)
    edits[table], edits[head] = edits[table] * 2, edits[head] * 3
    (fresh,) = edits.commit()
    program.refresh()
    assert {name, fresh} == {"table.weight", "head.weight"}
    assert program.state_names[fresh] == fresh
    torch.testing.assert_close(program.get("table.weight").double(), old * 2)
    torch.testing.assert_close(program.get("head.weight").double(), old * 3)
    ids = torch.tensor([[1, 5]])
    hidden = nn.functional.embedding(ids, program.get("table.weight"))
    for _ in range(2):
        hidden = nn.functional.linear(hidden, program.get("twice.weight"), program.get("twice.bias"))
    torch.testing.assert_close(program.run([ids])[0], hidden @ program.get("head.weight").T)


def test_a_reader_without_a_change_keeps_the_old_value(tied):
    program = tied.clone()
    first, second = (operands(program)[name] for name in ("first", "second"))
    edits = WeightEdits(program)
    edits[second] = edits[second] + 1
    (fresh,) = edits.commit()
    program.refresh()
    assert first.source.target == "twice.weight"
    assert torch.equal(program.get("twice.weight"), tied.get("twice.weight"))
    assert second.source.target == fresh
    torch.testing.assert_close(program.get(fresh), tied.get("twice.weight") + 1)


def test_changes_add_up_in_float64_until_they_are_committed(tied):
    program = tied.clone()
    first, second = (operands(program)[name] for name in ("first", "second"))
    edits = WeightEdits(program)
    for _ in range(10):
        for operand in (first, second):
            edits[operand] = edits[operand] / 3
    for _ in range(10):
        for operand in (first, second):
            edits[operand] = edits[operand] * 3
    assert torch.equal(program.get("twice.weight"), tied.get("twice.weight"))
    edits.commit()
    assert torch.equal(program.get("twice.weight"), tied.get("twice.weight"))


def test_an_operand_that_was_left_out_is_made(tied):
    program = tied.clone()
    head = operands(program)["head"]
    bias = Operand(head.node, 2, "bias")
    edits = WeightEdits(program)
    assert bias not in edits
    assert bias.value(program) is None
    edits[bias] = torch.arange(6.0, dtype=torch.float64)
    edits.commit()
    program.refresh()
    assert program.get("head.bias").dtype == torch.float32
    difference = program.run([torch.tensor([[1]])])[0] - tied.run([torch.tensor([[1]])])[0]
    torch.testing.assert_close(difference[0, 0], torch.arange(6.0))


def test_an_encoded_weight_keeps_its_encoding(tied):
    program = tied.clone()
    head = operands(program)["head"]
    weight = program.weight_value(head.source)
    table = operands(program)["table"]
    edits = WeightEdits(program)
    edits[table] = edits[table] + 1  # unties
    edits.commit()
    program.encode(head.source, NM(2, 4), NM(2, 4).encode(weight))
    pruned = head.value(program)
    assert head.fixed(program) == ""
    edits = WeightEdits(program)
    edits[head] = edits[head] * torch.tensor([1.0, 100, 0.01, 1])
    edits.commit()
    program.refresh()
    assert program.encoding(head.source) == NM(2, 4)
    torch.testing.assert_close(head.value(program), pruned * torch.tensor([1.0, 100, 0.01, 1]))


def test_what_is_stored_in_codes_or_computed_is_fixed(tied):
    program = tied.clone()
    first, second = (operands(program)[name] for name in ("first", "second"))
    assert first.fixed(program) == ""
    weight = program.weight_value(first.source)
    program.encode(first.source, Affine(8), Affine(8).encode(weight))
    assert second.fixed(program) == "its weight is already stored as Affine(bits=8, group=0)"
    assert not is_stored(program.placeholders[0])
    assert Operand(second.node, 0).fixed(program) == f"its weight is computed by {first.node.name}"
