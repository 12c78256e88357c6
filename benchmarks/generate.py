"""Text generation on a CPU with a key-value cache: paretoc on ONNX Runtime against transformers in PyTorch eager.

    python benchmarks/generate.py stories | llama [--threads 2] [--runs 20]

`stories`: stories260k, a real Llama of 260 K parameters, 200 tokens greedy: is the text the same, and where it
differs, how close were the two tokens. `llama`: a random Llama of 238 M parameters (12 layers, width 1024, 16 heads,
feed-forward 3328, vocabulary 32000), 128 tokens at once, and one token with 128 in the cache. Calls run interleaved in
one process; medians, minima in brackets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paretoc as pc
import torch
from _models import arguments, data_folder
from paretoc.compiler.cost import measure
from torch import Tensor

#: its feed-forward is 172 wide, which 32 does not divide
STORIES = ["quantize:W4A16,group_size=32,ignore=*.down_proj", "quantize:W4A16,group_size=43,targets=*.down_proj"]
LLAMA: dict[str, list[Any]] = {
    "fp32": [],
    "W8A8-dynamic": ["quantize:W8A8-dynamic"],
    "W8A8 in groups": [pc.Quantize("W8A8-dynamic", weights="Affine(8, 128)", granularity="group")],
    "W4A8": ["quantize:W4A8,group_size=128"],
    "W4A16": ["quantize:W4A16,group_size=128"],
}
PAST = 128


def compiled(model: Any, length: int, recipes: dict[str, list[Any]]) -> dict[str, Any]:
    causal = pc.CausalLM(model, max_length=length)
    return {f"paretoc {name}": pc.compile(causal, passes, verify=False) for name, passes in recipes.items()}


def show(calls: dict[str, Callable[[], Any]], runs: int, tokens: int) -> None:
    times = measure(calls, runs=runs, budget_s=float("inf"))
    base, *_ = times.values()
    for name, time in times.items():
        middle, least = time.median, time.minimum
        each = f"{middle / tokens:7.2f} ms ({least / tokens:6.2f}) a token"
        rate = f"{1e3 * tokens / middle:7.0f} tokens/s ({1e3 * tokens / least:5.0f})"
        print(f"  {name:20s} {each}  {rate}  {base.median / middle:5.2f} × eager ({base.minimum / least:5.2f})")


def run_stories(folder: str | None, runs: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(data_folder(folder) / "stories260k").eval()
    prompt, tokens = torch.tensor([[1]]), 200
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    models = compiled(model, 512, {"fp32": [], "W4A16": STORIES})

    def transformers() -> Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # type: ignore[no-any-return]

    want = transformers()
    print(f"stories260k, {tokens} tokens after one")
    for name, ours in models.items():
        text = ours.generate(prompt, max_new_tokens=tokens, eos_token_id=[])
        differs = (text != want).nonzero()
        print(f"  {name}: " + (difference(model, want, text, int(differs[0, 1])) if len(differs) else "the same text"))
    calls: dict[str, Callable[[], Any]] = {"transformers eager": transformers}
    calls |= {
        name: lambda ours=ours: ours.generate(prompt, max_new_tokens=tokens, eos_token_id=[])
        for name, ours in models.items()
    }
    show(calls, runs, tokens)
    print(f"  cache: {cache_bytes(models, tokens + 1):,} bytes for {tokens + 1} tokens")


def difference(model: Any, want: Tensor, got: Tensor, place: int) -> str:
    """Where two texts part, and what the original model thought of the two tokens."""
    with torch.no_grad():
        probabilities = model(want[:, :place]).logits[0, -1].softmax(-1)
    theirs, ours = (float(probabilities[text[0, place]]) for text in (want, got))
    return f"differs from token {place} on, where the model gives {theirs:.3f} to its own and {ours:.3f} to this"


def run_llama(folder: str | None, runs: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.cache_utils import DynamicCache

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, intermediate_size=3328, vocab_size=32000,
        tie_word_embeddings=False, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 32000, (1, PAST + 1))
    past = DynamicCache(config=config)
    with torch.inference_mode():
        model(ids[:, :PAST], past_key_values=past)

    def eager() -> None:
        with torch.inference_mode():
            model(ids[:, PAST:], past_key_values=past)
        past.crop(-1)

    def prefill() -> None:
        with torch.inference_mode():
            model(ids[:, :PAST], past_key_values=DynamicCache(config=config))

    models = compiled(model, 1024, LLAMA)
    parameters = sum(p.numel() for p in model.parameters())
    for title, theirs, tokens in (
        (f"one token with {PAST} in the cache", eager, slice(PAST, PAST + 1)),
        (f"{PAST} tokens at once", prefill, slice(0, PAST)),
    ):
        calls: dict[str, Callable[[], Any]] = {"transformers eager": theirs}
        calls |= {name: step(ours, ids, tokens) for name, ours in models.items()}
        print(f"Llama of {parameters / 1e6:.0f} M parameters, {title}")
        show(calls, runs, tokens.stop - tokens.start)
    table = model.get_input_embeddings().weight.nbytes  # a token reads one row of it
    for name, ours in models.items():
        stored = ours._compiled().executable.stored_bytes()
        print(f"  {name}: {stored / 1e6:.0f} MB of weights, of which a token reads {(stored - table) / 1e6:.0f}")
    print(f"  cache: {cache_bytes(models, PAST + 1):,} bytes for {PAST + 1} tokens")


def step(ours: Any, ids: Tensor, tokens: slice) -> Callable[[], Tensor]:
    """The same step again and again: it writes the same rows of the cache."""
    decoder = ours._compiled().executable.decoder(ours.program.interface.cache, 1, PAST + 1)
    mask, place = torch.ones_like(ids), torch.arange(PAST + 1)[None]
    first = slice(0, PAST)
    decoder(*(x[:, first].contiguous() for x in (ids, mask, place)))
    seen = mask[:, : tokens.stop].contiguous()
    chosen, places = (x[:, tokens].contiguous() for x in (ids, place))
    return lambda: decoder(chosen, seen, places)


def cache_bytes(models: dict[str, Any], tokens: int) -> int:
    first = next(iter(models.values()))
    return first.program.interface.cache.nbytes(1, tokens)  # type: ignore[no-any-return]


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("model", choices=("stories", "llama"))
    parser.add_argument("--runs", type=int, default=20)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    {"stories": run_stories, "llama": run_llama}[chosen.model](chosen.data, chosen.runs)
