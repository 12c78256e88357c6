"""Part "orders" of quantization_grid.py: what papers claim about which method is better, held against two real models.

A claim holds when the paired difference lies more than two standard errors on its side; weight errors have no noise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import paretoc as pc
import torch
from _quality import Recipe, Sentences, Stories, affine, compiled_by, decoded, quantize
from paretoc.compiler.calibrate import gather, read_batches
from paretoc.compiler.sites import weight_sites
from paretoc.passes.fit import Gptq
from torch import Tensor, nn

#: ZeroQuant-FP's constraints on scales
SCALES = {"free": "float32", "M1": "e8m0-ceil", "M2": "shift"}


def orders(stories: Stories, sentences: Sentences) -> None:
    for part in (fitters, outliers, granularity, importance, residual):
        part(stories)
    elements(stories, sentences)
    constraints(stories, sentences)


def say(claim: str, holds: bool, figures: str) -> None:
    print(f"{'holds' if holds else 'does not hold':14s} {claim}: {figures}", flush=True)


def losses(bench: Stories, passes: Recipe, model: Any = None) -> Tensor:
    return bench.score(decoded(compiled_by(bench, passes, model)))


def better(claim: str, first: Tensor, second: Tensor, unit: str = "nats/token") -> None:
    """Whether the first losses are smaller, of the same stories or layers one by one."""
    change = first - second
    error = float(change.std()) / len(change) ** 0.5
    figures = f"{first.mean():.4f} against {second.mean():.4f} {unit}, {change.mean():+.4f} ± {error:.4f}"
    say(claim, float(change.mean()) < -2 * error, figures)


def fitters(bench: Stories) -> None:
    for bits in (4, 3):
        rtn, gptq = (losses(bench, [quantize(f, affine(bits, 0))]) for f in ("rtn", "gptq"))
        better(f"gptq < rtn, {bits} bits", gptq, rtn)


def with_outliers(model: Any, channels: int = 4, factor: float = 25.0) -> Any:
    """The same function with some channels of the inputs of q, k, v, gate, up and down that many times as large:
    made larger by the norm or by up, made up for in the columns that read them."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = {
                layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            chosen = torch.randperm(len(layer.input_layernorm.weight), generator=torch.manual_seed(0))[:channels]
            for norm, linears in readers.items():
                norm.weight[chosen] *= factor
                for linear in linears:
                    linear.weight[:, chosen] /= factor
            mlp.up_proj.weight[chosen] *= factor
            mlp.down_proj.weight[:, chosen] /= factor
    return model


def outliers(bench: Stories) -> None:
    """Rotation folds the norms and turns the stream, and what down reads at run time."""
    hard = with_outliers(bench.model)
    same = (bench.score(hard) - bench.reference).abs().max()
    print(f"outlier channels injected: largest change of a story's loss {same:.1e} nats")
    for scheme in ("W8A8-dynamic", "W4A8"):
        last = pc.Quantize(scheme, weights="Affine(bits=8)", granularity="token", targets=("Linear",))
        plain = losses(bench, [last], hard)
        better(f"smoothing < none with outliers, {last.describe()}", losses(bench, ["smooth:0.5", last], hard), plain)
        turned = losses(bench, ["rotate:online=true", last], hard)
        better(f"rotation < none with outliers, {last.describe()}", turned, plain)


def granularity(bench: Stories) -> None:
    """8-bit activations; without outliers these four bits more than enough, so that both models are shown."""
    for name, model in (("", bench.model), (" with outliers", with_outliers(bench.model))):
        token, tensor = (
            losses(bench, [pc.Quantize("W8A8-dynamic", granularity=g, targets=("Linear",))], model)
            for g in ("token", "tensor")
        )
        better(f"per token < per tensor activations, 8 bits{name}", token, tensor)


