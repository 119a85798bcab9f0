"""Random sequences of operations against simple models in Python: lists and dictionaries."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from sage_edge.mailbox import FullError, Item, Loan, Mailbox, PortSpec, StaleError
from sage_edge.mailbox.spec import Policy

EFFORT = settings(max_examples=40, stateful_step_count=50, deadline=None)


class _Memory(RuleBasedStateMachine):
    """Ports in a place of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = tempfile.mkdtemp(prefix="sage-edge-test-", dir="/dev/shm")
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("SAGE_EDGE_SHM", self.memory)
        self.mailbox = Mailbox("model")
        self.ports: list[Any] = []

    def teardown(self) -> None:
        for port in self.ports:
            port.close()
        self.patch.undo()
        shutil.rmtree(self.memory)


class FocusModel(_Memory):
    """Slots are free, loaned, waiting or held; what waits is a list of (value, trust, producer), oldest first."""

    loans = Bundle("loans")
    items = Bundle("items")

    @initialize(
        depth=st.integers(1, 5), policy=st.sampled_from(["block", "drop-oldest", "drop-lowest-trust", "refuse"]),
        cap=st.integers(0, 3),
    )  # fmt: skip
    def begin(self, depth: int, policy: Policy, cap: int) -> None:
        self.depth, self.policy, self.cap = depth, policy, min(cap, depth)
        spec = PortSpec("focus", depth, dtype="int64", shape=(2,), policy=policy, per_producer=self.cap)
        self.ports = [self.mailbox.focus("p", spec) for _ in range(3)]
        self.waiting: list[tuple[int, int, int]] = []  # value, trust in steps of 1/4, producer
        self.loaned = [0, 0, 0]
        self.held: dict[int, bytes] = {}
        self.next = 0
        self.counts = dict.fromkeys(("sent", "received", "dropped", "refused", "cancelled"), 0)

    def expect(self, who: int, trust: int) -> str | int:
        """What a loan must do: "ok", an index of the item to drop, or the reason of a refusal."""
        share = self.loaned[who] + sum(producer == who for _, _, producer in self.waiting)
        capped = bool(self.cap) and share >= self.cap
        full = sum(self.loaned) + len(self.waiting) + len(self.held) >= self.depth
        if not capped and not full:
            return "ok"
        reason = "cap" if capped else "full"
        candidates = [i for i, (_, _, producer) in enumerate(self.waiting) if not capped or producer == who]
        if self.policy not in ("drop-oldest", "drop-lowest-trust") or not candidates:
            return reason
        if self.policy == "drop-oldest":
            return candidates[0]
        victim = min(candidates, key=lambda i: (self.waiting[i][1], i))
        return victim if self.waiting[victim][1] <= trust else "trust"

    @rule(target=loans, who=st.integers(0, 2), trust=st.integers(0, 4))
    def loan(self, who: int, trust: int) -> Any:
        expected = self.expect(who, trust)
        if isinstance(expected, str) and expected != "ok":
            with pytest.raises(FullError) as caught:
                self.ports[who].loan(trust=trust / 4, timeout=0)
            assert caught.value.reason == expected
            self.counts["refused"] += 1
            return multiple()
        loan = self.ports[who].loan(trust=trust / 4, timeout=0)
        if isinstance(expected, int):
            del self.waiting[expected]
            self.counts["dropped"] += 1
        self.loaned[who] += 1
        self.next += 1
        loan.array[:] = self.next
        return (loan, who, trust, self.next)

    @rule(entry=consumes(loans))
    def send(self, entry: tuple[Loan, int, int, int]) -> None:
        loan, who, trust, value = entry
        loan.send(tag=value)
        self.loaned[who] -= 1
        self.waiting.append((value, trust, who))
        self.counts["sent"] += 1

    @rule(entry=consumes(loans))
    def cancel(self, entry: tuple[Loan, int, int, int]) -> None:
        entry[0].cancel()
        self.loaned[entry[1]] -= 1
        self.counts["cancelled"] += 1

    @rule(target=items, who=st.integers(0, 2))
    def receive(self, who: int) -> Any:
        item = self.ports[who].receive(0)
        if not self.waiting:
            assert item is None
            return multiple()
        value, trust, producer = self.waiting.pop(0)
        assert item is not None
        assert item.array.tolist() == [value, value]
        assert (item.tag, item.producer) == (value, producer)
        assert abs(item.trust - trust / 4) < 1e-4
        self.held[item.generation] = item.descriptor
        self.counts["received"] += 1
        return (item, value)

    @rule(entry=consumes(items))
    def release(self, entry: tuple[Item, int]) -> None:
        item, value = entry
        assert item.array.tolist() == [value, value]  # whatever happened meanwhile
        descriptor = self.held.pop(item.generation)
        assert item.release() is True
        with pytest.raises(StaleError):
            self.ports[0].claim(descriptor)

    @precondition(lambda self: self.ports)
    @invariant()
    def the_states_agree(self) -> None:
        stats = self.ports[0].stats()
        assert (stats.loaned, stats.ready, stats.held) == (sum(self.loaned), len(self.waiting), len(self.held))
        assert stats.free == self.depth - stats.loaned - stats.ready - stats.held
        assert {name: stats.counts[name] for name in self.counts} == self.counts


