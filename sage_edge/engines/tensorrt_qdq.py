"""Where QuantizeLinear and DequantizeLinear must stand for TensorRT to multiply in INT8 or FP8.

Facts from NVIDIA's documentation, "Working with Quantized Types": symmetric, zero point 0; activations by one scale,
weights by one for each output channel; every Q is followed by a DQ; a product is quantized when *both* its inputs come
from a DQ; scales are known at build time. FP8 is float8e4m3fn.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from onnx import NodeProto, TensorProto

from sage_edge.engines.graph_cost import Value
from sage_edge.engines.onnx_graph import Graph, attribute

PASSING = ("Transpose", "Reshape", "Identity", "Cast")
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
QdqFinding = tuple[str, str, Literal["error", "note"], str, str]


def quantization_findings(graph: Graph, values: dict[str, Value]) -> Iterator[QdqFinding]:
    """(node, operator, severity, problem, what to change) for every rule that is broken."""
    for node in graph.nodes:
        label = node.name or node.output[0]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for severity, problem, change in _scales(graph, values, node):
                yield label, node.op_type, severity, problem, change
        if node.op_type == "QuantizeLinear":
            readers = graph.readers.get(node.output[0], [])
            if node.output[0] in graph.outputs or any(
                r.op_type != "DequantizeLinear" for r in _through(graph, readers)
            ):
                yield (
                    label,
                    node.op_type,
                    "error",
                    "its output is read by something other than DequantizeLinear",
                    ("let a DequantizeLinear follow every QuantizeLinear"),
                )
        if node.op_type in PRODUCTS:
            sides = [_source(graph, name) is not None for name in node.input[:2]]
            if any(sides) and not all(sides):
                which = "weights" if sides[1] else "activations"
                yield (
                    label,
                    node.op_type,
                    "note",
                    f"only its {which} are quantized: it multiplies in floating point",
                    ("quantize both sides, or neither"),
                )
        if node.op_type == "DequantizeLinear" and not _follows_convolution(graph, node):
            readers = _through(graph, graph.readers.get(node.output[0], []))
            if readers and not any(r.op_type in PRODUCTS for r in readers):
                yield (
                    label,
                    node.op_type,
                    "note",
                    f"no product reads it, but {readers[0].op_type}: rounding without speed",
                    ("quantize only what products read"),
                )


def _follows_convolution(graph: Graph, dequantize: NodeProto) -> bool:
    """Whether it stands behind a convolution and its ReLU: then the convolution writes 8 bits, which is faster."""
    quantize = graph.made(dequantize.input[0], "QuantizeLinear")
    relu = graph.made(quantize.input[0], "Relu") if quantize is not None else None
    source = relu or quantize
    return source is not None and graph.made(source.input[0], "Conv") is not None


def _scales(
    graph: Graph, values: dict[str, Value], node: NodeProto
) -> Iterator[tuple[Literal["error", "note"], str, str]]:
    source = node.input[0]
    quantized = node.output[0] if node.op_type == "QuantizeLinear" else source
    tensor = graph.constants.get(quantized)
    kinds = {value.data_type for name in node.input[2:3] if (value := graph.constants.get(name)) is not None}
    kinds |= {tensor.data_type} if tensor is not None else set()
    if TensorProto.FLOAT8E5M2 in kinds:
        yield "error", "float8e5m2", "use float8e4m3fn, the only FP8 format that TensorRT multiplies"
    if TensorProto.UINT8 in kinds or (quantized in values and values[quantized].type == "uint8"):
        yield "error", "uint8", "quantize symmetrically to int8"
    scale = graph.array(node.input[1])
    if scale is None:
        yield "error", "its scale is computed", "calibrate, and make the scale a constant"
        return
    numbers = np.asarray(scale, np.float64)
    if not np.isfinite(numbers).all() or (numbers <= 0).any():
        yield "error", "its scale holds zero, a negative number, NaN or Inf", "calibrate again"
    if numbers.size <= 1:
        return
    constant = source in graph.constants or _constant_source(graph, source)
    if not constant:
        yield (
            "error",
            "an activation with more than one scale",
            "use one scale for an activation, per-channel ones for weights",
        )
        return
    shape = values[source].shape if source in values else ()
    axis = int(str(attribute(node, "axis", 1))) % max(1, len(shape))
    if shape and (numbers.ndim != 1 or shape[axis] != numbers.size):
        yield "error", f"{numbers.size} scales for an axis of {shape[axis]}", "give one scale for each output channel"
    elif (expected := _output_axis(graph, node, len(shape))) not in (None, axis):
        problem = f"scales along axis {axis}, which the product sums over"
        yield "error", problem, f"put the scales on the output channels, axis {expected}"


def _output_axis(graph: Graph, node: NodeProto, dimensions: int) -> int | None:
    """The axis of a weight's output channels: the first of filters; columns of x @ w, rows where a Transpose stands between.
    None where what reads it tells nothing."""
    readers = graph.readers.get(node.output[0], [])
    behind = _through(graph, readers)
    turned = any(reader.op_type == "Transpose" for reader in readers)
    turned |= any(reader.op_type == "Gemm" and attribute(reader, "transB", 0) for reader in readers)
    if node.op_type == "QuantizeLinear" and behind and behind[0].op_type == "DequantizeLinear":
        inner = _output_axis(graph, behind[0], dimensions)
        return 1 - inner if dimensions == 2 and inner is not None and turned else inner
    if dimensions == 4:
        return 0 if any(reader.op_type == "Conv" for reader in behind) else None
    return int(not turned) if dimensions == 2 else None


def _constant_source(graph: Graph, name: str) -> bool:
    """Whether a value is made of constants alone (quantized weights may be stored in fp32 behind a QuantizeLinear)."""
    node = graph.maker.get(name)
    return (
        node is not None
        and node.op_type in ("QuantizeLinear", *PASSING)
        and (node.input[0] in graph.constants or _constant_source(graph, node.input[0]))
    )


def _source(graph: Graph, name: str) -> NodeProto | None:
    """The DequantizeLinear that a value comes from, looking through reshaping."""
    node = graph.maker.get(name)
    while node is not None and node.op_type in PASSING:
        node = graph.maker.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _through(graph: Graph, readers: list[NodeProto]) -> list[NodeProto]:
    """The readers behind reshaping."""
    found: list[NodeProto] = []
    for reader in readers:
        found += _through(graph, graph.readers.get(reader.output[0], [])) if reader.op_type in PASSING else [reader]
    return found
