"""Passes as the user writes them: every form gives the same objects, and every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from paretoc import MergeModels, MergeTokens, PruneNM, PruneTokens, Quantize, ReduceTokens
from paretoc.compiler.errors import OptionError
from paretoc.compiler.recipe import parse_passes


def one(form):
    (built,) = parse_passes(form)
    return built


FORMS = {
    "bare": (
        PruneNM(),
        ["prune_nm", {"prune_nm": None}, {"prune_nm": {}}, PruneNM, "prune_nm:"],
    ),
    "positional": (
        PruneNM(pattern="4:8"),
        [
            "prune_nm:4:8",
            {"prune_nm": "4:8"},
            {"prune_nm": {"pattern": "4:8"}},
            "prune_nm:pattern=4:8",
            PruneNM(pattern="4:8"),
        ],
    ),
    "options": (
        Quantize(scheme="W4A16", group_size=64, embeddings=True),
        [
            "quantize:W4A16,group_size=64,embeddings=true",
            " quantize : W4A16 , group_size = 64 , embeddings = yes ",
            {"quantize": {"scheme": "W4A16", "group_size": 64, "embeddings": True}},
            {"quantize": {"scheme": "W4A16", "group_size": "64", "embeddings": "true"}},
        ],
    ),
    "lists": (
        Quantize(scheme="W8A16", targets=("*.mlp.*", "re:a,b|c"), ignore=("head",)),
        [
            {"quantize": {"scheme": "W8A16", "targets": ["*.mlp.*", "re:a,b|c"], "ignore": "head"}},
            {"quantize": {"scheme": "W8A16", "targets": ("*.mlp.*", "re:a,b|c"), "ignore": ["head"]}},
        ],
    ),
    "lists in text": (
        Quantize(scheme="W8A16", targets=("*.mlp.*", "head"), ignore=("re:(up|down)$",)),
        ["quantize:W8A16,targets=[*.mlp.*,head],ignore=re:(up|down)$"],
    ),
    "text that looks like a number": (
        Quantize(scheme="W8A8", targets=("0", "on", "1e3"), ignore=("2",)),
        [
            "quantize:W8A8,targets=[0,on,1e3],ignore=2",
            "quantize:W8A8,targets=[0,on,1e3],ignore=[2]",
            {"quantize": {"scheme": "W8A8", "targets": ["0", "on", "1e3"], "ignore": "2"}},
        ],
    ),
    "a list of numbers": (
        MergeTokens(r=(3, 2, 1), layers=(0, 1, 2)),
        [
            "merge_tokens:[3,2,1],layers=[0,1,2]",
            "merge_tokens:r=[3, 2, 1],layers=[0, 1, 2]",
            {"merge_tokens": {"r": [3, 2, 1], "layers": [0, 1, 2]}},
        ],
    ),
    "a number": (MergeTokens(r=4), ["merge_tokens:4", "merge_tokens:r=4", {"merge_tokens": 4}]),
    "a fraction": (
        PruneTokens(keep=0.5, fuse=True),
        ["prune_tokens:0.5,fuse=true", {"prune_tokens": {"keep": 0.5, "fuse": True}}],
    ),
    "a whole fraction": (
        PruneTokens(keep=1.0),
        ["prune_tokens:1", "prune_tokens:keep=1.0", {"prune_tokens": 1}],
    ),
    "null": (
        ReduceTokens("merge", r=None, keep=0.5),
        ["reduce_tokens:merge,r=null,keep=0.5", {"reduce_tokens": {"keep": 0.5}}],
    ),
}


@pytest.mark.parametrize(("expected", "forms"), FORMS.values(), ids=FORMS)
def test_every_form_of_one_pass_is_the_same(expected, forms):
    for form in forms:
        assert one(form) == expected, form
        assert type(one(form)) is type(expected)


def test_a_sequence_and_a_single_pass():
    expected = [PruneNM(), Quantize(scheme="W8A16")]
    assert parse_passes(["prune_nm", "quantize:W8A16"]) == expected
    assert parse_passes(("prune_nm", Quantize(scheme="W8A16"))) == expected
    assert parse_passes({"prune_nm": None, "quantize": "W8A16"}) == expected
    assert parse_passes("prune_nm") == [PruneNM()]
    assert parse_passes(PruneNM()) == parse_passes(PruneNM) == [PruneNM()]
    assert parse_passes(()) == []


RECIPE = """
# two passes
- prune_nm: "2:4"
- quantize: {scheme: W4A16, group_size: 64, targets: ["*.mlp.*"]}
- canonicalize
"""


def test_a_yaml_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    expected = parse_passes(["prune_nm:2:4", "quantize:W4A16,group_size=64,targets=*.mlp.*", "canonicalize"])
    assert parse_passes(file) == expected
    assert parse_passes(str(file)) == expected
    assert parse_passes([str(file)]) == expected
    assert parse_passes([Path(file), "quantize:W8A16"]) == [*expected, Quantize(scheme="W8A16")]


def test_a_recipe_may_include_another(tmp_path):
    (tmp_path / "inner.yml").write_text("- prune_nm")
    (tmp_path / "outer.yml").write_text(yaml.safe_dump([str(tmp_path / "inner.yml"), "quantize:W8A16"]))
    assert parse_passes(tmp_path / "outer.yml") == [PruneNM(), Quantize(scheme="W8A16")]


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(["W8A8", "W8A8-dynamic", "W8A16"]),
    fitter=st.sampled_from(["rtn", "mse"]),
    granularity=st.sampled_from([None, "tensor", "token"]),
    embeddings=st.booleans(),
    symmetric=st.booleans(),
    targets=st.lists(st.sampled_from(["*.up", "Linear", "head", "re:^a$", "2", "010"]), max_size=3),
)
def test_the_text_form_of_a_pass_reads_back(**options):
    if options["scheme"] != "W8A8-dynamic":
        del options["granularity"]
    built = Quantize(**options)
    assert one(built.describe()) == built
    assert one({"quantize": options}) == built
    assert one(yaml.safe_load(yaml.safe_dump([{"quantize": options}]))) == built


@pytest.mark.parametrize(
    "built", [MergeTokens(r=(3, 2)), PruneTokens(0.5), MergeTokens(r=4, schedule="decreasing")], ids=str
)
def test_the_text_form_of_token_passes_reads_back(built):
    assert one(built.describe()) == built


# -- mistakes --------------------------------------------------------------------------------------------

MISTAKES = {
    "an unknown pass": ("quantise:W8A8", "there is no pass called 'quantise'", "did you mean 'quantize'"),
    "nothing like a pass": ("zzz", "there is no pass called 'zzz'", "known: adaptive_computation, aqlm"),
    "an unknown option": (
        "quantize:W8A8,fiter=rtn",
        "pass 'quantize' has no option 'fiter'",
        "did you mean 'fitter'?",
    ),
    "an unknown scheme": ("quantize:W8A9", "there is no scheme 'W8A9'", "did you mean"),
    "a number for a scheme": ("quantize:8", "there is no scheme '8'", "did you mean 'FP8'"),
    "an unknown fitter": (
        "quantize:W8A16,fitter=ms",
        "there is no fitter called 'ms'",
        "did you mean 'mse'",
    ),
    "an unknown granularity": ("quantize:granularity=row", "granularity 'row' is not known", "use 'tensor'"),
    "a group for a scheme without": (
        "quantize:W8A8,group_size=32",
        "group_size=32 does not apply to W8A8",
        "W4A16",
    ),
    "a group of nothing": (
        "quantize:W4A16,group_size=0",
        "group_size=0 does not apply to W4A16",
        "positive size",
    ),
    "text for a number": (
        "quantize:W4A16,group_size=big",
        "'big' is not a value for 'group_size'",
        "give int",
    ),
    "a fraction for a number": ("merge_tokens:r=2.5", "2.5 is not a value for 'r'", "give int"),
    "text for a switch": (
        "quantize:embeddings=perhaps",
        "'perhaps' is not a value for 'embeddings'",
        "give bool",
    ),
    "a number for text": ({"quantize": {"scheme": 8}}, "8 is not a value for 'scheme'", "give str"),
    "a switch for a number": ({"merge_tokens": {"r": True}}, "True is not a value for 'r'", "give int"),
    "an option twice": ("quantize:W8A8,scheme=W8A16", "the option 'scheme' is given twice", "give it once"),
    "two bare values": ("quantize:W8A8,W8A16", "the option 'scheme' is given twice", "give it once"),
    "a value for a pass without": (
        "canonicalize:all",
        "pass 'canonicalize' takes no bare value, got 'all'",
        "write option",
    ),
    "a pattern that is none": ("prune_nm:half", "'half' is not a sparsity pattern", "write n:m"),
    "a pattern too long": ("prune_nm:1:2:3", "'1:2:3' is not a sparsity pattern", "write n:m"),
    "an impossible pattern": ("prune_nm:4:2", "4:2 is not a sparsity pattern", "0 < n < m"),
    "neither r nor keep": ("reduce_tokens:merge", "give either r or keep", "for example r=8"),
    "both r and keep": ("reduce_tokens:merge,r=2,keep=0.5", "give either r or keep", "for example"),
    "a negative r": ("merge_tokens:r=-1", "r=-1, keep=None is out of range", "use r >= 0"),
    "keeping nothing": ("prune_tokens:0", "keep=0.0 is out of range", "0 < keep <= 1"),
    "keeping too much": ("prune_tokens:1.5", "keep=1.5 is out of range", "0 < keep <= 1"),
    "an unknown schedule": ("merge_tokens:4,schedule=up", "there is no schedule 'up'", "use 'constant'"),
    "an unknown method": (
        {"merge_models": {"method": "slurp", "models": [{}]}},
        "there is no merge method 'slurp'",
        "linear",
    ),
    "nothing to merge": ("merge_models:linear", "there is nothing to merge with", "give models="),
    "too few weights": (
        {"merge_models": {"models": [{}], "weights": [1]}},
        "1 weights (sum 1) do not fit 2 models",
        "give 2",
    ),
    "weights of nothing": (
        {"merge_models": {"models": [{}], "weights": [1, -1]}},
        "2 weights (sum 0) do not fit 2 models",
        "do not sum to zero",
    ),
    "a number": (3, "3 is not a pass", "pass an object"),
    "None": (None, "None is not a pass", "pass an object"),
}


@pytest.mark.parametrize(("form", "sentence", "fix"), MISTAKES.values(), ids=MISTAKES)
def test_every_mistake_is_named(refused, form, sentence, fix):
    error = refused(OptionError, sentence, lambda: parse_passes([form]))
    assert fix in error.fix


def test_what_is_no_pass_at_all_is_named(refused):
    refused(OptionError, "3 is not a pass", lambda: parse_passes(3))


def test_a_bare_value_of_token_passes_comes_first_in_python_too():
    assert MergeTokens(4) == one("merge_tokens:4")
    assert PruneTokens(0.5) == one("prune_tokens:0.5")


def test_an_unknown_token_rule_is_named(refused):
    rule = one("reduce_tokens:merg,r=2")
    error = refused(OptionError, "there is no token rule called 'merg'", rule.token_rule)
    assert error.fix == "did you mean 'merge'?"


def test_mistakes_in_objects_are_the_same_errors(refused):
    refused(OptionError, "there is no scheme 'int3'", lambda: Quantize(scheme="int3"))
    refused(OptionError, "there is nothing to merge with", MergeModels)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("prune_nm: 2:4", "is not a list"),
        ("- {prune_nm: [", "cannot be read"),
        ("- prune_nmm", "there is no pass called 'prune_nmm'"),
        ("", "is not a list"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
    ids=["a mapping", "broken yaml", "an unknown pass", "nothing", "no text"],
)
def test_broken_recipes_are_named(tmp_path, refused, content, sentence):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(OptionError, sentence, lambda: parse_passes(file))


def test_a_missing_recipe_is_named(tmp_path, refused):
    refused(OptionError, "cannot be read: [Errno 2]", lambda: parse_passes(tmp_path / "none.yaml"))


def test_a_recipe_is_data(tmp_path, refused):
    file = tmp_path / "recipe.yaml"
    file.write_text("- !!python/object/apply:os.system ['true']")
    refused(OptionError, "cannot be read", lambda: parse_passes(file))


def test_a_recipe_that_includes_itself_is_named(tmp_path, refused):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"- {file}")
    refused(OptionError, "includes itself", lambda: parse_passes(file))


def test_the_bare_value_of_the_text_form_comes_first_in_python_too():
    assert Quantize("W8A16") == one("quantize:W8A16")
    assert PruneNM("4:8") == one("prune_nm:4:8")
