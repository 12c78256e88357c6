"""Saved artifacts: model.onnx, weights.safetensors, manifest.json, report.html. Data only; loading executes nothing.

`model.onnx` refers to `weights.safetensors` for its large tensors, so every weight is on disk once. The manifest
holds the call signature, what the session needs, and a SHA-256 of each file. Writing is all or nothing.
An artifact of several models has a `model-NAME.onnx` and a `report-NAME.html` for each, over one file of weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.utils._pytree as pytree

from .backend import Executable, Explanation, Sharing
from .causal import Cache
from .errors import ArtifactError, OptionError, did_you_mean
from .generate import Generator
from .program import Interface, Output, Program
from .registry import registry
from .report import Report

FORMAT = 1
MANIFEST = "manifest.json"
_CONTAINERS: dict[str, Any] = {"tuple": tuple, "list": list, "dict": dict}


@dataclass
class LoadedModel(Generator):
    """A model read from an artifact: called like the original, no class or calibration data needed."""

    manifest: dict[str, Any]
    interface: Interface
    executable: Executable
    stored_report: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.interface.unflatten(self.executable.run(self.interface.flatten(args, kwargs)))

    def _runs(self) -> tuple[Interface, Executable]:
        return self.interface, self.executable

    def explain(self) -> Explanation:
        return Explanation(self.manifest["target"], self.executable.explain())

    def report(self) -> dict[str, Any]:
        """The figures that were stored when the artifact was made."""
        return self.stored_report

    def export_onnx(self, path: str | os.PathLike[str]) -> None:
        export_file(path, self.executable)


@dataclass(frozen=True)
class Member:
    """One of the models that an artifact holds."""

    executable: Executable
    program: Program
    facts: dict[str, Any]
    report: Report

    def entry(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says about it."""
        interface = _dump_interface(self.program.interface)
        return {**self.facts, "interface": interface, "settings": settings, "report": self.report.to_dict()}


def save_artifact(directory: str | os.PathLike[str], model: Member) -> None:
    """Write an artifact. The directory appears complete or not at all; an existing artifact is replaced."""
    with _complete(directory) as (stage, manifest):
        manifest |= model.entry(model.executable.save(stage))
        model.report.to_html(stage / "report.html")


def save_members(directory: str | os.PathLike[str], members: Mapping[str, Member], backend: Sharing) -> None:
    """Write an artifact of several models, with what their weights share stored once."""
    files = {name: f"model-{name}.onnx" for name in members}
    with _complete(directory) as (stage, manifest):
        settings = backend.save_all({files[name]: member.executable for name, member in members.items()}, stage)
        manifest["members"] = {name: member.entry(settings[files[name]]) for name, member in members.items()}
        for name, member in members.items():
            member.report.to_html(stage / f"report-{name}.html")


def member_name(member: str | float) -> str:
    """The name of a model in an artifact: 0.5 and "0.5" are one. Raises OptionError for what cannot name a file."""
    name = member if isinstance(member, str) else f"{member:g}"
    if not name or Path(name).name != name:
        raise OptionError(f"{name!r} cannot be the name of a model", where="save", fix="use a number or a plain word")
    return name


