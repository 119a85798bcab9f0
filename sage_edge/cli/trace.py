"""`sage-edge trace`: look at a recorded run, and go through it again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sage_edge.cli.output import Subparsers, command, print_json, print_table, stages
from sage_edge.errors import GateError, InputError


def add(subparsers: Subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "trace", help="look at a recorded run, and replay it",
        description="FILE is a recording (`sage-edge run --pipeline FILE --record FILE`), or for `show` also telemetry as JSON\n"
        "lines (`--telemetry`). See docs/irp.md. Both commands take --json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = command(
        commands, "show", _show, "what each request and each plugin got", "  sage-edge trace show run.jsonl --ticks"
    )
    show.add_argument("file", metavar="FILE", type=Path)
    show.add_argument("--ticks", action="store_true", help="list every decision of a recording, with its reason")
    replay = command(
        commands, "replay", _replay, "the same run through the real loop: the same decisions, or the first difference",
        "Every step is taken again by the plugins that made the recording (same code, options and weights, or it is\n"
        "refused), at the recorded readings of the clock. With --recorded the plugins are not needed: each request gets the\n"
        "energies it had, and scheduler and halting are judged alone. Exit code 1 when anything differs.\n\n"
        "  sage-edge trace replay run.jsonl",
    )  # fmt: skip
    replay.add_argument("file", metavar="FILE", type=Path)
    replay.add_argument("--recorded", action="store_true", help="without the plugins")
    replay.add_argument(
        "--plugins", metavar="DIR", type=Path, action="append", default=[], help="look for plugins there too"
    )


def _show(arguments: argparse.Namespace) -> int:
    requests, ticks = _summary(arguments.file)
    plugins = [_of_plugin(name, requests) for name in dict.fromkeys(r["plugin"] for r in requests)]
    report: dict[str, Any] = {"file": str(arguments.file), "requests": requests, "plugins": plugins}
    if arguments.ticks:
        report["ticks"] = ticks
    if arguments.json:
        print_json(report)
        return 0
    print_table(f"{arguments.file}: {len(requests)} requests",
                ("request", "plugin", "steps", "first energy", "last energy", "ended by", "ms", "ATP"),
                [(r["request"], r["plugin"], r["steps"], _number(r["first_energy"]), _number(r["last_energy"]), r["ended"],
                  _number(r["milliseconds"]), _number(r["atp"])) for r in requests])  # fmt: skip
    rows = [(p["plugin"], p["requests"], p["answered"], _number(p["mean_steps"]), p["deadline"]) for p in plugins]
    print_table("plugins", ("plugin", "requests", "answered", "mean steps", "at their deadline"), rows)
    if arguments.ticks:
        print_table("decisions", ("tick", "seconds", "plugin", "requests", "steps", "why"),
                    [(t["tick"], f"{t['seconds']:.4f}", t["plugin"], " ".join(map(str, t["step"])), t["grant"], t["why"])
                     for t in ticks])  # fmt: skip
    return 0


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _of_plugin(name: str, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    own = [r for r in requests if r["plugin"] == name]
    answered = [r for r in own if r["answered"]]
    steps = [r["steps"] for r in answered]
    return {"plugin": name, "requests": len(own), "answered": len(answered),
            "mean_steps": sum(steps) / len(steps) if steps else None,
            "deadline": sum(r["ended"] == "deadline" for r in own)}  # fmt: skip


def _summary(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Requests and decisions of a recording; requests alone of telemetry."""
    from sage_edge.irp.telemetry import FORMAT
    from sage_edge.sharing.recording import read_recording

    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a recording or telemetry as JSON lines")
    with path.open("rb") as file:
        first = file.readline()
    if FORMAT.encode() in first:
        return _of_telemetry(path), []
    _, events = read_recording(path)
    return _of_recording(events)


def _of_telemetry(path: Path) -> list[dict[str, Any]]:
    from sage_edge.irp.telemetry import problems

    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        if faults := problems(record):
            raise InputError(f"{path}, line {number}: not a record of telemetry: {faults[0]}")
        one = found.setdefault(record["request"], {"request": record["request"], "plugin": record["plugin"],
                                                   "first_energy": record["E"], "milliseconds": None})  # fmt: skip
        one |= {"steps": record["steps"], "last_energy": record["E"], "ended": record["halt_reason"] or "not answered",
                "answered": record["record"] == "request", "atp": record["budget"]["ATP_spent"]}  # fmt: skip
    return list(found.values())


def _of_recording(events: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found: dict[int, dict[str, Any]] = {}
    ticks: list[dict[str, Any]] = []
    start = next((event["arrived"] for event in events if event["event"] == "submit"), 0.0)
    for event in events:
        if event["event"] == "submit":
            found[event["id"]] = {"request": event["id"], "plugin": event["plugin"], "steps": 0, "first_energy": None,
                                  "last_energy": None, "ended": "not answered", "answered": False, "milliseconds": None,
                                  "atp": None, "arrived": event["arrived"]}  # fmt: skip
        elif event["event"] == "cancel":
            found[event["id"]]["ended"] = "cancelled"
        else:
            ticks.append(_tick(event, found, len(ticks), start))
    return [{k: v for k, v in one.items() if k != "arrived"} for one in found.values()], ticks


def _tick(event: dict[str, Any], found: dict[int, dict[str, Any]], number: int, start: float) -> dict[str, Any]:
    decision, clock = event["decision"], event["clock"]
    for request, rows in event["signals"].items():
        one = found[int(request)]
        if rows:
            one["steps"] += len(rows)
            one["last_energy"] = rows[-1][0]
            one["first_energy"] = rows[0][0] if one["first_energy"] is None else one["first_energy"]
    for request, reason in decision["answer"]:
        one = found[request]
        answered = str(request) in event["answers"]
        one |= {"ended": reason if answered else "failed", "answered": answered}
        one["milliseconds"] = (clock[-1] - one["arrived"]) * 1e3
    for request in decision["expire"]:
        found[request]["ended"] = "deadline, never began"
    for request in event["failed"]:
        found[request]["ended"] = "failed"
    return {"tick": number, "seconds": clock[0] - start, "plugin": decision["plugin"], "step": decision["step"],
            "grant": decision["grant"], "why": decision["why"]}  # fmt: skip


def _replay(arguments: argparse.Namespace) -> int:
    from sage_edge.sharing.recording import read_recording
    from sage_edge.sharing.replay import plugins_of, replay

    header, events = read_recording(arguments.file)
    plugins = None
    with stages("replay") as progress:
        if not arguments.recorded:
            progress("open the plugins")
            plugins = plugins_of(header, arguments.plugins)
        progress("replay")
        found = replay(header, events, plugins)
    if arguments.json:
        print_json({"file": str(arguments.file), "same": not found.difference, **asdict(found)})
    elif found.difference:
        print(f"{arguments.file}: differs from the recorded run: {found.difference}")
    else:
        answers = f", {found.answers_same} of {found.answers_compared} answers identical to the bit" if plugins else ""
        print(f"{arguments.file}: the same {found.ticks} decisions for {found.requests} requests; energies differ by at most "
              f"{found.energy_difference:.2g}{answers}")  # fmt: skip
    return GateError.exit_code if found.difference else 0
