"""Which requests run where, and until when: pure functions over plain data, no clock, no engine, no threads.

    state, dropped = submit(state, request)       # a request joins the queue, or is refused
    plan = schedule(state, now)                   # what one tick does
    ... the loop (pool.py) carries it out ...
    state = update(state, plan, outcome)          # what came of it

A tick answers the slots that are done, compacts the others into the smallest shape that holds all who can run, admits
waiting requests into the free slots and refines (continuous batching, as in Orca, OSDI 2022, and vLLM, for models that
halt instead of emitting an end token). Times are seconds of any one monotonic clock.

The queue is ordered by one number that never changes while a request waits, its `due` time: the deadline, or arrival plus
PATIENCE_S if that is sooner, minus PATIENCE_S for each level of priority. Among equals this is earliest-deadline-first; a
higher priority overtakes; and nobody starves: who arrives (p + 1) x PATIENCE_S after a request cannot overtake it by a
priority that is higher by p.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sage_edge.errors import RefusedError
from sage_edge.irp.halting import History, Policy

PATIENCE_S = 10.0
Floats = npt.NDArray[np.float32]
WhenFull = Literal["refuse", "drop-oldest"]


@dataclass(frozen=True, eq=False)
class Request:
    """What the scheduler knows of a request. `policy` must end it at some step; `deadline` is a time or None.

    `history` float32 [steps, k] and `elapsed` (seconds) are those of a request that is resumed, else empty and 0.
    """

    id: int
    policy: Policy
    arrived: float
    deadline: float | None = None
    priority: int = 0
    history: Floats | None = None
    elapsed: float = 0.0

    @property
    def due(self) -> float:
        deadline = np.inf if self.deadline is None else self.deadline
        return min(self.arrived + PATIENCE_S, deadline) - self.priority * PATIENCE_S


@dataclass(frozen=True)
class Slot:
    """A row of the engine's state that is in use. `reason` is why its request is done, or "" while it goes on."""

    request: Request
    admitted: float
    steps: int
    reason: str = ""


@dataclass(frozen=True)
class SchedulerState:
    """All there is to know. slots: one entry a row of the engine's state, None where free. signals: float32
    [rows, capacity, k], the history of each row's request (row i holds its steps 1..slots[i].steps). shapes: the sizes of
    state that the engine has, rising. queue: waiting requests, most urgent first."""

    shapes: tuple[int, ...]
    names: tuple[str, ...]
    slots: tuple[Slot | None, ...]
    signals: Floats
    queue: tuple[Request, ...] = ()
    soonest: float = np.inf  # no deadline in the queue is before this: most ticks need not look through it
    capacity: int = 1024
    when_full: WhenFull = "refuse"

    @property
    def idle(self) -> bool:
        return not self.queue and not any(self.slots)


