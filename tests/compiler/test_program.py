"""The IR: the call interface, weights and their encodings, and what a rewrite must leave consistent."""

from __future__ import annotations

import pytest
import torch
from paretoc.compiler.capture import capture
from paretoc.compiler.encodings import NM, Affine
from paretoc.compiler.errors import OptionError, PassError
from paretoc.compiler.program import (
    Output,
    describe,
    example_shape,
    forward_parameters,
    hint,
    module_class,
    module_path,
    source_line,
)
from paretoc.compiler.sites import weight_sites
from torch import Tensor, nn

aten = torch.ops.aten


class Call(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, extra: dict[str, Tensor], factor: float = 2.0, other: Tensor | None = None):
        return {"x": self.linear(x) * factor, "parts": (extra["a"], [x + 1])}


@pytest.fixture(scope="module")
def call_program():
    example = ((torch.randn(2, 4), {"a": torch.randn(2, 4)}), {"factor": 3.0})
    return capture(Call(), example)


@pytest.fixture
def mlp(models):
    return capture(models.Mlp(), torch.randn(2, 16))


# -- calling ---------------------------------------------------------------------------------------------


A = {"a": torch.ones(2, 4)}
X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "sentence"),
    [
        ((X,), {}, "the call does not match the captured one: missing ['extra'], extra nothing"),
        ((X, A), {"other": X}, "missing nothing, extra ['other']"),
        ((X, A), {"unknown": 1}, "missing nothing, extra ['unknown']"),
        ((X, A, 3.0, None, 5), {}, "the model takes 4 arguments (x, extra, factor, other), got 5"),
        ((X, A, 4.0), {}, "the model was captured with the constant 3.0 where this call passes 4.0"),
        ((X, [X]), {}, "the inputs have the structure"),
        ((3.0, A), {}, "input 'x' must be a tensor, got float"),
    ],
    ids=["missing", "extra", "unknown", "too many", "another constant", "another container", "no tensor"],
)
def test_a_call_that_does_not_fit_is_refused(call_program, refused, args, kwargs, sentence):
    error = refused(OptionError, sentence, lambda: call_program(*args, **kwargs))
    assert error.where == "calling the compiled model"


def test_constants_may_be_left_out_or_repeated(call_program):
    want = call_program(X, A)
    for got in (
        call_program(X, A, 3.0),
        call_program(X, A, factor=3.0, other=None),
        call_program(extra=A, x=X),
    ):
        assert torch.equal(got["x"], want["x"])


def test_the_interface_names_inputs_and_outputs(call_program):
    assert call_program.interface.parameters == ("x", "extra", "factor", "other")
    assert call_program.interface.inputs == ("x", "extra_a")
    assert call_program.interface.output_names() == ["x_out", "parts.0", "parts.1.0"]
    assert [n.name for n in call_program.placeholders] == ["x", "extra_a"]
    assert len(call_program.outputs) == 3


def test_flatten_and_unflatten_are_inverse_to_the_call(call_program):
    flat = call_program.interface.flatten((X,), {"extra": A})
    assert [t.data_ptr() for t in flat] == [X.data_ptr(), A["a"].data_ptr()]
    result = call_program.interface.unflatten([0, 1, 2])
    assert result == {"x": 0, "parts": (1, [2])}


def test_output_names_are_unique():
    class Clash(nn.Module):
        def forward(self, x: Tensor):
            return {"a": (x + 1,), "a_0": x + 2}

    names = capture(Clash(), X).interface.output_names()
    assert len(set(names)) == 2


def test_the_order_of_keys_in_a_nested_dict_does_not_matter():
    class Sum(nn.Module):
        def forward(self, batch: dict[str, Tensor]):
            return batch["a"] - batch["b"]

    program = capture(Sum(), ({"a": X, "b": X},))
    assert torch.equal(program({"b": X, "a": 2 * X}), X)


