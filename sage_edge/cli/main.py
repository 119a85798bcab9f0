"""`sage-edge`: parse, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sage_edge import __version__
from sage_edge.cli import (
    bench,
    build,
    calibrate,
    check,
    doctor,
    evaluate,
    export,
    inspect,
    mailbox,
    plugin,
    roofline,
    run,
    trace,
)
from sage_edge.errors import SageError

DESCRIPTION = """\
Run models that think in steps, and stop each request as soon as it is done.

the way of the data:
  checkpoint --export--> bundle (ONNX) --build--> engine (for this machine) --run--> answers

ENGINE below is an engine, a bundle, a model folder, or the name of a shipped model (sudoku9); what is missing on the
way is built and kept in the engine cache ($SAGE_EDGE_CACHE, default ~/.cache/sage-edge).

first steps:
  sage-edge doctor                        what this machine has and lacks
  sage-edge bench                         latency and accuracy of the shipped model, here
  sage-edge calibrate sudoku9 --data DIR  a halting policy whose loss is certified on held-out data
  sage-edge run sudoku9 --inputs in.npz --outputs out.npz
"""
EPILOG = "exit codes: 0 ok; 1 a gate or a check failed; 2 wrong use or bad input. Every report takes --json."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="sage-edge", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"sage-edge {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        doctor, export, build, check, calibrate, run, evaluate, bench, roofline, inspect, mailbox, plugin, trace,
    ):  # fmt: skip
        command.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. argparse itself exits with 2 for wrong use."""
    parsed = parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except SageError as error:
        print(f"sage-edge: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sage-edge: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone: not an error, but Python would complain while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"sage-edge: {place}{error.strerror or error}", file=sys.stderr)
        return 2
