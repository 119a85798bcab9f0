"""An ONNX graph as a torch module: the operators that our bundles use, each in a line or two of torch.

The module is what torch.export traces, so that a bundle needs no Python model behind it: any graph goes to AOTInductor
or torch_tensorrt, lowered ones too. Shapes (outputs of Shape and what is computed of them) stay Python numbers, so that
the slot axis may be symbolic. Semantics: ONNX operator specification, opset 19. Only the torch engines import this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sage_edge.errors import InputError

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64, TensorProto.INT8: torch.int8, TensorProto.UINT8: torch.uint8,
    TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64, TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
}  # fmt: skip
Attributes = dict[str, Any]
Operator = Callable[[list[Any], Attributes], Any]


class OnnxModule(nn.Module):
    """`path`: the ONNX file. Call it with the graph's inputs in order; gives its outputs in order.

    Raises InputError for an operator that has no translation, naming it and its node.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        model = onnx.load(str(path), load_external_data=False)
        graph = model.graph
        self._constants: dict[str, str] = {}  # ONNX name -> buffer
        self._small: dict[str, Any] = {}  # constants that may say shapes, axes or scales, as numbers
        for tensor in graph.initializer:
            self._add_constant(tensor.name, numpy_helper.to_array(tensor), tensor.data_type)
        self.inputs = [value.name for value in graph.input if value.name not in self._constants]
        self.outputs = [value.name for value in graph.output]
        self._nodes: list[tuple[Operator, list[str], list[str], Attributes]] = []
        for node in graph.node:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Constant":
                tensor = attributes["value"]
                self._add_constant(node.output[0], numpy_helper.to_array(tensor), tensor.data_type)
                continue
            self._nodes.append((_operator(node, path), list(node.input), list(node.output), attributes))

    def _add_constant(self, name: str, array: Any, kind: int) -> None:
        if kind not in DTYPES:
            raise InputError(
                f"constant {name!r} has the type {TensorProto.DataType.Name(kind)}, which torch engines do not know"
            )
        if array.ndim <= 1 and array.size <= 64 and kind == TensorProto.INT64:
            self._small[name] = tuple(int(n) for n in array) if array.ndim else int(array)
        buffer = f"constant_{len(self._constants)}"
        if kind in (TensorProto.FLOAT8E4M3FN, TensorProto.BFLOAT16):  # NumPy has neither: by their bytes
            raw = torch.from_numpy(
                np.ascontiguousarray(array).view(np.uint8 if array.itemsize == 1 else np.int16).copy()
            )
            tensor = raw.view(DTYPES[kind])
        else:
            tensor = torch.from_numpy(np.array(array))
        self.register_buffer(buffer, tensor)
        self._constants[name] = buffer

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        values.update((name, getattr(self, buffer)) for name, buffer in self._constants.items())
        values.update(self._small)
        for operator, sources, targets, attributes in self._nodes:
            arguments = [values[name] if name else None for name in sources]
            result = operator(arguments, attributes | {"_outputs": len(targets)})
            values.update(zip(targets, result if isinstance(result, list) else [result], strict=True))
        # An output that is an input unchanged would be the same memory; engines write outputs of their own.
        return tuple(self._tensor(values[name]).clone() if name in self.inputs else self._tensor(values[name])
                     for name in self.outputs)  # fmt: skip

    @staticmethod
    def _tensor(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.tensor(value)


def _operator(node: NodeProto, path: Path) -> Operator:
    if node.domain in ("", "ai.onnx") and node.op_type in OPERATORS:
        return OPERATORS[node.op_type]
    raise InputError(
        f"{path}: node {node.name!r} is {node.domain or 'ai.onnx'}:{node.op_type}, which torch engines do not know; give the "
        "portable bundle as `sage-edge export` writes it"
    )


def _numbers(value: Any) -> tuple[Any, ...]:
    """A shape, axes or slice bounds as Python numbers (symbolic ones included)."""
    if isinstance(value, Tensor):
        return tuple(value.reshape(-1).tolist())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _both(value: Any, like: Any) -> Any:
    """A shape value as a tensor where the other side is one."""
    return torch.tensor(value, device=like.device) if isinstance(like, Tensor) and isinstance(value, tuple) else value


def _arithmetic(function: Callable[[Any, Any], Any]) -> Operator:
    def run(x: list[Any], a: Attributes) -> Any:
        left, right = x
        if isinstance(left, tuple) and isinstance(right, tuple):
            return tuple(function(m, n) for m, n in zip(left, right, strict=True))
        if (
            isinstance(left, tuple) != isinstance(right, tuple)
            and not isinstance(left, Tensor)
            and not isinstance(right, Tensor)
        ):
            many, one = (left, right) if isinstance(left, tuple) else (right, left)
            return tuple(function(n, one) if many is left else function(one, n) for n in many)
        return function(_both(left, right), _both(right, left))

    return run


def _divide(left: Any, right: Any) -> Any:
    if isinstance(left, Tensor) and not left.is_floating_point():
        return torch.div(left, right, rounding_mode="trunc")
    return left / right if isinstance(left, Tensor) else left // right


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(x: list[Any], a: Attributes) -> Any:
        axes = _numbers(x[1]) if len(x) > 1 and x[1] is not None else a.get("axes", ())
        if not axes and a.get("noop_with_empty_axes", 0):
            return x[0]
        return function(x[0], list(axes) or list(range(x[0].ndim)), bool(a.get("keepdims", 1)))

    return run


def _slice(x: list[Any], a: Attributes) -> Any:
    data, starts, ends = x[0], _numbers(x[1]), _numbers(x[2])
    axes = _numbers(x[3]) if len(x) > 3 and x[3] is not None else tuple(range(len(starts)))
    steps = _numbers(x[4]) if len(x) > 4 and x[4] is not None else (1,) * len(starts)
    if isinstance(data, tuple):
        return data[slice(starts[0], ends[0], steps[0])]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            raise InputError("Slice with a negative step, which torch engines do not know")
        places = [slice(None)] * data.ndim
        places[axis] = slice(start, end, step)
        data = data[tuple(places)]
    return data


def _gather(x: list[Any], a: Attributes) -> Any:
    data, index, axis = x[0], x[1], a.get("axis", 0)
    if isinstance(data, tuple):
        return tuple(data[i] for i in index) if isinstance(index, tuple) else data[index]
    if isinstance(index, (int, tuple)):
        index = torch.tensor(index, device=data.device)
    axis %= data.ndim
    found = torch.index_select(data, axis, index.reshape(-1).long() % data.shape[axis])
    return found.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])


