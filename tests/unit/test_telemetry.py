"""Telemetry: every record by the published schema, judged by the jsonschema library; JSON lines and MCAP read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.irp.mcap_sink import McapFile, known, plain_schema
from sage_edge.irp.profiles import PROFILES
from sage_edge.irp.spec import EnergyRange
from sage_edge.irp.telemetry import SCHEMA_FILE, JsonLines, Moment, Record, Spent, problems, record, schema
from sage_edge.sharing.loop import Loop
from tests.irp_plugins import Countdown, Fuse

REPOSITORY = Path(__file__).resolve().parents[2]
finite = st.floats(-1e6, 1e6)


def moments() -> st.SearchStrategy[Moment]:
    spent = st.builds(
        Spent, st.floats(0, 1e6), st.floats(0, 1e6), st.none() | st.floats(0, 1e6), st.none() | st.floats(0, 1e5)
    )
    return st.builds(
        Moment, st.sampled_from(["step", "request"]), st.floats(0, 2e9), st.just("robot"), st.integers(0, 99),
        st.lists(finite, min_size=1, max_size=9).map(tuple), st.just(EnergyRange(-1e6, 1e6)), st.floats(0.1, 10), spent,
        st.sampled_from(list(PROFILES.values())), st.dictionaries(st.text(max_size=5), finite | st.just(float("nan"))),
        st.none() | st.just("learned"), st.none() | finite,
    )  # fmt: skip


@given(moments())
def test_every_record_fits_the_published_schema(moment: Moment) -> None:
    made = record("reason", moment)
    jsonschema.validate(made, schema())
    assert problems(made) == []
    json.dumps(made, allow_nan=False)


def test_the_schema_is_one_and_is_published_in_the_docs() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    text = (REPOSITORY / "docs" / "irp.md").read_text()
    assert SCHEMA_FILE.name in text
    for name in schema()["properties"]:
        assert f"`{name}`" in text, name


def test_what_the_issue_asks_for_is_there() -> None:
    moment = Moment("request", 1.0, "robot", 3, (0.9, 0.5, 0.5), EnergyRange(), 1.0, Spent(3.0, 3.0), PROFILES["learning"],
                    halt_reason="slope:0.01,1", contribution=0.5)  # fmt: skip
    made = record("vision", moment)
    assert made["step_idx"] == 2
    assert made["steps"] == 3
    assert (made["E"], made["dE"]) == (0.5, 0.0)
    assert made["trust"]["monotonicity_ratio"] == 1.0
    assert made["trust"]["dE_variance"] == pytest.approx(0.04)
    assert made["trust"]["convergence_rate"] == pytest.approx(1 - (0.5 / 0.9) ** 0.5)
    assert made["budget"]["energy_mJ"] is None, "no sensor is not zero"
    assert made["LRC_context"] == {"policy_id": "learning", "L": 0.5, "R": 0.5, "C": 0.7}


numbers = st.integers(-3, 3) | st.floats(allow_nan=False)
junk: st.SearchStrategy[Any] = st.none() | st.booleans() | numbers | st.text(max_size=3) | st.just({}) | st.just([])


@given(moments(), st.data())
def test_our_own_check_agrees_with_the_library_on_damaged_records(moment: Moment, data: st.DataObject) -> None:
    damaged: dict[str, Any] = copy.deepcopy(record("reason", moment))
    for _ in range(data.draw(st.integers(1, 2))):
        target = data.draw(st.sampled_from([damaged, *(damaged[k] for k in ("trust", "budget", "LRC_context") if
                                                       isinstance(damaged.get(k), dict))]))  # fmt: skip
        if not target:
            continue
        name = data.draw(st.sampled_from(sorted(target)))
        match data.draw(st.integers(0, 2)):
            case 0:
                del target[name]
            case 1:
                target[name] = data.draw(junk)
            case _:
                target["unknown"] = 1
    expected = jsonschema.Draft202012Validator(schema()).is_valid(damaged)
    assert (not problems(damaged)) == expected


def run_with(sink: Any) -> None:
    with Loop({"count": Countdown(), "fuse": Fuse()}, sink=sink) as loop:
        for need in (2, 4):
            loop.submit("count", {"need": need}, entity_id="camera")
        loop.submit("fuse", {"measured": np.ones(3)})
        loop.run_until_idle()
    sink.close()


def test_a_run_leaves_one_line_a_step_and_one_an_answer(tmp_path: Path) -> None:
    run_with(JsonLines(tmp_path / "t.jsonl"))
    lines: list[Record] = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, schema())
    steps = [line for line in lines if line["record"] == "step"]
    answers = {line["request"]: line for line in lines if line["record"] == "request"}
    assert len(steps) == 2 + 4 + 1
    assert {number: line["steps"] for number, line in answers.items()} == {0: 2, 1: 4, 2: 1}
    assert answers[0]["halt_reason"] == "energy:0.01"
    assert {line["entity_id"] for line in lines if line["plugin"] == "count"} == {"camera"}
    assert [line["step_idx"] for line in steps if line["request"] == 1] == [0, 1, 2, 3]
    assert all(line["budget"]["time_ms"] >= 0 and line["budget"]["memory_mb"] > 1 for line in lines)


def foxglove_takes(rules: dict[str, Any]) -> bool:
    """What Foxglove's reader of JSON schemas asks for: an object whose properties are spelled out, each of one plain type."""
    if rules.get("type") != "object" or not isinstance(rules.get("properties"), dict):
        return False
    plain = ("boolean", "string", "number", "integer")
    return all(
        foxglove_takes(field) if field.get("type") == "object" else field.get("type") in plain
        for field in rules["properties"].values()
    )


def test_mcap_reads_back_with_schemas_that_foxglove_takes(tmp_path: Path) -> None:
    from mcap.reader import make_reader

    run_with(McapFile(tmp_path / "t.mcap"))
    topics = []
    with (tmp_path / "t.mcap").open("rb") as file:
        reader = make_reader(file)
        for found, channel, message in reader.iter_messages():
            assert found is not None
            assert (found.encoding, channel.message_encoding) == ("jsonschema", "json")
            rules, content = json.loads(found.data), json.loads(message.data)
            assert foxglove_takes(rules)
            jsonschema.validate(content, rules)
            assert message.log_time == round(content["time"] * 1e9)
            topics.append(channel.topic)
        summary = reader.get_summary()
    assert sorted(set(topics)) == ["/irp/count/request", "/irp/count/step", "/irp/fuse/request", "/irp/fuse/step"]
    assert summary is not None
    assert summary.statistics is not None
    assert summary.statistics.message_count == len(topics) == 7 + 3


def test_the_published_schema_itself_is_not_one_that_foxglove_takes() -> None:
    """Why there is a second one: should this ever fail, the detour can go."""
    assert not foxglove_takes(schema())
    assert foxglove_takes(plain_schema({"signals": ("energy",), "extra": ()}))
    assert known({"a": None, "b": {"c": None, "d": 0}}) == {"b": {"d": 0}}


def test_mcap_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from sage_edge.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "mcap.writer", None)
    with pytest.raises(MissingDependencyError, match=r"sage-edge\[mcap\]"):
        McapFile(tmp_path / "t.mcap")
    assert not (tmp_path / "t.mcap").exists()
