"""The table of ports: ports.yaml, and the spec that both sides of a port must agree on.

ports:
  camera:
    kind: focus
    dtype: uint8
    shape: [480, 640, 3]       # null for an axis of any length: then max_bytes says how much room a slot has
    depth: 4                   # slots: loaned, waiting and held together
    policy: drop-oldest        # block | drop-oldest | drop-lowest-trust | refuse
    per_producer: 3            # most slots loaned or waiting for one producer
    ttl_ms: 200                # older items are dropped, counted as stale
  salience:
    kind: broadcast
    depth: 64                  # newest records kept of each producer
    producers: 8               # most producers at a time
    fields: {tile: uint16, score: float32, snarc: "(5,)float32"}
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sage_edge.config import load_yaml
from sage_edge.errors import InputError

Kind = Literal["broadcast", "focus"]
Policy = Literal["block", "drop-oldest", "drop-lowest-trust", "refuse"]
Memory = Literal["shm", "shm+cuda", "vmm"]

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
MAX_RECORD = 256
MAX_SLOTS = 1024
MAX_RINGS = 64
MAX_SPEC = 3072
MAX_SLOT_BYTES = 1 << 40
MAX_NDIM = 8


@dataclass(frozen=True)
class PortSpec:
    """One port. Raises ValueError, naming the key, for values that describe none."""

    kind: Kind
    depth: int
    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None
    max_bytes: int | None = None
    policy: Policy = "block"
    per_producer: int = 0
    ttl_ms: float | None = None
    fields: dict[str, str] | None = None
    producers: int = 8
    memory: Memory = "shm"
    hugepages: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.depth <= MAX_SLOTS - 1:
            raise ValueError(f"depth: expected 1..{MAX_SLOTS - 1}, found {self.depth}")
        if self.kind == "focus":
            self._check_focus()
        else:
            self._check_broadcast()
        if len(self.canonical().encode()) > MAX_SPEC:
            raise ValueError(f"fields: the spec is longer than {MAX_SPEC} bytes; use shorter or fewer names")

    def _check_focus(self) -> None:
        if self.fields is not None:
            raise ValueError("fields: belongs to kind broadcast; a focus port has dtype and shape")
        if self.dtype is not None and np_dtype("dtype", self.dtype).name not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if self.shape is not None and (len(self.shape) > MAX_NDIM or any(n is not None and n < 1 for n in self.shape)):
            raise ValueError(
                f"shape: expected at most {MAX_NDIM} axes of 1 or more (null: any), found {list(self.shape)}"
            )
        if self.per_producer and not 1 <= self.per_producer <= self.depth:
            raise ValueError(f"per_producer: expected 0 (no cap) or 1..depth ({self.depth}), found {self.per_producer}")
        if self.ttl_ms is not None and not 0.001 <= self.ttl_ms <= 4_294_967:
            raise ValueError(f"ttl_ms: expected 0.001 to 4294967 (71 minutes), found {self.ttl_ms}")
        if self.max_bytes is None and not self.fixed:
            raise ValueError("max_bytes: needed where dtype or shape is open: the room of a slot, in bytes")
        if not 1 <= self.slot_bytes <= MAX_SLOT_BYTES:
            raise ValueError(f"max_bytes: expected 1 to {MAX_SLOT_BYTES}, found {self.slot_bytes}")
        if self.max_bytes is not None and self.fixed and self.max_bytes < self._exact():
            raise ValueError(f"max_bytes: {self.max_bytes} is less than the {self._exact()} bytes of dtype and shape")

    def _check_broadcast(self) -> None:
        for key in ("dtype", "shape", "max_bytes", "ttl_ms"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: belongs to kind focus; a broadcast port has fields")
        if self.policy != "block" or self.per_producer:
            raise ValueError("policy and per_producer belong to kind focus; in a broadcast port the newest wins")
        if not self.fields:
            raise ValueError("fields: a broadcast port needs names and dtypes of its record")
        if not 1 <= self.record_dtype.itemsize <= MAX_RECORD:
            raise ValueError(f"fields: a record has 1 to {MAX_RECORD} bytes, this one {self.record_dtype.itemsize}")
        if not 1 <= self.producers <= MAX_RINGS:
            raise ValueError(f"producers: expected 1..{MAX_RINGS}, found {self.producers}")

    @property
    def fixed(self) -> bool:
        """Focus: do dtype and shape fix the size, so that `loan()` needs neither?"""
        return self.dtype is not None and self.shape is not None and None not in self.shape

    @property
    def slot_bytes(self) -> int:
        """Focus: room that a slot must have, bytes (the file rounds it up to 4096)."""
        return self.max_bytes if self.max_bytes is not None else self._exact()

    def _exact(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(n or 0 for n in self.shape or ())

    @property
    def record_dtype(self) -> np.dtype[Any]:
        """Broadcast: the record as a packed NumPy structured dtype, at most 256 bytes."""
        names = [(name, np_dtype(f"fields.{name}", text)) for name, text in (self.fields or {}).items()]
        return np.dtype(names)

    def canonical(self) -> str:
        """What both sides must agree on, as one line of JSON: every key of this port's kind."""
        if self.kind == "focus":
            content: dict[str, Any] = {
                "kind": "focus", "depth": self.depth, "dtype": np.dtype(self.dtype).name if self.dtype else None,
                "shape": None if self.shape is None else list(self.shape), "max_bytes": self.slot_bytes,
                "policy": self.policy, "per_producer": self.per_producer, "ttl_ms": self.ttl_ms,
            }  # fmt: skip
        else:
            fields = {name: _dtype_text(self.record_dtype[name]) for name in self.record_dtype.names or ()}
            content = {"kind": "broadcast", "depth": self.depth, "producers": self.producers, "fields": fields}
        return json.dumps({**content, "memory": self.memory, "hugepages": self.hugepages}, separators=(",", ":"))


DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
          "float64", "complex64", "complex128")  # fmt: skip


@dataclass(frozen=True)
class PortTable:
    """The content of ports.yaml: every port of a namespace by name."""

    ports: dict[str, PortSpec]

    def __post_init__(self) -> None:
        for name in self.ports:
            check_name(name)

    def spec(self, name: str) -> PortSpec:
        """The spec of a port. Raises InputError when the table has none of this name."""
        if name not in self.ports:
            raise InputError(f"port {name!r} is not in the table; it has {', '.join(self.ports) or 'none'}")
        return self.ports[name]


def load_ports(path: Path | str) -> PortTable:
    """Read a ports.yaml. Raises InputError naming file, line and key."""
    return load_yaml(Path(path), PortTable)


def parse_canonical(text: str) -> PortSpec:
    """The spec that a port's header holds. Raises ValueError when it is not what `canonical` writes."""
    content = json.loads(text)
    if not isinstance(content, dict) or set(content) - set(PortSpec.__dataclass_fields__):
        raise ValueError("spec: not a port's spec")
    if content.get("shape") is not None:
        content["shape"] = tuple(content["shape"])
    try:
        spec = PortSpec(**content)
    except TypeError as error:
        raise ValueError(f"spec: {error}") from error
    return spec


def explain_difference(found: str, wanted: str) -> str:
    """In one line, which keys of two canonical specs differ."""
    try:
        a, b = json.loads(found), json.loads(wanted)
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    except (ValueError, AttributeError, TypeError):
        return "the spec in memory cannot be read"
    return ", ".join(f"{key} is {a.get(key)!r} in memory, {b.get(key)!r} asked for" for key in keys)


def check_name(name: str) -> str:
    """A port's or namespace's name. Raises ValueError when it is not one."""
    if not NAME.fullmatch(name):
        raise ValueError(f"name {name!r}: expected 1-63 of a-z, 0-9, '_', '.', '-', beginning with a letter or digit")
    return name


def np_dtype(key: str, text: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(text)
    except TypeError as error:
        raise ValueError(f"{key}: expected a NumPy dtype such as float32 or (3,)float32, found {text!r}") from error
    if dtype.base.kind not in "biufcSV" or dtype.hasobject or dtype.base.byteorder == ">":
        raise ValueError(f"{key}: expected a little-endian number or bytes (S8), found {text!r}")
    return dtype


def _dtype_text(dtype: np.dtype[Any]) -> str:
    return f"{dtype.shape}{dtype.base.str}" if dtype.shape else dtype.str
