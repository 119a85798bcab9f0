"""Attention joined to real ports: salience in, tiles out, never waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.mailbox import BroadcastPort, FocusPort, Mailbox, PortSpec, load_ports
from sage_edge.mailbox.attend import Attendant, Tag, salience_spec
from sage_edge.mailbox.attention import SALIENCE, FocusItem, Place, TrustScheduler

TILES = PortSpec(kind="focus", dtype="uint8", shape=(None, None), max_bytes=4096, depth=3, policy="refuse")
PIPELINE = Path(__file__).resolve().parents[2] / "examples" / "mailbox_pipeline" / "ports.yaml"


class Ports(NamedTuple):
    """Both ends of a broadcast of salience and of a focus port for tiles."""

    heard: BroadcastPort
    said: BroadcastPort
    sends: FocusPort
    takes: FocusPort


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ports]:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))
    mailbox = Mailbox("attend")
    with ExitStack() as stack:
        heard, said = (stack.enter_context(mailbox.broadcast("salience", salience_spec())) for _ in range(2))
        sends, takes = (stack.enter_context(mailbox.focus("tiles", TILES)) for _ in range(2))
        yield Ports(heard, said, sends, takes)


def records(*scores: float, sensor: int = 2) -> Any:
    out = np.zeros(len(scores), SALIENCE)
    out["sensor"], out["tile"], out["score"], out["cost"], out["trust"] = sensor, np.arange(len(scores)), scores, 1, 1
    out["frame"], out["captured_ns"] = 77, time.monotonic_ns()
    out["height"] = out["width"] = 8
    return out


def pixels(item: FocusItem) -> Any:
    step = 1 << item.level
    return np.full((8, 8), item.place.tile, np.uint8)[::step, ::step]


def drain(port: FocusPort) -> list[tuple[Tag, tuple[int, ...], int, float]]:
    got = []
    while (item := port.receive(0)) is not None:
        with item:
            got.append((Tag.unpack(item.tag), item.shape, int(item.array[0, 0]), item.trust))
    return got


def test_what_is_salient_arrives_as_tiles(ports: Ports) -> None:
    attendant = Attendant(TrustScheduler(top=3, budget=2.25, share=1), ports.heard, ports.sends, pixels)
    attendant.tick()
    assert drain(ports.takes) == []
    for record in records(0.1, 5.0, 2.0, 3.0):
        ports.said.send(record)
    attendant.tick()
    got = drain(ports.takes)
    assert [(tag.place, tag.level, shape, value) for tag, shape, value, _ in got] == [
        (Place(2, 1), 0, (8, 8), 1), (Place(2, 3), 0, (8, 8), 3), (Place(2, 2), 1, (4, 4), 2)]  # fmt: skip
    assert [tag.frame for tag, *_ in got] == [77] * 3
    assert [trust for *_, trust in got] == pytest.approx([0.5, 0.3, 0.2], abs=1e-4)
    assert (attendant.issued, attendant.refused) == (3, 0)


def test_a_full_port_demotes_and_never_waits(ports: Ports) -> None:
    attendant = Attendant(TrustScheduler(top=5, budget=5, share=1, backoff_ns=10**12), ports.heard, ports.sends, pixels)
    for record in records(5, 4, 3, 2, 1):
        ports.said.send(record)
    began = time.monotonic()
    first = attendant.tick()
    assert time.monotonic() - began < 5
    assert len(first.issue) == 5
    assert (attendant.issued, attendant.refused) == (3, 2)
    drain(ports.takes)
    second = attendant.tick()
    assert {(d.place.tile, d.before, d.after, d.reason) for d in second.demoted} == {
        (3, 0, 1, "refused"), (4, 0, 1, "refused")}  # fmt: skip


def test_pixels_that_are_gone_count_as_refused(ports: Ports) -> None:
    attendant = Attendant(TrustScheduler(top=1, budget=1), ports.heard, ports.sends, lambda item: None)
    ports.said.send(records(1.0)[0])
    attendant.tick()
    assert (attendant.issued, attendant.refused) == (0, 1)
    assert ports.sends.stats().free == TILES.depth, "nothing is loaned for it"


def test_nonsense_in_the_broadcast_does_no_harm(ports: Ports) -> None:
    attendant = Attendant(TrustScheduler(top=2, budget=2), ports.heard, ports.sends, pixels)
    rng = np.random.default_rng(0)
    for _ in range(200):
        ports.said.send(rng.bytes(SALIENCE.itemsize))
    attendant.tick()
    assert attendant.state.rejected + len(attendant.state.entries) <= 200
    assert attendant.state.rejected > 150


@given(frame=st.integers(0, 2**64 - 1), sensor=st.integers(0, 63), tile=st.integers(0, 4095), level=st.integers(0, 3))
def test_a_tag_says_what_was_packed(frame: int, sensor: int, tile: int, level: int) -> None:
    tag = Tag(frame, Place(sensor, tile), level).pack()
    assert 0 <= tag < 2**32
    assert Tag.unpack(tag) == Tag(frame % 4096, Place(sensor, tile), level)


def test_the_examples_table_carries_these_records() -> None:
    assert load_ports(PIPELINE).spec("salience").record_dtype == SALIENCE
    assert salience_spec().record_dtype == SALIENCE
