"""`sage-edge mailbox`: what the ports of this machine do: ls, top, tap, rm, --selftest."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sage_edge.cli.output import Subparsers, amount, command, positive, print_json, print_table
from sage_edge.errors import GateError, InputError
from sage_edge.files import replacing

if TYPE_CHECKING:
    from sage_edge.mailbox.view import Tap, Tapped

PAUSE_S = 0.002  # between two looks of `tap` at a port where nothing is new


def add(subparsers: Subparsers) -> None:
    parser = command(
        subparsers, "mailbox", _nothing, "live ports of the shared-memory mailbox: ls, top, tap, rm, --selftest",
        "Look at the ports of this user's processes, without taking part in them.\n\n"
        "  sage-edge mailbox ls                      all ports, who has them open, what waits in them\n"
        "  sage-edge mailbox top                     rates, drops and latencies, refreshed\n"
        "  sage-edge mailbox tap robot/camera -o DIR copies of what passes, as .npz\n"
        "  sage-edge mailbox rm robot/camera         remove a port that nobody has open\n"
        "  sage-edge mailbox --selftest              does it work here, and how fast (some seconds)\n\n"
        "PORT is NAMESPACE/NAME, or NAME in the namespace `default`.",
    )  # fmt: skip
    parser.add_argument(
        "--selftest", action="store_true", help="measure this machine; exit code 1 when something is wrong"
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    ls = _verb(verbs, "ls", _ls, "all ports, who has them open, what waits in them")
    ls.add_argument("namespace", metavar="NAMESPACE", nargs="?", help="only the ports of this namespace")

    top = _verb(verbs, "top", _top, "rates, drops and latencies, refreshed until Ctrl-C; with --json a line each time")
    top.add_argument("namespace", metavar="NAMESPACE", nargs="?", help="only the ports of this namespace")
    top.add_argument("--interval", metavar="S", type=amount, default=1.0, help="seconds between looks (default 1)")
    top.add_argument("--count", metavar="N", type=positive, help="stop after so many looks")

    tap = _verb(verbs, "tap", _tap, "print what passes through a port; save tensors")
    tap.add_argument("port", metavar="PORT")
    tap.add_argument("--count", metavar="N", type=positive, help="stop after so many")
    tap.add_argument("--seconds", metavar="S", type=amount, help="stop after this time")
    tap.add_argument("-o", "--output", metavar="DIR", type=Path,
                     help="save each tensor as PORT-GENERATION.npz there (focus ports)")  # fmt: skip

    rm = _verb(verbs, "rm", _rm, "remove ports: who has one open gets an error, what waits in it is lost")
    rm.add_argument("ports", metavar="PORT", nargs="*")
    rm.add_argument("--all", metavar="NAMESPACE", help="every port of a namespace")
    rm.add_argument("--force", action="store_true", help="even when a living process has it open")


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)
    parser.add_argument("--json", action="store_true", help="machine-readable, on standard output")
    parser.set_defaults(run=run)
    return parser


def _nothing(arguments: argparse.Namespace) -> int:
    if not arguments.selftest:
        raise InputError("mailbox: expected ls, top, tap, rm or --selftest; see `sage-edge mailbox --help`")
    from sage_edge.bench.mailbox_selftest import selftest

    report = selftest()
    if arguments.json:
        print_json(report)
    else:
        _show_selftest(report)
    return 0 if report["ok"] else GateError.exit_code


def _show_selftest(report: dict[str, Any]) -> None:
    from sage_edge.cli.bench_mailbox import TOUCHES, WAITS, size_text

    rows = [(size_text(row["bytes"]), TOUCHES[row["touch"]], WAITS[row["wait"]],
             *(f"{row['latency'][name] * 1e3:.1f}" for name in ("p50_ms", "p99_ms"))) for row in report["trips"]]  # fmt: skip
    print_table("round trip between two Python processes, µs", ("payload", "touched", "wait", "p50", "p99"), rows)
    for row in report["checks"]:
        print(f"{'ok' if row['ok'] else 'FAILED'}: {row['what']}: {row['found']}")
    for kind, reason in report["memory"].items():
        print(f"memory {kind}: {'available' if reason is None else reason}")


def _ls(arguments: argparse.Namespace) -> int:
    from sage_edge.mailbox.monitor import look, owners, rows

    found = rows(look(_namespaces(arguments)))
    if arguments.json:
        print_json({"ports": found})
        return 0
    if not found:
        print("no ports: nothing has opened one since the last boot, or all were removed")
        return 0
    print_table(
        "ports", ("port", "kind", "carries", "memory", "MiB", "depth", "loaned", "ready", "held", "open in"),
        [(f"{r['namespace']}/{r['port']}", r["kind"], r["carries"], r["memory"], f"{r['bytes'] / 2**20:.1f}",
          *(r[key] or None for key in ("depth", "loaned", "ready", "held")), owners(r)) for r in found],
    )  # fmt: skip
    return 0


def _top(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from sage_edge.mailbox.monitor import look, rows

    console = Console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not arguments.json else None
    before, at = look(_namespaces(arguments)), time.monotonic()
    shown = 0
    if live:
        live.start()
    try:
        while arguments.count is None or shown < arguments.count:
            time.sleep(arguments.interval)
            now, then = look(_namespaces(arguments)), time.monotonic()
            found = rows(now, before, then - at)
            before, at = now, then
            shown += 1
            if arguments.json:
                import json

                print(json.dumps({"ports": found}, allow_nan=False), flush=True)
            elif live:
                live.update(_top_table(found), refresh=True)
            else:
                Console(width=160).print(_top_table(found))
    finally:
        if live:
            live.stop()
    return 0


def _top_table(found: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    from sage_edge.mailbox.monitor import owners

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("port", "sent/s", "got/s", "gone/s", "ready", "p50 µs", "p99 µs", "open in (→ sends, ← receives)")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index in (0, 7) else "right", no_wrap=index != 7,
                         overflow="fold")  # fmt: skip
    for row in found:
        rates = row["rates_per_s"]
        cells = ["–"] * 3
        if rates is not None:
            # Sent, but never to be received: dropped by policy, too old, or overwritten before a reader came.
            cells = [
                f"{n:.0f}"
                for n in (rates["sent"], rates["received"], sum(rates[k] for k in ("dropped", "stale", "lost")))
            ]
        depth = f"{row['ready']}/{row['depth']}" if row["kind"] == "focus" else "–"
        latency = ["–" if value is None else f"{value:.1f}" for value in row["latency_us"].values()]
        table.add_row(f"{row['namespace']}/{row['port']}", *cells, depth, *latency, owners(row))
    return table


def _tap(arguments: argparse.Namespace) -> int:
    from sage_edge.mailbox import Mailbox

    namespace, name = _split(arguments.port)
    mailbox = Mailbox(namespace)
    _require(mailbox, namespace, name)
    focus = mailbox.stats(name).kind == "focus"
    if arguments.output and not focus:
        raise InputError(f"{arguments.port}: -o saves tensors of focus ports; this one carries records: use --json")
    tap = mailbox.tap(name)
    shown = _follow(arguments, tap, name)
    if not arguments.json:
        print(f"{shown} shown, {tap.missed} passed unseen")
    return 0


def _follow(arguments: argparse.Namespace, tap: Tap, name: str) -> int:
    import json

    shown = 0
    until = time.monotonic() + arguments.seconds if arguments.seconds else None
    while (arguments.count is None or shown < arguments.count) and (until is None or time.monotonic() < until):
        found = tap.read()
        if arguments.count is not None:
            found = found[: arguments.count - shown]
        for one in found:
            saved = _save(arguments.output, name, one) if arguments.output else None
            if arguments.json:
                print(json.dumps({**_plain(one), "saved": saved}, default=str), flush=True)
            else:
                print(_line(one) + (f" → {saved}" if saved else ""), flush=True)
        shown += len(found)
        if not found:
            time.sleep(PAUSE_S)
    return shown


def _plain(one: Tapped) -> dict[str, Any]:
    common = {"sent_ns": one.sent_ns, "producer": one.producer, "generation": one.generation}
    if one.array.dtype.names:
        return {**common, "record": {name: one.array[name].tolist() for name in one.array.dtype.names}}
    return {**common, "captured_ns": one.captured_ns, "tag": one.tag, "trust": one.trust, "dtype": one.array.dtype.name,
            "shape": list(one.array.shape)}  # fmt: skip


def _line(one: Tapped) -> str:
    age = (time.monotonic_ns() - one.sent_ns) / 1e6
    if one.array.dtype.names:
        fields = " ".join(f"{name}={_value(one.array[name])}" for name in one.array.dtype.names)
        return f"#{one.generation} from {one.producer}, {age:.1f} ms ago: {fields}"
    shape = ", ".join(map(str, one.array.shape))
    return (f"#{one.generation} from {one.producer}, {age:.1f} ms ago: {one.array.dtype} [{shape}] tag {one.tag} "
            f"trust {one.trust:.2f}")  # fmt: skip


def _value(value: Any) -> str:
    return f"{value:.6g}" if np.ndim(value) == 0 and np.asarray(value).dtype.kind == "f" else str(value)


def _save(folder: Path, name: str, one: Tapped) -> str:
    path = folder / f"{name}-{one.generation}.npz"
    with replacing(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, tensor=one.array, sent_ns=one.sent_ns, captured_ns=one.captured_ns, tag=one.tag, trust=one.trust,
                 producer=one.producer, generation=one.generation)  # fmt: skip
    return str(path)


def _rm(arguments: argparse.Namespace) -> int:
    from sage_edge.mailbox import Mailbox

    if bool(arguments.ports) == bool(arguments.all):
        raise InputError("rm: give either PORTs or --all NAMESPACE")
    wanted = [_split(port) for port in arguments.ports]
    if arguments.all:
        wanted = [(arguments.all, name) for name in Mailbox(arguments.all).names()]
    for namespace, name in wanted:
        mailbox = Mailbox(namespace)
        _require(mailbox, namespace, name)
        living = [owner for owner in mailbox.stats(name).owners if owner.alive]
        if living and not arguments.force:
            who = ", ".join(f"{owner.name}:{owner.pid}" for owner in living)
            raise InputError(f"{namespace}/{name}: open in {who}; stop them first, or give --force")
    for namespace, name in wanted:
        Mailbox(namespace).remove(name)
    removed = [f"{namespace}/{name}" for namespace, name in wanted]
    if arguments.json:
        print_json({"removed": removed})
    else:
        print("\n".join(f"removed {name}" for name in removed) or "nothing to remove")
    return 0


def _namespaces(arguments: argparse.Namespace) -> list[str] | None:
    """Those that were asked for. Raises InputError for one that does not exist."""
    if arguments.namespace is None:
        return None
    from sage_edge.mailbox import Mailbox

    known = Mailbox.namespaces()
    if arguments.namespace not in known:
        raise InputError(f"namespace {arguments.namespace!r}: not here; there are {', '.join(known) or 'none'}")
    return [arguments.namespace]


def _split(port: str) -> tuple[str, str]:
    namespace, _, name = port.rpartition("/")
    return namespace or "default", name


def _require(mailbox: Any, namespace: str, name: str) -> None:
    if name not in mailbox.names():
        raise InputError(f"{namespace}/{name}: no such port; `sage-edge mailbox ls` shows those that exist")
