"""A plugin of a stranger: `tests/sample_plugin`, an installed distribution that uses `import paretoc as pc` alone."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import paretoc as pc
import paretoc.testing
import pytest
import torch
from paretoc.compiler.registry import PluginInfo, registry

FOLDER = Path(__file__).resolve().parents[1] / "sample_plugin"
SOURCE = FOLDER / "paretoc_sample_plugin.py"


@pytest.fixture(scope="module")
def sample():
    """The installed module; a missing or outdated installation fails the tests, it does not skip them."""
    install = f"install it: pip install --force-reinstall --no-build-isolation --no-deps {FOLDER}"
    try:
        import paretoc_sample_plugin
    except ImportError:
        pytest.fail(f"paretoc-sample-plugin is not installed; {install}")
    if Path(paretoc_sample_plugin.__file__).read_text() != SOURCE.read_text():
        pytest.fail(f"paretoc-sample-plugin is installed from another source; {install}")
    return paretoc_sample_plugin


def signs(weight: torch.Tensor) -> torch.Tensor:
    """The equation: every weight becomes ± the mean magnitude of its row."""
    rows = [[abs(w) for w in row] for row in weight.tolist()]
    means = torch.tensor([sum(row) / len(row) for row in rows]).unsqueeze(1)
    return torch.where(weight < 0, -means, means)


def test_it_is_found_through_its_entry_point(sample):
    assert PluginInfo("sample", "paretoc-sample-plugin") in registry().plugins
    (entry_point,) = importlib.metadata.distribution("paretoc-sample-plugin").entry_points
    assert (entry_point.group, entry_point.load()) == ("paretoc", sample)


def test_it_uses_the_public_names_alone():
    imports = [node for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.Import)]
    froms = [node.module for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == {"paretoc", "torch"}
    assert set(froms) == {"__future__", "dataclasses", "math", "typing", "torch"}


def test_its_encoding_conforms_and_runs_everywhere(sample):
    pc.testing.check_encoding(sample.SampleSign(), targets=("eager", "onnx", "onnxruntime"))


def test_its_encoding_is_its_equation(sample):
    weight, encoding = torch.randn(5, 24), sample.SampleSign()
    arrays = encoding.encode(weight)
    assert encoding.nbytes((5, 24)) == 5 * 3 + 5 * 4
    torch.testing.assert_close(encoding.decode(arrays, (5, 24)), signs(weight), rtol=1e-6, atol=0)


def test_its_encoding_refuses_a_width_that_is_not_whole_bytes(sample, refused):
    sentence = "8 signs make a byte, which does not divide the input width 12"
    refused(pc.OptionError, sentence, lambda: sample.SampleSign().layout((4, 12)))


def test_its_pass_conforms(sample):
    pc.testing.check_pass(sample.SampleSignPass())


def test_its_token_rule_conforms(sample):
    pc.testing.check_pass(pc.ReduceTokens(rule="sample_norm", r=3))


def test_a_tied_weight_is_encoded_once(sample, reference, models):
    model = models.TiedLanguageModel()
    model.middle.weight = model.lm_head.weight = torch.nn.Parameter(torch.randn(32, 32))
    compiled = reference(model, ["sample_sign"], torch.randint(0, 48, (2, 7)))
    assert len(compiled.report(latency=False).passes[-1]["matched"]) == 2
    assert len([n for n in compiled.program.weights() if n.endswith(".signs")]) == 1


def test_its_pass_compiles_a_model_to_the_decoded_weights(sample, reference, models):
    model, x = models.Mlp(16, 32, 8), torch.randn(3, 16)
    compiled = reference(model, ["sample_sign:targets=up"], x)
    assert [row.encoding for row in compiled.explain().rows] == ["SampleSign()", "dense"]
    with torch.no_grad():
        model.up.weight.copy_(signs(model.up.weight))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)  # float32 sums


def test_its_token_rule_keeps_the_tokens_of_largest_norm(sample):
    """With nothing but the reduction between input and output, the output is those tokens."""

    class Shrink(torch.nn.Module):
        def forward(self, x):
            mixed = torch.nn.functional.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1)
            return (x + 0 * mixed).mean(1)

    x = torch.randn(2, 6, 4)
    compiled = pc.compile(
        Shrink(),
        ["reduce_tokens:sample_norm,r=2"],
        example_inputs=x,
        dynamic_shapes=({0: torch.export.Dim.AUTO},),
        target="eager",
    )
    kept = [torch.stack(sorted(row, key=lambda token: -float(token.norm()))[:4]).mean(0) for row in x]
    torch.testing.assert_close(compiled(x), torch.stack(kept), rtol=1e-5, atol=1e-5)  # order of the sum
    assert compiled.report(latency=False).passes[-1]["metrics"] == {
        "tokens at first": 6.0,
        "tokens at last": 4.0,
    }


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_all_of_it_together_on_onnx_runtime(sample, target, reference, models):
    model, x = models.Vit(pool="class").eval(), torch.randn(4, 16, 12)
    passes = ["reduce_tokens:sample_norm,r=3", {"sample_sign": {"ignore": "embed"}}]
    eager = reference(model, passes, x)
    compiled = pc.compile(model, passes, example_inputs=x, target=target)
    for batch in (1, 3):
        torch.testing.assert_close(compiled(x[:batch]), eager(x[:batch]), rtol=1e-5, atol=1e-5)  # float32 sums
