"""Artifacts: complete or absent, the same bytes from every process, nothing executed, nothing outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import paretoc as pc
import pytest
import torch
from torch import nn

SCRIPT = """
import sys, torch, paretoc as pc
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
batches = [torch.randn(4, 64) for _ in range(2)]
pc.compile(model, ["prune_nm:2:4", "quantize:W8A8"], example_inputs=batches[0], calibration=batches).save(sys.argv[1])
"""
X = torch.linspace(-1, 1, 128).reshape(2, 64)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, object]:
        hidden = torch.relu(self.one(x))
        return {"logits": self.two(hidden) * scale, "rest": (hidden, None, [hidden])}


@pytest.fixture
def compiled() -> pc.CompiledModel:
    torch.manual_seed(0)
    return pc.compile(Named().eval(), ["quantize:W8A8-dynamic"], example_inputs=X)


@pytest.fixture
def artifact(compiled: pc.CompiledModel, tmp_path: Path) -> Path:
    compiled.save(tmp_path / "artifact")
    return tmp_path / "artifact"


def test_a_loaded_model_answers_like_the_saved_one(compiled: pc.CompiledModel, artifact: Path) -> None:
    loaded = pc.load(artifact)
    got, want = loaded(X), compiled(X)
    assert torch.equal(got["logits"], want["logits"])
    assert torch.equal(got["rest"][2][0], want["rest"][2][0]) and got["rest"][1] is None
    assert torch.equal(loaded(x=X, scale=1.0)["logits"], got["logits"])
    assert {r.kernel for r in loaded.explain().rows} == {r.kernel for r in compiled.explain().rows}
    assert (
        loaded.report()["compiled"]["size_bytes"] == compiled.report(latency=False).to_dict()["compiled"]["size_bytes"]
    )


def test_the_files_and_every_weight_once(artifact: Path) -> None:
    names = {p.name for p in artifact.iterdir()}
    assert names == {"model.onnx", "weights.safetensors", "manifest.json", "report.html"}
    assert (artifact / "model.onnx").stat().st_size < 64 * 64, "the weights must not be in model.onnx as well"
    assert not any(b"pickle" in p.read_bytes() for p in artifact.iterdir())


def test_loading_does_not_need_the_class(artifact: Path) -> None:
    code = f"import torch, paretoc as pc; print(pc.load({str(artifact)!r})(torch.ones(3, 64))['logits'].shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([3, 8])"


def test_fresh_processes_write_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in zip("12", folders, strict=True):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=True, env=environment)
    for file in sorted(folders[0].iterdir()):
        assert file.read_bytes() == (folders[1] / file.name).read_bytes(), file.name


def _truncate(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _alter(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))


def _remove(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def _garble(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _older(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))


def _escape(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../outside"] = "0"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _gut(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["interface"]["in"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_truncate, "'weights.safetensors' is altered or truncated"),
        (_alter, "'model.onnx' is altered or truncated"),
        (_remove, "'weights.safetensors' is missing"),
        (_garble, "manifest.json cannot be read"),
        (_older, "manifest.json is not of format 1"),
        (_escape, "the manifest names the file '../outside'"),
        (_gut, "the manifest is damaged"),
    ],
)
def test_a_damaged_artifact_is_refused(artifact: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(artifact)
    with pytest.raises(pc.ArtifactError) as caught:
        pc.load(artifact)
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pc.ArtifactError, match=r"has no manifest\.json"):
        pc.load(tmp_path)


def test_a_failing_save_leaves_nothing(
    compiled: pc.CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paretoc.compiler.html.write_report", fail)
    with pytest.raises(pc.ArtifactError, match="No space left"):
        compiled.save(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_artifact_is_not_overwritten(compiled: pc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(pc.ArtifactError, match="exists and is not an artifact"):
        compiled.save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unwritable_place_is_refused(compiled: pc.CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pc.ArtifactError, match="cannot write"):
        compiled.save(tmp_path / "file" / "artifact")


def test_saving_again_replaces(compiled: pc.CompiledModel, artifact: Path) -> None:
    before = {p.name: p.read_bytes() for p in artifact.iterdir()}
    compiled.report()
    compiled.save(artifact)
    assert {p.name: p.read_bytes() for p in artifact.iterdir()} == before


def test_an_exported_file_stands_alone(compiled: pc.CompiledModel, tmp_path: Path) -> None:
    import onnxruntime

    compiled.export_onnx(tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    got = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["logits"], {"x": X.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), compiled(X)["logits"])


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """An artifact of two models."""
    plain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    compiled = pc.compile(plain, [], example_inputs=X)
    pc.save({0.5: compiled, "small": compiled}, tmp_path / "artifact")
    return tmp_path / "artifact"


def test_one_of_several_models(several: Path) -> None:
    assert {p.name for p in several.iterdir()} == {
        "weights.safetensors",
        "manifest.json",
        *(f"{kind}-{name}.{end}" for name in ("0.5", "small") for kind, end in (("model", "onnx"), ("report", "html"))),
    }
    assert (several / "weights.safetensors").stat().st_size < 1.1 * 4 * 64 * 72, "equal weights must be stored once"
    first, second = pc.load(several, "small"), pc.load(several, 0.5)
    assert torch.equal(first(X), second(X)) and first(X).shape == (2, 8)
    assert pc.load(several, "0.5").report()["compiled"]["macs"] == first.report()["compiled"]["macs"]
    with pytest.raises(pc.ArtifactError, match="it holds several models") as caught:
        pc.load(several)
    assert "name one of them: 0.5, small" in str(caught.value)
    with pytest.raises(pc.ArtifactError, match="it holds no model 'smal'"):
        pc.load(several, "smal")
    (several / "model-small.onnx").write_bytes(b"")
    with pytest.raises(pc.ArtifactError, match=r"'model-small\.onnx' is altered or truncated"):
        pc.load(several, 0.5)


def test_a_name_for_one_model_is_refused(artifact: Path) -> None:
    with pytest.raises(pc.ArtifactError, match="it holds one model, without a name"):
        pc.load(artifact, 0.5)


def test_models_that_cannot_share_are_refused(compiled: pc.CompiledModel, tmp_path: Path) -> None:
    other = pc.compile(Named().eval(), [], example_inputs=X, target="eager")
    with pytest.raises(pc.OptionError, match="models for eager and onnxruntime cannot share"):
        pc.save({"one": compiled, "two": other}, tmp_path / "artifact")
    for name in ("", "../outside", "."):
        with pytest.raises(pc.OptionError, match="cannot be the name of a model"):
            pc.save({name: compiled}, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []
