"""A lowered graph in the form that ONNX Runtime's CPU provider runs fastest: real INT8 products.

The graph is stripped to float32 (the CPU has no float16 arithmetic), fused like any other, and then every product of an INT8
layer becomes QuantizeLinear + MatMulIntegerToFloat. Activations are stored as uint8 with zero point 128: the same values as
the bundle's int8 codes, but the form that AVX512-VNNI multiplies (unsigned by signed); signed by signed runs twenty times
slower in ONNX Runtime 1.31. One quantised activation serves all products that read it (q, k and v; gate and up).

Where the CPU has no such instruction, ONNX Runtime adds every two products in 16 bits and saturates: unsigned by signed is
not slower there but wrong (`saturates`). Weights are then stored as uint8 with zero point 128 as well, which it adds in 32.

A convolution becomes QLinearConv, whose codes the next one reads as they are (ConvInteger runs ten times slower). A ReLU
behind it is the saturation of unsigned codes with zero point 0. There are 255 of them, so that values beyond the
calibrated range, which the bundle cuts off at code 127, are kept.

Scales are the bundle's calibrated ones. ONNX Runtime's DynamicQuantizeMatMul would take one scale from all slots together,
so that an answer would depend on its neighbours, which the runner contract rules out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from sage_edge.engines.fuse import fuse
from sage_edge.engines.onnx_graph import MICROSOFT, Graph, is_standard
from sage_edge.precision.qdq import stripped
from sage_edge.precision.rewrite import is_int8_weight, quantise_weight
from sage_edge.specs import Array

MIDDLE = 128  # uint8 code of zero


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 by int8 are wrong on this CPU. Asked of itself, for one row and several: it has
    other code for either."""
    import onnxruntime as ort

    depth, width = 64, 32
    weight = numpy_helper.from_array(np.full((depth, width), 127, np.int8), "w")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["n", depth])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT32, ["n", width])
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "probe", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = (session.run(None, {"x": np.full((rows, depth), 255, np.uint8)})[0] for rows in (1, 8))
    return any((got != 255 * 127 * depth).any() for got in found)


def int8_form(lowered: onnx.ModelProto, unsigned: bool | None = None) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The CPU form of a lowered graph, and how often each pattern was fused, INT8 products among them.

    unsigned: weights as uint8 with zero point 128; None: where this CPU needs it.
    """
    plain = stripped(lowered)
    model = plain.model
    patterns = fuse(model).patterns()
    graph = Graph(model)
    work = _Quantise(plain.scales, saturates() if unsigned is None else unsigned)
    counts = {"int8_convolution": graph.rewrite(work.convolution), "int8_product": graph.rewrite(work.product)}
    graph.write()
    return model, {**patterns, **counts}


@dataclass
class _Quantise:
    """Matchers for `Graph.rewrite`; `codes` holds the activations that are quantised already."""

    scales: dict[str, float]
    unsigned: bool  # how weights are stored
    codes: dict[str, list[str]] = field(default_factory=dict)

    def convolution(self, graph: Graph, node: NodeProto) -> list[NodeProto] | None:
        """conv(x, W), with the ReLU behind it, where x, W and the result are calibrated."""
        result = node.output[0]
        positive = is_standard(node, "Relu")
        conv = graph.made(node.input[0], "Conv") if positive else node if is_standard(node, "Conv") else None
        if conv is None or not {result, conv.input[0]} <= set(self.scales) or not is_int8_weight(conv.input[1]):
            return None
        weight = graph.array(conv.input[1])
        if weight is None:
            return None
        stored = self._weight(graph, conv.input[1], weight, 0)
        new, activation = self._activation(graph, conv.input[0])
        values = self._coded(graph, result, 0 if positive else MIDDLE)
        inputs = [*activation, *stored, *values[1:]]
        integer = helper.make_node("QLinearConv", inputs, values[:1], name=values[0])
        integer.attribute.extend(conv.attribute)
        return [*new, integer, helper.make_node("DequantizeLinear", values, [result], name=result)]

    def product(self, graph: Graph, node: NodeProto) -> list[NodeProto] | None:
        """x @ W with a calibrated x and an INT8 weight."""
        if not is_standard(node, "MatMul") or node.input[0] not in self.scales or not is_int8_weight(node.input[1]):
            return None
        weight = graph.array(node.input[1])
        if weight is None or weight.ndim != 2:
            return None
        stored, scale, weight_zero = self._weight(graph, node.input[1], weight, 1)
        new, (activation, activation_scale, zero) = self._activation(graph, node.input[0])
        inputs = [activation, stored, activation_scale, scale, zero, weight_zero]
        product = helper.make_node(
            "MatMulIntegerToFloat", inputs, list(node.output), name=node.output[0], domain=MICROSOFT
        )
        return [*new, product]

    def _weight(self, graph: Graph, name: str, weight: Array, axis: int) -> tuple[str, str, str]:
        """Codes, scales and zero point. The weight is what the bundle's codes stand for, so that quantising it again gives
        these."""
        codes, scales = quantise_weight(weight, "int8", axis)
        middle, kind = (MIDDLE, np.uint8) if self.unsigned else (0, np.int8)
        return (
            graph.constant(f"{name}.codes", lambda: (codes.astype(np.int16) + middle).astype(kind)),
            graph.constant(f"{name}.scale", lambda: scales),
            graph.constant("middle", lambda: np.array(middle, kind)),
        )

    def _coded(self, graph: Graph, name: str, zero: int) -> list[str]:
        """The names of an activation's codes, scale and zero point, remembered for its other readers."""
        self.codes[name] = [
            f"{name}/codes",
            graph.constant(f"{name}.scale", lambda: np.array(self.scales[name], np.float32)),
            graph.constant(f"zero.{zero}", lambda: np.array(zero, np.uint8)),
        ]
        return self.codes[name]

    def _activation(self, graph: Graph, name: str) -> tuple[list[NodeProto], list[str]]:
        """uint8 codes of an activation with scale and zero point; the node that makes them at the first use only."""
        if name in self.codes:
            return [], self.codes[name]
        values = self._coded(graph, name, MIDDLE)
        node = helper.make_node("QuantizeLinear", [name, values[1], values[2]], [values[0]], name=values[0])
        return [node], values
