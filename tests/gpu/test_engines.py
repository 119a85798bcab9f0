"""Engines on a real CUDA device: the device interface, and the conformance suite on every engine that is installed.

Skipped with the reason where there is no device, no TensorRT, no CUDA provider. Nothing here has a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sage_edge.engines.accelerated import build_accelerated, open_accelerated  # noqa: E402
from sage_edge.engines.accelerator import OutOfMemoryError  # noqa: E402
from sage_edge.engines.accelerator_cuda import CudaDevice  # noqa: E402
from sage_edge.engines.build import open_engine  # noqa: E402
from sage_edge.engines.device_runner import DeviceRunner, RunOptions  # noqa: E402
from sage_edge.engines.gpu_recipe import choose_recipe  # noqa: E402
from sage_edge.engines.manifest import load_manifest  # noqa: E402
from sage_edge.engines.runner import Runner  # noqa: E402
from sage_edge.errors import MissingDependencyError  # noqa: E402

# The suite of the runner contract: every test of it, with the engines below in place of its own.
from tests.conformance import test_runner as suite  # noqa: E402

pytestmark = pytest.mark.gpu
globals().update(suite.contract())
TARGETS = ("desktop", "torch", "ort-cuda", "torch-tensorrt")


@pytest.fixture(scope="session", autouse=True)
def device_here() -> None:
    try:
        with CudaDevice():
            pass
    except MissingDependencyError as error:
        pytest.skip(f"no CUDA device: {error}")


@pytest.fixture(scope="session", params=TARGETS)
def gpu_engine(request: pytest.FixtureRequest, device_here: None, tiny_bundle: Path) -> Path:
    try:
        return build_accelerated(tiny_bundle, choose_recipe(request.param, "fp32").with_slots(4)).path
    except MissingDependencyError as error:
        pytest.skip(f"{request.param}: {error}")


@pytest.fixture
def make(gpu_engine: Path) -> Callable[[], Runner]:
    return lambda: open_engine(gpu_engine)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    with CudaDevice() as opened:
        yield opened


def test_memory_streams_events_and_pinned_memory(device: CudaDevice) -> None:
    work, quick = device.stream("normal"), device.stream("high")
    memory, landing = device.allocate(1 << 20), device.pinned(1 << 20)
    source = np.arange(1 << 20, dtype=np.uint8)
    work.upload(memory.address, source)
    quick.wait(work.record())
    quick.copy(landing.address, memory.address, 1 << 20)
    event = quick.record()
    event.synchronize()
    assert event.done()
    np.testing.assert_array_equal(landing.array, source)


def test_a_graph_repeats_what_was_captured(device: CudaDevice) -> None:
    stream, memory, landing = device.stream("normal"), device.allocate(4), device.pinned(4)
    graph = stream.capture(lambda: stream.copy(landing.address, memory.address, 4))
    for start in (1, 5):
        stream.upload(memory.address, np.arange(start, start + 4, dtype=np.uint8))
        graph.launch(stream)
        stream.synchronize()
        assert landing.array.tolist() == list(range(start, start + 4))
    graph.free()


def test_too_much_memory_is_refused_and_the_device_goes_on(device: CudaDevice) -> None:
    with pytest.raises(OutOfMemoryError):
        device.allocate(1 << 50)
    device.allocate(1 << 20).free()


def answers(runner: Runner, steps: int) -> list[Any]:
    state = runner.encode(runner.model.random_observation(4))
    out: list[Any] = []
    for step in range(steps):
        out.append(runner.refine(state).copy())
        if step == 1:
            runner.admit(state, [1], {n: a[:1] for n, a in runner.model.random_observation(4).items()})
    return [*out, runner.decode(state)["prediction"]]


def test_early_steps_and_graphs_change_no_bit(gpu_engine: Path) -> None:
    manifest, bundle = load_manifest(gpu_engine)
    results = []
    for options in (
        RunOptions(graphs=False, speculate="never"),
        RunOptions(speculate="never"),
        RunOptions(speculate="always"),
    ):
        runner = open_accelerated(gpu_engine, manifest, bundle)
        assert isinstance(runner, DeviceRunner)
        runner.options = options
        with runner:
            results.append(answers(runner, 6))
            if options.speculate == "always":
                assert runner.overruns >= 1
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
