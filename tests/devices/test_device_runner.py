"""The logic around an engine on a device: order of work, early steps, graphs, memory. On the null device, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sage_edge.engines.accelerator_null import NullDevice, NullStream
from sage_edge.engines.device_memory import runs
from sage_edge.engines.device_runner import DeviceRunner, RunOptions
from sage_edge.engines.null import WIDTH, NullRunner
from sage_edge.engines.speculation import Foresight
from sage_edge.errors import DeviceLostError, EngineError
from sage_edge.pool import Pool
from tests.devices.counting import null_bundle, null_programs

SLOTS = 4


class Bench:
    """A runner with everything that a test wants to look at."""

    def __init__(self, options: RunOptions | None = None, memory: int = 1 << 30, scratch: int = 0) -> None:
        self.bundle = null_bundle()
        self.programs = null_programs(self.bundle, scratch)
        self.device = NullDevice(memory)
        self.runner = DeviceRunner(self.bundle, SLOTS, "0" * 64, self.device, self.programs, options)

    @property
    def steps(self) -> list[int]:
        ran: list[int] = self.programs["refine"].ran
        return ran

    @property
    def work(self) -> NullStream:
        stream = self.runner._work
        assert isinstance(stream, NullStream)
        return stream


def requests(*needs: int) -> dict[str, Any]:
    array = np.zeros((len(needs), WIDTH), np.int32)
    array[:, 0] = needs
    return {"inputs": array}


def early() -> Bench:
    return Bench(RunOptions(speculate="always"))


@pytest.fixture(params=["never", "always", "auto"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(RunOptions(speculate=request.param))
    with made.runner:
        yield made


def test_answers_are_those_of_the_null_runner_through_a_pool(bench: Bench) -> None:
    """Refill, compaction, policies and all: the same answers, traces and steps, early steps or not."""
    rng = np.random.default_rng(3)
    needs = rng.integers(1, 12, 40)
    answers = []
    with NullRunner(SLOTS) as plain:
        for runner in (plain, bench.runner):
            pool = Pool(runner)
            tickets = [pool.submit({"inputs": requests(int(n))["inputs"][0]}) for n in needs]
            pool.run_until_idle()
            answers.append([ticket.result() for ticket in tickets])
    for ours, theirs in zip(*answers, strict=True):
        assert (ours.steps, ours.reason) == (theirs.steps, theirs.reason)
        np.testing.assert_array_equal(ours.prediction, theirs.prediction)
        np.testing.assert_array_equal(ours.trace, theirs.trace)


def test_the_next_step_is_enqueued_before_the_signals_are_read() -> None:
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(5, 5))
        signals = runner.refine(state)
        assert bench.steps == [2]  # one step done, and
        assert len(bench.work._queue) > 0  # the next one waits in the queue already
        np.testing.assert_array_equal(signals[:, 2], [4, 4])
        runner.refine(state)
        assert bench.steps == [2, 2]


def test_decoding_does_not_wait_for_an_early_step() -> None:
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(1, 2))
        runner.refine(state)
        prediction = runner.decode(state)["prediction"]
        np.testing.assert_array_equal(prediction[:, 0], [1, 1])
        runner.read(state)
        assert bench.steps == [2]  # the early step is still in its queue: another stream, another carry


def test_an_overrun_step_leaves_no_trace() -> None:
    """A newcomer takes a slot while an early step of its neighbours is under way: every value is as without it."""
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(5, 5, 5))
        first = runner.refine(state).copy()
        runner.admit(state, [1], requests(7))
        assert runner.overruns == 1
        held = runner.read(state)
        np.testing.assert_array_equal(held["z_H"][:, 0], [1, 0, 1])  # one step each; the newcomer has taken none
        np.testing.assert_array_equal(held["context"][:, 0], [5, 7, 5])
        signals = runner.refine(state)
        np.testing.assert_array_equal(first[:, 2], [4, 4, 4])
        np.testing.assert_array_equal(signals[:, 2], [3, 6, 3])


def test_signals_stay_valid_until_the_next_call_though_a_step_is_under_way() -> None:
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(9))
        signals = runner.refine(state)
        bench.work.synchronize()  # the early step is done now, and must have written elsewhere
        assert signals[0, 2] == 8


def test_slots_of_an_abandoned_state_are_reused_only_after_its_early_step() -> None:
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(9))
        runner.refine(state)
        del state  # its buffers are free again, with a step still in the queue
        fresh = runner.encode(requests(3))
        bench.runner._quick.synchronize()
        bench.work.synchronize()
        held = runner.read(fresh)
        assert (held["context"][0, 0], held["z_H"][0, 0]) == (3, 0)
        assert runner.refine(fresh)[0, 2] == 2


def test_select_may_take_an_early_steps_own_slots() -> None:
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(5, 6, 7, 8))
        runner.refine(state)
        for turn in range(4):  # to and fro between two sizes: the same buffers again and again
            state = runner.select(state, [3, 0] if turn == 0 else [1, 0], 2)
            runner.refine(state)
            state = runner.select(state, [1, 0], 4)
            runner.admit(state, [2, 3], requests(9, 9))
            runner.refine(state)
        np.testing.assert_array_equal(runner.read(state)["context"][:2, 0], [5, 8])
        np.testing.assert_array_equal(runner.read(state)["z_H"][:2, 0], [5, 8])


def test_restoring_waits_for_an_early_step() -> None:
    """The early step reads what is restored, and its result, for which the old carry stood, must not be taken."""
    bench = early()
    with bench.runner as runner:
        state = runner.encode(requests(9, 9))
        runner.refine(state)
        taken = {name: array + 2 for name, array in runner.read(state, [0]).items()}
        runner.restore(state, [1], taken)
        assert runner.overruns == 1
        signals = runner.refine(state)
        np.testing.assert_array_equal(signals[:, 2], [7, 11 - 4])  # needs 9 and 11; carries 1 and 3 before this step


def test_free_slots_hold_nothing_of_former_tenants(bench: Bench) -> None:
    runner = bench.runner
    for _ in range(3):
        state = runner.encode(requests(5, 6, 7, 8))
        runner.refine(state)
        larger = runner.select(runner.select(state, [0], 1), [0], 4)
        for array in runner.read(larger, [1, 2, 3]).values():
            assert not array.any()
        del state, larger
    for array in runner.read(runner.empty(4)).values():
        assert not array.any()


def test_room_is_made_only_after_early_steps_have_left_it() -> None:
    bench = early()
    with bench.runner as runner:
        small = runner.encode(requests(9))
        runner.refine(small)  # with an early step in the queue that writes to these slots
        del small
        bench.device.memory_bytes = bench.device.used_bytes() + 100
        states = [runner.encode(requests(3, 3, 3, 3)) for _ in range(2)]
        bench.work.synchronize()  # nothing in the queue may touch the room that was given back
        assert float(runner.refine(states[1])[0, 2]) == 2


def test_buffers_are_allocated_once() -> None:
    bench = early()
    with bench.runner as runner:
        before = bench.device.allocations
        for seed in range(5):
            state = runner.encode(requests(3, 4, seed, 5))
            for _ in range(3):
                runner.refine(state)
                runner.decode(state)
            state = runner.select(state, [0, 1], 2)
            runner.refine(state)
            del state
        assert bench.device.allocations == before


def test_two_states_at_once_have_buffers_of_their_own(bench: Bench) -> None:
    one, two = bench.runner.encode(requests(5)), bench.runner.encode(requests(7))
    for left in (4, 3):
        assert bench.runner.refine(one)[0, 2] == left
        assert bench.runner.refine(two)[0, 2] == left + 2


def test_the_step_becomes_a_graph_after_its_warm_up() -> None:
    bench = Bench(RunOptions(speculate="never", warmup=1))
    with bench.runner as runner:
        state = runner.encode(requests(9, 9))
        values = [float(runner.refine(state)[0, 2]) for _ in range(6)]
        assert values == [8, 7, 6, 5, 4, 3]
        assert bench.programs["refine"].captured == 2  # one for each carry that a step may start from
        assert runner.describe()["graphs_captured"] == 2
        assert runner.notes == []
        runner.encode(requests(1, 1))
        assert bench.programs["refine"].captured == 2


def test_without_graphs_nothing_is_captured() -> None:
    bench = Bench(RunOptions(graphs=False))
    with bench.runner as runner:
        state = runner.encode(requests(9))
        for _ in range(5):
            runner.refine(state)
        assert bench.programs["refine"].captured == 0


def test_a_step_that_cannot_be_captured_runs_all_the_same_and_says_why() -> None:
    bench = Bench(RunOptions(speculate="never"))
    bench.programs["refine"].capture_error = "operation not permitted when stream is capturing"
    with bench.runner as runner:
        state = runner.encode(requests(9))
        assert [float(runner.refine(state)[0, 2]) for _ in range(5)] == [8, 7, 6, 5, 4]
        assert runner.notes == [
            "the step runs without a device graph: operation not permitted when stream is capturing"
        ]


def test_too_little_memory_gives_a_smaller_profile_and_says_so() -> None:
    bench = Bench(memory=30_000, scratch=2_000)  # scratch of the step: 8000 bytes for four slots, 4000 for two, ...
    with bench.runner as runner:
        assert (runner.slots, runner.shapes) == (4, (1, 2, 4))
    bench.device.memory_bytes = 17_000
    with bench.runner as runner:
        assert (runner.slots, runner.shapes) == (2, (1, 2))
        assert len(runner.notes) == 1
        assert runner.notes[0].startswith("4 slots do not fit into device memory (")
        assert runner.notes[0].endswith("; running 2")
        state = runner.encode(requests(3, 4))
        assert runner.refine(state)[0, 2] == 2
    assert bench.device.used_bytes() == 0
    bench.device.memory_bytes = 30_000  # with memory back, all slots are
    with bench.runner as runner:
        assert runner.slots == 4


def test_no_memory_at_all_is_a_clear_error_and_gives_everything_back() -> None:
    bench = Bench(memory=1_500)
    with pytest.raises(EngineError, match="out of device memory even for 1 slot.*smaller precision or fewer slots"):
        bench.runner.activate()
    assert bench.device.used_bytes() == 0


def test_states_beyond_memory_take_the_room_of_unused_ones_first() -> None:
    bench = Bench()
    with bench.runner as runner:
        bench.device.memory_bytes = bench.device.used_bytes() + 100
        states = [runner.encode(requests(3, 3, 3, 3)) for _ in range(2)]  # the second: at the cost of unused sizes
        assert float(runner.refine(states[1])[0, 2]) == 2
        with pytest.raises(EngineError, match="hold fewer states"):
            [runner.encode(requests(1, 1, 1, 1)) for _ in range(9)]


def test_a_lost_device_is_said_to_be_lost_by_every_ticket() -> None:
    bench = Bench()

    def lost(tensors: dict[str, Any]) -> None:
        raise DeviceLostError("cudaErrorIllegalAddress")

    with bench.runner as runner:
        pool = Pool(runner)
        bench.programs["refine"].work = lost
        ticket = pool.submit({"inputs": requests(3)["inputs"][0]})
        with pytest.raises(DeviceLostError) as caught:
            ticket.result()
        assert caught.value.exit_code == 3


def test_foresight_starts_early_only_where_it_pays() -> None:
    unknown = Foresight()
    assert not unknown.pays
    long_runs = unknown.took(1e-3).continued(3e-4)
    assert long_runs.pays  # nothing has ever stopped
    assert not unknown.took(1e-3).continued(0.0).pays  # the host takes no time: nothing to hide
    mixed = long_runs
    for _ in range(200):
        mixed = mixed.stopped().continued(3e-4).continued(3e-4)
    assert mixed.stops == pytest.approx(1 / 3, abs=0.05)
    assert not mixed.pays  # (2/3) * 0.3 ms saved against (1/3) * 1 ms lost
    assert mixed.continued(3e-4).stops < mixed.stops  # type: ignore[operator]


def test_foresight_learns_from_the_runner() -> None:
    bench = Bench(RunOptions(speculate="never"))
    with bench.runner as runner:
        state = runner.encode(requests(9))
        for _ in range(3):
            runner.refine(state)
        seen = runner.foresight
        assert seen.stops == 0
        assert seen.gap_s is not None
        assert seen.step_s is not None
        runner.admit(state, [0], requests(2))
        assert runner.foresight.stops == pytest.approx(0.1)


def test_runs_join_rows_that_advance_together() -> None:
    assert runs([(1, 0), (2, 1), (3, 2), (0, 3)]) == [(1, 0, 3), (0, 3, 1)]
    assert runs([(3, 0), (2, 1)]) == [(3, 0, 1), (2, 1, 1)]
    assert runs([]) == []
