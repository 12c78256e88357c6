"""Sensitivity: measured losses equal brute force, budgets are kept and spent best, what is given back is untouched."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.capture import capture
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.errors import CalibrationError, OptionError
from paretoc.compiler.registry import registry
from paretoc.compiler.sensitivity import Loss, Sensitivity, measure_losses, relative_error, split
from paretoc.compiler.sites import weight_sites
from paretoc.passes import Quantize
from torch import nn

WIDTHS = [Affine(b, 8, b > 2) for b in (2, 4, 8)]
decode = torch.ops.paretoc.decode.default


def net() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    model[2].weight.data *= torch.randn(32, 32).exp()  # the sensitive one
    return model


def batches(count: int = 8) -> list[torch.Tensor]:
    return [torch.randn(6, 16, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def measured(model: nn.Module) -> Sensitivity:
    program = capture(model, batches()[0])
    canonicalize(program)
    flat = [[b] for b in batches()]
    return measure_losses(program, weight_sites(program), lambda _: WIDTHS, registry().fitter("rtn"), flat)


def test_losses_equal_brute_force():
    model = net()
    found = {(loss.site, loss.encoding): loss for loss in measured(model).losses}
    held = [b for i, b in enumerate(batches()) if i % 4 == 3]
    for index, encoding in itertools.product((0, 2, 4), WIDTHS):
        twin = copy.deepcopy(model)
        weight = twin[index].weight
        weight.data = encoding.decode(encoding.encode(weight.detach()), tuple(weight.shape))
        with torch.no_grad():
            moved = sum((twin(b) - model(b)).square().sum() for b in held)
            error = moved / sum(model(b).square().sum() for b in held)
        loss = found[str(index), str(encoding)]
        assert loss.error == pytest.approx(float(error), rel=1e-3)
        assert loss.bytes == encoding.nbytes(tuple(weight.shape))


def test_measuring_leaves_the_program_alone():
    model = net()
    program = capture(model, batches()[0])
    before = {name: value.clone() for name, value in program.weights().items()}
    fitter, flat = registry().fitter("gptq"), [[b] for b in batches()]
    measure_losses(program, weight_sites(program), lambda _: WIDTHS, fitter, flat)
    assert all(torch.equal(value, before[name]) for name, value in program.weights().items())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), *[st.tuples(st.integers(1, 20), st.floats(0, 1))] * 3), min_size=1, max_size=4
    ),
    st.floats(1, 40),
)
def test_the_allocation_is_the_best_of_all(rows, bits):
    losses = [
        Loss(f"s{i}", str(Affine(b)), size, error)
        for i, (_, *options) in enumerate(rows)
        for b, (size, error) in zip((2, 4, 8), options, strict=True)
    ]
    table = Sensitivity(tuple(losses), {f"s{i}": 8 * count for i, (count, *_) in enumerate(rows)}, "made up")
    budget = bits * sum(table.weights.values()) / 8
    ways = [
        sum(error for _, error in way)
        for way in itertools.product(*(options for _, *options in rows))
        if sum(size for size, _ in way) <= budget
    ]
    if not ways:
        with pytest.raises(OptionError, match="smallest candidates"):
            table.allocate(bits)
        return
    chosen = table.allocate(bits)
    errors = {(loss.site, loss.encoding): loss.error for loss in losses}
    assert sum(errors[s, str(e)] for s, e in chosen.items()) == pytest.approx(min(ways), abs=1e-6)
    assert table.effective_bits(chosen) <= bits * (1 + 1e-9)


def test_a_table_survives_json_and_prints():
    table = measured(net())
    again = Sensitivity.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again == table
    lines = str(table).splitlines()
    assert lines[0] == "relative output error with one weight encoded, 12 held-out samples of the calibration data"
    worst = max(table.losses, key=lambda loss: loss.error)
    assert lines[2].split()[0] == worst.site and f"{worst.error**0.5:.5f}" in lines[2]


def test_another_budget_needs_no_new_measurement(reference, monkeypatch):
    recipe = "quantize:W4A16,group_size=8,effective_bits={}"
    first = reference(net(), [recipe.format(8)], batches()[0], calibration=batches())
    table = first._compiled().records[-1].result.sensitivity
    again = reference(net(), [recipe.format(7)], batches()[0], calibration=batches())
    monkeypatch.setattr("paretoc.passes.quantize.measure_losses", lambda *_: pytest.fail("measured again"))
    step = Quantize("W4A16", group_size=8, effective_bits=7, sensitivity=table)
    reused = reference(net(), [step], batches()[0], calibration=batches())
    text = [str(again.program.encoding(n)) for n in again.program.calls(decode)]
    assert text == [str(reused.program.encoding(n)) for n in reused.program.calls(decode)]
    for compiled, budget in ((first, 8), (again, 7)):
        assert compiled.report(latency=False).passes[-1]["metrics"]["effective_bits"] <= budget


def test_a_budget_beats_the_same_bits_everywhere(reference):
    class Uneven(nn.Module):
        """Half of the weights hardly reach the output."""

        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.loud(x) + 0.01 * self.quiet(x)

    model, data = Uneven(), batches()
    recipe = "quantize:W4A16,group_size=8,fitter=rtn"  # 8 bits with the scales
    budget = reference(model, [recipe + ",effective_bits=8,widths=[2,3,4,5,6,8]"], data[0], calibration=data)
    plain = reference(model, [recipe], data[0], calibration=data)
    other = [torch.randn(64, 16)]
    assert relative_error(budget.original, budget.program, [other]) < relative_error(
        plain.original, plain.program, [other]
    )


@pytest.mark.parametrize("scheme", ["W2A16,group_size=8", "W8A8", "W8A8-dynamic", "W4A16,group_size=8,fitter=gptq"])
def test_max_drop_is_honoured_on_held_out_batches(reference, scheme):
    model, data = net(), batches()
    free = reference(model, [f"quantize:{scheme}"], data[0], calibration=data)
    _, held = split([[b] for b in data])
    bound = 0.7 * relative_error(free.original, free.program, held)
    compiled = reference(model, [f"quantize:{scheme},max_drop={bound}"], data[0], calibration=data)
    assert relative_error(compiled.original, compiled.program, held) <= bound
    entry = compiled.report(latency=False).passes[-1]
    assert entry["metrics"]["drop"] <= bound
    assert entry["skipped"] and all("given back" in reason for reason in entry["skipped"].values())
    for site in weight_sites(compiled.program):
        if site.path in entry["skipped"]:
            assert compiled.program.encoding(site.weight) is None
            assert torch.equal(compiled.program.weight_value(site.weight), model[int(site.path)].weight.detach())
            assert "fake_quantize" not in str(site.input.target)


def test_a_generous_bound_gives_nothing_back(reference):
    compiled = reference(net(), ["quantize:W8A8-dynamic,max_drop=0.5"], batches()[0], calibration=batches())
    assert len(compiled.program.calls(decode)) == 3


def test_the_metric_of_the_user_is_what_counts(reference):
    model, data = net(), batches()
    labels = [model(b).argmax(-1) for b in data]

    def accuracy(run) -> float:
        right = [(run(b).argmax(-1) == y).float().mean() for b, y in zip(data, labels, strict=True)]
        return float(torch.stack(right).mean())

    free = reference(model, ["quantize:W2A16,group_size=8"], data[0], calibration=data)
    assert accuracy(free) < 0.95
    bounded = reference(
        model, ["quantize:W2A16,group_size=8,max_drop=0.05"], data[0], calibration=data, metric=accuracy
    )
    assert accuracy(bounded) >= 0.95


def test_what_is_given_back_stays_sparse(reference):
    compiled = reference(
        net(), ["prune_nm:2:4", "quantize:W2A16,group_size=8,max_drop=0.0"], batches()[0], calibration=batches()
    )
    assert [compiled.program.encoding(n) for n in compiled.program.calls(decode)] == [NM(2, 4)] * 3


def test_a_shared_weight_is_given_back_at_all_its_places(reference):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.relu(self.a(x)))

    model = Shared()
    compiled = reference(model, ["quantize:W8A8-dynamic,max_drop=0.0"], batches()[0], calibration=batches())
    assert torch.equal(compiled(batches()[0]), model(batches()[0]))


W4 = "quantize:W4A16,group_size=8,effective_bits="
REFUSED = {
    "one batch": (CalibrationError, "one batch cannot be fitted to and measured on", W4 + "7", 1),
    "too few bits": (OptionError, "the smallest candidates take 6.32 bits", W4 + "3", 8),
    "no integers": (OptionError, "effective_bits= chooses among integers", "quantize:MXFP4,effective_bits=5", 8),
    "negative": (OptionError, "max_drop=-1.0 is negative", "quantize:max_drop=-1", 8),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(reference, refused, case):
    kind, sentence, recipe, count = REFUSED[case]
    refused(kind, sentence, lambda: reference(net(), [recipe], batches()[0], calibration=batches(count)))


def test_a_site_that_was_not_measured(reference, refused):
    table = measured(net())
    short = Sensitivity(tuple(x for x in table.losses if x.site != "2"), {"0": 512, "4": 256}, table.data)
    step = Quantize("W4A16", group_size=8, effective_bits=7, sensitivity=short)
    sentence = "the sensitivity of '2' was not measured"
    refused(OptionError, sentence, lambda: reference(net(), [step], batches()[0], calibration=batches()))