def test_output_stands_in_for_a_model_output():
    output = Output(logits=1, states=(2, 3))
    assert (output["logits"], output.logits, output[0], output[-1]) == (1, 1, 1, (2, 3))
    assert output[:1] == (1,)
    assert output.to_tuple() == (1, (2, 3))
    with pytest.raises(AttributeError, match="pooler"):
        _ = output.pooler
    with pytest.raises(KeyError):
        _ = output["pooler"]


def test_forward_parameters():
    class Model(nn.Module):
        def forward(self, x, /, y, *args, z=1, **kwargs):
            return x

    assert forward_parameters(Model()) == ("x", "y", "z")


# -- the graph -------------------------------------------------------------------------------------------


def test_a_clone_can_be_rewritten_freely(mlp):
    x = torch.randn(3, 16)
    want = mlp(x)
    copy = mlp.clone()
    copy.set("up.weight", torch.zeros(32, 16))
    site = weight_sites(copy)[1]
    copy.encode(site.weight, Affine(4), Affine(4).encode(copy.weight_value(site.weight)))
    copy.notes.append("changed")
    copy.dynamic[0].clear()
    copy.refresh()
    assert not torch.equal(copy(x), want)
    assert torch.equal(mlp(x), want)
    assert mlp.notes == []
    assert mlp.dynamic == [{0: "x_0"}]
    assert all(n.target is not torch.ops.paretoc.decode.default for n in mlp.graph.nodes)


def test_a_clone_keeps_what_is_known_about_each_node(mlp):
    for old, new in zip(mlp.graph.nodes, mlp.clone().graph.nodes, strict=True):
        assert (old.name, old.meta.get("nn_module_stack")) == (new.name, new.meta.get("nn_module_stack"))


def test_refresh_drops_what_is_not_used(mlp):
    gelu = mlp.calls(aten.gelu.default)[0]
    with mlp.graph.inserting_before(gelu):
        mlp.graph.call_function(aten.relu.default, (gelu.args[0],))
    mlp.attribute("unused.table", torch.ones(3), before=gelu)
    mlp.refresh()
    assert mlp.calls(aten.relu.default) == []
    assert "unused.table" not in mlp.weights()
    assert "unused.table" not in dict(mlp.module.named_buffers())


def test_refresh_derives_the_shapes_again(mlp):
    linear = mlp.calls(aten.linear.default)[1]
    mlp.set("down.weight", torch.zeros(5, 32))
    mlp.set("down.bias", torch.zeros(5))
    mlp.refresh()
    assert example_shape(linear) == (2, 5)
    assert not isinstance(linear.meta["val"].shape[0], int)  # the batch is still open
    assert mlp(torch.randn(7, 16)).shape == (7, 5)


def test_a_rewrite_that_breaks_the_shapes_is_named(mlp, refused):
    mlp.set("down.weight", torch.zeros(8, 31))
    error = refused(PassError, "shapes no longer fit after the rewrite", mlp.refresh)
    assert "aten.linear.default" in error.where
    assert "models.py" in error.where


def test_a_node_is_described_by_operator_module_and_source(models):
    program = capture(models.Vit(depth=1), torch.randn(2, 16, 12))
    node = program.calls(aten.gelu.default)[0]
    assert module_path(node) == "blocks.0.mlp"
    assert module_class(node) == "Mlp"
    assert "models.py:" in source_line(node)
    assert source_line(node).endswith("in forward")
    assert describe(node).startswith(f"node {node.name} (aten.gelu.default) in blocks.0.mlp from ")
    assert describe(program.output) == "node output (output)"


def test_sizes_at_the_example(mlp):
    shape = mlp.outputs[0].meta["val"].shape
    assert hint(5) == 5
    assert hint(shape[0]) == 2
    assert example_shape(mlp.outputs[0]) == (2, 8)


# -- weights ---------------------------------------------------------------------------------------------


