"""From the portable, decomposed ONNX graph to the form that ONNX Runtime's CPU provider runs fastest.

Our graphs are plain opset 19 so that every parser takes them (see sage_edge.export.graph). On a CPU the small nodes
around the matrix products (transposes, splits, norms) cost a good part of the time, so `fuse` replaces known patterns
by ONNX Runtime's contrib operators. Matching is by structure, never by name, and only where constants and shapes are
proven; what is not recognised stays as it is.

A match puts its new node where the pattern's last node was and leaves the others; nodes that nobody reads any more are
pruned afterwards. So an inner value that is read elsewhere too simply stays alive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from sage_edge.engines.onnx_graph import MICROSOFT, Graph, Shape, attribute, is_standard

OLDEST_OPSET = 13  # since then Softmax and Split mean what the patterns below take them to mean
BLOCK = 8  # ONNX Runtime computes convolutions in blocks of at least so many output channels


@dataclass(frozen=True)
class FuseReport:
    """How often each pattern was fused; all counts zero: the graph is as it was."""

    attention: int = 0
    rms_norm: int = 0
    skip_rms_norm: int = 0
    rope: int = 0
    silu: int = 0
    projection: int = 0
    narrow_convolution: int = 0
    nodes_before: int = 0
    nodes_after: int = 0

    def patterns(self) -> dict[str, int]:
        """The counts alone, by the name of the pattern."""
        return {name: count for name, count in asdict(self).items() if not name.startswith("nodes_")}


def fuse(model: onnx.ModelProto) -> FuseReport:
    """Fuse the known patterns of `model` in place (float32 only, any batch size) and say what was fused."""
    before = len(model.graph.node)
    opset = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if opset.get("ai.onnx", 0) < OLDEST_OPSET:
        return FuseReport(nodes_before=before, nodes_after=before)
    graph = Graph(model)
    silu, rope, attention = graph.rewrite(_silu), graph.rewrite(_rope), graph.rewrite(_attention)
    norms, skips = graph.rewrite(_rms_norm), graph.rewrite(_skip_rms_norm)
    projection, narrow = graph.rewrite(_projection), graph.rewrite(_narrow_convolution)
    if silu or rope or attention or norms or projection or narrow:
        graph.write()
    return FuseReport(attention, norms - skips, skips, rope, silu, projection, narrow, before, len(model.graph.node))


def _silu(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """x * sigmoid(x)."""
    if not is_standard(node, "Mul") or graph.shape(node.output[0]) is None:
        return None
    for x, gate in (tuple(node.input), tuple(node.input)[::-1]):
        sigmoid = graph.made(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.input[0] == x:
            return [_node("QuickGelu", [x], node, alpha=1.0)]
    return None


def _rope(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """x * cos + concat(-high, low) * sin over x [slots, heads, positions, size], with tables of equal halves."""
    if not is_standard(node, "Add"):
        return None
    for left, right in (tuple(node.input), tuple(node.input)[::-1]):
        plain, turned = graph.made(left, "Mul"), graph.made(right, "Mul")
        cos = _constant_factor(graph, plain)
        sin = _constant_factor(graph, turned)
        concat = graph.made(sin[0], "Concat") if sin is not None else None
        if cos is None or sin is None or concat is None or len(concat.input) != 2:
            continue
        x = cos[0]
        shape = graph.shape(x)
        negated, split = graph.made(concat.input[0], "Neg"), graph.made(concat.input[1], "Split")
        if (
            shape is None
            or len(shape) != 4
            or shape != graph.shape(node.output[0])
            or negated is None
            or split is None
            or split.input[0] != x
        ):
            continue
        if list(split.output) != [concat.input[1], negated.input[0]] or not _halves(graph, split, shape):
            continue
        if attribute(concat, "axis", None) not in (-1, 3):
            continue
        low_cos, low_sin = _half_table(graph, cos[1], shape), _half_table(graph, sin[1], shape)
        if low_cos is None or low_sin is None:
            continue
        start = graph.constant("first_position", partial(np.zeros, 1, np.int64))
        return [_node("RotaryEmbedding", [x, start, low_cos, low_sin], node, interleaved=0)]
    return None


def _attention(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """softmax(scale * q @ k^T) @ v between the reshapes that split and join the heads."""
    transpose = graph.made(node.input[0], "Transpose") if is_standard(node, "Reshape") else None
    product = graph.made(transpose.input[0], "MatMul") if transpose is not None else None
    if transpose is None or product is None or attribute(transpose, "perm", None) != [0, 2, 1, 3]:
        return None
    softmax = graph.made(product.input[0], "Softmax")
    if softmax is None or attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    scores, scale = _scaled(graph, softmax.input[0])
    similarity = graph.made(scores, "MatMul")
    if similarity is None:
        return None
    query, query_scale = _scaled(graph, similarity.input[0])
    q = _heads(graph, query)
    k = _keys(graph, similarity.input[1])
    v = _heads(graph, product.input[1])
    if q is None or k is None or v is None or v.rotary is not None:
        return None
    joined = graph.shape(node.output[0])
    if joined is None or joined != (*q.shape[:2], math.prod(v.split)) or k.shape[:2] != v.shape[:2]:
        return None
    if not (q.shape[0] == k.shape[0] and q.split == k.split and q.split[0] == v.split[0] and scale * query_scale > 0):
        return None
    new, names = [], []
    for role, side in (("q", q), ("k", k), ("v", v)):
        if side.rotary is not None:
            # The rotation moves in front of the head split, where the operator takes [slots, positions, hidden].
            name = f"{node.output[0]}/{role}"
            rotary = helper.make_node("RotaryEmbedding", [side.name, *side.rotary.input[1:]], [name], name=name,
                                      domain=MICROSOFT, interleaved=0)  # fmt: skip
            graph.shapes[name] = side.shape
            new.append(rotary)
        names.append(side.name if side.rotary is None else new[-1].output[0])
    return [*new, _node("MultiHeadAttention", names, node, num_heads=q.split[0], scale=scale * query_scale)]


@dataclass(frozen=True)
class _Side:
    """One input of an attention: its value before the heads are split, its shape, (heads, size), its rotation."""

    name: str
    shape: Shape
    split: tuple[int, int]
    rotary: NodeProto | None


def _heads(graph: Graph, name: str) -> _Side | None:
    """`name` [slots, heads, positions, size] traced back to [slots, positions, hidden]."""
    rotary = graph.maker.get(name)
    if rotary is None or rotary.op_type != "RotaryEmbedding" or rotary.domain != MICROSOFT:
        rotary = None
    transpose = graph.made(name if rotary is None else rotary.input[0], "Transpose")
    if transpose is None or attribute(transpose, "perm", None) != [0, 2, 1, 3]:
        return None
    return _split_heads(graph, transpose.input[0], rotary)


def _keys(graph: Graph, name: str) -> _Side | None:
    """Like `_heads` for the transposed keys [slots, heads, size, positions]."""
    transpose = graph.made(name, "Transpose")
    permutation = attribute(transpose, "perm", None) if transpose is not None else None
    if transpose is None or permutation not in ([0, 1, 3, 2], [0, 2, 3, 1]):
        return None
    # The exporter merges the two transposes of unrotated keys into one.
    return (_heads if permutation == [0, 1, 3, 2] else _split_heads)(graph, transpose.input[0])


def _split_heads(graph: Graph, name: str, rotary: NodeProto | None = None) -> _Side | None:
    reshape, shape = graph.made(name, "Reshape"), graph.shape(name)
    source = graph.shape(reshape.input[0]) if reshape is not None else None
    if reshape is None or source is None or shape is None or len(source) != 3 or len(shape) != 4:
        return None
    heads, size = shape[2:]
    if not isinstance(heads, int) or not isinstance(size, int) or source != (*shape[:2], heads * size):
        return None
    return _Side(reshape.input[0], source, (heads, size), rotary)


def _rms_norm(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """x / sqrt(mean(x^2) + eps) over the last axis."""
    if not is_standard(node, "Mul", "Div"):
        return None
    pairs = [tuple(node.input)] if node.op_type == "Div" else [tuple(node.input), tuple(node.input)[::-1]]
    for x, factor in pairs:
        inverse = graph.made(factor, "Reciprocal") if node.op_type == "Mul" else None
        root = graph.made(inverse.input[0] if inverse is not None else factor, "Sqrt")
        if root is None or (node.op_type == "Mul" and inverse is None):
            continue
        epsilon = _constant_factor(graph, graph.made(root.input[0], "Add"))
        mean = graph.made(epsilon[0], "ReduceMean") if epsilon is not None else None
        square = graph.made(mean.input[0], "Pow", "Mul") if mean is not None else None
        eps, shape = graph.scalar(epsilon[1]) if epsilon is not None else None, graph.shape(x)
        if mean is None or square is None or eps is None or eps <= 0:
            continue
        if shape is None or not isinstance(shape[-1], int) or shape != graph.shape(node.output[0]):
            continue
        squared = square.input[0] == x
        squared &= square.input[1] == x if square.op_type == "Mul" else graph.scalar(square.input[1]) == 2
        if not squared or _axes(graph, mean) not in ([-1], [len(shape) - 1]) or not attribute(mean, "keepdims", 1):
            continue
        gain = graph.constant(f"ones_{shape[-1]}", partial(np.ones, shape[-1], np.float32))
        # ONNX Runtime registers this operator, older than RMSNormalization of opset 23, under the standard domain.
        return [_node("SimplifiedLayerNormalization", [x, gain], node, domain="", epsilon=eps, axis=-1)]
    return None


def _skip_rms_norm(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """The norm of a + b; the sum is an output too where it is read elsewhere."""
    if not is_standard(node, "SimplifiedLayerNormalization"):
        return None
    total = graph.made(node.input[0], "Add")
    if total is None:
        return None
    shapes = {graph.shape(name) for name in (*total.input, total.output[0])}
    shape = graph.shape(total.output[0])
    if len(shapes) != 1 or shape is None or len(shape) not in (2, 3):
        return None
    skip = _node("SkipSimplifiedLayerNormalization", [*total.input, node.input[1]], node,
                 epsilon=attribute(node, "epsilon", 1e-5))  # fmt: skip
    if graph.reads[total.output[0]] > 1 or total.output[0] in graph.outputs:
        skip.output.extend(["", "", total.output[0]])
    return [skip]


def _projection(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """split(x @ W) as one product per part: the parts of W are constants, so no copy of the result is needed."""
    product = graph.made(node.input[0], "MatMul") if is_standard(node, "Split") else None
    weight = graph.array(product.input[1]) if product is not None else None
    if product is None or weight is None or weight.ndim != 2:
        return None
    name, parts = product.input[1], len(node.output)
    users = graph.readers[name]
    # Only when every use of W is split alike: otherwise the file would hold W and its parts.
    if len(users) != graph.reads[name] or not all(_split_evenly(graph, user, name, parts) for user in users):
        return None
    names = [
        graph.constant(f"{name}.{i}", partial(np.ascontiguousarray, part))
        for i, part in enumerate(np.split(weight, parts, axis=1))
    ]
    return [
        helper.make_node("MatMul", [product.input[0], part], [out], name=out)
        for part, out in zip(names, node.output, strict=True)
    ]


def _narrow_convolution(graph: Graph, node: NodeProto) -> list[NodeProto] | None:
    """A convolution of many channels to less than a block of them, that keeps the size, as a transposed one: that is a
    product with all taps of all outputs and a sum, where a convolution would fill its block with zeros. Half the time for
    64 channels to 4."""
    weight = graph.array(node.input[1]) if is_standard(node, "Conv") and len(node.input) == 2 else None
    if weight is None or weight.ndim != 4 or weight.dtype != np.float32 or attribute(node, "group", 1) != 1:
        return None
    outputs, inputs, *size = weight.shape
    pads = [n // 2 for n in size] * 2
    plain = [attribute(node, name, [1, 1]) for name in ("strides", "dilations")] == [[1, 1], [1, 1]]
    if not plain or outputs >= BLOCK or inputs < 2 * BLOCK or not all(n % 2 for n in size) or size == [1, 1]:
        return None
    if attribute(node, "auto_pad", b"NOTSET") != b"NOTSET" or attribute(node, "pads", [0] * 4) != pads:
        return None
    turned = graph.constant(
        f"{node.input[1]}.turned", lambda: np.ascontiguousarray(weight[:, :, ::-1, ::-1].swapaxes(0, 1))
    )
    return [_node("ConvTranspose", [node.input[0], turned], node, domain="", pads=pads)]


def _split_evenly(graph: Graph, product: NodeProto, weight: str, parts: int) -> bool:
    """Whether `product` is x @ weight, read by nobody but one split of its last axis into equal parts."""
    out = product.output[0]
    shape, readers = graph.shape(out), graph.readers.get(out, [])
    if not is_standard(product, "MatMul") or product.input[1] != weight or shape is None or out in graph.outputs:
        return False
    if graph.reads[out] != 1 or len(readers) != 1 or not is_standard(readers[0], "Split"):
        return False
    split, width = readers[0], shape[-1]
    if attribute(split, "axis", 0) not in (-1, len(shape) - 1) or not isinstance(width, int) or width % parts:
        return False
    return [graph.shape(name) for name in split.output] == [(*shape[:-1], width // parts)] * parts


def _node(op: str, inputs: Sequence[str], replaced: NodeProto, domain: str = MICROSOFT, **attributes: Any) -> NodeProto:
    return helper.make_node(
        op, list(inputs), list(replaced.output), name=replaced.output[0], domain=domain, **attributes
    )


def _axes(graph: Graph, node: NodeProto) -> object:
    """The axes of a reduction: an input since opset 18, an attribute before."""
    if len(node.input) > 1 and node.input[1]:
        axes = graph.array(node.input[1])
        return None if axes is None else axes.tolist()
    return attribute(node, "axes", None)


def _constant_factor(graph: Graph, node: NodeProto | None) -> tuple[str, str] | None:
    """(computed operand, constant operand) of a commutative node."""
    if node is None:
        return None
    a, b = node.input
    return (a, b) if b in graph.constants else (b, a) if a in graph.constants else None


def _scaled(graph: Graph, name: str) -> tuple[str, float]:
    """`name` without a product by a constant number, and that number."""
    node = graph.made(name, "Mul", "Div")
    factor = _constant_factor(graph, node)
    number = graph.scalar(factor[1]) if factor is not None else None
    if node is None or factor is None or number is None or number == 0:
        return name, 1.0
    if node.op_type == "Div":
        return (name, 1.0) if factor[1] != node.input[1] else (factor[0], 1 / number)
    return factor[0], number


def _halves(graph: Graph, split: NodeProto, shape: Shape) -> bool:
    parts = [graph.shape(name) for name in split.output]
    half = (*shape[:-1], shape[-1] // 2) if isinstance(shape[-1], int) else None
    return attribute(split, "axis", 0) in (-1, len(shape) - 1) and parts == [half, half]


def _half_table(graph: Graph, name: str, shape: Shape) -> str | None:
    """Half of a rotary table [positions, size] whose two halves are equal, which is what the operator wants."""
    table = graph.array(name)
    if (
        table is None
        or table.dtype != np.float32
        or table.shape[-2:] != shape[-2:]
        or table.size != math.prod(table.shape[-2:])
    ):
        return None
    low, high = np.split(table.reshape(table.shape[-2:]), 2, axis=-1)
    return graph.constant(f"{name}.half", lambda: low) if np.array_equal(low, high) else None
