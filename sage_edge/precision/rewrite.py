"""An fp32 graph rewritten for lower precision: explicit casts and Q/DQ, standard opset 19, for typed builders.

A product of a lowered layer gives float16, and so does what follows from it alone (head splits, rotations, attention
products, SiLU), until it meets a float32 value: the residual stream, which with its RMSNorms stays float32, as do softmax,
q_head, lm_head, signals and the graph's inputs and outputs. INT8 and FP8 layers get Q/DQ on both sides of their product:
activations one calibrated scale each, weights stored as codes with one scale a column. All is symmetric, zero point 0.
The nodes around INT8 and FP8 products work in float16; their two attention products do too. The result of an INT8
convolution is rounded to 8 bits as well, behind its ReLU if it has one: engines write codes, which the next one reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sage_edge.bundle import LowerableName
from sage_edge.engines.onnx_graph import Graph, is_standard
from sage_edge.precision.formats import Quantised, quantise, scale_for
from sage_edge.precision.layers import Layer, find_layers
from sage_edge.specs import Array, Precision

# Follow the precision of what they read. Whatever is not named here is computed in float32.
FOLLOWERS = frozenset(
    ["Add", "Concat", "Div", "Identity", "MatMul", "Mul", "Neg", "Relu", "Reshape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub",
     "Tanh", "Transpose", "Unsqueeze"]
)  # fmt: skip
# Move values or drop some, and change no magnitude.
MOVES = frozenset(
    ["Concat", "Gather", "Identity", "Neg", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"]
)
# Computed in float32, but what they give is a share of one: stored as float16 when what they read was.
FLOAT32_INSIDE = frozenset(["Softmax"])

CODE_TYPE = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


@dataclass(frozen=True)
class Lowered:
    """A rewritten graph; halves: each value that is float16 somewhere, with the layer whose product it follows from.

    A float32 value that is cast for an fp16 layer counts as that layer's; a value that another one holds already (a part,
    a view) is left out.
    """

    model: onnx.ModelProto
    halves: dict[str, str]


def lower(
    model: onnx.ModelProto, plan: Mapping[str, Precision], amax: Mapping[str, float], name: LowerableName = "refine"
) -> Lowered:
    """Rewrite a copy of `model`, the graph `name` of a bundle, by `plan`.

    plan: precision by layer name (`find_layers`); a layer that is not named stays fp32. amax: largest magnitude of the
    input of each product of an INT8 or FP8 layer, and of the results of its convolutions. Raises KeyError for a layer or a
    range that is missing: a bug, not input.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    layers = {layer.name: layer for layer in find_layers(model, name)}
    work = _Rewriter(lowered, {layers[layer]: precision for layer, precision in plan.items()}, amax)
    work.run()
    return Lowered(onnx.shape_inference.infer_shapes(lowered, strict_mode=True), {**work.cast_inputs, **work.computed})