@dataclass(frozen=True)
class Plan:
    """One tick, in this order. Rows of `answer` are those of the state as it is, all others of the state after `keep`.

    expire: queued requests whose deadline has passed. answer: (row, request, reason) to decode and give out. keep: None, or
    the rows to take over into a new state of `shape` slots. admit: (row, request). refine: the rows that are in use.
    """

    expire: tuple[Request, ...]
    answer: tuple[tuple[int, Slot, str], ...]
    keep: tuple[int, ...] | None
    shape: int
    admit: tuple[tuple[int, Request], ...]
    refine: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a plan. started, finished: times around the step. signals: float32 [shape, k], None where no step was
    taken. failed: ids of requests that an engine error hit; their slots are free again."""

    started: float
    finished: float
    signals: Floats | None
    failed: frozenset[int] = frozenset()


def initial(shapes: tuple[int, ...], names: tuple[str, ...], capacity: int = 1024,
            when_full: WhenFull = "refuse") -> SchedulerState:  # fmt: skip
    """No slot in use, nothing waiting."""
    return SchedulerState(shapes, names, (), np.empty((0, 0, len(names)), np.float32), (), np.inf, capacity, when_full)


def submit(state: SchedulerState, request: Request) -> tuple[SchedulerState, tuple[Request, ...]]:
    """The state with `request` in the queue, and whom it displaced (the longest waiting, with "drop-oldest").

    Raises RefusedError when the queue is full and stays so.
    """
    dropped: tuple[Request, ...] = ()
    queue = list(state.queue)
    if len(queue) >= state.capacity:
        if state.when_full == "refuse":
            raise RefusedError("queue_full", f"{len(queue)} requests are waiting already; try again later")
        oldest = min(queue, key=lambda waiting: (waiting.arrived, waiting.id))
        queue.remove(oldest)
        dropped = (oldest,)
    insort(queue, request, key=lambda waiting: (waiting.due, waiting.id))
    soonest = min(state.soonest, np.inf if request.deadline is None else request.deadline)
    return replace(state, queue=tuple(queue), soonest=soonest), dropped


def cancel(state: SchedulerState, request: int) -> SchedulerState:
    """The state without that request; its slot, if it has one, is free at once."""
    return replace(
        state,
        queue=tuple(waiting for waiting in state.queue if waiting.id != request),
        slots=tuple(None if slot and slot.request.id == request else slot for slot in state.slots),
    )


def schedule(state: SchedulerState, now: float) -> Plan:
    """What the next tick does."""
    answer, going = [], []
    for row, slot in enumerate(state.slots):
        if slot is None:
            continue
        reason = slot.reason or ("deadline" if _late(slot.request, now) else "")
        if reason:
            answer.append((row, slot, reason))
        else:
            going.append(row)
    expire = tuple(waiting for waiting in state.queue if _late(waiting, now)) if now >= state.soonest else ()
    places = state.shapes[-1] - len(going)
    newcomers = [r for r in state.queue[: places + len(expire)] if not _late(r, now)][:places]
    wanted = len(going) + len(newcomers)
    if not wanted:
        return Plan(expire, tuple(answer), None, len(state.slots), (), ())
    shape = next(size for size in state.shapes if size >= wanted)
    if shape == len(state.slots):
        keep = None
        taken = going
    else:
        keep = tuple(going)
        taken = list(range(len(going)))
    free = (row for row in range(shape) if row not in taken)
    admit = tuple(zip(free, newcomers, strict=False))
    return Plan(expire, tuple(answer), keep, shape, admit, tuple(sorted((*taken, *(row for row, _ in admit)))))


def update(state: SchedulerState, plan: Plan, outcome: Outcome) -> SchedulerState:
    """The state after a tick. Requests cancelled or dropped while it ran are gone and stay so."""
    left = {request.id for request in plan.expire} | {request.id for _, request in plan.admit}
    queue, waiting = _without(state.queue, left)
    soonest = state.soonest
    if plan.expire:
        soonest = min((r.deadline for r in queue if r.deadline is not None), default=np.inf)
    answered = {row for row, _, _ in plan.answer}
    old = [slot if slot and row not in answered else None for row, slot in enumerate(state.slots)]
    rows = range(len(state.slots)) if plan.keep is None else plan.keep
    slots: list[Slot | None] = [old[row] for row in rows]
    slots += [None] * (plan.shape - len(slots))
    histories = [request.history for _, request in plan.admit if request.history is not None]
    steps = [slot.steps for slot in slots if slot] + [len(history) for history in histories]
    signals = _reshaped(state.signals, list(rows), plan.shape, max(steps, default=0) + 1)
    for row, request in plan.admit:
        if request.id in waiting:
            done = 0 if request.history is None else len(request.history)
            if request.history is not None:
                signals[row, :done] = request.history
            slots[row] = Slot(request, outcome.started - request.elapsed, done)
    slots = [None if slot and slot.request.id in outcome.failed else slot for slot in slots]
    if outcome.signals is not None:
        active = [row for row in plan.refine if slots[row]]
        signals = _step(slots, active, signals, outcome.signals, outcome.finished, state.names)
    return replace(state, queue=queue, soonest=soonest, slots=tuple(slots), signals=signals)


def _without(queue: tuple[Request, ...], left: set[int]) -> tuple[tuple[Request, ...], set[int]]:
    """The queue without the ids `left`, and which of them were in it. Those that leave are mostly at the front."""
    found: set[int] = set()
    stay: list[Request] = []
    for place, request in enumerate(queue):
        if len(found) == len(left):
            return (*stay, *queue[place:]), found
        if request.id in left:
            found.add(request.id)
        else:
            stay.append(request)
    return tuple(stay), found


def _reshaped(signals: Floats, rows: list[int], shape: int, capacity: int) -> Floats:
    """A copy with the given rows first, `shape` rows in all and room for at least `capacity` steps."""
    room = signals.shape[1] if signals.shape[1] >= capacity else max(16, 2 * capacity)
    if room == signals.shape[1] and rows == list(range(shape)):
        same: Floats = signals.copy()
        return same
    copy = np.full((shape, room, signals.shape[2]), np.nan, np.float32)
    copy[: len(rows), : signals.shape[1]] = signals[rows]
    return copy


def _step(slots: list[Slot | None], active: list[int], signals: Floats, new: Floats, now: float,
          names: tuple[str, ...]) -> Floats:  # fmt: skip
    """Record one step of the active rows and ask each policy, once for all rows that share it; changes `slots`."""
    groups: dict[Policy, list[int]] = {}
    last: Policy | None = None  # neighbours mostly share the very object: hashing a policy costs more than comparing it
    for row in active:
        slot = slots[row]
        assert slot is not None
        slots[row] = Slot(slot.request, slot.admitted, slot.steps + 1)
        if slot.request.policy is not last:
            last = slot.request.policy
            members_of = groups.setdefault(last, [])
        members_of.append(row)
    taken = [slot.steps - 1 for row in active if (slot := slots[row])]
    signals[active, taken] = new[active]
    for policy, rows in groups.items():
        members = [slot for row in rows if (slot := slots[row])]
        history = History(
            signals[rows],
            np.array([slot.steps for slot in members], np.int64),
            np.array([(now - slot.admitted) * 1e3 for slot in members]),
            names,
        )
        for row, slot, reason in zip(rows, members, policy.reasons(history), strict=True):
            if reason:
                slots[row] = Slot(slot.request, slot.admitted, slot.steps, reason)
    return signals


def _late(request: Request, now: float) -> bool:
    return request.deadline is not None and now >= request.deadline