class BroadcastModel(_Memory):
    """Each producer has a list; each reader a place in each list, and may see no more than the newest ones."""

    @initialize(depth=st.integers(1, 9), producers=st.integers(1, 3))
    def begin(self, depth: int, producers: int) -> None:
        from sage_edge.mailbox.layout import ring_cells

        self.reach = ring_cells(depth) - 1
        assert self.reach >= depth
        spec = PortSpec("broadcast", depth, fields={"n": "i8", "again": "(3,)i8"}, producers=producers)
        self.ports = [self.mailbox.broadcast("r", spec) for _ in range(producers + 2)]
        self.writers = self.ports[:producers]
        self.readers = self.ports[-2:]
        self.sent: list[list[int]] = []
        self.rings: dict[int, int] = {}
        self.places: list[dict[int, int]] = [{}, {}]
        self.next = 0

    @rule(who=st.integers(0, 2), count=st.integers(1, 6))
    def send(self, who: int, count: int) -> None:
        who %= len(self.writers)
        if who not in self.rings:
            self.rings[who] = len(self.sent)
            self.sent.append([])
        ring = self.rings[who]
        for _ in range(count):
            self.next += 1
            record = np.array((self.next, (self.next,) * 3), self.ports[0].record_dtype)
            assert self.writers[who].send(record) == len(self.sent[ring])
            self.sent[ring].append(self.next)

    @rule(which=st.integers(0, 1))
    def receive(self, which: int) -> None:
        places = self.places[which]
        record = self.readers[which].receive(0)
        behind = {ring: len(sent) - places.get(ring, 0) for ring, sent in enumerate(self.sent)}
        if not any(behind.values()):
            assert record is None
            return
        assert record is not None
        ring = record.producer
        lost = max(0, behind[ring] - self.reach)
        place = places.get(ring, 0) + lost
        assert (record.sequence, record.lost) == (place, lost)
        assert record["n"] == self.sent[ring][place]
        assert (record["again"] == record["n"]).all()
        places[ring] = place + 1

    @rule(which=st.integers(0, 1))
    def latest(self, which: int) -> None:
        record = self.readers[which].latest()
        if not self.next:
            assert record is None
        else:
            assert record is not None
            assert record["n"] == self.next

    @rule(which=st.integers(0, 1))
    def everything_is_received_or_counted_as_lost(self, which: int) -> None:
        reader = self.readers[which]
        before = sum(self.places[which].values())
        got = 0
        lost = 0
        while (record := reader.receive(0)) is not None:
            got += 1
            lost += record.lost
            self.places[which][record.producer] = record.sequence + 1
        assert got + lost == sum(map(len, self.sent)) - before


TestFocusModel = FocusModel.TestCase
TestFocusModel.settings = EFFORT
TestBroadcastModel = BroadcastModel.TestCase
TestBroadcastModel.settings = EFFORT
