"""One suite for the runner contract, run against every implementation (sage_edge/engines/runner.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.bundle import GRAPH_NAMES, load_bundle
from sage_edge.engines.accelerated import build_accelerated
from sage_edge.engines.accelerator_null import NullDevice
from sage_edge.engines.build import open_bundle, open_engine
from sage_edge.engines.device_runner import DeviceRunner, RunOptions
from sage_edge.engines.gpu_recipe import GpuRecipe, Profile
from sage_edge.engines.null import NullRunner
from sage_edge.engines.ort_program import OrtProgram
from sage_edge.engines.program import Program
from sage_edge.engines.runner import Runner, State
from sage_edge.errors import InputError
from sage_edge.models import load
from sage_edge.specs import Array

IMPLEMENTATIONS = ("null", "bundle", "engine", "device", "device-early", "tensorrt-stand-in")


def null_device_runner(folder: Path, options: RunOptions) -> Runner:
    bundle = load_bundle(folder)
    programs: dict[str, Program] = {n: OrtProgram(folder / f"{n}.onnx", bundle.graph(n)) for n in GRAPH_NAMES}
    return DeviceRunner(bundle, 4, "0" * 64, NullDevice(), programs, options)


@pytest.fixture(scope="session")
def tensorrt_engine(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny HRM built by the TensorRT target, with ONNX Runtime in TensorRT's place (tests/devices)."""
    pytest.importorskip("cuda.bindings.runtime")
    from tests.devices import fake_tensorrt

    recipe = GpuRecipe("desktop", "tensorrt", "fp32", (Profile(1, 1, 1), Profile(2, 4, 4)))
    with fake_tensorrt.installed():
        return build_accelerated(tiny_bundle, recipe, tmp_path_factory.mktemp("tensorrt") / "engine").path


@pytest.fixture(params=IMPLEMENTATIONS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[], Runner]]:
    if request.param == "null":
        yield lambda: NullRunner(4)
    elif request.param == "bundle":
        bundle = request.getfixturevalue("tiny_bundle")
        yield lambda: open_bundle(bundle, slots=4)
    elif request.param.startswith("device"):  # the logic of GPU engines on the null device, with real arithmetic
        bundle = request.getfixturevalue("tiny_bundle")
        options = RunOptions(speculate="always" if request.param == "device-early" else "auto")
        yield lambda: null_device_runner(bundle, options)
    elif request.param == "tensorrt-stand-in":
        engine = request.getfixturevalue("tensorrt_engine")
        from tests.devices import fake_tensorrt

        with fake_tensorrt.installed():
            yield lambda: open_engine(engine)
    else:
        engine = request.getfixturevalue("tiny_engine")
        yield lambda: open_engine(engine)


@pytest.fixture
def runner(make: Callable[[], Runner]) -> Iterator[Runner]:
    with make() as active:
        yield active


def contract() -> dict[str, Any]:
    """The tests of the contract and their `runner`, for a module that has a fixture `make` of its own."""
    tests = {name: test for name, test in globals().items() if name.startswith("test_")}
    wanted = {"runner", "make"}
    return {"runner": runner} | {n: t for n, t in tests.items() if wanted & set(inspect.signature(t).parameters)}


def observation(runner: Runner, count: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        s.name: rng.integers(s.minimum or 0, min((s.maximum or 0) + 1, 9), (count, *s.item_shape)).astype(s.dtype)
        for s in runner.model.observation
    }


def everything(runner: Runner, observed: dict[str, Array], steps: int) -> list[dict[str, Array]]:
    state = runner.encode(observed)
    names = tuple(s.name for s in runner.model.prediction)
    out = []
    for _ in range(steps):
        signals = runner.refine(state).copy()
        out.append({**runner.read(state), **runner.decode(state, names), "signals": signals})
    return out


