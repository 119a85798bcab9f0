"""Ports → plugins → ports, over real shared memory, with the real loop; recorded, and replayed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from sage_edge.cli.main import main
from sage_edge.errors import InputError
from sage_edge.irp.registry import open_plugin
from sage_edge.irp.skeleton import new_plugin
from sage_edge.irp.telemetry import schema
from sage_edge.pipeline import Limits, run_pipeline

pytest.importorskip("sage_edge.mailbox._native", reason="the mailbox's compiled core is not built (make native)")

from sage_edge.mailbox import Mailbox

PORTS = """
ports:
  noisy: {kind: focus, dtype: float32, shape: [null], max_bytes: 4096, depth: 8, policy: refuse, ttl_ms: null}
  smooth: {kind: focus, dtype: float32, shape: [null], max_bytes: 4096, depth: 16, policy: refuse}
  puzzles: {kind: focus, dtype: int32, shape: [81], depth: 8, policy: refuse}
  grids: {kind: focus, dtype: uint8, shape: [81], depth: 8, policy: refuse}
  asked: {kind: broadcast, depth: 16, fields: {a: float32, b: float32}}
  told: {kind: broadcast, depth: 16, fields: {steps: int32, energy: float64, sum: float32}}
"""

PIPELINE = """
format: sage-edge-pipeline/1
namespace: test
ports: ports.yaml
entity_id: robot
plugins:
  smoother: {plugin: smooth, options: {weight: 2.0}}
  solver: {plugin: reason, options: {threads: 1}}
  adder: {plugin: add}
routes:
  - {take: noisy, plugin: smoother, observation: signal, give: smooth, result: signal}
  - {take: puzzles, plugin: solver, observation: inputs, give: grids, result: grid, halt: learned}
  - take: asked
    plugin: adder
    fields: {first: a, second: b}
    give: told
    results: {steps: "@steps", energy: "@energy", sum: sum}
profile: balanced
budget: {period_ms: 100, total: 90}
"""

ADD_YAML = """
format: sage-edge-plugin/1
name: add
entry: plugin:Add
summary: Adds two numbers in one step
invariants: {state_space: a sum, noise_model: none, energy: 0 when it is there, coherence: none}
max_steps: 1
halt: full
"""

ADD = """
from sage_edge.errors import InputError
from sage_edge.irp.plugin import Plugin

class Add(Plugin):
    def init_state(self, observation):
        if not {"first", "second"} <= set(observation):
            raise InputError("add: first and second are needed")
        if observation["first"] < 0:
            raise InputError("add: first: expected 0 or more")
        return {"a": observation["first"], "b": observation["second"]}

    def step(self, state, index):
        return {**state, "sum": state["a"] + state["b"]}

    def energy(self, state):
        return 0.0

    def result(self, state):
        return {"sum": float(state["sum"])}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))
    new_plugin("smooth", tmp_path)
    (tmp_path / "add").mkdir()
    (tmp_path / "add" / "plugin.yaml").write_text(ADD_YAML)
    (tmp_path / "add" / "plugin.py").write_text(ADD)
    (tmp_path / "ports.yaml").write_text(PORTS)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    return tmp_path


def start(folder: Path, limits: Limits) -> tuple[threading.Thread, dict[str, Any], threading.Event]:
    report: dict[str, Any] = {}
    stop, ready = threading.Event(), threading.Event()

    def note(stage: str) -> None:
        if stage == "running":
            ready.set()

    def work() -> None:
        report.update(run_pipeline(folder / "pipeline.yaml", limits, stop, (folder,), note))

    thread = threading.Thread(target=work, daemon=True)  # a test that fails must not wait for it
    thread.start()
    assert ready.wait(60)
    return thread, report, stop


def ended(thread: threading.Thread) -> None:
    thread.join(60)
    assert not thread.is_alive()


