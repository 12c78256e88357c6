"""A convolution whose windows neither overlap nor leave gaps, and whose result is read as tokens, is a linear layer
over patches. Exact up to the order of float sums; products of linear layers are what backends have fast kernels for.
"""

from __future__ import annotations

import torch
from torch import fx

from .program import Program, argument, example_shape, operands, shape_of

aten = torch.ops.aten
paretoc = torch.ops.paretoc


def linear_patches(program: Program) -> None:
    """Rewrite, in place, patch embeddings: x `[B, C, H, W]` → `[B, H/P·W/P, C·P·P]` → linear."""
    found = [
        (node, tokens) for node in program.calls(aten.conv2d.default) if (tokens := _tokens(program, node)) is not None
    ]
    for node, tokens in found:
        _rewrite(program, node, tokens)
    if found:
        program.refresh()


def _tokens(program: Program, node: fx.Node) -> fx.Node | None:
    """The `[B, T, O]` that is made of a patch embedding's result; None where the convolution is none."""
    x, weight = operands(node)[:2]
    if len(shape_of(x)) != 4:
        return None  # one image without a batch
    (_, channels, height, width), (outputs, features, *window) = shape_of(x), example_shape(weight)
    options = [argument(node, 3, "stride", 1), argument(node, 4, "padding", 0), argument(node, 5, "dilation", 1)]
    stride, padding, dilation = ([o] * 2 if isinstance(o, int) else list(o) for o in options)
    if stride != window or window == [1, 1] or any(padding) or dilation not in ([1], [1, 1]) or features != channels:
        return None
    if not isinstance(height, int) or not isinstance(width, int) or height % window[0] or width % window[1]:
        return None
    if len(weight.users) != 1 or program.weight_name(weight) is None or not _flattens(program, weight):
        return None
    joined = _only_user(node)
    tokens = _only_user(joined) if joined is not None and len(shape_of(joined)) == 3 else None
    if joined is None or tokens is None or operands(joined)[0] is not node:
        return None
    turned = tokens.target in (aten.transpose.int, aten.permute.default) and shape_of(tokens)[1:] == (
        height // window[0] * (width // window[1]),
        outputs,
    )
    moved = operands(tokens)[1:] in ((1, 2), (2, 1), (-1, -2), (-2, -1), ([0, 2, 1],))
    return tokens if turned and moved and shape_of(joined)[1] == outputs else None


def _only_user(node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and user.op == "call_function" else None


def _flattens(program: Program, weight: fx.Node) -> bool:
    """Whether the stored arrays of the weight are those of the same numbers as a matrix."""
    encoding, shape = program.encoding(weight), example_shape(weight)
    return encoding is None or encoding.layout(shape) == encoding.layout(_matrix(shape))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1] * shape[2] * shape[3]


def _of_whole_tensor(node: fx.Node) -> bool:
    """Whether it rounds every number by one range: what moves numbers may stand on either side of it."""
    dynamic = node.target is paretoc.fake_quantize_dynamic.default and operands(node)[1] == "tensor"
    return dynamic or node.target is paretoc.fake_quantize.default


def _rewrite(program: Program, node: fx.Node, tokens: fx.Node) -> None:
    graph = program.graph
    x, weight, *bias = operands(node)[:3]
    _, channels, rows, columns = example_shape(weight)
    height, width = example_shape(x)[2:]
    quantiser = x if _of_whole_tensor(x) else None
    if quantiser is not None:
        x = operands(quantiser)[0]
    with graph.inserting_before(node):
        across, down = width // columns, height // rows
        apart = graph.call_function(aten.reshape.default, (x, [-1, channels, down, rows, across, columns]))
        apart = graph.call_function(aten.permute.default, (apart, [0, 2, 4, 1, 3, 5]))
        patches = graph.call_function(aten.reshape.default, (apart, [-1, down * across, channels * rows * columns]))
        if quantiser is not None:
            rest, options = operands(quantiser)[1:], quantiser.kwargs
            patches = graph.call_function(quantiser.target, (patches, *rest), dict(options))
        linear = graph.call_function(aten.linear.default, (patches, weight, *bias))
    shape = _matrix(example_shape(weight))
    if program.encoding(weight) is None:
        program.set(str(weight.target), program.weight_value(weight).reshape(shape))
    else:
        weight.update_arg(2, list(shape))
    linear.meta.update({k: v for k, v in node.meta.items() if k != "val"})
    tokens.replace_all_uses_with(linear)
