"""Lowered graphs (float16 casts, Q/DQ) in float32, for CPUs: ONNX Runtime's CPU provider has no float16 arithmetic.

Given a float16 graph it inserts casts of its own, computes whole chains in float32 and never rounds between their nodes: an
overflow in the middle does not show. `judging` therefore rounds explicitly to float16 after every node that computes in
it, and keeps the Q/DQ of activations, so that what is judged is the arithmetic of the target: products of rounded factors
summed in float32, the sum rounded once. `stripped` gives the plain float32 graph behind it, with the calibrated scales.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sage_edge.engines.onnx_graph import attribute, is_standard
from sage_edge.precision.formats import dequantise
from sage_edge.precision.rewrite import MOVES
from sage_edge.specs import Array

_CODES: dict[int, str] = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "fp8"}


@dataclass(frozen=True)
class Stripped:
    """A float32 graph without Q/DQ; scales: of each activation that was quantised to INT8 for a product of `products`."""

    model: onnx.ModelProto
    scales: dict[str, float]
    products: frozenset[str]


def judging(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 copy of a lowered graph that rounds where the target would; runs on any CPU provider."""
    work = _Single(model, rounding=True)
    work.run()
    return work.result()


def stripped(model: onnx.ModelProto) -> Stripped:
    """A float32 copy of a lowered graph without roundings; its weights are what the stored codes stand for."""
    work = _Single(model, rounding=False)
    work.run()
    return Stripped(work.result(), work.scales, frozenset(work.products))


@dataclass
class _Single:
    """One pass over the nodes of a lowered graph; `same` maps a value to the one that stands for it."""

    source: onnx.ModelProto
    rounding: bool
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    products: list[str] = field(default_factory=list)

    def run(self) -> None:
        graph = self.source.graph
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.quantised: dict[str, tuple[str, float, str]] = {}  # codes or DQ output: the value, its scale, its format
        for node in graph.node:
            self._node(node)

    def result(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        graph = model.graph
        outputs = {value.name for value in graph.output}
        for name in sorted(outputs & set(self.same)):
            self.nodes.append(helper.make_node("Identity", [self.same[name]], [name], name=name))
        read = {name for node in self.nodes for name in node.input}
        kept = [t for t in graph.initializer if t.name in read and t.name not in self.constants]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*kept, *(t for name, t in self.constants.items() if name in read)])
        return model

    def _node(self, node: NodeProto) -> None:
        if is_standard(node, "Cast") and {self._type(node.input[0]), self._type(node.output[0])} == {
            TensorProto.FLOAT, TensorProto.FLOAT16
        }:  # fmt: skip
            self._half_cast(node)
        elif is_standard(node, "QuantizeLinear"):
            self._quantise(node)
        elif is_standard(node, "DequantizeLinear"):
            self._dequantise(node)
        else:
            self._compute(node)

    def _half_cast(self, node: NodeProto) -> None:
        source, out = self._now(node.input[0]), node.output[0]
        if self.rounding and self._type(out) == TensorProto.FLOAT16:
            self._round(source, out)
        else:
            self.same[out] = source

    def _quantise(self, node: NodeProto) -> None:
        source, scale, out = self._now(node.input[0]), self._array(node.input[1]), node.output[0]
        precision = _CODES[self._type(out)]
        self.quantised[out] = (source, float(scale.item()), precision)
        if self.rounding:
            inputs = [source, self._single(node.input[1]), self._single(node.input[2])]
            self.nodes.append(helper.make_node("QuantizeLinear", inputs, [out], name=node.name))

    def _dequantise(self, node: NodeProto) -> None:
        codes, out = node.input[0], node.output[0]
        if codes in self.initializers:
            tensor = self.initializers[codes]
            precision = _CODES[tensor.data_type]
            raw = np.frombuffer(tensor.raw_data, np.int8 if precision == "int8" else np.uint8).reshape(
                tuple(tensor.dims)
            )
            scale, axis = self._array(node.input[1]), attribute(node, "axis", 1)
            assert isinstance(axis, int)
            if scale.ndim:
                scale = scale.reshape([-1 if i == axis % raw.ndim else 1 for i in range(raw.ndim)])
            values = dequantise(raw, scale, "int8" if precision == "int8" else "fp8")
            self.constants[out] = numpy_helper.from_array(values, out)
            return
        source, scale_value, precision = self.quantised[codes]
        self.quantised[out] = self.quantised[codes]
        if self.rounding:
            inputs = [codes, self._single(node.input[1]), self._single(node.input[2])]
            self.nodes.append(helper.make_node("DequantizeLinear", inputs, [out], name=node.name))
        else:
            self.same[out] = source
            if precision == "int8":
                self.scales[source] = scale_value

    def _compute(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        new.input[:] = [self._single(name) if name in self.initializers else self._now(name) for name in node.input]
        self.nodes.append(new)
        if any(self.quantised.get(name, ("", 0.0, ""))[2] == "int8" for name in node.input):
            self.products.append(node.output[0])
        halves = [out for out in node.output if self._type(out) == TensorProto.FLOAT16]
        if self.rounding and halves and not is_standard(node, *MOVES):
            for i, out in enumerate(new.output):
                if out in halves:
                    new.output[i] = f"{out}/exact"
                    self._round(f"{out}/exact", out)

    def _round(self, source: str, out: str) -> None:
        half = f"{out}/half"
        self.nodes += [
            helper.make_node("Cast", [source], [half], name=half, to=TensorProto.FLOAT16),
            helper.make_node("Cast", [half], [out], name=out, to=TensorProto.FLOAT),
        ]

    def _now(self, name: str) -> str:
        return self.same.get(name, name)

    def _type(self, name: str) -> int:
        return int(self.types.get(name, TensorProto.UNDEFINED))

    def _array(self, name: str) -> Array:
        return numpy_helper.to_array(self.initializers[name])

    def _single(self, name: str) -> str:
        """A constant with its float16 values in float32; others as they are."""
        if self.initializers[name].data_type == TensorProto.FLOAT16:
            self.constants[name] = numpy_helper.from_array(self._array(name).astype(np.float32), name)
        return name
