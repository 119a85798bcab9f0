"""`sage-edge mailbox --selftest`: does the mailbox work on this machine, and how fast; some seconds."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from typing import Any

from sage_edge.bench.mailbox_broadcast import broadcast
from sage_edge.bench.mailbox_links import CONTESTANTS, OURS, LinkError
from sage_edge.bench.mailbox_ours import clear
from sage_edge.bench.mailbox_trips import round_trips
from sage_edge.mailbox import Mailbox, PortSpec
from sage_edge.mailbox.memory import KINDS, memory_kind

SIZES = (64, 1 << 20)
RECOVERY_S = 0.1
# Loans one slot, holds another, and ends by SIGKILL with both.
VICTIM = """
import os, signal, sys
from sage_edge.mailbox import Mailbox, PortSpec
port = Mailbox(sys.argv[1]).focus("victim", PortSpec(kind="focus", dtype="uint8", shape=(4096,), depth=2))
port.loan().send()
item = port.receive(0)
loan = port.loan()
print("holds both", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def selftest(seconds: float = 0.25) -> dict[str, Any]:
    """Round trips with checked payloads, a broadcast, recovery after SIGKILL, and which memory kinds there are.

    seconds: for each row of round trips, and for the broadcast.
    """
    ours = tuple(one for one in CONTESTANTS if one.name == OURS)
    checks: list[dict[str, Any]] = []
    trips: list[dict[str, Any]] = []
    try:
        trips = round_trips(ours, seconds, SIZES, lambda stage, done: None)["trips"]
        checks.append(
            _check("payloads arrive whole", True, f"{sum(t['latency']['samples'] for t in trips)} round trips")
        )
        cast = broadcast(ours[0], 1, seconds)
        found = f"{cast['received_per_s']:.0f} records a second, {cast['lost']:.0%} lost"
        checks.append(_check("records arrive in order", True, found))
    except LinkError as error:
        checks.append(_check("payloads and records arrive whole and in order", False, str(error)))
    recovery = recover()
    checks.append(
        _check("slots of a killed process come back within 100 ms", recovery <= RECOVERY_S, f"{recovery * 1e3:.1f} ms")
    )
    return {"ok": all(check["ok"] for check in checks), "trips": trips, "checks": checks, "memory": memory_kinds()}


def recover() -> float:
    """Seconds until both slots of a port, held by a process that was killed, can be loaned again; at most 5."""
    namespace = f"selftest-{uuid.uuid4().hex[:12]}"
    try:
        done = subprocess.run([sys.executable, "-c", VICTIM, namespace], stdout=subprocess.PIPE, text=True, timeout=60)
        if done.stdout != "holds both\n":
            return float("inf")
        began = time.monotonic()
        with Mailbox(namespace).focus("victim", PortSpec(kind="focus", dtype="uint8", shape=(4096,), depth=2)) as port:
            loans = [port.loan(timeout=5) for _ in range(2)]
            took = time.monotonic() - began
            for loan in loans:
                loan.cancel()
        return took
    finally:
        clear(namespace)


def memory_kinds() -> dict[str, str | None]:
    """Every memory kind: None when this machine has it, else why not."""
    from sage_edge.errors import SageError

    found: dict[str, str | None] = {}
    for name in KINDS:
        try:
            memory_kind(name)
            found[name] = None
        except SageError as error:
            found[name] = str(error)
    return found


def _check(what: str, ok: bool, found: str) -> dict[str, Any]:
    return {"what": what, "ok": ok, "found": found}