def importance(bench: Stories) -> None:
    """Σ r·‖(Ŵ − W)x‖² ÷ Σ r·‖W·x‖² of each layer on held-out stories, r the attention that a token receives, x as in
    the exact model; paired over layers."""
    exact = compiled_by(bench, ["canonicalize"]).program
    sites = [site for site in weight_sites(exact) if site.kind == "linear"]
    wanted = {site.path: Gptq(importance="attention").needs(site)[0] for site in sites}
    weighed = {path: statistic for path, statistic in wanted.items() if isinstance(statistic, pc.WeightedHessian)}
    held_out = read_batches(exact, [{"input_ids": tokens} for tokens in bench.held_out])
    grams = gather(exact, list(weighed.values()), held_out)

    def errors(fitter: str) -> Tensor:
        step = pc.Quantize("W4A16", weights="Affine(bits=3)", fitter=fitter, targets=("Linear",), sequential=False)
        compiled = compiled_by(bench, [step]).program
        stored = {site.path: site.weight for site in weight_sites(compiled)}
        found = []
        for site in (s for s in sites if s.path in weighed):
            weight, gram = exact.weight_value(site.weight).double(), grams[weighed[site.path]][0]
            moved = compiled.weight_value(stored[site.path]).double() - weight
            found.append(((moved @ gram) * moved).sum() / ((weight @ gram) * weight).sum())
        return torch.stack(found)

    better(
        f"importance-weighted GPTQ < GPTQ on important tokens, 3 bits, {len(weighed)} layers",
        *(errors(f"gptq{options}") for options in ("(importance='attention')", "")),
        unit="relative weighted error",
    )


def residual(bench: Stories) -> None:
    for weights in ("Affine(bits=3)", "Affine(bits=2, symmetric=False)"):
        for alone, beside in (("rtn", "rtn"), ("gptq", "lowrank(first='gptq')")):
            plain = losses(bench, [quantize(alone, weights)])
            mended = losses(bench, [quantize(beside, f"Sum({weights}, LowRank(rank=4))")])
            better(f"low-rank residual < none, {weights}, {alone}, rank 4", mended, plain)


def elements(stories: Stories, sentences: Sentences) -> None:
    """Rounded to nearest, one scale for 256 weights or for 32."""
    make = torch.Generator().manual_seed(0)
    normal = torch.randn(512, 1536, generator=make)
    several = torch.randn(4, 512, 1536, generator=make).square().mean(0).sqrt()
    matrices = {
        "Gaussian": [normal],
        "Student's t, 4 degrees of freedom": [normal / several],
        "MiniLM": linear_weights(sentences.model),
        "stories260k": linear_weights(stories.model),
    }
    for name, weights in matrices.items():
        for size in (256, 32):
            groups = [w.flatten()[: w.numel() // size * size].reshape(-1, size) for w in weights]
            floating, integer = (weight_error(groups, e) for e in ("Float('e2m1')", "Affine(bits=4)"))
            claim = f"E2M1 < int4 symmetric in weight error, {name}, groups of {size}"
            say(claim, floating < integer, f"{floating:.5f} against {integer:.5f}")


def constraints(stories: Stories, sentences: Sentences) -> None:
    """E2M1 with scales that are powers of two (M1), or one number a row over powers of two (M2), against free ones.
    Nearly free: what it costs is less than a fifth of what rounding to E2M1 costs anyway."""
    weights = linear_weights(sentences.model)
    free = {name: f"Float('e2m1', group={{}}, scale='{scale}')" for name, scale in SCALES.items()}
    found = {name: losses(stories, [quantize("rtn", text.format(4))]) for name, text in free.items()}
    for name in ("M1", "M2"):
        change = found[name] - found["free"]
        error, cost = float(change.std()) / len(change) ** 0.5, float((found["free"] - stories.reference).mean())
        figures = f"{change.mean():+.4f} ± {error:.4f} nats/token over {cost:+.4f} of free scales"
        say(f"scale constraint {name} nearly free, stories260k, groups of 4", float(change.mean()) < cost / 5, figures)
        errors = [weight_error(weights, free[n].format(128)) for n in (name, "free")]
        figures = f"{errors[0]:.5f} against {errors[1]:.5f}"
        say("the same in weight error, MiniLM, groups of 128", errors[0] < 1.2 * errors[1], figures)


def linear_weights(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]


def weight_error(weights: Iterable[Tensor], text: str) -> float:
    """Σ‖Ŵ − W‖² ÷ Σ‖W‖²."""
    encoding = pc.parse_encoding(text)
    moved = total = 0.0
    for weight in weights:
        stored = encoding.decode(encoding.encode(weight), tuple(weight.shape))
        moved += float((stored - weight).double().square().sum())
        total += float(weight.double().square().sum())
    return moved / total
