"""Generation on every target equals `transformers`, from one graph that prefills and decodes."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from pathlib import Path

import onnxruntime
import paretoc as pc
import pytest
import torch
import transformers
from paretoc.backends.onnxruntime.cache import share_cache
from paretoc.compiler.errors import OptionError
from paretoc.compiler.generate import Generator
from paretoc.compiler.registry import registry

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 60,
    "max_position_embeddings": 48,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 2}),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=60, n_positions=48, bos_token_id=1, eos_token_id=2
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=4),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=5),
    "gemma": lambda: transformers.GemmaConfig(
        **GROUPED | {"num_key_value_heads": 1}, head_dim=16, tie_word_embeddings=False
    ),
}
DATA = Path(os.environ.get("PARETOC_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "stories260k"


def made(name: str) -> torch.nn.Module:
    """A model whose logits differ clearly between tokens."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@cache
def both(name: str):
    model = made(name)
    return model, pc.compile(pc.CausalLM(model), verify=False)


@pytest.fixture(params=MODELS)
def compiled(request):
    return both(request.param)


@pytest.fixture
def llama():
    return both("llama")


def prompt(tokens: int = 7, padding: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second padded on the left."""
    ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding], ids[1, :padding] = 0, 0
    return ids, mask


def reference(model, ids, mask, tokens=20, **options):
    options = {"do_sample": False, "pad_token_id": 2, "eos_token_id": []} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)


# -- equal to transformers -----------------------------------------------------------------------------------------


def test_greedy_equals_transformers(compiled):
    model, ours = compiled
    ids, mask = prompt()
    want = reference(model, ids, mask)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=20, eos_token_id=[]), want)
    assert len(set(want[:, 7:].flatten().tolist())) > 5, "a text of one word would prove little"


def test_the_padding_matters(compiled):
    """A check of the check above: without the mask, the padded row is another."""
    _, ours = compiled
    ids, mask = prompt()
    (same, padded), (bare, other) = ours(ids, attention_mask=mask)["logits"], ours(ids)["logits"]
    torch.testing.assert_close(same, bare, rtol=1e-5, atol=1e-5)  # float32, other orders of sums
    assert (padded[-1] - other[-1]).abs().max() > 1e-2


def test_prefill_and_decode_equal_the_model(compiled):
    """Prefill of any batch, one token, several tokens at once: each against the model without a cache."""
    model, ours = compiled
    ids, mask = prompt(12)
    with torch.no_grad():
        place = (mask.cumsum(1) - 1).clamp(min=0)
        want = model(ids, attention_mask=mask, position_ids=place, use_cache=False).logits
    result, seen = ours(ids[:, :7], attention_mask=mask[:, :7]), 7
    for tokens in (1, 4):
        result = ours(
            ids[:, seen : seen + tokens],
            attention_mask=mask[:, : seen + tokens],
            past_key_values=result["present"],
        )
        expected = want[:, seen : seen + tokens]
        torch.testing.assert_close(result["logits"], expected, rtol=1e-4, atol=1e-4)  # float32, other orders of sums
        seen += tokens


# -- the graph -----------------------------------------------------------------------------------------------------


def test_every_attention_appends_to_its_cache(compiled):
    _, ours = compiled
    graph = ours._compiled().executable.model.graph
    counts = Counter(node.op_type for node in graph)
    assert counts["GroupQueryAttention"] == len(ours.program.interface.cache.shapes) // 2
    for name in ("Softmax", "Attention"):
        assert not counts[name]
    readers = {node.op_type for value in graph.inputs[3:] for node in value.consumers()}
    assert readers == {"GroupQueryAttention"}, "the length of the past is not that of the buffer"


class Lowered(Generator):
    """The program of a compiled model on another target."""

    def __init__(self, ours, target: str) -> None:
        self.interface, self.executable = ours.program.interface, registry().backend(target).lower(ours.program, {})

    def _runs(self):
        return self.interface, self.executable


@pytest.mark.parametrize("target", ["eager", "onnx"])
def test_other_targets_do_the_same(llama, target):
    model, ours = llama
    other = Lowered(ours, target)
    ids, mask = prompt()
    assert torch.equal(other.generate(ids, mask, max_new_tokens=20, eos_token_id=[]), reference(model, ids, mask))
    if target == "onnx":
        assert {node.domain for node in other.executable.model.graph} == {""}
        assert not other.executable.settings["shared_cache"]


def test_an_attention_that_does_not_fit_leaves_all_as_they_are(llama):
    _, ours = llama
    program = ours.program.clone()
    cat = torch.ops.aten.cat.default
    present = next(n for n in program.calls(cat) if n.args[0][0] in program.placeholders)
    present.args = (present.args[0][::-1], *present.args[1:])  # new tokens in front of the old ones
    before = str(program.graph)
    assert not share_cache(program)
    assert str(program.graph) == before
    assert share_cache(ours.program.clone())


def test_other_runtimes_find_their_names(llama, tmp_path):
    """As optimum drives it: a raw session, the cache by name, present becomes past."""
    model, ours = llama
    ours.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    past = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert [i.name for i in session.get_inputs()] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{p}" for p in past)
    ]  # fmt: skip
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present.{p}" for p in past)]
    axes = {i.name: i.shape for i in session.get_inputs()}
    assert axes["input_ids"] == axes["position_ids"] == ["batch", "sequence"]
    assert axes["attention_mask"] == ["batch", "total"]
    assert all(axes[f"past_key_values.{p}"] == ["batch", 2, "past", 8] for p in past)
    ids, mask = prompt()
    want = reference(model, ids, mask, 4)
    held = {f"past_key_values.{p}": torch.zeros(2, 2, 0, 8).numpy() for p in past}
    text, fresh = ids, ids
    for _ in range(4):
        place = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        feeds = {"input_ids": fresh, "attention_mask": mask, "position_ids": place}
        logits, *present = session.run(None, {n: t.numpy() for n, t in feeds.items()} | held)
        held = {f"past_key_values.{p}": value for p, value in zip(past, present, strict=True)}
        fresh = torch.from_numpy(logits[:, -1:]).argmax(-1)
        text, mask = torch.cat([text, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)
    assert torch.equal(text, want)


def test_a_prompt_needs_the_logits_of_its_last_token_alone(llama, refused):
    model, whole = llama
    ids, mask = prompt()
    last = pc.compile(pc.CausalLM(model, logits_to_keep=1), verify=False)
    logits = last(ids, attention_mask=mask)["logits"]
    want = whole(ids, attention_mask=mask)["logits"]
    torch.testing.assert_close(logits, want[:, -1:], rtol=1e-5, atol=1e-5)  # float32, other orders of sums
    assert (want[:, -1] - want[:, -2]).abs().max() > 1e-2, "another token has other logits"
    assert torch.equal(last.generate(ids, mask, max_new_tokens=20, eos_token_id=[]), reference(model, ids, mask))
    refused(OptionError, "logits_to_keep=-1 is not possible", lambda: pc.CausalLM(model, logits_to_keep=-1))


# -- passes, artifacts, sampling, errors ---------------------------------------------------------------------------


def test_quantised_saved_loaded(tmp_path):
    model = made("qwen2")
    ids, mask = prompt()
    ours = pc.compile(pc.CausalLM(model, max_length=40), ["quantize:W4A16,group_size=16"], calibration=[ids])
    assert {row.encoding for row in ours.explain().rows if "proj" in row.site} == {"Affine(bits=4, group=16)"}
    assert str(ours.report()) and ours.report().compiled.bytes < ours.report().original.bytes
    want = ours.generate(ids, mask, max_new_tokens=20)
    assert torch.equal(want, ours.generate(ids, mask, max_new_tokens=20))
    ours.save(tmp_path / "out")
    loaded = pc.load(tmp_path / "out")
    assert torch.equal(loaded.generate(ids, mask, max_new_tokens=20), want)
    assert loaded.interface.cache == ours.program.interface.cache


def test_a_text_ends_at_its_end_token(llama):
    model, ours = llama
    ids, mask = prompt()
    free = reference(model, ids, mask)
    end = int(free[0, 10])  # the fourth token of the first answer
    want = reference(model, ids, mask, eos_token_id=end, pad_token_id=end)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=20, eos_token_id=end), want)
    first = next(place for place in range(7, 27) if free[0, place] in (end, 59))
    assert torch.equal(ours.generate(ids[:1], max_new_tokens=20, eos_token_id=[59, end]), free[:1, : first + 1])


def test_sampling_is_drawn_from_the_distribution(llama):
    model, ours = llama
    ids, _ = prompt()
    ids = ids[:1].expand(400, -1).contiguous()
    drawn = ours.generate(ids, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=4, eos_token_id=[])[:, -1]
    again = ours.generate(ids, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=4, eos_token_id=[])[:, -1]
    other = ours.generate(ids, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=4, eos_token_id=[], seed=1)[
        :, -1
    ]
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, -1] / 1.5
    best = logits.topk(4)
    want = best.values.softmax(-1)
    share = torch.stack([(drawn == token).float().mean() for token in best.indices])
    assert abs(float(share.sum()) - 1) < 1e-6
    assert ((share - want).abs() < 4 * (want * (1 - want) / 400).sqrt()).all()


def test_errors(llama, refused):
    _, ours = llama
    ids, mask = prompt()
    refused(OptionError, "49 tokens are more than the context of 48", lambda: ours.generate(ids, max_new_tokens=42))
    refused(OptionError, "a row of the prompt ends with padding", lambda: ours.generate(ids, mask.flip(1)))
    plain = pc.compile(torch.nn.Embedding(60, 4), example_inputs=ids, target="eager")
    refused(OptionError, "compiled without a key-value cache", lambda: plain.generate(ids))


# -- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}: set PARETOC_DATA to the folder of the measuring data")
def test_two_hundred_tokens_of_a_story():
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA).eval()
    ids = torch.tensor([[1]])
    want = reference(model, ids, torch.ones_like(ids), 200)
    exact = pc.compile(pc.CausalLM(model), verify=False).generate(ids, max_new_tokens=200, eos_token_id=[])
    assert torch.equal(exact, want)
