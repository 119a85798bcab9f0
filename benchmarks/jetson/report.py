"""Everything on a Jetson, into one file to attach to an issue: `make jetson`.

    python -m benchmarks.jetson.report              on the Jetson: doctor, builds, gates, bench, power
    python -m benchmarks.jetson.report --dry-run    anywhere: the steps that need no Jetson, a CPU engine in TensorRT's place, few
                                                    examples, whatever sensor there is; says what was not run

A step that fails does not end the run: the report says what failed and with which message. Exit code 1 when any step failed,
2 when this is no Jetson.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sage_edge.dataset import load_dataset
from sage_edge.device import machine
from sage_edge.engines.build import open_engine
from sage_edge.errors import SageError
from sage_edge.evaluate import collect, score
from sage_edge.files import write_atomic
from sage_edge.models import shipped
from sage_edge.runtime import Session
from sage_edge.sharing.power import EnergySensor, find_sensor

SAMPLING_S = 0.02  # the INA3221 averages over about as long; its power is integrated between readings
PRECISIONS = ("fp16", "int8")
LINES = 20  # of a failed command's output


@dataclass(frozen=True)
class Step:
    """One command of ours. name: in the report; argv: after `sage-edge`."""

    name: str
    argv: tuple[str, ...]


def plan(model: str, data: Path, folder: Path, dry: bool, examples: int) -> list[Step]:
    """The steps in order. dry: what a machine without TensorRT can do in their place."""
    steps = [
        Step("doctor", ("doctor", "--json")),
        Step("support", ("check", model, "--target", "tensorrt:10.3", "--json")),
    ]
    device = f"orin-nano:{power_mode() or '25W'}"
    steps.append(Step("roofline", ("roofline", model, "--device", device, "--json")))
    for precision in ("fp32",) if dry else PRECISIONS:
        engine = str(folder / precision)
        target = (
            ("--target", "cpu") if dry else ("--target", "orin-nano", "--precision", precision, "--data", str(data))
        )
        steps += [
            Step(f"build {precision}", ("build", model, *target, "--output", engine, "--json")),
            Step(f"gate {precision}", ("check", engine, "--json")),
            Step(f"bench {precision}", ("bench", engine, "--examples", str(examples), "--no-calibrate", "--json",
                                        "--output", str(folder / f"bench-{precision}.json"))),
        ]  # fmt: skip
    return steps


def power_mode() -> str | None:
    """The name of the active power mode (`nvpmodel -q`); mode numbers differ between boards. None where there is none."""
    try:
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split(":", 1)[1].strip() for line in done.stdout.splitlines() if line.startswith("NV Power Mode")]
    return lines[0] if lines else None


def run_step(step: Step) -> dict[str, Any]:
    """Run a command and keep its JSON, or what it said when it failed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "sage_edge.cli", *step.argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result: dict[str, Any] = {"command": "sage-edge " + " ".join(step.argv), "exit_code": done.returncode,
                              "seconds": time.perf_counter() - began}  # fmt: skip
    try:
        result["report"] = json.loads(done.stdout)
    except ValueError:
        result["report"] = None
    if done.returncode or result["report"] is None:
        result["output"] = (done.stdout + done.stderr).splitlines()[-LINES:]
    return result


@contextmanager
def metered(sensor: EnergySensor | None) -> Iterator[dict[str, float | None]]:
    """Energy of the block in mJ, read often enough to integrate power; None without a sensor."""
    found: dict[str, float | None] = {"millijoules": None, "seconds": None}
    stop = threading.Event()

    def sample() -> None:
        while sensor is not None and not stop.wait(SAMPLING_S):
            sensor.read()

    before = sensor.read() if sensor else 0.0
    thread = threading.Thread(target=sample)
    began = time.perf_counter()
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found["seconds"] = time.perf_counter() - began
        found["millijoules"] = sensor.read() - before if sensor else None


