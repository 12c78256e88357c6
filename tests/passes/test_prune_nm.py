"""n:m pruning: what is zero afterwards, what is left alone and why, and that the numbers are those of the mask."""

from __future__ import annotations

import copy

import pytest
import torch
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.sites import weight_sites
from torch import Tensor, nn

X = torch.randn(4, 16)


def _nonzeros(weight: Tensor, m: int) -> int:
    """The most non-zeros in any group of m along the input axis."""
    groups = weight.movedim(1, -1).reshape(-1, weight.shape[1] // m, m)
    return int((groups != 0).sum(-1).max())


def _weights(program) -> dict[str, Tensor]:
    return {program.weight_name(s.weight): program.weight_value(s.weight) for s in weight_sites(program)}


def _masked(model: nn.Module, n: int, m: int, names: list[str]) -> nn.Module:
    """The same model with all but the n largest of every m input weights set to zero, by argsort."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if name in names:
            last = parameter.detach().movedim(1, -1)
            groups = last.reshape(-1, m)
            smallest = groups.abs().argsort(dim=-1, stable=True)[:, : m - n]
            pruned = groups.scatter(1, smallest, 0.0).reshape(last.shape).movedim(-1, 1)
            parameter.data.copy_(pruned)
    return twin


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (8, 16)])
def test_a_pruned_model_equals_a_masked_one(models, reference, n, m):
    model = models.Mlp()
    compiled = reference(model, [f"prune_nm:{n}:{m}"], X)
    twin = _masked(model, n, m, ["up.weight", "down.weight"])
    torch.testing.assert_close(compiled(X), twin(X), rtol=1e-5, atol=1e-6)
    for name, weight in _weights(compiled.program).items():
        assert _nonzeros(weight, m) == n, name
        assert torch.equal(weight, twin.get_parameter(name))


def test_the_count_rejects_a_dense_weight():
    assert _nonzeros(torch.ones(2, 8), 4) == 4
    assert _nonzeros(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3]]), 4) == 2
    across = torch.zeros(1, 4, 1, 2)
    across[0, :2] = 1  # two of four input channels at every position
    assert _nonzeros(across, 4) == 2


def test_convolutions_are_pruned_along_their_input_channels(models, reference):
    model = models.Cnn().eval()
    compiled = reference(model, ["prune_nm:2:4"], torch.randn(2, 4, 8, 8))
    weights = _weights(compiled.program)
    assert _nonzeros(weights["stem.weight"], 4) == 2
    assert weights["stem.weight"].shape == (8, 4, 3, 3)
    assert _nonzeros(weights["head.weight"], 4) == 2
    (entry,) = [e for e in compiled.report(latency=False).passes if e["name"] == "prune_nm"]
    assert entry["matched"] == ["stem", "head"]
    assert entry["skipped"] == {"depthwise": "grouped convolution"}


def test_sites_that_do_not_divide_and_grouped_convolutions_are_listed(reference):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(8, 8, 1, groups=2)
            self.odd = nn.Linear(6, 8)
            self.even = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.grouped(x).mean((2, 3)) + self.even(self.odd(y))

    compiled = reference(Grouped(), ["prune_nm:2:4"], (torch.randn(2, 8, 3, 3), torch.randn(2, 6)))
    entry = compiled.report(latency=False).passes[-1]
    assert entry["matched"] == ["even"]
    assert entry["skipped"] == {
        "grouped": "grouped convolution",
        "odd": "2:4 needs an input width divisible by 4, this one is 6",
    }


def test_targets_choose(models, reference):
    compiled = reference(models.Mlp(), ["prune_nm:2:4,targets=down"], X)
    weights = _weights(compiled.program)
    assert _nonzeros(weights["down.weight"], 4) == 2
    assert _nonzeros(weights["up.weight"], 4) == 4


def test_a_tied_embedding_is_left_alone(models, reference):
    compiled = reference(models.TiedLanguageModel(), ["prune_nm:2:4"], torch.randint(0, 48, (2, 5)))
    entry = compiled.report(latency=False).passes[-1]
    assert entry["matched"] == ["middle"]
    assert list(entry["skipped"].values()) == ["its weight is also read by aten.embedding.default"]


def test_a_weight_that_two_linears_share_is_pruned_once(reference):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = Shared()
    compiled = reference(model, ["prune_nm:2:4"], torch.randn(2, 8))
    assert compiled.report(latency=False).passes[-1]["matched"] == ["b", "b"]
    assert len(compiled.program.calls(torch.ops.paretoc.decode.default)) == 1
    twin = _masked(model, 2, 4, ["a.weight"])
    x = torch.randn(3, 8)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-6)


def test_pruning_twice(models, reference, refused):
    compiled = reference(models.Mlp(), ["prune_nm:4:8,targets=up", "prune_nm:2:4,targets=down"], X)
    weights = _weights(compiled.program)
    assert (_nonzeros(weights["up.weight"], 8), _nonzeros(weights["down.weight"], 4)) == (4, 2)
    sentence = "no weight can be encoded: up: already stored as NM(n=2, m=4)"
    refused(PassError, sentence, lambda: reference(models.Mlp(), ["prune_nm", "prune_nm"], X))


def test_nothing_to_prune_is_an_error(models, reference, refused):
    sentence = "no weight can be encoded: up: 3:5 needs an input width divisible by 5, this one is 16"
    error = refused(PassError, sentence, lambda: reference(models.Mlp(), ["prune_nm:3:5"], X))
    assert error.fix == "widen targets=, or use another encoding"


def test_a_pattern_without_a_match_is_an_error(models, reference, refused):
    sentence = "the pattern 'upp' matches none of the 2 linear/conv sites"
    error = refused(OptionError, sentence, lambda: reference(models.Mlp(), ["prune_nm:2:4,targets=upp"], X))
    assert error.fix == "did you mean up?"


# -- pruned, then quantised ------------------------------------------------------------------------------

SCHEMES = ["W8A8-dynamic", "W8A16", "W4A16,group_size=8", "W4A16,group_size=8,symmetric=false,fitter=rtn"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_pattern_survives_quantisation(models, reference, scheme):
    model = models.Mlp()
    compiled = reference(model, ["prune_nm:2:4", f"quantize:{scheme}"], X)
    pruned = _masked(model, 2, 4, ["up.weight", "down.weight"])
    for name, weight in _weights(compiled.program).items():
        assert _nonzeros(weight, 4) <= 2, name
        dense = pruned.get_parameter(name)
        assert (weight[dense == 0] == 0).all(), "a pruned weight came back"
        torch.testing.assert_close(weight, dense.detach(), rtol=0.5, atol=0.1)  # four bits
    for site in weight_sites(compiled.program):
        encoding = compiled.program.encoding(site.weight)
        assert isinstance(encoding, NM)
        assert isinstance(encoding.values, Affine)
        stored = compiled.program.stored_arrays(site.weight)
        assert sum(t.numel() * t.itemsize for t in stored.values()) == encoding.nbytes(site.shape)


def test_a_pruned_convolution_survives_quantisation(models, reference):
    compiled = reference(models.Cnn().eval(), ["prune_nm:2:4", "quantize:W8A16"], torch.randn(2, 4, 8, 8))
    weights = _weights(compiled.program)
    assert _nonzeros(weights["stem.weight"], 4) == 2
    assert isinstance(compiled.program.encoding(weight_sites(compiled.program)[0].weight), NM)
