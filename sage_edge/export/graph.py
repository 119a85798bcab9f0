"""From torch modules to the ONNX graphs of a bundle.

The graphs are opset 19 and decomposed, so that TensorRT 10.3 parses them (PLATFORM.md): weights embedded, constants
folded, only the slot axis dynamic. `torch.onnx.export` does the tracing; this module prepares the modules for it and
refuses a result that breaks the promise.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sage_edge.errors import GateError, InputError
from sage_edge.export.hrm import HRM
from sage_edge.files import replacing
from sage_edge.specs import SLOTS, TensorSpec

OPSET = 19
MAX_GRAPH_BYTES = 2**31 - (64 << 20)  # protobuf's limit, less room for the graph itself; external data is refused
LINE = 16  # float32 values in a 64-byte line, the widest vector and the alignment of ONNX Runtime's buffers
SIGNALS = ("q_halt", "q_continue", "entropy_mean", "entropy_max", "changed", "z_H_change")

# Operators of opset 19 that our models need; all are in onnx-tensorrt's table for TensorRT 10.3.
ALLOWED_OPS = frozenset(
    [
        "Add",
        "ArgMax",
        "Cast",
        "Concat",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Gather",
        "GatherND",
        "Gemm",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Mul",
        "Neg",
        "Not",
        "Pow",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Constant",
        "ConstantOfShape",
        "Identity",
        "Clip",
        "Max",
        "Min",
        "Where",
        "Pad",
        "Tanh",
        # of convolutional models
        "Abs",
        "Conv",
        "ConvTranspose",
        "DepthToSpace",
        "Relu",
        "SpaceToDepth",
    ]
)


class MatMulLinear(nn.Module):
    """A linear layer that multiplies by a stored transpose, so that no Transpose node stands before each use."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


def use_matmuls(module: nn.Module) -> None:
    """Replace every nn.Linear below `module`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, MatMulLinear(child))
        else:
            use_matmuls(child)


def entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy (nats) of the distributions logits [slots, n, values]: mean and largest over the n, both [slots, 1].

    CPU kernels of Log and of sums treat the head and tail of a memory block differently from its middle, so that the last
    bit would depend on a slot's row. LogSoftmax works row by row, and with the values padded to whole 64-byte lines every
    slot begins at the same alignment: bits must not depend on the slot (scheduler, Pool).
    """
    terms = torch.softmax(logits, -1) * torch.log_softmax(logits, -1)
    terms = nn.functional.pad(terms, (0, -terms.shape[-1] % LINE))
    return (-terms.sum((1, 2)) / terms.shape[1]).unsqueeze(-1), (-terms.sum(-1)).amax(-1, keepdim=True)


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Root mean square of the change of a state [slots, n, hidden] against that of the state, [slots, 1]."""
    moved = (after - before).float().square().mean((1, 2)).sqrt()
    size = before.float().square().mean((1, 2)).sqrt()
    return (moved / (size + 1e-12)).unsqueeze(-1)


class Encode(nn.Module):
    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, puzzle_identifiers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, z_H, z_L = self.model.encode(inputs, puzzle_identifiers)
        # An expanded view is not a tensor of its own; the engine must write the carry out.
        return context, z_H + torch.zeros_like(context), z_L + torch.zeros_like(context)


class Refine(nn.Module):
    """One ACT step and its signals, so that a step moves a few floats and never the logits (DESIGN.md)."""

    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = self.model.logits(z_H).argmax(-1)
        next_H, next_L, q = self.model.step(context, z_H, z_L)
        logits = self.model.logits(next_H).float()
        mean, largest = entropies(logits)
        changed = (logits.argmax(-1) != before).float().mean(-1, keepdim=True)
        return next_H, next_L, torch.cat((q, mean, largest, changed, relative_change(z_H, next_H)), dim=-1)


class Decode(nn.Module):
    def __init__(self, model: HRM) -> None:
        super().__init__()
        self.model = model

    def forward(self, z_H: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(z_H).float()
        return logits, logits.argmax(-1).to(torch.int32)


def example(specs: Sequence[TensorSpec], slots: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(slots, *s.item_shape, dtype=getattr(torch, s.dtype)) for s in specs)


def export_graph(module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], path: Path) -> None:
    """Trace `module` over `inputs` and write it to `path` as ONNX with embedded weights.

    Raises InputError when its weights exceed what one file holds, GateError when the graph holds an operator outside
    ALLOWED_OPS or a dynamic axis other than the slots.
    """
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    if size > MAX_GRAPH_BYTES:
        raise InputError(
            f"{path.name}: its weights take {size / 1e9:.1f} GB and an ONNX file holds at most 2; "
            "export with fewer puzzle identifiers (rows of puzzle_emb.weights)"
        )
    slots = torch.export.Dim(SLOTS, min=1, max=4096)
    noise = io.StringIO()  # the exporter prints progress marks of its own, and logs what it cannot find in torchvision
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(noise), redirect_stderr(noise), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(), example(inputs), dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
            input_names=[s.name for s in inputs], output_names=[s.name for s in outputs],
            dynamic_shapes=tuple({0: slots} for _ in inputs), optimize=True,
        )  # fmt: skip
    assert program is not None
    model = tidy(program.model_proto)
    refuse_unportable(model, path.name)
    with replacing(path) as temporary:
        onnx.save(model, str(temporary))


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Share equal initializers and drop the exporter's source-line metadata: smaller, and equal for equal models."""
    first: dict[bytes, str] = {}
    rename: dict[str, str] = {}
    kept = []
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        key = repr((initializer.data_type, array.shape)).encode() + array.tobytes()
        if key in first:
            rename[initializer.name] = first[key]
        else:
            first[key] = initializer.name
            kept.append(initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.producer_name, model.producer_version = "sage-edge", ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = SLOTS
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def refuse_unportable(model: onnx.ModelProto, name: str) -> None:
    opset = {entry.domain: entry.version for entry in model.opset_import}
    if opset.get("") != OPSET:
        raise GateError(f"{name}: exported as opset {opset.get('')}, expected {OPSET}")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ALLOWED_OPS:
            raise GateError(
                f"{name}: node {node.name!r} is {node.domain}:{node.op_type}, not portable to TensorRT 10.3"
            )
