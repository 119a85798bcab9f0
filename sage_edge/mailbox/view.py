"""Looking on without taking part: statistics, owners, latency, and copies of what passes (read-only mapping)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.mailbox import _native, layout
from sage_edge.mailbox.errors import MismatchError
from sage_edge.mailbox.spec import PortSpec, parse_canonical

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Histogram:
    """Latencies send → receive in 112 buckets, four an octave. `a - b` is what came between two looks."""

    buckets: tuple[int, ...]

    @property
    def count(self) -> int:
        return sum(self.buckets)

    def quantile(self, q: float) -> float | None:
        """The latency, ns, below which a share `q` (0..1) lies: within a bucket (19 % wide) by interpolation. None: no data."""
        rank = q * self.count
        below = 0
        for index, number in enumerate(self.buckets):
            if number and below + number >= rank:
                low, high = layout.bucket_floor(index), layout.bucket_floor(index + 1)
                return low + (high - low) * max(0.0, rank - below) / number
            below += number
        return None

    def __sub__(self, other: Histogram) -> Histogram:
        return Histogram(tuple(a - b for a, b in zip(self.buckets, other.buckets, strict=True)))


@dataclass(frozen=True)
class Owner:
    """One open handle. `sends`, `receives`: has done so; `loaned`, `held`: its slots now; `counts`: since the entry exists."""

    index: int
    pid: int
    name: str
    alive: bool
    sends: bool
    receives: bool
    loaned: int
    held: int
    counts: dict[str, int]


@dataclass(frozen=True)
class PortStats:
    """A look at a port. Counts are totals since it was created; words are read one by one, so sums may be off by what moves."""

    name: str
    kind: str
    memory: str
    spec: PortSpec
    bytes: int
    created: float
    depth: int
    free: int
    loaned: int
    ready: int
    held: int
    producers: int
    counts: dict[str, int]
    latency: Histogram
    owners: tuple[Owner, ...]
    removed: bool


@dataclass(frozen=True)
class Tapped:
    """A private copy of what passed. `array`: the tensor, or the record as a 0-d structured array."""

    array: Array
    generation: int
    producer: int
    sent_ns: int
    captured_ns: int
    tag: int
    trust: float


class PortView:
    """A read-only mapping of a port. Raises MismatchError when the header's spec cannot be read."""

    def __init__(self, observer: _native.Observer, name: str) -> None:
        self.name = name
        self.observer = observer
        self.header = np.frombuffer(observer.header(), layout.HEADER)[0]
        text = bytes(self.header["spec"])[: int(self.header["spec_bytes"])]
        try:
            self.spec = parse_canonical(text.decode("utf-8"))
        except ValueError as error:
            raise MismatchError(f"port {name}: the header's spec cannot be read: {error}") from error

    def tables(self) -> tuple[Array, Array, Array]:
        """Participants [64], statistics [64], and slots [n] or rings [n], as structured arrays."""
        data = self.observer.tables()
        start = layout.CONTROL_OFFSET
        part = layout.PARTICIPANTS_OFFSET - start, layout.STATISTICS_OFFSET - start, layout.TABLE_OFFSET - start
        participants = np.frombuffer(data[part[0] : part[1]], layout.PARTICIPANT)
        statistics = np.frombuffer(data[part[1] : part[2]], layout.STATISTICS)
        table = np.frombuffer(data[part[2] :], layout.SLOT if self.spec.kind == "focus" else layout.RING)
        return participants, statistics, table

    def stats(self) -> PortStats:
        participants, statistics, table = self.tables()
        focus = self.spec.kind == "focus"
        words = [int(w) for w in table["word"]] if focus else []
        states = [layout.state(w) for w in words]
        totals = statistics["counters"].sum(axis=0)
        return PortStats(
            name=self.name,
            kind=self.spec.kind,
            memory=self.spec.memory,
            spec=self.spec,
            bytes=int(self.header["total_bytes"]),
            created=int(self.header["created_ns"]) / 1e9,
            depth=self.spec.depth,
            free=states.count(layout.FREE),
            loaned=states.count(layout.LOANED),
            ready=states.count(layout.READY),
            held=states.count(layout.HELD),
            producers=0 if focus else int(np.count_nonzero(table["owner"])),
            counts={name: int(totals[i]) for i, name in enumerate(layout.COUNTERS)},
            latency=Histogram(tuple(int(n) for n in statistics["latency"].sum(axis=0))),
            owners=tuple(
                self._owner(int(i), participants, statistics, words) for i in np.flatnonzero(participants["identity"])
            ),
            removed=self.observer.removed,
        )

    def tap(self) -> Tap:
        """A tap that begins with what is in the port now."""
        return Tap(self)

    def _owner(self, index: int, participants: Array, statistics: Array, words: list[int]) -> Owner:
        entry = participants[index]
        mine = [layout.state(w) for w in words if layout.owner(w) == index]
        identity, role = int(entry["identity"]), int(entry["role"])
        return Owner(
            index=index,
            pid=layout.pid(identity),
            name=bytes(entry["name"]).split(b"\0")[0].decode("utf-8", "replace"),
            alive=not _native.is_dead(identity),
            sends=bool(role & 1),
            receives=bool(role & 2),
            loaned=mine.count(layout.LOANED),
            held=mine.count(layout.HELD),
            counts={name: int(statistics["counters"][index][i]) for i, name in enumerate(layout.COUNTERS)},
        )


