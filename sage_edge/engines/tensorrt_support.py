"""Will TensorRT take this bundle? Said without TensorRT, from its published operator support.

`sage-edge check BUNDLE --target tensorrt:10.3`. Every finding names the node and what to change. Errors are what the parser
or the builder refuses; notes are what costs speed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import NodeProto

from sage_edge.bundle import GRAPH_NAMES, Bundle
from sage_edge.config import load_yaml
from sage_edge.engines.attention_pattern import Attention, find_attentions
from sage_edge.engines.graph_cost import TYPES, Value, declare_domains, graph_cost, lowest_precision, sized_values
from sage_edge.engines.onnx_graph import Graph, attribute
from sage_edge.engines.tensorrt_api import numbers
from sage_edge.engines.tensorrt_qdq import quantization_findings
from sage_edge.errors import InputError
from sage_edge.specs import SLOTS

TABLE = Path(__file__).with_name("tensorrt_ops.yaml")
STANDARD = ("", "ai.onnx")
LARGEST_K = 3840  # onnx-tensorrt: TopK, "K input must be less than 3840"


@dataclass(frozen=True)
class Finding:
    """One thing that TensorRT refuses (error) or runs slower than it could (note)."""

    graph: str
    node: str
    op: str
    severity: Literal["error", "note"]
    problem: str
    change: str


@dataclass(frozen=True)
class SupportReport:
    """The whole bundle against one release. attentions: layers found; fusable: of them, in TensorRT's pattern."""

    release: str
    source: str
    nodes: int
    findings: tuple[Finding, ...]
    attentions: int
    fusable: int

    @property
    def passed(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class Release:
    """One release of tensorrt_ops.yaml, words split."""

    source: str
    opset_min: int
    opset_max: int
    types: dict[str, str]
    constants: dict[str, str]
    zero: dict[str, str]


@dataclass(frozen=True)
class Table:
    families: dict[str, tuple[str, ...]]
    releases: dict[str, Release]


def releases() -> list[str]:
    """The releases that there is a table for, oldest first."""
    return sorted(load_yaml(TABLE, Table).releases, key=numbers)


def release_of(version: str) -> str:
    """The newest table that is not newer than `version`. Raises InputError for a version before the first."""
    known = [release for release in releases() if numbers(release) <= numbers(version)]
    if not numbers(version) or not known:
        raise InputError(
            f"TensorRT {version!r}: expected 10.3 or newer, such as tensorrt:10.3; tables: {', '.join(releases())}"
        )
    return known[-1]


def check_support(folder: Path, bundle: Bundle, version: str) -> SupportReport:
    """Check all graphs of a bundle against a TensorRT version ("10.3", "10.16.2"). Raises InputError."""
    release = release_of(version)
    findings: list[Finding] = []
    attentions: list[Attention] = []
    nodes = 0
    for name in GRAPH_NAMES:
        model = onnx.load(str(folder / f"{name}.onnx"), load_external_data=False)
        found, layers = check_model(name, model, release)
        findings += found
        attentions += layers
        nodes += len(model.graph.node)
    if attentions and lowest_precision([graph_cost(folder / "refine.onnx", 1)]) == "fp32":
        note = "attention in fp32: TensorRT's fused kernels take FP16, BF16, INT8 and FP8"
        findings.append(Finding("refine", "", "", "note", note, "export with --precision fp16 or lower"))
    table = load_yaml(TABLE, Table).releases[release]
    fusable = sum(not layer.problem for layer in attentions)
    return SupportReport(release, table.source, nodes, tuple(findings), len(attentions), fusable)


def check_model(name: str, model: onnx.ModelProto, release: str) -> tuple[list[Finding], list[Attention]]:
    """Findings of one graph, and its attention layers."""
    table = load_yaml(TABLE, Table)
    rules = table.releases[release]
    kinds = {op: table.families[family] for family, words in rules.types.items() for op in words.split()}
    declare_domains(model)
    graph = Graph(model)
    values, doubled = sized_values(model, 2), sized_values(model, 4)
    findings = _opset(name, model, rules, release) + _boundary(name, model)
    for node in model.graph.node:
        own = _node(name, node, graph, values, kinds, rules, release)
        findings += own or _dynamic(name, node, values, doubled)  # one reason a node is enough
    findings += [
        Finding(name, node, op, severity, problem, change)
        for node, op, severity, problem, change in quantization_findings(graph, values)
    ]
    layers = find_attentions(graph, values)
    findings += [
        Finding(
            name,
            layer.softmax,
            "Softmax",
            "note",
            f"attention is not in the fusable pattern: {layer.problem}",
            layer.change,
        )
        for layer in layers
        if layer.problem
    ]
    return findings, layers


def _opset(name: str, model: onnx.ModelProto, rules: Release, release: str) -> list[Finding]:
    opset = next((entry.version for entry in model.opset_import if entry.domain in STANDARD), 0)
    if rules.opset_min <= opset <= rules.opset_max:
        return []
    change = "export as opset 19"
    return [
        Finding(
            name,
            "",
            "",
            "error",
            f"opset {opset}; TensorRT {release} takes {rules.opset_min}..{rules.opset_max}",
            change,
        )
    ]


def _boundary(name: str, model: onnx.ModelProto) -> list[Finding]:
    """Inputs and outputs: only the first axis may be dynamic, and it must be the slots."""
    findings = []
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in constants:
            continue
        axes = value.type.tensor_type.shape.dim
        for index, axis in enumerate(axes):
            if not axis.HasField("dim_value") and (index, axis.dim_param) != (0, SLOTS):
                problem = f"axis {index} of {value.name!r} is dynamic ({axis.dim_param or 'without a name'})"
                findings.append(
                    Finding(name, value.name, "", "error", problem, "export with the slots as the only dynamic axis")
                )
    return findings


def _node(name: str, node: NodeProto, graph: Graph, values: dict[str, Value], kinds: dict[str, tuple[str, ...]],
          rules: Release, release: str) -> list[Finding]:  # fmt: skip
    label = node.name or (node.output[0] if node.output else "")

    def error(problem: str, change: str) -> list[Finding]:
        return [Finding(name, label, node.op_type, "error", problem, change)]

    if node.domain not in STANDARD:
        return error(
            f"operator of the domain {node.domain!r}", "give the portable bundle, not an engine fused for the CPU"
        )
    if node.op_type not in kinds:
        return error(
            f"TensorRT {release} has no importer for {node.op_type}", "export it as operators of opset 19 that it has"
        )
    if node.op_type in ("Loop", "Scan", "If"):
        return error("control flow inside the graph", "keep the loop in the runtime: one step is one call")
    findings: list[Finding] = []
    allowed = kinds[node.op_type]
    for value in _typed(node):
        kind = values[value].type if value in values else None
        if kind is not None and kind not in allowed:
            change = "cast to fp32 before" if kind in ("fp64", "int8", "fp8") else f"use {', '.join(allowed[:3])}"
            findings += error(
                f"{value!r} is {kind}; TensorRT {release} takes {node.op_type} in {', '.join(allowed)}", change
            )
    if (
        node.op_type == "Cast"
        and (target := TYPES.get(int(str(attribute(node, "to", 0))), ("unknown", 0))[0]) not in allowed
    ):
        findings += error(f"a cast to {target}", "quantize with QuantizeLinear and a scale instead")
    names = [
        parameter.name for parameter in onnx.defs.get_schema(node.op_type, 19 if rules.opset_max < 23 else 23).inputs
    ]
    for wanted, ops in rules.constants.items():
        value = _argument(node, names, wanted) if node.op_type in ops.split() else ""
        if value and value not in graph.constants:
            findings += error(f"its input {wanted!r} is computed", f"make {wanted!r} a constant")
    for wanted, ops in rules.zero.items():
        value = _argument(node, names, wanted) if node.op_type in ops.split() else ""
        if value and (array := graph.array(value)) is not None and np.any(np.asarray(array, np.float32) != 0):
            findings += error(f"its {wanted!r} is not zero", "quantize symmetrically, with zero point 0")
    return findings + _attributes(node, graph, error)


def _attributes(node: NodeProto, graph: Graph, error: Any) -> list[Finding]:
    """Restrictions of the table that concern attributes and single inputs."""
    if node.op_type == "TopK":
        largest = graph.scalar(node.input[1])
        if attribute(node, "sorted", 1) != 1 or (largest is not None and largest >= LARGEST_K):
            return list(error(f"sorted must be 1 and K below {LARGEST_K}", "lower K, and ask for sorted values"))
    if node.op_type == "LayerNormalization" and len([out for out in node.output if out]) > 1:
        return list(error("more than the first output is used", "use only the normalised output"))
    if node.op_type == "ScatterND" and attribute(node, "reduction", b"none") != b"none":
        return list(error("a reduction", "use reduction none"))
    if node.op_type in ("MaxPool", "AveragePool", "LpPool"):
        dilations = attribute(node, "dilations", [])
        if isinstance(dilations, list) and any(n != 1 for n in dilations):
            return list(error("dilations other than one", "pool without dilations"))
    return []


def _typed(node: NodeProto) -> list[str]:
    """The values whose types the table speaks of: data, not axes, shapes or scales; outputs where there is no input."""
    ops_by_first = ("Gather", "GatherElements", "GatherND", "Slice", "Reshape", "Expand", "Squeeze", "Unsqueeze", "Pad", "Tile",
                    "Split", "TopK", "OneHot", "Trilu", "CumSum", "QuantizeLinear", "DequantizeLinear", "Cast")  # fmt: skip
    if node.op_type in ("Shape", "Size", "Constant", "ConstantOfShape", "Range"):
        return [] if node.op_type in ("Shape", "Size") else [node.output[0]]
    if node.op_type.startswith("Reduce") or node.op_type in ops_by_first:
        return list(node.input[:1])
    if node.op_type == "Where":
        return list(node.input[1:3])
    return [name for name in node.input if name]


def _argument(node: NodeProto, names: list[str], wanted: str) -> str:
    """The value given for an input by its name in the operator's schema; empty if it is not given."""
    if wanted not in names or names.index(wanted) >= len(node.input):
        return ""
    return str(node.input[names.index(wanted)])


def _dynamic(name: str, node: NodeProto, values: dict[str, Value], doubled: dict[str, Value]) -> list[Finding]:
    """Shapes that depend on data, or on the slots in more than one axis."""
    findings: list[Finding] = []
    if any(source and source not in values for source in node.input):
        return findings  # said of the node before it
    for out in node.output:
        if not out:
            continue
        label = node.name or out
        if out not in values or out not in doubled:
            problem = f"the shape of {out!r} depends on more than the number of slots"
            findings.append(
                Finding(name, label, node.op_type, "error", problem, "export with static shapes but for the slots")
            )
            continue
        moving = [a for a, b in zip(values[out].shape, doubled[out].shape, strict=False) if a != b]
        if len(values[out].shape) != len(doubled[out].shape) or len(moving) > 1:
            problem = f"{out!r} has {len(moving)} axes that grow with the slots"
            findings.append(Finding(name, label, node.op_type, "error", problem, "slots must not see each other"))
    return findings
