"""Parts of a build that need no device: nested progress, the inspector's answer, the costs of a graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sage_edge.bundle import load_bundle
from sage_edge.engines.build_progress import BuildProgress
from sage_edge.engines.graph_cost import count, graph_cost, lowest_precision, sized_values
from sage_edge.engines.inspector import node_types, read_layers
from sage_edge.errors import EngineError

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def test_nested_phases_become_one_fraction_that_never_falls() -> None:
    seen: list[tuple[str, float]] = []
    progress = BuildProgress("refine", lambda stage, done: seen.append((stage, done)))
    progress.start("build", None, 4)
    assert progress.step("build", 0)
    progress.start("tactics", "build", 10)
    progress.step("tactics", 4)
    assert seen[-1][0] == "refine: tactics"
    assert seen[-1][1] == pytest.approx(0.25 + 0.5 / 4)
    progress.start("timing", "tactics", 2)
    progress.step("timing", 0)
    assert seen[-1][1] == pytest.approx(0.25 + 0.55 / 4)
    progress.finish("timing")
    progress.finish("tactics")
    progress.step("build", 1)
    assert seen[-1][1] == pytest.approx(0.5)
    progress.start("again", "build", 2)
    assert seen[-1][1] == pytest.approx(0.5)
    progress.finish("build")
    assert seen[-1] == ("refine: build", 1.0)
    fractions = [done for _, done in seen]
    assert fractions == sorted(fractions)
    assert progress.step("unknown", 3)  # a phase that was never started: TensorRT is free to do so


def test_a_cancelled_build_stays_cancelled() -> None:
    pressed = False
    progress = BuildProgress("x", lambda stage, done: None, lambda: pressed)
    progress.start("build", None, 3)
    assert progress.step("build", 0)
    pressed = True
    assert not progress.step("build", 1)
    pressed = False
    assert not progress.step("build", 2)


def entry(name: str, datatype: str, nodes: list[str], kind: str = "kgen", tactic: str = "") -> dict[str, object]:
    return {"Name": name, "LayerType": kind, "TacticName": tactic, "Inputs": [],
            "Outputs": [{"Name": "o", "Format/Datatype": datatype}],
            "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)}  # fmt: skip


def test_the_inspectors_layers_are_compared_with_the_graphs_types() -> None:
    layers = [
        entry("a", "Half", ["/mm"], "gemm", "sm80_xmma_gemm_f16f16"),
        entry("b", "Row major linear FP32", ["/mm", "/mul"]),
        entry("c", "Float", ["/norm", "/mul"]),
        entry("d", "Thirty-two wide channel vectorized row major Int8 format.", ["/q"]),
        entry("e", "Half", ["/softmax"], "kgen", "_gemm_mha_v2_0x9a"),
        entry("f", "Float", []),
        {"Name": "bare"},
    ]
    types = {"/mm": {"fp16"}, "/mul": {"fp16"}, "/norm": {"fp32"}, "/q": {"int8"}, "/softmax": {"fp16"}}
    report = read_layers("refine", json.dumps({"Layers": layers}), types)
    assert report.detailed
    assert [layer.name for layer in report.silent] == ["b"]  # c holds a norm that is fp32 in the graph, f is unknown
    assert report.achieved == {"fp16": 2, "fp32": 3, "int8": 1}
    assert report.layers[1].nodes == ("/mm", "/mul")
    assert report.fused_attentions == 1
    assert not any(layer.fused_attention for layer in read_layers("x", '[{"Name": "mhandler_alpha"}]', {}).layers)


def test_an_answer_that_is_none_is_an_error() -> None:
    for text in ("", "{}", '{"Layers": 3}', "null"):
        with pytest.raises(EngineError, match="gave no list of layers"):
            read_layers("refine", text, {})


def test_costs_are_counted_by_hand(tiny_bundle: Path) -> None:
    for slots in (1, 3):
        cost = graph_cost(tiny_bundle / "refine.onnx", slots)
        assert cost.flops == pytest.approx(slots * load_bundle(tiny_bundle).step_gflop * 1e9, abs=slots * 1000)
        assert cost.unknown == ()
        assert cost.product_types == {"fp32": cost.flops}
    assert graph_cost(tiny_bundle / "encode.onnx", 1).flops == 0


def small(weight_type: str) -> onnx.ModelProto:
    """y = x @ w and z = y * 2 over x [slots, 4], w [4, 8]; int8: both sides through Q/DQ."""
    w = np.ones((4, 8), np.float32)
    nodes, constants = [], [numpy_helper.from_array(np.float32(2), "two")]
    left, right = "x", "w"
    if weight_type == "int8":
        constants += [numpy_helper.from_array(np.ones((4, 8), np.int8), "w8"), numpy_helper.from_array(np.float32(1), "s"),
                      numpy_helper.from_array(np.int8(0), "zero")]  # fmt: skip
        nodes += [helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["xq"]),
                  helper.make_node("DequantizeLinear", ["xq", "s", "zero"], ["xd"]),
                  helper.make_node("DequantizeLinear", ["w8", "s", "zero"], ["wd"])]  # fmt: skip
        left, right = "xd", "wd"
    else:
        constants.append(numpy_helper.from_array(w, "w"))
    nodes += [helper.make_node("MatMul", [left, right], ["y"]), helper.make_node("Mul", ["y", "two"], ["z"])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["slots", 4])],
                              [helper.make_tensor_value_info("z", FLOAT, ["slots", 8])], constants)  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_quantized_products_count_as_their_type_with_the_bytes_as_stored() -> None:
    plain, quantized = count(small("float"), 5), count(small("int8"), 5)
    assert (plain.flops, quantized.flops) == (2 * 4 * 5 * 8, 2 * 4 * 5 * 8)
    assert plain.product_types == {"fp32": 320}
    assert quantized.product_types == {"int8": 320}
    assert lowest_precision([plain, quantized]) == "int8"
    assert plain.weight_bytes == 4 * 8 * 4 + 4
    assert quantized.weight_bytes == 4 * 8 + 4
    product = quantized.nodes[0]
    assert product.weights == (("w8", 32),)
    assert product.moved == 5 * 4 + 5 * 8 * 4  # x as int8, y as fp32
    assert plain.peak == (5 * 8 + 5 * 8) * 4  # y and z
    assert plain.boundary == (5 * 4 + 5 * 8) * 4


def test_the_types_of_a_nodes_outputs_are_those_of_the_graph() -> None:
    model = small("int8")
    values = sized_values(model, 2)
    types = node_types([(n.name or n.op_type, list(n.output)) for n in model.graph.node], values)
    assert types["QuantizeLinear"] == {"int8"}
    assert types["MatMul"] == {"fp32"}
    assert values["y"].shape == (2, 8)
