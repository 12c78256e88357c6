"""Bias correction: means and deviations of every layer are those before quantisation, and the outputs come closer."""

from __future__ import annotations

import copy

import paretoc as pc
import pytest
import torch
from paretoc.compiler.calibrate import Observer, gather
from paretoc.compiler.canonical import canonicalize
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.errors import CalibrationError, PassError
from paretoc.compiler.passes import Context
from paretoc.compiler.recipe import parse_passes
from paretoc.compiler.sites import weight_sites
from paretoc.passes import CorrectBias
from paretoc.passes.correct_bias import Moments
from torch import Tensor, nn


@pytest.fixture(scope="module")
def cnn(models):
    """(canonical program of a small CNN, 4 batches of pictures that are not centred)"""
    torch.manual_seed(0)
    batches = [torch.rand(4, 4, 6, 6) * 2 for _ in range(4)]
    program = pc.capture(models.Cnn().eval(), batches[0])
    canonicalize(program)
    return program, batches


def after(program, batches, text: str):
    """The program after a recipe, as the driver runs it: `correct_bias` is shown the program before quantisation."""
    made, flat, result = program.clone(), [[b] for b in batches], None
    for step in parse_passes(text.split("|")):
        context = Context(gather(made, step.needs(made), flat), batches=flat, reference=program)
        result = step.apply(made, context)
    return made, result


def moments(program, batches) -> dict[str, tuple[Tensor, Tensor]]:
    """Site → mean and standard deviation of each output channel over all batches, by PyTorch."""
    sites = {site.node.name: site for site in weight_sites(program)}
    seen: dict[str, list[Tensor]] = {site.path: [] for site in sites.values()}

    def keep(name: str, value: Tensor) -> None:
        if name in sites:
            channels = value.movedim(1 if sites[name].kind == "conv" else -1, -1)
            seen[sites[name].path].append(channels.reshape(-1, channels.shape[-1]).double())

    with torch.no_grad():
        for batch in batches:
            Observer(program.module, keep).run(batch)
    rows = {path: torch.cat(parts) for path, parts in seen.items()}
    return {path: (r.mean(0), r.std(0, unbiased=False)) for path, r in rows.items()}


def error(program, other, batches) -> float:
    want, got = (torch.cat([p.run([b])[0] for b in batches]) for p in (program, other))
    return float((want - got).norm() / want.norm())


QUANTISED = "quantize:W4A16,targets=head,group_size=8|quantize:W8A16,weights=Affine(3),ignore=head"


def _closest(found, want, place: int) -> float:
    return max(float((found[path][place] - want[path][place]).abs().max()) for path in want)


def test_means_are_those_before_quantisation(cnn):
    program, batches = cnn
    want = moments(program, batches)
    quantised, _ = after(program, batches, QUANTISED)
    corrected, result = after(program, batches, f"{QUANTISED}|correct_bias")
    assert _closest(moments(quantised, batches), want, 0) > 0.02
    assert _closest(moments(corrected, batches), want, 0) < 1e-5
    assert _closest(moments(corrected, batches), want, 1) > 0.01
    assert result.matched == ["stem", "depthwise", "head"]
    assert error(program, corrected, batches) < 0.9 * error(program, quantised, batches)


def test_deviations_too(cnn):
    program, batches = cnn
    want = moments(program, batches)
    corrected, _ = after(program, batches, f"{QUANTISED}|correct_bias:deviation=true")
    for place in (0, 1):
        assert _closest(moments(corrected, batches), want, place) < 1e-5
    for site in weight_sites(corrected):
        stored = {k: (tuple(v.shape), v.dtype) for k, v in corrected.stored_arrays(site.weight).items()}
        assert stored == corrected.encoding(site.weight).layout(site.shape)
    quantised, _ = after(program, batches, QUANTISED)
    assert error(program, corrected, batches) < 0.9 * error(program, quantised, batches)


