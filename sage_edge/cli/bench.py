"""`sage-edge bench`: one command, one table, one JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sage_edge.cli.bench_irp import show_irp
from sage_edge.cli.bench_mailbox import show_mailbox
from sage_edge.cli.evaluate import settled_line
from sage_edge.cli.output import Subparsers, amount, command, positive, print_json, print_table, progress_bar
from sage_edge.config import load_yaml
from sage_edge.device import usable_cores
from sage_edge.errors import InputError
from sage_edge.files import require_writable, write_atomic
from sage_edge.models import REFERENCE_MODEL

RESULTS = Path("benchmarks/results")


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "bench", run, "latency, accuracy and what early halting saves, on this machine",
        "Measure the shipped model (or ENGINE, or a case) here: latency of a step and of an answer, answers per second,\n"
        "exact accuracy and steps on held-out data for full steps, the learned rule, each family of policies as certified, and\n"
        "the oracle (fewest steps at which the answer is right; nobody can have it), cold start, memory, and\n"
        "the share of the machine's measured GEMM ceiling that a step reaches.\n\n"
        "  sage-edge bench                                             the shipped model\n"
        "  sage-edge bench --peers                                     beside PyTorch and OpenVINO (sage-edge[peers])\n"
        "  sage-edge bench --suite slots                               slot refill against static batches, and latency\n"
        "                                                              under random arrivals (Poisson, open loop)\n"
        "  sage-edge bench --suite mailbox                             the mailbox beside iceoryx2, pyzmq, shared memory with\n"
        "                                                              a queue, and Unix sockets (sage-edge[mailbox-peers])\n"
        "  sage-edge bench --suite irp                                 every IRP plugin: full, certified, oracle; and rules for\n"
        "                                                              sharing one device (see docs/irp.md)\n"
        "  sage-edge bench --case benchmarks/cases/hrm-27m.yaml --peers  the paper's size, random weights\n\n"
        "The shipped model's engine is calibrated first if it has no certificate yet (see `sage-edge calibrate`).\n"
        "The report is written to benchmarks/results/ below the current folder, or to --output.",
    )  # fmt: skip
    parser.add_argument("engine", metavar="ENGINE", nargs="?", help=f"default: {REFERENCE_MODEL}")
    parser.add_argument("--case", metavar="YAML", type=Path, help="a case file (see benchmarks/cases)")
    parser.add_argument("--suite", choices=("model", "slots", "mailbox", "irp"), default="model",
                        help="what to measure (default: model)")  # fmt: skip
    parser.add_argument("--halt", metavar="POLICY", default="learned", help="for --suite slots (default: learned)")
    parser.add_argument("--peers", action="store_true", help="time the installed peers in the same run")
    parser.add_argument("--int8", action="store_true",
                        help="the int8 engine beside the fp32 one (made first where it is missing: minutes, once)")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="dataset for the accuracy (default: the model's own test split)")
    parser.add_argument("--examples", metavar="N", type=positive, help="how many of it (default 512)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: all usable cores)")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="write threshold.png, energy.png and steps.png there")
    parser.add_argument("--no-calibrate", action="store_true", help="do not calibrate an engine without a certificate")
    parser.add_argument(
        "--seconds",
        type=amount,
        default=0.5,
        help="for --suite mailbox: time for each transport in each row (default 0.5; about 2 minutes in all)",
    )
    parser.add_argument("--plugin", metavar="DIR|NAME", action="append", default=[],
                        help="for --suite irp: only this one; may be repeated (default: all with a bench dataset)")  # fmt: skip
    parser.add_argument("--plugins", metavar="DIR", type=Path, action="append", default=[],
                        help="for --suite irp: look for plugins there too")  # fmt: skip
    parser.add_argument("--section", choices=("plugins", "scheduler"), action="append",
                        help="for --suite irp: only this section (default: both)")  # fmt: skip
    parser.add_argument("--profile", default="balanced", help="for --suite irp: the scheduler's LRC profile")
    parser.add_argument("--output", metavar="JSON", type=Path, help="where to write the report")


def run(arguments: argparse.Namespace) -> int:
    require_writable(arguments.output or RESULTS / "report.json")
    report = {"mailbox": _mailbox, "irp": _irp}.get(arguments.suite, _model)(arguments)
    architecture = report["machine"]["architecture"]
    commit = (report["commit"] or "release")[:10]
    suffix = "-slots" if arguments.suite == "slots" else ""
    path = arguments.output or RESULTS / f"{report['case']}{suffix}-{architecture}-{commit}.json"
    write_atomic(path, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if arguments.json:
        print_json(report)
    else:
        {"slots": show_slots, "mailbox": show_mailbox, "irp": show_irp, "model": show}[arguments.suite](report)
        for plot in report.get("plots", []):
            print(f"plot: {plot}")
        print(f"report: {path}")
    return 0


def _mailbox(arguments: argparse.Namespace) -> dict[str, Any]:
    from sage_edge.bench.mailbox import run_mailbox

    for name in ("engine", "case", "data", "examples", "threads", "plots", "peers"):
        if getattr(arguments, name):
            raise InputError(f"--suite mailbox measures no model; leave {name} out (its peers run whenever installed)")
    with progress_bar("bench") as progress:
        return run_mailbox(arguments.seconds, progress)


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    # Imported here: building parsers for other commands must not wait for onnx.
    from sage_edge.bench.suite import Case, run_case, run_slots_case

    if arguments.suite != "model" and arguments.peers:
        raise InputError(
            f"--peers: the suite `{arguments.suite}` compares ways to use an engine; peers belong to --suite model"
        )
    if arguments.case and (arguments.engine or arguments.data):
        raise InputError("--case names its own engine and data; give either a case or ENGINE and --data")
    case = load_yaml(arguments.case, Case) if arguments.case else _case(arguments)
    if arguments.examples:
        case = replace(case, examples=arguments.examples)
    if arguments.int8:
        if arguments.suite == "slots":
            raise InputError(
                "--int8: the suite `slots` compares ways to use one engine; give it the int8 engine itself"
            )
        case = replace(case, precisions=("fp32", "int8"))
    threads = arguments.threads or usable_cores()
    with progress_bar("bench") as progress:
        if arguments.suite == "slots":
            return run_slots_case(case, threads, arguments.halt, progress)
        return run_case(case, threads, arguments.peers, progress, arguments.plots, not arguments.no_calibrate)


def _irp(arguments: argparse.Namespace) -> dict[str, Any]:
    from sage_edge.bench.irp import Options
    from sage_edge.bench.suite import run_irp_suite
    from sage_edge.irp.profiles import find_profile

    if arguments.engine or arguments.case or arguments.data or arguments.plots or arguments.peers:
        raise InputError(
            "--suite irp measures plugins: ENGINE, --case, --data, --plots and --peers do not belong to it; give --plugin"
        )
    # The scheduler's load is made of plugin reason and two solvers; who asks for another plugin alone did not mean it.
    default = ("plugins",) if arguments.plugin and "reason" not in arguments.plugin else ("plugins", "scheduler")
    sections = tuple(dict.fromkeys(arguments.section or default))
    options = Options(tuple(arguments.plugin), tuple(arguments.plugins), arguments.examples, sections=sections,
                      profile=find_profile(arguments.profile).name)  # fmt: skip
    with progress_bar("bench") as progress:
        return run_irp_suite(options, arguments.threads or usable_cores(), progress)


def _case(arguments: argparse.Namespace) -> Any:
    from sage_edge.bench.suite import Case

    engine = arguments.engine or REFERENCE_MODEL
    return Case(name=Path(engine).name or "engine", engine=engine, data=arguments.data or "")


def show(report: dict[str, Any]) -> None:
    """The report as tables: what halting saved and cost comes last, where the eye rests."""
    machine = report["machine"]
    print(f"{machine['cpu'] or machine['architecture']}, {report['threads']} threads, onnxruntime "
          f"{report['versions']['onnxruntime']}, GEMM ceiling {report['gemm_ceiling_gflops']:.0f} GFLOP/s, "
          f"commit {(report['commit'] or 'none')[:10]}")  # fmt: skip
    rows: list[tuple[object, ...]] = []
    for entry in report["steps"]:
        for name, latency in entry["latency"].items():
            fraction = entry["fraction_of_ceiling"] if name == "sage-edge" else None
            rows.append((entry["batch"], name, f"{latency['p50_ms']:.2f}", f"{latency['p95_ms']:.2f}",
                         f"{latency['p99_ms']:.2f}", f"{entry['times_ours'][name]:.2f}×",
                         f"{entry['times_eager'][name]:.3f}×" if entry["times_eager"] else None,
                         f"{fraction:.0%}" if fraction else None))  # fmt: skip
    columns = ("batch", "engine", "p50", "p95", "p99", "time / ours", "time / eager", "of GEMM ceiling")
    print_table("one refinement step, ms", columns, rows)
    rows = [(a["batch"], a["engine"], a["policy"], f"{a['mean_steps']:.2f}", f"{a['latency']['p50_ms']:.1f}",
             f"{a['latency']['p95_ms']:.1f}", f"{a['latency']['p99_ms']:.1f}", f"{a['answers_per_s']:.1f}")
            for a in report["answers"]]  # fmt: skip
    print_table("one answer, ms", ("batch", "engine", "halting", "mean steps", "p50", "p95", "p99", "answers/s"), rows)
    cold = report["cold_start"]
    memory = "not measured" if cold["peak_rss_mib"] is None else f"{cold['peak_rss_mib']:.0f} MiB"
    print(
        f"fresh process: first answer after {cold['first_answer_s']:.2f} s (median of {cold['runs']}), peak RSS {memory}\n"
    )
    for title, part in (("", report), ("int8: ", report.get("int8", {}))):
        if "accuracy" not in part:
            continue
        accuracy = part["accuracy"]
        rows = [(p["policy"], f"{p['exact_accuracy']:.4f}", f"{p['standard_error']:.4f}", f"{p['points_lost']:+.2f}",
                 f"{p['mean_steps']:.2f}", f"{p['steps_saved']:.0%}") for p in accuracy["policies"]]  # fmt: skip
        print_table(f"{title}what halting early saved and cost, {accuracy['examples']} held-out examples",
                    ("halting", "exact", "± s.e.", "points lost", "mean steps", "steps saved"), rows)  # fmt: skip
        if accuracy["settled"]:
            print(settled_line(accuracy["settled"]))
        if certificate := part["certificate"]:
            print(f"certified: mean {certificate['loss']} at most {certificate['max_loss']:g} with confidence "
                  f"{certificate['confidence']:g}, from {certificate['items_total']} calibration items; each family's promise "
                  "is for itself")  # fmt: skip
        elif part.get("not_calibrated"):
            print(f"no certified policy: {part['not_calibrated']}")


def show_slots(report: dict[str, Any]) -> None:
    """The suite `slots` as tables."""
    slots = report["slots"]
    print(f"{report['machine']['cpu'] or report['machine']['architecture']}, {report['threads']} threads, "
          f"{slots['slots']} slots, halting {slots['halt']}, commit {(report['commit'] or 'none')[:10]}")  # fmt: skip
    print_table(
        f"saturating load, {slots['examples']} held-out examples, median of {slots['rounds']} rounds in turn",
        ("way", "answers/s", "× upstream", "× by CPU time", "exact", "mean steps", "rows an answer", "occupancy"),
        [(w["way"], f"{w['answers_per_s']:.1f}", f"{w['times_upstream']:.2f}×", f"{w['times_upstream_by_cpu']:.2f}×",
          f"{w['exact_accuracy']:.4f}", f"{w['mean_steps']:.2f}", f"{w['step_rows_per_answer']:.2f}",
          f"{w['occupancy']:.1%}") for w in slots["ways"]],
    )  # fmt: skip
    cost = slots["overhead"]
    print(f"scheduling: {cost['scheduling_ms_per_tick']:.3f} ms of CPU a tick, {cost['share_of_step']:.1%} of a step "
          f"({cost['step_ms']:.1f} ms); {cost['share_with_submission']:.1%} with checking and queueing requests, "
          f"{cost['share_with_moving']:.1%} with admission, compaction and decode too\n"
    )  # fmt: skip
    print_table(
        "open loop, latency from the intended arrival, ms",
        ("load", "offered/s", "answered/s", "answers", "p50", "p95", "p99", "waited p95", "rows used"),
        [(f"{o['load']:.0%}", f"{o['rate_per_s']:.1f}", f"{o['answers_per_s']:.1f}", o["answers"],
          *(f"{o['latency'][k]:.0f}" for k in ("p50_ms", "p95_ms", "p99_ms")), f"{o['waited_p95_ms']:.0f}",
          f"{o['rows_used']:.0%}") for o in slots["open_loop"]],
    )  # fmt: skip
