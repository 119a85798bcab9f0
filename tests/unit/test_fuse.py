"""fuse(): every pattern on a graph built by hand and on small exported models; what is almost a pattern stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sage_edge.engines.fuse import FuseReport, fuse

ort = pytest.importorskip("onnxruntime")

Float = npt.NDArray[np.float32]
Operand = str | float | list[int] | Float
POSITIONS, HEADS, SIZE = 6, 2, 8
HIDDEN = HEADS * SIZE
FLAT, SPLIT = [POSITIONS, HIDDEN], [HEADS, POSITIONS, SIZE]


class Builder:
    """A graph of the standard operators, built value by value."""

    def __init__(self, **inputs: Sequence[int]) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, ["slots", *v]) for k, v in inputs.items()]

    def op(self, kind: str, *inputs: Operand, outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"{kind}{len(self.nodes)}_{i}" for i in range(outputs)]
        values = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        node = helper.make_node(kind, values, names)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return names

    def __call__(self, kind: str, *inputs: Operand, **attributes: Any) -> str:
        return self.op(kind, *inputs, **attributes)[0]

    def constant(self, value: float | list[int] | Float) -> str:
        array = np.array(value, np.int64 if isinstance(value, list) else np.float32)
        self.constants.append(numpy_helper.from_array(array, f"constant{len(self.constants)}"))
        return self.constants[-1].name

    def model(self, *outputs: str) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "test", self.inputs, values, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def random(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def run(model: onnx.ModelProto, slots: int) -> list[Float]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {}
    for i, value in enumerate(session.get_inputs()):
        feed[value.name] = random(slots, *value.shape[1:], seed=i)
    return [np.asarray(out) for out in session.run(None, feed)]


def fused(model: onnx.ModelProto) -> tuple[onnx.ModelProto, FuseReport]:
    """A fused copy, checked against `model` at two batch sizes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    report = fuse(copy)
    assert (report.nodes_before, report.nodes_after) == (len(model.graph.node), len(copy.graph.node))
    for slots in (1, 3):
        for before, after in zip(run(model, slots), run(copy, slots), strict=True):
            assert before.shape == after.shape
            assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    return copy, report


def counts(report: FuseReport) -> dict[str, int]:
    return {k: v for k, v in vars(report).items() if v and not k.startswith("nodes_")}


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def rms_norm(b: Builder, x: str, eps: float = 1e-5, axis: int = -1, keepdims: int = 1) -> str:
    mean = b("ReduceMean", b("Pow", x, 2.0), [axis], keepdims=keepdims)
    return b("Mul", x, b("Reciprocal", b("Sqrt", b("Add", mean, eps))))


