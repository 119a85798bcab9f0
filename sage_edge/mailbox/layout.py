"""The bytes of a port in Python: `mailbox/LAYOUT.md`, layout version 1. A test compares every offset with the C++ structures.

The compiled core moves the data; this module is for those who look on (`ls`, `top`, `tap`) and for tests.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

VERSION = 1
MAGIC = int.from_bytes(b"SAGEMBOX", "little")
PARTICIPANTS = 64
CONTROL_OFFSET = 4096
PARTICIPANTS_OFFSET = 4352
STATISTICS_OFFSET = 8448
TABLE_OFFSET = 73984  # slots of a focus port, rings of a broadcast port
PAGE = 4096
HUGE_PAGE = 2 << 20

KINDS = {"broadcast": 1, "focus": 2}
MEMORIES = {"shm": 1, "shm+cuda": 2, "vmm": 3}
POLICIES = {"block": 1, "drop-oldest": 2, "drop-lowest-trust": 3, "refuse": 4}
FLAG_HUGE_PAGES = 1
COUNTERS = ("sent", "received", "dropped", "stale", "refused", "lost", "corrupt", "reclaimed", "cancelled", "wakes")
FREE, LOANED, READY, HELD = range(4)
STRIDED = 0x80

# code → NumPy name; 15 (bfloat16) has none
DTYPE_NAMES = ("", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
               "float64", "complex64", "complex128")  # fmt: skip


def _record(*fields: tuple[str, str, int], size: int) -> np.dtype[Any]:
    return np.dtype({
        "names": [name for name, _, _ in fields],
        "formats": [text for _, text, _ in fields],
        "offsets": [offset for _, _, offset in fields],
        "itemsize": size,
    })  # fmt: skip


HEADER = _record(
    ("magic", "<u8", 0), ("version", "<u4", 8), ("kind", "<u4", 12), ("memory", "<u4", 16), ("participants", "<u4", 20),
    ("total_bytes", "<u8", 24), ("payload_offset", "<u8", 32), ("payload_bytes", "<u8", 40), ("slots", "<u4", 48),
    ("rings", "<u4", 52), ("slot_bytes", "<u8", 56), ("record_bytes", "<u4", 64), ("policy", "<u4", 68),
    ("per_producer", "<u4", 72), ("ttl_us", "<u4", 76), ("pid_namespace", "<u8", 80), ("created_ns", "<u8", 88),
    ("spec_bytes", "<u4", 96), ("flags", "<u4", 100), ("reserved", "V920", 104), ("spec", "V3072", 1024), size=4096,
)  # fmt: skip
CONTROL = _record(
    ("tickets", "<u8", 0), ("items_event", "<u4", 64), ("space_event", "<u4", 128), ("removed", "<u4", 192), size=256
)
PARTICIPANT = _record(
    ("identity", "<u8", 0), ("role", "<u4", 8), ("fifo_armed", "<u4", 12), ("opened_ns", "<u8", 16),
    ("reserved", "<u8", 24), ("name", "V32", 32), size=64,
)  # fmt: skip
STATISTICS = _record(("counters", "(16,)<u8", 0), ("latency", "(112,)<u8", 128), size=1024)
SLOT = _record(("word", "<u8", 0), ("sent_ns", "<u8", 8), size=16)
DESCRIPTOR = _record(
    ("id", "<u8", 0), ("captured_ns", "<u8", 8), ("ttl_us", "<u4", 16), ("tag", "<u4", 20), ("trust", "<u2", 24),
    ("event", "<u2", 26), ("dtype", "u1", 28), ("ndim", "u1", 29), ("device_type", "u1", 30), ("device", "u1", 31),
    ("extent", "(8,)<u4", 32), size=64,
)  # fmt: skip
RING = _record(("owner", "<u8", 0), ("head", "<u8", 8), size=64)


def state(word: int) -> int:
    return word & 0xFF


def owner(word: int) -> int:
    return word >> 8 & 0xFF


def ticket(word: int) -> int:
    return word >> 16


def make_word(ticket: int, owner: int, state: int) -> int:
    return ticket << 16 | owner << 8 | state


def pid(identity: int) -> int:
    """The process of an identity (start time << 22 | pid); 0 for a free entry."""
    return identity & ((1 << 22) - 1)


def round_up(value: int, multiple: int) -> int:
    return -(value // -multiple) * multiple


def cell_bytes(record_bytes: int) -> int:
    """Bytes of a broadcast cell: sent_ns and the record in whole words, rounded up to a cache line."""
    return round_up(8 + round_up(record_bytes, 8), 64)


def ring_cells(depth: int) -> int:
    """Cells of a ring that always holds the newest `depth` records: the smallest power of two above depth."""
    return 1 << depth.bit_length()


def bucket_floor(bucket: int) -> int:
    """Smallest latency of a histogram bucket, ns (four buckets an octave from 64 ns; bucket 0 begins at 0)."""
    octave, part = divmod(bucket, 4)
    return (4 + part) << (octave + 4) if bucket else 0


def unpack_descriptor(data: bytes) -> dict[str, Any]:
    """A descriptor of 64 bytes as a dictionary with shape (elements), strides (elements, or None when C-contiguous)."""
    if len(data) != DESCRIPTOR.itemsize:
        raise ValueError(f"a descriptor of {DESCRIPTOR.itemsize} bytes was expected, found {len(data)}")
    identifier, captured_ns, ttl_us, tag, trust, event, dtype, ndim, device_type, device, *extent = struct.unpack(
        "<QQIIHHBBBB8I", data
    )
    axes, strided = ndim & 0x7F, bool(ndim & STRIDED)
    return {
        "slot": identifier & 0xFFFF, "generation": identifier >> 16, "captured_ns": captured_ns, "ttl_us": ttl_us, "tag": tag,
        "trust": trust / 65535, "event": event, "dtype": dtype, "device": (device_type, device),
        "shape": tuple(extent[:axes]), "strides": tuple(extent[4 : 4 + axes]) if strided else None,
    }  # fmt: skip
