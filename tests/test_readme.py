"""The README runs: its Python blocks from top to bottom, its commands and links as far as they name something."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from paretoc.compiler import cli
from paretoc.compiler.recipe import parse_passes
from paretoc.compiler.registry import registry

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line of the first line of code, code) of every fenced block in `language`."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run_blocks(file: Path) -> None:
    """Execute the Python blocks in one namespace; a traceback shows the line of the page."""
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, code in blocks(file.read_text(encoding="utf-8"), "python"):
        exec(compile("\n" * line + code, str(file), "exec", dont_inherit=True), namespace)


def commands(text: str) -> list[list[str]]:
    """The words of every `$ …` line in the console blocks."""
    lines = [line for _, code in blocks(text, "console") for line in code.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


@pytest.fixture
def text() -> str:
    return README.read_text(encoding="utf-8")


def test_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(README)
    assert sorted(os.listdir("out")) == ["manifest.json", "model.onnx", "report.html", "weights.safetensors"]
    printed = capsys.readouterr().out
    assert "[16, 14, 12]" in printed and "Sign()" in printed
    code = next(code for _, code in blocks(text, "python") if "ParetocError" in code)
    shown = [line[2:] for line in code.splitlines() if line.startswith("# ")]
    assert len(shown) == 3 and "\n".join(shown) in printed, "the error shown is the error raised"


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nvalue = 1\n```\n\n```python\nassert value == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 7  # counted from 0: the eighth line of the page


def test_the_commands_shown_exist(text: str) -> None:
    shown = commands(text)
    assert {words[0] for words in shown} == {"pip", "make", "paretoc"}
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in shown:
        if words[0] == "make":
            assert words[1] in targets
        if words[0] == "paretoc":
            arguments = cli._parser().parse_args(words[1:])
            parse_passes(getattr(arguments, "passes", []))


def test_a_command_that_does_not_exist_is_found() -> None:
    assert commands("```console\n$ paretoc compress x  # words\n```\n") == [["paretoc", "compress", "x"]]
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["compress", "x"])


def test_the_recipe_shown_parses(text: str, tmp_path: Path) -> None:
    [(_, recipe)] = blocks(text, "yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    assert [step.name for step in parse_passes(file)] == ["prune_nm", "quantize"]


def test_the_tables_name_every_pass_and_target(text: str) -> None:
    named = set(re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE))
    built_in = {name for name, cls in registry().passes.items() if cls.__module__.startswith("paretoc.")}
    assert built_in <= named
    assert {name for name, b in registry().backends.items() if type(b).__module__.startswith("paretoc.")} <= named


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_files_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)|`((?:tests|plugins|benchmarks)/[\w/.]*)|python (benchmarks/\w+\.py)", text)
    assert named
    for match in named:
        assert (ROOT / next(filter(None, match))).exists(), match
