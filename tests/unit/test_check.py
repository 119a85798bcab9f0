"""The gate passes a good model and catches every fault that we know how to seed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sage_edge.bundle import load_bundle
from sage_edge.check import CheckReport, Reference, check, load_reference
from sage_edge.engines.ort import OrtRunner
from sage_edge.errors import GateError, InputError, IntegrityError
from tests.conftest import TINY, tiny_hrm

pytest.importorskip("torch")


def examine(folder: Path, bundle: Path, reference: Reference | None = None) -> CheckReport:
    """Check graphs of `folder`, which may be tampered with, under the specs of `bundle`; digests are not looked at."""
    known = reference or load_reference(bundle / "reference.npz")
    with OrtRunner(folder, load_bundle(bundle).model, 4, 1, optimized=True, digest="0" * 64) as runner:
        return check(runner, known)


def test_a_good_bundle_passes_every_check(tiny_bundle: Path) -> None:
    report = examine(tiny_bundle, tiny_bundle)
    assert report.passed, report.failures
    assert len(report.steps) == TINY.halt_max_steps
    assert all(s.same_carry_max < 1e-4 and s.prediction_agreement == 1 for s in report.steps)
    assert report.steps[0].amplification == 0  # nothing has been disturbed yet
    assert report.steps[1].amplification > 0


Edit = Callable[[ModelProto], None]


def weight(model: ModelProto, part: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Replace the initializer whose name contains `part`."""
    (found,) = [i for i in model.graph.initializer if part in i.name]
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found).copy()), found.name))


def nodes(model: ModelProto, op: str) -> list[NodeProto]:
    return [n for n in model.graph.node if n.op_type == op]


def rename_output(model: ModelProto, name: str) -> str:
    """Free the graph output `name`: whoever made it now makes the returned name."""
    for node in model.graph.node:
        node.output[:] = [f"{name}_real" if o == name else o for o in node.output]
        node.input[:] = [f"{name}_real" if i == name else i for i in node.input]
    return f"{name}_real"


def feed_output(model: ModelProto, name: str, source: str) -> None:
    model.graph.node.append(helper.make_node("Identity", [source], [name]))


def swap_new_carries(model: ModelProto) -> None:
    high, low = rename_output(model, "z_H_next"), rename_output(model, "z_L_next")
    feed_output(model, "z_H_next", low)
    feed_output(model, "z_L_next", high)


def freeze(model: ModelProto) -> None:
    rename_output(model, "z_H_next")
    rename_output(model, "z_L_next")
    feed_output(model, "z_H_next", "z_H")
    feed_output(model, "z_L_next", "z_L")


def leak_between_slots(model: ModelProto) -> None:
    """Add a thousandth of the mean over all slots to the new state."""
    real = rename_output(model, "z_H_next")
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis0"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "thousandth"))
    model.graph.node.extend([
        helper.make_node("ReduceMean", [real, "axis0"], ["mean0"], keepdims=1),
        helper.make_node("Mul", ["mean0", "thousandth"], ["leak"]),
        helper.make_node("Add", [real, "leak"], ["z_H_next"]),
    ])  # fmt: skip


def reorder_signals(order: list[int]) -> Edit:
    def edit(model: ModelProto) -> None:
        real = rename_output(model, "signals")
        model.graph.initializer.append(numpy_helper.from_array(np.array(order), "order"))
        model.graph.node.append(helper.make_node("Gather", [real, "order"], ["signals"], axis=1))

    return edit


def scale_signal(column: int, factor: float) -> Edit:
    def edit(model: ModelProto) -> None:
        real = rename_output(model, "signals")
        scale = np.ones(6, np.float32)
        scale[column] = factor
        model.graph.initializer.append(numpy_helper.from_array(scale, "scale"))
        model.graph.node.append(helper.make_node("Mul", [real, "scale"], ["signals"]))

    return edit


def all_attention_over_queries(model: ModelProto) -> None:
    for node in nodes(model, "Softmax"):
        node.attribute[0].i = -2


def constant_input(model: ModelProto) -> None:
    """Agent Zero: whatever is asked, token 0 is read."""
    model.graph.initializer.append(numpy_helper.from_array(np.int32(0), "nothing"))
    model.graph.node.insert(0, helper.make_node("Mul", ["inputs", "nothing"], ["ignored"]))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["ignored" if i == "inputs" else i for i in node.input]


def swap_first_carries(model: ModelProto) -> None:
    high, low = rename_output(model, "z_H"), rename_output(model, "z_L")
    feed_output(model, "z_H", low)
    feed_output(model, "z_L", high)


def answer_the_worst(model: ModelProto) -> None:
    (node,) = nodes(model, "ArgMax")
    node.op_type = "ArgMin"


def shift_decode(model: ModelProto) -> None:
    """Read the answer one position too early: a token of the puzzle prefix comes first."""
    (node,) = nodes(model, "Slice")
    (start,) = [i for i in model.graph.initializer if i.name == node.input[1]]
    (end,) = [i for i in model.graph.initializer if i.name == node.input[2]]
    start.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(start) - 1, start.name))
    stop = TINY.positions - 1
    end.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(end), stop), end.name))


