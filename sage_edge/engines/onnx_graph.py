"""An ONNX graph with the look-ups that rewriting needs: makers, readers, constants and proven shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"

Array = npt.NDArray[np.generic]
Shape = tuple[int | str, ...]


class Graph:
    """A graph being rewritten: who makes a value, who reads it, its constant, its shape."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        # An initializer that is an input too is only a default: the caller may feed another value.
        fed = {value.name for value in model.graph.input}
        self.constants: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer if t.name not in fed}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.added: dict[str, TensorProto] = {}
        self.shapes = known_shapes(model)
        self.index()

    def index(self) -> None:
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.reads = Counter(name for node in self.nodes for name in reads_of(node))
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def rewrite(self, matcher: Callable[[Graph, NodeProto], list[NodeProto] | None]) -> int:
        """Replace every node for which `matcher` gives new ones; returns how many it replaced."""
        matched = 0
        nodes: list[NodeProto] = []
        for node in self.nodes:
            new = matcher(self, node)
            nodes.extend([node] if new is None else new)
            matched += new is not None
            for replacement in new or ():
                self.maker.update((name, replacement) for name in replacement.output if name)
        if matched:
            self.nodes = sorted_nodes(self._needed(nodes))
            self.index()
        return matched

    def _needed(self, nodes: list[NodeProto]) -> list[NodeProto]:
        """The nodes that the outputs depend on. A value that a new node makes too no longer needs its former maker."""
        wanted, waiting = set[int](), list(self.outputs)
        while waiting:
            node = self.maker.get(waiting.pop())
            if node is not None and id(node) not in wanted:
                wanted.add(id(node))
                waiting.extend(reads_of(node))
        return [node for node in nodes if id(node) in wanted]

    def write(self) -> None:
        """Put the rewritten nodes and the constants that they read into the model."""
        graph = self.model.graph
        was_read = {name for node in graph.node for name in reads_of(node)} - self.outputs
        del graph.node[:]
        graph.node.extend(self.nodes)
        keep = [t for t in graph.initializer if t.name in self.reads or t.name not in was_read]
        values = [v for v in graph.value_info if v.name in self.maker]
        del graph.initializer[:], graph.value_info[:]
        graph.initializer.extend([*keep, *(t for t in self.added.values() if t.name in self.reads)])
        graph.value_info.extend(values)
        if MICROSOFT not in {entry.domain for entry in self.model.opset_import}:
            self.model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def made(self, name: str, *ops: str) -> NodeProto | None:
        """The node that makes `name`, if it is one of these standard operators."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type in ops and node.domain in ("", "ai.onnx") else None

    def array(self, name: str) -> Array | None:
        """The constant called `name`, or None when it is computed."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def scalar(self, name: str) -> float | None:
        array = self.array(name)
        return float(array.item()) if array is not None and array.size == 1 else None

    def shape(self, name: str) -> Shape | None:
        """The shape, when `name` is float32 and every axis is a number or a symbol."""
        return self.shapes.get(name)

    def constant(self, name: str, make: Callable[[], Array]) -> str:
        """A constant of ours, made once and shared; `name` says what it is."""
        if name not in self.added:
            unique = f"fuse.{name}"
            while unique in self.constants or unique in self.maker:
                unique += "_"
            self.added[name] = self.constants[unique] = numpy_helper.from_array(np.ascontiguousarray(make()), unique)
        return self.added[name].name


def is_standard(node: NodeProto, *ops: str) -> bool:
    return node.op_type in ops and node.domain in ("", "ai.onnx")


def attribute(node: NodeProto, name: str, default: object) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def reads_of(node: NodeProto) -> list[str]:
    """Names that a node reads, those that its subgraphs take from outside included."""
    names = [name for name in node.input if name]
    for field in node.attribute:
        for graph in (field.g, *field.graphs):
            names += [name for inner in graph.node for name in reads_of(inner)] + [o.name for o in graph.output]
    return names


def sorted_nodes(nodes: list[NodeProto]) -> list[NodeProto]:
    """Stable topological order."""
    made = {name for node in nodes for name in node.output if name}
    ready: set[str] = set()
    result: list[NodeProto] = []
    waiting = nodes
    while waiting:
        later = []
        for node in waiting:
            if all(name in ready or name not in made for name in reads_of(node)):
                result.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ValueError("the graph has a cycle")
        waiting = later
    return result


def known_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of all float32 values, with the slot axis carried through reshapes by name.

    Shape inference gives every Reshape with a -1 a new symbol, after which no two shapes can be proven equal. Where
    the axes behind the first hold equally many elements before and after, that -1 is the first axis itself, and "0"
    (take it from the input) says so. This is done on a copy without the weights; the model keeps its reshapes.
    """
    scratch = onnx.ModelProto()
    scratch.opset_import.extend(model.opset_import)
    scratch.ir_version, graph, source = model.ir_version, scratch.graph, model.graph
    graph.name = "shapes"
    for tensor in source.initializer:
        if tensor.data_type == TensorProto.INT64:
            graph.initializer.append(tensor)  # shapes, axes, slice bounds: inference needs their values
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    given = {tensor.name for tensor in source.initializer}
    graph.input.extend(value for value in source.input if value.name not in given)
    graph.output.extend(source.output)
    graph.node.extend(source.node)
    known = _inferred(scratch)
    targets = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for i, node in enumerate(graph.node):
        if not is_standard(node, "Reshape"):
            continue
        before, target = known.get(node.input[0], ()), targets.get(node.input[1])
        if target is None or len(target) < 2 or target[0] != -1 or min(target[1:]) < 1:
            continue
        rest = [dim for dim in before[1:] if isinstance(dim, int)]
        if rest and len(rest) == len(before) - 1 and math.prod(rest) == math.prod(target[1:]):
            name = f"{node.output[0]}/target/{i}"
            graph.initializer.append(numpy_helper.from_array(np.array([0, *target[1:]], np.int64), name))
            del node.attribute[:]  # allowzero would take the 0 for an empty axis
            node.input[1] = name
    return {
        name: shape
        for name, dims in _inferred(scratch).items()
        if len(shape := tuple(dim for dim in dims if dim is not None)) == len(dims)
    }


def _inferred(model: onnx.ModelProto) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes of the float32 values that shape inference finds; None where it knows nothing of an axis."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    result: dict[str, tuple[int | str | None, ...]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.elem_type == TensorProto.FLOAT and tensor.HasField("shape"):
            result[value.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim
            )
    return result
