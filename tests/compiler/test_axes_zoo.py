"""Soundness of the axes on every architecture of the zoo, and how many of its weights lie on a free axis."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers as hf
from paretoc.compiler.axes import find_axes


def _load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / name
    spec = importlib.util.spec_from_file_location(f"paretoc_axes_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


zoo, checks = _load("test_zoo.py"), _load("compiler/test_axes.py")


def bert_classifier() -> zoo.Case:
    """A model that returns its residual stream pins it; with a task head the stream is free."""
    return zoo.text(hf.BertForSequenceClassification(hf.BertConfig(**zoo.SMALL, vocab_size=100)))


ARCHITECTURES = zoo.ZOO | {"bert_classifier": bert_classifier}
#: the share of the weights on a permutable axis; the others return their hidden states, or have tables of positions
COVERAGE = dict.fromkeys(("bert_classifier", "vit", "llama", "resnet"), 0.9)


#: captured with open axes, as users get them; the others with fixed ones, which is faster
OPEN = {"bert_classifier", "llama", "deberta_v2"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_called_free_is_free(name: str) -> None:
    model, inputs = ARCHITECTURES[name]()
    program = checks.captured(model, inputs, dynamic_shapes=None if name in OPEN else {})
    assert checks.unsound(program) == {}
    assert find_axes(program).coverage() >= COVERAGE.get(name, 0.4)


def test_the_first_states_of_a_recurrence_have_its_batch() -> None:
    """Captured with a fixed batch they are constants of that size, which nothing may cut."""
    program = checks.captured(*ARCHITECTURES["lstm"](), dynamic_shapes={})
    states = [axis for axis in find_axes(program) for use in axis.uses if use.parameter.startswith("constants.")]
    assert states and all(axis.readers for axis in states if axis.free("slice"))
