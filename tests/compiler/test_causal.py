"""Causal language models: completing a call, what is refused, the captured graph, and the choice of the next token."""

from __future__ import annotations

import paretoc as pc
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from paretoc.compiler.causal import Cache, CausalLM, layers, positions
from paretoc.compiler.errors import OptionError
from paretoc.compiler.generate import Sampling
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

CACHE = Cache(context=12, dtype="float32", shapes=((2, 4), (2, 4), (3, 4), (3, 6)))
IDS = torch.arange(6).reshape(2, 3)


def llama(**options):
    base = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 40,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(base | options))).eval()


@pytest.fixture(scope="module")
def captured_llama():
    torch.manual_seed(0)
    model = llama()
    return model, pc.capture(CausalLM(model))


# -- completing a call ---------------------------------------------------------------------------------------------


def test_a_call_on_tokens_alone_is_completed():
    call = CACHE.complete({"input_ids": IDS})
    assert list(call) == ["input_ids", "attention_mask", "position_ids", "past_key_values"]
    assert call["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert call["position_ids"].tolist() == [[0, 1, 2]] * 2
    shapes = [tuple(layer[kind].shape) for layer in call["past_key_values"] for kind in ("key", "value")]
    assert shapes == [(2, 2, 0, 4), (2, 2, 0, 4), (2, 3, 0, 4), (2, 3, 0, 6)]


def test_positions_are_counted_from_the_first_token_that_is_not_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    call = CACHE.complete(
        {"input_ids": IDS, "attention_mask": mask, "past_key_values": layers(CACHE.zeros(2, 2)), "position_ids": None}
    )
    assert call["position_ids"].tolist() == [[0, 1, 2], [2, 3, 4]]


def test_bytes_are_those_of_the_tensors():
    assert CACHE.nbytes(3, 7) == sum(t.numel() * t.element_size() for t in CACHE.zeros(3, 7)) == 3 * 7 * 46 * 4


def test_calls_that_do_not_fit_are_refused(refused):
    def call(**changes):
        return lambda: CACHE.complete({"input_ids": IDS} | changes)

    refused(OptionError, "input_ids has shape [3]", call(input_ids=IDS[0]))
    refused(OptionError, "13 tokens are more than the context of 12", call(past_key_values=layers(CACHE.zeros(2, 10))))
    refused(
        OptionError,
        "attention_mask has shape [2, 3], the tokens and the cache together [2, 5]",
        call(past_key_values=layers(CACHE.zeros(2, 2)), attention_mask=torch.ones(2, 3)),
    )
    wrong = layers(CACHE.zeros(2, 2))
    wrong[1]["value"] = torch.zeros(2, 3, 1, 6)
    refused(
        OptionError,
        "layer 1 holds a value of shape [2, 3, 1, 6], the model takes [2, 3, 2, 6]",
        call(past_key_values=wrong),
    )
    refused(OptionError, "layer 0 holds a key of shape [1, 2, 2, 4]", call(past_key_values=layers(CACHE.zeros(1, 2))))
    refused(OptionError, "it holds 1 layers, the model has 2", call(past_key_values=layers(CACHE.zeros(2, 2))[:1]))


# -- what is a causal language model -------------------------------------------------------------------------------


def test_other_models_are_refused(refused):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    cases = {
        "Linear is not a causal language model": torch.nn.Linear(2, 2),
        "BertLMHeadModel is not a causal language model": transformers.BertLMHeadModel(
            transformers.BertConfig(**small, vocab_size=20)
        ),
        "it returns no logits for each token": llama().model,
        "it is not a decoder of transformers": transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
        ),
        "it keeps a NoneType and not keys and values for each layer": transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
        ),
    }
    for sentence, model in cases.items():
        refused(OptionError, sentence, lambda model=model: CausalLM(model.eval()))


def test_attention_must_be_sdpa(refused):
    refused(OptionError, "the model uses 'eager' attention", lambda: CausalLM(llama(attn_implementation="eager")))