def test_ports_are_joined_to_plugins_and_the_run_replays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, telemetry = folder / "run.jsonl", folder / "telemetry.jsonl"
    thread, report, stop = start(folder, Limits(record=record, telemetry=telemetry))
    mailbox = Mailbox("test", folder / "ports.yaml")
    signals = [np.random.default_rng(n).standard_normal(40 + n).astype(np.float32) for n in range(6)]
    examples = open_plugin("reason").examples("test", 40)
    easiest = int(np.argmin(examples.groups["holes"]))
    tokens, grid = examples.observations[easiest]["inputs"], "".join(str(t - 1) for t in examples.references[easiest])
    with (
        mailbox.focus("noisy") as noisy, mailbox.focus("smooth") as smooth, mailbox.focus("puzzles") as puzzles,
        mailbox.focus("grids") as grids, mailbox.broadcast("asked") as asked, mailbox.broadcast("told") as told,
    ):  # fmt: skip
        for number, array in enumerate(signals):
            with noisy.loan(array.shape, trust=0.5) as loan:
                loan.array[...] = array
                loan.send(tag=number)
        with puzzles.loan() as loan:
            loan.array[...] = tokens
            loan.send(tag=77)
        for first in (2.0, -1.0):  # the second one is refused
            asked.send(np.array((first, 3.0), asked.spec.record_dtype))
        answers = {}
        for _ in signals:
            item = smooth.receive(30)
            assert item is not None
            with item:
                answers[item.tag] = (np.array(item.array), item.trust)
        item = grids.receive(30)
        assert item is not None
        with item:
            assert (item.tag, bytes(item.array).decode()) == (77, grid)
        record_told = told.receive(30)
        assert record_told is not None
        assert (record_told["steps"], record_told["energy"], record_told["sum"]) == (1, 0.0, 5.0)
    stop.set()
    ended(thread)
    for number, array in enumerate(signals):
        result, trust = answers[number]
        assert result.shape == array.shape
        assert trust == pytest.approx(0.5, abs=1e-4)
        assert np.abs(np.diff(result)).mean() < 0.5 * np.abs(np.diff(array)).mean()
    first, second, third = report["routes"]
    assert (first["received"], first["answered"], first["sent"]) == (6, 6, 6)
    assert second["sent"] == 1
    assert (third["received"], third["sent"], third["refused"]) == (2, 1, 1)
    assert third["errors"] == {"refused: add: first: expected 0 or more": 1}
    assert report["ended"] == "stopped"
    lines = [json.loads(line) for line in telemetry.read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, schema())
    assert sum(line["record"] == "request" for line in lines) == 8
    assert {line["entity_id"] for line in lines} == {"robot"}
    assert main(["trace", "replay", str(record), "--plugins", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["same"]
    assert again["answers_same"] == again["answers_compared"] == 8
    assert main(["trace", "replay", str(record), "--recorded"]) == 0
    assert "the same" in capsys.readouterr().out
    source = folder / "smooth" / "plugin.py"
    source.write_text(source.read_text() + "\n# another version\n")
    assert main(["trace", "replay", str(record), "--plugins", str(folder)]) == 2
    assert "other code, options or weights" in capsys.readouterr().err
    assert main(["trace", "show", str(record), "--ticks", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {p["plugin"]: p["answered"] for p in shown["plugins"]} == {"smoother": 6, "solver": 1, "adder": 1}
    assert len(shown["ticks"]) >= 8


def test_it_stops_after_so_many_answers_or_so_long(folder: Path) -> None:
    thread, report, _ = start(folder, Limits(answers=1))
    mailbox = Mailbox("test", folder / "ports.yaml")
    with mailbox.broadcast("asked") as asked:
        asked.send(np.array((1.0, 1.0), asked.spec.record_dtype))
        ended(thread)
    assert (report["ended"], report["routes"][2]["answered"]) == ("answers", 1)
    thread, report, _ = start(folder, Limits(seconds=0.05))
    ended(thread)
    assert report["ended"] == "time"


def test_a_signal_ends_the_command_with_its_report(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "sage_edge.cli", "run", "--pipeline", str(folder / "pipeline.yaml"), "--plugins",
               str(folder), "--telemetry", str(folder / "t.mcap"), "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (folder / "shm" / "test" / "told").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["ended"] == "stopped"
    assert (folder / "t.mcap").read_bytes().startswith(b"\x89MCAP0\r\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("take: noisy", "take: nosy", "port 'nosy' is not in the table"),
        ("plugin: smoother, observation", "plugin: smother, observation", "plugin 'smother' is not one of"),
        ("observation: signal", "fields: {signal: x}", "belongs to broadcast ports"),
        ("observation: signal, ", "", "exactly one of `observation`"),
        ("result: signal", "results: {a: b}", "belongs to broadcast ports"),
        ("profile: balanced", "profile: reckless", "profile 'reckless': not known"),
        ("profile: balanced", "rule: fair", "rule: expected one of"),
        ("total: 90", "total: 0", "expected positive numbers"),
        ("weight: 2.0", "wait: 2.0", "do not fit Smooth"),
        ("plugin: add}", "plugin: subtract}", "plugin subtract: neither a folder"),
    ],
)
def test_a_wrong_pipeline_is_refused_before_anything_runs(old: str, new: str, message: str, folder: Path) -> None:
    text = (folder / "pipeline.yaml").read_text()
    assert old in text
    (folder / "pipeline.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        run_pipeline(folder / "pipeline.yaml", Limits(seconds=0.01), threading.Event(), (folder,))
    assert message in str(error.value)


def test_arguments_of_engines_and_pipelines_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["run", "sudoku9", "--pipeline", "x.yaml"],
        ["run", "sudoku9", "--inputs", "a", "--outputs", "b", "--record", "r"],
        ["run", "--pipeline", "x.yaml", "--all-steps"],
        ["run", "sudoku9"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert main(["run", "--pipeline", "nowhere.yaml"]) == 2
