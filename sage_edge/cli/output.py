"""What all commands share: tables, JSON, progress on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Subparsers = Any  # argparse keeps the type of add_subparsers() private


def command(subparsers: Subparsers, name: str, run: Callable[[argparse.Namespace], int], help: str,
            description: str) -> argparse.ArgumentParser:  # fmt: skip
    """Add a command with `--json`; `description` may hold several lines and examples."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on standard output")
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


def amount(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def print_json(report: Any) -> None:
    print(json.dumps(report, indent=2, allow_nan=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output: numbers to the right, None as a dash."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        text = all(isinstance(row[index], str) and not _numeric(str(row[index])) for row in rows)
        table.add_column(column, justify="left" if text else "right", no_wrap=not text)
    for row in rows:
        table.add_row(*("–" if cell is None else str(cell) for cell in row))
    # Into a pipe or a file a fixed width beats a guess of 80 that folds the columns.
    # No markup: [language] in a name or a message is no colour.
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    console.print(table)


def _numeric(text: str) -> bool:
    return text[:1].isdigit() or (text[:1] in "+-.×–" and len(text) > 1)


@contextmanager
def stages(title: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the name of the current stage, on a terminal's standard error; silent elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda stage: None
        return
    with console.status(title) as status:
        yield lambda stage: status.update(f"{title}: {stage}")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's standard error; call it with how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Call it with (stage, 0..1): a bar on a terminal, one line a stage elsewhere; both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        last = ""

        def line(stage: str, done: float) -> None:
            nonlocal last
            if stage != last:
                console.print(f"{title}: {stage}")
            last = stage

        yield line
        return
    with Progress(TextColumn("{task.description:44}"), BarColumn(), TimeElapsedColumn(), console=console,
                  transient=True) as bars:  # fmt: skip
        task = bars.add_task(title, total=1.0)
        yield lambda stage, done: bars.update(task, description=stage, completed=done)
