"""The command line, run in this process: what each verb prints and writes, and how mistakes are told."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import paretoc as pc
import pytest
import torch
from paretoc.compiler import cli, cost, registry, source
from paretoc.compiler.cli import main
from paretoc.compiler.cost import Latency
from safetensors.numpy import save_file

#: what the tests compile; imported by name from the current directory, as a user's own module is
MODULE = """
import warnings
import torch
from torch import nn
from paretoc import OptionError

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 10)
    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Zoo:
    @staticmethod
    def nested():
        return Net(), torch.ones(4, 64)

built = Net()

def model_only():
    return Net()

def with_example():
    return Net(), (torch.ones(4, 64),)

def with_data():
    generator = torch.Generator().manual_seed(1)
    return Net(), None, [torch.randn(4, 64, generator=generator) for _ in range(3)]

def exported():
    return torch.export.export(Net(), (torch.ones(4, 64),))

def wrong():
    return "a model", 3

def raises():
    raise ValueError("no weights here\\nsecond line")

def warns():
    warnings.warn("careful")
    return with_example()

def interrupted():
    raise KeyboardInterrupt

def appended():
    error = OptionError("what happened", where="there", fix="do this")
    error.args = ("what happened\\n\\nWhile executing return (x,)\\nOriginal traceback:\\nNone",)
    raise error
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory that holds the module `zoo`."""
    (tmp_path / "zoo.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "zoo", raising=False)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`run("verb …")` → (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main([part for word in words for part in word.split()])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


def cells(text: str) -> list[list[str]]:
    """A plain table → its cells: columns are at least two blanks apart."""
    return [[cell for cell in line.strip().split("  ") if cell.strip()] for line in text.splitlines()]


def row(text: str, start: str) -> list[str]:
    """The one row whose first cell is `start`."""
    (found,) = [[cell.strip() for cell in line] for line in cells(text) if line and line[0].strip() == start]
    return found


# -- compile -------------------------------------------------------------------------------------------------


def test_compile_prints_the_report_and_saves_the_artifact(run: Run, folder: Path) -> None:
    code, out, err = run("compile zoo:with_data --passes quantize:W8A8,fitter=rtn -o out --seed 7")
    assert code == 0 and err == ""
    assert "compiled for onnxruntime" in out and "fidelity on 12 samples of the calibration data" in out
    assert "quantize:W8A8,fitter=rtn" in out and "latency, PyTorch eager" in out
    names = sorted(file.name for file in (folder / "out").iterdir())
    assert names == ["manifest.json", "model.onnx", "report.html", "weights.safetensors"]
    for name in names:
        assert name in out.splitlines()[-1]
    manifest = json.loads((folder / "out/manifest.json").read_text())
    assert manifest["seed"] == 7 and manifest["passes"] == ["canonicalize", "quantize:W8A8,fitter=rtn"]


def test_the_saved_model_answers_like_the_original(run: Run, folder: Path) -> None:
    assert run("compile zoo:with_example --passes quantize:W8A16 -o out")[0] == 0
    import zoo  # type: ignore[import-not-found]  # written by the fixture

    x = torch.randn(5, 64)
    want, got = zoo.Net()(x), pc.load(folder / "out")(x)
    # 8-bit weights of two layers: half a step of 1/127 of the largest weight each
    assert torch.linalg.vector_norm(got - want) < 0.02 * torch.linalg.vector_norm(want)


def test_the_same_call_writes_the_same_bytes(run: Run, folder: Path) -> None:
    for name in ("a", "b"):
        assert run(f"compile zoo:with_data --passes quantize:W8A8 -o {name}")[0] == 0
    for file in (folder / "a").iterdir():
        assert file.read_bytes() == (folder / "b" / file.name).read_bytes(), file.name


def test_html_holds_the_latencies_that_the_artifact_leaves_out(run: Run, folder: Path) -> None:
    assert run("compile zoo:with_example --passes quantize -o out --html page.html")[0] == 0
    assert "latency, PyTorch eager" in (folder / "page.html").read_text()
    assert "latency, PyTorch eager" not in (folder / "out/report.html").read_text()


def test_passes_may_be_a_recipe(run: Run, folder: Path) -> None:
    (folder / "recipe.yaml").write_text("- prune_nm: {pattern: '1:4'}\n- quantize: W8A16\n")
    _, out, _ = run("bench zoo:with_example --passes recipe.yaml --target eager --runs 1")
    assert "compiled" in out
    _, out, _ = run("explain zoo:with_example --passes recipe.yaml --target eager")
    assert "NM(n=1, m=4" in out


# -- MODEL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with_example", "with_data", "Zoo.nested", "exported"])
def test_callables(run: Run, name: str) -> None:
    code, out, err = run(f"explain zoo:{name} --passes quantize:W8A16 --target eager")
    assert (code, err) == (0, "")
    assert out.startswith("what runs on eager") and "up" in out and "Affine(bits=8" in out


def test_an_instance_is_the_model_itself(run: Run, folder: Path) -> None:
    np.savez(folder / "example.npz", x=np.ones((2, 64), np.float32))
    assert run("explain zoo:built --target eager --example example.npz")[0] == 0


HOSTILE_CODE = "from pathlib import Path\nPath('executed').touch()\n"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories of small random models."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("checkpoints")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=50, max_position_embeddings=30, **size)
    transformers.BertModel(bert).save_pretrained(root / "bert")
    transformers.BertModel(bert, add_pooling_layer=False).save_pretrained(root / "headless")
    vit = transformers.ViTConfig(image_size=[16, 24], patch_size=8, num_channels=1, **size)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    custom = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModel": "code.Mine"}}
    (root / "custom").mkdir()
    (root / "custom/config.json").write_text(json.dumps(custom))
    (root / "custom/code.py").write_text(HOSTILE_CODE)
    return root


def test_a_text_checkpoint(run: Run, checkpoints: Path) -> None:
    code, out, err = run(f"explain {checkpoints / 'bert'} --target eager")
    assert code == 0 and "encoder.layer.0.attention.self" in out and "pooler.dense" in out
    assert err.splitlines() == [
        "note: the inputs are made up: input_ids int64[2, 15], attention_mask int64[2, 15]",
        "note: fidelity on real data needs --calibration or --example",
    ]


def test_a_vision_checkpoint_is_loaded_with_its_head(run: Run, checkpoints: Path) -> None:
    code, out, err = run(f"explain {checkpoints / 'vit'} --target eager")
    assert code == 0 and "classifier" in out and "pixel_values float32[2, 1, 16, 24]" in err


def test_weights_that_the_checkpoint_lacks_are_told(run: Run, checkpoints: Path) -> None:
    _, _, err = run(f"explain {checkpoints / 'headless'} --target eager")
    assert "note: 2 weights are not in the checkpoint and are random, the first is 'pooler.dense.bias'" in err


def test_code_in_a_checkpoint_is_never_run(run: Run, checkpoints: Path) -> None:
    code, _, err = run(f"explain {checkpoints / 'custom'} --target eager")
    assert code == 2 and "loading the checkpoint failed: ValueError" in err
    assert not list(checkpoints.rglob("executed")) and not Path("executed").exists()


def test_a_file_replaces_the_made_up_inputs(run: Run, folder: Path, checkpoints: Path) -> None:
    ids = np.ones((4, 9), np.int64)
    np.savez(folder / "ids.npz", input_ids=ids, attention_mask=ids)
    for option in ("--example", "--calibration"):
        code, out, err = run(f"bench {checkpoints / 'bert'} --target eager --runs 1 {option} ids.npz")
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == "inputs: input_ids int64[4, 9], attention_mask int64[4, 9]"


def _tiny(name: str) -> Any:
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"vocab_size": 50, "max_position_embeddings": 16, **size}
    if name == "clip":
        vision = {"image_size": 16, "patch_size": 8, **size}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        return transformers.CLIPModel(config)
    if name == "t5":
        layers = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **layers))
    if name == "whisper":
        sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _WHISPER.items()}
        lengths = {"max_source_positions": 10, "max_target_positions": 16, "num_mel_bins": 8}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = transformers.WhisperConfig(vocab_size=50, d_model=16, **sides, **lengths, **tokens)
        return transformers.WhisperModel(config)
    return transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))


_WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("clip", {"pixel_values": (2, 3, 16, 16), "input_ids": (2, 8), "attention_mask": (2, 8)}),
        ("t5", {"input_ids": (2, 64), "attention_mask": (2, 64), "decoder_input_ids": (2, 64)}),
        ("whisper", {"input_features": (2, 8, 20), "decoder_input_ids": (2, 8)}),
        ("resnet", {"pixel_values": (2, 3, 224, 224)}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*token_id must be")
def test_made_up_inputs_are_what_the_model_takes(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model = _tiny(name).eval()
    inputs = source.made_up_inputs(model, name)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == shapes
    with torch.no_grad():
        assert model(**inputs)


# -- files of inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_calibration_is_cut_into_batches_of_eight(run: Run, folder: Path, suffix: str) -> None:
    data = np.random.default_rng(0).normal(size=(20, 64))  # float64, as NumPy makes it
    save = {
        ".npz": lambda path: np.savez(path, x=data),
        ".safetensors": lambda path: save_file({"x": data}, path),
    }
    save[suffix](folder / f"data{suffix}")
    batches = source.read_batches(folder / f"data{suffix}")
    assert [batch["x"].shape[0] for batch in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), torch.from_numpy(data).float())
    words = f"compile zoo:model_only --passes quantize:W8A8 --target eager -o out --calibration data{suffix}"
    code, out, _ = run(words)
    assert code == 0 and "fidelity on 20 samples of the calibration data" in out


def test_arrays_without_names_are_positional(run: Run, folder: Path) -> None:
    np.savez(folder / "x.npz", np.ones((3, 64)))
    _, out, _ = run("bench zoo:model_only --target eager --runs 1 --example x.npz")
    lines = [line for line in out.splitlines() if not line.startswith("warning: ")]  # one run may seem slower
    assert lines[-1] == "inputs: x float32[3, 64]"


def test_objects_in_a_file_are_refused(folder: Path) -> None:
    np.savez(folder / "x.npz", x=np.array([object()]))
    with pytest.raises(pc.OptionError, match="Object arrays cannot be loaded"):
        source.read_arrays(folder / "x.npz")


# -- explain and bench ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, models: ModuleType) -> Path:
    """An artifact, compiled once."""
    torch.manual_seed(0)
    net = models.Mlp(64, 128, 10).eval()
    directory = tmp_path_factory.mktemp("saved") / "out"
    pc.compile(net, "quantize:W8A8-dynamic", example_inputs=torch.ones(4, 64)).save(directory)
    return directory


@pytest.fixture
def artifact(saved: Path, folder: Path) -> Path:
    """A copy of it in the current directory."""
    shutil.copytree(saved, folder / "out")
    return folder / "out"


def test_explain_an_artifact(run: Run, artifact: Path) -> None:
    code, out, err = run("explain out")
    assert (code, err) == (0, "")
    assert "what runs on onnxruntime" in out and "up" in out and "MatMul" in out and "Affine(bits=8" in out


def test_bench_an_artifact_at_the_shapes_it_was_captured_with(run: Run, artifact: Path) -> None:
    code, out, err = run("bench out --runs 3")
    assert (code, err) == (0, "") and row(out, "artifact")
    assert "runs: 3, interleaved; threads: 1; on " in out and out.splitlines()[-1] == "inputs: x float32[4, 64]"


def test_bench_an_artifact_with_an_example(run: Run, folder: Path, artifact: Path) -> None:
    np.savez(folder / "x.npz", x=np.ones((7, 64)))
    _, out, _ = run("bench out --runs 1 --example x.npz")
    assert out.splitlines()[-1] == "inputs: x float32[7, 64]"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Latencies as if measured: 8, 4 and 2 ms; and what was asked for."""
    asked: dict[str, Any] = {}

    def measure(calls: dict[str, Callable[[], object]], *, runs: int, budget_s: float) -> dict[str, Latency]:
        asked.update(runs=runs, budget_s=budget_s, results=[call() for call in calls.values()])
        return {name: Latency(8.0 / 2**i, 7.0 / 2**i, runs) for i, name in enumerate(calls)}

    monkeypatch.setattr(cost, "measure", measure)
    return asked


