"""Model merging against NumPy, from every kind of source, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import paretoc as pc
import pytest
import torch
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.sites import BATCH_NORM
from paretoc.passes import MergeModels
from safetensors.torch import save_file
from torch import nn

X = torch.randn(4, 16)


@pytest.fixture
def family(models):
    """A base and two models fine-tuned from it (random steps)."""
    base = models.Mlp()
    return base, *[_moved(base, step) for step in (0.1, 0.3)]


def _moved(model: nn.Module, step: float) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += step * torch.randn_like(parameter)
    return twin


def _numpy(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy().astype(np.float64) for name, tensor in model.state_dict().items()}


def _stored(compiled) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in compiled.program.weights().items()}


def _equal(compiled, want: dict[str, np.ndarray]) -> None:
    """The stored weights are the wanted ones up to one rounding of float32 sums."""
    stored = _stored(compiled)
    assert stored.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(stored[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def test_equal_rejects_other_weights(family, reference):
    compiled = reference(family[0], [], X)
    _equal(compiled, _numpy(family[0]))
    with pytest.raises(AssertionError):
        _equal(compiled, _numpy(family[1]))


# -- linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(), (1, 1, 1), (0.5, 0.3, 0.2), (2, 0, 6), (1, 2, -1)], ids=str)
def test_linear(family, reference, weights):
    base, a, b = family
    compiled = reference(base, [MergeModels(models=(a, b), weights=weights)], X)
    w = np.array(weights or (1, 1, 1), dtype=np.float64)
    states = [_numpy(m) for m in family]
    want = {n: sum(wi * s[n] for wi, s in zip(w, states, strict=True)) / w.sum() for n in states[0]}
    _equal(compiled, want)


def test_all_the_weight_on_one_model_is_that_model(family, reference):
    base, a, _ = family
    compiled = reference(base, [MergeModels(models=(a,), weights=(0, 1))], X)
    torch.testing.assert_close(compiled(X), a(X), rtol=1e-5, atol=1e-6)


def test_the_average_of_a_model_with_itself_is_the_model(family, reference):
    base = family[0]
    compiled = reference(base, [MergeModels(models=(base, copy.deepcopy(base)))], X)
    torch.testing.assert_close(compiled(X), base(X), rtol=1e-5, atol=1e-6)
    metrics = compiled.report(latency=False).passes[0]["metrics"]
    assert metrics["lowest cosine between a tensor and its counterpart"] == pytest.approx(1)


# -- task arithmetic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "scale"), [((), 1.0), ((), 0.4), ((0.7, 0.2), 0.5), ((1, -1), 1.0)], ids=str)
def test_task_arithmetic(family, reference, weights, scale):
    base, a, b = family
    step = MergeModels(method="task_arithmetic", models=(a, b), weights=weights, scale=scale)
    compiled = reference(base, [step], X)
    w = weights or (1, 1)
    theta, left, right = (_numpy(m) for m in family)
    want = {n: t + scale * (w[0] * (left[n] - t) + w[1] * (right[n] - t)) for n, t in theta.items()}
    _equal(compiled, want)


def test_no_step_is_the_base(family, reference):
    base, a, _ = family
    compiled = reference(base, [MergeModels(method="task_arithmetic", models=(a,), scale=0)], X)
    torch.testing.assert_close(compiled(X), base(X), rtol=0, atol=0)


# -- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["module", "state dict", "path", "text"])
def test_every_source(family, reference, tmp_path, source):
    base, a, _ = family
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    donor = {
        "module": a,
        "state dict": a.state_dict(),
        "path": tmp_path / "a.safetensors",
        "text": str(tmp_path / "a.safetensors"),
    }[source]
    compiled = reference(base, [{"merge_models": {"models": [donor], "weights": [0, 1]}}], X)
    _equal(compiled, _numpy(a))


def test_a_path_in_the_text_form(family, reference, tmp_path):
    base, a, _ = family
    file = tmp_path / "a.safetensors"
    save_file(a.state_dict(), file)
    _equal(reference(base, [f"merge_models:task_arithmetic,models=[{file}]"], X), _numpy(a))


def test_a_path_as_text_in_an_object(family, reference, tmp_path):
    base, a, _ = family
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    _equal(reference(base, [MergeModels(models=(str(tmp_path / "a.safetensors"),), weights=(0, 1))], X), _numpy(a))


def test_a_hugging_face_model(captured, models, reference):
    base, _ = captured("BertForSequenceClassification", num_hidden_layers=1)
    other = _moved(base, 0.05)
    twin = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, moved in zip(twin.parameters(), other.parameters(), strict=True):
            parameter.copy_((parameter + moved) / 2)
    compiled = reference(base, [MergeModels(models=(other,))], models.sentences(2, 7))
    call = models.sentences(3, 5)
    torch.testing.assert_close(compiled(**call).logits, twin(**call).logits, rtol=1e-4, atol=1e-5)


def test_the_donors_are_left_alone(family, reference):
    before = [copy.deepcopy(m.state_dict()) for m in family]
    reference(family[0], [MergeModels(models=family[1:])], X)
    for model, state in zip(family, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


# -- tied weights ----------------------------------------------------------------------------------------

IDS = torch.randint(0, 48, (2, 5))
TIED = ["embedding.weight", "lm_head.weight"]


def _shifted(model: nn.Module, step: float, *without: str) -> dict[str, torch.Tensor]:
    """A state dict with `step` added to every weight, and as a safetensors file has it: some names left out."""
    return {name: tensor + step for name, tensor in model.state_dict().items() if name not in without}


@pytest.mark.parametrize("name", TIED)
def test_a_donor_may_hold_a_tied_weight_under_one_name(models, reference, name):
    base = models.TiedLanguageModel()
    compiled = reference(base, [MergeModels(models=(_shifted(base, 1, name),), weights=(0, 1))], IDS)
    assert len(compiled.program.weights()) == 3
    assert all(torch.equal(t, base.state_dict()[n] + 1) for n, t in compiled.program.weights().items())


@pytest.mark.parametrize("kept", TIED)
def test_the_program_may_hold_a_tied_weight_under_either_name(models, reference, tmp_path, kept):
    base = models.TiedLanguageModel()
    if kept == "embedding.weight":  # the program keeps the name of the module that was made last
        base.embedding = base._modules.pop("embedding")
    donors = [_shifted(base, step, name) for step, name in zip((3, 6), TIED, strict=True)]
    save_file(donors[1], tmp_path / "b.safetensors")
    compiled = reference(base, [MergeModels(models=(donors[0], tmp_path / "b.safetensors"))], IDS)
    assert set(compiled.program.weights()) & set(TIED) == {kept}
    _equal(compiled, {n: t + 3 for n, t in _numpy(base).items() if n in compiled.program.weights()})


def test_weights_that_share_memory_only_are_tied(models, reference):
    base = models.TiedLanguageModel()
    base.lm_head.weight = nn.Parameter(base.embedding.weight.data)  # the program keeps both names
    compiled = reference(base, [MergeModels(models=(_shifted(base, 1, "lm_head.weight"),), weights=(0, 1))], IDS)
    assert set(TIED) < set(compiled.program.weights())
    _equal(compiled, {n: t + 1 for n, t in _numpy(base).items()})


def test_the_ties_of_a_saved_export_are_known(models, reference, tmp_path):
    base = models.TiedLanguageModel()
    torch.export.save(torch.export.export(base, (IDS,)), tmp_path / "base.pt2")
    exported = torch.export.load(tmp_path / "base.pt2")
    compiled = reference(exported, [MergeModels(models=(_shifted(base, 1, "lm_head.weight"),), weights=(0, 1))], IDS)
    _equal(compiled, {n: t + 1 for n, t in _numpy(base).items() if n in compiled.program.weights()})


def test_equal_weights_that_are_not_tied_are_two(models, reference, refused):
    base = models.TiedLanguageModel()
    base.lm_head.weight = nn.Parameter(base.embedding.weight.detach().clone())
    step = MergeModels(models=(_shifted(base, 1, "lm_head.weight"),))
    refused(PassError, "it lacks 'lm_head.weight'", lambda: reference(base, [step], IDS))


def test_a_donor_without_the_tied_weight_is_refused(models, reference, refused):
    base = models.TiedLanguageModel()
    step = MergeModels(models=(_shifted(base, 1, *TIED),))
    refused(PassError, "it lacks 'lm_head.weight'", lambda: reference(base, [step], IDS))


def test_an_untied_donor_is_refused(models, reference, refused):
    base = models.TiedLanguageModel()
    untied = copy.deepcopy(base)
    untied.lm_head.weight = nn.Parameter(base.lm_head.weight.detach() + 1)
    sentence = "'embedding.weight' and 'lm_head.weight' of models[1] differ, and are one tied weight here"
    error = refused(PassError, sentence, lambda: reference(base, [MergeModels(models=(base, untied))], IDS))
    assert error.where == "pass 'merge_models'"
    assert error.fix == "tie them in that model too, or untie them in this one before you compile it"


def test_a_broken_tied_weight_is_called_broken(models, reference, refused):
    base = models.TiedLanguageModel()
    step = MergeModels(models=(_shifted(base, float("nan")),))  # NaN differs from NaN, but that is not what is wrong
    refused(PassError, "holds NaN or infinite values", lambda: reference(base, [step], IDS))


def test_tied_weights_stay_tied(models, reference):
    base = models.TiedLanguageModel()
    other = _moved(base, 0.2)
    compiled = reference(base, [MergeModels(models=(other,))], IDS)
    assert len(compiled.program.weights()) == 3
    twin = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, moved in zip(twin.parameters(), other.parameters(), strict=True):
            parameter.copy_((parameter + moved) / 2)
    torch.testing.assert_close(compiled(IDS), twin(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_merged_in_float32(models, reference, dtype):
    base, other = (models.Mlp().to(dtype) for _ in range(2))
    compiled = reference(base, [MergeModels(models=(other,), weights=(1, 2))], X.to(dtype))
    for name, tensor in compiled.program.weights().items():
        own, theirs = base.state_dict()[name].float(), other.state_dict()[name].float()
        assert tensor.dtype == dtype
        assert torch.equal(tensor, ((own + 2 * theirs) / 3).to(dtype))


# -- batch norms -----------------------------------------------------------------------------------------


def test_statistics_are_merged_and_folded_afterwards(models, reference):
    base, other = models.Cnn().eval(), models.Cnn().eval()
    other.stem_norm.num_batches_tracked += 5
    compiled = reference(base, [MergeModels(models=(other,), weights=(1, 3))], torch.randn(2, 4, 8, 8))
    twin = copy.deepcopy(base)
    state = {n: (t + 3 * other.state_dict()[n]) / 4 for n, t in base.state_dict().items() if t.is_floating_point()}
    twin.load_state_dict(state, strict=False)
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-5)
    assert compiled.program.calls(*BATCH_NORM) == []
    names = [entry["name"] for entry in compiled.report(latency=False).passes]
    assert names == ["merge_models", "canonicalize"]  # the fold comes after
    assert "stem_norm.running_var" in compiled.report(latency=False).passes[0]["matched"]


def test_merging_and_quantising(family, reference):
    base, a, _ = family
    compiled = reference(base, [MergeModels(models=(a,)), "quantize:W8A16"], X)
    merged = reference(base, [MergeModels(models=(a,))], X)
    torch.testing.assert_close(compiled(X), merged(X), rtol=0.05, atol=0.05)


# -- what is refused -------------------------------------------------------------------------------------


def test_other_architectures_are_refused(models, reference, refused):
    small = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    deep = nn.Sequential(*small, nn.Linear(16, 16))
    wide = nn.Sequential(nn.Linear(16, 32))
    more = "models[0] is of another architecture: it has '2.bias', which this model has not"
    error = refused(PassError, more, lambda: reference(small, [MergeModels(models=(deep,))], X))
    assert error.where == "pass 'merge_models' (0 missing, 2 extra, 0 of other shape)"
    fewer = "models[0] is of another architecture: it lacks '2.bias'"
    refused(PassError, fewer, lambda: reference(deep, [MergeModels(models=(small,))], X))
    width = "models[1] is of another architecture: '0.weight' has shape [32, 16], here [16, 16]"
    refused(PassError, width, lambda: reference(small, [MergeModels(models=(small, wide))], X))
    refused(PassError, "it lacks '0.bias'", lambda: reference(small, [MergeModels(models=({},))], X))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(family, reference, refused, value):
    base, a, _ = family
    a.down.bias.data[0] = value
    sentence = "'down.bias' of models[0] holds NaN or infinite values"
    refused(PassError, sentence, lambda: reference(base, [MergeModels(models=(a,))], X))


def test_unreadable_sources_are_refused(family, reference, refused, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken!!")
    for name in ("none.safetensors", "broken.safetensors", "."):
        step = MergeModels(models=(str(tmp_path / name),))
        refused(OptionError, "cannot be read", lambda step=step: reference(family[0], [step], X))
    refused(OptionError, "models[0] is a int", lambda: reference(family[0], [MergeModels(models=(3,))], X))


def test_merging_after_another_pass_is_refused(family, reference, refused):
    passes = ["quantize:W8A16", MergeModels(models=family[1:])]
    refused(pc.ScheduleError, "COMBINE comes before QUANTIZE", lambda: reference(family[0], passes, X))