def _gather_nd(x: list[Any], a: Attributes) -> Tensor:
    if a.get("batch_dims", 0):
        raise InputError("GatherND with batch_dims, which torch engines do not know")
    found: Tensor = x[0][tuple(x[1].long().unbind(-1))]
    return found


def _concat(x: list[Any], a: Attributes) -> Any:
    if not any(isinstance(part, Tensor) and part.ndim > 1 for part in x) and any(
        isinstance(p, (tuple, int)) for p in x
    ):
        return tuple(number for part in x for number in _numbers(part))
    return torch.cat(x, dim=a["axis"])


def _reshape(x: list[Any], a: Attributes) -> Tensor:
    shape = list(_numbers(x[1]))
    if not a.get("allowzero", 0):
        shape = [x[0].shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(shape)]
    found: Tensor = x[0].reshape(shape)
    return found


def _squeeze(x: list[Any], a: Attributes) -> Any:
    if not isinstance(x[0], Tensor):
        return x[0][0] if isinstance(x[0], tuple) and len(x[0]) == 1 else x[0]
    axes = sorted((axis % x[0].ndim for axis in _numbers(x[1])), reverse=True) if len(x) > 1 else []
    found: Tensor = x[0]
    for axis in axes:
        found = found.squeeze(axis)
    return found if axes else found.squeeze()


def _unsqueeze(x: list[Any], a: Attributes) -> Any:
    if not isinstance(x[0], Tensor):
        return _numbers(x[0])
    axes = _numbers(x[1])
    found: Tensor = x[0]
    for axis in sorted(axis % (found.ndim + len(axes)) for axis in axes):
        found = found.unsqueeze(axis)
    return found


def _expand(x: list[Any], a: Attributes) -> Tensor:
    """Both ways: ONNX lets the given shape have ones where the tensor has more, torch does not."""
    wanted, have = list(_numbers(x[1])), list(x[0].shape)
    width = max(len(wanted), len(have))
    wanted, have = [1] * (width - len(wanted)) + wanted, [1] * (width - len(have)) + have
    # Compared as plain numbers only: asking whether a symbolic size is one would pin it down.
    shape = [h if isinstance(w, int) and w == 1 else w for w, h in zip(wanted, have, strict=True)]
    found: Tensor = x[0].expand(shape)
    return found