def tables() -> tuple[Float, Float]:
    angle = np.outer(np.arange(POSITIONS), 0.5 ** np.arange(SIZE // 2)).astype(np.float32)
    angle = np.concatenate((angle, angle), -1)
    return np.cos(angle), np.sin(angle)


def rope(b: Builder, x: str, cos: Float, sin: Float, swap: bool = False) -> str:
    low, high = b.op("Split", x, outputs=2, axis=-1, num_outputs=2)
    turned = b("Concat", b("Neg", low if swap else high), high if swap else low, axis=-1)
    return b("Add", b("Mul", x, cos), b("Mul", turned, sin))


def attention(b: Builder, q: str, k: str, v: str, rotate: bool = False, axis: int = -1, mask: bool = False) -> str:
    def heads(x: str, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        return b("Transpose", b("Reshape", x, [-1, POSITIONS, HEADS, SIZE], allowzero=1), perm=perm)

    if rotate:
        query = rope(b, heads(q), *tables())
        keys = b("Transpose", rope(b, heads(k), *tables()), perm=(0, 1, 3, 2))
    else:
        query, keys = heads(q), heads(k, (0, 2, 3, 1))
    scores = b("MatMul", b("Mul", query, 0.3), keys)
    if mask:
        scores = b("Add", scores, random(POSITIONS, POSITIONS))
    out = b("MatMul", b("Softmax", scores, axis=axis), heads(v))
    return b("Reshape", b("Transpose", out, perm=(0, 2, 1, 3)), [-1, POSITIONS, HIDDEN], allowzero=1)


def test_silu() -> None:
    b = Builder(x=FLAT)
    model, report = fused(b.model(b("Mul", "x", b("Sigmoid", "x"))))
    assert counts(report) == {"silu": 1}
    assert operators(model) == {"QuickGelu": 1}


def test_rms_norm_without_a_sum_before() -> None:
    b = Builder(x=FLAT)
    model, report = fused(b.model(rms_norm(b, "x")))
    assert counts(report) == {"rms_norm": 1}
    assert operators(model) == {"SimplifiedLayerNormalization": 1}


def test_skip_rms_norm_keeps_a_sum_that_is_read_elsewhere() -> None:
    b = Builder(x=FLAT, y=FLAT)
    total = b("Add", "x", "y")
    early = b("Neg", total)  # stands before the norm, whose node will make the sum
    model, report = fused(b.model(rms_norm(b, total), early, total))
    assert counts(report) == {"skip_rms_norm": 1}
    assert operators(model) == {"SkipSimplifiedLayerNormalization": 1, "Neg": 1}


def test_a_sum_that_broadcasts_is_not_taken_into_the_norm() -> None:
    b = Builder(x=FLAT)
    model, report = fused(b.model(rms_norm(b, b("Add", "x", random(HIDDEN)))))
    assert counts(report) == {"rms_norm": 1}
    assert operators(model) == {"Add": 1, "SimplifiedLayerNormalization": 1}


def test_rope_alone() -> None:
    b = Builder(x=SPLIT)
    model, report = fused(b.model(rope(b, "x", *tables())))
    assert counts(report) == {"rope": 1}
    assert operators(model) == {"RotaryEmbedding": 1}


@pytest.mark.parametrize("rotate", [False, True])
def test_attention(rotate: bool) -> None:
    b = Builder(q=FLAT, k=FLAT, v=FLAT)
    model, report = fused(b.model(attention(b, "q", "k", "v", rotate)))
    assert counts(report) == ({"attention": 1, "rope": 2} if rotate else {"attention": 1})
    assert operators(model) == ({"RotaryEmbedding": 2} if rotate else {}) | {"MultiHeadAttention": 1}


def test_a_block_of_patterns_proves_equal_shapes_through_its_reshapes() -> None:
    b = Builder(x=FLAT)
    x = "x"
    for _ in range(2):
        x = rms_norm(b, b("Add", x, attention(b, x, x, x)))
    assert counts(fused(b.model(x))[1]) == {"attention": 2, "skip_rms_norm": 2}


@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "attributes", "fuses"),
    [
        (4, 64, 3, {"pads": [1] * 4}, True),
        (7, 16, 5, {"pads": [2] * 4}, True),
        (8, 64, 3, {"pads": [1] * 4}, False),
        (4, 8, 3, {"pads": [1] * 4}, False),
        (4, 64, 3, {"pads": [1, 1, 0, 0]}, False),
        (4, 64, 3, {}, False),
        (4, 64, 3, {"pads": [1] * 4, "strides": [2, 2]}, False),
        (4, 64, 3, {"pads": [2] * 4, "dilations": [2, 2]}, False),
        (4, 64, 1, {}, False),
        (4, 64, 2, {"pads": [1] * 4}, False),
    ],
)
def test_a_narrow_convolution_that_keeps_the_size(
    outputs: int, inputs: int, size: int, attributes: dict[str, object], fuses: bool
) -> None:
    b = Builder(x=[inputs, 9, 6])
    model, report = fused(b.model(b("Conv", "x", random(outputs, inputs, size, size), **attributes)))
    assert counts(report) == ({"narrow_convolution": 1} if fuses else {})
    assert operators(model) == {"ConvTranspose" if fuses else "Conv": 1}


def test_a_narrow_convolution_with_bias_or_groups_stays() -> None:
    b = Builder(x=[64, 9, 6])
    biased = b("Conv", "x", random(4, 64, 3, 3), random(4), pads=[1] * 4)
    assert counts(fused(b.model(biased, b("Conv", "x", random(4, 32, 3, 3), pads=[1] * 4, group=2)))[1]) == {}


def test_a_projection_is_split_once_for_all_its_uses() -> None:
    b = Builder(x=FLAT, y=FLAT)
    weight = b.constant(random(HIDDEN, 3 * HIDDEN))
    outputs = [out for x in "xy" for out in b.op("Split", b("MatMul", x, weight), outputs=3, axis=2, num_outputs=3)]
    model, report = fused(b.model(*outputs))
    assert counts(report) == {"projection": 2}
    assert operators(model) == {"MatMul": 6}
    assert [list(t.dims) for t in model.graph.initializer] == [[HIDDEN, HIDDEN]] * 3


def test_a_projection_with_another_use_keeps_its_weight_whole() -> None:
    b = Builder(x=FLAT, y=FLAT)
    weight = b.constant(random(HIDDEN, 2 * HIDDEN))
    parts = b.op("Split", b("MatMul", "x", weight), outputs=2, axis=-1, num_outputs=2)
    assert counts(fused(b.model(*parts, b("MatMul", "y", weight)))[1]) == {}


def test_unequal_splits_keep_the_weight_whole() -> None:
    b = Builder(x=FLAT, y=FLAT)
    weight = b.constant(random(HIDDEN, 2 * HIDDEN))
    even = b.op("Split", b("MatMul", "x", weight), outputs=2, axis=-1, num_outputs=2)
    uneven = b.op("Split", b("MatMul", "y", weight), [HIDDEN - 1, HIDDEN + 1], outputs=2, axis=-1)
    assert counts(fused(b.model(*even, *uneven))[1]) == {}


def test_a_constant_that_callers_may_override_is_no_constant() -> None:
    b = Builder(x=FLAT)
    model = b.model(rms_norm(b, "x"))
    epsilon = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.name == "constant2")
    model.graph.input.append(helper.make_tensor_value_info(epsilon.name, TensorProto.FLOAT, []))
    assert counts(fuse(model)) == {}


