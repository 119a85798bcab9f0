"""The static TensorRT check passes our own graphs and names every fault that we know how to seed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from sage_edge.bundle import BUNDLE_FILE, load_bundle
from sage_edge.cli.main import main
from sage_edge.engines.tensorrt_support import TABLE, check_model, check_support, release_of, releases
from sage_edge.errors import InputError
from sage_edge.files import sha256
from sage_edge.models import shipped
from tests.conftest import TINY

pytest.importorskip("torch")

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = TINY.H_cycles * (TINY.H_layers + TINY.L_cycles * TINY.L_layers)


@pytest.mark.parametrize("release", releases())
def test_our_graphs_are_taken_and_every_attention_is_fusable(tiny_bundle: Path, release: str) -> None:
    report = check_support(tiny_bundle, load_bundle(tiny_bundle), release)
    assert [f for f in report.findings if f.severity == "error"] == []
    assert (report.attentions, report.fusable) == (LAYERS, LAYERS)


def test_the_shipped_model_too() -> None:
    folder = shipped("sudoku9")
    assert folder is not None
    report = check_support(folder / "bundle", load_bundle(folder / "bundle"), "10.3")
    assert report.passed
    assert report.attentions == report.fusable == 12
    (note,) = report.findings
    assert note.problem.startswith("attention in fp32: TensorRT's fused kernels take")


def test_the_table_of_a_version_is_the_newest_that_is_not_newer() -> None:
    assert [release_of(v) for v in ("10.3", "10.3.0", "10.9.1", "10.16.2", "11.0", "11.4.0.106")] == [
        "10.3", "10.3", "10.3", "10.16", "10.16", "11.1"
    ]  # fmt: skip
    for version in ("8.6", "10.2", "newest", ""):
        with pytest.raises(InputError, match="expected 10.3 or newer"):
            release_of(version)


def test_every_operator_of_the_table_exists() -> None:
    """A misspelt name would let nothing through, or be a rule for nothing."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    obsolete = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # parsed by TensorRT, no longer in ONNX
    words = set(re.findall(r"\b[A-Z][A-Za-z0-9]{1,}\b", re.sub(r"#.*", "", TABLE.read_text())))
    assert words - known - obsolete - {"GA", "TensorRT"} == set()
    assert len(words) > 140


def graph(bundle: Path, name: str = "refine") -> ModelProto:
    return onnx.load(str(bundle / f"{name}.onnx"))


def nodes(model: ModelProto, op: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def constant(model: ModelProto, name: str, array: object) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def unknown_operator(model: ModelProto) -> None:
    nodes(model, "Sqrt")[0].op_type = "Det"


def contrib_operator(model: ModelProto) -> None:
    nodes(model, "Sigmoid")[0].domain = "com.microsoft"


def newer_operator(model: ModelProto) -> None:
    node = nodes(model, "Reciprocal")[0]
    node.op_type = "RMSNormalization"
    node.input.append(constant(model, "gain", np.ones(1, np.float32)))


def newer_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 23


def computed_axes(model: ModelProto) -> None:
    node = nodes(model, "ReduceMean")[0]
    constant(model, "one64", np.array([1], np.int64))
    model.graph.node.insert(0, helper.make_node("Mul", [node.input[1], "one64"], ["axes_now"], name="axes_maker"))
    node.input[1] = "axes_now"


def double_values(model: ModelProto) -> None:
    node = nodes(model, "Sqrt")[0]
    model.graph.node.insert(
        0, helper.make_node("Cast", ["z_H"], ["z_H_double"], to=TensorProto.DOUBLE, name="to_double")
    )
    model.graph.node.insert(1, helper.make_node("Abs", ["z_H_double"], ["nothing"], name="abs_double"))
    assert node


def cast_to_int8(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["z_H"], ["z8"], to=TensorProto.INT8, name="to_int8"))


def dynamic_positions(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "positions"


def data_dependent(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("NonZero", ["z_H"], ["where"], name="where_not_zero"))


def between_slots(model: ModelProto) -> None:
    constant(model, "flat", np.array([-1, TINY.hidden_size], np.int64))
    model.graph.node.extend([
        helper.make_node("Reshape", ["z_H", "flat"], ["rows"], name="rows"),
        helper.make_node("Transpose", ["rows"], ["columns"], perm=[1, 0], name="columns"),
        helper.make_node("MatMul", ["rows", "columns"], ["everybody"], name="everybody"),
    ])  # fmt: skip


def a_loop(model: ModelProto) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["looped"], name="loop", body=body))


def large_topk(model: ModelProto) -> None:
    k = constant(model, "k", np.array([4000], np.int64))
    model.graph.node.append(helper.make_node("TopK", ["z_H", k], ["values", "places"], name="top"))


