"""TensorRT engines from bundle to runner on the stand-in for TensorRT: plans, folders, errors, and the whole gate.

What the stand-in cannot say: whether TensorRT itself takes the graph, and how fast it runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("cuda.bindings.runtime")

from sage_edge.bundle import load_bundle
from sage_edge.cli.main import main
from sage_edge.config import dump_yaml
from sage_edge.engines.accelerated import build_accelerated, bundle_costs, memory_estimate, refuse_memory
from sage_edge.engines.accelerator_null import NullDevice
from sage_edge.engines.build import Built, cache_directory, open_engine
from sage_edge.engines.gpu_recipe import GpuRecipe, Profile, TensorRTOptions
from sage_edge.engines.manifest import load_manifest
from sage_edge.errors import (
    DeviceLostError,
    EngineError,
    GateError,
    InputError,
    IntegrityError,
    MissingDependencyError,
    SageError,
)
from tests.devices import fake_tensorrt
from tests.devices.fake_cuda import FakeCuda

RECIPE = GpuRecipe("desktop", "tensorrt", "fp32", (Profile(1, 1, 1), Profile(2, 4, 4)))


@pytest.fixture
def trt() -> Iterator[Any]:
    with fake_tensorrt.installed() as module:
        yield module


def built_in(folder: Path, bundle: Path, recipe: GpuRecipe = RECIPE) -> Built:
    return build_accelerated(bundle, recipe, folder / "engine")


def test_a_build_makes_plans_passes_the_gate_and_is_found_again(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, float]] = []
    built = build_accelerated(
        tiny_bundle, RECIPE, tmp_path / "engine", lambda stage, done: stages.append((stage, done))
    )
    manifest = built.manifest
    assert {"encode.plan", "refine.plan", "decode.plan", "layers.json", "bundle.yaml", "reference.npz"} == set(
        manifest.files
    )
    assert manifest.versions["tensorrt"] == "10.3.0"
    assert manifest.device == "cuda/Fake GPU sm_90"
    assert {g.name for g in manifest.gate} >= {"parity_z_H", "input_sensitivity", "slot_independence"}
    fractions = [done for _, done in stages]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert any(stage == "refine: Tactic Selection" for stage, _ in stages)
    again = build_accelerated(tiny_bundle, RECIPE, tmp_path / "engine")
    assert again.cached
    assert len(trt.behave.builds) == 3


def test_what_the_builder_is_told(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    options = TensorRTOptions(workspace_mib=256, tactic_dram_mib=512, optimization_level=5, strip_refit=True,
                              version_compatible=True, hardware="ampere-plus")  # fmt: skip
    built_in(tmp_path, tiny_bundle, dataclasses.replace(RECIPE, tensorrt=options))
    told = trt.behave.builds[1]  # refine
    assert {pool.name: size for pool, size in told["pools"].items()} == {
        "WORKSPACE": 256 << 20,
        "TACTIC_DRAM": 512 << 20,
    }
    assert {flag.name for flag in told["flags"]} == {"STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE"}  # no TF32
    assert told["level"] == 5
    assert told["hardware"].name == "AMPERE_PLUS"
    assert [[shape[0] for shape in profile["z_H"]] for profile in told["profiles"]] == [[1, 1, 1], [2, 4, 4]]
    assert (tmp_path / "engine" / "refine.onnx").is_file()  # what a stripped plan is filled from


def test_tf32_is_off_unless_asked_for(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    built_in(tmp_path, tiny_bundle, dataclasses.replace(RECIPE, tensorrt=TensorRTOptions(tf32=True)))
    assert {flag.name for flag in trt.behave.builds[0]["flags"]} == {"TF32"}


def test_the_timing_cache_is_kept_per_release_and_device(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    file = cache_directory() / "timing" / "10.3.0-cuda-Fake-GPU-sm-90.cache"
    file.unlink(missing_ok=True)
    built_in(tmp_path / "one", tiny_bundle)
    assert file.read_bytes() == b"***"
    built_in(tmp_path / "two", tiny_bundle, dataclasses.replace(RECIPE, tensorrt=TensorRTOptions(optimization_level=1)))
    assert trt.behave.builds[3]["cache"] == b"***"  # the second build begins with what the first measured
    without = dataclasses.replace(RECIPE, tensorrt=TensorRTOptions(timing_cache=False))
    built_in(tmp_path / "three", tiny_bundle, without)
    assert trt.behave.builds[6]["cache"] is None
    assert file.read_bytes() == b"*" * 6


def test_a_graph_that_the_parser_refuses_is_named_by_node_and_operator(
    trt: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    trt.behave.refuse = {"Softmax"}
    with pytest.raises(InputError) as error:
        built_in(tmp_path, tiny_bundle)
    assert "refine.onnx: TensorRT 10.3.0 does not take it" in str(error.value)
    assert "(Softmax): No importer registered for op [UNSUPPORTED_NODE]" in str(error.value)
    assert not (tmp_path / "engine").exists()


def test_a_build_without_memory_is_tried_again_with_fewer_slots(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    trt.behave.most_slots = 2
    built = built_in(tmp_path, tiny_bundle)
    assert built.manifest.slots == 2
    assert built.manifest.gpu is not None
    assert built.manifest.gpu.profiles[-1].max == 2
    assert any("4 slots did not fit into memory while building" in note for note in built.manifest.notes)
    assert built_in(tmp_path, tiny_bundle).cached  # the same wish finds it, though it got less
    trt.behave.most_slots = 0
    with pytest.raises(EngineError, match="out of memory even for one slot.*lower tensorrt.workspace_mib"):
        built_in(tmp_path / "other", tiny_bundle)


def test_ctrl_c_ends_a_build_and_leaves_nothing(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    trt.behave.during_build = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        built_in(tmp_path, tiny_bundle)
    assert len(trt.behave.builds) == 1
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_gate_refuses_a_built_engine_that_is_not_the_model(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    trt.behave.wrong = 0.01
    with pytest.raises(GateError, match="parity_z_H"):
        built_in(tmp_path, tiny_bundle)
    assert not (tmp_path / "engine").exists()


def test_layers_that_run_in_fp32_behind_the_graphs_back_are_reported(
    trt: Any, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny graph is fp32 throughout; here its types are said to be fp16, as those of a lowered graph are."""
    import sage_edge.engines.target_tensorrt as target

    def lowered(nodes: list[tuple[str, list[str]]], values: object) -> dict[str, set[str]]:
        return {name: {"fp16"} for name, _ in nodes}

    import onnx

    nodes = onnx.load(str(tiny_bundle / "refine.onnx")).graph.node
    trt.behave.fp32_layers = {nodes[5].name}
    monkeypatch.setattr(target, "node_types", lowered)
    built = built_in(tmp_path, tiny_bundle)
    assert f"refine: 1 layers run in fp32 though the graph does not say so: {nodes[5].name}" in built.manifest.notes
    layers = json.loads((tmp_path / "engine" / "layers.json").read_text())
    assert layers["refine"]["silently_fp32"] == [nodes[5].name]
    assert layers["refine"]["achieved"]["fp16"] == len(nodes) - 1
    assert layers["refine"]["fused_attentions"] == len([n for n in nodes if n.op_type == "Softmax"])


