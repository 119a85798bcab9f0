"""The layout is the same in C++, in Python and on the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.mailbox import _native, layout
from sage_edge.mailbox.view import Histogram

PAGE = Path(__file__).resolve().parents[2] / "mailbox" / "LAYOUT.md"
STRUCTURES: dict[str, np.dtype[Any]] = {
    "Header": layout.HEADER, "Control": layout.CONTROL, "Participant": layout.PARTICIPANT, "Statistics": layout.STATISTICS,
    "Slot": layout.SLOT, "Descriptor": layout.DESCRIPTOR, "Ring": layout.RING,
}  # fmt: skip


def test_every_offset_is_the_same_in_cpp_and_python() -> None:
    native = _native.layout()
    python = {}
    for name, dtype in STRUCTURES.items():
        python[name] = (0, dtype.itemsize)
        fields: Any = dtype.fields
        python.update({f"{name}.{field}": (int(at), int(kind.itemsize)) for field, (kind, at, *_) in fields.items()})
    python.update(
        kControlOffset=(layout.CONTROL_OFFSET, 0), kParticipantsOffset=(layout.PARTICIPANTS_OFFSET, 0),
        kStatisticsOffset=(layout.STATISTICS_OFFSET, 0), kTableOffset=(layout.TABLE_OFFSET, 0),
    )  # fmt: skip
    assert python == native
    assert native["Descriptor"] == (0, 64)
    assert layout.VERSION == _native.VERSION


@pytest.mark.parametrize(
    ("heading", "structure"),
    [("## 2. Header", "Header"), ("## 4. Participants", "Participant"), ("Descriptor, 64", "Descriptor")],
)
def test_the_page_shows_the_same_offsets(heading: str, structure: str) -> None:
    text = PAGE.read_text().split(heading, 1)[1]
    rows = re.findall(
        r"^\| (\d+) \| [^|]*\| (\w+) \|", text.split("\n\n", 2)[1 if structure != "Participant" else 2], re.M
    )
    fields: Any = STRUCTURES[structure].fields
    shown = {name: int(at) for at, name in rows if name in fields}
    assert len(shown) >= len(fields) - 1  # reserved bytes have no name there
    assert shown == {name: int(fields[name][1]) for name in shown}


def test_control_words_on_the_page() -> None:
    rows = re.findall(
        r"^\| (\d+) \| u\d+ atomic \| (\w+) \|", PAGE.read_text().split("## 3.")[1].split("## 4.")[0], re.M
    )
    fields: Any = layout.CONTROL.fields
    assert {name: int(at) for at, name in rows} == {n: layout.CONTROL_OFFSET + int(f[1]) for n, f in fields.items()}


@given(st.integers(0, 2**48 - 1), st.integers(0, 255), st.integers(0, 3))
def test_a_word_holds_ticket_owner_and_state(ticket: int, owner: int, state: int) -> None:
    word = layout.make_word(ticket, owner, state)
    assert word < 2**64
    assert (layout.ticket(word), layout.owner(word), layout.state(word)) == (ticket, owner, state)


@given(st.integers(0, 2**64 - 1))
def test_buckets_of_the_histogram(ns: int) -> None:
    bucket = _native.latency_bucket(ns)
    assert 0 <= bucket <= 111
    assert layout.bucket_floor(bucket) <= ns
    if bucket < 111:
        assert ns < layout.bucket_floor(bucket + 1)


def test_quantiles_lie_within_the_bucket() -> None:
    latencies = [500] * 90 + [9000] * 10
    buckets = [0] * 112
    for ns in latencies:
        buckets[_native.latency_bucket(ns)] += 1
    histogram = Histogram(tuple(buckets))
    median, tail = histogram.quantile(0.5), histogram.quantile(0.99)
    assert median is not None
    assert tail is not None
    assert 448 <= median < 512
    assert 8192 <= tail < 10240
    assert (histogram - histogram).quantile(0.5) is None
    assert Histogram((0,) * 112).quantile(0.5) is None


@given(st.integers(1, 1023))
def test_a_ring_holds_more_than_depth(depth: int) -> None:
    cells = layout.ring_cells(depth)
    assert cells > depth
    assert cells & (cells - 1) == 0
    assert cells <= 2 * depth or depth == 1
