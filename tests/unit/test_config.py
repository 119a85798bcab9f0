# SPDX-License-Identifier: Apache-2.0
"""The YAML door: what fits comes in typed, everything else is one InputError with file, line and key."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.config import MAX_BYTES, dump_yaml, load_yaml, parse_yaml
from sage_edge.errors import InputError
from sage_edge.specs import HRMConfig


@dataclass(frozen=True)
class Inner:
    rate: float
    shape: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner
    name: str = "x"
    scale: float = 1.0
    flag: bool = False
    mode: Literal["fast", "safe"] = "safe"
    limit: int | None = None
    many: list[Inner] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    anything: Any = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count: expected 0 or more, found {self.count}")


@dataclass(frozen=True)
class Guest:
    FOREIGN: ClassVar[bool] = True
    wanted: int
    inner: Inner | None = None


BASE = "count: 1\ninner:\n  rate: 0.5\n"


def complaint(text: str, schema: type[Any] = Outer) -> str:
    with pytest.raises(InputError) as caught:
        parse_yaml(text, schema, "f.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_everything_that_is_understood_arrives_typed() -> None:
    text = BASE + (
        "name: 'on'\nscale: 2\nflag: true\nmode: fast\nlimit: 7\nmany: [{rate: 1}, {rate: 2, shape: [slots, 3]}]\n"
        "table: {a: 1}\nanything: {deep: [1, two, null]}\n"
    )
    assert parse_yaml(text, Outer, "f") == Outer(
        1, Inner(0.5), "on", 2.0, True, "fast", 7, [Inner(1.0), Inner(2.0, ("slots", 3))], {"a": 1},
        {"deep": [1, "two", None]},
    )  # fmt: skip


def test_absent_keys_take_their_defaults_and_null_is_none() -> None:
    value = parse_yaml(BASE + "limit: null\n", Outer, "f")
    assert value == Outer(1, Inner(0.5))
    assert parse_yaml(BASE + "limit: ~", Outer, "f").limit is None


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-5", "+1e-05"])
def test_a_float_may_be_written_in_any_common_way(text: str) -> None:
    assert parse_yaml(f"rate: {text}", Inner, "f").rate == 1e-5


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("naem: y\n", ["line 4", "unknown key 'naem'", "did you mean 'name'?"]),
        ("zzz: y\n", ["line 4", "unknown key 'zzz'", "known keys: count, inner, name"]),
        ("name: 3\n", ["line 4", "'name'", "a string", "3"]),
        ("name: on\n", ["'name'", "a string", "True"]),
        ("limit: 1.5\n", ["line 4", "'limit'", "a whole number", "1.5"]),
        ("limit: true\n", ["'limit'", "a whole number", "True"]),
        ("limit: 1e3\n", ["'limit'", "a whole number", "'1e3'"]),
        ("flag: 1\n", ["'flag'", "true or false", "1"]),
        ("flag: 'true'\n", ["'flag'", "true or false", "'true'"]),
        ("scale: .inf\n", ["'scale'", "a finite number", "inf"]),
        ("scale: 1e999\n", ["'scale'", "a finite number"]),
        ("scale: '1e-5'\n", ["'scale'", "a finite number", "'1e-5'"]),
        (f"scale: {'9' * 400}\n", ["'scale'", "a finite number"]),
        (f"limit: {'9' * 9000}\n", ["'limit'", "a whole number"]),
        ("scale: true\n", ["'scale'", "a finite number", "True"]),
        ("mode: slow\n", ["line 4", "'mode'", "one of 'fast', 'safe'", "'slow'"]),
        ("mode: [fast]\n", ["'mode'", "one of", "a list"]),
        ("many: 3\n", ["'many'", "a list of", "3"]),
        ("many:\n- rate: 1\n- rate: x\n", ["line 6", "'many[1].rate'", "a finite number", "'x'"]),
        ("many:\n- {rate: 1, shape: [1.5]}\n", ["line 5", "'many[0].shape[0]'", "a string or a whole number"]),
        ("table: {a: b}\n", ["'table.a'", "a whole number", "'b'"]),
        ("table: [1]\n", ["'table'", "a mapping", "a list"]),
        ("count: 2\n", ["line 4", "'count'", "twice"]),
        ("anything: {a: 1, a: 2}\n", ["'anything.a'", "twice"]),
        ("? [a, b]\n: 1\n", ["line 4", "a key must be a plain word", "a list"]),
    ],
)
def test_what_does_not_fit_is_named_with_line_and_key(extra: str, expected: list[str]) -> None:
    message = complaint(BASE + extra)
    assert message.startswith("f.yaml, line ")
    for part in expected:
        assert part in message


def test_nested_complaints_name_the_whole_path() -> None:
    assert complaint("count: 1\ninner:\n  rate: x\n").startswith(
        "f.yaml, line 3: 'inner.rate': expected a finite number"
    )
    assert "'inner.raet'; did you mean 'rate'?" in complaint("count: 1\ninner:\n  raet: 1\n")
    assert complaint("count: 1\ninner: {}\n") == "f.yaml, line 2: missing key 'inner.rate'; expected a finite number"
    assert complaint("inner: {rate: 1}\n") == "f.yaml, line 1: missing key 'count'; expected a whole number"
    assert "'inner': expected a mapping with the keys rate, shape, found 3" in complaint("count: 1\ninner: 3")


def test_what_the_dataclass_refuses_is_an_input_error() -> None:
    assert complaint("count: -1\ninner: {rate: 1}\n") == "f.yaml, line 1: count: expected 0 or more, found -1"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n"])
def test_an_empty_file_says_what_was_expected(text: str) -> None:
    assert complaint(text).startswith("f.yaml: empty; expected a mapping with the keys count, inner")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: 1\n\tname: x\n", "f.yaml, line 2: not valid YAML"),
        ("count: [1\n", "f.yaml, line 2: not valid YAML"),
        ("count: 1\n---\ncount: 2\n", "f.yaml, line 2: not valid YAML"),
        ("count: *nobody\n", "f.yaml, line 1: not valid YAML"),
        ("name: '\x00'\n", "f.yaml: not valid YAML: unacceptable character"),
        ("- 1\n", "f.yaml, line 1: expected a mapping"),
        ("just words\n", "f.yaml, line 1: expected a mapping"),
    ],
)
def test_broken_syntax_and_other_shapes(text: str, expected: str) -> None:
    assert complaint(text).startswith(expected)


@pytest.mark.parametrize("text", ["[" * 3000, "[" * 450 + "]" * 450, "[" * 64 + "]" * 64, "&a {b: *a}\n"])
@pytest.mark.parametrize("limit", [1000, 5000])
def test_endless_nesting_is_refused_however_deep_python_may_go(text: str, limit: int) -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        assert "nested too deeply" in complaint(f"{BASE}anything: {text}")
    finally:
        sys.setrecursionlimit(before)


def test_nesting_is_no_fault_by_itself() -> None:
    assert parse_yaml(f"{BASE}anything: {'[' * 63 + ']' * 63}", Outer, "f").anything


def test_aliases_are_read_but_may_not_explode() -> None:
    assert parse_yaml("count: 1\ninner: &i {rate: 1}\nmany: [*i, *i]\n", Outer, "f").many == [Inner(1.0)] * 2
    lines = ["x0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "values, aliases expanded" in complaint("\n".join(lines))


def test_a_foreign_file_may_hold_more_but_not_less() -> None:
    assert parse_yaml("wanted: 1\nother: !!python/object:os.system {a: 1}\n", Guest, "f") == Guest(1)
    assert "missing key 'wanted'" in complaint("other: 1", Guest)
    assert "line 2: 'wanted': expected a whole number" in complaint("other: 1\nwanted: x", Guest)
    # Foreignness is of one level: a part that is ours stays strict.
    assert "unknown key 'inner.other'" in complaint("wanted: 1\ninner: {rate: 1, other: 2}", Guest)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    absent, folder, latin, huge = (tmp_path / n for n in ("absent.yaml", "folder", "latin.yaml", "huge.yaml"))
    folder.mkdir()
    latin.write_bytes(b"name: \xff\xfe\n")
    huge.write_bytes(b"#" * (MAX_BYTES + 1))
    for path, expected in (
        (absent, "cannot be read: No such file"), (folder, "cannot be read: Is a directory"),
        (latin, "not a text file (UTF-8 YAML was expected)"), (huge, "larger than 4 MiB"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            load_yaml(path, Outer)
        assert str(caught.value).startswith(f"{path}: ")
        assert expected in str(caught.value)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfrate: 1\n")
    assert load_yaml(path, Inner) == Inner(1.0)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
inners = st.builds(Inner, st.floats(allow_nan=False, allow_infinity=False), st.lists(texts | st.integers()).map(tuple))


@given(
    st.builds(
        Outer, count=st.integers(0), inner=inners, name=texts, scale=st.floats(allow_nan=False, allow_infinity=False),
        flag=st.booleans(), mode=st.sampled_from(["fast", "safe"]), limit=st.none() | st.integers(),
        many=st.lists(inners, max_size=3), table=st.dictionaries(texts, st.integers(), max_size=3),
        anything=st.none() | st.booleans() | st.integers() | texts | st.lists(texts, max_size=2),
    )
)  # fmt: skip
def test_what_is_dumped_is_read_back(value: Outer) -> None:
    assert parse_yaml(dump_yaml(value), Outer, "f") == value


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"])
def test_line_breaks_of_all_kinds_are_read_back(line_break: str) -> None:
    for text in (line_break, f"a{line_break}b", f" {line_break} \U0001f600"):
        value = Outer(count=0, inner=Inner(1.0), name=text, table={text: 1})
        assert parse_yaml(dump_yaml(value), Outer, "f") == value


positive = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
counts = st.integers(1, 10**9)


@st.composite
def configs(draw: st.DrawFn) -> HRMConfig:
    heads, half = draw(st.integers(1, 64)), draw(st.integers(1, 128))
    chosen = {f.name: draw(counts) for f in dataclasses.fields(HRMConfig) if f.type == "int"}
    chosen |= {"num_heads": heads, "hidden_size": 2 * heads * half, "puzzle_emb_ndim": draw(st.integers(0, 5000))}
    return HRMConfig(
        **chosen, expansion=draw(positive), rms_norm_eps=draw(positive), rope_theta=draw(positive),
        pos_encodings=draw(st.sampled_from(["rope", "learned"])),
        family=draw(st.sampled_from(["hrm-act-v1", "hrm-bidirectional"])),
    )  # fmt: skip


@given(configs())
def test_every_model_configuration_survives_the_round_trip(config: HRMConfig) -> None:
    assert parse_yaml(dump_yaml(config), HRMConfig, "f") == config


@given(st.text(max_size=60) | st.text("{}[]:,-?&*!|>'\"%@ \n\tab1.~<=", max_size=60))
def test_no_text_brings_more_than_an_input_error(text: str) -> None:
    for schema in (Outer, Guest):
        with contextlib.suppress(InputError):
            parse_yaml(text, schema, "f")
