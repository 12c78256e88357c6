"""What rewrite rules are made of, and what they ask of values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleClassBase


@dataclass(frozen=True)
class Target:
    """What rules may count on: com.microsoft operators; `few`, the linear layers that multiply few rows; whether codes
    about zero multiply faster when they are `signed`."""

    contrib: bool = False
    few: Collection[str] = ()
    signed: bool = False


STANDARD = Target()


class Rule(RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript ships no types
    """A pattern, what must hold for it, and what takes its place."""

    #: whether it writes com.microsoft operators
    contrib = False

    def __init__(self, target: Target = STANDARD) -> None:
        super().__init__(remove_nodes=False)  # values may be read elsewhere too; dead nodes are removed later
        self.target = target


def stored(op: Any, name: str, value: np.ndarray[Any, Any]) -> ir.Value:
    """An initializer: what a quantiser reads has to be one for ONNX Runtime to look into it."""
    made: ir.Value = op.initializer(ir.tensor(value, name=name))
    return made


def shape_of(value: ir.Value) -> list[int | str | None] | None:
    return None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]


def not_split(name: str, whole: ir.Value, split: ir.Value) -> str:
    """Why a reshape is not [B, T, H·D] → [B, T, H, D], or ""."""
    before, after = shape_of(whole), shape_of(split)
    if before is None or after is None or len(before) != 3 or len(after) != 4 or before[:2] != after[:2]:
        return f"{name} is not [B, T, H·D] split to [B, T, H, D]"
    return "" if isinstance(after[2], int) and isinstance(after[3], int) else f"{name} has no fixed number of heads"


def text_of(node: ir.Node, name: str) -> str:
    return node.attributes[name].as_string() if name in node.attributes else ""


def rank_of(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def opset_of(value: ir.Value) -> int:
    node = value.producer()
    graph = node.graph if node is not None else None
    return 0 if graph is None else graph.opset_imports.get("", 0)


def numbers_of(value: ir.Value) -> list[float] | None:
    """The elements of a small constant."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy().reshape(-1).tolist() if tensor is not None and tensor.size <= 8 else None


def number_of(value: ir.Value) -> float | None:
    found = numbers_of(value)
    return found[0] if found is not None and len(found) == 1 else None


def axes_of(unsqueezed: ir.Value) -> list[float] | None:
    node = unsqueezed.producer()
    return numbers_of(node.inputs[1]) if node is not None and node.inputs[1] is not None else None


def part_of(sliced: ir.Value) -> tuple[int, int, int]:
    """(axis counted from the front, start, end) of a Slice along one axis, or (−1, 0, 0)."""
    node = sliced.producer()
    assert node is not None
    given = [None if v is None else number_of(v) for v in node.inputs[1:]]
    if len(given) < 3 or any(g is None for g in given) or (len(given) > 3 and given[3] != 1):
        return -1, 0, 0
    start, end, axis = (int(g) for g in given[:3])  # type: ignore[arg-type]
    return axis % rank_of(node.inputs[0]), start, end


def sizes_of(x: ir.Value) -> list[int | str]:
    """The size of each axis where it is fixed, else a name of its own."""
    return [d if isinstance(d, int) else f"axis {axis}" for axis, d in enumerate(shape_of(x) or [])]


def asked_of(shape: ir.Value | None, x: ir.Value) -> list[int | str | None]:
    """The elements of a shape in the words of `sizes_of(x)`, where they are constant or taken from the shape of x."""
    node = shape.producer() if shape is not None else None
    fixed = numbers_of(shape) if shape is not None else None
    if fixed is not None:
        return [int(number) for number in fixed]
    if node is not None and node.op_type == "Concat":
        return [size for part in node.inputs for size in asked_of(part, x)]
    if node is not None and node.op_type == "Slice" and len(node.inputs) < 5:
        whole = node.inputs[0].producer() if node.inputs[0] is not None else None
        start, end = (number_of(v) if v is not None else None for v in node.inputs[1:3])
        if whole is not None and whole.op_type == "Shape" and whole.inputs[0] is x and start is not None:
            entire = whole.attributes.get_int("start", 0) == 0 and "end" not in whole.attributes
            return list(sizes_of(x)[int(start) : int(end)]) if entire and end is not None else [None]
    return [None]
