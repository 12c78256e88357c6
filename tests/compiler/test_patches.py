"""Patch embeddings as linear layers: equal results, what stays a convolution, and a wrong order of patches is seen."""

import paretoc as pc
import pytest
import torch
from paretoc.compiler.patches import linear_patches
from paretoc.compiler.program import operands
from torch import nn

aten = torch.ops.aten


class Patches(nn.Module):
    """x `[B, 3, H, W]` → tokens `[B, T, 8]` → `[B, T, 4]`."""

    def __init__(self, size=4, stride=None, flatten=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.flat = flatten
        self.embed = nn.Conv2d(3, 8, size, stride=stride or size, **options)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.embed(x)
        tokens = y.flatten(2).transpose(1, 2) if self.flat else y.mean((2, 3))
        return self.head(tokens)


def program_of(model, passes=(), shape=(2, 3, 8, 12)):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    compiled = pc.compile(model, list(passes), example_inputs=(x,), calibration=[(x,)], target="eager", verify=False)
    return compiled.program


def rewritten(program):
    program = program.clone()
    linear_patches(program)
    return program


def differ(first, second):
    """The largest difference of what two programs make of images of a batch that neither saw, relative to it."""
    x = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    before, after = first.run([x])[0], second.run([x])[0]
    return float((before - after).abs().max() / before.abs().max())


GROUPS = {"quantize": {"weights": "Affine(bits=4, group=2)", "scheme": "W8A16"}}
#: 2:4 along the inputs of a channel, which are the inputs of the linear layer
SPARSE = {"prune_nm": {"pattern": "2:4"}}


@pytest.mark.parametrize("passes", [(), ("quantize:W8A8",), ("quantize:W8A8-dynamic",), (GROUPS,), (SPARSE,)], ids=str)
@pytest.mark.parametrize("size", [4, (2, 4)])
def test_the_tokens_are_the_same(passes, size):
    program = program_of(Patches(size), passes)
    after = rewritten(program)
    assert not after.calls(aten.conv2d.default)
    assert len(after.calls(aten.linear.default)) == 2
    assert differ(program, after) < 1e-5  # float32 sums in another order
    assert [str(program.encoding(n)) for n in weights(program)] == [str(after.encoding(n)) for n in weights(after)]


def weights(program):
    return [operands(n)[1] for n in program.calls(aten.conv2d.default, aten.linear.default)]


def test_without_a_bias():
    program = program_of(Patches(bias=False))
    assert differ(program, rewritten(program)) < 1e-5


def test_a_wrong_order_of_patches_is_seen():
    program = program_of(Patches())
    wrong = rewritten(program)
    turned = next(n for n in wrong.calls(aten.permute.default) if len(operands(n)[1]) == 6)
    turned.update_arg(1, [0, 2, 4, 1, 5, 3])
    wrong.refresh()
    assert differ(program, wrong) > 0.1


def test_other_programs_keep_their_weight():
    program = program_of(Patches())
    rewritten(program)
    assert program.get("embed.weight").shape == (8, 3, 4, 4)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Patches(4, stride=2), (2, 3, 8, 12)),
        (Patches(4, padding=2), (2, 3, 8, 12)),
        (Patches(2, dilation=2, stride=2), (2, 3, 8, 12)),
        (Patches(1), (2, 3, 8, 12)),
        (Patches(4), (2, 3, 9, 12)),  # the convolution leaves the last row out
        (Patches(4, flatten=False), (2, 3, 8, 12)),
    ],
    ids=["overlapping", "padded", "dilated", "pointwise", "not divisible", "not read as tokens"],
)
def test_what_stays_a_convolution(model, shape):
    program = program_of(model, shape=shape)
    assert len(rewritten(program).calls(aten.conv2d.default)) == 1


def test_a_grouped_convolution_stays():
    model = Patches()
    model.embed = nn.Conv2d(3, 9, 4, stride=4, groups=3)
    model.head = nn.Linear(9, 4)
    assert len(rewritten(program_of(model)).calls(aten.conv2d.default)) == 1


def test_an_image_without_a_batch_stays():
    class Single(Patches):
        def forward(self, x):
            return self.head(self.embed(x[0]).flatten(1).T)

    assert len(rewritten(program_of(Single())).calls(aten.conv2d.default)) == 1


def test_ranges_of_single_rows_stay_in_front():
    """One row of an image is no row of a patch."""
    program = program_of(Patches(), ["quantize:W8A8-dynamic"])
    quantiser = operands(program.calls(aten.conv2d.default)[0])[0]
    quantiser.update_arg(1, "token")
    program.refresh()
    assert differ(program, rewritten(program)) < 1e-5


def test_tokens_that_something_else_reads_too():
    class Twice(Patches):
        def forward(self, x):
            y = self.embed(x)
            return self.head(y.flatten(2).transpose(1, 2)), y

    assert len(rewritten(program_of(Twice())).calls(aten.conv2d.default)) == 1


@pytest.mark.parametrize("target", ["onnxruntime", "onnx"])
def test_onnx_runtime_multiplies_patches(target):
    x = torch.randn(2, 3, 8, 12)
    compiled = pc.compile(Patches(), ["quantize:W8A8"], example_inputs=(x,), calibration=[(x,)], target=target)
    kernels = {row.site: row.kernel for row in compiled.explain().rows}
    assert "MatMulInteger" in kernels["embed"]
    eager = pc.compile(Patches(), ["quantize:W8A8"], example_inputs=(x,), calibration=[(x,)], target="eager")
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
