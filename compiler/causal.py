"""A causal language model as one graph for prefill and decode: (tokens, past) → (logits, present).

    k, v = cat(past_k, W_k·x), cat(past_v, W_v·x);  y = softmax(q·kᵀ·s + mask)·v;  present = (k, v)

The tensors are named as ONNX Runtime GenAI and optimum name them: `input_ids`, `attention_mask`, `position_ids`,
`past_key_values.{i}.key/value` → `logits`, `present.{i}.key/value`. Exact: the model's own modules compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from .errors import OptionError

#: the arguments of every causal program, in order
PARAMETERS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
Layers = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Cache:
    """What the key-value cache of a model looks like: `(H, D)` of key 0, value 0, key 1, value 1, …, each stored as
    `[B, H, T, D]`. `context` is the most tokens the model may see; `eos` are the tokens that end a text.
    """

    context: int
    dtype: str
    shapes: tuple[tuple[int, int], ...]
    eos: tuple[int, ...] = ()

    def nbytes(self, batch: int, tokens: int) -> int:
        """Bytes of the cache of `batch` texts of `tokens` tokens."""
        width = sum(heads * width for heads, width in self.shapes)
        return batch * tokens * width * getattr(torch, self.dtype).itemsize  # type: ignore[no-any-return]

    def zeros(self, batch: int, tokens: int = 0) -> list[Tensor]:
        """Key 0, value 0, key 1, …"""
        return [
            torch.zeros(batch, heads, tokens, width, dtype=getattr(torch, self.dtype)) for heads, width in self.shapes
        ]

    def complete(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """A call with what it leaves out: an empty past, a mask that hides nothing, positions counted from the mask.

        `input_ids` int64 `[B, T]`, `attention_mask` int64 `[B, past + T]`. Raises OptionError for a cache of another
        shape and for more tokens than the context has.
        """
        call = {name: value for name, value in call.items() if value is not None}
        ids = call.get("input_ids")
        if not isinstance(ids, Tensor):
            return call
        if ids.ndim != 2 or not ids.numel():
            raise OptionError(
                f"input_ids has shape {list(ids.shape)}",
                where="calling a causal model",
                fix="pass a row of tokens for each text: [B, T]",
            )
        past = call.setdefault("past_key_values", layers(self.zeros(ids.shape[0])))
        total = self._seen(past, ids.shape[0]) + ids.shape[1]
        self.check_length(total)
        mask = call.setdefault("attention_mask", torch.ones(ids.shape[0], total, dtype=torch.int64))
        if mask.shape != (ids.shape[0], total):
            raise OptionError(
                f"attention_mask has shape {list(mask.shape)}, the tokens and the cache together {[len(ids), total]}",
                where="calling a causal model",
                fix="give the mask a column for every token of the cache and of this call",
            )
        if "position_ids" not in call:
            call["position_ids"] = positions(mask)[:, -ids.shape[1] :].contiguous()
        return {name: call.pop(name) for name in PARAMETERS} | call

    def check_length(self, tokens: int) -> None:
        if tokens > self.context:
            raise OptionError(
                f"{tokens} tokens are more than the context of {self.context}",
                where="calling a causal model",
                fix="shorten the text, or compile with a larger CausalLM(max_length=…) where the model allows it",
            )

    def _seen(self, past: Layers, batch: int) -> int:
        """How many tokens a cache holds."""
        found = [tuple(layer[kind].shape) for layer in past for kind in ("key", "value")]
        seen = int(found[0][2]) if found else 0
        wanted = [(batch, heads, seen, width) for heads, width in self.shapes]
        for index, (shape, right) in enumerate(zip(found, wanted, strict=False)):
            if shape != right:
                kind = ("key", "value")[index % 2]
                raise _misfit(
                    f"layer {index // 2} holds a {kind} of shape {list(shape)}, the model takes {list(right)}"
                )
        if len(found) != len(wanted):
            raise _misfit(f"it holds {len(past)} layers, the model has {len(self.shapes) // 2}")
        return seen


def _misfit(what: str) -> OptionError:
    return OptionError(
        f"the key-value cache does not fit the model: {what}",
        where="past_key_values",
        fix="pass what a call with the same batch returned as 'present'",
    )


def positions(mask: Tensor) -> Tensor:
    """The position of each token `[B, T]`, int64: 0 for the first that the mask shows, and for what it hides."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def layers(tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Key 0, value 0, key 1, … → one `{"key", "value"}` for each layer."""
    return [{"key": key, "value": value} for key, value in zip(tensors[::2], tensors[1::2], strict=True)]


