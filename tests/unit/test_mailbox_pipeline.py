"""The pipeline example as a user starts it: all four processes are killed once, and it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "examples" / "mailbox_pipeline" / "run.py"


def test_every_process_is_killed_once_and_the_pipeline_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAGE_EDGE_SHM", str(tmp_path / "shm"))
    done = subprocess.run(
        [sys.executable, str(RUN), "--seconds", "4", "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert [kill["stage"] for kill in report["kills"]] == ["camera", "attention", "perception", "controller"]
    assert all(kill["back_s"] > 0 for kill in report["kills"])
    assert set(report["starts"].values()) == {2}
    assert (report["torn"], report["leaked"]) == (0, 0)
    assert report["commands"] >= 5, "one at first, and one after each kill"
    assert report["error_p50_px"] < 5, "the disc was followed through all of it"
    assert report["ports"]["frames"]["counts"]["received"] >= 5
    assert not any((tmp_path / "shm").glob("*/*")), "ports are removed at the end"


def test_a_folder_without_images_is_refused_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(RUN), "--images", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "holds no .pgm files" in done.stderr


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 320 240 255\n" + bytes(100))
    done = subprocess.run(
        [sys.executable, str(RUN), "--images", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "a.pgm" in done.stderr
    assert "pixels were expected" in done.stderr
