"""A recorded run goes through the real loop again and decides the same; one that was touched is refused or found out."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sage_edge.bench.solvers import Solve
from sage_edge.errors import InputError, IntegrityError
from sage_edge.irp.halting import History, Policy
from sage_edge.irp.plugin import Plugin
from sage_edge.irp.registry import open_plugin
from sage_edge.sharing.budget import Budget
from sage_edge.sharing.clock import RecordingClock, SystemClock
from sage_edge.sharing.loop import Loop
from sage_edge.sharing.recording import Event, FileRecorder, plain, read_recording, restored
from sage_edge.sharing.replay import replay
from sage_edge.sharing.scheduler import Settings
from tests.irp_plugins import Countdown


class OwnRule(Countdown):
    """Halts by a rule of its own, which a recording without the plugin cannot know."""

    def halt(self, history: History, policy: Policy) -> str:
        return "mine" if history.at("left")[0] <= 1 else ""

    def contribution(self, energies: Sequence[float]) -> float:
        return 0.1 * len(energies)


def plugins() -> dict[str, Plugin[Any]]:
    made: dict[str, Plugin[Any]] = {"count": Countdown(sizes=(1, 2)), "own": OwnRule("own"), "solve": Solve(size=24)}
    for name, plugin in made.items():
        plugin.digest = hashlib.sha256(name.encode()).hexdigest()
    return made


def record(path: Path, settings: Settings | None = None, made: dict[str, Plugin[Any]] | None = None) -> None:
    clock = RecordingClock(SystemClock())
    recorder = FileRecorder(path, clock)
    rng = np.random.default_rng(0)
    with Loop(made or plugins(), settings, clock, recorder=recorder) as loop:
        recorder.begin(loop)
        for number in range(30):
            need = int(rng.integers(1, 10))
            loop.submit("count", {"need": need}, deadline_ms=None if number % 3 else 4.0, priority=number % 2)
            if need not in (7,):
                loop.submit("own", {"need": need}, entity_id="arm")
            ticket = loop.submit("solve", {"b": rng.standard_normal(24), "matrix": number % 3}, halt="energy:0.2")
            if number % 7 == 0:
                ticket.cancel()
            loop.tick()
        loop.submit("count", {"need": 13})  # a step that raises
        loop.submit("count", {"need": 3}, arrived=clock.now() - 0.001)
        loop.run_until_idle()
    recorder.close()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "run.jsonl"
    record(path)
    return path


@pytest.mark.parametrize("rule", ["worth", "round-robin", "trust-proportional"])
def test_a_run_replays_to_the_same_decisions(rule: str, tmp_path: Path) -> None:
    record(tmp_path / "run.jsonl", Settings(rule=rule, budget=Budget(20.0, 15.0)))
    header, events = read_recording(tmp_path / "run.jsonl")
    again = replay(header, events, plugins())
    assert (again.difference, again.energy_difference) == ("", 0.0)
    assert again.ticks == sum(event["event"] == "tick" for event in events) > 50
    assert again.answers_same == again.answers_compared > 30


def test_without_the_plugins_scheduler_and_halting_are_judged(recording: Path) -> None:
    again = replay(*read_recording(recording), None)
    assert (again.difference, again.answers_compared) == ("", 0)


def test_the_shipped_plugin_replays(tmp_path: Path) -> None:
    clock = RecordingClock(SystemClock())
    recorder = FileRecorder(tmp_path / "run.jsonl", clock)
    plugin = open_plugin("reason")
    with Loop({"reason": plugin}, clock=clock, recorder=recorder) as loop:
        recorder.begin(loop)
        for observation in plugin.examples("test", 5).observations:
            loop.submit("reason", observation, deadline_ms=500)
        loop.run_until_idle()
    recorder.close()
    again = replay(*read_recording(tmp_path / "run.jsonl"), {"reason": open_plugin("reason")})
    assert again.difference == ""
    assert again.answers_same == again.answers_compared


def tampered(events: Sequence[Event], change: Callable[[Event], None], kind: str = "tick") -> list[Event]:
    """A copy with one event changed: a tick that took a step, or a request that will certainly have its steps."""
    copied = copy.deepcopy(list(events))
    matters: dict[str, Callable[[Event], bool]] = {
        "tick": lambda event: bool(event["energies"]),
        "submit": lambda event: event["plugin"] == "own" and event["observation"]["need"] > 3,
    }
    change(next(event for event in copied[12:] if event["event"] == kind and matters[kind](event)))
    return copied


def first_energy(event: Event) -> None:
    event["energies"][next(iter(event["energies"]))][0] += 0.01


def other_step(event: Event) -> None:
    event["decision"]["step"] = [999]


def other_reason(event: Event) -> None:
    event["halted"]["0"] = "because"


def other_need(event: Event) -> None:
    event["observation"] = {"need": 2}


def one_reading_less(event: Event) -> None:
    event["clock"] = event["clock"][:-1]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (first_energy, "tick", "normalised energy"),
        (other_step, "tick", "decision is step"),
        (other_reason, "tick", "halted is 0"),
        (other_need, "submit", "tick"),
        (one_reading_less, "tick", "read more often"),
        (lambda event: event.update(event="sleep"), "tick", "not known"),
    ],
)  # fmt: skip
def test_a_recording_with_a_new_digest_is_found_out_at_the_first_difference(
    change: Callable[[Event], None], kind: str, message: str, recording: Path
) -> None:
    header, events = read_recording(recording)
    again = replay(header, tampered(events, change, kind), plugins())
    assert message in again.difference, again
    assert again.difference.startswith("line ")


def test_other_settings_are_found_out(recording: Path) -> None:
    header, events = read_recording(recording)
    header = copy.deepcopy(header)
    header["settings"]["rule"] = "round-robin"
    assert replay(header, events, plugins()).difference


def test_a_foreign_recording_is_refused(recording: Path) -> None:
    header, events = read_recording(recording)
    others = plugins()
    others["own"].digest = "f" * 64
    with pytest.raises(IntegrityError, match="made with plugin own of digest .* here is ffffffffffff"):
        replay(header, events, others)
    with pytest.raises(InputError, match="plugin 'solve' is needed"):
        replay(header, events, {"count": others["count"], "own": plugins()["own"]})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"need": 3', '"need": 4', 1), "SHA-256 differs"),
        (lambda text: "".join(text.splitlines(keepends=True)[:9]), "cut off"),
        (lambda text: "".join(text.splitlines(keepends=True)[:9])[:-2], "not a recording"),
        (lambda text: text.replace("recording/1", "recording/9", 1), "this version reads"),
        (lambda text: "", "not a recording"),
        (lambda text: "[]\n", "not a recording"),
        (lambda text: '{"event": "header"}\n', "not a recording"),
    ],
)
def test_a_file_that_was_touched_is_refused(
    damage: Callable[[str], str], message: str, recording: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.jsonl").write_text(damage(recording.read_text()))
    with pytest.raises(InputError, match=message):
        read_recording(tmp_path / "run.jsonl")


def test_a_recording_whose_content_makes_no_sense_is_refused(recording: Path) -> None:
    header, events = read_recording(recording)
    damages: list[Event] = [{"settings": {}}, {"plugins": {"count": {}}}, {"epoch": "x"}]
    for damage in damages:
        with pytest.raises(InputError, match="makes no sense|missing"):
            replay({**header, **damage}, events, plugins())


def test_observations_come_back_as_they_were() -> None:
    given = {
        "image": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "text": "Grüße",
        "n": 3,
        "x": [1.5, None],
        "s": np.float32(2),
    }
    again = restored(json.loads(json.dumps(plain(given))))
    np.testing.assert_array_equal(again["image"], given["image"])
    assert again["image"].dtype == np.uint8
    assert (again["text"], again["n"], again["x"], again["s"]) == ("Grüße", 3, [1.5, None], 2.0)
    with pytest.raises(InputError, match="a set in an observation cannot be recorded"):
        plain({"x": {1, 2}})
    with pytest.raises(ValueError, match="not plain"):
        restored({"dtype": "|O", "shape": [1], "base64": ""})


def test_a_budget_in_millijoules_is_not_recorded(tmp_path: Path) -> None:
    from sage_edge.sharing.power import EnergySensor

    clock = RecordingClock(SystemClock())
    recorder = FileRecorder(tmp_path / "run.jsonl", clock)
    with (
        Loop(plugins(), Settings(budget=Budget(unit="mJ")), clock, recorder=recorder, sensor=EnergySensor()) as loop,
        pytest.raises(InputError, match="cannot be replayed"),
    ):
        recorder.begin(loop)