def test_set_get_unset(mlp):
    old = mlp.get("up.weight")
    mlp.set("up.weight", torch.ones(32, 16))
    assert torch.equal(mlp.get("up.weight"), torch.ones(32, 16))
    assert not torch.equal(old, torch.ones(32, 16))
    mlp.set("new.deep.name", torch.zeros(2))
    assert torch.equal(mlp.get("new.deep.name"), torch.zeros(2))
    mlp.unset("new.deep.name")
    with pytest.raises(AttributeError):
        mlp.get("new.deep.name")


def test_weights_come_in_graph_order(mlp):
    assert list(mlp.weights()) == ["up.weight", "up.bias", "down.weight", "down.bias"]


def test_encoding_a_weight_replaces_its_storage(mlp):
    site = weight_sites(mlp)[0]
    value, encoding = mlp.weight_value(site.weight), Affine(4, 8, symmetric=False)
    arrays = encoding.encode(value)
    node = mlp.encode(site.weight, encoding, arrays)
    mlp.refresh()
    stored = [name for name in mlp.weights() if name.startswith("up.weight")]
    assert stored == ["up.weight.codes", "up.weight.scale", "up.weight.zero"]
    assert mlp.encoding(node) == encoding
    assert mlp.weight_name(node) == "up.weight"
    assert {k: v.tolist() for k, v in mlp.stored_arrays(node).items()} == {k: v.tolist() for k, v in arrays.items()}
    decoded = encoding.decode(arrays, (32, 16))
    assert torch.equal(mlp.weight_value(node), decoded)
    x = torch.randn(3, 16)
    hidden = torch.nn.functional.gelu(x @ decoded.T + mlp.get("up.bias"))
    want = hidden @ mlp.get("down.weight").T + mlp.get("down.bias")
    torch.testing.assert_close(mlp(x), want, rtol=1e-5, atol=1e-5)


def test_encoding_again_leaves_nothing_of_the_first(mlp):
    first, second = NM(2, 4), NM(2, 4, Affine(8))
    node = weight_sites(mlp)[0].weight
    node = mlp.encode(node, first, first.encode(mlp.weight_value(node)))
    pruned = mlp.weight_value(node)
    node = mlp.encode(node, second, second.encode(pruned))
    mlp.refresh()
    assert mlp.encoding(node) == second
    stored = [name for name in mlp.weights() if name.startswith("up.weight")]
    assert sorted(stored) == [f"up.weight.{k}" for k in ("indices", "values.codes", "values.scale")]
    assert sorted(n for n, _ in mlp.module.named_buffers() if n.startswith("up.weight")) == sorted(stored)
    assert torch.equal(mlp.weight_value(node) == 0, (pruned == 0) | (mlp.weight_value(node) == 0))


def test_encoding_a_tied_weight_reaches_every_consumer(models):
    program = capture(models.TiedLanguageModel(), torch.randint(0, 48, (2, 5)))
    node = weight_sites(program)[0].weight
    assert {s.kind for s in weight_sites(program) if s.weight is node} == {"embedding", "linear"}
    program.encode(node, Affine(8), Affine(8).encode(program.weight_value(node)))
    program.refresh()
    decodes = program.calls(torch.ops.paretoc.decode.default)
    assert len(decodes) == 1
    assert {u.target for u in decodes[0].users} == {aten.embedding.default, aten.linear.default}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoded_weight_keeps_the_dtype_of_the_model(models, dtype):
    model = models.Mlp().to(dtype)
    program = capture(model, torch.randn(2, 16).to(dtype))
    site = weight_sites(program)[0]
    program.encode(site.weight, Affine(8), Affine(8).encode(program.weight_value(site.weight)))
    program.refresh()
    x = torch.randn(3, 16).to(dtype)
    assert program(x).dtype == dtype
    torch.testing.assert_close(program(x), model(x), rtol=0.1, atol=0.1)  # int8 weights in a half type


def test_a_node_that_is_no_weight_has_no_value(mlp, refused):
    gelu = mlp.calls(aten.gelu.default)[0]
    assert mlp.weight_name(gelu) is None
    assert mlp.weight_name(3) is None
    assert mlp.encoding(gelu) is None
    refused(PassError, "is not a weight", lambda: mlp.weight_value(gelu))
