"""Targets: what each kind of pattern matches, the match table, and near misses."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.capture import capture
from paretoc.compiler.errors import OptionError
from paretoc.compiler.targets import select

LINEAR = [f"blocks.{i}.{part}" for i in range(2) for part in ("attention.qkv", "attention.out", "mlp.up", "mlp.down")]
ALL = ["embed", *LINEAR, "head"]


@pytest.fixture(scope="module")
def program(models):
    return capture(models.Vit(depth=2), torch.randn(2, 16, 12))


def _select(program, targets=(), ignore=(), kinds=("linear",)):
    return select(program, tuple(targets), tuple(ignore), kinds, where="pass 'test'")


def _paths(*arguments, **options) -> list[str]:
    return [s.path for s in _select(*arguments, **options).sites]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], ALL),
        (["Linear"], ALL),
        (["head"], ["head"]),
        (["blocks.*"], LINEAR),
        (["*.mlp.*"], [p for p in LINEAR if ".mlp." in p]),
        (["blocks.[0].mlp.up"], ["blocks.0.mlp.up"]),
        (["re:^blocks\\.1\\."], [p for p in LINEAR if p.startswith("blocks.1")]),
        (["re:qkv|out"], [p for p in LINEAR if "attention" in p]),
        (["head", "embed"], ["embed", "head"]),
        (["blocks.0.*", "*.up"], [*LINEAR[:4], "blocks.1.mlp.up"]),
    ],
)
def test_patterns(program, targets, expected):
    assert _paths(program, targets) == expected


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ([], ["blocks.*"], ["embed", "head"]),
        ([], ["Linear"], []),
        (["*.mlp.*"], ["re:^blocks.0"], ["blocks.1.mlp.up", "blocks.1.mlp.down"]),
    ],
)
def test_ignore_wins_over_targets(program, targets, ignore, expected):
    assert _paths(program, targets, ignore) == expected


def test_kinds_are_kept_apart(program):
    norms = _paths(program, kinds=("norm",))
    assert norms == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert _paths(program, ["*norm*"], kinds=("norm",)) == norms
    assert _paths(program, kinds=("conv",)) == []


def test_the_match_table(program):
    selection = _select(program, ["*.up", "head"], ["blocks.0.*"])
    assert selection.table == {
        "*.up": ["blocks.0.mlp.up", "blocks.1.mlp.up"],
        "head": ["head"],
        "blocks.0.*": LINEAR[:4],
    }
    assert str(selection) == "*.up: 2 sites\nhead: 1 sites\nblocks.0.*: 4 sites"


@pytest.mark.parametrize("where", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("pattern", "close"),
    [
        ("blocks.0.mlp.upp", "blocks.0.mlp.up"),
        ("heads", "head"),
        ("Linar", "Linear"),
        ("re:embedd$", "embed"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_misses(program, refused, pattern, close, where):
    sentence = f"the pattern {pattern!r} matches none of the 10 linear sites"
    error = refused(OptionError, sentence, lambda: _select(program, **{where: [pattern]}))
    assert error.where == "pass 'test'"
    assert error.fix.startswith("did you mean")
    assert close in error.fix


def test_a_pattern_like_nothing_shows_what_names_look_like(program, refused):
    error = refused(OptionError, "matches none", lambda: _select(program, ["zzzzzz"]))
    assert error.fix == "sites are named like ['Linear', 'blocks.0.attention.out', 'blocks.0.attention.qkv']"


def test_globs_are_case_sensitive(program, refused):
    refused(OptionError, "matches none", lambda: _select(program, ["HEAD"]))


def test_a_broken_regular_expression_is_named(program, refused):
    refused(OptionError, "'re:(' is not a regular expression", lambda: _select(program, ["re:("]))
