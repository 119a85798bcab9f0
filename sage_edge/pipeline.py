"""`pipeline.yaml`: ports of the mailbox, plugins between them, and the loop that shares the device.

    format: sage-edge-pipeline/1
    namespace: robot                  # of the mailbox
    ports: ports.yaml                 # its table of ports, from this file's folder
    plugins:
      solver: {plugin: reason}        # a name, or a folder from this file's folder; `options` go to the plugin
    routes:
      - take: puzzles                 # a port
        plugin: solver
        observation: inputs           # what the item's array is called in the observation
        give: grids                   # a port
        result: prediction            # which part of the result is sent
        deadline_ms: 500
    profile: balanced                 # docs/irp.md; `rule` and `budget` as in sharing.scheduler.Settings

A focus port gives one array a request and takes one an answer; tag, trust and time of capture go with it. Of a broadcast
port, `fields` names what each part of the observation is called in the record, and `results` what each field of the sent
record is called in the result; `@steps`, `@energy`, `@milliseconds` and `@settled` tell of the answer itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sage_edge.config import load_yaml
from sage_edge.errors import EngineError, InputError, RefusedError
from sage_edge.irp.plugin import Observation, Plugin
from sage_edge.irp.profiles import find_profile
from sage_edge.irp.registry import open_plugin
from sage_edge.irp.spec import PLUGIN_FILE
from sage_edge.irp.telemetry import JsonLines, Sink
from sage_edge.mailbox import BroadcastPort, ClosedError, FocusPort, FullError, Mailbox, load_ports
from sage_edge.sharing.budget import Budget
from sage_edge.sharing.clock import Clock, RecordingClock, SystemClock
from sage_edge.sharing.loop import Loop
from sage_edge.sharing.power import find_sensor
from sage_edge.sharing.recording import FileRecorder
from sage_edge.sharing.requests import Refinement, Ticket
from sage_edge.sharing.scheduler import Settings

IDLE_S = 0.02  # how long an idle pipeline waits for one port before it looks at the next


@dataclass(frozen=True)
class Use:
    """A plugin of a pipeline: its name or folder, and options over those of its plugin.yaml."""

    plugin: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Route:
    """From a port through a plugin to a port; see the module.

    text: the array holds UTF-8 bytes, and the observation is a string. halt: a policy, default the profile's. in_flight: most
    requests of this route at a time; what comes meanwhile waits in the port, by the port's own policy.
    """

    take: str
    plugin: str
    give: str
    observation: str = ""
    text: bool = False
    fields: dict[str, str] = field(default_factory=dict)
    result: str = ""
    results: dict[str, str] = field(default_factory=dict)
    halt: str | None = None
    deadline_ms: float | None = None
    priority: int = 0
    in_flight: int = 8

    def __post_init__(self) -> None:
        if bool(self.observation) == bool(self.fields):
            raise ValueError("exactly one of `observation` (focus port) and `fields` (broadcast port) must be given")
        if bool(self.result) == bool(self.results):
            raise ValueError("exactly one of `result` (focus port) and `results` (broadcast port) must be given")
        if self.in_flight < 1 or (self.deadline_ms is not None and self.deadline_ms <= 0):
            raise ValueError("in_flight and deadline_ms: expected positive numbers")


@dataclass(frozen=True)
class Pipeline:
    """The content of pipeline.yaml. entity_id: who asks, in telemetry. Raises ValueError for routes that lead nowhere."""

    format: Literal["sage-edge-pipeline/1"]
    namespace: str
    ports: str
    plugins: dict[str, Use]
    routes: tuple[Route, ...]
    profile: str = "balanced"
    rule: str = "worth"
    budget: Budget = field(default_factory=Budget)
    entity_id: str = "pipeline"

    def __post_init__(self) -> None:
        if not self.routes:
            raise ValueError("routes: expected at least one")
        for route in self.routes:
            if route.plugin not in self.plugins:
                raise ValueError(f"routes: plugin {route.plugin!r} is not one of {', '.join(self.plugins) or 'none'}")


@dataclass(frozen=True)
class Limits:
    """When to stop (each None: not for that reason), and what to write: a recording, telemetry (.jsonl or .mcap)."""

    answers: int | None = None
    seconds: float | None = None
    record: Path | None = None
    telemetry: Path | None = None


@dataclass
class _Running:
    """A route at work. waiting: tickets with what their answers must carry on."""

    route: Route
    source: FocusPort | BroadcastPort
    sink: FocusPort | BroadcastPort
    waiting: list[tuple[Ticket, dict[str, Any]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)


def run_pipeline(path: Path, limits: Limits, stop: threading.Event, folders: tuple[Path, ...] = (),
                 progress: Callable[[str], None] = lambda stage: None) -> dict[str, Any]:  # fmt: skip
    """Run a pipeline until `stop` is set, a limit is reached, or a port is removed; then finish what is in flight.

    Raises what opening plugins and ports raises, before anything runs.
    """
    pipeline = load_yaml(path, Pipeline)
    progress("open the plugins")
    plugins = {name: _open(use, path.parent, folders) for name, use in pipeline.plugins.items()}
    table = load_ports(path.parent / pipeline.ports)
    mailbox = Mailbox(pipeline.namespace, table)
    for route in pipeline.routes:
        for name, given, kind in ((route.take, route.fields, "fields"), (route.give, route.results, "results")):
            if bool(given) != (table.spec(name).kind == "broadcast"):
                raise InputError(
                    f"{path}: port {name!r} is a {table.spec(name).kind} port: `{kind}` belongs to broadcast ports"
                )
    sensor = find_sensor()
    settings = _settings(pipeline, path)
    clock: Clock = RecordingClock(SystemClock()) if limits.record else SystemClock()
    recorder = FileRecorder(limits.record, clock) if limits.record and isinstance(clock, RecordingClock) else None
    with ExitStack() as stack:
        sink = _sink(limits.telemetry)
        if sink:
            stack.callback(sink.close)
        if recorder:
            stack.callback(recorder.close)
        running = [_Running(r, _port(mailbox, r.take, stack), _port(mailbox, r.give, stack)) for r in pipeline.routes]
        progress("load the plugins")
        loop = stack.enter_context(Loop(plugins, settings, clock, sink, recorder, sensor))
        if recorder:
            recorder.begin(loop)
        progress("running")
        began = time.monotonic()
        ended = _serve(pipeline, loop, running, limits, stop)
        return _report(pipeline, loop, running, time.monotonic() - began, ended)


def _serve(pipeline: Pipeline, loop: Loop, running: list[_Running], limits: Limits, stop: threading.Event) -> str:
    """Why it ended."""
    until = None if limits.seconds is None else time.monotonic() + limits.seconds
    ended, turn = "", 0
    while not (ended and loop.idle):
        ended = ended or _reason(running, limits, stop, until)
        for number, one in enumerate(running):
            try:
                while not ended and len(one.waiting) < one.route.in_flight:
                    # Only an idle loop may wait, and for one port at a time.
                    wait = IDLE_S if loop.idle and number == turn % len(running) else 0.0
                    if not _take(pipeline, loop, one, wait):
                        break
            except ClosedError:
                ended = f"port {one.route.take} was closed"
        turn += 1
        loop.work()
        for one in running:
            _give(one)
    return ended


def _reason(running: list[_Running], limits: Limits, stop: threading.Event, until: float | None) -> str:
    if stop.is_set():
        return "stopped"
    if until is not None and time.monotonic() >= until:
        return "time"
    done = sum(one.counts["answered"] for one in running)
    return "answers" if limits.answers is not None and done >= limits.answers else ""


def _take(pipeline: Pipeline, loop: Loop, one: _Running, wait: float) -> bool:
    """Submit one item of the route's port; False when there is none."""
    route = one.route
    observation: Observation
    if isinstance(one.source, FocusPort):
        item = one.source.receive(wait)
        if item is None:
            return False
        with item:
            # A copy: the slot goes back to its producer now, the observation is needed until the first step at least.
            array = np.array(item.array)
            carried = {"tag": item.tag, "trust": item.trust, "captured_ns": item.captured_ns}
        observation = {route.observation: array.tobytes().decode("utf-8", "replace") if route.text else array}
    else:
        record = one.source.receive(wait)
        if record is None:
            return False
        one.counts["lost"] += record.lost
        carried = {"captured_ns": record.sent_ns}
        observation = {name: record.array[source][()] for name, source in route.fields.items()}
    one.counts["received"] += 1
    try:
        ticket = loop.submit(
            route.plugin, observation, route.halt, route.deadline_ms, route.priority, pipeline.entity_id
        )
    except InputError as error:
        one.counts["refused"] += 1
        one.counts[f"refused: {error}"] += 1
        return True
    except RefusedError:
        one.counts["refused"] += 1
        return True
    one.waiting.append((ticket, carried))
    return True


