"""Convolutions in lower precision: the shipped vision model's step, and small graphs for what must stay as it is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from plugins_irp.vision.data import scene_examples
from plugins_irp.vision.plugin import FOLDER
from sage_edge.bundle import load_bundle
from sage_edge.check import load_reference
from sage_edge.engines.build import BuildRecipe, build, open_engine
from sage_edge.engines.graph_cost import graph_cost
from sage_edge.engines.int8 import int8_form, saturates
from sage_edge.engines.onnx_graph import Graph
from sage_edge.engines.tensorrt_support import check_model
from sage_edge.errors import InputError
from sage_edge.precision.gate import Limits, check_lowered, encode_error
from sage_edge.precision.judge import open_judging
from sage_edge.precision.layers import Layer, find_layers, modules
from sage_edge.precision.lower import lower_bundle
from sage_edge.precision.plan import parse_request
from sage_edge.precision.qdq import judging, stripped
from sage_edge.precision.ranges import collect_encode_ranges, collect_ranges
from sage_edge.precision.rewrite import lower, quantise_weight
from sage_edge.precision.workbench import Workbench
from sage_edge.specs import Precision

Model = onnx.ModelProto
Arrays = dict[str, np.ndarray]
BUNDLE = FOLDER / "bundle"
CORES = ("coarse", "middle", "fine.0", "fine.1")


@pytest.fixture(scope="module")
def refine() -> Model:
    return onnx.load(BUNDLE / "refine.onnx")


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    bundle = load_bundle(BUNDLE)
    scenes = scene_examples("calibration", 4, int(bundle.model.observation[0].shape[-1]))
    return np.stack([observation["image"] for observation in scenes.observations])[:, None]


@pytest.fixture(scope="module")
def amax(refine: Model, noisy: np.ndarray) -> dict[str, float]:
    values = [name for layer in find_layers(refine) for name in (*layer.inputs, *layer.results)]
    return collect_ranges(BUNDLE, BUNDLE / "refine.onnx", load_bundle(BUNDLE), values, {"noisy": noisy}, 1).largest


@pytest.fixture(scope="module")
def carry(refine: Model, noisy: np.ndarray) -> Arrays:
    """What the second step reads."""
    encoded = run(onnx.load(BUNDLE / "encode.onnx"), {"noisy": noisy})
    names = [value.name for value in refine.graph.input]
    state = dict(zip(names, encoded, strict=True))
    return state | dict(zip(names[1:], run(refine, state), strict=False))


def run(model: Model, feeds: Arrays) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(out) for out in session.run(None, feeds)]


def lowered(model: Model, precision: Precision, amax: dict[str, float]) -> Model:
    return lower(model, {layer.name: precision for layer in find_layers(model)}, amax).model


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_the_convolutions_of_the_core_are_layers(refine: Model) -> None:
    layers = find_layers(refine)
    assert [layer.name for layer in layers] == [
        f"core_{scale}.{half}" for scale in CORES for half in ("first", "second")
    ]
    assert modules(layers) == ("core_coarse", "core_fine", "core_middle")
    graph = Graph(refine)
    for layer in layers:
        made = graph.maker[layer.results[0]]
        assert made.op_type == ("Relu" if layer.name.endswith("first") else "Conv")
        output = graph.shape(layer.outputs[0])
        assert output is not None
        assert layer.work == output[2] * output[3] * np.prod(layer.shape)  # type: ignore[operator]
    whole = sum(node.flops for node in graph_cost(BUNDLE / "refine.onnx", 1).nodes if node.op == "Conv")
    assert 0.5 < 2 * sum(layer.work for layer in layers) / whole < 1


def test_int8_convolutions_read_codes_on_both_sides_and_write_codes(refine: Model, amax: dict[str, float]) -> None:
    model = lowered(refine, "int8", amax)
    onnx.checker.check_model(model, full_check=True)
    graph = Graph(model)
    constants = {t.name: t for t in model.graph.initializer}
    for layer in find_layers(refine):
        conv = graph.maker[layer.outputs[0]]
        assert [graph.maker[name].op_type for name in conv.input] == ["DequantizeLinear"] * 2
        weight = graph.maker[conv.input[1]]
        assert helper.get_attribute_value(weight.attribute[0]) == 0
        assert constants[weight.input[0]].data_type == TensorProto.INT8
        assert list(constants[weight.input[1]].dims) == [layer.shape[0]]
        # Nobody reads the result but its quantisation.
        assert {node.op_type for node in graph.readers[layer.results[0]]} == {"QuantizeLinear"}
    # For each pair its input, the result behind the ReLU and the other: what lies between the two is quantised once.
    assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] == 3 * len(CORES)
    names = {v.name: v.type.tensor_type.elem_type for v in model.graph.output}
    assert set(names.values()) == {TensorProto.FLOAT}


@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 1e-5, 2e-3), ("int8", 2e-3, 0.1)])
def test_a_lowered_step_is_still_the_model(
    precision: Precision, least: float, most: float, refine: Model, amax: dict[str, float], carry: Arrays
) -> None:
    wanted, got = run(refine, carry), run(judging(lowered(refine, precision, amax)), carry)
    for ours, theirs in zip(got, wanted, strict=True):
        assert relative(ours, theirs) < most
    assert max(map(relative, got, wanted)) > least  # lowered indeed


def test_the_cpu_form_is_the_judged_graph_in_integers(refine: Model, amax: dict[str, float], carry: Arrays) -> None:
    low = lowered(refine, "int8", amax)
    model, patterns = int8_form(low)
    assert patterns["int8_convolution"] == 2 * len(CORES)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["QLinearConv"] == 2 * len(CORES)
    assert counts["QuantizeLinear"] == len(CORES)  # the second convolution of a pair reads the codes of the first
    assert counts["DequantizeLinear"] == len(CORES)
    judged, ours, plain = (run(graph, carry) for graph in (judging(low), model, refine))
    # Compared behind the first pair, coarse_next: the judged graph's roundings to float16 turn some codes by one, and each of
    # them some of those that follow.
    assert relative(ours[2], judged[2]) < 0.5 * relative(judged[2], plain[2])
    for index in range(4):
        assert relative(ours[index], plain[index]) < 1.1 * relative(judged[index], plain[index])


def test_the_stripped_graph_knows_the_scales_of_inputs_and_results(refine: Model, amax: dict[str, float]) -> None:
    plain = stripped(lowered(refine, "int8", amax))
    layers = find_layers(refine)
    assert set(plain.scales) == {name for layer in layers for name in (*layer.inputs, *layer.results)}
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in plain.model.graph.node}


def test_a_float_reader_gets_the_rounded_result(refine: Model, amax: dict[str, float], carry: Arrays) -> None:
    """An fp16 convolution behind an INT8 one reads what the latter's codes stand for."""
    plan: dict[str, Precision] = {"core_fine.0.first": "int8", "core_fine.0.second": "fp16"}
    model = judging(lower(refine, plan, amax).model)
    result = find_layers(refine)[4].results[0]
    model.graph.output.append(helper.make_tensor_value_info(f"{result}/int8", TensorProto.FLOAT, None))
    values = np.unique(run(model, carry)[-1])
    assert 20 < len(values) <= 128
    assert values.min() == 0
    graph = Graph(model)
    assert {node.op_type for node in graph.readers[f"{result}/int8"]} == {"Conv"}


