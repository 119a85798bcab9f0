"""`sage-edge plugin`: list, make, check, calibrate and lower plugins."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sage_edge.cli.output import Subparsers, amount, bar, command, positive, print_json, print_table, stages
from sage_edge.errors import GateError, InputError


def add(subparsers: Subparsers) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plugin", help="list, make, check, calibrate and lower IRP plugins",
        description="Plugins refine a state step by step and halt by energy; see docs/irp.md. They are found in folders\n"
        "that you give, in plugins_irp/ here and in the project, and by the entry point group sage_edge.plugins. `ls` reads\n"
        "plugin.yaml only; every other command runs the plugin's code. All but `new` take --json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    ls = command(
        commands, "ls", _ls, "the plugins that are found, and where", "  sage-edge plugin ls --plugins my-folder"
    )
    _folders(ls)
    new = command(
        commands, "new", _new, "make a working plugin to start from",
        "Write plugin.yaml, plugin.py and test_plugin.py: a plugin that works and whose test passes.\n\n"
        "  sage-edge plugin new denoise && pytest plugins_irp/denoise && sage-edge plugin check plugins_irp/denoise",
    )  # fmt: skip
    new.add_argument("name", metavar="NAME")
    new.add_argument("--dir", metavar="DIR", type=Path, default=Path("plugins_irp"), help="default: plugins_irp")
    check = command(
        commands, "check", _check, "the protocol's conformance suite",
        "Energy finite and lower is better, project idempotent, steps deterministic and independent of other requests,\n"
        "halting terminates, state serialisable, telemetry valid. Exit code 1 when a check fails.",
    )  # fmt: skip
    check.add_argument("plugin", metavar="DIR|NAME")
    _engine(check)
    _folders(check)
    calibrate = command(
        commands, "calibrate", _calibrate, "certify early halting, and learn what steps are worth",
        "Run the plugin's calibration examples to the last step, choose the policy with the fewest steps that keeps the\n"
        "promise of plugin.yaml (max_loss, confidence; docs/halting.md) or --max-loss, and learn what the scheduler\n"
        "expects of each step. Both are kept in the plugin's home in the cache, and are void for any other code or weights.",
    )  # fmt: skip
    calibrate.add_argument("plugin", metavar="DIR|NAME")
    calibrate.add_argument(
        "--examples", metavar="N", type=positive, help="default: calibration_examples of plugin.yaml"
    )
    _max_loss(calibrate)
    _engine(calibrate)
    _folders(calibrate)
    lower = command(
        commands, "lower", _lower, "the plugin's engine in INT8 or FP16",
        "Lower the plugin's fp32 bundle (docs/precision.md): a quarter of its calibration examples sets the ranges, and on\n"
        "the others it may lose no more beside the fp32 one, after all steps, than plugin.yaml promises of halting (max_loss,\n"
        "confidence), or --max-loss. Use the result with `--engine`, or as `options: {engine: DIR}` of a pipeline.\n\n"
        "  sage-edge plugin lower vision -o vision-int8.bundle\n"
        "  sage-edge plugin calibrate vision --engine vision-int8.bundle",
    )  # fmt: skip
    lower.add_argument("plugin", metavar="DIR|NAME")
    lower.add_argument("-o", "--output", metavar="BUNDLE", type=Path, required=True, help="folder to write")
    lower.add_argument(
        "--precision", metavar="P", default="int8", help="as `sage-edge export` takes it (default: int8)"
    )
    lower.add_argument("--examples", metavar="N", type=positive, help="default: calibration_examples of plugin.yaml")
    _max_loss(lower)
    lower.add_argument("--threads", type=positive, help="CPU threads for ranges and gate (default: all usable cores)")
    _folders(lower)


def _folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plugins", metavar="DIR", type=Path, action="append", default=[],
                        help="a plugin's folder, or one that holds some; may be repeated")  # fmt: skip


def _max_loss(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-loss", metavar="X", type=amount, help="of quality, in the plugin's unit, on average")


def _engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", metavar="ENGINE", help="an engine or a bundle instead of the plugin's own")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"engine": arguments.engine} if arguments.engine else {}


def _ls(arguments: argparse.Namespace) -> int:
    from sage_edge.irp.registry import find_plugins

    found = find_plugins(arguments.plugins)
    if arguments.json:
        print_json([asdict(one) for one in found])
        return 0
    if not found:
        print("no plugin was found; `sage-edge plugin new NAME` makes one")
        return 0
    print_table("plugins", ("name", "version", "steps", "found", "where"),
                [(one.name, one.spec.version if one.spec else "–", one.spec.max_steps if one.spec else None, one.origin,
                  one.where) for one in found])  # fmt: skip
    for one in found:
        print(f"{one.name}: {one.error or (one.spec.summary if one.spec else '')}")
    return 0


def _new(arguments: argparse.Namespace) -> int:
    from sage_edge.irp.skeleton import new_plugin

    folder = new_plugin(arguments.name, arguments.dir)
    if arguments.json:
        print_json({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
    else:
        print(f"{folder}: written. Next:\n  pytest {folder}\n  sage-edge plugin check {folder}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from sage_edge.irp.conformance import check_plugin
    from sage_edge.irp.registry import open_plugin

    with stages("check") as progress:
        progress("open")
        with open_plugin(arguments.plugin, arguments.plugins, _options(arguments)) as plugin:
            findings = check_plugin(plugin, progress)
    passed = all(finding.passed for finding in findings)
    if arguments.json:
        print_json({"plugin": plugin.spec.name, "digest": plugin.digest, "passed": passed,
                    "findings": [asdict(finding) for finding in findings]})  # fmt: skip
    else:
        print_table(f"{plugin.spec.name}: conformance to the IRP protocol", ("check", "", "what was found"),
                    [(f.name, "ok" if f.passed else "FAILED", f.detail) for f in findings])  # fmt: skip
    return 0 if passed else GateError.exit_code


def _calibrate(arguments: argparse.Namespace) -> int:
    from sage_edge.cli.calibrate import show
    from sage_edge.irp.measure import allowed_loss, bench_spec, keep_calibration, record_traces
    from sage_edge.irp.registry import open_plugin

    plugin: Any = open_plugin(arguments.plugin, arguments.plugins, _options(arguments))
    spec = bench_spec(plugin)
    count = arguments.examples or spec.calibration_examples
    allowed_loss(plugin, arguments.max_loss)  # refused before the work
    with plugin, bar("examples", count) as progress:
        recorded = record_traces(plugin, plugin.examples(spec.calibration, count), progress)
    certificate, path = keep_calibration(plugin, recorded, arguments.max_loss)
    if arguments.json:
        print_json({"certificate": str(path), **asdict(certificate)})
    else:
        show(certificate)
        print(f"certificate: {path}")
    return 0


def _lower(arguments: argparse.Namespace) -> int:
    from sage_edge.cli.lowering import show_lowering
    from sage_edge.device import usable_cores
    from sage_edge.irp.engine import EnginePlugin
    from sage_edge.irp.registry import open_plugin
    from sage_edge.precision.lower import LoweringError
    from sage_edge.precision.plan import parse_request
    from sage_edge.precision.plugin import lower_plugin

    request = parse_request(arguments.precision)
    plugin = open_plugin(arguments.plugin, arguments.plugins)
    if not isinstance(plugin, EnginePlugin):
        raise InputError(f"plugin {plugin.spec.name}: has no engine that could be lowered")
    with stages("lower") as progress:
        try:
            made, quality = lower_plugin(plugin, arguments.output, request, arguments.examples,
                                         arguments.max_loss, arguments.threads or usable_cores(), progress)  # fmt: skip
        except LoweringError as refused:
            show_lowering(refused.lowering, {"bundle": None}, arguments.json)
            raise
    assert made.bundle.lowering is not None
    facts = {"bundle": str(made.path), "precision": made.bundle.precision, "quality": asdict(quality)}
    show_lowering(made.bundle.lowering, facts, arguments.json)
    if not arguments.json:
        print(
            f"{made.path}: {quality.unit}: {quality.fp32:.3f} in fp32, {quality.lowered:.3f} now; {quality.lost:.3g} lost, at "
            f"most {quality.bound:.3g} at {quality.confidence:.0%} (allowed {quality.allowed:g}; {quality.items} examples)"
        )
    return 0
