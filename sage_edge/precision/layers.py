"""The layers of a graph that can be lowered: products and convolutions with a constant weight inside a module.

The graph holds the cycles of a step unrolled, so one layer (one weight) stands for several products; they share their
precision, because a weight kept in two precisions would cost more than it saves. Each product has an activation range of
its own. "Product" stands for either kind where no difference is made.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto

from sage_edge.bundle import LowerableName
from sage_edge.engines.onnx_graph import Graph, attribute, is_standard
from sage_edge.errors import InputError

# `H_level.layers.0.mlp.down_proj` belongs to H. The projections between the levels of hrm-bidirectional belong to the
# level that they read. A model of one level calls it `core`, of several scales `core_fine`, `core_coarse` ..., and what
# leads to them in its encode graph `core_embed`.
_LEVEL = re.compile(r"(?:^|\.)([A-Za-z])_level\.")
_PROJECTION = re.compile(r"(?:^|\.)([a-z])_to_[a-z]\.")
_CORE = re.compile(r"(?:^|\.)(core(?:_[a-z0-9]+)*)\.")

LOWERABLE: tuple[LowerableName, ...] = ("encode", "refine")


@dataclass(frozen=True)
class Layer:
    """One weight and the products that use it: names of their outputs and of their inputs, in order.

    shape: (inner, columns) of a product's weight, [out, in, h, w] of a convolution's. results: for each convolution the
    value that is rounded to 8 bits behind it: its output, or that of the ReLU which alone reads it; empty for products.
    work: multiplications of a step (of one run of the encode graph), for each row of its products.
    """

    name: str
    module: str
    weight: str
    shape: tuple[int, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    work: int
    results: tuple[str, ...] = ()
    graph: LowerableName = "refine"

    @property
    def is_convolution(self) -> bool:
        return len(self.shape) == 4

    @property
    def axis(self) -> int:
        """Of the weight: where its output channels lie, each with a scale of its own."""
        return 0 if self.is_convolution else 1


def module_of(weight: str) -> str | None:
    """The module that a weight's name speaks of (`H`, `L`, `core`, `core_fine` ...), or None."""
    if found := _LEVEL.search(weight) or _PROJECTION.search(weight):
        return found[1].upper()
    found = _CORE.search(weight)
    return found[1] if found else None


def find_layers(model: onnx.ModelProto, name: LowerableName = "refine") -> tuple[Layer, ...]:
    """The layers of `model`, the graph `name` of a bundle, in the order of their first product.

    Raises InputError when a refine graph has none: then it is no graph whose weights are named as ours are.
    """
    graph = Graph(model)
    uses: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        if (is_standard(node, "MatMul") or _plain_convolution(node)) and module_of(node.input[1]):
            uses.setdefault(node.input[1], []).append(node)
    layers = [layer for weight, nodes in uses.items() if (layer := _layer(graph, weight, nodes, name)) is not None]
    if not layers and name == "refine":
        raise InputError(
            "the refine graph holds no layer that can be lowered: none of its products has a float32 weight whose name "
            "speaks of a module (`H_level.`, `L_level.`, `core.`)"
        )
    return tuple(layers)


def _plain_convolution(node: NodeProto) -> bool:
    """Over two axes, in one group, without bias, with explicit padding."""
    plain = is_standard(node, "Conv") and len([name for name in node.input if name]) == 2
    return plain and attribute(node, "group", 1) == 1 and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"


def _layer(graph: Graph, weight: str, nodes: list[NodeProto], name: LowerableName) -> Layer | None:
    """The layer of a weight, or None when that cannot be lowered."""
    array = graph.array(weight)
    operator = nodes[0].op_type
    if array is None or array.dtype != np.float32 or array.ndim != (4 if operator == "Conv" else 2):
        return None
    rows, results = len(nodes), tuple[str, ...]()
    if operator == "Conv":
        results = tuple(_rounded(graph, node) for node in nodes)
        # Rounding the carry would add up from step to step, and an estimate must not be coarser than its signals say.
        if name == "refine" and graph.outputs & {*results}:
            return None
        places = [(graph.shape(node.output[0]) or ())[2:] for node in nodes]
        rows = sum(math.prod(n for n in place if isinstance(n, int)) for place in places)
    return Layer(
        name=re.sub(r"^model\.|\.weight$", "", weight),
        module=module_of(weight) or "",
        weight=weight,
        shape=tuple(array.shape),
        outputs=tuple(node.output[0] for node in nodes),
        inputs=tuple(node.input[0] for node in nodes),
        work=array.size * rows,
        results=results,
        graph=name,
    )


def _rounded(graph: Graph, convolution: NodeProto) -> str:
    """Where the result of a convolution is rounded: behind the ReLU, if nothing else reads it."""
    out = convolution.output[0]
    readers = graph.readers.get(out, [])
    alone = len(readers) == 1 and is_standard(readers[0], "Relu") and out not in graph.outputs
    return str(readers[0].output[0] if alone else out)


def modules(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    """The modules of some layers, in alphabetical order."""
    return tuple(sorted({layer.module for layer in layers}))
