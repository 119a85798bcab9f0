"""The targets torch, torch-tensorrt and ort-cuda: what they need, what they refuse, what the command says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings.runtime")

from sage_edge.bundle import load_bundle  # noqa: E402
from sage_edge.cli.main import main  # noqa: E402
from sage_edge.engines.accelerated import build_accelerated  # noqa: E402
from sage_edge.engines.accelerator_null import NullDevice  # noqa: E402
from sage_edge.engines.build import open_bundle, open_engine  # noqa: E402
from sage_edge.engines.device_runner import DeviceRunner  # noqa: E402
from sage_edge.engines.gpu_recipe import choose_recipe  # noqa: E402
from sage_edge.engines.manifest import load_manifest  # noqa: E402
from sage_edge.engines.runner import Runner  # noqa: E402
from sage_edge.engines.target_ort import OrtCudaTarget  # noqa: E402
from sage_edge.engines.target_torch import TorchTarget, TorchTensorRTTarget, example_inputs, export_program, slot_axes  # noqa: E402
from sage_edge.engines.torch_program import TorchProgram  # noqa: E402
from sage_edge.errors import InputError, MissingDependencyError  # noqa: E402
from sage_edge.export.bundle import export_bundle  # noqa: E402
from sage_edge.export.checkpoint import open_model  # noqa: E402
from sage_edge.export.model_folder import save_model_folder  # noqa: E402
from tests.conformance import test_runner as suite  # noqa: E402
from tests.conftest import TINY, tiny_hrm  # noqa: E402

ON_CPU = not torch.cuda.is_available()
# The whole suite of the runner contract, here with `make` below; in this file so that one process compiles the engine.
globals().update(suite.contract())


@pytest.fixture(scope="module")
def smallest_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HRM of one layer a module and one cycle, for what takes long to compile."""
    config = replace(TINY, L_layers=1, H_cycles=1, L_cycles=1)
    model = tiny_hrm(config)
    folder = tmp_path_factory.mktemp("smallest") / "model"
    save_model_folder(folder, model.state_dict(), name="smallest", config=config, source="seeded, untrained")
    recipe, opened = open_model(folder)
    export_bundle(opened, recipe, folder.parent / "bundle")
    return folder.parent / "bundle"


@pytest.fixture(scope="module")
def torch_engine(smallest_bundle: Path) -> Path:
    """The smallest bundle's engine of the target torch, compiled by AOTInductor for whatever device is here."""
    # The same code with less of the C++ compiler's time: no probes of the CPU's vectors, glue code not optimized, and no
    # header compiled beforehand for the one unit that would use it.
    quick = {"cpp.vec_isa_ok": True, "aot_inductor.compile_wrapper_opt_level": "O0",
             "aot_inductor.precompile_headers": False}  # fmt: skip
    try:
        with torch._inductor.config.patch(quick):
            return build_accelerated(smallest_bundle, choose_recipe("torch", "fp32").with_slots(4)).path
    except MissingDependencyError as error:  # no C++ compiler
        pytest.skip(str(error))


@pytest.fixture
def make(torch_engine: Path) -> Callable[[], Runner]:
    """What the suite of the runner contract runs on."""
    return lambda: open_engine(torch_engine)


def test_a_torch_engine_agrees_with_its_bundle_and_names_its_device(torch_engine: Path, smallest_bundle: Path) -> None:
    manifest, _ = load_manifest(torch_engine)
    assert manifest.target == "torch"
    assert set(manifest.versions) == {"sage-edge-builder", "torch"}
    assert manifest.device.startswith("host/" if ON_CPU else "cuda/")
    with open_engine(torch_engine) as ours, open_bundle(smallest_bundle, 4) as plain:
        observed = ours.model.random_observation(3)
        states = ours.encode(observed), plain.encode(observed)
        for _ in range(3):
            np.testing.assert_allclose(ours.refine(states[0]), plain.refine(states[1]), atol=1e-4)
        assert isinstance(ours, DeviceRunner)
        assert ours.describe()["notes"] == []


