"""What LAYOUT fixes: who may import whom, what ships, and that importing paretoc stays light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import paretoc
import pytest

ROOT = Path(__file__).resolve().parents[1]
#: folder → the folders it may import from
ALLOWED = {
    "compiler": {"compiler"},
    "passes": {"compiler", "passes"},
    "backends": {"compiler", "backends"},
    "plugins": {"compiler", "passes", "backends", "plugins"},
}
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "transformers", "scipy", "networkx", "numpy", "rich"}


def violations(root: Path) -> list[str]:
    """Every import below `root` that LAYOUT forbids, as `file: import`."""
    found = []
    for folder in ALLOWED:
        for file in sorted((root / folder).rglob("*.py")):
            package = file.relative_to(root).parent.parts
            if package[:2] == ("compiler", "_root"):
                continue  # becomes paretoc/__init__.py, and stands outside the four folders
            for node in ast.walk(ast.parse(file.read_text())):
                found += [f"{file.relative_to(root)}: {text}" for text in _forbidden(node, package)]
    return found


def _forbidden(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [f"import {a.name}" for a in node.names if a.name.split(".")[0] in ("paretoc", *ALLOWED)]
    if not isinstance(node, ast.ImportFrom):
        return []
    module = node.module or ""
    if node.level == 0:
        return [f"from {module}"] if module.split(".")[0] in ("paretoc", *ALLOWED) else []
    base = ("paretoc", *package)[: len(package) + 2 - node.level]
    names = [".".join((*base, *filter(None, module.split(".")), alias.name)) for alias in node.names]
    targets = [name.split(".")[1] if "." in name else "" for name in names]
    return [name for name, target in zip(names, targets, strict=True) if target not in ALLOWED[package[0]]]


def packages(root: Path) -> set[str]:
    """The import packages that the folders hold: every folder with Python files."""
    folders = {f.parent.relative_to(root).parts for name in ALLOWED for f in (root / name).rglob("*.py")}
    return {"paretoc" if parts == ("compiler", "_root") else ".".join(("paretoc", *parts)) for parts in folders}


def test_imports_go_one_way():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("compiler/a.py", "from ..passes import x"),
        ("compiler/a.py", "from ..passes.quantize import x"),
        ("compiler/deep/a.py", "from ...backends import x"),
        ("compiler/a.py", "from .. import plugins"),
        ("compiler/a.py", "def f():\n    from ..plugins.powerquant import x"),
        ("passes/a.py", "from ..backends.eager import x"),
        ("passes/fit/a.py", "from ...backends import x"),
        ("backends/a.py", "from ..passes import x"),
        ("backends/a.py", "from ..plugins import x"),
        ("passes/a.py", "from paretoc.compiler.program import Program"),
        ("passes/a.py", "import paretoc"),
        ("compiler/a.py", "import compiler.program"),
        ("plugins/a.py", "from passes.quantize import Quantize"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("compiler/a.py", "from . import program\nfrom .program import Program\nimport torch"),
        ("compiler/deep/a.py", "from ..program import Program\nfrom . import b"),
        ("passes/a.py", "from ..compiler.program import Program\nfrom .fit import Rtn"),
        ("passes/fit/a.py", "from ...compiler.encodings import Affine\nfrom ..quantize import SCHEMES"),
        ("plugins/a.py", "from ..passes.quantize import Quantize\nfrom ..compiler import passes"),
        ("compiler/_root/__init__.py", "from paretoc.passes import Quantize"),
    ],
)
def test_an_allowed_import_is_not_found(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []


def test_the_package_list_is_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(packages(ROOT))
    mapped = settings["package-dir"]
    assert mapped == {"paretoc": "compiler/_root"} | {f"paretoc.{name}": name for name in ALLOWED}


def test_a_forgotten_package_is_seen(tmp_path):
    (tmp_path / "passes/new").mkdir(parents=True)
    (tmp_path / "passes/new/__init__.py").touch()
    assert packages(tmp_path) == {"paretoc.passes.new"}


def test_every_package_has_an_init():
    missing = [
        p
        for p in packages(ROOT) - {"paretoc"}
        if not (ROOT / p.split(".", 1)[1].replace(".", "/") / "__init__.py").exists()
    ]
    assert missing == []


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split()) & HEAVY


def test_importing_paretoc_is_light():
    assert _loaded_by("import paretoc; paretoc.__version__; dir(paretoc)") == set()


def test_a_heavy_import_would_be_seen():
    assert _loaded_by("import paretoc, numpy") == {"numpy"}


@pytest.mark.parametrize("name", sorted([*paretoc._PUBLIC, *paretoc._PASSES]))
def test_every_public_name_resolves(name):
    module = f"paretoc.compiler.{paretoc._PUBLIC[name]}" if name in paretoc._PUBLIC else "paretoc.passes"
    assert getattr(paretoc, name) is getattr(importlib.import_module(module), name)
    assert name in dir(paretoc)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'paretoc' has no attribute 'quantise'"):
        _ = paretoc.quantise


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "compiler/_root/__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    wanted = {name: (f"paretoc.compiler.{module}", name) for name, module in paretoc._PUBLIC.items()}
    assert seen == wanted | {name: ("paretoc.passes", name) for name in paretoc._PASSES}


def test_the_package_is_marked_as_typed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (ROOT / "compiler/_root/py.typed").exists()
    assert settings["package-data"]["paretoc"] == ["py.typed"]


def test_the_built_ins_are_entry_points_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for module in project["entry-points"]["paretoc"].values():
        importlib.import_module(module)


def test_tests_are_not_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == [] or all(
        "sample_plugin" in f.parts for f in (ROOT / "tests").rglob("__init__.py")
    )