def test_shapes_and_dtypes_are_those_of_the_specs(runner: Runner) -> None:
    state = runner.encode(observation(runner, 3))
    assert state.slots == 3
    signals = runner.refine(state)
    assert signals.shape == (3, len(runner.model.signals))
    assert signals.dtype == np.float32
    for spec in runner.model.prediction:
        array = runner.decode(state, (spec.name,))[spec.name]
        assert (array.dtype, array.shape) == (np.dtype(spec.dtype), (3, *spec.item_shape))
    for spec in (*runner.model.context, *runner.model.carry):
        array = runner.read(state)[spec.name]
        assert (array.dtype, array.shape) == (np.dtype(spec.dtype), (3, *spec.item_shape))


def test_the_same_requests_give_the_same_bits(runner: Runner) -> None:
    observed = observation(runner, 4)
    first, second = everything(runner, observed, 3), everything(runner, observed, 3)
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_states_do_not_disturb_each_other(runner: Runner) -> None:
    alone = everything(runner, observation(runner, 2, seed=1), 3)[-1]
    mine = runner.encode(observation(runner, 2, seed=1))
    other = runner.encode(observation(runner, 2, seed=2))
    for _ in range(3):
        signals = runner.refine(mine).copy()
        runner.refine(other)
        runner.decode(other)
    np.testing.assert_array_equal(signals, alone["signals"])
    np.testing.assert_array_equal(runner.decode(mine)["prediction"], alone["prediction"])


def test_decode_and_read_leave_the_state_alone(runner: Runner) -> None:
    observed = observation(runner, 2)
    plain = runner.encode(observed)
    for _ in range(3):
        expected = runner.refine(plain).copy()
    looked = runner.encode(observed)
    for _ in range(3):
        runner.decode(looked)
        runner.read(looked)["z_H"][...] = np.nan  # a copy: writing to it must not reach the engine
        got = runner.refine(looked).copy()
    np.testing.assert_array_equal(got, expected)


def test_select_keeps_the_chosen_slots_in_the_given_order(runner: Runner) -> None:
    state = runner.encode(observation(runner, 4))
    runner.refine(state)
    before = runner.read(state)
    chosen = runner.select(state, [3, 1])
    after = runner.read(chosen)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name][[3, 1]])
    assert runner.refine(chosen).shape[0] == 2


def test_write_continues_what_read_took(runner: Runner) -> None:
    state = runner.encode(observation(runner, 3))
    runner.refine(state)
    taken = runner.read(state)
    expected = runner.refine(state).copy()
    resumed = runner.write(taken)
    np.testing.assert_array_equal(runner.refine(resumed), expected)


def test_every_batch_size_up_to_the_slots_works_and_agrees(runner: Runner) -> None:
    observed = observation(runner, 4)
    together = everything(runner, observed, 2)[-1]
    for row in range(4):
        alone = everything(runner, {name: a[row : row + 1] for name, a in observed.items()}, 2)[-1]
        np.testing.assert_allclose(alone["signals"], together["signals"][row : row + 1], atol=1e-4)


