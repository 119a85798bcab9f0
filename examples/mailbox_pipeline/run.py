"""A robot's pipeline in five processes: camera -> attention -> perception -> controller, and this one, which starts the others,
kills each of them once (SIGKILL), starts it again, and says what came of it.

    python examples/mailbox_pipeline/run.py                       generated images, ten seconds
    python examples/mailbox_pipeline/run.py --images FOLDER       your own: binary PGM files, 320 x 240
    python examples/mailbox_pipeline/run.py --kill none --seconds 60

Exit code 1 when the pipeline did not come back after a kill, a frame was torn, or a slot was lost.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import scene

from sage_edge.cli.output import amount, print_json, print_table
from sage_edge.errors import SageError
from sage_edge.mailbox import Mailbox

HERE = Path(__file__).resolve().parent
STAGES = ("camera", "attention", "perception", "controller")
START_S = 20.0  # for all stages to start and the first command to come


@dataclass
class Stage:
    """A process that is started again when it is killed."""

    name: str
    arguments: list[str]
    log: IO[str]
    starts: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, str(HERE / f"{self.name}.py"), *self.arguments]
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log, text=True)
        self.starts += 1

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    @property
    def ended(self) -> bool:
        """Has it ended by itself? Then something is wrong with it."""
        return self.process is not None and self.process.poll() is not None


@dataclass
class Kill:
    """A stage was killed at a time (CLOCK_MONOTONIC, s); the first command from an image taken after that came `back_s` later."""

    stage: str
    at: float
    back_s: float | None = None


@dataclass
class Watch:
    """What the commands that arrive say: latency from capture (s), distance from the truth (pixels), and who came back."""

    latency: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def see(self, command: Any, fps: float, truth: bool) -> None:
        captured, now = int(command["captured_ns"]) / 1e9, time.monotonic()
        if command["pan"] == command["tilt"] == 0:
            return  # it lost sight and stopped
        self.latency.append(now - captured)
        if truth:
            row, column = scene.position(int(int(command["captured_ns"]) // (1e9 / fps)))
            seen = (command["tilt"] / 0.5 + 0.5) * scene.HEIGHT, (command["pan"] / 0.5 + 0.5) * scene.WIDTH
            self.error.append(float(np.hypot(seen[0] - row, seen[1] - column)))
        for kill in self.kills:
            if kill.back_s is None and captured > kill.at:
                kill.back_s = now - kill.at


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start, kill, restart, watch, stop; the report."""
    images = arguments.images or folder / "images"
    if arguments.images is None:
        scene.write(images)
    scene.load(images)  # a bad folder is refused here, not in a process that then keeps ending
    mailbox = Mailbox(f"pipeline-{os.getpid()}", HERE / "ports.yaml")
    watch = Watch()
    with (folder / "log").open("w+") as log:
        stages = {name: Stage(name, [mailbox.namespace], log) for name in STAGES}
        stages["camera"].arguments += [str(images), str(arguments.fps)]
        try:
            with mailbox.broadcast("commands") as commands:
                for stage in stages.values():
                    stage.start()
                _watch(arguments, stages, commands, watch)
        finally:
            for stage in stages.values():
                stage.kill()
        log.seek(0)
        text = log.read()
    return _report(mailbox, watch, stages, text, len(_victims(arguments)))


def _watch(arguments: argparse.Namespace, stages: dict[str, Stage], commands: Any, watch: Watch) -> None:
    due = _victims(arguments)
    began = time.monotonic()
    first = None
    gap = arguments.seconds / (len(due) + 1)
    while True:
        record = commands.receive(0.05)
        if record is not None:
            watch.see(record.array, arguments.fps, arguments.images is None)
            first = first or time.monotonic()
        now = time.monotonic()
        if any(stage.ended for stage in stages.values()):
            return
        if first is None:
            if now - began > START_S:
                return
            continue
        done = len(watch.kills)
        waiting = any(kill.back_s is None for kill in watch.kills)
        if done < len(due) and now - first > gap * (done + 1) and not waiting:
            stage = stages[due[done]]
            stage.kill()
            watch.kills.append(Kill(stage.name, time.monotonic()))
            stage.start()
        # On a slow machine the kills take longer than was planned; then so does the run, within reason.
        unfinished = waiting or done < len(due)
        if now - first > arguments.seconds + (START_S * len(STAGES) if unfinished else 0):
            return