@contextmanager
def _complete(directory: str | os.PathLike[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to fill and its manifest, which together take the place of `directory` when all went well."""
    target = check_output(directory)
    with _staging(target) as stage:
        manifest: dict[str, Any] = {"format": FORMAT}
        yield stage, manifest
        manifest["files"] = {p.name: _sha256(p) for p in sorted(stage.iterdir())}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.replace(stage, target)


def check_output(directory: str | os.PathLike[str]) -> Path:
    """Refuse, before any work is done, a directory that `save` could not or should not write."""
    target = Path(directory)
    if target.exists() and not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(
            f"{str(target)!r} exists and is not an artifact", where="save", fix="choose an empty or new directory"
        )
    parent = next(p for p in target.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise ArtifactError(f"cannot write to {str(parent)!r}", where="save", fix="choose a writable directory")
    return target


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target`, removed when anything fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write to {str(target.parent)!r}: {error.strerror}", where="save", fix="choose a writable directory"
        ) from error
    try:
        stage.chmod(0o755)
        yield stage
    except OSError as error:
        raise ArtifactError(
            f"writing {str(target)!r} failed: {error.strerror}", where="save", fix="check the disk and permissions"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def export_file(path: str | os.PathLike[str], executable: Executable) -> None:
    """Write one ONNX file, atomically."""
    target = Path(path)
    with _staging(target) as stage:
        executable.export(stage / target.name)
        for written in sorted(stage.iterdir()):
            os.replace(written, target.parent / written.name)


def load(path: str | os.PathLike[str], member: str | float | None = None) -> LoadedModel:
    """Read an artifact written by `CompiledModel.save`, or one `member` of one written by `save`.

    Raises ArtifactError when a file is missing, truncated or altered, or when the manifest points outside.
    """
    directory = Path(path)
    manifest = _read_manifest(directory)
    for name, digest in manifest["files"].items():
        file = directory / name
        if Path(name).name != name or file.is_symlink():
            raise ArtifactError(
                f"the manifest names the file {name!r}", where=str(directory), fix="paths may not leave the artifact"
            )
        if not file.is_file() or _sha256(file) != digest:
            state = "is altered or truncated" if file.exists() else "is missing"
            raise ArtifactError(f"{name!r} {state}", where=str(directory), fix="save or copy the artifact again")
    try:
        manifest = _choose(manifest, member, directory)
        interface = _load_interface(manifest["interface"])
        backend = "onnx" if manifest["target"] == "eager" else manifest["target"]
        executable = registry().backend(backend).load(directory, manifest["settings"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"the manifest is damaged: {error!r}", where=str(directory / MANIFEST), fix="save the artifact again"
        ) from error
    return LoadedModel(manifest, interface, executable, manifest.get("report", {}))


def _choose(manifest: dict[str, Any], member: str | float | None, directory: Path) -> dict[str, Any]:
    """The entry of one model."""
    members = manifest.get("members")
    if members is None and member is None:
        return manifest
    if members is None or member is None:
        what = "it holds one model, without a name" if members is None else "it holds several models"
        fix = "load it without a name" if members is None else f"name one of them: {', '.join(members)}"
        raise ArtifactError(what, where=str(directory), fix=fix)
    name = member_name(member)
    if name not in members:
        raise ArtifactError(f"it holds no model {name!r}", where=str(directory), fix=did_you_mean(name, members))
    return members[name]  # type: ignore[no-any-return]  # JSON


def _read_manifest(directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{str(directory)!r} is not an artifact: it has no {MANIFEST}",
            where="load",
            fix="give the directory that CompiledModel.save wrote",
        ) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{MANIFEST} cannot be read: {error}", where=str(directory), fix="save the artifact again"
        ) from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise ArtifactError(
            f"{MANIFEST} is not of format {FORMAT}", where=str(directory), fix="save the artifact with this version"
        )
    return manifest


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# -- the call signature as JSON: containers by name, never a pickle, never an import ----------------------------------


def _dump_interface(interface: Interface) -> dict[str, Any]:
    return {
        "parameters": list(interface.parameters),
        "in": _dump_tree(interface.in_spec),
        "leaves": [[kind, _plain(value)] for kind, value in interface.leaves],
        "out": _dump_tree(interface.out_spec),
        "results": [[kind, _plain(value)] for kind, value in interface.results],
        "defaults": [[name, _plain(value)] for name, value in interface.defaults],
        "cache": asdict(interface.cache) if interface.cache else None,
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(
        f"the model takes or returns the constant {value!r}, which cannot be stored",
        where="save",
        fix="capture the model without it",
    )


def _dump_tree(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return "*"
    children = [_dump_tree(child) for child in spec.children()]
    kind = spec.type
    if kind in _CONTAINERS.values():
        node: dict[str, Any] = {"kind": kind.__name__, "children": children}
    elif issubclass(kind, dict):  # transformers.ModelOutput and its like: fields by name, in order
        node = {"kind": "output", "children": children}
    elif hasattr(kind, "_fields") or hasattr(spec.context, "_fields"):
        fields = getattr(kind, "_fields", None) or spec.context._fields
        return {"kind": "output", "children": children, "keys": list(fields)}
    else:
        raise ArtifactError(
            f"the model uses the container {kind.__qualname__}, which cannot be stored",
            where="save",
            fix="return tensors in tuples, lists, dicts or ModelOutputs",
        )
    if issubclass(kind, dict):
        context = spec.context
        keys = context[1] if kind is not dict and len(context) == 2 and not isinstance(context[0], str) else context
        node["keys"] = list(keys)
    return node


def _load_tree(node: Any) -> Any:
    """A dumped tree → nested containers with placeholder leaves, to be turned into a TreeSpec."""
    if node == "*":
        return 0
    children = [_load_tree(child) for child in node["children"]]
    if node["kind"] in ("tuple", "list"):
        return _CONTAINERS[node["kind"]](children)
    pairs = dict(zip(node["keys"], children, strict=True))
    return pairs if node["kind"] == "dict" else Output(pairs)


def _load_interface(data: dict[str, Any]) -> Interface:
    return Interface(
        tuple(data["parameters"]),
        pytree.tree_structure(_load_tree(data["in"])),
        tuple((kind, value) for kind, value in data["leaves"]),
        pytree.tree_structure(_load_tree(data["out"])),
        tuple((kind, value) for kind, value in data["results"]),
        tuple((name, value) for name, value in data["defaults"]),
        _load_cache(data["cache"]) if data.get("cache") else None,
    )


def _load_cache(data: dict[str, Any]) -> Cache:
    shapes = tuple((int(heads), int(width)) for heads, width in data["shapes"])
    return Cache(int(data["context"]), str(data["dtype"]), shapes, tuple(data["eos"]))


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="paretoc.Output",
)

__all__ = [
    "LoadedModel",
    "Member",
    "check_output",
    "export_file",
    "load",
    "member_name",
    "save_artifact",
    "save_members",
]
