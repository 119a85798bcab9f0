"""`sage-edge roofline`: how fast a bundle could run on a device at best, and what would bind it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sage_edge.cli.output import Subparsers, command, positive, print_json, print_table, progress_bar
from sage_edge.device import usable_cores
from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.errors import InputError
from sage_edge.models import bundle_of, locate

SECONDS = 1.0


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "roofline", run, "how fast a bundle could run on a device at best",
        "Count multiplications and bytes of each graph, and set them against a device's peak arithmetic and memory: time of a\n"
        "step, answers per second, what binds it, and whether the weights stay in the device's last cache. A bound from\n"
        "below: launches and everything that kernels do badly are left out.\n\n"
        "  sage-edge roofline sudoku9 --device orin-nano:25W\n"
        "  sage-edge roofline sudoku9 --device this        measured ceilings of this CPU, and a measured step beside them",
    )  # fmt: skip
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle, a model folder or the name of a shipped model")
    parser.add_argument("--device", required=True, metavar="NAME",
                        help="orin-nano:15W, orin-nano:25W, orin-nano:MAXN_SUPER, h200, or this")  # fmt: skip
    parser.add_argument("--slots", type=positive, nargs="+", default=[1, 8], help="requests in flight (default: 1 8)")
    parser.add_argument("--steps", type=positive, help="refinement steps of an answer (default: the model's most)")
    parser.add_argument("--threads", type=positive, help="for --device this: CPU threads (default: all usable cores)")


def run(arguments: argparse.Namespace) -> int:
    # Imported here: the other commands must not wait for onnx.
    from sage_edge.bench.roofline import ceilings_of, roofline
    from sage_edge.bundle import load_bundle

    folder = locate(arguments.bundle)
    if (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder}: an engine; `roofline` counts the graphs of a bundle")
    here = arguments.device == "this"
    if arguments.threads and not here:
        raise InputError("--threads: only with --device this")
    threads = arguments.threads or usable_cores()
    with progress_bar("roofline") as progress:
        bundle = bundle_of(folder, lambda stage: progress(stage, 0.0))
        ceilings = ceilings_of(arguments.device) if not here else _here(threads, progress)
        report = roofline(bundle, load_bundle(bundle), ceilings, tuple(arguments.slots), arguments.steps)
        report |= {"device": arguments.device, "threads": threads if here else None}
        if here:
            _measure(bundle, report, threads, progress)
    if arguments.json:
        print_json(report)
    else:
        _show(report)
    return 0


def _here(threads: int, progress: Any) -> Any:
    from sage_edge.bench.this_machine import machine_ceilings

    progress("ceilings of this machine", 0.1)
    return machine_ceilings(threads, SECONDS)


def _measure(bundle: Path, report: dict[str, Any], threads: int, progress: Any) -> None:
    """A measured step beside each predicted one, on the CPU engine of the bundle."""
    from sage_edge.bench.this_machine import measure_step
    from sage_edge.engines.build import BuildRecipe, build, open_engine

    slots = max(row["slots"] for row in report["rows"])
    progress("build the engine", 0.4)
    built = build(bundle, BuildRecipe(slots=max(8, slots)))
    with open_engine(built.path, threads) as runner:
        for row in report["rows"]:
            progress(f"step at {row['slots']} slots", 0.7)
            latency = measure_step(runner, row["slots"], SECONDS)
            predicted = row["graphs"]["refine"]["milliseconds"]
            row["measured_step"] = asdict(latency)
            row["predicted_of_measured"] = predicted / latency.p50_ms


def _show(report: dict[str, Any]) -> None:
    ceilings = report["ceilings"]
    cache = "no cache counted" if ceilings["l2_mib"] is None else f"last cache {ceilings['l2_mib']:g} MiB"
    peaks = ", ".join(f"{kind} {value:.3g}" for kind, value in ceilings["tflops"].items())
    print(
        f"{report['device']}: TFLOP/s {peaks}; memory {ceilings['dram_gbs']:.0f} GB/s; {cache}\n({ceilings['source']})"
    )
    rows = [
        (row["slots"], name, f"{g['gflop']:.3f}", f"{g['weights_mib']:.1f}", "yes" if g["weights_resident"] else "no",
         f"{g['dram_mib']:.1f}", None if g["intensity"] is None else f"{g['intensity']:.0f}", g["bound"],
         f"{g['milliseconds']:.3f}")
        for row in report["rows"] for name, g in row["graphs"].items()
    ]  # fmt: skip
    columns = (
        "slots",
        "graph",
        "GFLOP",
        "weights, MiB",
        "stay in cache",
        "memory, MiB",
        "FLOP/byte",
        "bound",
        "at best, ms",
    )
    print_table(f"{report['bundle']}, {report['precision']}", columns, rows)
    measured = report["device"] == "this"
    rows = [
        (row["slots"], f"{row['steps']:g}", f"{row['answer_ms']:.2f}", f"{row['answers_per_s']:.0f}",
         *((f"{row['measured_step']['p50_ms']:.2f}", f"{row['graphs']['refine']['milliseconds']:.2f}",
            f"{row['predicted_of_measured']:.0%}") if measured else ()))
        for row in report["rows"]
    ]  # fmt: skip
    extra = ("measured step, ms", "predicted", "predicted / measured") if measured else ()
    print_table("answers, at best", ("slots", "steps", "ms", "answers/s", *extra), rows)