def test_it_is_found_in_the_cache_and_checked_by_the_command(
    torch_engine: Path, smallest_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(smallest_bundle), "--target", "torch", "--slots", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["cached"], report["engine"]) == (True, str(torch_engine))
    assert main(["check", str(torch_engine)]) == 0


def test_another_torch_or_another_machine_is_refused() -> None:
    target, recipe = TorchTarget(), choose_recipe("torch", "fp32")
    here = NullDevice(name="cpu-a").info
    target.refuse_foreign(recipe, "host/cpu-a", target.versions(), here)
    with pytest.raises(InputError, match=r"built with torch 1\.0, installed is .*; build it again"):
        target.refuse_foreign(recipe, "host/cpu-a", {"torch": "1.0"}, here)
    with pytest.raises(InputError, match="built for host/cpu-b, this is host/cpu-a; build it here"):
        target.refuse_foreign(recipe, "host/cpu-b", target.versions(), here)


def test_a_damaged_package_is_a_clear_error(torch_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(torch_engine, folder)
    (folder / "refine.pt2").write_bytes(b"not a package")
    with pytest.raises(InputError, match="changed since manifest.yaml was written"):
        open_engine(folder)
    _, bundle = load_manifest(torch_engine)
    device = NullDevice()
    with pytest.raises(InputError, match="PyTorch cannot load it"):
        TorchProgram(folder / "refine.pt2", bundle.graphs.refine, graphs=False).open(device, device.stream("normal"))


def test_without_a_compiler_the_message_names_one(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="needs a C.. compiler to be built: apt install g"):
        build_accelerated(tiny_bundle, choose_recipe("torch", "fp32"), tmp_path / "engine")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="ONNX Runtime has its CUDA provider"
)
def test_ort_cuda_without_its_provider_says_what_to_install(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tiny_bundle), "--target", "ort-cuda"]) == 2
    assert "pip install onnxruntime-gpu in place of onnxruntime; the installed one offers" in capsys.readouterr().err


def test_ort_cuda_refuses_another_gpu_or_version() -> None:
    target, recipe = OrtCudaTarget(), choose_recipe("ort-cuda", "fp32")
    info = NullDevice(name="a").info
    with pytest.raises(InputError, match=r"gated with ONNX Runtime 1\.0"):
        target.refuse_foreign(recipe, info.key, {"onnxruntime": "1.0"}, info)
    with pytest.raises(InputError, match="gated on host/b"):
        target.refuse_foreign(recipe, "host/b", target.versions(), info)


def test_torch_tensorrt_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"needs torch_tensorrt .*; pip install torch_tensorrt"):
        TorchTensorRTTarget().require()


def test_a_traced_graph_can_be_traced_again_with_the_same_slots(smallest_bundle: Path) -> None:
    """As torch_tensorrt does it when it saves: with the module that tracing made, whose arguments are named otherwise."""
    spec = load_bundle(smallest_bundle).graphs.decode
    module = export_program(smallest_bundle / "decode.onnx", spec, 4, "cpu").module()
    axes = slot_axes(module, spec, 4)
    again = torch.export.export(module, example_inputs(spec, 2, "cpu"), dynamic_shapes=axes, strict=False).module()
    for slots in (1, 3, 4):
        given = example_inputs(spec, slots, "cpu")
        for ours, theirs in zip(again(*given), module(*given), strict=True):
            assert ours.shape[0] == slots
            assert torch.equal(ours, theirs)


def test_torch_is_wanted_by_its_own_targets_alone(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["build", str(tiny_bundle), "--target", "cpu"]) == 0
    capsys.readouterr()
    assert main(["build", str(tiny_bundle), "--target", "torch"]) == 2
    assert "needs torch" in (said := capsys.readouterr().err)
    assert "pip install 'sage-edge[export]'" in said


def test_a_graph_that_torch_gave_up_is_told(torch_engine: Path) -> None:
    with open_engine(torch_engine) as runner:
        assert isinstance(runner, DeviceRunner)
        runner.refine(runner.encode(runner.model.random_observation(1)))
        program = runner.programs["refine"]
        assert isinstance(program, TorchProgram)
        program.not_captured = "operation not permitted"
        assert runner.describe()["notes"] == ["the step runs without a device graph: operation not permitted"]