def weaken_epsilon(model: ModelProto) -> None:
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.size == 1 and array.dtype == np.float32 and abs(float(array.ravel()[0]) - 1e-5) < 1e-9:
            initializer.CopyFrom(numpy_helper.from_array(np.full_like(array, 1e-2), initializer.name))
            return
    raise AssertionError("no epsilon found")


def gate_without_silu(model: ModelProto) -> None:
    """gate instead of silu(gate) in one block."""
    sigmoid = nodes(model, "Sigmoid")[0]
    consumer = next(n for n in nodes(model, "Mul") if sigmoid.output[0] in n.input)
    consumer.input[:] = [sigmoid.input[0], sigmoid.input[0]]


def reverse_rotation(model: ModelProto) -> None:
    nodes(model, "Neg")[0].op_type = "Identity"


FAULTS: dict[str, tuple[str, Edit]] = {
    "one weight changed": ("refine", lambda m: weight(m, "H_level.layers.0.self_attn.o_proj", lambda w: w + 0.01)),
    "weight transposed": ("refine", lambda m: weight(m, "H_level.layers.0.self_attn.o_proj", lambda w: w.T.copy())),
    "NaN in a weight": (
        "refine", lambda m: weight(m, "L_level.layers.1.mlp.down_proj", lambda w: np.where(w == w.max(), np.nan, w))
    ),
    "weights rounded to half a byte": (
        "refine", lambda m: weight(m, "L_level.layers.0.self_attn.qkv_proj", lambda w: np.round(w * 32) / np.float32(32))
    ),
    "new carries swapped": ("refine", swap_new_carries),
    "refine frozen": ("refine", freeze),
    "slots leak into each other": ("refine", leak_between_slots),
    "q_halt and q_continue swapped": ("refine", reorder_signals([1, 0, 2, 3, 4, 5])),
    "entropy in bits": ("refine", scale_signal(2, 1.4427)),
    "entropy_max is the mean": ("refine", reorder_signals([0, 1, 2, 2, 4, 5])),
    "changed is always zero": ("refine", scale_signal(4, 0.0)),
    "halting signal constant": ("refine", scale_signal(0, 0.0)),
    "softmax over queries": ("refine", all_attention_over_queries),
    "epsilon of one norm": ("refine", weaken_epsilon),
    "SiLU dropped": ("refine", gate_without_silu),
    "rotation reversed": ("refine", reverse_rotation),
    "input ignored": ("encode", constant_input),
    "first carries swapped": ("encode", swap_first_carries),
    "argmin answered": ("decode", answer_the_worst),
    "answer shifted by a position": ("decode", shift_decode),
    "lm_head zero": ("decode", lambda m: weight(m, "lm_head", np.zeros_like)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, tiny_bundle: Path, tmp_path: Path) -> None:
    graph, edit = FAULTS[fault]
    folder = tmp_path / "tampered"
    shutil.copytree(tiny_bundle, folder)
    model = onnx.load(folder / f"{graph}.onnx")
    before = model.SerializeToString()
    edit(model)
    assert model.SerializeToString() != before
    onnx.save(model, folder / f"{graph}.onnx")
    report = examine(folder, tiny_bundle)
    assert not report.passed
    assert all(f.detail for f in report.failures)


def test_a_cycle_too_few_is_caught(tiny_bundle: Path, tmp_path: Path) -> None:
    """The whole model is exported with L_cycles 1 instead of 2: a graph that is well-formed and alive."""
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.recipe import Recipe

    config = dataclasses.replace(TINY, L_cycles=1)
    wrong = tiny_hrm(config)
    wrong.load_state_dict(tiny_hrm().state_dict())
    export_bundle(wrong, Recipe("wrong", config, "0" * 64, "test"), tmp_path / "wrong")
    report = examine(tmp_path / "wrong", tiny_bundle)
    assert {f.name for f in report.failures} >= {"parity_z_H", "parity_z_L", "parity_logits"}


@pytest.mark.parametrize(
    ("collapse", "finding"),
    [("lm_head.weight", "prediction_not_collapsed"), ("q_head.weight", "halting_signal_varies")],
)
def test_a_dead_model_is_refused_though_its_graphs_are_right(collapse: str, finding: str, tmp_path: Path) -> None:
    """Parity with a collapsed reference is perfect: only the signs of life tell (the "71 % from all zeros" model)."""
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.recipe import Recipe

    dead = tiny_hrm()
    dead.get_parameter(collapse).zero_()
    with pytest.raises(GateError, match=finding):
        export_bundle(dead, Recipe("dead", TINY, "0" * 64, "test"), tmp_path / "dead")
    assert not (tmp_path / "dead").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_reference_of_another_model_or_too_short_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    reference = load_reference(tiny_bundle / "reference.npz")
    with pytest.raises(InputError, match="does not hold the context and carry"):
        examine(tiny_bundle, tiny_bundle, dataclasses.replace(reference, start={"z_H": reference.start["z_H"]}))
    with pytest.raises(InputError, match="holds 1 of 4 steps"):
        examine(tiny_bundle, tiny_bundle, dataclasses.replace(reference, signals=reference.signals[:1]))
    (tmp_path / "reference.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="not an .npz file"):
        load_reference(tmp_path / "reference.npz")
    np.savez(tmp_path / "reference.npz", weather=np.zeros(3))
    with pytest.raises(IntegrityError, match="not a reference file"):
        load_reference(tmp_path / "reference.npz")