def near_eps(b: Builder) -> str:
    root = b("Sqrt", b("ReduceMean", b("Pow", "x", 2.0), [-1], keepdims=1))
    return b("Mul", "x", b("Reciprocal", b("Add", root, 1e-5)))


def near_swish(b: Builder) -> str:
    return b("Mul", "x", b("Sigmoid", b("Mul", "x", 2.0)))


def near_axis(b: Builder) -> str:
    return rms_norm(b, "x", axis=1)


def near_power(b: Builder) -> str:
    mean = b("ReduceMean", b("Pow", b("Abs", "x"), 3.0), [-1], keepdims=1)
    return b("Mul", "x", b("Reciprocal", b("Sqrt", b("Add", mean, 1e-5))))


def near_softmax(b: Builder) -> str:
    return attention(b, "x", "x", "x", axis=2)


def near_mask(b: Builder) -> str:
    return attention(b, "x", "x", "x", mask=True)


def near_rope(b: Builder) -> str:
    return rope(b, b("Reshape", "x", [-1, HEADS, POSITIONS, SIZE]), *tables(), swap=True)


def near_tables(b: Builder) -> str:
    return rope(b, b("Reshape", "x", [-1, HEADS, POSITIONS, SIZE]), random(POSITIONS, SIZE), random(POSITIONS, SIZE))


NEAR = [near_eps, near_swish, near_axis, near_power, near_softmax, near_mask, near_rope, near_tables]


@pytest.mark.parametrize("near", NEAR)
def test_a_near_miss_is_left_as_it_is(near: Callable[[Builder], str]) -> None:
    b = Builder(x=FLAT)
    model = b.model(near(b))
    before = model.SerializeToString()
    assert counts(fuse(model)) == {}
    assert model.SerializeToString() == before


def test_doubles_and_old_opsets_are_left_as_they_are() -> None:
    b = Builder(x=FLAT)
    model = b.model(b("Mul", "x", b("Sigmoid", "x")))
    model.opset_import[0].version = 12
    assert counts(fuse(model)) == {}
    model.opset_import[0].version = 19
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    assert counts(fuse(model)) == {}


def test_a_second_time_changes_nothing() -> None:
    b = Builder(x=FLAT)
    model, _ = fused(b.model(rms_norm(b, b("Add", "x", attention(b, "x", "x", "x", rotate=True)))))
    before = model.SerializeToString()
    assert counts(fuse(model)) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_an_exported_model(positions: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sage_edge.export.graph import SIGNALS, Refine, export_graph, use_matmuls
    from sage_edge.export.hrm import HRM
    from sage_edge.specs import SLOTS, HRMConfig, TensorSpec

    torch.manual_seed(0)
    config = HRMConfig(11, 9, 32, 2, 1, 2, 2, 2, 4, 1, 32, pos_encodings="rope" if positions == "rope" else "learned")
    spec = [TensorSpec(name, "float32", (SLOTS, config.positions, 32)) for name in ("context", "z_H", "z_L", "H", "L")]
    path = tmp_path / "refine.onnx"
    outputs = [*spec[3:], TensorSpec("signals", "float32", (SLOTS, len(SIGNALS)))]
    module = Refine(HRM(config).eval())
    use_matmuls(module)
    export_graph(module, spec[:3], outputs, path)
    plain = onnx.load(path)
    blocks = config.H_cycles * (config.L_cycles * config.L_layers + config.H_layers)
    model, report = fused(plain)
    expected = {"attention": blocks, "skip_rms_norm": 2 * blocks, "silu": blocks, "projection": 2 * blocks}
    assert counts(report) == expected | ({"rope": 2 * blocks} if positions == "rope" else {})
    kinds = [n.op_type for n in model.graph.node]
    last = len(kinds) - kinds[::-1].index("SkipSimplifiedLayerNormalization")  # the signals come after it
    assert not {"Transpose", "Split", "Neg", "Softmax"} & set(kinds[3:last])
    assert model.ByteSize() <= plain.ByteSize()