def _give(one: _Running) -> None:
    """Send the answers that are there."""
    done = [(ticket, carried) for ticket, carried in one.waiting if ticket.done]
    one.waiting = [pair for pair in one.waiting if not pair[0].done]
    for ticket, carried in done:
        try:
            answer = ticket.result()
        except RefusedError:
            one.counts["refused"] += 1
        except EngineError as error:
            one.counts["failed"] += 1
            one.counts[f"failed: {error}"] += 1
        else:
            one.counts["answered"] += 1
            one.counts["deadline"] += answer.reason == "deadline"
            one.milliseconds.append(answer.milliseconds)
            try:
                _send(one, answer, carried)
                one.counts["sent"] += 1
            except (FullError, InputError, ValueError) as error:
                one.counts["not sent"] += 1
                one.counts[f"not sent: {error}"] += 1
            except ClosedError:
                one.counts["not sent"] += 1


def _send(one: _Running, answer: Refinement, carried: dict[str, Any]) -> None:
    if isinstance(one.sink, FocusPort):
        value = _array(_value(answer, one.route.result))
        trust = float(carried.get("trust", 1.0))
        with one.sink.loan(value.shape, value.dtype, trust=trust, timeout=0) as loan:
            loan.array[...] = value
            loan.send(tag=carried.get("tag", 0), captured_ns=carried["captured_ns"])
        return
    record = np.zeros((), one.sink.spec.record_dtype)
    for name, source in one.route.results.items():
        if name not in (record.dtype.names or ()):
            raise InputError(f"results: port {one.route.give} has no field {name!r}")
        record[name] = _value(answer, source)
    one.sink.send(record)