@dataclass
class _Rewriter:
    """One pass over the nodes in their order. `owner` holds the float16 values."""

    model: onnx.ModelProto
    plan: dict[Layer, Precision]
    amax: Mapping[str, float]
    owner: dict[str, str] = field(default_factory=dict)
    computed: dict[str, str] = field(default_factory=dict)
    cast_inputs: dict[str, str] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    made: dict[tuple[str, str], str] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)  # results of INT8 convolutions: what stands for them

    def run(self) -> None:
        self.graph = Graph(self.model)
        self.layer_of = {out: layer for layer in self.plan for out in layer.outputs}
        self.results = {name for layer, chosen in self.plan.items() if chosen == "int8" for name in layer.results}
        for node in self.graph.nodes:
            self._node(node)
        for name in sorted(self.graph.outputs & set(self.owner)):
            self._restore_output(name)
        self._write()

    def _node(self, node: NodeProto) -> None:
        self._rewritten(node)
        if node.output[0] in self.results:
            name = node.output[0]
            self.rounded[name] = self._activation(name, "int8")
            self.owner[self.rounded[name]] = self.owner[name]

    def _rewritten(self, node: NodeProto) -> None:
        layer = self.layer_of.get(node.output[0])
        if layer is not None and self.plan[layer] != "fp32":
            self._product(node, layer, self.plan[layer])
            return
        inputs = [self.rounded.get(name, name) for name in node.input]
        halves = [name for name in inputs if name in self.owner]
        new = NodeProto()
        new.CopyFrom(node)
        if halves and is_standard(node, *FOLLOWERS) and all(self._half_or_constant(name) for name in inputs):
            new.input[:] = [self._constant16(name) if name in self.graph.constants else name for name in inputs]
            self.nodes.append(new)
            self.owner.update(dict.fromkeys(node.output, self.owner[halves[0]]))
            if not is_standard(node, *MOVES):
                self.computed[node.output[0]] = self.owner[halves[0]]
        elif halves and is_standard(node, *FLOAT32_INSIDE):
            inner = f"{node.output[0]}/fp32"
            new.input[:] = [self._single(name) for name in inputs]
            new.output[:] = [inner]
            self.nodes += [new, _cast(inner, node.output[0], TensorProto.FLOAT16)]
            self.owner[node.output[0]] = self.owner[halves[0]]
        else:
            new.input[:] = [self._single(name) for name in inputs]
            self.nodes.append(new)

    def _product(self, node: NodeProto, layer: Layer, precision: Precision) -> None:
        if precision == "fp16":
            self.cast_inputs[node.input[0]] = layer.name
            source = self.rounded.get(node.input[0], node.input[0])
            operands = [self._half(source), self._constant16(layer.weight)]
        elif precision == "int8" or precision == "fp8":
            operands = [self._activation(node.input[0], precision), self._weight(layer, precision)]
        else:
            raise ValueError(precision)
        product = helper.make_node(node.op_type, operands, list(node.output), name=node.name)
        product.attribute.extend(node.attribute)
        self.nodes.append(product)
        self.owner[node.output[0]] = self.computed[node.output[0]] = layer.name

    def _half_or_constant(self, name: str) -> bool:
        return not name or name in self.owner or name in self.graph.constants

    def _half(self, name: str) -> str:
        """The value in float16."""
        if name in self.owner:
            return name
        return self._once(name, "fp16", lambda out: [_cast(name, out, TensorProto.FLOAT16)])

    def _single(self, name: str) -> str:
        """The value in float32, or as it is when it is no float16 value."""
        if name not in self.owner:
            return name
        return self._once(name, "fp32", lambda out: [_cast(name, out, TensorProto.FLOAT)])

    def _activation(self, name: str, precision: Quantised) -> str:
        """Q and DQ after the value: quantised from what it is (float32 behind a norm), dequantised to float16."""
        scale = scale_for(self.amax[name], precision)
        own = np.float16 if name in self.owner else np.float32

        def make(out: str) -> list[NodeProto]:
            zero = self._zero(precision, ())
            wide, half = self._scale(f"{name}/{precision}/scale", own(scale)), f"{name}/{precision}/scale16"
            codes = f"{name}/{precision}/codes"
            return [
                helper.make_node("QuantizeLinear", [name, wide, zero], [codes], name=codes),
                helper.make_node(
                    "DequantizeLinear", [codes, self._scale(half, np.float16(scale)), zero], [out], name=out
                ),
            ]

        return self._once(name, precision, make)

    def _weight(self, layer: Layer, precision: Quantised) -> str:
        """The stored codes of a layer's weight and the DQ node that reads them; shared by all its products."""

        def make(out: str) -> list[NodeProto]:
            weight = self.graph.array(layer.weight)
            assert weight is not None
            codes, scales = quantise_weight(weight.astype(np.float32), precision, layer.axis)
            stored = f"{layer.weight}/{precision}/codes"
            self.constants[stored] = helper.make_tensor(
                stored, CODE_TYPE[precision], codes.shape, codes.tobytes(), raw=True
            )
            scale = self._scale(f"{layer.weight}/{precision}/scale", scales.astype(np.float16))
            inputs = [stored, scale, self._zero(precision, scales.shape)]
            return [helper.make_node("DequantizeLinear", inputs, [out], name=out, axis=layer.axis)]

        return self._once(layer.weight, precision, make)

    def _once(self, name: str, what: str, make: Callable[[str], list[NodeProto]]) -> str:
        """The derived value `name/what`, its nodes written at its first use."""
        key = (name, what)
        if key not in self.made:
            self.made[key] = f"{name}/{what}"
            self.nodes += make(self.made[key])
        return self.made[key]

    def _constant16(self, name: str) -> str:
        """A float constant in float16; others (axes, shapes) as they are."""
        array = self.graph.array(name)
        if array is None or array.dtype != np.float32:
            return name
        return self._scale(f"{name}/fp16", array.astype(np.float16))

    def _scale(self, name: str, value: Array | np.generic) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _zero(self, precision: Quantised, shape: tuple[int, ...]) -> str:
        """Zero point 0: without it, opset 19 would take the codes for uint8."""
        name = f"zero/{precision}" + "".join(f"/{n}" for n in shape)
        size = int(np.prod(shape, dtype=np.int64))
        self.constants[name] = helper.make_tensor(name, CODE_TYPE[precision], shape, bytes(size), raw=True)
        return name

    def _restore_output(self, name: str) -> None:
        """A graph output keeps its name and dtype: the float16 value is renamed, and it or what it was rounded to is cast."""
        half = f"{name}/fp16"
        for node in self.nodes:
            node.input[:] = [half if i == name else i for i in node.input]
            node.output[:] = [half if o == name else o for o in node.output]
        self.nodes.append(_cast(self.rounded.get(name, half), name, TensorProto.FLOAT))
        self.owner[half] = self.owner.pop(name)

    def _write(self) -> None:
        graph = self.model.graph
        read = {name for node in self.nodes for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*kept, *(tensor for name, tensor in self.constants.items() if name in read)])


def is_int8_weight(name: str) -> bool:
    """Whether a constant is, or is a part of, what the codes of an INT8 layer stand for (see `_Rewriter._weight`)."""
    return re.search(r"/int8(\.\d+)?$", name) is not None


def quantise_weight(weight: Array, precision: Quantised, axis: int = 1) -> tuple[Array, Array]:
    """Codes in the weight's shape, and scales (representable in float16) float32 [channels], of a float32 weight whose output
    channels lie along `axis`."""
    last = np.moveaxis(weight, axis, -1)
    scales = np.array(
        [scale_for(float(v), precision) for v in np.abs(last).reshape(-1, last.shape[-1]).max(0)], np.float32
    )
    return np.ascontiguousarray(np.moveaxis(quantise(last, scales, precision), -1, axis)), scales


def _cast(source: str, target: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=target, to=dtype)