def energy(engine: Path, data: Path, examples: int, sensor: EnergySensor | None) -> dict[str, Any]:
    """mJ per answer and per correct answer on held-out data, halting as learned, and what an idle second costs."""
    held_out = load_dataset(data).first(examples)
    with metered(sensor) as idle:
        time.sleep(1.0)
    with Session(open_engine(engine)) as session:
        session.infer({name: array[:8] for name, array in held_out.observation.items()}, "learned")  # warm
        with metered(sensor) as used:
            answers = session.infer(held_out.observation, "learned")
        right = score(collect(session, held_out, session.runner.model.max_steps), "learned").exact_accuracy
    spent, resting = used["millijoules"], idle["millijoules"]
    correct = right * len(answers)
    return {
        "sensor": sensor.name if sensor else None, "examples": len(answers), "exact_accuracy": right,
        "mean_steps": sum(a.steps for a in answers) / len(answers), "seconds": used["seconds"], "millijoules": spent,
        "idle_milliwatts": resting / idle["seconds"] if resting is not None and idle["seconds"] else None,
        "mj_per_answer": spent / len(answers) if spent is not None else None,
        "mj_per_correct_answer": spent / correct if spent is not None and correct else None,
    }  # fmt: skip


def told(found: dict[str, Any]) -> str:
    """The energy of a run in words."""
    if found["sensor"] is None:
        return "not measured: no sensor that this user may read (a Jetson's INA3221 rail VDD_IN, or Intel's RAPL)"
    cost = found["mj_per_correct_answer"]
    per = f"{cost:.1f} mJ per correct answer" if cost is not None else "no correct answer"
    return f"{per}, {found['idle_milliwatts']:.0f} mW idle ({found['sensor']}, the idle share included)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="every step, without TensorRT and a Jetson's sensors")
    parser.add_argument("--model", default="sudoku9")
    parser.add_argument("--data", type=Path, help="held-out data (default: the shipped model's test split)")
    parser.add_argument("--calibration", type=Path, help="data to lower with (default: its calibration split)")
    parser.add_argument("--examples", type=int, help="of the data (default 512; 32 in a dry run)")
    parser.add_argument("--folder", type=Path, default=Path("build/jetson"), help="where engines are put")
    parser.add_argument("--output", type=Path, default=Path("jetson-report.json"))
    chosen = parser.parse_args(arguments)
    if machine().jetson is None and not chosen.dry_run:
        print(
            "no Jetson, nothing was run (/proc/device-tree/model names none); `make jetson DRY_RUN=1` runs what needs none",
            file=sys.stderr,
        )
        return 2
    own = shipped(chosen.model)
    data = chosen.data or (own / "data" if own else None)
    if data is None:
        parser.error("--data DIR: the model has no data of its own")
    calibration = chosen.calibration or data / "calibration"
    examples = chosen.examples or (32 if chosen.dry_run else 512)
    report: dict[str, Any] = {
        "dry_run": chosen.dry_run, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(machine()), "power_mode": power_mode(), "steps": {}, "energy": {},
    }  # fmt: skip
    sensor = find_sensor()
    for step in plan(chosen.model, calibration, chosen.folder, chosen.dry_run, examples):
        print(f"{step.name}: sage-edge {' '.join(step.argv)}", flush=True)
        result = run_step(step)
        report["steps"][step.name] = result
        if "output" in result:
            print(f"  FAILED (exit code {result['exit_code']}): " + "\n  ".join(result["output"]), flush=True)
        precision = step.name.removeprefix("gate ")
        if "output" not in result:
            print(f"  ran, {result['seconds']:.1f} s", flush=True)
        if step.name.startswith("gate ") and "output" not in result:
            try:
                report["energy"][precision] = energy(chosen.folder / precision, data, examples, sensor)
                print(f"  power: {told(report['energy'][precision])}", flush=True)
            except SageError as error:
                report["steps"][f"power {precision}"] = {"output": [str(error)]}
                print(f"  power: FAILED: {error}", flush=True)
    report["not_run"] = {}
    for step in plan(chosen.model, calibration, chosen.folder, False, examples) if chosen.dry_run else []:
        if step.name not in report["steps"]:
            report["not_run"][step.name] = "sage-edge " + " ".join(step.argv)
            print(f"NOT RUN, needs a Jetson: {step.name}: {report['not_run'][step.name]}", flush=True)
    failed = [name for name, result in report["steps"].items() if "output" in result]
    report["failed"] = failed
    write_atomic(chosen.output, json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"report: {chosen.output}; " + (f"failed: {', '.join(failed)}" if failed else "every step that ran passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