class Tap:
    """Copies of what passes a port, without taking anything away. `missed`: sent, but gone before it could be copied."""

    def __init__(self, view: PortView) -> None:
        self._view = view
        self._seen = 0
        self._sent: int | None = None
        self._cursors: dict[int, int] = {}
        self.missed = 0

    def read(self) -> list[Tapped]:
        """What is new since the last read, oldest first."""
        found = self._read_slots() if self._view.spec.kind == "focus" else self._read_rings()
        return sorted(found, key=lambda t: (t.sent_ns, t.generation))

    def _read_slots(self) -> list[Tapped]:
        _, statistics, slots = self._view.tables()
        sent = int(statistics["counters"][:, 0].sum())
        found = []
        newest = self._seen
        for index, word in enumerate(int(w) for w in slots["word"]):
            if layout.ticket(word) <= self._seen or layout.state(word) == layout.LOANED:
                continue
            copied = self._view.observer.copy_slot(index)
            if copied is None:
                continue
            found.append(_tapped(*copied, producer=layout.owner(word)))
            newest = max(newest, found[-1].generation)
        if self._sent is not None:
            self.missed += max(0, sent - self._sent - len(found))
        self._sent, self._seen = sent, newest
        return found

    def _read_rings(self) -> list[Tapped]:
        _, _, rings = self._view.tables()
        dtype = self._view.spec.record_dtype
        reach = int(self._view.header["slots"]) - 1
        found = []
        for ring, head in enumerate(int(h) for h in rings["head"]):
            first = max(self._cursors.get(ring, 0), head - reach, 0)
            if ring in self._cursors:
                self.missed += max(0, first - self._cursors[ring])
            for number in range(first, head):
                copied = self._view.observer.copy_record(ring, number)
                if copied is None:
                    self.missed += 1
                    continue
                sent_ns, data = copied
                array = np.frombuffer(data, dtype).reshape(())
                found.append(Tapped(array, number, ring, sent_ns, sent_ns, 0, 1.0))
            self._cursors[ring] = head
        return found


def _tapped(descriptor: bytes, sent_ns: int, payload: bytes, producer: int) -> Tapped:
    fields = layout.unpack_descriptor(descriptor)
    dtype = np.dtype(layout.DTYPE_NAMES[fields["dtype"]])
    if fields["strides"] is None:
        array = np.frombuffer(payload, dtype).reshape(fields["shape"])
    else:
        strides = tuple(step * dtype.itemsize for step in fields["strides"])
        array = np.ndarray(fields["shape"], dtype, payload, strides=strides).copy()
    return Tapped(
        array, fields["generation"], producer, sent_ns, fields["captured_ns"], fields["tag"], fields["trust"]
    )  # fmt: skip
