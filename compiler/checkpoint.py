"""What a long fit has finished, on disk: a run that was killed continues where it stopped and ends with the same bytes.

A step is known by everything that decides its result: the data, the fitter, the weights and encodings of this step
and of all before it. A file appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from .encodings import Arrays, Encoding, parse_encoding
from .files import whole_file

#: an encoding and what is stored under it
Stored = tuple[Encoding, Arrays]


class Checkpoint:
    """Steps in their order, each a list of stored arrays, under `directory`; with None nothing is kept."""

    def __init__(self, directory: str | os.PathLike[str] | None, *facts: object) -> None:
        self.directory = None if directory is None else Path(directory)
        self.state = hashlib.sha256()
        for fact in facts:
            self._add(fact)

    def _add(self, fact: object) -> None:
        if isinstance(fact, Tensor):
            self.state.update(f"{fact.dtype}{list(fact.shape)}".encode())
            self.state.update(fact.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
        else:
            self.state.update(str(fact).encode())

    def step(self, weights: Sequence[Tensor], encodings: Sequence[Encoding]) -> Path | None:
        """The file of the next step."""
        if self.directory is None:
            return None
        for fact in (*weights, *encodings):
            self._add(fact)
        return self.directory / f"{self.state.hexdigest()}.safetensors"


def read(file: Path | None) -> list[Stored] | None:
    """What a finished step stored, or None when it is not finished."""
    if file is None or not file.exists():
        return None
    with safe_open(file, "pt") as opened:
        texts = opened.metadata()
        named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dictionary
    found = []
    for index in sorted(texts, key=int):
        arrays = {name.removeprefix(f"{index}/"): a for name, a in named.items() if name.startswith(f"{index}/")}
        found.append((parse_encoding(texts[index]), arrays))
    return found


def write(file: Path | None, stored: Sequence[Stored]) -> None:
    """Keep a finished step. Raises ArtifactError when the directory cannot be written."""
    if file is None:
        return
    named = {f"{i}/{key}": array.contiguous() for i, (_, arrays) in enumerate(stored) for key, array in arrays.items()}
    texts = {str(i): str(encoding) for i, (encoding, _) in enumerate(stored)}
    with whole_file(file, where="checkpoint=", fix="choose a writable directory") as part:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(named, part, texts)
