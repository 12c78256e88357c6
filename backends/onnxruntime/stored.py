"""ONNX models in one directory over one file of weights, each tensor once.

A tensor that is the beginning of another along one axis, as the weights of a narrower model are, is a range of that
one's bytes. Only along the outermost axis is the beginning of a tensor a range: for any other one the file holds the
tensor with that axis outermost, and a Transpose in each graph, which ONNX Runtime folds when a session starts, turns
it back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

WEIGHTS = "weights.safetensors"
#: tensors smaller than this stay inside the model's own file
EXTERNAL_BYTES = 1024
#: dtypes that safetensors knows, and what it calls them
_SAFE = {"float64": "F64", "float32": "F32", "float16": "F16", "bool": "BOOL", "uint8": "U8"}
_SAFE |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}


@dataclass
class _Stored:
    """A tensor in the file, `axis` outermost; None while every model holds the whole of it."""

    name: str
    tensor: ir.TensorProtocol
    axis: int | None = None

    def holds(self, part: ir.TensorProtocol) -> bool:
        """Whether `part` is this tensor or its beginning along the axis, bit by bit; the first part sets the axis."""
        whole, shape = self.tensor.numpy(), tuple(part.shape)
        if part.dtype != self.tensor.dtype or len(shape) != whole.ndim:
            return False
        cut = [axis for axis, (m, n) in enumerate(zip(shape, whole.shape, strict=True)) if m != n]
        if len(cut) > 1 or (cut and self.axis not in (None, cut[0])):
            return False
        if whole[tuple(slice(m) for m in shape)].tobytes() != part.numpy().tobytes():
            return False
        self.axis = cut[0] if cut else self.axis
        return True

    def turned(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """A tensor as the file holds it."""
        if not self.axis:
            return tensor
        return ir.Tensor(np.ascontiguousarray(np.moveaxis(tensor.numpy(), self.axis, 0)), dtype=tensor.dtype)

    def range(self, part: ir.TensorProtocol, begin: int, directory: Path) -> ir.ExternalTensor:
        """The bytes of a part; the whole begins at `begin`."""
        shape = list(part.shape)
        if self.axis:
            shape.insert(0, shape.pop(self.axis))
        return ir.ExternalTensor(
            WEIGHTS, begin, part.nbytes, part.dtype, shape=ir.Shape(shape), name=self.name, base_dir=directory
        )


def write(models: Mapping[str, ir.Model], directory: Path) -> None:
    """File name → model, and the weights of them all beside."""
    models = {file: model.clone() for file, model in models.items()}
    large = [v for model in models.values() for v in model.graph.initializers.values() if nbytes(v) >= EXTERNAL_BYTES]
    placed = _place(large)
    stored = {held.name: held for held in placed.values()}
    assert len(stored) == len({id(held) for held in placed.values()}), "two tensors under one name"
    begins = _save(stored.values(), directory / WEIGHTS)
    for value, held in placed.items():
        assert value.const_value is not None
        value.const_value = held.range(value.const_value, begins[held.name], directory)
        if held.axis:
            _turn_back(value, held.axis)
    for file, model in models.items():
        (directory / file).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        onnx.checker.check_model(str(directory / file), full_check=False)


def _place(values: list[ir.Value]) -> dict[ir.Value, _Stored]:
    """Each initializer → the stored tensor that holds it. Those of one name are compared, the largest first."""
    placed: dict[ir.Value, _Stored] = {}
    named: dict[str, list[_Stored]] = {}
    for value in sorted(values, key=nbytes, reverse=True):
        assert value.name is not None and value.const_value is not None
        held = named.setdefault(value.name, [])
        home = next((stored for stored in held if stored.holds(value.const_value)), None)
        if home is None:
            home = _Stored(f"{value.name}#{len(held)}" if held else value.name, value.const_value)
            held.append(home)
        placed[value] = home
    return placed


def _turn_back(value: ir.Value, axis: int) -> None:
    """The initializer has `axis` outermost: whatever read it reads a Transpose of it."""
    assert value.graph is not None and value.const_value is not None
    order = list(range(len(value.const_value.shape)))
    node = ir.node("Transpose", [value], {"perm": [*order[1 : axis + 1], 0, *order[axis + 1 :]]})
    turned = node.outputs[0]
    turned.name, turned.shape, turned.type = f"{value.name}.turned", value.shape, value.type
    value.shape = value.const_value.shape
    ir.convenience.replace_all_uses_with(value, turned)
    node.replace_input_with(0, value)
    value.graph.insert_before(value.graph[0], node)


def nbytes(value: ir.Value) -> int:
    return int(value.const_value.nbytes) if value.const_value is not None else 0


def _raw(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    """A tensor's bytes in a dtype and shape that safetensors knows; ONNX reads the bytes, packed or not."""
    array = tensor.numpy()
    if array.dtype.name in _SAFE:
        return np.ascontiguousarray(array)
    return np.frombuffer(tensor.tobytes(), dtype=np.uint8)


def _save(stored: Iterable[_Stored], file: Path) -> dict[str, int]:
    """Write a safetensors file, one tensor after the other: the library would copy them all first. Returns where each
    begins."""
    ordered = sorted(stored, key=lambda held: (-_raw(held.tensor).itemsize, held.name))  # aligned
    header, end = {}, 0
    for held in ordered:
        array = _raw(held.turned(held.tensor))
        begin, end = end, end + array.nbytes
        header[held.name] = {"dtype": _SAFE[array.dtype.name], "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for held in ordered:
            _raw(held.turned(held.tensor)).tofile(stream)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}
