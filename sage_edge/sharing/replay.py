"""A recorded run through the real loop again: the same decisions, or the first difference.

With the plugins (of the same digest) their steps are taken again, and energies and answers are compared as well. Without
them ("recorded") each request is given the energies and signals that it had, so that scheduler and halting are judged alone.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_edge.config import parse_yaml
from sage_edge.errors import InputError, IntegrityError, SageError
from sage_edge.irp.halting import History, Policy
from sage_edge.irp.plugin import Observation, Plugin, Result
from sage_edge.irp.profiles import Profile
from sage_edge.irp.registry import open_plugin
from sage_edge.irp.spec import PluginSpec
from sage_edge.sharing.budget import Budget
from sage_edge.sharing.clock import ReplayClock
from sage_edge.sharing.loop import Loop
from sage_edge.sharing.recording import Event, costs_of, restored, table_of, tick_facts
from sage_edge.sharing.requests import Recorder, Rows, Ticket
from sage_edge.sharing.scheduler import Decision, Outcome, Settings

RELATIVE = 1e-4  # of energies: another CPU may round differently; decisions must be the same whatever it does


@dataclass(frozen=True)
class Replayed:
    """What came of it. difference: the first one, in words, or "". energy_difference: the largest relative one."""

    ticks: int
    requests: int
    difference: str
    energy_difference: float
    answers_compared: int
    answers_same: int


class Played(Plugin[dict[str, int]]):
    """A plugin that gives what was recorded, by request: lines, its rows of signals; reasons, why it halted, where the real
    one has a rule of its own; answered, whether it had a result. contributions: in the order of answering."""

    def __init__(self, spec: PluginSpec, signals: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__(spec)
        self.extra_signals = tuple(signals[1:])
        self._sizes = tuple(sizes)
        self.lines: dict[int, list[list[float]]] = {}
        self.reasons: dict[int, str] = {}
        self.own_halt = False
        self.answered: set[int] = set()
        self.contributions: deque[float] = deque()
        self._asked: deque[int] = deque()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        return self._sizes

    def init_state(self, observation: Observation) -> dict[str, int]:
        if "request" not in observation:
            raise InputError("request: missing")
        return {"request": int(observation["request"]), "step": 0}

    def step_many(self, states: Sequence[dict[str, int]], indices: Sequence[int]) -> list[dict[str, int]]:
        self._asked.clear()
        return super().step_many(states, indices)

    def step(self, state: dict[str, int], index: int) -> dict[str, int]:
        if index >= len(self.lines.get(state["request"], [])):
            raise IntegrityError(f"request {state['request']}: no step {index} was recorded")
        return {"request": state["request"], "step": index}

    def energy(self, state: dict[str, int]) -> float:
        self._asked.append(state["request"])  # `halt` is not told; it is asked afterwards, in the same order
        return self.lines[state["request"]][state["step"]][0]

    def read_signals(self, state: dict[str, int]) -> Sequence[float]:
        return self.lines[state["request"]][state["step"]][1:]

    def halt(self, history: History, policy: Policy) -> str:
        number = self._asked.popleft()
        if not self.own_halt:
            return super().halt(history, policy)
        return self.reasons.get(number, "") if len(self.lines[number]) == int(history.steps[0]) else ""

    def result(self, state: dict[str, int]) -> Result:
        if state["request"] not in self.answered:
            raise IntegrityError(f"request {state['request']}: no answer was recorded")
        return {"step": state["step"]}

    def contribution(self, energies: Sequence[float]) -> float:
        return self.contributions.popleft()


class _Seen(Recorder):
    def __init__(self) -> None:
        self.facts: Event = {}

    def ticked(self, decision: Decision, outcome: Outcome, results: Mapping[int, Result], rows: Rows) -> None:
        self.facts = json.loads(json.dumps(tick_facts(decision, outcome, results)))


def plugins_of(header: Event, folders: Sequence[Path]) -> dict[str, Plugin[Any]]:
    """The plugins that a recording was made with, opened by their own names and options, found here or in `folders`.

    Raises InputError when one is not found, or for a header of nonsense.
    """
    try:
        facts = {
            name: (parse_yaml(facts["spec"], PluginSpec, "recording").name, dict(facts["options"]))
            for name, facts in header["plugins"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"recording: its header makes no sense: {type(error).__name__}: {error}") from error
    return {name: open_plugin(own, folders, options) for name, (own, options) in facts.items()}


def replay(header: Event, events: Sequence[Event], plugins: Mapping[str, Plugin[Any]] | None) -> Replayed:
    """Go through a recording.

    plugins: opened, not active, by the names of the recording; None to give every request what was recorded. Raises
    IntegrityError for a plugin of another digest, InputError for a recording whose content makes no sense.
    """
    try:
        return _replay(header, events, plugins)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"recording: its content makes no sense: {type(error).__name__}: {error}") from error


def _replay(header: Event, events: Sequence[Event], plugins: Mapping[str, Plugin[Any]] | None) -> Replayed:
    recorded = plugins is None
    own: dict[str, Plugin[Any]] = dict(plugins) if plugins is not None else _played(header, events)
    if plugins is not None:
        _require_same(header, plugins)
    settings = dict(header["settings"])
    settings |= {"profile": Profile(**settings["profile"]), "budget": Budget(**settings["budget"])}
    facts = header["plugins"]
    clock, seen = ReplayClock(float(header["epoch"])), _Seen()
    worth = {name: table_of(account) for name, account in facts.items()}
    costs = {name: costs_of(account) for name, account in facts.items()}
    loop = Loop(own, Settings(**settings), clock, recorder=seen, worth=worth, costs=costs)
    tally = _Tally(recorded)
    tickets: dict[int, Ticket] = {}
    with loop:
        for number, event in enumerate(events, 2):
            difference = _play(loop, clock, seen, event, tickets, tally, recorded)
            if difference:
                return tally.report(f"line {number}, {event['event']} {tally.ticks}: {difference}", len(tickets))
    return tally.report("", len(tickets))


class _Tally:
    def __init__(self, recorded: bool) -> None:
        self.recorded = recorded
        self.ticks = self.compared = self.same = 0
        self.energy_difference = 0.0

    def report(self, difference: str, requests: int) -> Replayed:
        return Replayed(self.ticks, requests, difference, self.energy_difference, self.compared, self.same)


def _play(loop: Loop, clock: ReplayClock, seen: _Seen, event: Event, tickets: dict[int, Ticket], tally: _Tally,
          recorded: bool) -> str:  # fmt: skip
    """One event; the difference, or ""."""
    try:
        clock.feed([float(v) for v in event["clock"]])
        if event["event"] == "submit":
            observation = {"request": event["id"]} if recorded else restored(event["observation"])
            arrived = float(event["arrived"])
            given = None if event["clock"] else arrived  # the clock was not read if the caller said when
            ticket = loop.submit(event["plugin"], observation, event["halt"], event["deadline_ms"], event["priority"],
                                 event["entity_id"], given)  # fmt: skip
            tickets[event["id"]] = ticket
            return "" if ticket.id == event["id"] else f"the request is number {ticket.id}, recorded was {event['id']}"
        if event["event"] == "cancel":
            return "" if tickets[event["id"]].cancel() else "the request is done already; recorded was a cancellation"
        if event["event"] == "tick":
            tally.ticks += 1
            loop.tick()
            return _compared(event, seen.facts, tally)
    except SageError as error:
        return str(error)
    return f"the event {event['event']!r} is not known"


def _compared(event: Event, facts: Event, tally: _Tally) -> str:
    for key in ("decision", "halted", "failed", "contributions"):
        if facts[key] != event[key]:
            return f"{key} is {_short(facts[key], event[key])}"
    if facts["energies"].keys() != event["energies"].keys():
        return f"energies of requests {sorted(facts['energies'])}, recorded were {sorted(event['energies'])}"
    for number, path in event["energies"].items():
        again = facts["energies"][number]
        if len(path) != len(again):
            return f"request {number} took {len(again)} steps, recorded were {len(path)}"
        for a, b in zip(path, again, strict=True):
            tally.energy_difference = max(tally.energy_difference, abs(a - b) / max(abs(a), 1e-6))
            if not math.isclose(a, b, rel_tol=RELATIVE, abs_tol=1e-6):
                return f"request {number}: normalised energy {b:.9g}, recorded was {a:.9g}"
    if not tally.recorded:
        for number, digest in event["answers"].items():
            tally.compared += 1
            tally.same += facts["answers"].get(number) == digest
    return ""


def _short(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        return ", ".join(f"{key} {found.get(key)!r}, recorded was {expected.get(key)!r}" for key in keys[:3])
    return f"{found!r}, recorded was {expected!r}"


def _require_same(header: Event, plugins: Mapping[str, Plugin[Any]]) -> None:
    for name, facts in header["plugins"].items():
        if name not in plugins:
            raise InputError(f"recording: plugin {name!r} is needed to replay it, or --recorded")
        if plugins[name].digest != facts["digest"]:
            raise IntegrityError(
                f"recording: made with plugin {name} of digest {facts['digest'][:12]}, here is {plugins[name].digest[:12]} "
                "(other code, options or weights); not replayed; --recorded judges the decisions alone"
            )


def _played(header: Event, events: Sequence[Event]) -> dict[str, Plugin[Any]]:
    """Plugins that give what was recorded."""
    plugins: dict[str, Played] = {}
    for name, facts in header["plugins"].items():
        spec = parse_yaml(facts["spec"], PluginSpec, f"recording: plugin {name}")
        plugins[name] = Played(spec, facts["signals"], facts["batch_sizes"])
        plugins[name].own_halt = bool(facts["own_halt"])
    owner: dict[str, Played] = {}
    for event in events:
        if event["event"] == "submit":
            owner[str(event["id"])] = plugins[event["plugin"]]
        elif event["event"] == "tick":
            for number, rows in event["signals"].items():
                lines = [[math.nan if v is None else float(v) for v in row] for row in rows]
                owner[number].lines.setdefault(int(number), []).extend(lines)
            for number, reason in event["halted"].items():
                owner[number].reasons[int(number)] = reason
            for number, value in event["contributions"].items():
                owner[number].answered.add(int(number))
                owner[number].contributions.append(float(value))
    return dict(plugins)
