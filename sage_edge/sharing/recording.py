"""A recorded run: everything that decided it, as JSON lines, so that the real loop can go through it again.

    {"event": "header", "format", "settings", "plugins": {name: {digest, spec, worth, costs, ..}}, "versions", ...}
    {"event": "submit", "id", "plugin", "observation", "halt", "deadline_ms", "priority", "entity_id", "arrived", "clock"}
    {"event": "tick", "decision": {..}, "energies": {id: [..]}, "signals": {id: [..]}, "halted", "failed", .., "clock": [..]}
    {"event": "cancel", "id"}
    {"event": "end", "ticks", "sha256"}

Arrays are {"dtype", "shape", "base64"}. "clock" holds every reading of the clock that the event made, in order. The last line
carries the SHA-256 of every byte before it: against damage and edits by hand; whoever can compute it anew is found out by the
replay instead, which reports the first difference.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from sage_edge import __version__
from sage_edge.config import dump_yaml
from sage_edge.device import machine, version
from sage_edge.errors import InputError, IntegrityError
from sage_edge.irp.plugin import Observation, Plugin, Result
from sage_edge.irp.worth import WorthTable, from_arrays, to_arrays
from sage_edge.sharing.clock import RecordingClock
from sage_edge.sharing.costs import Costs
from sage_edge.sharing.loop import Loop
from sage_edge.sharing.requests import Recorder, Rows
from sage_edge.sharing.scheduler import Decision, Outcome, SharingState, Task

FORMAT = "sage-edge-recording/1"
MAX_BYTES = 1 << 30  # a line at a time, but the whole file is held to be replayed
Event = dict[str, Any]


class FileRecorder(Recorder):
    """Writes a loop's run to a file. Give it to the loop together with its `clock`; then `begin` inside of `with loop`,
    and `close` at the end: a file without its last line is not replayed."""

    def __init__(self, path: Path, clock: RecordingClock) -> None:
        self.clock = clock
        self._ticks = 0
        self._digest = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")

    def begin(self, loop: Loop) -> None:
        """Write the header. Raises InputError for a budget in millijoules, whose sensor readings are not recorded."""
        if loop.settings.budget.unit != "ms":
            raise InputError("recording: a budget in millijoules cannot be replayed; record with unit ms")
        self._write({
            "event": "header", "format": FORMAT, "settings": asdict(loop.settings), "epoch": loop.clock.epoch,
            "plugins": {name: _account(loop.state, name, plugin) for name, plugin in loop.plugins.items()},
            "versions": {"sage-edge": __version__, "numpy": version("numpy"), "onnxruntime": version("onnxruntime")},
            "machine": machine().key,
        })  # fmt: skip

    def starting(self) -> None:
        self.clock.taken()  # what others read of this clock meanwhile is not the loop's

    def submitted(
        self, task: Task, observation: Observation, halt: str, entity_id: str, deadline_ms: float | None
    ) -> None:
        self._write({
            "event": "submit", "id": task.id, "plugin": task.plugin, "observation": plain(observation), "halt": halt,
            "deadline_ms": deadline_ms, "priority": task.priority, "entity_id": entity_id, "arrived": task.arrived,
            "clock": self.clock.taken(),
        })  # fmt: skip

    def ticked(self, decision: Decision, outcome: Outcome, results: Mapping[int, Result], rows: Rows) -> None:
        self._ticks += 1
        signals = {str(number): [[_finite(v) for v in row] for row in gained] for number, gained in rows.items()}
        facts = tick_facts(decision, outcome, results)
        self._write({"event": "tick", **facts, "signals": signals, "clock": self.clock.taken()})

    def cancelled(self, number: int) -> None:
        self._write({"event": "cancel", "id": number, "clock": self.clock.taken()})

    def close(self) -> None:
        if not self._file.closed:
            text = json.dumps({"event": "end", "ticks": self._ticks, "sha256": self._digest.hexdigest()})
            self._file.write(text + "\n")
            self._file.close()

    def _write(self, event: Event) -> None:
        line = json.dumps(event, allow_nan=False) + "\n"
        self._digest.update(line.encode())
        self._file.write(line)


def tick_facts(decision: Decision, outcome: Outcome, results: Mapping[int, Result]) -> Event:
    """What a replay compares: decision, energies, who halted or failed, contributions and digests of the answers."""
    return {
        "decision": plain(asdict(decision)),
        "energies": {str(number): list(path) for number, path in outcome.energies.items()},
        "halted": {str(number): reason for number, reason in outcome.halted.items()},
        "failed": sorted(outcome.failed),
        "contributions": {str(number): value for number, value in outcome.contributions.items()},
        "answers": {str(number): digest_of(result) for number, result in results.items()},
    }


def read_recording(path: Path) -> tuple[Event, list[Event]]:
    """Header and events. Raises InputError when there is no such file or it is none, IntegrityError when it was cut or
    altered, or is of another format."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a recording (`sage-edge run --pipeline FILE --record FILE`)")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES >> 20} MiB; not read")
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    try:
        events = [json.loads(line) for line in lines]
        if not events or not isinstance(events[0], dict) or events[0].get("event") != "header":
            raise InputError(f"{path}: not a recording of sage-edge (its first line is no header)")
        if events[0]["format"] != FORMAT:
            raise IntegrityError(f"{path}: format {events[0]['format']!r}; this version reads {FORMAT}")
        last = events[-1]
        if last.get("event") != "end":
            raise IntegrityError(f"{path}: has no last line; the run was cut off, and is not replayed")
        if last["sha256"] != hashlib.sha256(content[: -len(lines[-1])]).hexdigest():
            raise IntegrityError(f"{path}: changed since it was written (SHA-256 differs); not replayed")
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a recording of sage-edge: {type(error).__name__}: {error}") from error
    return events[0], events[1:-1]


def plain(value: Any) -> Any:
    """An observation, or anything made of mappings, lists, arrays, strings and numbers, as JSON."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.asarray(value, order="C").tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "base64": data}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise InputError(
        f"recording: a {type(value).__name__} in an observation cannot be recorded; use arrays, text, numbers"
    )


def restored(value: Any) -> Any:
    """What `plain` was given. Raises ValueError for an array that is none."""
    if isinstance(value, dict):
        if set(value) == {"dtype", "shape", "base64"}:
            kind = np.dtype(value["dtype"])
            if kind.kind not in "biufU":
                raise ValueError(f"dtype {value['dtype']!r} is not plain")
            return np.frombuffer(base64.b64decode(value["base64"]), kind).reshape(value["shape"]).copy()
        return {name: restored(item) for name, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value


def digest_of(value: Any) -> str:
    """Hex SHA-256 of a result."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def table_of(facts: Event) -> WorthTable:
    """The worth table of a plugin in a header."""
    return from_arrays({name: np.asarray(array, np.float64) for name, array in restored(facts["worth"]).items()})


def costs_of(facts: Event) -> Costs:
    return Costs(*({int(size): float(v) for size, v in facts["costs"][unit].items()} for unit in ("ms", "atp")))


def _account(state: SharingState, name: str, plugin: Plugin[Any]) -> Event:
    account = state.accounts[name]
    return {
        "digest": plugin.digest, "options": plain(plugin.options), "spec": dump_yaml(plugin.spec),
        "signals": list(plugin.signals),
        "own_halt": type(plugin).halt is not Plugin.halt, "batch_sizes": list(account.sizes),
        "worth": plain(to_arrays(account.worth)),
        "costs": {"ms": plain(account.costs.ms_by_size), "atp": plain(account.costs.atp_by_size)},
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
