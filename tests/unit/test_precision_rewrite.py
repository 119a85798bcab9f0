"""Lowered graphs: what they hold, what stays float32, and the CPU forms that are made of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from sage_edge.bundle import load_bundle
from sage_edge.engines.int8 import int8_form
from sage_edge.errors import InputError
from sage_edge.precision.equalise import equalise, find_pairs
from sage_edge.precision.formats import fp8_values
from sage_edge.precision.layers import find_layers, module_of, modules
from sage_edge.precision.qdq import judging, stripped
from sage_edge.precision.ranges import collect_ranges
from sage_edge.precision.rewrite import lower
from sage_edge.specs import Precision
from tests.conftest import TINY

Model = onnx.ModelProto
LAYERS = TINY.H_layers + TINY.L_layers
PRODUCTS = 4 * TINY.H_cycles * (TINY.H_layers + TINY.L_cycles * TINY.L_layers)


@pytest.fixture(scope="module")
def refine(tiny_bundle: Path) -> Model:
    return onnx.load(tiny_bundle / "refine.onnx")


@pytest.fixture(scope="module")
def amax(tiny_bundle: Path, refine: Model) -> dict[str, float]:
    values = [name for layer in find_layers(refine) for name in layer.inputs]
    bundle = load_bundle(tiny_bundle)
    observation = bundle.model.random_observation(8)
    return collect_ranges(tiny_bundle, tiny_bundle / "refine.onnx", bundle, values, observation, 1).largest


def everything(model: Model, precision: Precision, amax: dict[str, float]) -> Model:
    return lower(model, {layer.name: precision for layer in find_layers(model)}, amax).model


def types(model: Model) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return values | {t.name: t.data_type for t in graph.initializer}


def run(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(out) for out in session.run(None, feeds)]


def carry(model: Model, slots: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in model.graph.input}
    return {name: rng.standard_normal((slots, *shape), np.float32) for name, shape in shapes.items()}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_layers_are_weights_with_all_their_products(refine: Model) -> None:
    layers = find_layers(refine)
    assert len(layers) == 4 * LAYERS
    assert sum(len(layer.outputs) for layer in layers) == PRODUCTS
    assert modules(layers) == ("H", "L")
    assert {len(layer.outputs) for layer in layers if layer.module == "H"} == {TINY.H_cycles}
    assert {len(layer.outputs) for layer in layers if layer.module == "L"} == {TINY.H_cycles * TINY.L_cycles}


def test_modules_by_name() -> None:
    assert module_of("model.L_level.layers.0.mlp.down_proj.weight") == "L"
    assert module_of("model.h_to_l.weight") == "H"
    assert module_of("model.lm_head.weight") is None
    assert module_of("model.q_head.weight") is None


def test_a_graph_without_layers_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no layer that can be lowered"):
        find_layers(onnx.load(tiny_bundle / "decode.onnx"))


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_what_must_stay_float32_does(precision: Precision, refine: Model, amax: dict[str, float]) -> None:
    model = everything(refine, precision, amax)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 19)]
    kind = types(model)
    assert {kind[v.name] for v in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    for node in model.graph.node:
        if node.op_type in (
            "Softmax",
            "LogSoftmax",
            "Pow",
            "ReduceMean",
            "Sqrt",
            "Reciprocal",
            "ReduceSum",
            "ReduceMax",
        ):
            assert kind[node.output[0]] == TensorProto.FLOAT, node.name
        if node.op_type == "MatMul":
            heads = {"model.q_head.weight", "model.lm_head.weight"} & set(node.input)
            assert kind[node.output[0]] == (TensorProto.FLOAT if heads else TensorProto.FLOAT16), node.name
    counts = Counter(node.op_type for node in model.graph.node)
    # One float16 product a layer and use, two in each attention; q_head and twice lm_head stay.
    assert counts["MatMul"] == PRODUCTS + PRODUCTS // 2 + 3


@pytest.mark.parametrize(("precision", "code"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)])
def test_q_and_dq_are_symmetric_per_tensor_and_per_column(
    precision: Precision, code: int, refine: Model, amax: dict[str, float]
) -> None:
    model = everything(refine, precision, amax)
    constants = {t.name: t for t in model.graph.initializer}
    quantised = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(quantised) == PRODUCTS
    for node in (*quantised, *(n for n in model.graph.node if n.op_type == "DequantizeLinear")):
        zero, scale = constants[node.input[2]], numpy_helper.to_array(constants[node.input[1]])
        assert zero.data_type == code
        assert not any(zero.raw_data)
        assert np.array_equal(scale.astype(np.float16).astype(scale.dtype), scale)
    for node in quantised:
        assert list(constants[node.input[1]].dims) == []
        value = node.input[0]
        step = float(numpy_helper.to_array(constants[node.input[1]]))
        top = 127 if precision == "int8" else 448
        assert step * top == pytest.approx(amax[value], rel=1e-3)
    weights = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    assert len(weights) == 4 * LAYERS  # stored once, read by all uses
    for node in weights:
        assert helper.get_attribute_value(node.attribute[0]) == 1
        assert list(constants[node.input[1]].dims) == [constants[node.input[0]].dims[1]]
        assert constants[node.input[0]].data_type == code


def test_modules_choose_their_precision_apart(refine: Model, amax: dict[str, float]) -> None:
    layers = find_layers(refine)
    plan: dict[str, Precision] = {x.name: "fp16" if x.module == "H" else "int8" for x in layers}
    names = {t.name: t.data_type for t in lower(refine, plan, amax).model.graph.initializer}
    for layer in layers:
        assert (f"{layer.weight}/int8/codes" in names) == (layer.module == "L")
        assert (names.get(f"{layer.weight}/fp16") == TensorProto.FLOAT16) == (layer.module == "H")
        assert layer.weight not in names


def test_a_layer_alone_leaves_the_others_as_they_are(refine: Model, amax: dict[str, float]) -> None:
    layer = find_layers(refine)[2]
    model = lower(refine, {layer.name: "int8"}, amax).model
    codes = [t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8 and t.name.endswith("codes")]
    assert codes == [f"{layer.weight}/int8/codes"]
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["QuantizeLinear"] == len(layer.outputs)


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 5e-3), ("int8", 0.2), ("fp8", 0.4)])
def test_a_lowered_graph_is_still_the_model(
    precision: Precision, limit: float, refine: Model, amax: dict[str, float]
) -> None:
    feeds = carry(refine)
    wanted = run(refine, feeds)
    got = run(judging(everything(refine, precision, amax)), feeds)
    error = relative(got[0], wanted[0])
    assert 1e-6 < error < limit  # lowered indeed, and not too far


def test_a_graph_with_nothing_lowered_gives_the_same_bits(refine: Model) -> None:
    feeds = carry(refine)
    plain = lower(refine, {layer.name: "fp32" for layer in find_layers(refine)}, {}).model
    for ours, theirs in zip(run(plain, feeds), run(refine, feeds), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def half_chain() -> Model:
    """float16: x * 300 * 300 * 1e-5, which overflows in the middle from x = 1 on."""
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["a", "big"], ["b"]),
        helper.make_node("Mul", ["b", "big"], ["c"]),
        helper.make_node("Mul", ["c", "small"], ["d"]),
        helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT),
    ]
    constants = [numpy_helper.from_array(np.array(v, np.float16), n) for n, v in (("big", 300), ("small", 1e-5))]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    graph = helper.make_graph(nodes, "half", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def test_the_judging_form_rounds_and_overflows_where_float16_does() -> None:
    """ONNX Runtime by itself computes the chain in float32, and sees neither."""
    x = np.array([0.3, 0.5, 1.0, -2.0], np.float32)
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
        for factor in (300, 300, 1e-5):
            wanted = (wanted * np.float16(factor)).astype(np.float16)
    assert np.isinf(wanted[2:]).all()
    np.testing.assert_array_equal(run(judging(half_chain()), {"x": x})[0], wanted.astype(np.float32))
    assert np.isfinite(run(half_chain(), {"x": x})[0]).all()


def test_the_judging_form_keeps_the_codes_of_activations(refine: Model, amax: dict[str, float]) -> None:
    """With FP8 every value that enters a product is one of 255, times its scale."""
    lowered = everything(refine, "fp8", amax)
    model = judging(lowered)
    name = find_layers(refine)[0].inputs[0]
    scale = float(numpy_helper.to_array(next(t for t in lowered.graph.initializer if t.name == f"{name}/fp8/scale")))
    model.graph.output.append(helper.make_tensor_value_info(f"{name}/fp8", TensorProto.FLOAT, None))
    codes = np.unique(run(model, carry(refine))[-1] / np.float32(scale))
    assert np.isin(codes, fp8_values()[np.isfinite(fp8_values())]).all()
    assert len(codes) > 20


def test_the_stripped_graph_holds_what_the_codes_stand_for(refine: Model, amax: dict[str, float]) -> None:
    plain = stripped(everything(refine, "int8", amax))
    assert set(types(plain.model).values()) <= {TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL}
    assert set(plain.scales) == {name for layer in find_layers(refine) for name in layer.inputs}
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in plain.model.graph.node}
    assert relative(run(plain.model, carry(refine))[0], run(refine, carry(refine))[0]) < 0.05


def test_the_cpu_form_is_the_judged_graph_in_int8_products(refine: Model, amax: dict[str, float]) -> None:
    lowered = everything(refine, "int8", amax)
    model, patterns = int8_form(lowered)
    blocks = PRODUCTS // 4
    assert patterns["int8_product"] == 7 * blocks  # q, k, v, o, gate, up, down
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["MatMulIntegerToFloat"] == 7 * blocks
    assert counts["QuantizeLinear"] == 4 * blocks  # one serves q, k and v, one gate and up
    # Compared at the first queries: from there on, the judged graph's roundings to float16 turn some codes by one.
    value = next(node for node in refine.graph.node if node.op_type == "Split").output[0]
    outputs = []
    for graph in (judging(lowered), model, refine):
        probe = Model()
        probe.CopyFrom(graph)
        probe.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
        outputs.append(run(probe, carry(refine))[-1])
    judged, ours, plain = outputs
    assert relative(ours, judged) < 1e-3 < relative(judged, plain)


def test_an_fp16_layer_of_an_int8_graph_stays_float32_on_the_cpu(refine: Model, amax: dict[str, float]) -> None:
    layers = find_layers(refine)
    plan: dict[str, Precision] = {x.name: "fp16" if x.name.endswith("down_proj") else "int8" for x in layers}
    model, patterns = int8_form(lower(refine, plan, amax).model)
    blocks = PRODUCTS // 4
    assert patterns["int8_product"] == 6 * blocks
    assert Counter(node.op_type for node in model.graph.node)["MatMul"] == blocks + 3


def sizes(bundle: Path, model: Model, names: list[str]) -> dict[str, np.ndarray]:
    spec = load_bundle(bundle)
    observation = spec.model.random_observation(8)
    return collect_ranges(bundle, bundle / "refine.onnx", spec, names, observation, 1).channels


def test_balancing_channels_keeps_the_model_bit_for_bit(tiny_bundle: Path, refine: Model) -> None:
    model = Model()
    model.CopyFrom(refine)
    pairs = find_pairs(model, find_layers(model))
    assert len(pairs) == 2 * LAYERS  # attention values -> o_proj, up -> down_proj
    channels = sizes(tiny_bundle, model, [name for pair in pairs for name in pair.consumer.inputs])
    after = equalise(model, pairs, channels)
    changed = [a.name for a, b in zip(model.graph.initializer, refine.graph.initializer, strict=True) if a != b]
    assert len(changed) == 4 * LAYERS
    for ours, theirs in zip(run(model, carry(refine)), run(refine, carry(refine)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    spread = [np.ptp(np.log2(np.maximum(v, 1e-9))) for v in (after[n] for n in after)]
    before = [np.ptp(np.log2(np.maximum(channels[n], 1e-9))) for n in after]
    assert np.mean(spread) < np.mean(before)


def test_channels_that_somebody_else_reads_are_left_alone(refine: Model) -> None:
    model = Model()
    model.CopyFrom(refine)
    part = next(n for n in model.graph.node if n.op_type == "Split").output[2]
    model.graph.node.append(helper.make_node("Identity", [part], ["spy"]))
    model.graph.output.append(helper.make_tensor_value_info("spy", TensorProto.FLOAT, None))
    assert len(find_pairs(model, find_layers(model))) == 2 * LAYERS - 1


def test_ranges_are_those_of_all_steps(tiny_bundle: Path, refine: Model) -> None:
    """Against the definition, over every step: the largest magnitude that the value takes."""
    bundle, name = load_bundle(tiny_bundle), find_layers(refine)[0].inputs[0]
    observation = bundle.model.random_observation(8)
    ranges = collect_ranges(tiny_bundle, tiny_bundle / "refine.onnx", bundle, [name], observation, 1)
    model = Model()
    model.CopyFrom(refine)
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    encode = onnx.load(tiny_bundle / "encode.onnx")
    state = dict(
        zip(("context", "z_H", "z_L"), run(encode, bundle.model.validate_observation(observation)), strict=True)
    )
    seen = []
    for _ in range(TINY.halt_max_steps):
        state["z_H"], state["z_L"], _, value = run(model, state)
        seen.append(np.abs(value).max())
    np.testing.assert_allclose(ranges.amax[:, 0], seen, rtol=1e-5)
    assert ranges.largest[name] == pytest.approx(max(seen), rel=1e-5)
