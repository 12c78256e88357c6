"""Several models over one file of weights: every model reads back bit by bit, and what nests is stored once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from paretoc.backends.onnxruntime.stored import WEIGHTS, write
from safetensors.numpy import load_file

DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
DTYPES |= {"bfloat16": TensorProto.BFLOAT16, "int4": TensorProto.INT4}


def model(*tensors: np.ndarray, dtype: int = TensorProto.FLOAT) -> ir.Model:
    """Gives its weights w0, w1, … back as float32."""
    names = [f"w{i}" for i in range(len(tensors))]
    nodes = [helper.make_node("Cast", [name], [f"out.{name}"], to=TensorProto.FLOAT) for name in names]
    pairs = list(zip(names, tensors, strict=True))
    outputs = [helper.make_tensor_value_info(f"out.{n}", TensorProto.FLOAT, t.shape) for n, t in pairs]
    stored = [helper.make_tensor(n, dtype, t.shape, t.flatten().tolist()) for n, t in pairs]
    graph = helper.make_graph(nodes, "model", [], outputs, stored)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def outputs(file: Path) -> list[np.ndarray]:
    return ReferenceEvaluator(onnx.load(file)).run(None, {})


def check(models: dict[str, ir.Model], directory: Path) -> int:
    """Every file says what its model says; the bytes of all tensors beside."""
    expected = {}
    for file, made in models.items():
        (directory / "alone.onnx").write_bytes(ir.to_proto(made).SerializeToString())
        expected[file] = outputs(directory / "alone.onnx")
    write(models, directory)
    for file, wanted in expected.items():
        for got, want in zip(outputs(directory / file), wanted, strict=True):
            np.testing.assert_array_equal(got, want)
    return sum(tensor.nbytes for tensor in load_file(directory / WEIGHTS).values())


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_begins_another_tensor_is_a_range_of_it(tmp_path, dtype, axis):
    whole = np.random.default_rng(axis).integers(-8, 8, (12, 24, 32)).astype(np.float32)
    models = {f"{m}.onnx": model(whole.take(range(m), axis), dtype=DTYPES[dtype]) for m in (8, 12, 10)}
    alone = check({"whole.onnx": model(whole.take(range(12), axis), dtype=DTYPES[dtype])}, tmp_path)
    assert check(models, tmp_path) == alone
    external = onnx.load(tmp_path / "8.onnx", load_external_data=False).graph.initializer[0]
    assert external.data_location == TensorProto.EXTERNAL
    turned = [node for node in onnx.load(tmp_path / "8.onnx").graph.node if node.op_type == "Transpose"]
    assert len(turned) == (axis > 0)


def test_what_does_not_nest_is_stored_beside(tmp_path):
    random = np.random.default_rng(0).standard_normal((4, 32, 32)).astype(np.float32)
    a, b, c, d = random
    altered = a[:16].copy()
    altered[3, 5] = np.nextafter(altered[3, 5], np.inf)
    cases = {
        "the same": ([a, b], [a, b], 2),
        "the same under another name": ([a, b], [b, a], 4),
        "one bit differs": ([a], [altered], 1.5),
        "cut along two axes": ([a], [a[:24, :24]], 1 + 24 * 24 / 1024),
        "the end, not the beginning": ([a], [a[8:]], 1.75),
        "another rank": ([a], [a.reshape(-1)], 2),
        "negative zero": ([np.zeros_like(c)], [-np.zeros_like(c)], 2),
    }
    for name, (first, second, tensors) in cases.items():
        size = check({"first.onnx": model(*first), "second.onnx": model(*second)}, tmp_path)
        assert size == tensors * d.nbytes, name


def test_one_tensor_cut_along_different_axes_is_stored_for_each(tmp_path):
    whole = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    models = {"whole.onnx": model(whole), "rows.onnx": model(whole[:16]), "columns.onnx": model(whole[:, :16])}
    assert check(models, tmp_path) == 1.5 * whole.nbytes


def test_small_tensors_stay_in_the_model(tmp_path):
    whole = np.arange(512, dtype=np.float32).reshape(16, 32)
    assert check({"whole.onnx": model(whole), "few.onnx": model(whole[:4])}, tmp_path) == whole.nbytes
    few = onnx.load(tmp_path / "few.onnx", load_external_data=False).graph.initializer[0]
    assert few.data_location != TensorProto.EXTERNAL


def test_the_models_themselves_stay_as_they_are(tmp_path):
    whole = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    models = {"whole.onnx": model(whole), "half.onnx": model(whole[:, :16])}
    before = [ir.to_proto(made).SerializeToString(deterministic=True) for made in models.values()]
    write(models, tmp_path)
    assert [ir.to_proto(made).SerializeToString(deterministic=True) for made in models.values()] == before
