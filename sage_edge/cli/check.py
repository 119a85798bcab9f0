"""`sage-edge check`: the gate, on demand and in full."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from sage_edge.bundle import Lowering, load_bundle
from sage_edge.check import check, load_reference
from sage_edge.cli.lowering import add_data_arguments, require_data, show_findings, show_layers, show_steps
from sage_edge.cli.output import Subparsers, command, print_json, print_table, stages
from sage_edge.engines.manifest import MANIFEST_FILE
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError
from sage_edge.models import bundle_of, locate, lowering_of, open_for_check, open_runner


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "check", run, "compare a bundle or an engine with the fp32 reference of its model",
        "Parity at every step from the same carry, NaN/Inf, truthful signals, slots that do not see each other, and\n"
        "signs of a dead model (outputs that ignore the input, a constant halting signal, a carry that never moves).\n"
        "The free-running error is shown beside the model's own amplification of a change of 1e-6 in its carry after\n"
        "step 1: free error far above it means a wrong graph, free error of its size is rounding.\n\n"
        "A lowered bundle (fp16, int8, fp8), or an engine made from one, is held to the limits it was judged by. With\n"
        "--against and --data, accuracy and halting are judged too, on the same examples through both:\n\n"
        "  sage-edge check my-hrm-int8.bundle --against my-hrm.bundle --data DIR\n\n"
        "  sage-edge check my-hrm.bundle --target tensorrt:10.3   will that release take it? Needs neither TensorRT nor GPU",
    )  # fmt: skip
    parser.add_argument("engine", metavar="ENGINE")
    parser.add_argument(
        "--target", metavar="tensorrt:VERSION", help="check every node against a TensorRT release instead"
    )
    parser.add_argument("--against", metavar="FP32", help="the fp32 bundle or engine of the same model")
    add_data_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.target:
        return _support(arguments)
    with stages("check") as progress:
        runner, folder = open_for_check(arguments.engine, progress)
        lowering = lowering_of(folder)
        if lowering is not None:
            return _lowered(arguments, runner, folder, lowering, progress)
        if arguments.against or arguments.data:
            raise InputError(f"--against, --data: belong to lowered models; {folder} is fp32 and is held to parity")
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
        show_findings(report.findings)
    return 0 if report.passed else 1


def _lowered(
    arguments: argparse.Namespace, runner: Runner, folder: Path, lowering: Lowering, progress: Callable[[str], None]
) -> int:
    """A lowered model: the limits it was made under, and what it gets right beside fp32 where both are given."""
    from sage_edge.precision.gate import check_lowered

    if bool(arguments.against) != bool(arguments.data):
        raise InputError("--against FP32 and --data DIR: give both, to compare what the two get right, or neither")
    with ExitStack() as stack:
        data, fp32 = None, None
        if arguments.against:
            data = require_data(arguments)
            fp32 = stack.enter_context(open_runner(arguments.against, progress=progress))
            if fp32.digest != lowering.fp32_sha256:
                raise InputError(
                    f"{arguments.against}: not the fp32 bundle that {folder} was made from (SHA-256 differs)"
                )
        progress("compare")
        stack.enter_context(runner)
        reference = load_reference(folder / "reference.npz")
        report = check_lowered(runner, reference, lowering, fp32, data, progress)
    if arguments.json:
        print_json({"engine": str(folder), "modules": lowering.modules, **report.as_dict()})
    else:
        show_layers(lowering)
        show_steps(report.steps)
        show_findings(report.findings)
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