def test_too_many_requests_are_refused(runner: Runner) -> None:
    with pytest.raises(InputError, match="5 requests at once, but this engine has 4 slots"):
        runner.encode(observation(runner, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "inputs": a["inputs"].astype(np.float32)}, "found dtype float32"),
        (lambda a: {**a, "inputs": a["inputs"][:, :-1]}, "found shape"),
        (lambda a: {**a, "inputs": a["inputs"] * 0 + 30000}, "outside 0.."),
        (lambda a: {**a, "inputs": a["inputs"] * 0 - 1}, "value -1 at"),
        (lambda a: {**a, "tokens": a["inputs"]}, "unknown array 'tokens'"),
        (lambda a: {}, "missing array 'inputs'"),
        (lambda a: {**a, "inputs": a["inputs"][:0]}, "holds no request"),
    ],
)
def test_bad_observations_are_refused_by_name(
    runner: Runner, change: Callable[[dict[str, Array]], dict[str, Array]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        runner.encode(change(observation(runner, 2)))


def test_unknown_outputs_rows_and_arrays_are_refused(runner: Runner) -> None:
    state = runner.encode(observation(runner, 2))
    with pytest.raises(InputError, match="output 'answer' is not given"):
        runner.decode(state, ("answer",))
    with pytest.raises(InputError, match="not within 0..1"):
        runner.select(state, [2])
    arrays = runner.read(state)
    arrays.pop("z_H")
    with pytest.raises(InputError, match="state: expected the arrays"):
        runner.write(arrays)


def test_a_runner_works_only_while_active(make: Callable[[], Runner]) -> None:
    runner = make()
    with pytest.raises(RuntimeError, match="not active"):
        runner.encode(observation(runner, 1))
    with runner:
        runner.activate()  # a second time: nothing happens
        runner.refine(runner.encode(observation(runner, 1)))
    runner.deactivate()
    with pytest.raises(RuntimeError, match="not active"):
        runner.encode(observation(runner, 1))


def test_load_opens_what_a_user_names(tiny_engine: object, tiny_bundle: object, tiny_model_folder: object) -> None:
    for target in (tiny_engine, tiny_bundle, tiny_model_folder):
        with load(str(target)) as session:
            answers = session.infer(observation(session.runner, 11), halt="full")
        assert [a.steps for a in answers] == [4] * 11


def full_state(runner: Runner, state: State) -> list[dict[str, Array]]:
    """Three steps of a state: everything that comes of them, with the decoded outputs."""
    names = tuple(s.name for s in runner.model.prediction)
    out = []
    for _ in range(3):
        signals = runner.refine(state).copy()
        out.append({**runner.read(state), **runner.decode(state, names), "signals": signals})
    return out


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_bits_depend_on_the_shape_only_not_on_row_or_neighbours(runner: Runner, slots: int) -> None:
    mine = observation(runner, 1, seed=9)
    expected = None
    for trial in range(3 * slots):
        row = trial % slots
        state = runner.encode(observation(runner, slots, seed=trial))
        runner.refine(state)
        runner.admit(state, [row], mine)
        got = [{name: array[row] for name, array in step.items()} for step in full_state(runner, state)]
        expected = expected or got
        for a, b in zip(got, expected, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f"{name} in row {row}")


def test_admit_overwrites_its_rows_in_full_and_no_others(runner: Runner) -> None:
    state = runner.encode(observation(runner, 4, seed=1))
    runner.refine(state)
    before = runner.read(state)
    newcomers = observation(runner, 2, seed=2)
    runner.admit(state, [3, 1], newcomers)
    after, fresh = runner.read(state), runner.read(runner.encode(newcomers))
    for name in before:
        np.testing.assert_array_equal(after[name][[0, 2]], before[name][[0, 2]])
        np.testing.assert_array_equal(after[name][[3, 1]], fresh[name])


def test_select_into_a_larger_state_leaves_free_slots_for_admit(runner: Runner) -> None:
    state = runner.encode(observation(runner, 2))
    runner.refine(state)
    before = runner.read(state)
    larger = runner.select(state, [1], 4)
    runner.admit(larger, [1, 2, 3], observation(runner, 3, seed=3))
    smaller = runner.select(larger, [0], 1)
    after = runner.read(smaller)
    for name in before:
        np.testing.assert_array_equal(after[name], before[name][[1]])


def test_restore_continues_what_read_took_in_any_row(runner: Runner) -> None:
    state = runner.encode(observation(runner, 2))
    runner.refine(state)
    taken = runner.read(state, [1])
    expected = runner.refine(state)[1].copy()
    other = runner.encode(observation(runner, 2, seed=5))
    runner.restore(other, [0], taken)
    np.testing.assert_array_equal(runner.refine(other)[0], expected)


def test_rows_that_do_not_fit_are_refused(runner: Runner) -> None:
    state = runner.encode(observation(runner, 2))
    for rows in ([0], [0, 0], [0, 2], [-1, 0]):
        with pytest.raises(InputError, match="different ones within 0..1"):
            runner.admit(state, rows, observation(runner, 2))
    with pytest.raises(InputError, match="not 1..1 of them"):
        runner.select(state, [0, 1], 1)
    with pytest.raises(InputError, match="0 requests at once"):
        runner.empty(0)