@pytest.mark.parametrize("length", [3, 41])
def test_max_length_stays_inside_the_context(refused, length):
    sentence = f"max_length={length} does not fit the model's context of 40 tokens"
    refused(OptionError, sentence, lambda: CausalLM(llama(), max_length=length))
    assert CausalLM(llama(), max_length=40).cache.context == 40


def test_end_tokens_are_the_models():
    model = llama(eos_token_id=7)
    assert CausalLM(model).cache.eos == (7,)
    model.generation_config.eos_token_id = [3, 4]
    assert CausalLM(model).cache.eos == (3, 4)


# -- capture -------------------------------------------------------------------------------------------------------


def test_parameters_keep_the_models_names(captured_llama):
    model, program = captured_llama
    names = dict(model.named_parameters()).keys()
    assert {n for n in program.weights() if n in names} == names
    assert dict(CausalLM(model).named_parameters()).keys() == names


def test_inputs_and_outputs_are_named_as_others_name_them(captured_llama):
    _, program = captured_llama
    past = [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert program.interface.input_names() == ["input_ids", "attention_mask", "position_ids", *past]
    present = [f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert program.interface.output_names() == ["logits", *present]


@pytest.mark.parametrize(("batch", "past", "tokens"), [(1, 0, 1), (1, 0, 9), (3, 0, 4), (3, 5, 1), (2, 6, 3)])
def test_one_graph_prefills_and_decodes(captured_llama, batch, past, tokens):
    model, program = captured_llama
    ids = torch.randint(0, 50, (batch, past + tokens))
    with torch.no_grad():
        want = model(ids).logits
    call = {"input_ids": ids[:, past:]}
    if past:
        call["past_key_values"] = program(ids[:, :past])["present"]
    got = program(**call)
    torch.testing.assert_close(got["logits"], want[:, past:], rtol=1e-4, atol=1e-5)  # float32, other orders of sums
    assert got["present"][1]["value"].shape == (batch, 2, past + tokens, 4)


def test_the_cache_is_read(captured_llama):
    """A check of the checks: with another past the logits differ."""
    _, program = captured_llama
    ids = torch.randint(0, 50, (1, 6))
    past = program(ids[:, :5])["present"]
    want = program(ids[:, 5:], past_key_values=past)["logits"]
    past[0]["value"] = past[0]["value"] + 0.1
    assert not torch.allclose(program(ids[:, 5:], past_key_values=past)["logits"], want, atol=1e-4)


def test_examples(captured_llama, refused):
    model, _ = captured_llama
    refused(OptionError, "3 tokens are too few", lambda: CausalLM(model).example((IDS,), {}))
    ids = torch.randint(0, 50, (1, 8))
    call = CausalLM(model).example((), {"input_ids": ids})
    assert torch.equal(call["input_ids"], ids[:, 4:]) and call["attention_mask"].shape == (1, 8)
    with torch.no_grad():
        want = model(ids, use_cache=True).past_key_values.layers[1].keys[:, :, :4]
    torch.testing.assert_close(call["past_key_values"][1]["key"], want, rtol=1e-5, atol=1e-6)
    assert CausalLM(model).example((), call)["past_key_values"] is call["past_key_values"]


# -- the next token ------------------------------------------------------------------------------------------------


@given(st.floats(0.1, 3), st.integers(0, 12), st.floats(0.05, 1), st.lists(st.floats(-5, 5), min_size=9, max_size=9))
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p, scores):
    logits = torch.tensor([scores]) + 1e-3 * torch.arange(9)  # no ties
    want = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    reached = want.softmax(-1).sort(descending=True).values.cumsum(-1)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    got = Sampling(temperature, top_k, top_p).probabilities(logits)
    if (reached - top_p).abs().min() > 1e-5:  # on the edge, rounding decides
        torch.testing.assert_close(got, want.softmax(-1))


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    got = Sampling(top_p=0.7).probabilities(logits)
    torch.testing.assert_close(got, torch.tensor([[0.625, 0.375, 0, 0]]))


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_sampling_options_are_checked(refused, options):
    refused(OptionError, "cannot sample with", lambda: Sampling(**options))
