"""The pool on real loops: answers that depend on nothing but the request, and failures that stay where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_edge.engines.build import open_engine
from sage_edge.engines.null import NullRunner
from sage_edge.engines.runner import Runner
from sage_edge.errors import EngineError, InputError, RefusedError
from sage_edge.pool import Answer, Pool, Ticket
from sage_edge.specs import Array


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Faulty(NullRunner):
    """Raises at a stage when told to, or computes NaN for observations whose second value is 13."""

    fails = ""

    def _admit(self, handle: dict[str, Array], rows: list[int], observation: dict[str, Array]) -> None:
        self._maybe("encode")
        super()._admit(handle, rows, observation)

    def _refine(self, handle: dict[str, Array]) -> npt.NDArray[np.float32]:
        self._maybe("refine")
        signals = super()._refine(handle)
        signals[handle["context"][:, 1] == 13] = np.nan
        return signals

    def _decode(self, handle: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        self._maybe("decode")
        return super()._decode(handle, names)

    def _select(self, handle: dict[str, Array], rows: list[int], slots: int) -> dict[str, Array]:
        self._maybe("select")
        return super()._select(handle, rows, slots)

    def _maybe(self, stage: str) -> None:
        if self.fails == stage:
            self.fails = ""
            raise OSError(f"injected at {stage}")


@pytest.fixture
def null() -> Iterator[Faulty]:
    with Faulty(4) as runner:
        yield runner


def inputs(need: int, tag: int = 0) -> dict[str, Any]:
    return {"inputs": np.array([need, tag, need, tag], np.int32)}


def same(a: Answer, b: Answer) -> None:
    assert (a.steps, a.reason) == (b.steps, b.reason)
    np.testing.assert_array_equal(a.prediction, b.prediction)
    np.testing.assert_array_equal(a.trace, b.trace)


def alone(runner: Runner, observation: dict[str, Any], halt: str, shape: int) -> Answer:
    """The same request in a state of `shape` slots whose other slots stay free: the runner is told only that shape."""
    shapes, runner.shapes = runner.shapes, (shape,)
    try:
        return Pool(runner, slots=shape).submit(observation, halt).result()
    finally:
        runner.shapes = shapes


def in_random_order(
    runner: Runner, requests: list[tuple[dict[str, Any], str]], rng: np.random.Generator
) -> list[Answer]:
    """Submit in bursts between ticks, at one fixed shape, with random priorities and some cancelled companions."""
    shapes, runner.shapes = runner.shapes, (runner.slots,)
    pool = Pool(runner)
    tickets: dict[int, Ticket] = {}
    order = rng.permutation(len(requests)).tolist()
    while order or not pool.idle:
        for _ in range(int(rng.integers(0, 4))):
            if order and pool.waiting < 200:
                index = order.pop()
                observation, halt = requests[index]
                tickets[index] = pool.submit(observation, halt, priority=int(rng.integers(0, 2)))
                if rng.random() < 0.05:
                    pool.submit(observation, halt).cancel()
        pool.tick()
    runner.shapes = shapes
    return [tickets[index].result() for index in range(len(requests))]


HALTS = ("learned", "entropy:2.5", "patience:2", "full", "learned and max_steps:3 or max_steps:9")


def test_ten_thousand_requests_are_bit_identical_to_each_alone() -> None:
    rng = np.random.default_rng(0)
    with NullRunner(8) as runner:
        kinds = [(need, halt) for need in range(20) for halt in HALTS]
        expected = {kind: alone(runner, inputs(kind[0]), kind[1], 8) for kind in kinds}
        chosen = [kinds[i] for i in rng.integers(0, len(kinds), 10_000)]
        answers = in_random_order(runner, [(inputs(need), halt) for need, halt in chosen], rng)
        for kind, answer in zip(chosen, answers, strict=True):
            same(answer, expected[kind])


def test_a_real_engine_gives_the_bits_of_each_request_alone(tiny_engine: Path) -> None:
    rng = np.random.default_rng(1)
    with open_engine(tiny_engine, threads=1) as runner:
        different = [
            ({"inputs": rng.integers(0, 7, 6), "puzzle_identifiers": rng.integers(0, 3)}, HALTS[i % len(HALTS)])
            for i in range(60)
        ]
        expected = [alone(runner, *one, 4) for one in different]
        chosen = rng.integers(0, len(different), 300)
        answers = in_random_order(runner, [different[i] for i in chosen], rng)
        for index, answer in zip(chosen, answers, strict=True):
            same(answer, expected[index])
        # Another shape may round differently; what comes of it is held to the parity tolerance of the gate.
        for one, reference in zip(different[:20], expected, strict=False):
            single = Pool(runner, slots=1).submit(one[0], "full").result()
            if one[1] == "full":
                np.testing.assert_allclose(single.trace, reference.trace, atol=1e-4)


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from(HALTS)), min_size=1, max_size=30), st.integers(1, 9))
@settings(max_examples=30)
def test_changing_shapes_keep_every_answer(kinds: list[tuple[int, str]], slots: int) -> None:
    with NullRunner(slots) as runner:
        pool = Pool(runner)
        tickets = [pool.submit(inputs(need), halt) for need, halt in kinds]
        for ticket, (need, halt) in zip(tickets, kinds, strict=True):
            same(ticket.result(), alone(runner, inputs(need), halt, slots))


class Poisoned(NullRunner):
    """Fills every row that is not in use with NaN, huge values or a neighbour's carry before each admission."""

    admitted = 0

    def _admit(self, handle: dict[str, Array], rows: list[int], observation: dict[str, Array]) -> None:
        poison = (np.nan, 3e38, -np.inf, None)[self.admitted % 4]
        for array in handle.values():
            array[rows] = np.roll(array, 1, axis=0)[rows] if poison is None else poison
        super()._admit(handle, rows, observation)
        self.admitted += len(rows)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nothing_leaks_over_a_hundred_thousand_reuses_of_poisoned_slots() -> None:
    with Poisoned(64) as runner:
        expected = {need: alone(runner, inputs(need), "learned", 64) for need in range(1, 4)}
        pool = Pool(runner, capacity=256)
        before = runner.admitted
        tickets: list[tuple[int, Ticket]] = []
        for number in range(100_000):
            need = 1 + number % 3 % 2 + (number % 7 == 0)
            if pool.waiting > 128:
                pool.tick()
            tickets.append((need, pool.submit(inputs(need))))
        pool.run_until_idle()
        assert runner.admitted - before == 100_000
        for need, ticket in tickets:
            same(ticket.result(), expected[need])