class CausalLM(nn.Module):
    """A `transformers` causal language model with its key-value cache as inputs and outputs.

    `max_length` bounds prompt and answer together; the model's own context by default. `logits_to_keep` last tokens of
    a call get logits, 0: all; 1 is enough to generate, and spares a prompt the vocabulary head. Parameters keep their
    names. Raises OptionError for a model that is no causal language model, or whose cache is not keys and values that
    grow.
    """

    language_model: Any

    def __init__(self, model: nn.Module, *, max_length: int | None = None, logits_to_keep: int = 0) -> None:
        super().__init__()
        if logits_to_keep < 0 or (logits_to_keep and "logits_to_keep" not in signature(model.forward).parameters):
            why = "it is negative" if logits_to_keep < 0 else f"{type(model).__name__} computes them all"
            raise OptionError(
                f"logits_to_keep={logits_to_keep} is not possible: {why}",
                where="CausalLM",
                fix="leave it out",
            )
        # the same children, not a child of our own: parameters are called as in the model
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self.__dict__["language_model"] = model
        self.kept = {"logits_to_keep": logits_to_keep} if logits_to_keep else {}
        self.cache = _probe(model, max_length)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Layers
    ) -> dict[str, Any]:
        """`[B, T]` tokens → logits `[B, T, V]`, of the last tokens where so asked, and the cache with all in it."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache, batch, seen = DynamicCache(), input_ids.shape[0], past_key_values[0]["key"].shape[2]
        agreed = [attention_mask.shape[0] == batch, attention_mask.shape[1] == seen + input_ids.shape[1]]
        for holds in (*agreed, *(past["value"].shape[2] == seen for past in past_key_values)):
            torch._check(holds)  # type: ignore[no-untyped-call]  # for capture: one symbol for each open axis
        for past in past_key_values:
            layer = DynamicLayer()
            layer.lazy_initialization(past["key"], past["value"])
            layer.keys, layer.values = past["key"], past["value"]
            cache.layers.append(layer)
        result = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **self.kept,
        )
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return {"logits": result.logits, "present": layers(present)}

    @property
    def example_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call on random tokens, for those who have none."""
        table = self.language_model.get_input_embeddings().weight
        tokens = torch.randint(len(table), (1, min(32, self.cache.context)), generator=torch.Generator().manual_seed(0))
        return (), {"input_ids": tokens}

    def example(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call that continues a text, to capture the graph with: of a call without a past, its second half."""
        call = self.cache.complete(dict(zip(PARAMETERS, args, strict=False)) | dict(kwargs))
        ids, mask = call["input_ids"], call["attention_mask"]
        if mask.shape[1] > ids.shape[1]:
            return call
        half = ids.shape[1] // 2
        if half < 2:
            raise OptionError(
                f"{ids.shape[1]} tokens are too few to capture prefill and decode",
                where="example_inputs=",
                fix="pass at least 4 tokens, or leave example_inputs out",
            )
        first = self.cache.complete({"input_ids": ids[:, :half], "attention_mask": mask[:, :half]})
        with torch.no_grad():
            past = self(**first)["present"]
        rest = {"input_ids": ids[:, half:], "attention_mask": mask, "past_key_values": past}
        return self.cache.complete(rest)

    def dynamic_shapes(self) -> dict[str, Any]:
        """Batch, tokens and tokens of the past stay open."""
        row, past = {0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO}
        every = [{"key": past, "value": past} for _ in range(len(self.cache.shapes) // 2)]
        return dict(zip(PARAMETERS, (row, row, row, every), strict=True))


def _probe(model: nn.Module, max_length: int | None) -> Cache:
    """Run one token to see what the model returns and caches."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not hasattr(model, "get_input_embeddings") or getattr(config, "is_encoder_decoder", False):
        raise _refusal(name, "it is not a decoder of transformers")
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    try:
        with torch.no_grad():
            result = model(input_ids=tokens, use_cache=True)
    except Exception as error:
        raise _refusal(name, f"a call with input_ids alone fails: {error}") from error
    if getattr(result, "logits", None) is None or result.logits.ndim != 3:
        raise _refusal(name, "it returns no logits for each token")
    shapes, dtype = _shapes(name, getattr(result, "past_key_values", None))
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != "sdpa":
        raise OptionError(
            f"the model uses {implementation!r} attention",
            where=f"CausalLM({name})",
            fix="load it with attn_implementation='sdpa', or call model.set_attn_implementation('sdpa')",
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = max_length if max_length is not None else limit
    if length is None or not 4 <= length <= (limit or length):
        raise OptionError(
            f"max_length={max_length} does not fit the model's context of {limit or 'unknown'} tokens",
            where=f"CausalLM({name})",
            fix="give the most tokens that prompt and answer may have together, at least 4",
        )
    ends = (getattr(source, "eos_token_id", None) for source in (getattr(model, "generation_config", None), config))
    end = next((token for token in ends if token is not None), None)
    eos = () if end is None else tuple(end) if isinstance(end, (list, tuple)) else (int(end),)
    return Cache(length, dtype, shapes, eos)


def _shapes(name: str, cache: Any) -> tuple[tuple[tuple[int, int], ...], str]:
    """`(H, D)` and the dtype of the tensors in a cache of `transformers` whose layers only grow."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if not isinstance(cache, DynamicCache) or not cache.layers:
        raise _refusal(name, f"it keeps a {type(cache).__name__} and not keys and values for each layer")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise _refusal(name, f"a layer of its cache is a {type(layer).__name__}, not keys and values that grow")
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    shapes = tuple((int(tensor.shape[1]), int(tensor.shape[3])) for tensor in tensors)
    return shapes, str(tensors[0].dtype).removeprefix("torch.")


def _refusal(name: str, why: str) -> OptionError:
    return OptionError(
        f"{name} is not a causal language model with a key-value cache: {why}",
        where="CausalLM",
        fix="pass a decoder such as transformers.AutoModelForCausalLM loads; compile any other model as it is",
    )


__all__ = ["PARAMETERS", "Cache", "CausalLM", "layers", "positions"]
