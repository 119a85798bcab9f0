"""What `ls` and `top` show: every port of this user, as rows of plain values; rates and latencies from two looks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sage_edge.errors import SageError
from sage_edge.mailbox.namespace import Mailbox

if TYPE_CHECKING:
    from sage_edge.mailbox.view import PortStats

Key = tuple[str, str]  # namespace, port
Row = dict[str, Any]
RATES = ("sent", "received", "dropped", "stale", "refused", "lost")


def look(namespaces: Iterable[str] | None = None) -> dict[Key, PortStats]:
    """Statistics of every port, by namespace and name; takes no part. A port that is removed meanwhile is left out."""
    found: dict[Key, PortStats] = {}
    for namespace in Mailbox.namespaces() if namespaces is None else namespaces:
        mailbox = Mailbox(namespace)
        for name in mailbox.names():
            try:
                found[namespace, name] = mailbox.stats(name)
            except (SageError, FileNotFoundError):
                continue
    return dict(sorted(found.items()))


def rows(now: dict[Key, PortStats], before: dict[Key, PortStats] | None = None, seconds: float = 0.0) -> list[Row]:
    """One row a port. With an earlier look, `seconds` ago: rates and latency of the time between, else of all time.

    latency_us: p50 and p99 from send to receive, None where nothing was received. rates_per_s: None without an earlier
    look at the same port (one that was removed and made again has another time of creation).
    """
    result = []
    for (namespace, name), stats in now.items():
        old = None if before is None else before.get((namespace, name))
        if old is not None and old.created != stats.created:
            old = None
        rates = None
        if old is not None and seconds > 0:
            rates = {key: (stats.counts[key] - old.counts[key]) / seconds for key in RATES}
        latency = stats.latency if old is None else stats.latency - old.latency
        p50, p99 = latency.quantile(0.5), latency.quantile(0.99)
        result.append({
            "namespace": namespace, "port": name, "kind": stats.kind, "memory": stats.memory, "carries": carries(stats),
            "bytes": stats.bytes, "created": stats.created, "depth": stats.depth, "free": stats.free,
            "loaned": stats.loaned, "ready": stats.ready, "held": stats.held, "counts": stats.counts, "rates_per_s": rates,
            "latency_us": {"p50": None if p50 is None else p50 / 1e3, "p99": None if p99 is None else p99 / 1e3},
            "owners": [
                {"pid": o.pid, "name": o.name, "alive": o.alive, "sends": o.sends, "receives": o.receives,
                 "loaned": o.loaned, "held": o.held} for o in stats.owners
            ],
        })  # fmt: skip
    return result


def carries(stats: PortStats) -> str:
    """What goes through a port, in a few words: dtype and shape, or fields."""
    spec = stats.spec
    if spec.kind == "broadcast":
        names = list(spec.fields or {})
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        return f"{spec.record_dtype.itemsize} B: {shown}"
    shape = (
        "any shape" if spec.shape is None else "[" + ", ".join("?" if n is None else str(n) for n in spec.shape) + "]"
    )
    return f"{spec.dtype or 'any dtype'} {shape}"


def owners(row: Row) -> str:
    """Who has a port open: `name:pid`, with → for who sends, ← for who receives, and † for who is dead."""
    marks = [
        f"{o['name']}:{o['pid']}{'→' * o['sends']}{'←' * o['receives']}{'' if o['alive'] else '†'}"
        for o in row["owners"]
    ]
    return " ".join(marks) or "–"
