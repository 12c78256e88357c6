"""Text generation: one prefill call, then a token at a time, greedy or sampled from softmax(logits / temperature).

`top_k` keeps the k most probable tokens, `top_p` the fewest whose probabilities reach p (Holtzman et al. 2020, §3.1),
in that order, as `transformers` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import CachingExecutable, Decoder, Executable
from .causal import Cache
from .errors import OptionError
from .program import Interface


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise OptionError(
                f"cannot sample with temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}",
                where="generate",
                fix="give temperature > 0, top_k >= 0 (0: all) and 0 < top_p <= 1; do_sample=False is greedy",
            )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits `[B, V]` → the distribution to draw from, float32 `[B, V]`."""
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True, stable=True)
            ahead = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, ahead >= self.top_p)
            scores = scores.masked_fill(dropped, -torch.inf)
        return scores.softmax(-1)


class GrowingCache:
    """A decoder over any executable: what one call returns as present is the past of the next."""

    def __init__(self, run: Callable[[Sequence[Tensor]], list[Tensor]], cache: Cache, batch: int) -> None:
        self.run, self.past = run, cache.zeros(batch)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        logits, *self.past = self.run([input_ids, attention_mask, position_ids, *self.past])
        return logits


class Generator(ABC):
    """What a compiled or loaded model needs to write text."""

    @abstractmethod
    def _runs(self) -> tuple[Interface, Executable]:
        """How it is called, and what runs it."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Continue each row of `input_ids` int64 `[B, T]`, padded on the left where `attention_mask` is 0.

        Returns `[B, T + n]`, n at most `max_new_tokens`: prompt and answer. A row that has ended, by one of
        `eos_token_id` (None: the model's own; []: none), is filled up with it. Greedy unless `do_sample`. Raises
        OptionError for a model compiled without a cache and for more tokens than its context has.
        """
        interface, executable = self._runs()
        cache = interface.cache
        if cache is None:
            raise OptionError(
                "the model was compiled without a key-value cache",
                where="generate",
                fix="compile paretoc.CausalLM(model) in place of the model",
            )
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        call = cache.complete({name: value.long() for name, value in given.items() if value is not None})
        text: Tensor = call["input_ids"]
        (batch, length), fresh, mask, place = text.shape, text, call["attention_mask"], call["position_ids"]
        cache.check_length(length + max_new_tokens)
        if not bool(mask[:, -1].all()):
            raise OptionError(
                "a row of the prompt ends with padding",
                where="generate",
                fix="pad on the left: tokenizer.padding_side = 'left'",
            )
        decoder = _decoder(executable, cache, batch, length + max_new_tokens)
        choose = _sampler(Sampling(temperature, top_k, top_p), seed) if do_sample else _greedy
        eos = cache.eos if eos_token_id is None else eos_token_id
        end = torch.tensor([eos] if isinstance(eos, int) else list(eos), dtype=torch.int64)
        running = torch.ones(batch, 1, dtype=torch.bool)
        for _ in range(max_new_tokens):
            fresh = choose(decoder(fresh, mask, place)[:, -1])
            if len(end):
                fresh = torch.where(running, fresh, end[0])
                running = running & ~torch.isin(fresh, end)
            text = torch.cat([text, fresh], dim=1)
            if not bool(running.any()):
                break
            mask = torch.cat([mask, torch.ones_like(fresh)], dim=1)
            place = place[:, -1:] + 1
        return text


def _decoder(executable: Executable, cache: Cache, batch: int, tokens: int) -> Decoder:
    if isinstance(executable, CachingExecutable):
        return executable.decoder(cache, batch, tokens)
    return GrowingCache(executable.run, cache, batch)


def _greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


def _sampler(sampling: Sampling, seed: int) -> Callable[[Tensor], Tensor]:
    source = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial(sampling.probabilities(logits), 1, generator=source)


__all__ = ["Generator", "GrowingCache", "Sampling"]