def _pad(x: list[Any], a: Attributes) -> Tensor:
    if a.get("mode", b"constant") != b"constant":
        raise InputError(f"Pad in the mode {a['mode']!r}, which torch engines do not know")
    pads = _numbers(x[1])
    axes = _numbers(x[3]) if len(x) > 3 and x[3] is not None else tuple(range(x[0].ndim))
    amounts = [0] * (2 * x[0].ndim)
    for i, axis in enumerate(axes):
        back = 2 * (x[0].ndim - 1 - axis % x[0].ndim)  # torch begins with the last axis
        amounts[back], amounts[back + 1] = pads[i], pads[i + len(axes)]
    value = float(x[2]) if len(x) > 2 and x[2] is not None else 0.0
    return nn.functional.pad(x[0], amounts, value=value)


def _split(x: list[Any], a: Attributes) -> list[Tensor]:
    axis = a.get("axis", 0)
    if len(x) > 1 and x[1] is not None:
        return list(torch.split(x[0], list(_numbers(x[1])), dim=axis))
    parts = a.get("num_outputs", a["_outputs"])
    return list(torch.split(x[0], -(-x[0].shape[axis] // parts), dim=axis))


def _gemm(x: list[Any], a: Attributes) -> Tensor:
    left = x[0].transpose(0, 1) if a.get("transA", 0) else x[0]
    right = x[1].transpose(0, 1) if a.get("transB", 0) else x[1]
    product: Tensor = a.get("alpha", 1.0) * (left @ right)
    return product + a.get("beta", 1.0) * x[2] if len(x) > 2 and x[2] is not None else product


def _conv(x: list[Any], a: Attributes) -> Tensor:
    if x[0].ndim != 4 or a.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise InputError("Conv other than over two axes with explicit pads, which torch engines do not know")
    top, left, bottom, right = a.get("pads", (0, 0, 0, 0))
    padded = nn.functional.pad(x[0], (left, right, top, bottom))
    bias = x[2] if len(x) > 2 else None
    return nn.functional.conv2d(padded, x[1], bias, tuple(a.get("strides", (1, 1))), 0, tuple(a.get("dilations", (1, 1))),
                                a.get("group", 1))  # fmt: skip


def _conv_transpose(x: list[Any], a: Attributes) -> Tensor:
    plain = not any(a.get("pads", ())) and not any(a.get("output_padding", ())) and "output_shape" not in a
    if x[0].ndim != 4 or not plain or a.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise InputError("ConvTranspose other than over two axes without padding, which torch engines do not know")
    bias = x[2] if len(x) > 2 else None
    return nn.functional.conv_transpose2d(x[0], x[1], bias, tuple(a.get("strides", (1, 1))), groups=a.get("group", 1),
                                          dilation=tuple(a.get("dilations", (1, 1))))  # fmt: skip


def _depth_to_space(x: list[Any], a: Attributes) -> Tensor:
    n, c, h, w = x[0].shape
    b = a["blocksize"]
    crd = a.get("mode", b"DCR") == b"CRD"  # else the block's rows and columns come before the channel
    shape, order = (
        ((n, c // (b * b), b, b, h, w), (0, 1, 4, 2, 5, 3))
        if crd
        else ((n, b, b, c // (b * b), h, w), (0, 3, 4, 1, 5, 2))
    )
    parts: Tensor = x[0].reshape(shape).permute(order)
    return parts.reshape(n, c // (b * b), h * b, w * b)


def _space_to_depth(x: list[Any], a: Attributes) -> Tensor:
    n, c, h, w = x[0].shape
    b = a["blocksize"]
    parts: Tensor = x[0].reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * b * b, h // b, w // b)


def _cast(x: list[Any], a: Attributes) -> Any:
    return x[0].to(DTYPES[a["to"]]) if isinstance(x[0], Tensor) else x[0]


def _axis_of(scale: Tensor, like: Tensor, a: Attributes) -> Tensor:
    """A per-channel scale in a shape that broadcasts along its axis."""
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape(())
    shape = [1] * like.ndim
    shape[a.get("axis", 1)] = -1
    return scale.reshape(shape)


def _quantize(x: list[Any], a: Attributes) -> Tensor:
    """Round to nearest even and saturate (ONNX QuantizeLinear); zero point 0, as everything here has it."""
    kind: torch.dtype = x[2].dtype if len(x) > 2 and x[2] is not None else torch.uint8
    scaled: Tensor = x[0] / _axis_of(x[1], x[0], a)
    if kind == torch.float8_e4m3fn:
        return scaled.float().clamp(-448.0, 448.0).to(kind)
    info = torch.iinfo(kind)
    zero = _axis_of(x[2], x[0], a).to(scaled.dtype) if len(x) > 2 and x[2] is not None else 0
    found: Tensor = (torch.round(scaled) + zero).clamp(info.min, info.max).to(kind)
    return found


def _dequantize(x: list[Any], a: Attributes) -> Tensor:
    scale = _axis_of(x[1], x[0], a)
    values: Tensor = x[0].to(scale.dtype)
    if len(x) > 2 and x[2] is not None:
        values = values - _axis_of(x[2], x[0], a).to(scale.dtype)
    return values * scale


def _argmax(x: list[Any], a: Attributes) -> Tensor:
    if a.get("select_last_index", 0):
        raise InputError("ArgMax with select_last_index, which torch engines do not know")
    return torch.argmax(x[0], dim=a.get("axis", 0), keepdim=bool(a.get("keepdims", 1)))


def _clip(x: list[Any], a: Attributes) -> Tensor:
    low, high = (x[i] if len(x) > i else None for i in (1, 2))
    return torch.clamp(x[0], low, high)


def _one(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda x, a: function(x[0])


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(x: list[Any], a: Attributes) -> Tensor:
        found: Tensor = x[0]
        for other in x[1:]:
            found = function(found, other)
        return found

    return run


def _shape(x: list[Any], a: Attributes) -> tuple[Any, ...]:
    return tuple(x[0].shape)[slice(a.get("start", 0), a.get("end"))]


def _constant_of_shape(x: list[Any], a: Attributes) -> Tensor:
    value = numpy_helper.to_array(a["value"]) if "value" in a else np.zeros(1, np.float32)
    return torch.full(tuple(_numbers(x[0])), value.item(), dtype=torch.from_numpy(np.array(value)).dtype)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    return lambda x, a: function(x[0], a.get("axis", -1))


def _mean(x: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
    return torch.mean(x, dim=list(axes), keepdim=keep)


OPERATORS: dict[str, Operator] = {
    "Add": _arithmetic(lambda m, n: m + n),
    "Sub": _arithmetic(lambda m, n: m - n),
    "Mul": _arithmetic(lambda m, n: m * n),
    "Div": _arithmetic(_divide),
    "Pow": lambda x, a: torch.pow(x[0], x[1]).to(x[0].dtype),
    "MatMul": lambda x, a: torch.matmul(x[0], x[1]),
    "Gemm": _gemm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Relu": _one(torch.relu),
    "Neg": _one(torch.neg),
    "Abs": _one(torch.abs),
    "Exp": _one(torch.exp),
    "Log": _one(torch.log),
    "Sqrt": _one(torch.sqrt),
    "Reciprocal": _one(torch.reciprocal),
    "Sigmoid": _one(torch.sigmoid),
    "Tanh": _one(torch.tanh),
    "Not": _one(torch.logical_not),
    "Identity": lambda x, a: x[0],
    "Equal": lambda x, a: torch.eq(x[0], x[1]),
    "Where": lambda x, a: torch.where(x[0], x[1], x[2]),
    "Max": _fold(torch.maximum),
    "Min": _fold(torch.minimum),
    "Clip": _clip,
    "Cast": _cast,
    "Softmax": _softmax(lambda x, axis: torch.softmax(x, axis)),
    "LogSoftmax": _softmax(lambda x, axis: torch.log_softmax(x, axis)),
    "ArgMax": _argmax,
    "ReduceMean": _reduce(_mean),
    "ReduceSum": _reduce(lambda x, axes, keep: torch.sum(x, dim=list(axes), keepdim=keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: torch.amax(x, dim=list(axes), keepdim=keep)),
    "Transpose": lambda x, a: x[0].permute(a.get("perm", tuple(reversed(range(x[0].ndim))))),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Shape": _shape,
    "ConstantOfShape": _constant_of_shape,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
