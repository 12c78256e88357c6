"""The order of passes: declared rules, phases, conflicts; and that `ordered` always satisfies `check`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc.compiler.errors import ScheduleError
from paretoc.compiler.passes import Pass, Phase
from paretoc.compiler.recipe import parse_passes
from paretoc.compiler.schedule import check, ordered, rules


def make(name: str, phase: Phase = Phase.TRANSFORM, **declared: tuple[str, ...]) -> Pass:
    """A pass that does nothing, with the given declarations."""
    return dataclass(frozen=True)(type(name, (Pass,), {"name": name, "phase": phase, **declared}))()


def names(passes) -> list[str]:
    return [p.name for p in passes]


MERGE = {"merge_models": {"models": [{}]}}
IN_ORDER = [MERGE, "canonicalize", "merge_tokens", "prune_nm", "quantize"]


def test_the_built_in_passes_in_their_order():
    passes = parse_passes(IN_ORDER)
    check(passes)
    assert ordered(passes) == passes


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            ["quantize:W8A8", "prune_nm"],
            "'quantize' stands before 'prune_nm', but SPARSIFY comes before QUANTIZE",
        ),
        (
            ["quantize:W4A16", "merge_tokens"],
            "'quantize' stands before 'merge_tokens', but TOKENS comes before QUANTIZE",
        ),
        (["prune_nm", MERGE], "'prune_nm' stands before 'merge_models', but COMBINE comes before SPARSIFY"),
        (
            ["canonicalize", MERGE],
            "'canonicalize' stands before 'merge_models', but COMBINE comes before CANONICALIZE",
        ),
        (
            ["prune_nm", "canonicalize"],
            "'prune_nm' stands before 'canonicalize', but CANONICALIZE comes before SPARSIFY",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_wrong_order_is_explained_with_one_that_works(refused, wrong, sentence):
    passes = parse_passes(wrong)
    error = refused(ScheduleError, sentence, lambda: check(passes))
    assert error.where == "passes="
    assert error.fix == "this order works: " + ", ".join(names(ordered(passes)))
    assert names(ordered(passes)) == names(reversed(passes))


def test_compile_checks_the_order_before_anything_else(reference, refused):
    sentence = "SPARSIFY comes before QUANTIZE"
    refused(ScheduleError, sentence, lambda: reference(None, ["quantize:W8A16", "prune_nm"], None))


def test_one_phase_keeps_the_users_order():
    passes = parse_passes(["quantize:W4A16,targets=*up", "quantize:W8A16,targets=*down"])
    for order in (passes, passes[::-1]):
        check(order)
        assert ordered(order) == order


def test_after_and_before(refused):
    first, second = make("first", before=("second",)), make("second")
    third = make("third", after=("second",))
    check([first, second, third])
    sentence = "'second' stands before 'first', but 'first' declares that it runs before 'second'"
    refused(ScheduleError, sentence, lambda: check([second, first]))
    sentence = "'third' stands before 'second', but 'third' declares that it runs after 'second'"
    refused(ScheduleError, sentence, lambda: check([third, second]))
    for order in permutations([first, second, third]):
        assert names(ordered(order)) == ["first", "second", "third"]


def test_a_declaration_outranks_the_phase():
    late = make("late", Phase.QUANTIZE, before=("early",))
    early = make("early", Phase.SPARSIFY)
    check([late, early])
    assert names(ordered([early, late])) == ["late", "early"]
    other = make("other", Phase.SPARSIFY, after=("late",))
    check([late, other])


@pytest.mark.parametrize("declaring", ["rotation", "pruning"])
def test_a_conflict_is_found_from_either_side(refused, declaring):
    rotation = make("rotation", conflicts=("pruning",) if declaring == "rotation" else ())
    pruning = make("pruning", conflicts=("rotation",) if declaring == "pruning" else ())
    for order in permutations([rotation, pruning, make("between")]):
        first, second = (p.name for p in order if p.name != "between")
        sentence = f"{first!r} and {second!r} cannot be combined: one undoes the other"
        refused(ScheduleError, sentence, lambda order=order: check(order))


def test_contradicting_rules_are_shown_as_a_cycle(refused):
    a = make("a", before=("b",))
    b = make("b", before=("c",))
    c = make("c", before=("a",))
    error = refused(ScheduleError, "the order rules of these passes contradict each other", lambda: ordered([a, b, c]))
    assert {"a", "b", "c"} <= set(error.what.split(": ")[1].replace(" → ", " ").split())


def test_rules_are_edges_with_a_reason():
    graph = rules(parse_passes(["quantize", "prune_nm"]))
    assert list(graph.edges(data="reason")) == [(1, 0, "SPARSIFY comes before QUANTIZE")]


def _is_valid(order) -> bool:
    try:
        check(order)
    except ScheduleError:
        return False
    return True


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(range(len(IN_ORDER) + 1)), max_size=7))
def test_any_passes_in_any_order_can_be_ordered(indices):
    passes = [parse_passes([[*IN_ORDER, "prune_tokens"][i]])[0] for i in indices]
    result = ordered(passes)
    check(result)
    assert sorted(map(id, result)) == sorted(map(id, passes))
    phases = [p.phase for p in result]
    assert phases == sorted(phases)
    assert _is_valid(passes) == ([p.phase for p in passes] == phases)


@st.composite
def declared(draw):
    """Random passes whose `after`/`before` follow one hidden order, so that no two rules contradict."""
    count = draw(st.integers(1, 6))
    phases = sorted(draw(st.lists(st.sampled_from(list(Phase)), min_size=count, max_size=count)))
    passes = []
    for i in range(count):
        earlier, later = [f"p{j}" for j in range(i)], [f"p{j}" for j in range(i + 1, count)]
        after = tuple(draw(st.lists(st.sampled_from(earlier), max_size=2)) if earlier else ())
        before = tuple(draw(st.lists(st.sampled_from(later), max_size=2)) if later else ())
        passes.append(make(f"p{i}", phases[i], after=after, before=before))
    return draw(st.permutations(passes))


@settings(max_examples=100, deadline=None)
@given(declared())
def test_declared_orders_are_always_found(passes):
    result = ordered(passes)
    check(result)
    place = {p.name: i for i, p in enumerate(result)}
    for p in passes:
        assert all(place[name] < place[p.name] for name in p.after if name in place)
        assert all(place[name] > place[p.name] for name in p.before if name in place)
    assert ordered(result) == result
