"""The scheduler alone: no engine, no clock; a model of the loop in a few lines drives it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.errors import RefusedError
from sage_edge.irp.halting import MaxSteps
from sage_edge.scheduler import (
    PATIENCE_S,
    Outcome,
    Plan,
    Request,
    SchedulerState,
    cancel,
    initial,
    schedule,
    submit,
    update,
)

SHAPES = (1, 2, 4)


def fresh(capacity: int = 100, when_full: str = "refuse") -> SchedulerState:
    return initial(SHAPES, ("entropy_mean",), capacity, when_full)  # type: ignore[arg-type]


def request(
    number: int, steps: int = 2, arrived: float = 0.0, deadline: float | None = None, priority: int = 0
) -> Request:
    return Request(number, MaxSteps(steps), arrived, deadline, priority)


def joined(state: SchedulerState, *requests: Request) -> SchedulerState:
    for one in requests:
        state, _ = submit(state, one)
    return state


def ran(state: SchedulerState, now: float, failed: frozenset[int] = frozenset()) -> tuple[SchedulerState, Plan]:
    plan = schedule(state, now)
    signals = np.full((plan.shape, 1), now, np.float32) if plan.refine else None
    return update(state, plan, Outcome(now, now, signals, failed)), plan


def held(state: SchedulerState) -> list[int]:
    return [slot.request.id for slot in state.slots if slot]


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(-2, 2), st.none() | st.integers(1, 8)), max_size=40
    ),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 39)), max_size=5),
    st.sets(st.integers(0, 39), max_size=3),
)
def test_every_request_ends_exactly_once_and_runs_no_longer_than_it_must(
    arrivals: list[tuple[int, int, int, int | None]], cancellations: list[tuple[int, int]], poisoned: set[int]
) -> None:
    state, ended, now = fresh(), {}, 0
    pending = [
        request(number, steps, at, None if wait is None else at + wait, priority)
        for number, (at, steps, priority, wait) in enumerate(arrivals)
    ]
    while pending or not state.idle:
        for one in [r for r in pending if r.arrived <= now]:
            state = joined(state, one)
        pending = [r for r in pending if r.arrived > now]
        for at, number in cancellations:
            if at == now and number not in ended and number < len(arrivals) and number not in {p.id for p in pending}:
                state, ended[number] = cancel(state, number), "cancelled"
        plan = schedule(state, now)
        assert plan.shape in (*SHAPES, 0)
        assert len(plan.refine) <= plan.shape
        if plan.refine:
            assert plan.shape == min(s for s in SHAPES if s >= len(plan.refine)), "the smallest shape that holds them"
            waiting = len(state.queue) - len(plan.expire) - len(plan.admit)
            assert waiting == 0 or len(plan.refine) == SHAPES[-1], "no slot stays free while somebody waits"
        failed = frozenset(poisoned & {r.id for _, r in plan.admit})
        for one in plan.expire:
            assert one.id not in ended
            ended[one.id] = "expired"
        for row, slot, reason in plan.answer:
            assert slot is state.slots[row]
            assert slot.request.id not in ended
            ended[slot.request.id] = reason
            assert reason == "deadline" or slot.steps == slot.request.policy.steps  # type: ignore[attr-defined]
        for number in failed:
            ended[number] = "failed"
        signals = np.zeros((plan.shape, 1), np.float32) if plan.refine else None
        state = update(state, plan, Outcome(now, now, signals, failed))
        assert len(set(held(state))) == len(held(state))
        assert not set(held(state)) & {r.id for r in state.queue}
        now += 1
        assert now < 1000
    assert sorted(ended) == list(range(len(arrivals)))


def test_the_history_follows_a_request_through_compaction() -> None:
    state = joined(fresh(), *(request(n, steps) for n, steps in enumerate((1, 1, 1, 5))))
    state, _ = ran(state, 1)
    state, plan = ran(state, 2)
    assert (plan.keep, plan.shape) == ((3,), 1)
    state, _ = ran(state, 3)
    assert held(state) == [3]
    np.testing.assert_array_equal(state.signals[0, :3, 0], [1, 2, 3])
    assert np.isnan(state.signals[0, 3:]).all()


def test_a_history_grows_beyond_its_first_capacity() -> None:
    state = joined(fresh(), request(0, 100))
    for now in range(100):
        state, _ = ran(state, now)
    np.testing.assert_array_equal(state.signals[0, :100, 0], np.arange(100))
    assert state.slots[0] is not None
    assert state.slots[0].reason == "max_steps:100"


def test_priority_then_deadline_then_arrival() -> None:
    state = joined(
        fresh(), request(0), request(1, deadline=5.0), request(2, deadline=3.0), request(3, priority=1), request(4)
    )
    assert [r.id for r in state.queue] == [3, 2, 1, 0, 4]


def test_no_stream_of_urgent_requests_starves_a_patient_one() -> None:
    state = joined(fresh(), request(0, 1))
    now, number = 0.0, 1
    while 0 in {r.id for r in state.queue} and now < 10 * PATIENCE_S:
        for _ in range(2 * SHAPES[-1]):  # twice what can be served, all of higher priority
            state = joined(state, request(number, 1, now, priority=1)) if len(state.queue) < 100 else state
            number += 1
        state, _ = ran(state, now)
        now += 0.5
    assert now < 3 * PATIENCE_S  # PATIENCE_S until nobody overtakes it any more, the rest to drain the queue before it


def test_a_full_queue_refuses_or_drops_the_oldest() -> None:
    with pytest.raises(RefusedError, match="queue_full: 2 requests are waiting"):
        joined(fresh(2), request(0), request(1), request(2))
    state = joined(fresh(2, "drop-oldest"), request(0, priority=9), request(1))
    state, dropped = submit(state, request(2, arrived=1.0))
    assert [r.id for r in dropped] == [0]
    assert [r.id for r in state.queue] == [1, 2]


def test_a_deadline_answers_who_runs_and_expires_who_waits() -> None:
    state = joined(fresh(), *(request(n, 50, deadline=2.0) for n in range(5)))
    state, _ = ran(state, 0)
    state, plan = ran(state, 1)
    assert not plan.answer
    state, plan = ran(state, 2)
    assert [(slot.request.id, slot.steps, reason) for _, slot, reason in plan.answer] == [
        (n, 2, "deadline") for n in range(4)
    ]
    assert [r.id for r in plan.expire] == [4]
    assert state.idle


def test_what_is_cancelled_while_a_tick_runs_is_gone_after_it() -> None:
    state = joined(fresh(), request(0, 9), request(1, 9))
    state, _ = ran(state, 0)
    state = joined(state, request(2, 9))
    plan = schedule(state, 1)
    state = cancel(cancel(state, 0), 2)
    state = update(state, plan, Outcome(1, 1, np.zeros((plan.shape, 1), np.float32)))
    assert held(state) == [1]
    assert not state.queue


def test_an_engine_error_frees_only_its_slots() -> None:
    state = joined(fresh(), *(request(n, 9) for n in range(3)))
    state, _ = ran(state, 0, frozenset({1}))
    assert held(state) == [0, 2]


def test_schedule_and_update_change_nothing_in_place() -> None:
    state = joined(fresh(), *(request(n, 3) for n in range(6)))
    state, _ = ran(state, 0)
    before, signals = (state.slots, state.queue), state.signals.copy()
    first = schedule(state, 1)
    assert first == schedule(state, 1)
    update(state, first, Outcome(1, 1, np.ones((first.shape, 1), np.float32)))
    assert (state.slots, state.queue) == before
    np.testing.assert_array_equal(state.signals, signals)
