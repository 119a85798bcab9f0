"""What a graph costs at a given number of slots: multiplications, bytes, memory. Counted from the ONNX file alone.

Counted as a good engine would run it: Q/DQ, casts and reshapes are part of the product that they surround; an operator
between products works in place on what it reads first, while that is still near; and a product of quantized values counts
as arithmetic of that type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from sage_edge.engines.onnx_graph import attribute, is_standard
from sage_edge.errors import InputError
from sage_edge.specs import SLOTS

# Names of ONNX element types as this project says them, and their bytes (ONNX: TensorProto.DataType).
TYPES: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("fp32", 4), TensorProto.FLOAT16: ("fp16", 2), TensorProto.BFLOAT16: ("bf16", 2),
    TensorProto.DOUBLE: ("fp64", 8), TensorProto.FLOAT8E4M3FN: ("fp8", 1), TensorProto.FLOAT8E5M2: ("fp8", 1),
    TensorProto.INT8: ("int8", 1), TensorProto.UINT8: ("uint8", 1), TensorProto.INT4: ("int4", 1),
    TensorProto.INT32: ("int32", 4), TensorProto.INT64: ("int64", 8), TensorProto.BOOL: ("bool", 1),
}  # fmt: skip
# Values pass through these unchanged but for type or form; engines fold them into what reads them.
PASSING = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze",
           "Expand", "Shape", "Constant", "ConstantOfShape")  # fmt: skip
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
SMALL = 4096  # constants up to this many bytes may say shapes and stay in the copy that shape inference sees


@dataclass(frozen=True)
class Value:
    """A tensor at a fixed number of slots."""

    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class NodeCost:
    """One operator. flops: multiplications and additions; type: of the arithmetic; weights: (name, bytes) of each
    constant it reads, as stored; values: (name, bytes) of each computed value it fetches or puts down, under the name of the
    value that it was made of in place."""

    name: str
    op: str
    type: str
    flops: int
    weights: tuple[tuple[str, int], ...]
    values: tuple[tuple[str, int], ...]

    @property
    def moved(self) -> int:
        """Bytes of computed values read and written."""
        return sum(size for _, size in self.values)

    @property
    def is_product(self) -> bool:
        return self.op in PRODUCTS


@dataclass(frozen=True)
class GraphCost:
    """A graph at `slots` slots. peak: the most bytes of computed values alive at once, in the file's order of nodes;
    boundary: bytes of its inputs and outputs; unknown: operators whose shapes could not be inferred (not counted)."""

    slots: int
    nodes: tuple[NodeCost, ...]
    peak: int
    boundary: int
    unknown: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Of the matrix products; the rest is small beside them and bound by memory."""
        return sum(node.flops for node in self.nodes if node.is_product)

    @property
    def weight_bytes(self) -> int:
        """Each constant once."""
        return sum({name: size for node in self.nodes for name, size in node.weights}.values())

    @property
    def product_types(self) -> dict[str, int]:
        """Floating-point operations of the products by type of arithmetic."""
        found: dict[str, int] = {}
        for node in self.nodes:
            if node.is_product:
                found[node.type] = found.get(node.type, 0) + node.flops
        return found


def graph_cost(path: Path, slots: int) -> GraphCost:
    """Count the graph in `path`; every first axis called `slots` is taken to be `slots`."""
    model = onnx.load(str(path), load_external_data=False)
    return count(model, slots)


def count(model: onnx.ModelProto, slots: int) -> GraphCost:
    """As `graph_cost`; the model is not changed."""
    constants = {t.name: tensor_bytes(t) for t in model.graph.initializer}
    values = sized_values(model, slots)
    nodes, unknown = [], []
    origin: dict[str, str] = {name: name for name in constants}  # value -> the constant that it is made of alone
    lowered: dict[str, str] = {}  # value -> the quantized type that it was dequantized from
    place: dict[str, str] = {}  # value -> the value in whose place it stands
    for node in model.graph.node:
        if not all(name in values for name in node.output if name):
            unknown.append(node.name or node.op_type)
            continue
        if is_standard(node, *PASSING):
            source = node.input[0] if node.input else ""
            if not source or source in origin:
                for name in node.output:
                    origin[name] = origin.get(source, "")
            before = values.get(source)
            if node.op_type == "DequantizeLinear" and before is not None:
                lowered[node.output[0]] = before.type
            elif source in lowered and node.op_type != "QuantizeLinear":
                lowered[node.output[0]] = lowered[source]
            place.update((name, place.get(source, source)) for name in node.output)
            continue
        nodes.append(_cost(node, values, constants, origin, lowered, place))
    fed = {value.name for value in (*model.graph.input, *model.graph.output)} - set(constants)
    boundary = sum(values[name].nbytes for name in fed if name in values)
    return GraphCost(slots, tuple(nodes), _peak(model, values, origin), boundary, tuple(unknown))