@pytest.mark.parametrize("poison", [np.nan, 3e38, -np.inf, "neighbour"])
def test_nothing_leaks_from_a_poisoned_slot_of_a_real_engine(tiny_engine: Path, poison: float | str) -> None:
    mine = {"inputs": np.arange(6), "puzzle_identifiers": np.array(1)}
    other = {"inputs": np.full(6, 3), "puzzle_identifiers": np.array(2)}
    with open_engine(tiny_engine, threads=1) as runner:
        expected = alone(runner, mine, "full", 4)
        pool = Pool(runner)
        companions = [pool.submit(other, "full") for _ in range(3)]
        pool.submit(other, "full").cancel()
        doomed = pool.submit(other, "full")
        pool.tick()
        doomed.cancel()
        handle = pool._engine.handle  # type: ignore[union-attr]
        for name, array in (handle.context | handle.carry).items():
            array[3] = handle.carry["z_H"][0] if poison == "neighbour" and name != "context" else 0
            if isinstance(poison, float):
                array[3] = poison
        same(pool.submit(mine, "full").result(), expected)
        for companion in companions:
            same(companion.result(), alone(runner, other, "full", 4))


def test_a_deadline_gives_the_best_so_far_and_says_so(null: Faulty) -> None:
    clock = Clock()
    pool = Pool(null, slots=1, clock=clock)
    running, waiting = pool.submit(inputs(12), deadline_ms=2500), pool.submit(inputs(1), deadline_ms=2500)
    while not running.done:
        pool.tick()
        clock.now += 1
    answer = running.result()
    assert (answer.steps, answer.reason) == (3, "deadline")
    assert answer.prediction[0] == 3
    assert answer.trace.shape == (3, 4)
    with pytest.raises(RefusedError, match="before the first step") as refused:
        waiting.result()
    assert refused.value.reason == "deadline"


def test_times_are_counted_from_arrival_and_from_admission(null: Faulty) -> None:
    clock = Clock()
    pool = Pool(null, slots=1, clock=clock)
    first, second = pool.submit(inputs(2)), pool.submit(inputs(1))
    for _ in range(4):
        pool.tick()
        clock.now += 1
    assert (first.result().waited_ms, first.result().milliseconds) == (0, 2000)
    assert (second.result().waited_ms, second.result().milliseconds) == (2000, 1000)