def test_a_plan_without_details_says_so(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    trt.behave.detailed = False
    assert any("the inspector gave no details" in note for note in built_in(tmp_path, tiny_bundle).manifest.notes)


def test_the_runner_of_a_built_engine_captures_and_answers(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    built = built_in(tmp_path, tiny_bundle)
    with open_engine(built.path) as runner, open_cpu(tiny_bundle) as plain:
        observed = runner.model.random_observation(4)
        ours, theirs = runner.encode(observed), plain.encode(observed)
        for _ in range(4):
            np.testing.assert_allclose(runner.refine(ours), plain.refine(theirs), atol=1e-5)
        described = runner.describe()  # type: ignore[attr-defined]
        assert described["graphs_captured"] == 2
        assert described["notes"] == []
    assert fake_tensorrt.cuda.arrays == {}  # all memory is given back


def open_cpu(bundle: Path) -> Any:
    from sage_edge.engines.build import open_bundle

    return open_bundle(bundle, slots=4)


def test_a_stripped_plan_is_filled_when_it_is_opened(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, tensorrt=TensorRTOptions(strip_refit=True))
    with open_engine(built_in(tmp_path, tiny_bundle, recipe).path) as runner:
        runner.refine(runner.encode(runner.model.random_observation(1)))  # the stand-in refuses to run it unfilled


@pytest.mark.parametrize(
    ("built", "here", "options", "message"),
    [
        ("10.3.0", "10.3.0", {}, None),
        ("10.3.0", "10.16.1.11", {}, "built with TensorRT 10.3.0, installed is 10.16.1.11; build it again"),
        ("10.16.1.11", "10.3.0", {"version_compatible": True}, "installed is 10.3.0"),
        ("10.3.0", "11.4.0.106", {"version_compatible": True}, "installed is 11.4.0.106"),
    ],
)
def test_a_plan_of_another_version_is_refused(
    built: str, here: str, options: dict[str, Any], message: str | None, tiny_bundle: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, tensorrt=TensorRTOptions(**options))
    with fake_tensorrt.installed(built):
        path = built_in(tmp_path, tiny_bundle, recipe).path
    with fake_tensorrt.installed(here):
        runner = open_engine(path)
        if message is None:
            runner.activate()
            runner.deactivate()
        else:
            with pytest.raises(InputError, match=message):
                runner.activate()


@pytest.mark.parametrize(
    ("hardware", "capability", "name", "message"),
    [
        ("same", (8, 7), b"Orin", "built for cuda/Fake GPU sm_90, this GPU is cuda/Orin sm_87"),
        ("same", (9, 0), b"Another GPU", "this GPU is cuda/Another GPU sm_90"),
        ("ampere-plus", (8, 7), b"Orin", None),
        ("ampere-plus", (7, 5), b"Turing", "this GPU is cuda/Turing sm_75"),
    ],
)
def test_a_plan_of_another_gpu_is_refused(
    hardware: Any, capability: tuple[int, int], name: bytes, message: str | None, tiny_bundle: Path, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, tensorrt=TensorRTOptions(hardware=hardware))
    with fake_tensorrt.installed():
        path = built_in(tmp_path, tiny_bundle, recipe).path
    with fake_tensorrt.installed(gpu=FakeCuda(capability, name=name)):
        runner = open_engine(path)
        if message is None:
            runner.activate()
            runner.deactivate()
        else:
            with pytest.raises(InputError, match=message):
                runner.activate()


def test_a_changed_plan_is_not_loaded(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    path = built_in(tmp_path, tiny_bundle).path
    plan = path / "refine.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"refine\.plan: changed since manifest\.yaml was written"):
        open_engine(path)


def test_a_step_that_fails_says_what_tensorrt_said(trt: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    with open_engine(built_in(tmp_path, tiny_bundle).path) as runner:
        state = runner.encode(runner.model.random_observation(1))
        trt.behave.enqueue = False
        with pytest.raises(EngineError, match="refine.plan: TensorRT could not run it: CUDA error 700"):
            runner.refine(state)
        fake_tensorrt.cuda.fail("cudaEventSynchronize", "cudaErrorIllegalAddress")
        trt.behave.enqueue = True
        with pytest.raises(DeviceLostError, match="start a new one"):
            runner.refine(state)


Setup = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("gpu", "recipe", "error", "message"),
    [
        (FakeCuda((8, 6)), {"target": "orin-nano", "capabilities": ("8.7",)}, InputError,
         "target orin-nano is for compute capability 8.7; this machine has Fake GPU"),
        (FakeCuda(memory=4096), {}, InputError, "slots take at least .* MiB of device memory"),
        (FakeCuda(), {"precision": "fp16"}, InputError, "multiplies in fp32, the recipe desktop is for fp16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_before_anything_long(
    gpu: FakeCuda, recipe: dict[str, Any], error: type[SageError], message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    with fake_tensorrt.installed(gpu=gpu) as trt:
        with pytest.raises(error, match=message):
            built_in(tmp_path, tiny_bundle, dataclasses.replace(RECIPE, **recipe))
        assert trt.behave.builds == []


def test_memory_is_looked_at_before_the_build(tiny_bundle: Path) -> None:
    bundle, costs = load_bundle(tiny_bundle), bundle_costs(tiny_bundle, 4)
    needed = memory_estimate(bundle, costs, 4)
    weights = sum(cost.weight_bytes for cost in costs.values())
    assert needed > weights + 4 * bundle.model.carry[0].item_shape[0] * 32 * 4 * 5  # context and two carries, twice
    device = NullDevice(2 * needed)
    assert refuse_memory(bundle, costs, 4, device) == []
    device.allocate(needed + 1)
    (note,) = refuse_memory(bundle, costs, 4, device)
    assert note.startswith("4 slots take at least")
    with pytest.raises(InputError, match="build with fewer --slots"):
        refuse_memory(bundle, costs, 4, NullDevice(needed - 1))


def test_without_tensorrt_or_with_one_too_old_the_message_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="apt install python3-libnvinfer"):
        built_in(tmp_path, tiny_bundle)
    monkeypatch.undo()
    with (
        fake_tensorrt.installed("8.6.1"),
        pytest.raises(MissingDependencyError, match=r"needs TensorRT 10\.3 or newer; found 8\.6\.1"),
    ):
        built_in(tmp_path, tiny_bundle)


def test_the_command_builds_and_reports(
    trt: Any, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(dump_yaml(RECIPE))
    arguments = ["build", str(tiny_bundle), "--recipe", str(recipe), "-o", str(tmp_path / "engine"), "--slots", "2"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["slots"] == 2
    assert report["gpu"]["profiles"] == [{"min": 1, "opt": 1, "max": 1}, {"min": 2, "opt": 2, "max": 2}]
    assert main(arguments) == 0
    assert "found in the cache" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "engine")]) == 0
    out = capsys.readouterr().out
    assert "parity_z_H" in out
    assert load_manifest(tmp_path / "engine")[0].notes


def test_ctrl_c_from_the_builders_own_thread_is_seen() -> None:
    """As in TensorRT: the main thread is inside one long C call, which no Python signal handler interrupts."""
    from sage_edge.engines.build_progress import interruptible

    seen: list[bool] = []
    with interruptible() as asked:
        assert not asked()

        def builder_thread() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(200):
                if asked():
                    seen.append(True)
                    return
                threading.Event().wait(0.01)

        thread = threading.Thread(target=builder_thread)
        thread.start()
        thread.join()
        assert seen == [True]
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_a_build_simply_cannot_be_interrupted() -> None:
    from sage_edge.engines.build_progress import interruptible

    answers: list[bool] = []

    def work() -> None:
        with interruptible() as asked:
            answers.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