def test_tensorrt_finds_nothing_wrong(refine: Model, amax: dict[str, float]) -> None:
    findings, _ = check_model("refine", lowered(refine, "int8", amax), "10.3")
    assert [f for f in findings if f.severity == "error"] == []
    assert [f for f in findings if "quantiz" in f.problem or "rounding" in f.problem] == []


def test_scales_on_the_wrong_axis_of_filters_are_found(refine: Model, amax: dict[str, float]) -> None:
    model = lowered(refine, "int8", amax)
    wrong = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.output[0].endswith("weight/int8"))
    wrong.attribute[0].i = 1
    findings, _ = check_model("refine", model, "10.3")
    assert [f.problem for f in findings if f.severity == "error"] == [
        "scales along axis 1, which the product sums over"
    ]


def convolution(weight: str = "core.a.weight", relu: bool = True, bias: bool = False, group: int = 1) -> Model:
    """conv(x, [4, 4 / group, 3, 3]) + x, perhaps with a ReLU between."""
    filters = np.random.default_rng(0).standard_normal((4, 4 // group, 3, 3), np.float32)
    constants = [numpy_helper.from_array(filters, weight), numpy_helper.from_array(np.ones(4, np.float32), "bias")]
    inputs = ["x", weight, "bias"] if bias else ["x", weight]
    nodes = [helper.make_node("Conv", inputs, ["a"], pads=[1] * 4, group=group)]
    nodes += [helper.make_node("Relu", ["a"], ["r"])] if relu else []
    nodes += [helper.make_node("Add", ["x", "r" if relu else "a"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, 6, 6]) for name in "xy"]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def leaving() -> Model:
    """The result is an output as well."""
    model = convolution()
    model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", 4, 6, 6]))
    return model


@pytest.mark.parametrize(
    "model", [convolution(bias=True), convolution(group=2), convolution(weight="head.weight"), leaving()]
)
def test_what_cannot_be_lowered_is_no_layer(model: Model) -> None:
    with pytest.raises(InputError, match="no layer that can be lowered"):
        find_layers(model)


def test_a_result_that_others_read_too_is_rounded_before_the_relu() -> None:
    model = convolution()
    model.graph.node.append(helper.make_node("Neg", ["a"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4, 6, 6]))
    (layer,) = find_layers(model)
    assert layer.results == ("a",)


@given(relu=st.booleans(), seed=st.integers(0, 9), unsigned=st.booleans())
def test_the_integer_form_rounds_as_the_judged_one(relu: bool, seed: int, unsigned: bool) -> None:
    """Within the calibrated ranges: at most one code of the result apart (float16 rounds the sum before it is quantised)."""
    unsigned = unsigned or saturates()  # signed weights only where the CPU can multiply them
    model = convolution(relu=relu)
    x = np.random.default_rng(seed).standard_normal((2, 4, 6, 6), np.float32)
    (layer,) = find_layers(model)
    watched = Model()
    watched.CopyFrom(model)
    watched.graph.output.append(helper.make_tensor_value_info(layer.results[0], TensorProto.FLOAT, None))
    amax = {"x": float(np.abs(x).max()), layer.results[0]: float(np.abs(run(watched, {"x": x})[-1]).max())}
    low = lowered(model, "int8", amax)
    judged, ours = run(judging(low), {"x": x})[0], run(int8_form(low, unsigned)[0], {"x": x})[0]
    step = amax[layer.results[0]] / 127
    gap = np.abs(ours - judged)
    assert gap.max() < 1.01 * step
    assert (gap > 0.01 * step).mean() < 0.05


def test_products_of_the_largest_codes_do_not_saturate() -> None:
    """255 × 127, many times: 16 bits are too few for two of them, and a CPU without VNNI has no more in uint8 by int8."""
    model = convolution(relu=False)
    filters = numpy_helper.from_array(np.full((4, 4, 3, 3), 127, np.float32), "core.a.weight")
    next(t for t in model.graph.initializer if t.name == "core.a.weight").CopyFrom(filters)
    x = np.full((1, 4, 6, 6), 127, np.float32)
    (layer,) = find_layers(model)
    exact = run(model, {"x": x})[0]
    low = lowered(model, "int8", {"x": 127.0, layer.results[0]: float(exact.max())})
    got = run(int8_form(low)[0], {"x": x})[0]
    np.testing.assert_allclose(got, exact, atol=exact.max() / 127)
    if saturates():
        assert (np.abs(run(int8_form(low, unsigned=False)[0], {"x": x})[0] - exact) > exact.max() / 10).any()


@given(st.integers(0, 99))
def test_filters_are_quantised_by_output_channel(seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((5, 3, 2, 2)).astype(np.float32)
    codes, scales = quantise_weight(weight, "int8", 0)
    flat, again = quantise_weight(weight.reshape(5, -1).T, "int8")
    assert np.array_equal(codes.reshape(5, -1).T, flat)
    assert np.array_equal(scales, again)
    assert np.abs(codes).reshape(5, -1).max(1).tolist() == [127] * 5


def test_fp8_is_refused_for_convolutions_and_left_out_of_auto(noisy: np.ndarray, tmp_path: Path) -> None:
    from sage_edge.precision.lower import _asked

    bundle = load_bundle(BUNDLE)
    with Workbench(BUNDLE, bundle, {"noisy": noisy}, Limits(), 1, lambda stage: None) as bench:
        with pytest.raises(InputError, match="core_embed is a convolution, for which there is no FP8; use int8"):
            _asked(parse_request("fp8"), bench.layers)
        assert [set(plan.values()) for plan in _asked(parse_request("auto"), bench.layers)] == [{"int8"}]


@pytest.fixture(scope="module")
def encode() -> Model:
    return onnx.load(BUNDLE / "encode.onnx")


def test_what_leads_to_the_core_is_a_layer_though_its_result_leaves_the_graph(encode: Model) -> None:
    (layer,) = find_layers(encode, "encode")
    assert (layer.name, layer.module, layer.graph, layer.results) == ("core_embed", "core_embed", "encode", ("fine",))
    assert find_layers(convolution(weight="head.weight"), "encode") == ()


@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 1e-5, 2e-3), ("int8", 5e-3, 0.1)])
def test_a_lowered_encode_graph_keeps_its_outputs(
    precision: Precision, least: float, most: float, encode: Model, noisy: np.ndarray
) -> None:
    ranges = collect_encode_ranges(BUNDLE, load_bundle(BUNDLE), ["relu", "fine"], {"noisy": noisy}, 1)
    assert ranges.largest["fine"] == pytest.approx(np.abs(run(encode, {"noisy": noisy})[1]).max(), rel=1e-5)
    low = lower(encode, {"core_embed": precision}, ranges.largest, "encode").model
    onnx.checker.check_model(low, full_check=True)
    assert [(v.name, v.type) for v in low.graph.output] == [(v.name, v.type) for v in encode.graph.output]
    wanted, judged, ours = (run(graph, {"noisy": noisy}) for graph in (encode, judging(low), int8_form(low)[0]))
    assert least < relative(judged[1], wanted[1]) < most
    assert relative(ours[1], judged[1]) < 0.3 * most
    for index in (0, 2, 3, 4):
        np.testing.assert_allclose(ours[index], wanted[index], atol=1e-6)
    if precision == "int8":
        assert len(np.unique(ours[1])) <= 255