def test_cancelling_frees_the_slot_at_once(null: Faulty) -> None:
    pool = Pool(null, slots=1)
    running, waiting, third = (pool.submit(inputs(9), "full") for _ in range(3))
    pool.tick()
    assert running.cancel()
    assert waiting.cancel()
    assert not running.cancel()
    same(third.result(), alone(null, inputs(9), "full", 1))
    for ticket in (running, waiting):
        with pytest.raises(RefusedError, match="cancelled"):
            ticket.result()
    assert not third.cancel()


def test_a_full_queue_refuses_at_once_or_drops_the_oldest(null: Faulty) -> None:
    pool = Pool(null, capacity=2)
    kept = [pool.submit(inputs(1)) for _ in range(2)]
    with pytest.raises(RefusedError) as refused:
        pool.submit(inputs(1))
    assert refused.value.reason == "queue_full"
    assert all(ticket.result().steps == 1 for ticket in kept)
    pool = Pool(null, capacity=2, when_full="drop-oldest")
    first, *rest = (pool.submit(inputs(1)) for _ in range(3))
    assert all(ticket.result().steps == 1 for ticket in rest)
    with pytest.raises(RefusedError, match="dropped"):
        first.result()


@pytest.mark.parametrize(
    ("bad", "halt"),
    [({"inputs": [1, 2]}, "learned"), ({"inputs": [-1] * 4}, "learned"), (inputs(1), "soon"), ({}, "full")],
)
def test_bad_input_is_refused_at_the_door_and_hurts_nobody(null: Faulty, bad: dict[str, Any], halt: str) -> None:
    pool = Pool(null)
    good = pool.submit(inputs(3))
    with pytest.raises(InputError):
        pool.submit(bad, halt)
    same(good.result(), alone(null, inputs(3), "learned", 1))


@pytest.mark.parametrize("stage", ["encode", "refine", "decode", "select"])
def test_an_engine_error_fails_the_affected_and_the_slots_recover(null: Faulty, stage: str) -> None:
    pool = Pool(null)
    early = [pool.submit(inputs(need)) for need in (2, 9)]
    pool.tick()
    late = [pool.submit(inputs(3)) for _ in range(2)]  # four in flight: another shape
    null.fails = stage
    pool.run_until_idle()
    tickets = zip(("two", "nine", "late", "late"), (*early, *late), strict=True)
    errors = {name: outcome for name, t in tickets if isinstance(outcome := t._outcome, EngineError)}
    failed = sorted(errors)
    assert all(f"failed at {stage}: OSError: injected at {stage}" in str(error) for error in errors.values())
    affected = {"encode": ["late"], "refine": ["late", "nine", "two"], "decode": ["two"], "select": ["nine", "two"]}
    assert failed == affected[stage]
    same(pool.submit(inputs(5)).result(), alone(null, inputs(5), "learned", 1))


def test_nan_fails_its_own_request_only(null: Faulty) -> None:
    pool = Pool(null)
    good, bad = pool.submit(inputs(3)), pool.submit(inputs(3, tag=13))
    same(good.result(), alone(null, inputs(3), "learned", 2))
    with pytest.raises(EngineError, match="NaN or Inf"):
        bad.result()


def test_threads_submit_and_wait_at_will(null: Faulty) -> None:
    pool = Pool(null)
    answers: dict[int, Answer] = {}

    def client(number: int) -> None:
        for k in range(20):
            answers[number * 100 + k] = pool.submit(inputs(1 + (number + k) % 9)).result()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 120
    for key, answer in answers.items():
        assert answer.steps == 1 + (key // 100 + key % 100) % 9


def test_a_busy_pool_uses_every_slot(null: Faulty) -> None:
    pool = Pool(null)
    for number in range(400):
        pool.submit(inputs(1 + number % 9))
    while pool.waiting:
        pool.tick()
    assert pool.stats.used == pool.stats.full == pool.stats.rows


def test_a_pool_of_no_slots_is_refused(null: Faulty) -> None:
    for slots in (0, 5):
        with pytest.raises(InputError, match=r"expected 1\.\.4 slots"):
            Pool(null, slots=slots)
