"""The table of axes, the picture of one, and the verb that shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import paretoc as pc
import pytest
import torch
from paretoc.compiler.axes import Axes, find_axes
from paretoc.compiler.axis_drawing import picture, pictured, rows
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.cli import main
from paretoc.compiler.errors import OptionError

MODULE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 7)), torch.ones(2, 6)
"""


@pytest.fixture(scope="module")
def axes(models: Any) -> Axes:
    program = pc.capture(models.Vit(depth=1).eval(), (torch.randn(2, 16, 12),))
    canonicalize(program)
    return find_axes(program)


def test_rows_say_what_is_free_and_why_the_rest_is_not(axes: Axes) -> None:
    table = {row[2]: row for row in rows(axes)}
    hidden = table["blocks.0.mlp.up.weight.0, blocks.0.mlp.up.bias.0, blocks.0.mlp.down.weight.1"]
    assert hidden[1:] == (
        "32",
        hidden[2],
        "permute, slice",
        "rotate, scale: aten.gelu.default does not commute with it (node gelu)",
    )
    stuck = [row for row in table.values() if not row[3]]
    assert [row[4] for row in stuck] == ["it is an input of the model", "it is an output of the model"]
    assert all(axes[int(row[0])].uses for row in table.values() if row[0])


def test_fused_projections_are_written_with_their_heads(axes: Axes) -> None:
    text = next(row[2] for row in rows(axes) if "qkv" in row[2])
    assert "blocks.0.attention.qkv.weight.0 (3 × [2] × 8)" in text


def test_the_picture_shows_every_parameter_on_the_axis(axes: Axes) -> None:
    axis = pictured(axes, None)
    drawn = ElementTree.fromstring(picture(axes, axis))
    texts = " ".join(element.text or "" for element in drawn.iter("{http://www.w3.org/2000/svg}text"))
    assert len(axis.uses) > 8
    assert [str(use) for use in axis.uses if str(use) not in texts] == []
    assert "a norm multiplies each channel by a weight of its own" in texts
    places = [int(circle.attrib["cy"]) for circle in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    assert places == sorted(set(places)), "one operator a line, downwards"
    assert picture(axes, axis) == picture(axes, axis)


def test_the_number_of_a_picture_must_exist(axes: Axes, refused: Callable[..., Any]) -> None:
    assert pictured(axes, 3) is axes[3]
    refused(OptionError, f"there is no axis {len(axes)}", lambda: pictured(axes, len(axes)))


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "axes_of_mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["axes", "axes_of_mine:mlp", "--svg", "axis.svg"]) == 0
    out = capsys.readouterr().out
    assert "0.weight.0, 0.bias.0, 2.weight.1" in out
    assert f"{100 * (72 + 12 + 84) / (72 + 12 + 84 + 7):.1f} % of the weights" in out
    assert "0.weight.0" in (tmp_path / "axis.svg").read_text()
    assert main(["axes", "axes_of_mine:mlp", "--svg", "other.svg", "--axis", "9"]) == 2
    assert "there is no axis 9" in capsys.readouterr().err
    assert not (tmp_path / "other.svg").exists()
