"""`sage-edge check`: the gate, on demand and in full."""

from __future__ import annotations

import argparse

from sage_edge.bundle import load_bundle
from sage_edge.check import check, load_reference
from sage_edge.cli.output import Subparsers, command, print_json, print_table, stages
from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.errors import InputError
from sage_edge.models import bundle_of, locate, open_for_check


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "check", run, "compare a bundle or an engine with the fp32 reference of its model",
        "Parity at every step from the same carry, NaN/Inf, truthful signals, slots that do not see each other, and\n"
        "signs of a dead model (outputs that ignore the input, a constant halting signal, a carry that never moves).\n"
        "The free-running error is shown beside the model's own amplification of a change of 1e-6 in its carry after\n"
        "step 1: free error far above it means a wrong graph, free error of its size is rounding.\n\n"
        "  sage-edge check my-hrm.bundle --target tensorrt:10.3   will that release take it? Needs neither TensorRT nor GPU",
    )  # fmt: skip
    parser.add_argument("engine", metavar="ENGINE")
    parser.add_argument(
        "--target", metavar="tensorrt:VERSION", help="check every node against a TensorRT release instead"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.target:
        return _support(arguments)
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


def _support(arguments: argparse.Namespace) -> int:
    """The static check of a bundle against a TensorRT release."""
    # Imported here: the gate must not wait for onnx.
    from sage_edge.engines.tensorrt_support import check_support

    kind, _, version = arguments.target.partition(":")
    if kind != "tensorrt" or not version:
        raise InputError(f"--target {arguments.target!r}: expected tensorrt:VERSION, such as tensorrt:10.3")
    folder = locate(arguments.engine)
    if (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{folder}: an engine; --target checks a bundle (its graphs are not those of a built engine)")
    with stages("check") as progress:
        bundle = bundle_of(folder, progress)
        report = check_support(bundle, load_bundle(bundle), version)
    if arguments.json:
        print_json({"bundle": str(bundle), "target": arguments.target, **report.as_dict()})
        return 0 if report.passed else 1
    if report.findings:
        rows = [(f.severity, f.graph, f.node, f.op, f.problem, f.change) for f in report.findings]
        print_table(f"{bundle} and TensorRT {version}", ("", "graph", "node", "operator", "problem", "change"), rows)
    verdict = "takes every node" if report.passed else "does not take this bundle"
    print(f"TensorRT {version} (table {report.release}: {report.source}) {verdict}: {report.nodes} nodes, "
          f"{report.fusable} of {report.attentions} attention layers in the fusable pattern")  # fmt: skip
    return 0 if report.passed else 1
