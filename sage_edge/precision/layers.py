"""The layers of a refine graph that can be lowered: products with a constant weight inside a module.

The graph holds the cycles of a step unrolled, so one layer (one weight) stands for several products; they share their
precision, because a weight kept in two precisions would cost more than it saves. Each product has an activation range of
its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx

from sage_edge.engines.onnx_graph import Graph, is_standard
from sage_edge.errors import InputError

# `H_level.layers.0.mlp.down_proj` belongs to H. The projections between the levels of hrm-bidirectional belong to the
# level that they read.
_LEVEL = re.compile(r"(?:^|\.)([A-Za-z])_level\.")
_PROJECTION = re.compile(r"(?:^|\.)([a-z])_to_[a-z]\.")


@dataclass(frozen=True)
class Layer:
    """One weight [inner, columns] and the products that use it: names of their outputs and of their inputs, in order."""

    name: str
    module: str
    weight: str
    shape: tuple[int, int]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def work(self) -> int:
        """Multiplications for each row of a step: what a precision is multiplied with to get a cost."""
        return self.shape[0] * self.shape[1] * len(self.outputs)


def module_of(weight: str) -> str | None:
    """The module that a weight's name speaks of (`H`, `L`), or None."""
    if found := _LEVEL.search(weight):
        return found[1].upper()
    found = _PROJECTION.search(weight)
    return found[1].upper() if found else None


def find_layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """The layers of `model` in the order of their first product.

    Raises InputError when it has none: then it is no graph whose weights are named as ours are.
    """
    graph = Graph(model)
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.nodes:
        if is_standard(node, "MatMul") and node.input[1] in graph.constants and module_of(node.input[1]):
            uses.setdefault(node.input[1], []).append(node)
    layers = []
    for weight, nodes in uses.items():
        array = graph.array(weight)
        if array is None or array.ndim != 2 or array.dtype != np.float32:
            continue
        layers.append(
            Layer(
                name=re.sub(r"^model\.|\.weight$", "", weight),
                module=module_of(weight) or "",
                weight=weight,
                shape=(array.shape[0], array.shape[1]),
                outputs=tuple(node.output[0] for node in nodes),
                inputs=tuple(node.input[0] for node in nodes),
            )
        )
    if not layers:
        raise InputError(
            "the refine graph holds no layer that can be lowered: none of its products has a float32 weight whose name "
            "speaks of a module (`H_level.`, `L_level.`)"
        )
    return tuple(layers)


def modules(layers: tuple[Layer, ...]) -> tuple[str, ...]:
    """The modules of some layers, in alphabetical order."""
    return tuple(sorted({layer.module for layer in layers}))
