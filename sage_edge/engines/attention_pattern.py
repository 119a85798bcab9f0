"""Attention as TensorRT's fused kernels want it, found in an ONNX graph.

TensorRT fuses MatMul -> [+ mask] -> Softmax -> MatMul over [slots, heads, positions, size], with the scale applied to
queries or keys *before* the first product. Casts and Q/DQ may stand between (they are what a strongly typed network says
its precision with). Further conditions of the kernels: 16 <= size <= 256 and a multiple of 8 for FP16 and BF16; size 16,
32 or 64 and at most 512 positions for INT8; FP32 has no fused kernel (NVIDIA: TensorRT developer guide, "multi-head
attention fusion"). Whether TensorRT then does fuse is its own decision; the layer report of the built engine says.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from sage_edge.engines.graph_cost import Value
from sage_edge.engines.onnx_graph import Graph, attribute

BETWEEN = ("Cast", "QuantizeLinear", "DequantizeLinear", "Identity")


@dataclass(frozen=True)
class Attention:
    """One attention layer. problem: why it cannot be fused, empty if it can; change: what to do about it."""

    softmax: str
    heads: int
    size: int
    positions: int
    problem: str
    change: str


def find_attentions(graph: Graph, values: dict[str, Value]) -> list[Attention]:
    """Every Softmax over the positions of something with heads ([slots, heads, positions, positions])."""
    found = []
    for node in graph.nodes:
        if node.op_type == "Softmax" and (value := values.get(node.input[0])) is not None and len(value.shape) == 4:
            found.append(_attention(graph, values, node, value))
    return found


def _attention(graph: Graph, values: dict[str, Value], softmax: NodeProto, scores: Value) -> Attention:
    heads, positions = scores.shape[1], scores.shape[3]

    def answer(problem: str, change: str, size: int = 0) -> Attention:
        return Attention(softmax.name or softmax.output[0], heads, size, positions, problem, change)

    if attribute(softmax, "axis", -1) not in (-1, 3):
        return answer("the softmax is not over the last axis", "export attention with softmax(dim=-1)")
    before = _maker(graph, softmax.input[0])
    if before is not None and before.op_type in ("Mul", "Div"):
        return answer(
            "the scale is applied after the first product", "multiply the queries by the scale before q @ k^T"
        )
    if before is not None and before.op_type in ("Add", "Where"):  # a mask
        sides = [maker for name in before.input if (maker := _maker(graph, name)) and maker.op_type == "MatMul"]
        before = sides[0] if sides else before
    if before is None or before.op_type != "MatMul":
        return answer(
            "no product of queries and keys in front of the softmax", "export attention as q @ k^T, softmax, @ v"
        )
    if not _scaled_before(graph, before):
        return answer(
            "no scale on queries or keys before the first product", "multiply the queries by size ** -0.5 first"
        )
    after = _readers(graph, softmax.output[0])
    if len(after) != 1 or after[0].op_type != "MatMul":
        return answer(
            "the softmax is read by something other than one product", "read attention weights from nothing else"
        )
    query, out = values.get(before.input[0]), values.get(after[0].output[0])
    if query is None or len(query.shape) != 4 or out is None or len(out.shape) != 4:
        return answer(
            "queries and values are not [slots, heads, positions, size]", "split the heads before the products"
        )
    size = query.shape[3]
    first, second = _type(graph, values, before.input[0]), _type(graph, values, after[0].input[1])
    if first == "int8" or second == "int8":
        if size not in (16, 32, 64) or positions > 512:
            return answer(f"int8 needs a head size of 16, 32 or 64 and at most 512 positions, found {size} and {positions}",
                          "keep the products of attention in fp16", size)  # fmt: skip
    elif not 16 <= size <= 256 or size % 8:
        return answer(
            f"the head size {size} is not a multiple of 8 within 16..256", "choose another number of heads", size
        )
    return answer("", "", size)


def _maker(graph: Graph, name: str) -> NodeProto | None:
    """The node that makes a value, looking through casts and Q/DQ."""
    node = graph.maker.get(name)
    while node is not None and node.op_type in BETWEEN:
        node = graph.maker.get(node.input[0])
    return node


def _readers(graph: Graph, name: str) -> list[NodeProto]:
    found: list[NodeProto] = []
    for node in graph.readers.get(name, []):
        found += _readers(graph, node.output[0]) if node.op_type in BETWEEN else [node]
    return found


def _scaled_before(graph: Graph, product: NodeProto) -> bool:
    """Whether a constant number is multiplied into queries or keys, whatever reshaping or turning stands between."""
    for name in product.input:
        waiting, seen = [name], 0
        while waiting and seen < 32:  # the head split, a rotation and casts are a dozen nodes
            node = graph.maker.get(waiting.pop())
            seen += 1
            if node is None or node.op_type in ("MatMul", "Gemm"):
                continue
            if node.op_type in ("Mul", "Div") and any(graph.scalar(side) is not None for side in node.input):
                return True
            waiting += [side for side in node.input if side and side not in graph.constants]
    return False


def _type(graph: Graph, values: dict[str, Value], name: str) -> str:
    """Type in which a product takes a value: that before a DequantizeLinear, else its own."""
    node = graph.maker.get(name)
    while node is not None and node.op_type in ("Transpose", "Reshape", "Identity"):
        node = graph.maker.get(node.input[0])
    source = node.input[0] if node is not None and node.op_type == "DequantizeLinear" else name
    return values[source].type if source in values else "unknown"