def test_bench_compares_with_pytorch_and_with_uncompressed(run: Run, timed: dict[str, Any]) -> None:
    _, out, _ = run("bench zoo:with_example --passes quantize:W8A16 --target eager --runs 5")
    assert timed["runs"] == 5
    assert cells(out)[0][0] == "contender" and "vs PyTorch eager" in out and "vs uncompressed" in out
    assert row(out, "PyTorch eager") == ["PyTorch eager", "8.000", "7.000", "1×", "0.5×"]
    assert row(out, "uncompressed") == ["uncompressed", "4.000", "3.500", "2×", "1×"]
    assert row(out, "compiled") == ["compiled", "2.000", "1.750", "4×", "2×"]


@pytest.mark.parametrize(("compiled", "warned"), [(4.0, True), (1.0, False)])
def test_bench_warns_of_what_is_slower(
    run: Run, monkeypatch: pytest.MonkeyPatch, compiled: float, warned: bool
) -> None:
    def measure(calls: dict[str, Callable[[], object]], **_: Any) -> dict[str, Latency]:
        return {name: Latency(taken, taken, 7) for name, taken in zip(calls, (9.0, 2.0, compiled), strict=True)}

    monkeypatch.setattr(cost, "measure", measure)
    _, out, _ = run("bench zoo:with_example --passes quantize:W8A16 --target eager --runs 7")
    said = "warning: the compiled model takes 4.00 ms, the uncompressed one 2.00 ms (medians of 7 calls in turns)"
    assert (said in out) == ("warning" in out) == warned


