"""The helpers of the tests reject what they are there to reject."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.errors import OptionError, ParetocError, PassError


def _raise(error: Exception) -> None:
    raise error


def test_refused_accepts_the_error_it_names(refused):
    error = refused(OptionError, "of 3", lambda: _raise(OptionError("of 3 kinds", where="here", fix="do this")))
    assert error.where == "here"


@pytest.mark.parametrize(
    "error",
    [
        PassError("of 3 kinds", where="here", fix="do this"),
        OptionError("of 4 kinds", where="here", fix="do this"),
        OptionError("of 3 kinds", where="here"),
        OptionError("of 3 kinds", fix="do this"),
        OptionError("of 3 kinds\nin two lines", where="here", fix="do this"),
    ],
    ids=["another kind", "another sentence", "no fix", "no place", "more than three lines"],
)
def test_refused_rejects(refused, error: ParetocError):
    with pytest.raises(AssertionError):
        refused(OptionError, "of 3", lambda: _raise(error))


def test_refused_rejects_silence_and_other_exceptions(refused):
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refused(OptionError, "", lambda: None)
    with pytest.raises(ValueError, match="not ours"):
        refused(OptionError, "", lambda: _raise(ValueError("not ours")))


def test_captured_programs_do_not_share_their_graph(captured):
    _, first = captured("ViTForImageClassification")
    _, second = captured("ViTForImageClassification")
    first.graph.erase_node(first.output)
    assert second.output.op == "output"


def test_every_batch_norm_of_the_models_does_something(models):
    norms = [m for m in models.Cnn().modules() if hasattr(m, "running_var")]
    assert len(norms) == 3
    assert all(not torch.allclose(m.running_var, torch.ones(())) for m in norms)
