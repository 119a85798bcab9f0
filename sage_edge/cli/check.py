"""`sage-edge check`: the gate, on demand and in full."""

from __future__ import annotations

import argparse

from sage_edge.check import check, load_reference
from sage_edge.cli.output import Subparsers, command, print_json, print_table, stages
from sage_edge.models import open_for_check


def add(subparsers: Subparsers) -> None:
    command(
        subparsers, "check", run, "compare a bundle or an engine with the fp32 reference of its model",
        "Parity at every step from the same carry, NaN/Inf, truthful signals, slots that do not see each other, and\n"
        "signs of a dead model (outputs that ignore the input, a constant halting signal, a carry that never moves).\n"
        "The free-running error is shown beside the model's own amplification of a change of 1e-6 in its carry after\n"
        "step 1: free error far above it means a wrong graph, free error of its size is rounding.",
    ).add_argument("engine", metavar="ENGINE")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    with stages("check") as progress:
        runner, folder = open_for_check(arguments.engine, progress)
        progress("compare")
        with runner:
            report = check(runner, load_reference(folder / "reference.npz"))
    if arguments.json:
        print_json({"engine": str(folder), **report.as_dict()})
    else:
        rows = [
            (s.step, f"{s.same_carry_max:.1e}", f"{s.same_carry_mean:.1e}", f"{s.prediction_agreement:.4f}",
             f"{s.free_max:.1e}", f"{s.free_prediction_agreement:.4f}", f"{s.amplification:.1e}")
            for s in report.steps
        ]  # fmt: skip
        columns = ("step", "max error", "mean error", "agreement", "free max", "free agreement", "1e-6 grows to")
        print_table(f"{folder}: each step from the reference's carry, and running free", columns, rows)
        for finding in report.findings:
            print(f"{'ok    ' if finding.passed else 'FAILED'} {finding.name}: {finding.detail}")
    return 0 if report.passed else 1
