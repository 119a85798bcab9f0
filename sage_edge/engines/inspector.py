"""What an engine became: TensorRT's engine inspector, read into a report of achieved precision.

TensorRT may fuse, reformat and choose kernels, but a strongly typed network must keep the types of its graph. Whether it
did is read from the inspector's JSON (detailed verbosity): each layer's output types, compared with the types that the
ONNX nodes behind it have. Pure; the JSON's form is that of NVIDIA's documentation, "Engine Inspector".
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from sage_edge.engines.graph_cost import Value
from sage_edge.errors import EngineError

# Words of "Format/Datatype", such as "Half", "Row major linear FP16 format" or "Thirty-two wide ... Int8 format".
WORDS = {
    "fp8": "fp8", "bfloat16": "bf16", "bf16": "bf16", "half": "fp16", "fp16": "fp16", "int8": "int8", "int4": "int4",
    "float": "fp32", "fp32": "fp32", "int64": "int64", "int32": "int32", "bool": "bool", "uint8": "uint8",
}  # fmt: skip
ORDER = ("fp32", "bf16", "fp16", "int8", "fp8")
MHA = re.compile(r"(?<![a-z])f?mha(?![a-z])")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e\x1f]+)\]")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine. outputs: types it writes; expected: types of its ONNX nodes' outputs, empty if unknown."""

    name: str
    kind: str
    tactic: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    expected: tuple[str, ...]

    @property
    def silently_fp32(self) -> bool:
        """Writes fp32 though no ONNX node behind it does."""
        return bool(self.expected) and "fp32" in self.outputs and "fp32" not in self.expected

    @property
    def fused_attention(self) -> bool:
        """Whether the kernel is one of TensorRT's fused multi-head attentions, by its name."""
        return MHA.search(f"{self.kind} {self.tactic} {self.name}".lower()) is not None


@dataclass(frozen=True)
class LayerReport:
    """The layers of one graph's engine. detailed False: the plan was built without details, nothing is known."""

    graph: str
    detailed: bool
    layers: tuple[Layer, ...]

    @property
    def achieved(self) -> dict[str, int]:
        """How many layers write each type."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for kind in layer.outputs:
                found[kind] = found.get(kind, 0) + 1
        return found

    @property
    def silent(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.silently_fp32)

    @property
    def fused_attentions(self) -> int:
        return sum(layer.fused_attention for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        return {"graph": self.graph, "detailed": self.detailed, "achieved": self.achieved,
                "fused_attentions": self.fused_attentions, "silently_fp32": [layer.name for layer in self.silent],
                "layers": [asdict(layer) for layer in self.layers]}  # fmt: skip


def read_layers(graph: str, text: str, types: dict[str, set[str]]) -> LayerReport:
    """Read the inspector's answer about a whole engine. types: of each ONNX node's outputs, by node name.

    Raises EngineError for text that is not the inspector's JSON.
    """
    try:
        parsed = json.loads(text)
        entries = parsed["Layers"] if isinstance(parsed, dict) else parsed
        if not isinstance(entries, list):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{graph}: the engine inspector gave no list of layers") from error
    detailed = all(isinstance(entry, dict) for entry in entries)
    return LayerReport(graph, detailed, tuple(_layer(entry, types) for entry in entries))


def _layer(entry: Any, types: dict[str, set[str]]) -> Layer:
    if not isinstance(entry, dict):  # names only
        return Layer(str(entry), "", "", (), (), (), ())
    nodes = tuple(dict.fromkeys(ONNX_LAYER.findall(str(entry.get("Metadata", "")))))
    expected = {kind for node in nodes for kind in types.get(node, set())}
    return Layer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        tactic=str(entry.get("TacticName", "")),
        inputs=_types(entry.get("Inputs")),
        outputs=_types(entry.get("Outputs")),
        nodes=nodes,
        expected=tuple(sorted(expected)),
    )


def _types(tensors: Any) -> tuple[str, ...]:
    found = set()
    for tensor in tensors if isinstance(tensors, list) else []:
        words = re.findall(r"[a-z]+[0-9]*", str(tensor.get("Format/Datatype", "")).lower())
        found |= {WORDS[word] for word in words if word in WORDS}
    return tuple(sorted(found))


def node_types(nodes: list[tuple[str, list[str]]], values: dict[str, Value]) -> dict[str, set[str]]:
    """Types of each node's outputs; nodes: (name, names of its outputs)."""
    return {name: {values[out].type for out in outputs if out in values} for name, outputs in nodes}
