"""The architectures people bring: each is captured, quantised, exported and run on ONNX Runtime at two batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import paretoc as pc
import pytest
import torch
import transformers as hf
from paretoc.backends.onnxruntime.forms import FORMS
from paretoc.backends.onnxruntime.projections import JOINT
from paretoc.backends.onnxruntime.speeds import Speeds
from paretoc.compiler.samples import mixes_samples
from torch import nn

Case = tuple[nn.Module, dict[str, torch.Tensor]]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def ids(batch: int = 2, length: int = 12, vocabulary: int = 90) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length))


def text(model: nn.Module) -> Case:
    tokens = ids()
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def image(model: nn.Module, size: int = 32) -> Case:
    return model, {"pixel_values": torch.randn(2, 3, size, size)}


class LstmClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(input_ids))
        return self.head(states[:, -1])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.middle(skip))], dim=1))


def whisper() -> Case:
    config = hf.WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, decoder_layers=1,
        decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=100, max_source_positions=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, num_mel_bins=16,
    )  # fmt: skip
    return hf.WhisperModel(config).get_encoder(), {"input_features": torch.randn(2, 16, 48)}


def clip(tower: str) -> Case:
    text_config = hf.CLIPTextConfig(**SMALL, vocab_size=100, max_position_embeddings=32, bos_token_id=0, eos_token_id=2)
    vision_config = hf.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8)
    if tower == "text":
        return text(hf.CLIPTextModelWithProjection(text_config))
    return image(hf.CLIPVisionModelWithProjection(vision_config))


def decoder(config: Any, **more: Any) -> Case:
    return text(hf.AutoModelForCausalLM.from_config(config))


VISION = {"image_size": 32, "patch_size": 8}
ZOO: dict[str, Callable[[], Case]] = {
    "bert": lambda: text(hf.BertModel(hf.BertConfig(**SMALL, vocab_size=100))),
    "roberta": lambda: text(hf.RobertaModel(hf.RobertaConfig(**SMALL, vocab_size=100, max_position_embeddings=40))),
    "distilbert": lambda: text(
        hf.DistilBertModel(hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=100))
    ),
    "albert": lambda: text(hf.AlbertModel(hf.AlbertConfig(**SMALL, embedding_size=16, vocab_size=100))),
    "vit": lambda: image(hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **VISION))),
    "deit": lambda: image(hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SMALL, **VISION))),
    "swin": lambda: image(
        hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
        )
    ),
    "convnext": lambda: image(
        hf.ConvNextForImageClassification(hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2))
    ),
    "resnet": lambda: image(
        hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        )
    ),
    "mobilenet_v2": lambda: image(
        hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25))
    ),
    "gpt2": lambda: decoder(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100)),
    "llama": lambda: decoder(hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=100)),
    "qwen2": lambda: decoder(hf.Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=100)),
    "t5_encoder": lambda: text(
        hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100))
    ),
    "clip_text": lambda: clip("text"),
    "clip_vision": lambda: clip("vision"),
    "whisper_encoder": whisper,
    "mixtral": lambda: decoder(
        hf.MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=100, num_local_experts=4, num_experts_per_tok=2)
    ),
    "mamba": lambda: text(
        hf.MambaModel(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=8))
    ),
    "deberta_v2": lambda: text(
        hf.DebertaV2Model(
            hf.DebertaV2Config(**SMALL, vocab_size=100, relative_attention=True, pos_att_type=["p2c", "c2p"])
        )
    ),
    "segformer": lambda: image(
        hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                num_encoder_blocks=2,
                depths=[1, 1],
                sr_ratios=[2, 1],
                hidden_sizes=[16, 32],
                patch_sizes=[7, 3],
                strides=[4, 2],
                num_attention_heads=[2, 4],
                mlp_ratios=[2, 2],
                decoder_hidden_size=16,
            )
        )
    ),
    "lstm": lambda: (LstmClassifier(), {"input_ids": ids()}),
    "unet": lambda: (UNet(), {"x": torch.randn(2, 3, 16, 16)}),
}


def widen(inputs: dict[str, torch.Tensor], batch: int) -> dict[str, torch.Tensor]:
    """Inputs of another batch size, with other values."""
    wide = {}
    for name, value in inputs.items():
        repeated = value.repeat(3, *[1] * (value.ndim - 1))[:batch]
        wide[name] = repeated.flip(1).contiguous() if name == "input_ids" else repeated.contiguous()
    return wide


def tensors(output: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@dataclass
class Member:
    """An architecture, captured once and compiled for each scheme when first asked."""

    name: str
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    made: dict[str, pc.CompiledModel] = field(default_factory=dict)

    @cached_property
    def captured(self) -> Any:
        return pc.capture(self.model, self.inputs)

    def compiled(self, scheme: str, target: str = "onnxruntime") -> pc.CompiledModel:
        key = f"{scheme} {target}"
        if key not in self.made:
            passes = [f"quantize:{scheme}"] if scheme else []
            with mock.patch("paretoc.compiler.driver.capture", lambda *_: self.captured.clone()):
                self.made[key] = pc.compile(
                    self.model,
                    passes,
                    example_inputs=self.inputs,
                    calibration=[self.inputs],
                    target=target,
                    verify=False,
                )
        return self.made[key]


@pytest.fixture(params=ZOO, scope="module")
def member(request: pytest.FixtureRequest) -> Member:
    torch.manual_seed(0)
    model, inputs = ZOO[request.param]()
    return Member(request.param, model.eval(), inputs)


def test_uncompressed_equals_pytorch(member: Member) -> None:
    for batch in (1, 5):
        feed = widen(member.inputs, batch)
        with torch.no_grad():
            want = tensors(member.model(**feed, **_no_cache(member.model)))
        got = tensors(member.compiled("")(**feed))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.shape == b.shape
            # float32 sums in another order
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_quantised_equals_the_eager_reference(member: Member) -> None:
    compiled = member.compiled("W8A8-dynamic")
    for batch in (1, 5):
        feed = widen(member.inputs, batch)
        for got, want in zip(tensors(compiled(**feed)), tensors(compiled.program(**feed)), strict=True):
            assert got.shape == want.shape
            # a rounding that falls the other way moves a value by one of 255 steps of its tensor
            assert relative(got, want) < 0.02


#: whose samples the analysis cannot follow to the end, with a word of the reason
FOLLOWED_IN_PART = {
    "clip_text": "arange", "mixtral": "topk", "deberta_v2": "repeat", "segformer": "conv2d", "lstm": "lstm",
}  # fmt: skip


def test_samples_are_apart_where_they_are_said_to_be(member: Member) -> None:
    program = member.compiled("").program
    reason = mixes_samples(program)
    assert FOLLOWED_IN_PART.get(member.name, "") in reason and bool(reason) is (member.name in FOLLOWED_IN_PART)
    if reason:
        return
    feed = widen(member.inputs, 4)
    halves = [program(**{name: value[i : i + 2] for name, value in feed.items()}) for i in (0, 2)]
    for whole, *parts in zip(tensors(program(**feed)), *map(tensors, halves), strict=True):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


# -- kernel census -------------------------------------------------------------------------------------------------

INTEGER = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm", "QLinearConv"}
FLOAT = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv"}
#: products with weights that are no site of any scheme, in 2 layers: 4 experts of 2 matrices; a convolution
UNCLAIMED = {"mixtral": 16, "mamba": 2}
#: products of a claimed weight with a constant table of positions: keys and queries in 2 layers
CONSTANT = {"deberta_v2": 4}


def census(compiled: pc.CompiledModel) -> tuple[int, int, int]:
    """Matrix products and convolutions of the session's optimised graph with a constant weight: (on integers, on
    packed 4-bit weights, on floating ones). Constant is what does not hang on an input of the model."""
    graph, _ = compiled._compiled().executable.profiled()
    known = {tensor.name for tensor in graph.initializer}
    integers = packed = floats = 0
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
        elif node.op_type in INTEGER:
            integers += 1
        elif node.op_type == "QAttention":
            integers += len(node.name.split(JOINT))
        elif node.op_type == "MatMulNBits":
            packed += len(node.name.split(JOINT))
        elif node.op_type in FLOAT and node.input[1] in known:
            floats += 1
    return integers, packed, floats


def test_the_census_sees_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETOC_CACHE", str(tmp_path))
    layer, x = nn.Linear(32, 16).eval(), torch.randn(2, 3, 32)

    def counted() -> tuple[int, int, int]:
        return census(pc.compile(layer, ["quantize:W8A8-dynamic"], example_inputs=x, verify=False))

    assert counted() == (1, 0, 0)
    Speeds({name: (float(name == "FoldedMatMul"),) * 3 for name in FORMS}).save()
    assert counted() == (0, 0, 1)


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8-dynamic", "W4A8,group_size=16", "W4A16,group_size=16"])
def test_no_claimed_site_runs_in_fp32_unsaid(member: Member, scheme: str) -> None:
    """Done when `explain()` accounts for every matrix product of the graph that runs."""
    if scheme.startswith("W4A16") and member.name == "unet":
        pytest.skip("it has no linear layer, the scheme takes nothing else")
    compiled = member.compiled(scheme)
    rows = compiled.explain().rows
    claimed = [row for row in rows if row.encoding != "dense"]
    dense = [row for row in rows if row.encoding == "dense" and row.kernel.startswith("fp32 ")]
    packed = [row for row in claimed if row.kernel.startswith("MatMulNBits")]
    integer = [row for row in claimed if row.accelerated and row not in packed]
    left = [row for row in claimed if row not in packed and not row.accelerated]
    assert claimed
    assert all(row.kernel.startswith("fp32 ") and row.note.startswith("not accelerated: ") for row in left), left
    constant, floats = CONSTANT.get(member.name, 0), len(left) + len(dense) + UNCLAIMED.get(member.name, 0)
    counted = (max(len(integer) - constant, 0), max(len(packed) - constant, 0), floats)
    assert census(compiled) == counted
    if not any("conv" in row.kernel.lower() for row in left):
        assert not left, "every linear layer has an integer kernel"


#: a product with a constant table of positions, which OpenVINO does on floats
FLOATING_ON_OPENVINO = {"deberta_v2": 4}


def test_static_ranges_run_on_integers_on_openvino(member: Member) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    compiled = member.compiled("W8A8", "openvino")
    for batch in (1, 5):
        feed = widen(member.inputs, batch)
        for got, want in zip(tensors(compiled(**feed)), tensors(compiled.program(**feed)), strict=True):
            assert got.shape == want.shape
            assert relative(got, want) < 0.02  # a rounding that falls the other way, as above
    claimed = [row for row in compiled.explain().rows if row.encoding != "dense"]
    floating = [row for row in claimed if not row.accelerated]
    assert len(floating) == FLOATING_ON_OPENVINO.get(member.name, 0) < len(claimed)
    assert all(row.note.startswith("not accelerated: ") for row in floating)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    decoder_like = getattr(getattr(model, "config", None), "use_cache", False) and model.__class__.__name__ not in (
        "BertModel", "RobertaModel", "T5EncoderModel",
    )  # fmt: skip
    return {"use_cache": False} if decoder_like else {}
