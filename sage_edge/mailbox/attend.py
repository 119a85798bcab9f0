"""Peripheral attention joined to ports: salience is read from a broadcast, what deserves a closer look is sent to a focus port.

    attendant = Attendant(TrustScheduler(top=4, budget=6), mailbox.broadcast("salience"), mailbox.focus("tiles"), crop)
    while running:
        attendant.tick()

Nothing here waits: a full focus port demotes the place (sage_edge.mailbox.attention).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_edge.mailbox.attention import (
    MAX_TRUST,
    SALIENCE,
    AttentionState,
    Decision,
    FocusItem,
    Place,
    TrustScheduler,
)  # fmt: skip
from sage_edge.mailbox.errors import FullError
from sage_edge.mailbox.spec import PortSpec

if TYPE_CHECKING:
    from sage_edge.mailbox.ports import BroadcastPort, FocusPort

View = Callable[[FocusItem], npt.NDArray[Any] | None]
MOST_RECORDS = 4096  # read in one tick: a flood of records must not keep the tick from deciding

_LEVEL_BITS, _TILE_BITS, _SENSOR_BITS, _FRAME_BITS = 2, 12, 6, 12


class Tag(NamedTuple):
    """What the 32-bit tag of a sent item says: frame (lowest 12 bits of the sensor's count), place and level of detail."""

    frame: int
    place: Place
    level: int

    def pack(self) -> int:
        value = self.frame & _mask(_FRAME_BITS)
        for part, bits in ((self.place.sensor, _SENSOR_BITS), (self.place.tile, _TILE_BITS), (self.level, _LEVEL_BITS)):
            value = value << bits | part & _mask(bits)
        return value

    @classmethod
    def unpack(cls, tag: int) -> Tag:
        level, tag = tag & _mask(_LEVEL_BITS), tag >> _LEVEL_BITS
        tile, tag = tag & _mask(_TILE_BITS), tag >> _TILE_BITS
        return cls(tag >> _SENSOR_BITS & _mask(_FRAME_BITS), Place(tag & _mask(_SENSOR_BITS), tile), level)


def salience_spec(depth: int = 512, producers: int = 8) -> PortSpec:
    """The spec of a port that carries SALIENCE records. depth: newest records kept of each producer."""
    fields = {name: SALIENCE[name].str for name in SALIENCE.names or ()}
    return PortSpec(kind="broadcast", depth=depth, producers=producers, fields=fields)


class Attendant:
    """One thread's loop body. view: the pixels of a focus item at its level of detail, or None when they are gone; it is
    called once for each item that is issued, and its result is copied into the loaned slot.

    The tag of a sent item is a `Tag`; its trust is the priority over MAX_TRUST, so that a port with the policy
    drop-lowest-trust drops what matters least; it is stale when the record would be.
    """

    def __init__(self, scheduler: TrustScheduler, salience: BroadcastPort, focus: FocusPort, view: View) -> None:
        self.scheduler = scheduler
        self.salience = salience
        self.focus = focus
        self.view = view
        self.state = AttentionState()
        self.issued = 0
        self.refused = 0

    def tick(self, now: int | None = None) -> Decision:
        """Read what has been published, decide, issue. now: time.monotonic_ns(). Raises what ports and `view` raise."""
        records = self._read()
        now = time.monotonic_ns() if now is None else now
        self.state = self.scheduler.observe(self.state, records, now)
        self.state, decision = self.scheduler.decide(self.state, now)
        for item in decision.issue:
            if self._send(item):
                self.issued += 1
            else:
                self.refused += 1
                self.state = self.scheduler.refused(self.state, item, now)
        return decision

    def _read(self) -> npt.NDArray[np.void]:
        content = bytearray()
        while len(content) < MOST_RECORDS * SALIENCE.itemsize and (record := self.salience.receive(0)) is not None:
            content += record.data
        return np.frombuffer(bytes(content), SALIENCE)

    def _send(self, item: FocusItem) -> bool:
        pixels = self.view(item)
        if pixels is None:
            return False
        trust = min(1.0, item.priority / MAX_TRUST)
        try:
            loan = self.focus.loan(pixels.shape, pixels.dtype, trust=trust, timeout=0)
        except FullError:
            return False
        with loan:
            np.copyto(loan.array, pixels)
            loan.send(
                tag=Tag(item.frame, item.place, item.level).pack(), captured_ns=item.captured, ttl_ms=item.ttl_ns / 1e6
            )
        return True


def _mask(bits: int) -> int:
    return (1 << bits) - 1
