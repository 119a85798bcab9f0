"""The mailbox: processes of one machine hand each other tensors and records through shared memory, without copies.

    from sage_edge.mailbox import Mailbox

    mailbox = Mailbox("robot", "ports.yaml")           # a namespace and its table of ports

    with mailbox.focus("camera") as port:              # producer
        with port.loan() as t:                         # a slot, shape and dtype from the table
            t.array[:] = frame                         # written in place
            t.send(trust=0.9)

    with mailbox.focus("camera") as port:              # consumer, another process
        for item in port:
            with item:
                use(item.array)                        # the very bytes the producer wrote

`mailbox/LAYOUT.md` in the repository fixes the bytes; `docs/mailbox.md` is the user's page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "BroadcastPort",
    "ClosedError",
    "FocusPort",
    "FullError",
    "Item",
    "Loan",
    "Mailbox",
    "MismatchError",
    "PortSpec",
    "PortStats",
    "PortTable",
    "Record",
    "StaleError",
    "Tap",
    "ViewsAliveWarning",
    "load_ports",
]

_HOME = {
    "BroadcastPort": "ports", "FocusPort": "ports", "Item": "_native", "Loan": "_native", "Record": "_native",
    "Mailbox": "namespace", "PortSpec": "spec", "PortTable": "spec", "load_ports": "spec", "PortStats": "view", "Tap": "view",
    "ClosedError": "errors", "FullError": "errors", "MismatchError": "errors", "StaleError": "errors",
    "ViewsAliveWarning": "errors",
}  # fmt: skip

if TYPE_CHECKING:
    from sage_edge.mailbox._native import Item, Loan, Record
    from sage_edge.mailbox.errors import ClosedError, FullError, MismatchError, StaleError, ViewsAliveWarning
    from sage_edge.mailbox.namespace import Mailbox
    from sage_edge.mailbox.ports import BroadcastPort, FocusPort
    from sage_edge.mailbox.spec import PortSpec, PortTable, load_ports
    from sage_edge.mailbox.view import PortStats, Tap


def __getattr__(name: str) -> Any:
    """Import on first use: reading a ports.yaml needs no compiled code."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"sage_edge.mailbox.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sage_edge.mailbox' has no attribute {name!r}")
