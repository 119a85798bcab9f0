"""The loop: plugins on one device, each request with as many steps as it needs and as it is worth.

    with Loop({"reason": reason, "solve": solve}) as loop:
        ticket = loop.submit("reason", {"inputs": puzzle}, deadline_ms=200)
        answer = ticket.result()              # works the loop until the answer is there

What to do is decided by `scheduler`; this is the only place where plugins step, answer and remember. Threads may submit, cancel
and wait; one works at a time, and a submission waits for the step that is under way. What one request does wrong (bad
input, an exception, an energy that is not finite) fails that request, or the requests of that step, and no other.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from sage_edge.device import resident_mib
from sage_edge.errors import EngineError, InputError, RefusedError, SageError
from sage_edge.irp.plugin import Observation, Plugin, Result
from sage_edge.irp.telemetry import Moment, Sink, Spent
from sage_edge.irp.worth import WorthTable, blank
from sage_edge.sharing import scheduler
from sage_edge.sharing.clock import Clock, SystemClock
from sage_edge.sharing.costs import Costs
from sage_edge.sharing.power import EnergySensor
from sage_edge.sharing.requests import Flight, Recorder, Refinement, Rows, Ticket
from sage_edge.sharing.scheduler import Account, Decision, Outcome, Settings, SharingState, Task


class Loop:
    """Plugins that share a device, by name.

    worth, costs: what is known of a plugin's steps (default: what its home folder holds, else nothing; it is learned).
    sensor: an energy sensor, needed for a budget in millijoules. Raises InputError when there is none for such a budget.
    """

    def __init__(self, plugins: Mapping[str, Plugin[Any]], settings: Settings | None = None, clock: Clock | None = None,
                 sink: Sink | None = None, recorder: Recorder | None = None, sensor: EnergySensor | None = None,
                 worth: Mapping[str, WorthTable] | None = None, costs: Mapping[str, Costs] | None = None) -> None:  # fmt: skip
        self.plugins = dict(plugins)
        self.settings = settings or Settings()
        self.clock: Clock = clock or SystemClock()
        self.sink, self.recorder, self.sensor = sink, recorder or Recorder(), sensor
        if self.settings.budget.unit == "mJ" and sensor is None:
            raise InputError(
                "budget: unit mJ needs an energy sensor, and this machine has none that may be read; use ms"
            )
        self._known = dict(worth or {}), dict(costs or {})
        self._state: SharingState | None = None
        self._flights: dict[int, Flight] = {}
        self._next = 0
        self._lock = threading.RLock()
        self.deciding_s = 0.0  # CPU seconds of schedule and update
        self.ticks = 0

    def __enter__(self) -> Loop:
        for plugin in self.plugins.values():
            plugin.activate()
        worth, costs = self._known
        accounts = {
            name: Account(name, plugin.max_steps, plugin.batch_sizes, costs.get(name, Costs()),
                          worth.get(name) or plugin.worth or blank(plugin.max_steps))
            for name, plugin in self.plugins.items()
        }  # fmt: skip
        self._state = scheduler.initial(self.settings, accounts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for flight in self._flights.values():
            flight.plugin.release(flight.state)
        self._flights.clear()
        for plugin in self.plugins.values():
            plugin.deactivate()

    @property
    def state(self) -> SharingState:
        """What the scheduler knows. Raises RuntimeError outside of `with`."""
        if self._state is None:
            raise RuntimeError("the loop is not running; use `with loop:`")
        return self._state

    @property
    def idle(self) -> bool:
        return self.state.idle

    def halt_text(self, name: str) -> str:
        """The policy of a request to that plugin that asks for none: what the profile makes of certificate and own rule."""
        plugin = self.plugins[name]
        return self.settings.profile.halting(plugin.spec.halt, plugin.certificate)

    def submit(self, plugin: str, observation: Observation, halt: str | None = None, deadline_ms: float | None = None,
               priority: int = 0, entity_id: str = "local", arrived: float | None = None) -> Ticket:  # fmt: skip
        """Queue one request.

        halt: a policy (default: the profile's). deadline_ms: from arrival; then it gets its best answer so far. priority: each
        level doubles what a step counts as. entity_id: who asks, for telemetry. arrived: a time of the loop's clock (default:
        now). Raises InputError for a bad observation, policy or plugin, RefusedError when there are too many requests.
        """
        with self._lock:
            self.recorder.starting()
            now = self.clock.now() if arrived is None else arrived
            if plugin not in self.plugins:
                raise InputError(f"plugin {plugin!r}: not loaded; there are {', '.join(self.plugins) or 'none'}")
            chosen = self.plugins[plugin]
            text = self.halt_text(plugin) if halt is None else halt
            policy = chosen.policy(text)
            deadline = None if deadline_ms is None else now + deadline_ms / 1e3
            task = Task(self._next, plugin, now, deadline, priority)
            state = scheduler.submit(self.state, task)
            held = chosen.init_state(observation)
            ticket = Ticket(self, task.id)
            certified = chosen.certificate is not None and text == chosen.default_halt
            accepts = chosen.certificate.accepts() if certified and chosen.certificate else None
            trace = np.full((16, len(chosen.signals)), np.nan, np.float32)
            self._flights[task.id] = Flight(ticket, chosen, held, policy, accepts, entity_id, now, trace)
            self._state, self._next = state, self._next + 1
            self.recorder.submitted(task, observation, str(policy), entity_id, deadline_ms)
            return ticket

    def cancel(self, ticket: Ticket) -> bool:
        with self._lock:
            if ticket.done:
                return False
            self.recorder.starting()
            self._state = scheduler.cancel(self.state, ticket.id)
            self._settle(ticket.id, RefusedError("cancelled", "by who asked for it"))
            self.recorder.cancelled(ticket.id)
            return True

    def run_until_idle(self) -> None:
        """Work until nothing is in flight."""
        while not self.idle:
            self.work()

    def work(self) -> None:
        """One tick, and the wait after it when the budget of the period is spent."""
        decision = self.tick()
        if decision.until is not None:
            self.clock.sleep_until(decision.until)

    def tick(self) -> Decision:
        """Answer who is done, and take one step. Never raises for the sake of one request: its ticket does."""
        with self._lock:
            if self.state.idle:
                return Decision()
            self.recorder.starting()
            began = time.thread_time()
            decision = scheduler.schedule(self.state, self.clock.now())
            deciding = time.thread_time() - began
            for number in decision.expire:
                self._settle(number, RefusedError("deadline", "it passed before the first step"))
            results, contributions, answering = self._answer(decision)
            outcome, rows = self._step(decision, contributions, answering)
            began = time.thread_time()
            self._state = scheduler.update(self.state, decision, outcome)
            self.deciding_s += deciding + time.thread_time() - began
            self.ticks += 1
            self.recorder.ticked(decision, outcome, results, rows)
            return decision

    def _answer(self, decision: Decision) -> tuple[dict[int, Result], dict[int, float], dict[str, float]]:
        """Settle who is done; what they got, what they contributed, and the milliseconds that it took by plugin."""
        results: dict[int, Result] = {}
        contributions: dict[int, float] = {}
        spent: dict[str, float] = {}
        for number, reason in decision.answer:
            flight = self._flights.get(number)
            if flight is None:
                continue
            plugin, began = flight.plugin, self.clock.now()
            try:
                result = plugin.result(flight.state)
                contribution = float(plugin.contribution(flight.energies))
                plugin.commit(flight.state, reason)
            except Exception as error:  # whatever a plugin raises is the failure of this request, not of the loop
                self._fail(number, "result", error)
                continue
            now = self.clock.now()
            name = self._name(number)
            spent[name] = spent.get(name, 0.0) + (now - began) * 1e3
            results[number], contributions[number] = result, contribution
            self._tell(flight, now, reason, contribution)
            self._settle(number, self._refinement(flight, result, reason, now))
        return results, contributions, spent

    def _refinement(self, flight: Flight, result: Result, reason: str, now: float) -> Refinement:
        steps = len(flight.energies)
        ended = np.array(flight.ended)
        settled = flight.accepts is None or bool(flight.accepts.halts(flight.history(now))[0])
        return Refinement(
            result=result, steps=steps, reason=reason, energies=np.array(flight.energies), trace=flight.trace[:steps].copy(),
            signals=flight.plugin.signals, step_ms=(ended - flight.arrived) * 1e3,
            waited_ms=max(0.0, flight.began - flight.arrived) * 1e3, milliseconds=(now - flight.arrived) * 1e3,
            spent=self._spent(flight), settled=settled,
        )  # fmt: skip

    def _step(
        self, decision: Decision, contributions: Mapping[int, float], answering: Mapping[str, float]
    ) -> tuple[Outcome, Rows]:
        """The granted steps, or as many as it takes until one of the requests is done."""
        flights = {number: self._flights[number] for number in decision.step if number in self._flights}
        started = finished = self.clock.now()
        energies: dict[int, list[float]] = {number: [] for number in flights}
        gained: dict[int, list[list[float]]] = {number: [] for number in flights}
        halted: dict[int, str] = {}
        failed: set[int] = set()
        atp = 0.0
        for _ in range(decision.grant if flights else 0):
            began = finished
            before = self.sensor.read() if self.sensor else None
            rows, errors = self._refine(self.plugins[decision.plugin], flights)
            finished = self.clock.now()
            used = self.sensor.read() - before if self.sensor and before is not None else None
            spent_ms = (finished - began) * 1e3
            counted = used if self.settings.budget.unit == "mJ" and used is not None else spent_ms
            atp += counted
            for number, row in rows.items():
                gained[number].append(row)
            for number, error in errors.items():
                failed.add(number)
                self._fail(number, "step", error)
            for number in [number for number in flights if number not in failed]:
                energy, reason = self._advanced(
                    flights[number], rows[number], began, finished, counted, used, len(flights)
                )
                energies[number].append(energy)
                if reason:
                    halted[number] = reason
            if failed or halted:
                break
        reached = {number: tuple(path) for number, path in energies.items() if path}
        used_atp = None if self.settings.budget.unit == "ms" else atp
        outcome = Outcome(started, finished, reached, halted, frozenset(failed), contributions, answering, used_atp)
        return outcome, gained

    def _refine(
        self, plugin: Plugin[Any], flights: Mapping[int, Flight]
    ) -> tuple[dict[int, list[float]], dict[int, Exception]]:
        """One step of all flights; energy and signals of each, or why it failed."""
        rows: dict[int, list[float]] = {}
        try:
            indices = [len(flight.energies) for flight in flights.values()]
            stepped = plugin.step_many([flight.state for flight in flights.values()], indices)
            for (number, flight), state in zip(flights.items(), stepped, strict=True):
                flight.state = plugin.project(state)
                rows[number] = [float(plugin.energy(flight.state)), *map(float, plugin.read_signals(flight.state))]
        except Exception as error:  # see _answer; where each of them stands is not known
            return {}, dict.fromkeys(flights, error)
        wrong = {
            number: ValueError(f"the energy is {row[0]}") for number, row in rows.items() if not math.isfinite(row[0])
        }
        return rows, dict(wrong)

    def _advanced(self, flight: Flight, row: list[float], began: float, finished: float, atp: float, energy_mJ: float | None,
                  sharers: int) -> tuple[float, str]:  # fmt: skip
        """Enter one step of one request; its normalised energy, and why it stops or ""."""
        if not flight.energies:
            flight.began = began
        flight.add(row)
        flight.ended.append(finished)
        flight.atp += atp / sharers
        flight.time_ms += (finished - began) * 1e3 / sharers
        flight.energy_mJ += (energy_mJ or 0.0) / sharers
        plugin = flight.plugin
        try:
            reason = plugin.halt(flight.history(finished), flight.policy)
        except Exception as error:  # a halting rule that fails stops the request rather than running it for ever
            reason = f"halt failed: {type(error).__name__}"
        if not reason and len(flight.energies) >= plugin.max_steps:
            reason = f"max_steps:{plugin.max_steps}"
        self._tell(flight, finished, None, None)
        return plugin.spec.energy_range.normalise(row[0]), reason

    def _tell(self, flight: Flight, now: float, reason: str | None, contribution: float | None) -> None:
        """Write one record of telemetry."""
        if self.sink is None:
            return
        number = flight.ticket.id
        whole = reason is not None
        steps = len(flight.energies)
        moment = Moment(
            record="request" if whole else "step",
            time=self.clock.epoch + now,
            entity_id=flight.entity_id,
            request=number,
            energies=tuple(flight.energies),
            span=flight.plugin.spec.energy_range,
            trust=self.state.accounts[self._name(number)].trust,
            spent=self._spent(flight),
            profile=self.settings.profile,
            signals=dict(zip(flight.plugin.signals, map(float, flight.trace[steps - 1]), strict=True)),
            halt_reason=reason,
            contribution=contribution,
        )
        self.sink.write(flight.plugin.emit_telemetry(moment))

    def _spent(self, flight: Flight) -> Spent:
        """Of the request so far."""
        return Spent(flight.atp, flight.time_ms, flight.energy_mJ if self.sensor else None, resident_mib())

    def _name(self, number: int) -> str:
        plugin = self._flights[number].plugin
        return next(name for name, own in self.plugins.items() if own is plugin)

    def _fail(self, number: int, stage: str, error: Exception) -> None:
        text = (str(error).splitlines() or [""])[0]
        name = self._flights[number].plugin.spec.name
        self._settle(number, EngineError(f"plugin {name} failed at {stage}: {type(error).__name__}: {text}"))

    def _settle(self, number: int, outcome: Refinement | SageError) -> None:
        flight = self._flights.pop(number, None)
        if flight is not None:
            flight.plugin.release(flight.state)
            flight.ticket._outcome = outcome


def measured_costs(plugin: Plugin[Any], clock: Clock | None = None, rounds: int = 5) -> Costs:
    """What a step of each batch size takes here: the median of `rounds` after one that does not count. The plugin is active."""
    clock = clock or SystemClock()
    costs = Costs()
    for size in plugin.batch_sizes:
        states = [plugin.init_state(observation) for observation in _repeated(plugin.samples(size), size)]
        times = []
        for index in range(min(rounds + 1, plugin.max_steps)):
            began = clock.now()
            states = [plugin.project(state) for state in plugin.step_many(states, [index] * size)]
            for state in states:
                plugin.energy(state)
            times.append((clock.now() - began) * 1e3)
        for state in states:
            plugin.release(state)
        middle = float(np.median(times[1:] or times))
        costs = costs.learned(size, middle, middle)
    return costs


def _repeated(observations: Sequence[Observation], count: int) -> list[Observation]:
    return [observations[index % len(observations)] for index in range(count)]