@pytest.mark.parametrize(
    ("edit", "release", "node", "problem", "change"),
    [
        (unknown_operator, "10.3", "", "TensorRT 10.3 has no importer for Det", "export it as operators of opset 19"),
        (contrib_operator, "10.3", "", "operator of the domain 'com.microsoft'", "give the portable bundle"),
        (newer_operator, "10.3", "", "TensorRT 10.3 has no importer for RMSNormalization", "operators of opset 19"),
        (newer_opset, "10.3", "", "opset 23; TensorRT 10.3 takes 9..20", "export as opset 19"),
        (computed_axes, "11.1", "", "its input 'axes' is computed", "make 'axes' a constant"),
        (double_values, "10.3", "abs_double", "'z_H_double' is fp64; TensorRT 10.3 takes Abs in fp32", "cast to fp32"),
        (cast_to_int8, "10.3", "to_int8", "a cast to int8", "QuantizeLinear and a scale"),
        (dynamic_positions, "10.3", "context", "axis 1 of 'context' is dynamic .positions.", "the only dynamic axis"),
        (data_dependent, "10.3", "where_not_zero", "the shape of 'where' depends on more than", "static shapes"),
        (
            between_slots,
            "10.3",
            "everybody",
            "'everybody' has 2 axes that grow with the slots",
            "must not see each other",
        ),
        (a_loop, "10.3", "loop", "control flow inside the graph", "keep the loop in the runtime"),
        (large_topk, "10.3", "top", "K below 3840", "lower K"),
    ],
)
def test_a_fault_is_named_with_its_node_and_its_cure(
    tiny_bundle: Path, edit: Callable[[ModelProto], None], release: str, node: str, problem: str, change: str
) -> None:
    model = graph(tiny_bundle)
    edit(model)
    errors = [f for f in check_model("refine", model, release)[0] if f.severity == "error"]
    matching = [f for f in errors if re.search(problem, f.problem) and re.search(change, f.change)]
    assert matching, errors
    assert not node or matching[0].node == node


def test_newer_releases_take_the_newer_operator(tiny_bundle: Path) -> None:
    model = graph(tiny_bundle)
    newer_operator(model)
    newer_opset(model)
    assert not [f for f in check_model("refine", model, "10.16")[0] if f.op == "RMSNormalization"]


# Attention


def scale_after(model: ModelProto) -> None:
    softmax = next(n for n in nodes(model, "Softmax") if n.output[0] != "signals")
    constant(model, "late", np.float32(0.5))
    at = list(model.graph.node).index(softmax)
    model.graph.node.insert(at, helper.make_node("Mul", [softmax.input[0], "late"], ["scaled_late"], name="late_scale"))
    softmax.input[0] = "scaled_late"


def no_scale(model: ModelProto) -> None:
    for node in nodes(model, "Mul"):
        for index, name in enumerate(node.input):
            array = next((t for t in model.graph.initializer if t.name == name and not t.dims), None)
            if array is not None:
                node.op_type = "Identity"
                del node.input[index]
                break


def weights_read_elsewhere(model: ModelProto) -> None:
    softmax = nodes(model, "Softmax")[0]
    model.graph.node.append(helper.make_node("Abs", [softmax.output[0]], ["seen"], name="looks"))


@pytest.mark.parametrize(
    ("edit", "problem", "broken"),
    [
        (scale_after, "the scale is applied after the first product", 1),
        (no_scale, "no scale on queries or keys before the first product", LAYERS),
        (weights_read_elsewhere, "read by something other than one product", 1),
    ],
)
def test_attention_outside_of_the_fusable_pattern_is_noted(
    tiny_bundle: Path, edit: Callable[[ModelProto], None], problem: str, broken: int
) -> None:
    model = graph(tiny_bundle)
    edit(model)
    findings, layers = check_model("refine", model, "10.3")
    assert len(layers) == LAYERS
    assert sum(bool(layer.problem) for layer in layers) == broken
    assert any(problem in f.problem and f.severity == "note" for f in findings)


def test_casts_around_the_softmax_do_not_hide_the_pattern(tiny_bundle: Path) -> None:
    """A lowered graph keeps softmax in fp32 between products in fp16."""
    model = graph(tiny_bundle)
    for softmax in nodes(model, "Softmax"):
        before, after = f"{softmax.name}/before", f"{softmax.name}/after"
        at = list(model.graph.node).index(softmax)
        inner = helper.make_node("Cast", [softmax.input[0]], [before], to=TensorProto.FLOAT)
        outer = helper.make_node("Cast", [after], [softmax.output[0]], to=TensorProto.FLOAT)
        softmax.input[0], softmax.output[0] = before, after
        model.graph.node.insert(at + 1, outer)
        model.graph.node.insert(at, inner)
    assert sum(not layer.problem for layer in check_model("refine", model, "10.3")[1]) == LAYERS


# Q/DQ


