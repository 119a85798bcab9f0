"""ONNX graphs as torch modules: each operator against ONNX's own reference evaluator, whole graphs against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sage_edge.bundle import GRAPH_NAMES, load_bundle
from sage_edge.errors import InputError

torch = pytest.importorskip("torch")
from sage_edge.engines.torch_graph import OPERATORS, OnnxModule  # noqa: E402  (needs torch)
from sage_edge.export.graph import ALLOWED_OPS  # noqa: E402

FLOAT, HALF, INT32, INT64, BOOL = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL
)  # fmt: skip
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
POSITIVE = np.abs(X) + 0.1
IMAGE = RNG.standard_normal((2, 8, 4, 6)).astype(np.float32)
FILTERS = 0.1 * RNG.standard_normal((4, 8, 3, 3)).astype(np.float32)
TURNED = 0.1 * RNG.standard_normal((8, 4, 2, 2)).astype(np.float32)
BIAS = np.arange(4, dtype=np.float32)
WHOLE = np.array([[-7, 7, 5], [2, -2, 9]], np.int32)


def ints(*numbers: int) -> Any:
    return np.array(numbers, np.int64)


def run(
    path: Path, op: str, inputs: list[Any], constants: list[Any], attributes: dict[str, Any], outputs: int = 1
) -> None:
    """One node: `inputs` are fed, `constants` follow them as initializers (None: an optional input left out)."""
    names = [f"x{i}" for i in range(len(inputs))]
    given = [None if c is None else f"c{i}" for i, c in enumerate(constants)]
    arrays = [numpy_helper.from_array(np.asarray(c), f"c{i}") for i, c in enumerate(constants) if c is not None]
    out = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names + [name or "" for name in given], out, **attributes)
    shapes = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for n, a in zip(names, inputs, strict=True)]  # fmt: skip
    results = [helper.make_empty_tensor_value_info(name) for name in out]
    graph = helper.make_graph([node], "g", shapes, results, arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    wanted = ReferenceEvaluator(model).run(None, dict(zip(names, inputs, strict=True)))
    for value, array in zip(graph.output, wanted, strict=True):
        value.CopyFrom(
            helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
    module = OnnxModule(path)
    got = module(*(torch.from_numpy(a) for a in inputs))
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert tuple(ours.shape) == theirs.shape
        if theirs.dtype == ml_dtypes.float8_e4m3fn:
            np.testing.assert_array_equal(ours.view(torch.uint8).numpy(), theirs.view(np.uint8))
        else:
            assert ours.numpy().dtype == theirs.dtype
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-6, atol=1e-6)


FP8 = ml_dtypes.float8_e4m3fn
CASES: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
    ("Add", [X, X[:, :1]], [], {}),
    ("Sub", [X], [np.float32(2)], {}),
    ("Mul", [X], [np.float32(2)], {}),
    ("Div", [X], [np.float32(3)], {}),
    ("Div", [WHOLE], [np.int32(2)], {}),
    ("Pow", [POSITIVE], [np.float32(2)], {}),
    ("Pow", [X], [np.int64(2)], {}),
    ("MatMul", [X, X.transpose(0, 2, 1).copy()], [], {}),
    ("MatMul", [X], [RNG.standard_normal((4, 5)).astype(np.float32)], {}),
    ("Gemm", [X[0], X[1]], [np.float32(1)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [X[0], X[1]], [], {"transA": 1}),
    ("Conv", [IMAGE], [FILTERS], {"pads": [1, 1, 1, 1]}),
    ("Conv", [IMAGE], [FILTERS[:, :4].copy(), BIAS], {"pads": [0, 1, 2, 0], "strides": [2, 1], "group": 2}),
    ("ConvTranspose", [IMAGE], [TURNED], {"strides": [2, 2]}),
    ("ConvTranspose", [IMAGE], [TURNED, BIAS], {"strides": [1, 2], "dilations": [2, 1]}),
    ("DepthToSpace", [IMAGE], [], {"blocksize": 2}),
    ("DepthToSpace", [IMAGE], [], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [IMAGE], [], {"blocksize": 2}),
    ("Relu", [X], [], {}),
    ("Neg", [X], [], {}),
    ("Abs", [X], [], {}),
    ("Exp", [X], [], {}),
    ("Log", [POSITIVE], [], {}),
    ("Sqrt", [POSITIVE], [], {}),
    ("Reciprocal", [POSITIVE], [], {}),
    ("Sigmoid", [X], [], {}),
    ("Tanh", [X], [], {}),
    ("Not", [X > 0], [], {}),
    ("Identity", [X], [], {}),
    ("Equal", [WHOLE], [np.int32(2)], {}),
    ("Where", [X > 0, X], [np.float32(0)], {}),
    ("Max", [X, -X, X * 0], [], {}),
    ("Min", [X, -X], [], {}),
    ("Clip", [X], [np.float32(-0.5), np.float32(0.5)], {}),
    ("Clip", [X], [None, np.float32(0.5)], {}),
    ("Cast", [X], [], {"to": HALF}),
    ("Cast", [X * 10], [], {"to": INT32}),
    ("Cast", [X > 0], [], {"to": FLOAT}),
    ("Softmax", [X], [], {"axis": 1}),
    ("LogSoftmax", [X], [], {}),
    ("ArgMax", [X], [], {"axis": -1, "keepdims": 0}),
    ("ArgMax", [X], [], {"axis": 1}),
    ("ReduceMean", [X], [ints(-1)], {}),
    ("ReduceMean", [X], [ints(1, 2)], {"keepdims": 0}),
    ("ReduceMean", [X], [], {}),
    ("ReduceMean", [X], [], {"noop_with_empty_axes": 1}),
    ("ReduceSum", [X], [ints(0)], {"keepdims": 0}),
    ("ReduceMax", [X], [ints(2)], {}),
    ("Transpose", [X], [], {"perm": [2, 0, 1]}),
    ("Transpose", [X], [], {}),
    ("Reshape", [X], [ints(0, -1)], {}),
    ("Reshape", [X], [ints(-1, 12)], {"allowzero": 1}),
    ("Squeeze", [X[:, :1]], [ints(1)], {}),
    ("Squeeze", [X[:1, :1]], [], {}),
    ("Unsqueeze", [X], [ints(0, -1)], {}),
    ("Expand", [X[:, :1]], [ints(2, 3, 4)], {}),
    ("Expand", [X], [ints(1, 1)], {}),
    ("Expand", [X[0]], [ints(5, 1, 1)], {}),
    ("Shape", [X], [], {}),
    ("Shape", [X], [], {"start": 1, "end": -1}),
    ("Concat", [X, X], [], {"axis": 2}),
    ("Split", [X], [], {"axis": 2, "num_outputs": 2}),
    ("Split", [X], [ints(1, 3)], {"axis": 2}),
    ("Slice", [X], [ints(1), ints(3), ints(2)], {}),
    ("Slice", [X], [ints(0, 1), ints(-1, 9999), ints(1, 2), ints(1, 2)], {}),
    ("Slice", [X], [ints(1, 0), ints(2, 2)], {}),
    ("Gather", [X], [ints(2, 0)], {"axis": 1}),
    ("Gather", [X], [np.int64(-1)], {"axis": 2}),
    ("Gather", [np.arange(12, dtype=np.float32).reshape(6, 2), WHOLE % 6], [], {"axis": 0}),
    ("GatherND", [X], [np.array([[0, 1], [1, 2]], np.int64)], {}),
    ("Pad", [X], [ints(0, 0, 1, 0, 2, 3), np.float32(7)], {}),
    ("Pad", [X], [ints(1, 2), None, ints(-1)], {}),
    ("QuantizeLinear", [X * 30], [np.float32(0.25), np.int8(0)], {}),
    ("QuantizeLinear", [X[0] * 30], [np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.zeros(4, np.int8)], {"axis": 1}),
    ("QuantizeLinear", [X[0] * 30], [np.array([0.1, 0.2, 0.3], np.float32), np.zeros(3, np.int8)], {"axis": 0}),
    ("QuantizeLinear", [X * 300], [np.float32(0.5), np.zeros((), FP8)], {}),
    ("DequantizeLinear", [WHOLE.astype(np.int8)], [np.float32(0.25), np.int8(0)], {}),
    ("DequantizeLinear", [WHOLE.astype(np.int8)], [np.array([0.1, 0.2, 0.3], np.float32), np.zeros(3, np.int8)],
     {"axis": 1}),
    ("DequantizeLinear", [WHOLE.astype(np.uint8)], [np.float32(0.25), np.uint8(128)], {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "inputs", "constants", "attributes"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_an_operator_does_what_onnx_says(
    op: str, inputs: list[Any], constants: list[Any], attributes: dict[str, Any], tmp_path: Path
) -> None:
    run(tmp_path / "one.onnx", op, inputs, constants, attributes, outputs=2 if op == "Split" else 1)


def test_every_operator_has_a_case_and_every_exported_one_a_translation() -> None:
    tested = {case[0] for case in CASES}
    assert set(OPERATORS) - tested == {"ConstantOfShape"}  # in the graph of shapes below
    assert set(ALLOWED_OPS) - set(OPERATORS) == {"Constant"}


def test_shapes_stay_numbers_through_arithmetic(tmp_path: Path) -> None:
    """zeros([2 * rows, columns]) built from Shape, Gather, Mul, Unsqueeze, Concat, Slice, Squeeze and ConstantOfShape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"], axis=0),
        helper.make_node("Mul", ["rows", "two"], ["twice"]),
        helper.make_node("Unsqueeze", ["twice", "axis0"], ["twice1"]),
        helper.make_node("Slice", ["shape", "one1", "two1"], ["columns1"]),
        helper.make_node("Squeeze", ["columns1", "axis0"], ["columns"]),
        helper.make_node("Unsqueeze", ["columns", "axis0"], ["columns2"]),
        helper.make_node("Concat", ["twice1", "columns2"], ["wanted"], axis=0),
        helper.make_node("ConstantOfShape", ["wanted"], ["zeros"], value=numpy_helper.from_array(np.array([3], np.float32))),
        helper.make_node("Concat", ["x", "zeros"], ["y"], axis=0),
    ]  # fmt: skip
    constants = {"zero": np.int64(0), "two": np.int64(2), "axis0": ints(0), "one1": ints(1), "two1": ints(2)}
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["slots", 4])],
                              [helper.make_tensor_value_info("y", FLOAT, [None, 4])],
                              [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()])  # fmt: skip
    path = tmp_path / "shapes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
    module = OnnxModule(path)
    for rows in (2, 5):
        (y,) = module(torch.zeros(rows, 4))
        assert y.shape == (3 * rows, 4)
        assert y[rows:].unique().tolist() == [3.0]


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_whole_graphs_agree_with_onnx_runtime(tiny_bundle: Path, name: Any) -> None:
    module = OnnxModule(tiny_bundle / f"{name}.onnx")
    session = ort.InferenceSession(str(tiny_bundle / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    spec = load_bundle(tiny_bundle).graph(name)
    feeds = {
        t.name: RNG.integers(0, (t.maximum or 0) + 1, (3, *t.item_shape)).astype(t.dtype)
        if t.dtype.startswith("int") else RNG.standard_normal((3, *t.item_shape)).astype(np.float32)
        for t in spec.inputs
    }  # fmt: skip
    with torch.no_grad():
        ours = module(*(torch.from_numpy(feeds[n]) for n in module.inputs))
    for tensor, got, wanted in zip(spec.outputs, ours, session.run(None, feeds), strict=True):
        assert got.numpy().dtype == np.dtype(tensor.dtype)
        np.testing.assert_allclose(got.numpy(), wanted, atol=1e-5)


def save(path: Path, node: onnx.NodeProto) -> Path:
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", FLOAT, [2, 3])],
                              [helper.make_tensor_value_info("y", FLOAT, [2, 3])])  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
    return path


def test_an_operator_without_a_translation_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="node 'odd' is ai.onnx:Det, which torch engines do not know"):
        OnnxModule(save(tmp_path / "a.onnx", helper.make_node("Det", ["x"], ["y"], name="odd")))
    contrib = helper.make_node("QuickGelu", ["x"], ["y"], name="fused", domain="com.microsoft")
    with pytest.raises(InputError, match="com.microsoft:QuickGelu.*give the portable bundle"):
        OnnxModule(save(tmp_path / "b.onnx", contrib))


def test_an_output_that_is_an_input_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info("x", FLOAT, [2])],
                              [helper.make_tensor_value_info("x", FLOAT, [2])])  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(tmp_path / "i.onnx")
    )
    x = torch.ones(2)
    (y,) = OnnxModule(tmp_path / "i.onnx")(x)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, y)
