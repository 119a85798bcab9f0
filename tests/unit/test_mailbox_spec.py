"""ports.yaml: what it takes, and what it says about what it does not take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sage_edge.errors import InputError
from sage_edge.mailbox.spec import PortSpec, explain_difference, load_ports, parse_canonical

GOOD = """
ports:
  camera:
    kind: focus
    dtype: uint8
    shape: [480, 640, 3]
    depth: 4
    policy: drop-oldest
    per_producer: 3
    ttl_ms: 200
  points:
    kind: focus
    dtype: float32
    shape: [null, 3]
    max_bytes: 1200000
    depth: 8
  salience:
    kind: broadcast
    depth: 64
    fields: {tile: uint16, score: float32, snarc: "(5,)float32"}
"""


def test_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "ports.yaml").write_text(GOOD)
    table = load_ports(tmp_path / "ports.yaml")
    camera, points, salience = (table.spec(name) for name in ("camera", "points", "salience"))
    assert camera.slot_bytes == 480 * 640 * 3
    assert camera.fixed
    assert points.shape == (None, 3)
    assert not points.fixed
    assert salience.record_dtype == np.dtype([("tile", "<u2"), ("score", "<f4"), ("snarc", "<f4", (5,))])
    for spec in (camera, points, salience):
        again = parse_canonical(spec.canonical())
        assert again.canonical() == spec.canonical()
    with pytest.raises(InputError, match=r"'lidar' is not in the table; it has camera, points, salience"):
        table.spec("lidar")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("depth: 4", "depth: 0", r"line 4: 'ports.camera': depth: expected 1..1023, found 0"),
        ("dtype: uint8", "dtype: uint7", r"dtype: expected a NumPy dtype"),
        ("dtype: uint8", "dtype: object", r"dtype: expected a little-endian number"),
        ("dtype: uint8", "dtype: U4", r"dtype: expected a little-endian number"),
        ("policy: drop-oldest", "policy: drop", r"line 8: 'ports.camera.policy': expected one of 'block', 'drop-oldest'"),
        ("per_producer: 3", "per_producer: 5", r"per_producer: expected 0 \(no cap\) or 1..depth \(4\), found 5"),
        ("ttl_ms: 200", "ttl_ms: 0", r"ttl_ms: expected 0.001 to 4294967"),
        ("    max_bytes: 1200000\n", "", r"max_bytes: needed where dtype or shape is open"),
        ("[480, 640, 3]", "[480, 640, 3, 1, 1, 1, 1, 1, 1]", r"shape: expected at most 8 axes"),
        ("[480, 640, 3]", "[480, 0, 3]", r"shape: expected at most 8 axes of 1 or more"),
        ("(5,)float32", "(64,)float32", r"fields: a record has 1 to 256 bytes, this one 262"),
        ("    fields:", "    dtype: uint8\n    fields:", r"dtype: belongs to kind focus"),
        ("    fields:", "    policy: refuse\n    fields:", r"newest wins"),
        ("    fields:", "    producers: 65\n    fields:", r"producers: expected 1..64, found 65"),
        ("  camera:", "  Camera:", r"name 'Camera': expected 1-63 of a-z"),
        ("kind: broadcast", "kind: broadcast\n    colour: red", r"unknown key 'ports.salience.colour'"),
        ("640, 3]\n", "640, 3]\n    max_bytes: 9\n", r"max_bytes: 9 is less than the 921600 bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    (tmp_path / "ports.yaml").write_text(GOOD.replace(old, new))
    with pytest.raises(InputError, match=message) as caught:
        load_ports(tmp_path / "ports.yaml")
    assert f"{tmp_path}/ports.yaml, line" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind":"focus"}', '{"kind":"focus","depth":4,"owner":1}', "null"])
def test_a_spec_in_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_canonical(text)
    assert not isinstance(caught.value, TypeError)


def test_differences_are_named() -> None:
    a, b = PortSpec("focus", 4, dtype="uint8", shape=(2,)), PortSpec("focus", 5, dtype="int8", shape=(2,))
    text = explain_difference(a.canonical(), b.canonical())
    assert text == "depth is 4 in memory, 5 asked for, dtype is 'uint8' in memory, 'int8' asked for"
    assert explain_difference("{", b.canonical()) == "the spec in memory cannot be read"