def quantized(change: Callable[[dict[str, object]], None] = lambda parts: None) -> ModelProto:
    """y = dq(q(x)) @ dq(w8) in INT8 over x [slots, 4], w [4, 8]; `change` edits what it is made of."""
    parts: dict[str, object] = {
        "x_scale": np.float32(0.1), "x_zero": np.int8(0), "w_scale": np.full(8, 0.1, np.float32),
        "w_zero": np.zeros(8, np.int8), "w": np.ones((4, 8), np.int8), "axis": 1, "right": "wd", "extra": [],
    }  # fmt: skip
    change(parts)
    model_nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"], name="q"),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"], name="dq_x"),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], name="dq_w", axis=parts["axis"]),
        helper.make_node("MatMul", ["xd", str(parts["right"])], ["y"], name="product"),
        *parts["extra"],  # type: ignore[misc]
    ]
    arrays = [
        numpy_helper.from_array(np.asarray(v), k) for k, v in parts.items() if k not in ("axis", "right", "extra")
    ]
    arrays.append(numpy_helper.from_array(np.ones((4, 8), np.float32), "plain"))
    made = helper.make_graph(model_nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["slots", 4])],
                             [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["slots", 8])], arrays)  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_well_placed_quantization_has_no_findings() -> None:
    assert check_model("refine", quantized(), "10.3")[0] == []


def fp8(kind: int) -> Callable[[dict[str, object]], None]:
    import ml_dtypes

    dtype = ml_dtypes.float8_e4m3fn if kind == TensorProto.FLOAT8E4M3FN else ml_dtypes.float8_e5m2

    def change(parts: dict[str, object]) -> None:
        parts |= {"x_zero": np.zeros((), dtype), "w_zero": np.zeros(8, dtype), "w": np.ones((4, 8), dtype)}

    return change


def test_fp8_is_taken_as_e4m3_only() -> None:
    assert check_model("refine", quantized(fp8(TensorProto.FLOAT8E4M3FN)), "10.3")[0] == []
    findings = check_model("refine", quantized(fp8(TensorProto.FLOAT8E5M2)), "10.3")[0]
    assert {f.problem for f in findings} == {"float8e5m2"}


@pytest.mark.parametrize(
    ("change", "node", "severity", "problem"),
    [
        ({"x_zero": np.int8(3)}, "q", "error", "its 'y_zero_point' is not zero"),
        ({"w_zero": np.arange(8, dtype=np.int8)}, "dq_w", "error", "its 'x_zero_point' is not zero"),
        ({"x_zero": np.uint8(0)}, "q", "error", "uint8"),
        ({"x_scale": np.full(4, 0.1, np.float32)}, "q", "error", "an activation with more than one scale"),
        ({"x_scale": np.float32(0)}, "q", "error", "its scale holds zero"),
        ({"x_scale": np.float32(np.nan)}, "q", "error", "its scale holds zero, a negative number, NaN"),
        ({"w_scale": np.full(4, 0.1, np.float32), "w_zero": np.zeros(4, np.int8), "axis": 0}, "dq_w", "error",
         "scales along axis 0, which the product sums over"),
        ({"w_scale": np.full(5, 0.1, np.float32)}, "dq_w", "error", "5 scales for an axis of 8"),
        ({"right": "plain"}, "product", "note", "only its activations are quantized"),
        ({"extra": [helper.make_node("Abs", ["xq"], ["a"], name="abs")]}, "q", "error",
         "read by something other than DequantizeLinear"),
        ({"right": "plain", "extra": [helper.make_node("Exp", ["wd"], ["e"], name="exp")]}, "dq_w", "note",
         "no product reads it, but Exp"),
    ],
)  # fmt: skip
def test_misplaced_quantization_is_named(change: dict[str, object], node: str, severity: str, problem: str) -> None:
    findings = check_model("refine", quantized(lambda parts: parts.update(change)), "10.3")[0]
    found = [f for f in findings if problem in f.problem]
    assert found, findings
    assert (node, severity) in {(f.node, f.severity) for f in found}


# The command


def test_the_command_says_which_node_and_what_to_change(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tiny_bundle), "--target", "tensorrt:10.3"]) == 0
    assert f"{LAYERS} of {LAYERS} attention layers in the fusable pattern" in capsys.readouterr().out
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    model = graph(broken)
    unknown_operator(model)
    before = sha256(broken / "refine.onnx")
    onnx.save(model, str(broken / "refine.onnx"))
    text = (broken / BUNDLE_FILE).read_text()
    (broken / BUNDLE_FILE).write_text(text.replace(before, sha256(broken / "refine.onnx")))
    assert main(["check", str(broken), "--target", "tensorrt:10.16.2", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    (error,) = [f for f in report["findings"] if f["op"] == "Det"]
    assert error["node"]
    assert error["change"]


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt:8.6", "openvino:1"])
def test_a_target_that_is_none_is_refused(target: str, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_bundle), "--target", target]) == 2
    assert "expected" in capsys.readouterr().err