def _victims(arguments: argparse.Namespace) -> list[str]:
    return [name for name in STAGES if arguments.kill in ("all", name)]


def _report(mailbox: Mailbox, watch: Watch, stages: dict[str, Stage], log: str, wanted: int) -> dict[str, Any]:
    ports: dict[str, Any] = {}
    for name in ("frames", "tiles", "salience", "objects", "commands"):
        # Opening looks for the dead; what they held is back afterwards.
        with mailbox.focus(name) if name in ("frames", "tiles") else mailbox.broadcast(name):
            pass
        stats = mailbox.stats(name)
        p50, p99 = (stats.latency.quantile(q) for q in (0.5, 0.99))
        ports[name] = {"counts": stats.counts, "leaked": stats.loaned + stats.held,
                       "p50_us": None if p50 is None else p50 / 1e3, "p99_us": None if p99 is None else p99 / 1e3}  # fmt: skip
    for name in mailbox.names():
        mailbox.remove(name)
    latency = np.percentile(watch.latency, [50, 99]) * 1e3 if watch.latency else [None, None]
    torn, leaked = log.count(": torn"), sum(port["leaked"] for port in ports.values())
    ended = [stage.name for stage in stages.values() if stage.process and stage.process.returncode != -9]
    return {
        "ok": bool(watch.latency) and not torn and not leaked and not ended
        and len(watch.kills) == wanted and all(kill.back_s is not None for kill in watch.kills),
        "commands": len(watch.latency), "latency_p50_ms": latency[0], "latency_p99_ms": latency[1],
        "error_p50_px": float(np.median(watch.error)) if watch.error else None,
        "kills": [{"stage": kill.stage, "back_s": kill.back_s} for kill in watch.kills],
        "starts": {stage.name: stage.starts for stage in stages.values()}, "torn": torn, "leaked": leaked,
        "ended_by_themselves": ended, "ports": ports, "log": log,
    }  # fmt: skip


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    rows = [(name, *(port["counts"][key] for key in ("sent", "received", "dropped", "stale", "refused", "lost", "reclaimed")),
             *(None if port[key] is None else f"{port[key]:.0f}" for key in ("p50_us", "p99_us")))
            for name, port in report["ports"].items()]  # fmt: skip
    columns = ("port", "sent", "received", "dropped", "stale", "refused", "lost", "reclaimed", "p50 µs", "p99 µs")
    print_table("ports", columns, rows)
    kills = [(kill["stage"], None if kill["back_s"] is None else f"{kill['back_s']:.2f}") for kill in report["kills"]]
    print_table("killed with SIGKILL and started again", ("stage", "first command from a new image, s later"), kills)
    if report["commands"]:
        error = (
            "" if report["error_p50_px"] is None else f", {report['error_p50_px']:.1f} pixels from the truth (median)"
        )
        print(f"{report['commands']} commands, image to command {report['latency_p50_ms']:.1f} ms p50, "
              f"{report['latency_p99_ms']:.1f} ms p99{error}")  # fmt: skip
    print(f"torn frames: {report['torn']}, slots lost: {report['leaked']}")
    if report["ended_by_themselves"]:
        print(f"ended by themselves: {', '.join(report['ended_by_themselves'])}")
    if not report["ok"]:
        print(f"NOT ok; the stages said:\n{report['log'] or '(nothing)'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=amount, default=10.0, help="from the first command on (default 10)")
    parser.add_argument("--fps", type=amount, default=30.0, help="images a second (default 30)")
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="binary PGM files, 320 x 240 (default: generated)"
    )
    parser.add_argument(
        "--kill", choices=("all", "none", *STAGES), default="all", help="whom to kill (default: all in turn)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    arguments = parser.parse_args()
    try:
        with TemporaryDirectory(prefix="mailbox-pipeline-") as folder:
            report = run(arguments, Path(folder))
    except SageError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print_json(report)
    else:
        show(report)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