def _value(answer: Refinement, name: str) -> Any:
    own = {"@steps": answer.steps, "@energy": float(answer.energies[-1]), "@milliseconds": answer.milliseconds,
           "@settled": answer.settled}  # fmt: skip
    if name not in own and name not in answer.result:
        raise InputError(f"result {name!r}: the plugin gives {', '.join((*answer.result, *own))}")
    return own[name] if name in own else answer.result[name]


def _array(value: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else np.asarray(value)


def _open(use: Use, base: Path, folders: tuple[Path, ...]) -> Plugin[Any]:
    folder = base / use.plugin
    return open_plugin(folder if (folder / PLUGIN_FILE).is_file() else use.plugin, folders, use.options)


def _port(mailbox: Mailbox, name: str, stack: ExitStack) -> FocusPort | BroadcastPort:
    assert mailbox.table is not None
    if mailbox.table.spec(name).kind == "focus":
        return stack.enter_context(mailbox.focus(name))
    return stack.enter_context(mailbox.broadcast(name))


def _settings(pipeline: Pipeline, path: Path) -> Settings:
    try:
        return Settings(profile=find_profile(pipeline.profile), budget=pipeline.budget, rule=pipeline.rule)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _sink(path: Path | None) -> Sink | None:
    if path is None:
        return None
    if path.suffix == ".mcap":
        from sage_edge.irp.mcap_sink import McapFile

        return McapFile(path)
    return JsonLines(path)


def _report(pipeline: Pipeline, loop: Loop, running: list[_Running], seconds: float, ended: str) -> dict[str, Any]:
    names = ("received", "lost", "answered", "deadline", "refused", "failed", "sent", "not sent")
    routes = []
    for one in running:
        times = np.array(one.milliseconds or [np.nan])
        routes.append({
            "take": one.route.take, "plugin": one.route.plugin, "give": one.route.give,
            **{name.replace(" ", "_"): one.counts[name] for name in names},
            "p50_ms": None if not one.milliseconds else float(np.percentile(times, 50)),
            "p99_ms": None if not one.milliseconds else float(np.percentile(times, 99)),
            "errors": {text: count for text, count in one.counts.items() if ":" in text},
        })  # fmt: skip
    trust = {name: account.trust for name, account in loop.state.accounts.items()}
    return {"namespace": pipeline.namespace, "seconds": seconds, "ended": ended, "routes": routes, "trust": trust,
            "deciding_ms": loop.deciding_s / max(loop.ticks, 1) * 1e3}  # fmt: skip
