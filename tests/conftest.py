"""Fixtures for every test: seeds, small models, captures made once, compilation for the reference backend."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.errors import ParetocError


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"paretoc_tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_MODELS = _load(Path(__file__).with_name("models.py"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small operators run faster on one thread, and their sums in one order.

    Captures make many small objects, which the collector would walk over and over: it runs less often.
    """
    threads, collector = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)
    gc.set_threshold(200_000, 50, 50)
    yield
    torch.set_num_threads(threads)
    gc.set_threshold(*collector)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """The module `tests/models.py`."""
    return _MODELS


@pytest.fixture(scope="session")
def reference() -> Callable[..., Any]:
    """`compile` for the reference backend: `reference(model, passes, example, **options)`."""

    def compiled(model: Any, passes: Any, example: Any, **options: Any) -> Any:
        if isinstance(model, torch.nn.Module):
            model.eval()
        return pc.compile(model, passes, example_inputs=example, target="eager", **options)

    return compiled


@pytest.fixture(scope="session")
def captured() -> Callable[..., tuple[torch.nn.Module, Any]]:
    """`captured(name, **options)` → (model, a copy of its canonical program); captured once a session."""
    made: dict[str, tuple[torch.nn.Module, Any]] = {}

    def get(name: str, **options: Any) -> tuple[torch.nn.Module, Any]:
        if options.get("attn_implementation") == "sdpa":
            del options["attn_implementation"]  # the default
        key = f"{name} {sorted(options.items())}"
        if key not in made:
            torch.manual_seed(0)
            text = name.startswith("Bert")
            model = _MODELS.hugging_face(name, **options)
            program = pc.capture(model, _MODELS.sentences() if text else _MODELS.images())
            canonicalize(program)
            made[key] = model, program
        model, program = made[key]
        return model, program.clone()

    return get


@pytest.fixture(scope="session")
def refused() -> Callable[..., ParetocError]:
    """`refused(kind, sentence, call)`: it raises exactly this kind, with this sentence, in three lines."""

    def check(kind: type[ParetocError], sentence: str, call: Callable[[], Any]) -> ParetocError:
        with pytest.raises(ParetocError) as caught:
            call()
        error = caught.value
        assert type(error) is kind, error
        assert sentence in error.what, f"{sentence!r} is not in {error.what!r}"
        assert error.where and error.fix, f"an error says where and what to do: {error}"
        lines = str(error).splitlines()
        assert len(lines) == 3, f"an error has three lines: {error}"
        return error

    return check
