"""`sage-edge plugin`, `trace` and `bench --suite irp` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sage_edge.cli.main import main
from tests.unit.test_cli import error_of


@pytest.fixture
def smooth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "SAGE_EDGE_CACHE", str(tmp_path / "cache")
    )  # other tests spoil the certificate of their `smooth`
    assert main(["plugin", "new", "smooth"]) == 0
    assert "sage-edge plugin check plugins_irp/smooth" in capsys.readouterr().out
    return Path("plugins_irp") / "smooth"


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    return {"code": code, "report": found}


@pytest.mark.parametrize("command", ["ls", "new", "check", "calibrate", "lower"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plugin", command, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_from_a_name_to_a_checked_and_calibrated_plugin(smooth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "ls"]) == 0
    out = capsys.readouterr().out
    assert "smooth" in out
    assert "reason" in out
    checked = report_of(capsys, "plugin", "check", "smooth")
    assert checked["code"] == 0
    assert main(["plugin", "check", str(smooth)]) == 0
    assert "telemetry valid" in capsys.readouterr().out
    assert main(["plugin", "calibrate", "smooth", "--examples", "320"]) == 0
    assert "certificate: " in capsys.readouterr().out
    first, loose = (
        report_of(capsys, "plugin", "calibrate", "smooth", "--examples", "320", *more)["report"]
        for more in ((), ("--max-loss", "0.5"))
    )
    assert (first["max_loss"], loose["max_loss"]) == (0.02, 0.5)
    assert loose["chosen"]["mean_steps"] < first["chosen"]["mean_steps"]
    assert first["chosen"]["bound"] <= 0.02 < loose["chosen"]["bound"] <= 0.5


def test_a_plugin_that_does_not_conform_gives_1(smooth: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = (smooth / "plugin.py").read_text()
    (smooth / "plugin.py").write_text(source.replace("/ state.start", "/ state.start * float('nan')", 1))
    assert main(["plugin", "check", str(smooth)]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plugin", "check", "nothing"], "neither a folder with a plugin.yaml nor a known plugin"),
        (["plugin", "new", "Bad Name"], "expected lower case letters"),
        (["plugin", "new", "smooth"], "exists already"),
        (["plugin", "ls", "--plugins", "nowhere"], "nowhere: no such folder"),
        (["plugin", "calibrate", "smooth", "--examples", "3"], "too little data"),
        (["plugin", "calibrate", "smooth", "--max-loss", "1"], "--max-loss 1: expected less than 1 ("),
        (["trace", "show", "nothing.jsonl"], "no such file"),
        (["trace", "replay", "plugins_irp/smooth/plugin.py"], "not a recording"),
        (["bench", "--suite", "irp", "sudoku9"], "--suite irp measures plugins"),
        (["bench", "--suite", "irp", "--peers"], "--peers do not belong to it"),
        (["bench", "--suite", "irp", "--profile", "odd"], "profile 'odd': not known"),
        (["bench", "--suite", "irp", "--plugin", "nothing"], "neither a folder"),
    ],
)
def test_errors_are_one_line_and_2(
    arguments: list[str], message: str, smooth: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in error_of(capsys).removeprefix("sage-edge: ")


def test_bench_measures_anyones_plugin(smooth: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    command = [
        "bench",
        "--suite",
        "irp",
        "--plugin",
        "smooth",
        "--examples",
        "60",
        "--output",
        str(output),
        "--threads",
        "1",
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "1 - error left / error at the start" in shown
    report = json.loads(output.read_text())
    assert "scheduler" not in report
    (plugin,) = report["plugins"]
    rows = {row["halting"]: row for row in plugin["halting"]}
    assert set(rows) >= {"full", "own rule", "fastest", "oracle"}
    assert rows["full"]["mean_steps"] == plugin["max_steps"] == 40
    assert rows["fastest"]["speed_up"] > 1
    assert rows["oracle"]["mean_quality"] >= rows["full"]["mean_quality"]
    assert rows["fastest"]["latency"]["samples"] == 24
    assert report["commit"]


def test_start_up_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    program = (
        "import sys\nfrom sage_edge.cli.main import main\nmain(['plugin', 'ls', '--json'])\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib', 'mcap', 'jsonschema'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
