"""Telemetry as MCAP (mcap.dev), with the official writer: one channel for the steps and one for the answers of each plugin.

Messages are JSON, and each channel carries a JSON Schema that Foxglove takes. Its reader wants one plain type for every field
and all properties spelled out, so here a value that is not known is left out where the JSON lines say null, and the signals
of a plugin are listed by name. Needs the extra `mcap`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from sage_edge import __version__
from sage_edge.errors import MissingDependencyError
from sage_edge.irp.telemetry import Record, schema

MAPS = ("signals", "extra")  # the objects whose fields differ from plugin to plugin


class McapFile:
    """A sink that writes an MCAP file. Raises MissingDependencyError without the package mcap."""

    def __init__(self, path: Path) -> None:
        try:
            from mcap.writer import Writer
        except ModuleNotFoundError as error:
            raise MissingDependencyError(f"{path}: MCAP needs {error.name}; pip install 'sage-edge[mcap]'") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._writer = Writer(self._file)
        self._writer.start(profile="", library=f"sage-edge {__version__}")
        self._channels: dict[tuple[Any, ...], int] = {}
        self._sequence = 0

    def write(self, record: Record) -> None:
        maps = {name: tuple(sorted(record.get(name, {}))) for name in MAPS}
        key = record["plugin"], record["record"], *maps.values()
        if key not in self._channels:
            self._channels[key] = self._register(record, maps)
        nanoseconds = round(record["time"] * 1e9)
        self._sequence += 1
        self._writer.add_message(
            channel_id=self._channels[key], log_time=nanoseconds, publish_time=nanoseconds, sequence=self._sequence,
            data=json.dumps(known(record), allow_nan=False).encode(),
        )  # fmt: skip

    def close(self) -> None:
        if not self._file.closed:
            self._writer.finish()  # type: ignore[no-untyped-call]
            self._file.close()

    def _register(self, record: Record, maps: dict[str, tuple[str, ...]]) -> int:
        name = f"sage_edge.irp.{record['plugin']}.{record['record']}"
        number = self._writer.register_schema(
            name=name, encoding="jsonschema", data=json.dumps(plain_schema(maps)).encode()
        )
        topic = f"/irp/{record['plugin']}/{record['record']}"
        return int(self._writer.register_channel(topic=topic, message_encoding="json", schema_id=number))


def known(value: Any) -> Any:
    """A record without its nulls."""
    return {name: known(item) for name, item in value.items() if item is not None} if isinstance(value, dict) else value


def plain_schema(maps: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    """The published schema with one type for every field, what may be null no longer required, and `maps` spelled out."""
    rules = copy.deepcopy(schema())
    for name, fields in maps.items():
        rules["properties"][name] = {
            "type": "object", "properties": {field: {"type": "number"} for field in fields}, "additionalProperties": False
        }  # fmt: skip
    _flatten(rules)
    return rules


def _flatten(rules: dict[str, Any]) -> None:
    for name, field in rules.get("properties", {}).items():
        if isinstance(field.get("type"), list):
            (field["type"],) = [kind for kind in field["type"] if kind != "null"]
            if name in rules.get("required", []):
                rules["required"].remove(name)
        _flatten(field)