def test_deviations_are_what_re_estimated_batch_norms_give():
    """Norms not folded, weights rounded, statistics taken anew: the same outputs."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12, momentum=None), nn.ReLU()),
        *(nn.Conv2d(12, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None)),
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    data = torch.rand(64, 3, 10, 10) + torch.tensor([0.0, 1.0, -1.0])[:, None, None]
    fresh = torch.rand(8, 3, 10, 10)
    model.train()(data)  # what a training loop would have left in the norms
    program = pc.capture(model.eval(), data)
    canonicalize(program)
    recipe = "quantize:W8A16,weights=Affine(3),fitter=rtn"
    recipes = (f"{recipe}|correct_bias:deviation=true", recipe)
    corrected, quantised = (after(program, [data], text)[0](fresh) for text in recipes)

    rounded = copy.deepcopy(model)
    for conv in (rounded[0], rounded[3]):
        encoding = Affine(3)  # a factor for each channel changes its scales and not its codes
        conv.weight.data = encoding.decode(encoding.encode(conv.weight.detach()), tuple(conv.weight.shape))
    stale = rounded(fresh)
    for norm in (rounded[1], rounded[4]):
        norm.reset_running_stats()
    rounded.train()(data)
    torch.testing.assert_close(quantised, stale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(corrected, rounded.eval()(fresh), rtol=1e-3, atol=1e-3)
    assert float((corrected - quantised).abs().max()) > 0.1


def test_one_layer_is_the_published_formula(models):
    """b + (W − Ŵ)·E[x]"""
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    batches = [torch.rand(5, 16), torch.rand(3, 16) + 1]
    program = pc.capture(model, batches[0])
    canonicalize(program)
    corrected, _ = after(program, batches, "quantize:W8A16,weights=Affine(2)|correct_bias")
    (site,) = weight_sites(corrected)
    difference = model[0].weight.detach() - corrected.weight_value(site.weight)
    want = model[0].bias.detach() + difference @ torch.cat(batches).mean(0)
    torch.testing.assert_close(corrected.get("0.bias"), want, rtol=1e-5, atol=1e-6)


def test_a_layer_without_a_bias_gets_one():
    model = nn.Sequential(nn.Linear(16, 8, bias=False)).eval()
    batches = [torch.rand(8, 16)]
    program = pc.capture(model, batches[0])
    canonicalize(program)
    corrected, _ = after(program, batches, "quantize:W8A16,weights=Affine(2)|correct_bias")
    assert corrected.get("0.bias").shape == (8,)
    assert _closest(moments(corrected, batches), moments(program, batches), 0) < 1e-6


def test_a_module_that_runs_twice_gets_two_biases():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    program = pc.capture(Twice().eval(), torch.rand(8, 8))
    canonicalize(program)
    batches = [torch.rand(8, 8)]
    corrected, _ = after(program, batches, "quantize:W8A16,weights=Affine(2)|correct_bias:deviation=true")
    values = {}
    for each in (program, corrected):
        seen: dict[str, Tensor] = {}
        Observer(each.module, seen.__setitem__).run(batches[0])
        values[each is program] = [seen[site.node.name].double().mean(0) for site in weight_sites(each)]
    torch.testing.assert_close(values[True], values[False], rtol=1e-5, atol=1e-5)
    assert len(weight_sites(corrected)) == 2
    assert len([name for name in corrected.weights() if "bias" in name]) == 2


def test_the_scale_inside_a_sparsity_pattern(cnn):
    program, batches = cnn
    pruned, _ = after(program, batches, "prune_nm:2:4,targets=head")
    corrected, _ = after(pruned, batches, "quantize:W8A16,weights=Affine(3),targets=head|correct_bias:deviation=true")
    (site,) = [s for s in weight_sites(corrected) if s.path == "head"]
    assert isinstance(corrected.encoding(site.weight), NM)
    for place in (0, 1):
        assert _closest(moments(corrected, batches), moments(pruned, batches), place) < 1e-5


def test_quantised_activations_are_corrected_too(cnn):
    program, batches = cnn
    recipe = "quantize:W8A8,weights=Affine(4)"
    corrected, _ = after(program, batches, f"{recipe}|correct_bias")
    assert _closest(moments(corrected, batches), moments(program, batches), 0) < 1e-5
    assert error(program, corrected, batches) < error(program, after(program, batches, recipe)[0], batches)


def test_moments_of_batches_are_those_of_all_rows():
    parts = [torch.randn(2, 3, 5), torch.randn(4, 3, 1) + 2]
    for dim in (1, -2):
        statistic, state = Moments("x", dim), None
        for part in parts:
            state = statistic.update(state, part)
        rows = torch.cat([p.movedim(1, -1).reshape(-1, 3) for p in parts]).double()
        want = torch.stack([rows.mean(0), rows.std(0, unbiased=False)])
        torch.testing.assert_close(statistic.finish(state), want)


def test_it_needs_a_quantised_program_and_data(models, reference, refused):
    x = torch.randn(2, 16)
    sentence = "there is nothing to compare with: no pass has quantised the model"
    refused(PassError, sentence, lambda: reference(models.Mlp(), ["correct_bias"], x, calibration=[x]))
    passes = ["quantize:W8A16", "correct_bias"]
    refused(CalibrationError, "the pass 'correct_bias' needs", lambda: reference(models.Mlp(), passes, x))
    assert CorrectBias().describe() == "correct_bias"


@pytest.mark.parametrize("scheme", ["W8A8-dynamic", "W4A16,group_size=16"])
def test_through_compile_on_onnx_runtime(models, reference, scheme):
    model, batches = models.Mlp().eval(), [torch.rand(8, 16) for _ in range(3)]
    passes = [f"quantize:{scheme}", "correct_bias:deviation=true"]
    eager = reference(model, passes, batches[0], calibration=batches)
    compiled = pc.compile(model, passes, example_inputs=batches[0], calibration=batches)
    want = torch.cat([model(b) for b in batches]).detach()
    assert float((torch.cat([eager(b) for b in batches]).mean(0) - want.mean(0)).abs().max()) < 1e-5
    torch.testing.assert_close(compiled(batches[1]), eager(batches[1]), rtol=1e-3, atol=1e-3)