def test_the_bundle_and_its_engine_have_the_lowered_encode_graph(noisy: np.ndarray, tmp_path: Path) -> None:
    made = lower_bundle(BUNDLE, tmp_path / "low", parse_request("int8"), {"noisy": noisy})
    lowering = made.bundle.lowering
    assert lowering is not None
    assert [layer.layer for layer in lowering.layers if layer.graph == "encode"] == ["core_embed"]
    assert [f.passed for f in lowering.gate if f.name == "encode_error"] == [True]
    assert "encode_parity" not in {f.name for f in lowering.gate}
    built = build(made.path, BuildRecipe(slots=2))
    assert built.manifest.fused["int8_convolution"] == 1 + 2 * len(CORES)
    reference = load_reference(made.path / "reference.npz")
    with open_judging(made.path, 2) as judged, open_engine(built.path, 1) as engine:
        for runner in (judged, engine):
            assert 1e-3 < encode_error(runner, reference) < 0.1
            strict = dataclasses.replace(lowering, limits={**lowering.limits, "step_error": 1e-3})
            assert {f.name for f in check_lowered(runner, reference, strict).failures} >= {"encode_error", "step_error"}


def test_an_encode_graph_that_stays_is_copied_and_must_be_equal(noisy: np.ndarray, tmp_path: Path) -> None:
    made = lower_bundle(BUNDLE, tmp_path / "low", parse_request("core_fine: int8"), {"noisy": noisy})
    assert (made.path / "encode.onnx").read_bytes() == (BUNDLE / "encode.onnx").read_bytes()
    assert "encode_parity" in {f.name for f in made.report.findings}
    assert made.bundle.precision == "mixed"


def test_an_encode_layer_that_breaks_the_gate_stays_higher(noisy: np.ndarray) -> None:
    """INT8's error of encode is about 0.04: with 0.01 allowed there, fp16 is what is left."""
    with Workbench(BUNDLE, load_bundle(BUNDLE), {"noisy": noisy}, Limits(), 1, lambda stage: None) as bench:
        assert 0.02 < bench.alone("core_embed", "int8") < 0.1
        assert bench.alone("core_embed", "fp16") < 2e-3
        assert bench.screen({"core_embed": "int8"}).passed
        bench.limits = Limits(step_error=0.01)
        assert bench.screen({"core_embed": "fp16"}).passed
        bench._screened.clear()
        assert bench.screen({"core_embed": "int8"}).failed == ("encode_error",)


def test_a_layer_says_along_which_axis_its_channels_lie() -> None:
    wide = Layer("a", "core", "a.weight", (4, 3, 1, 1), ("y",), ("x",), 12, ("y",))
    assert (wide.is_convolution, wide.axis) == (True, 0)
