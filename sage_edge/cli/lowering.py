"""How a lowered bundle is made and shown on the command line: shared by `export`, `build` and `check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sage_edge.bundle import GateResult, Lowering, StepError
from sage_edge.check import Finding
from sage_edge.cli.output import positive, print_json, print_table
from sage_edge.errors import InputError


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The data that judges a lowered graph."""
    parser.add_argument("--data", metavar="DIR", type=Path,
                        help="dataset that calibrates and judges a lowered graph (not used for training)")  # fmt: skip
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N examples of it")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What lowering needs beside `--precision`."""
    add_data_arguments(parser)
    parser.add_argument("--strict", action="store_true", help="refuse (exit 1) rather than keep layers higher")


def require_data(arguments: argparse.Namespace) -> Any:
    """The dataset of `--data`. Raises InputError when it is missing."""
    from sage_edge.dataset import load_dataset

    if arguments.data is None:
        raise InputError("--data DIR is needed to lower a graph: held-out examples that set its ranges and judge it")
    return load_dataset(arguments.data).first(arguments.limit)


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Raise InputError for options of lowering that are given without it."""
    given = [name for name in ("data", "limit", "strict", "allow") if getattr(arguments, name, None)]
    if given:
        raise InputError(f"--{given[0]}: belongs to --precision other than fp32")


def show_layers(lowering: Lowering) -> None:
    """What every layer was asked for and has, and why some stayed higher."""
    rows = [
        (x.layer, x.asked, x.precision, f"{x.share:.1%}", None if x.error is None else f"{x.error:.4f}", x.reason)
        for x in lowering.layers
    ]
    kept = sum(bool(x.reason) for x in lowering.layers)
    title = f"{kept} of {len(rows)} layers kept higher; cost {lowering.cost:g} of fp32"
    print_table(title, ("layer", "asked", "has", "share", "error alone", "why kept higher"), rows)


def show_steps(steps: Sequence[StepError]) -> None:
    """The error of each step, and the drift beside the model's own amplification."""
    rows = [
        (s.step, f"{s.error:.1e}", f"{s.largest:.1e}", f"{s.agreement:.4f}", f"{s.free_error:.1e}", f"{s.free_agreement:.4f}",
         None if s.amplification is None else f"{s.amplification:.1e}")
        for s in steps
    ]  # fmt: skip
    columns = ("step", "error", "max error", "agreement", "free error", "free agreement", "1e-6 grows to")
    print_table("relative RMS error of the carry: each step from fp32's own carry, and running free", columns, rows)


def show_findings(findings: Sequence[Finding | GateResult]) -> None:
    for finding in findings:
        print(f"{'ok    ' if finding.passed else 'FAILED'} {finding.name}: {finding.detail}")


def show_lowering(lowering: Lowering, facts: dict[str, Any], as_json: bool) -> None:
    """All of it: as tables, or as one JSON object that begins with `facts`."""
    if as_json:
        print_json({**facts, "modules": lowering.modules, **asdict(lowering)})
        return
    show_layers(lowering)
    show_steps(lowering.steps)
    show_findings(lowering.gate)