def _cost(node: NodeProto, values: dict[str, Value], constants: dict[str, int], origin: dict[str, str],
          lowered: dict[str, str], place: dict[str, str]) -> NodeCost:  # fmt: skip
    out = values[node.output[0]]
    kinds = {lowered.get(name) for name in node.input[:2]}
    quantized = kinds.pop() if len(kinds) == 1 else None  # both sides: arithmetic of that type
    elements = math.prod(out.shape)
    flops = elements
    if is_standard(node, "MatMul", "Gemm"):
        left = values[node.input[0]].shape
        inner = left[0] if node.op_type == "Gemm" and attribute(node, "transA", 0) else left[-1]
        flops = 2 * inner * elements
    elif is_standard(node, "Conv"):  # weight [out, in / groups, h, w]: an output value sums over one filter
        flops = 2 * math.prod(values[node.input[1]].shape[1:]) * elements
    elif is_standard(node, "ConvTranspose"):  # weight [in, out / groups, h, w]: an input value goes into one filter
        flops = 2 * math.prod(values[node.input[1]].shape[1:]) * math.prod(values[node.input[0]].shape)
    read = [name for name in node.input if name]
    weights = tuple({origin[n]: constants[origin[n]] for n in read if origin.get(n)}.items())
    computed = [n for n in dict.fromkeys(read) if n not in origin and n in values]
    written = [n for n in node.output if n]
    if not is_standard(node, *PRODUCTS) and computed:
        main = max(computed, key=lambda n: values[n].nbytes)
        place.update((name, place.get(main, main)) for name in written)
        computed, written = [n for n in computed if n != main], []
    touched = [(place.get(n, n), _moved(values[n], lowered.get(n))) for n in computed]
    touched += [(n, values[n].nbytes) for n in written]
    first = values.get(node.input[0]) if node.input else None
    return NodeCost(node.name or node.output[0], node.op_type, quantized or (first or out).type, flops, weights,
                    tuple(touched))  # fmt: skip


def _moved(value: Value, quantized: str | None) -> int:
    return math.prod(value.shape) if quantized else value.nbytes  # quantized types take one byte


def _peak(model: onnx.ModelProto, values: dict[str, Value], origin: dict[str, str]) -> int:
    last: dict[str, int] = {}
    nodes = list(model.graph.node)
    outputs = {value.name for value in model.graph.output}
    for index, node in enumerate(nodes):
        for name in node.input:
            last[name] = index
    alive = {v.name: values[v.name].nbytes for v in model.graph.input if v.name in values and v.name not in origin}
    most = sum(alive.values())
    for index, node in enumerate(nodes):
        if not is_standard(node, *PASSING):
            alive |= {name: values[name].nbytes for name in node.output if name in values}
        most = max(most, sum(alive.values()))
        for name in node.input:
            if last[name] == index and name not in outputs:
                alive.pop(name, None)
    return most


def sized_values(model: onnx.ModelProto, slots: int) -> dict[str, Value]:
    """Every tensor whose type and shape can be inferred once the slot axis is a number; constants included.

    Raises InputError for a graph whose operators do not fit together.
    """
    copy = onnx.ModelProto()
    copy.opset_import.extend(model.opset_import)
    copy.ir_version, copy.graph.name = model.ir_version, "sized"
    graph, source = copy.graph, model.graph
    graph.node.extend(source.node)
    given = {tensor.name for tensor in source.initializer}
    for tensor in source.initializer:  # large constants by their shape alone: inference copies the model
        if tensor_bytes(tensor) <= SMALL:
            graph.initializer.append(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    graph.input.extend(value for value in source.input if value.name not in given)
    graph.output.extend(source.output)
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        if axes and axes[0].dim_param == SLOTS:
            axes[0].dim_value = slots
    declare_domains(copy)
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise InputError(
            f"the graph {source.name!r} contradicts itself: {str(error).strip().splitlines()[0]}"
        ) from error
    found = {t.name: (t.data_type, tuple(t.dims)) for t in source.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        tensor_type = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor_type.shape.dim)
        if tensor_type.HasField("shape") and min(shape, default=0) >= 0:
            found[value.name] = (tensor_type.elem_type, shape)
    return {name: _value(kind, shape) for name, (kind, shape) in found.items()}


def declare_domains(model: onnx.ModelProto) -> None:
    """Import every operator domain that the nodes use: shape inference stops at one that is not declared."""
    declared = {entry.domain for entry in model.opset_import}
    used = {node.domain for node in model.graph.node} - {"ai.onnx"}
    model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(used - declared))


def _value(kind: int, shape: tuple[int, ...]) -> Value:
    name, size = TYPES.get(kind, (TensorProto.DataType.Name(kind).lower(), 8))
    return Value(name, shape, size * math.prod(shape))


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of a constant's content."""
    return _value(tensor.data_type, tuple(tensor.dims)).nbytes


def lowest_precision(costs: list[GraphCost]) -> str:
    """The lowest type in which any product of these graphs is computed: what the device must be able to do."""
    order = ("fp8", "int8", "fp16", "bf16", "fp32")
    found = {kind for cost in costs for kind in cost.product_types}
    return next((kind for kind in order if kind in found), "fp32")
