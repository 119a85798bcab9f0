"""The loop: slots that take the next request as soon as one halts. The only place where steps are taken.

    pool = Pool(runner)
    tickets = [pool.submit({"inputs": puzzle}) for puzzle in puzzles]
    answers = [ticket.result() for ticket in tickets]

What to do is decided by `scheduler`; this module carries it out. An answer does not depend on its neighbours: the engine
runs only at its fixed shapes, and at one shape a request's prediction, steps and trace are those it gets alone, bit for
bit. Across shapes they agree within the parity tolerance. Threads may submit, cancel and wait at will: whoever waits for a
result does the work meanwhile, one thread at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sage_edge import scheduler
from sage_edge.engines.runner import Runner, State
from sage_edge.errors import DeviceLostError, EngineError, InputError, IntegrityError, RefusedError, SageError
from sage_edge.irp.halting import History, Policy, limited
from sage_edge.scheduler import Outcome, Plan, Request, Slot, WhenFull
from sage_edge.snapshot import Snapshot
from sage_edge.specs import Array


@dataclass(frozen=True)
class Answer:
    """What one request got.

    prediction: the `prediction` output of decode for this request (for HRM int32 [seq_len]); steps: refinement steps
    taken; reason: the policy that stopped it, or "deadline" for the best so far when its time was over; trace: float32
    [steps, k], the signals after each step; signals: their names; milliseconds: from admission to answer; waited_ms: from
    submission to admission; settled: False where the certificate's acceptance is not sure enough of the prediction, which
    is then only the best so far (always True without one).
    """

    prediction: Array
    steps: int
    reason: str
    trace: npt.NDArray[np.float32]
    signals: tuple[str, ...]
    milliseconds: float
    waited_ms: float = 0.0
    settled: bool = True


class Ticket:
    """A claim to one answer."""

    def __init__(self, pool: Pool, number: int, observation: dict[str, Array] | None, snapshot: Snapshot | None,
                 halt: str, max_steps: int, accepts: Policy | None = None) -> None:  # fmt: skip
        self.pool = pool
        self.accepts = accepts
        self.id = number
        self.observation = observation
        self.origin = snapshot
        self.halt = halt
        self.max_steps = max_steps
        self._outcome: Answer | SageError | None = None

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def result(self) -> Answer:
        """The answer; works the pool until it is there. Raises RefusedError or EngineError when there will be none."""
        while self._outcome is None:
            self.pool.tick()
        if isinstance(self._outcome, SageError):
            raise self._outcome
        return self._outcome

    def cancel(self) -> bool:
        """Give the request up; its slot is free at once. False when it is done already."""
        return self.pool._cancel(self)

    def _settle(self, outcome: Answer | SageError) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self.observation = self.origin = None


@dataclass
class Statistics:
    """Counters since the pool was made. rows: slots computed; used: those of them that held a request; full: slots that
    could have been (ticks x the pool's slots). Seconds by the pool's timer, submitting_s: of checking inputs and queueing;
    scheduling_s: of deciding and bookkeeping; moving_s: of admitting, compacting and decoding; refining_s: of the steps."""

    ticks: int = 0
    rows: int = 0
    used: int = 0
    full: int = 0
    answered: int = 0
    submitting_s: float = 0.0
    scheduling_s: float = 0.0
    moving_s: float = 0.0
    refining_s: float = 0.0
    fastest_step_s: dict[int, float] = field(default_factory=dict)  # by shape


class Pool:
    """Up to `slots` requests in flight on one active runner, and a queue of at most `capacity`.

    when_full: "refuse" the new request, or "drop-oldest" of those that wait. clock: seconds, monotonic.
    """

    def __init__(self, runner: Runner, slots: int | None = None, capacity: int = 1024, when_full: WhenFull = "refuse",
                 clock: Callable[[], float] = time.monotonic,
                 timer: Callable[[], float] = time.perf_counter) -> None:  # fmt: skip
        size = runner.slots if slots is None else slots
        if not 1 <= size <= runner.slots or capacity < 1:
            raise InputError(
                f"a pool of {size} slots and {capacity} places: expected 1..{runner.slots} slots, 1 or more"
            )
        self.runner = runner
        self.stats = Statistics()
        self.clock, self.timer = clock, timer
        shapes = (*(shape for shape in runner.shapes if shape < size), size)
        self._plans = scheduler.initial(shapes, runner.model.signals, capacity, when_full)
        self._tickets: dict[int, Ticket] = {}
        self._engine: State | None = None
        self._next = 0
        self._lock = threading.Lock()  # for the three above it, held briefly
        self._working = threading.Lock()  # for the runner, held for a whole tick

    @property
    def idle(self) -> bool:
        return self._plans.idle

    @property
    def waiting(self) -> int:
        """How many requests are in the queue."""
        return len(self._plans.queue)

    def submit(self, observation: Mapping[str, object], halt: str | Policy = "learned", max_steps: int | None = None,
               deadline_ms: float | None = None, priority: int = 0, arrived: float | None = None,
               accepts: Policy | None = None) -> Ticket:  # fmt: skip
        """Queue one request.

        observation: arrays of one request, without the slots axis (HRM: `inputs` int32 [seq_len]). deadline_ms: from its
        arrival; when it passes, the request gets its best answer so far. priority: higher goes first. arrived: a time of
        the pool's clock (default: now). accepts: fires where the answer may be called settled. Raises InputError for a bad
        observation or policy, RefusedError when the queue is full.
        """
        began = self.timer()
        arrays = {name: np.asarray(value)[None] for name, value in observation.items()}
        checked = self.runner.model.validate_observation(arrays, "request")
        limit = max_steps or self.runner.model.max_steps
        ticket = self._enqueue(checked, None, halt, limit, deadline_ms, priority, arrived, accepts)
        with self._lock:
            self.stats.submitting_s += self.timer() - began
        return ticket

    def resume(self, snapshot: Snapshot, deadline_ms: float | None = None, priority: int = 0) -> Ticket:
        """Queue a request where `snapshot` left it, under its own policy.

        Raises IntegrityError for the snapshot of another model, InputError for one that does not fit or has no step left.
        """
        if snapshot.model != self.runner.digest or snapshot.signals != self.runner.model.signals:
            raise IntegrityError(
                f"snapshot: taken from model {snapshot.model[:12]}, this engine is {self.runner.digest[:12]}; not resumed"
            )
        if not 1 <= snapshot.steps < snapshot.max_steps:
            raise InputError(
                f"snapshot: {snapshot.steps} of at most {snapshot.max_steps} steps are taken; none is left"
            )
        self.runner.check_arrays(snapshot.arrays)
        return self._enqueue(None, snapshot, snapshot.halt, snapshot.max_steps, deadline_ms, priority, None)

    def _enqueue(self, observation: dict[str, Array] | None, snapshot: Snapshot | None, halt: str | Policy, limit: int,
                 deadline_ms: float | None, priority: int, arrived: float | None,
                 accepts: Policy | None = None) -> Ticket:  # fmt: skip
        now = self.clock() if arrived is None else arrived
        policy = limited(halt, limit)
        deadline = None if deadline_ms is None else now + deadline_ms / 1e3
        with self._lock:
            ticket = Ticket(self, self._next, observation, snapshot, str(halt), limit, accepts)
            self._next += 1
            history, elapsed = (snapshot.history, snapshot.elapsed_ms / 1e3) if snapshot else (None, 0.0)
            request = Request(ticket.id, policy, now, deadline, priority, history, elapsed)
            self._plans, dropped = scheduler.submit(self._plans, request)
            self._tickets[ticket.id] = ticket
            for old in dropped:
                self._settle(old.id, RefusedError("dropped", "the queue was full, and a newer request took its place"))
        return ticket

    def snapshot(self, ticket: Ticket) -> Snapshot:
        """What `resume` needs to go on with a request in flight, which itself goes on here (cancel it to move it).

        Raises InputError when the request has not begun, is done, or has a policy that its text does not reproduce.
        """
        with self._working, self._lock:
            rows = [row for row, s in enumerate(self._plans.slots) if s and s.request.id == ticket.id and not s.reason]
            if not rows or ticket.pool is not self or self._engine is None:
                raise InputError("snapshot: the request is not in flight: it has not begun, or it is done")
            slot = self._plans.slots[rows[0]]
            assert slot is not None
            # A policy that came as an object is only as good as its text, which may have fewer digits.
            if slot.request.policy != limited(ticket.halt, ticket.max_steps):
                raise InputError(f"snapshot: the policy {ticket.halt!r} does not say all that it is; submit it as text")
            return Snapshot(
                model=self.runner.digest,
                signals=self.runner.model.signals,
                halt=ticket.halt,
                max_steps=ticket.max_steps,
                elapsed_ms=(self.clock() - slot.admitted) * 1e3,
                history=self._plans.signals[rows[0], : slot.steps].copy(),
                arrays=self.runner.read(self._engine, rows),
            )

    def run_until_idle(self) -> None:
        """Tick until nothing is in flight or waiting."""
        while not self.idle:
            self.tick()

    def tick(self) -> None:
        """Answer who is done, admit who waits, take one step. Does nothing when there is nothing to do.

        Never raises for the sake of one request: its ticket does.
        """
        with self._working:
            began, moved = self.timer(), self.stats.moving_s
            with self._lock:
                if self._plans.idle:
                    return
                plans, plan = self._plans, scheduler.schedule(self._plans, self.clock())
            for request in plan.expire:
                self._settle(request.id, RefusedError("deadline", "it passed before the first step"))
            self._answer(plan.answer, plans.signals)
            failed = self._arrange(plan, plans.slots)
            refined = self._refine(plan, failed, plans.slots)
            with self._lock:
                self._plans = scheduler.update(self._plans, plan, refined.outcome)
                spent = self.timer() - began - refined.engine_s - (self.stats.moving_s - moved)
                self.stats.scheduling_s += spent

    def _answer(self, done: Sequence[tuple[int, Slot, str]], signals: npt.NDArray[np.float32]) -> None:
        """Decode the state once and settle the tickets of the given rows."""
        if not done:
            return
        assert self._engine is not None
        began = self.timer()
        try:
            predictions = self.runner.decode(self._engine)["prediction"]
        except Exception as error:  # whatever an engine raises is the failure of these requests, not of the pool
            for _, slot, _ in done:
                self._fail(slot.request.id, "decode", error)
            return
        finally:
            self.stats.moving_s += self.timer() - began
        now = self.clock()
        for row, slot, reason in done:
            request = slot.request
            trace = signals[row, : slot.steps].copy()
            ticket = self._tickets.get(request.id)
            answer = Answer(
                prediction=predictions[row].copy(),  # not a view: it would keep the whole batch alive
                steps=slot.steps,
                reason=reason,
                trace=trace,
                signals=self.runner.model.signals,
                milliseconds=(now - slot.admitted) * 1e3,
                waited_ms=max(0.0, slot.admitted + request.elapsed - request.arrived) * 1e3,
                settled=self._settled(ticket.accepts if ticket else None, trace),
            )
            self.stats.answered += 1
            self._settle(request.id, answer)

    def _settled(self, accepts: Policy | None, trace: npt.NDArray[np.float32]) -> bool:
        if accepts is None:
            return True
        steps = np.array([len(trace)], np.int64)
        return bool(accepts.halts(History(trace[None], steps, np.zeros(1), self.runner.model.signals))[0])

    def _arrange(self, plan: Plan, slots: Sequence[Slot | None]) -> set[int]:
        """Compact and admit; the ids of requests that an error hit."""
        failed: set[int] = set()
        if not plan.refine:
            return failed
        began = self.timer()
        try:
            if plan.keep:
                assert self._engine is not None
                self._engine = self.runner.select(self._engine, plan.keep, plan.shape)
        except Exception as error:  # see _answer; the carries may be lost, so all who had one fail
            failed = {slot.request.id for row in plan.keep or () if (slot := slots[row])}
            for number in failed:
                self._fail(number, "select", error)
            self._engine = None
        try:
            if self._engine is None or self._engine.slots != plan.shape:
                self._engine = self.runner.empty(plan.shape)
            self._admit(plan.admit)
        except Exception as error:  # see _answer; the other rows are untouched by contract
            for _, request in plan.admit:
                failed.add(request.id)
                self._fail(request.id, "encode", error)
        self.stats.moving_s += self.timer() - began
        return failed

    def _admit(self, admit: Sequence[tuple[int, Request]]) -> None:
        assert self._engine is not None
        fresh: list[tuple[int, dict[str, Array]]] = []
        for row, request in admit:
            ticket = self._tickets.get(request.id)
            if ticket is None:
                continue  # cancelled since the plan was made
            observation, origin = ticket.observation, ticket.origin
            if origin is not None:
                self.runner.restore(self._engine, [row], origin.arrays)
            elif observation is not None:
                fresh.append((row, observation))
        if fresh:
            rows = [row for row, _ in fresh]
            names = fresh[0][1]
            together = {name: np.concatenate([observation[name] for _, observation in fresh]) for name in names}
            self.runner.admit(self._engine, rows, together)

    def _refine(self, plan: Plan, failed: set[int], slots: Sequence[Slot | None]) -> _Refined:
        """One step of all rows, and who got through it."""
        started, cpu = self.clock(), self.timer()
        if not plan.refine or self._engine is None:
            return _Refined(Outcome(started, started, None, frozenset(failed)), 0.0)
        holders = _holders(plan, slots)
        wall = time.perf_counter()
        try:
            signals = self.runner.refine(self._engine).copy()
        except Exception as error:  # see _answer; the carry is in an unknown state and is given up
            for number in holders.values():
                self._fail(number, "refine", error)
            self._engine = None
            return _Refined(
                Outcome(started, self.clock(), None, frozenset(failed) | set(holders.values())),
                self.timer() - cpu,
            )
        wall, cpu = time.perf_counter() - wall, self.timer() - cpu
        self._count(plan, len(holders), wall)
        used = list(holders)
        finite = np.isfinite(signals[used]).all(axis=1)
        if not finite.all():
            for row in np.array(used)[~finite]:
                if holders[row] not in failed:
                    failed.add(holders[row])
                    self._fail(holders[row], "refine", ValueError("the signals hold NaN or Inf"))
        return _Refined(Outcome(started, self.clock(), signals, frozenset(failed)), cpu)

    def _count(self, plan: Plan, used: int, wall: float) -> None:
        stats = self.stats
        stats.ticks += 1
        stats.rows += plan.shape
        stats.used += used
        stats.full += self._plans.shapes[-1]
        stats.refining_s += wall
        stats.fastest_step_s[plan.shape] = min(wall, stats.fastest_step_s.get(plan.shape, np.inf))

    def _cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if ticket.done:
                return False
            self._plans = scheduler.cancel(self._plans, ticket.id)
            self._settle(ticket.id, RefusedError("cancelled", "by who asked for it"))
            return True

    def _fail(self, number: int, stage: str, error: Exception) -> None:
        if isinstance(error, DeviceLostError):  # whoever serves must exit with its code, so that it is started anew
            self._settle(number, error)
            return
        text = (str(error).splitlines() or [""])[0]
        self._settle(number, EngineError(f"the engine failed at {stage}: {type(error).__name__}: {text}"))

    def _settle(self, number: int, outcome: Answer | SageError) -> None:
        if ticket := self._tickets.pop(number, None):
            ticket._settle(outcome)


@dataclass(frozen=True)
class _Refined:
    """The outcome of a step and the seconds spent in the engine, by the pool's timer."""

    outcome: Outcome
    engine_s: float


def _holders(plan: Plan, slots: Sequence[Slot | None]) -> dict[int, int]:
    """Row after compaction -> id of the request there, for the rows that a plan refines."""
    answered = {row for row, _, _ in plan.answer}
    rows = range(len(slots)) if plan.keep is None else plan.keep
    old = {new: slot.request.id for new, row in enumerate(rows) if (slot := slots[row]) and row not in answered}
    return dict(sorted((old | {row: request.id for row, request in plan.admit}).items()))