def test_bench_times_what_it_says(run: Run, timed: dict[str, Any]) -> None:
    """The three calls compute the same model; only the third has rounded weights."""
    run("bench zoo:with_example --passes quantize:W8A16 --target eager --runs 5")
    _, uncompressed, compiled = (result[0] if result else None for result in timed["results"])
    distance = torch.linalg.vector_norm(compiled - uncompressed) / torch.linalg.vector_norm(uncompressed)
    assert 0 < distance < 0.05


def test_bench_sets_the_threads(run: Run, timed: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    try:
        _, out, _ = run("bench zoo:with_example --target eager --threads 2")
        assert torch.get_num_threads() == 2 and "threads: 2;" in out
    finally:
        torch.set_num_threads(before)


# -- plugins and the terminal --------------------------------------------------------------------------------


def test_plugins_lists_what_is_installed(run: Run) -> None:
    code, out, err = run("plugins")
    assert (code, err) == (0, "")
    assert ["passes", "paretoc", "ok"] in [[c.strip() for c in line] for line in cells(out)]
    for kind, name in (
        ("pass", "quantize"),
        ("encoding", "Affine"),
        ("fitter", "mse"),
        ("token rule", "merge"),
    ):
        (found,) = [line for line in cells(out) if [c.strip() for c in line[:2]] == [kind, name]]
        assert len(found) == 3 and found[2].strip(), f"{kind} {name} says what it is"
    assert [line[1] for line in cells(out) if line and line[0] == "target"] == [
        "eager",
        "onnx",
        "onnxruntime",
        "openvino",
        "openvino-bf16",
        "triton",
    ]


def test_plugins_names_a_broken_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = importlib.metadata.EntryPoint("broken", "no_such_module", registry.GROUP)
    with pytest.warns(UserWarning, match="'broken'"):
        found = registry.Registry([broken])
    monkeypatch.setattr(registry, "registry", lambda: found)
    code, out, _ = run("plugins")
    assert code == 0 and "ModuleNotFoundError: No module named 'no_such_module'" in out


class Undocumented:
    pass


def test_what_has_no_docstring_gets_an_empty_cell() -> None:
    import dataclasses

    assert cli._first_line(Undocumented) == ""
    assert cli._first_line(dataclasses.make_dataclass("Options", ["a"])) == ""
    assert cli._first_line(cost.Cost(0, 0, 0, ())).startswith("At the example inputs")


def test_plain_when_piped_lines_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = run("plugins")[1]
    assert "\x1b" not in piped and "┃" not in piped
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = run("plugins")[1]
    assert "\x1b[" in terminal and "┃" in terminal
    assert max(len(line) for line in piped.splitlines()) > 100, "one row a line"


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom paretoc.compiler.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = _python(code)
    assert done.returncode == 0, done.stderr.decode()
    assert b"compile a model, print the report and save the artifact" in done.stdout


def test_an_ascii_terminal_is_no_reason_to_stop() -> None:
    done = _python("from paretoc.compiler.cli import main; main(['plugins'])", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert b"quantize" in done.stdout


# -- mistakes ------------------------------------------------------------------------------------------------


@pytest.fixture
def files(folder: Path) -> Iterator[Path]:
    """Files that are not what they should be."""
    np.savez(folder / "uneven.npz", x=np.ones((4, 64)), y=np.ones((3, 64)))
    np.savez(folder / "empty.npz", x=np.ones((0, 64)))
    np.savez(folder / "scalar.npz", x=np.float32(1))
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 cut off")
    (folder / "broken.safetensors").write_bytes(b"\x00")
    (folder / "data.csv").write_text("1,2")
    (folder / "bare").mkdir()
    (folder / "garbled").mkdir()
    (folder / "garbled/config.json").write_text("{")
    before = sorted(folder.iterdir())
    yield folder
    left = [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"]
    assert left == before, "a mistake leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        ("zoo:with_example --passes quantise", "there is no pass called 'quantise'", "'quantize'"),
        ("zoo:with_example --passes quantize:W9", "there is no scheme 'W9'", "W8A16"),
        ("zoo:with_example --passes quantize --target onxruntime", "no target called", "'onnxruntime'"),
        ("zoo:with_exemple --passes quantize", "'zoo' has no 'with_exemple'", "'with_example'"),
        ("zooo:net --passes quantize", "importing 'zooo' failed: ModuleNotFoundError: No module", "--debug"),
        ("zoo:raises --passes quantize", "calling 'raises' failed: ValueError: no weights here", "--debug"),
        ("zoo:wrong --passes quantize", "'wrong' returned (str, int)", "return the model"),
        ("zoo:model_only --passes quantize", "there are no example inputs", "--example FILE"),
        ("zoo:appended --passes quantize", "what happened", "do this"),
        ("zoo:with_example --passes quantize:W8A8", "needs calibration data", "calibration"),
        ("nowhere --passes quantize", "there is no directory 'nowhere'", "module:callable"),
        ("bare --passes quantize", "holds neither config.json nor manifest.json", "Hugging Face"),
        ("garbled --passes quantize", "loading the checkpoint failed", "--debug"),
        ("zoo:model_only --passes quantize --example gone.npz", "cannot be read: FileNotFound", "savez"),
        ("zoo:model_only --passes quantize --example broken.npz", "cannot be read: BadZipFile", "savez"),
        ("zoo:model_only --passes quantize --example broken.safetensors", "cannot be read", "safetensors"),
        ("zoo:model_only --passes quantize --example data.csv", "neither .npz nor .safetensors", "savez"),
        (
            "zoo:model_only --passes quantize --calibration uneven.npz",
            "the same number of samples",
            "first axes",
        ),
        ("zoo:model_only --passes quantize --calibration empty.npz", "x float32[0, 64]", "one sample"),
        ("zoo:model_only --passes quantize --calibration scalar.npz", "x float32[]", "first axes"),
    ],
)
def test_mistakes_are_told_in_three_lines(run: Run, files: Path, words: str, what: str, fix: str) -> None:
    code, out, err = run(f"compile {words} -o out")
    assert code == 2 and out == ""
    first, where, last = err.splitlines()
    assert first.startswith("error: ") and what in first
    assert where.startswith("  where: ") and len(where) > 10
    assert last.startswith("  fix:   ") and fix in last


def test_an_output_that_is_not_an_artifact_is_kept(run: Run, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/mine.txt").write_text("keep")
    code, _, err = run("compile zoo:with_example --passes quantize:W8A16 --target eager -o out")
    assert code == 2 and "'out' exists and is not an artifact" in err and len(err.splitlines()) == 3
    assert [path.name for path in (folder / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("option", ["--passes quantize", "--calibration x.npz", "--target eager"])
def test_options_of_compiling_do_not_apply_to_an_artifact(run: Run, artifact: Path, option: str) -> None:
    for verb in ("explain", "bench"):
        code, _, err = run(f"{verb} out {option}")
        assert code == 2 and f"{option.split()[0]} does not apply to 'out', which is compiled already" in err


def test_an_artifact_is_not_compiled_again(run: Run, artifact: Path) -> None:
    code, _, err = run("compile out --passes quantize -o again")
    assert code == 2 and "'out' is compiled already" in err and not Path("again").exists()


def test_a_tampered_artifact_is_refused(run: Run, artifact: Path) -> None:
    with (artifact / "model.onnx").open("ab") as file:
        file.write(b"\0")
    code, _, err = run("explain out")
    assert code == 2 and "'model.onnx' is altered or truncated" in err and len(err.splitlines()) == 3


def test_an_artifact_without_shapes_asks_for_an_example(artifact: Path) -> None:
    loaded = pc.load(artifact)
    del loaded.manifest["settings"]["inputs"]
    with pytest.raises(pc.ArtifactError, match="does not say what its inputs look like") as caught:
        cli._artifact_call(loaded, cli._parser().parse_args(["bench", "out"]))
    assert caught.value.fix == "give --example FILE"


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line(run: Run) -> None:
    code, _, err = run("explain zoo:warns --target eager")
    assert (code, err) == (0, "warning: careful\n")


def test_debug_shows_the_traceback(folder: Path) -> None:
    with pytest.raises(pc.OptionError, match="no weights here") as caught:
        main(["explain", "zoo:raises", "--debug"])
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_interrupt_is_not_an_error(run: Run) -> None:
    assert run("explain zoo:interrupted") == (130, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "VERB"),
        (["compile", "zoo:built", "-o", "out"], "--passes"),
        (["compile", "zoo:built", "--passes", "quantize"], "--output"),
        (["bench", "zoo:built", "--runs", "0"], "0 is not a positive number"),
    ],
)
def test_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == importlib.metadata.version("paretoc")
