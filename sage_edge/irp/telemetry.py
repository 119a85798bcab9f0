"""Telemetry: one record a step and one a finished request, as JSON lines, by a published JSON Schema.

The schema is telemetry.schema.json beside this file (JSON Schema 2020-12) and in docs/irp.md; `problems` says where a record
does not fit it. A value that is not known is null, never 0. See `mcap_sink` for the same records as MCAP.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from sage_edge.irp.profiles import Profile
from sage_edge.irp.spec import EnergyRange
from sage_edge.irp.trust import convergence

FORMAT = "sage-edge-telemetry/1"
SCHEMA_FILE = Path(__file__).with_name("telemetry.schema.json")
Record = dict[str, Any]


@dataclass(frozen=True)
class Spent:
    """What a step or a whole request cost. atp: in the scheduler's unit (calibrated device milliseconds, or millijoules).
    time_ms: its share of the measured time of the steps. energy_mJ: from a sensor, else None. memory_mb: resident memory of
    the process, MiB, or None where the system does not say."""

    atp: float
    time_ms: float
    energy_mJ: float | None = None
    memory_mb: float | None = None


@dataclass(frozen=True)
class Moment:
    """What there is to tell. time: seconds since 1970. energies: after each step so far, the last one is the news.
    contribution and halt_reason: None for a step. signals: by name, after the last step."""

    record: Literal["step", "request"]
    time: float
    entity_id: str
    request: int
    energies: tuple[float, ...]
    span: EnergyRange
    trust: float
    spent: Spent
    profile: Profile
    signals: dict[str, float] = field(default_factory=dict)
    halt_reason: str | None = None
    contribution: float | None = None


def record(plugin: str, moment: Moment) -> Record:
    """The record of one moment; what `Plugin.emit_telemetry` gives unless a plugin adds to it."""
    energies = moment.energies
    moved = convergence(energies, moment.span)
    return {
        "format": FORMAT,
        "record": moment.record,
        "time": moment.time,
        "entity_id": moment.entity_id,
        "plugin": plugin,
        "request": moment.request,
        "step_idx": len(energies) - 1,
        "E": energies[-1],
        "dE": energies[-1] - energies[-2] if len(energies) > 1 else None,
        "steps": len(energies),
        "halt_reason": moment.halt_reason,
        "trust": {
            "weight": moment.trust,
            "monotonicity_ratio": moved.monotonicity_ratio,
            "dE_variance": moved.dE_variance,
            "convergence_rate": moved.convergence_rate,
            "contribution": moment.contribution,
        },
        "budget": {
            "ATP_spent": moment.spent.atp,
            "time_ms": moment.spent.time_ms,
            "energy_mJ": moment.spent.energy_mJ,
            "memory_mb": moment.spent.memory_mb,
        },
        "LRC_context": {
            "policy_id": moment.profile.name,
            "L": moment.profile.L,
            "R": moment.profile.R,
            "C": moment.profile.C,
        },
        "signals": {name: value if math.isfinite(value) else None for name, value in moment.signals.items()},
    }


@cache
def schema() -> dict[str, Any]:
    """The published JSON Schema of a record."""
    loaded: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return loaded


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file of one record a line, each written out at once, so that a crash loses no finished line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8", buffering=1)

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,),
    "null": (type(None),),
}  # fmt: skip


def problems(value: Any, rules: dict[str, Any] | None = None, where: str = "record") -> list[str]:
    """Where `value` does not fit a schema, one sentence each; [] when it fits.

    Knows the keywords that the published schema uses (type, const, enum, minimum, exclusiveMinimum, maximum, minLength,
    required, properties, additionalProperties), so that `plugin check` needs no package for it; the tests hold it against
    the jsonschema library.
    """
    rules = schema() if rules is None else rules
    if "const" in rules and value != rules["const"]:
        return [f"{where}: expected {rules['const']!r}, found {value!r}"]
    if "enum" in rules and value not in rules["enum"]:
        return [f"{where}: expected one of {rules['enum']}, found {value!r}"]
    if "type" in rules and not _is(value, rules["type"]):
        return [f"{where}: expected {rules['type']}, found {value!r}"]
    found: list[str] = []
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            found.append(f"{where}: {value} is not a JSON number")
        if value < rules.get("minimum", -math.inf) or value <= rules.get("exclusiveMinimum", -math.inf):
            found.append(f"{where}: {value} is too small")
        if value > rules.get("maximum", math.inf):
            found.append(f"{where}: {value} is too large")
    if isinstance(value, str) and len(value) < rules.get("minLength", 0):
        found.append(f"{where}: is empty")
    if isinstance(value, dict):
        fields, others = rules.get("properties", {}), rules.get("additionalProperties", True)
        found += [f"{where}: {name!r} is missing" for name in rules.get("required", []) if name not in value]
        for name, item in value.items():
            if name in fields or isinstance(others, dict):
                found += problems(item, fields.get(name, others), f"{where}.{name}")
            elif others is False:
                found.append(f"{where}: {name!r} is not known")
    return found


def _is(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    if isinstance(value, bool):
        return "boolean" in names
    whole = isinstance(value, float) and value.is_integer() and "integer" in names
    return whole or any(isinstance(value, _TYPES[name]) for name in names)
