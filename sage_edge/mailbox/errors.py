"""What can go wrong at a port. Each error says which port, what was found, and what to do."""

from __future__ import annotations

from sage_edge.errors import InputError, RefusedError, SageError


class MismatchError(InputError):
    """The port in memory and the one that was asked for differ (layout version, kind, spec); both sides are shown.

    `found`: the spec in memory, canonical JSON; empty when the difference lies elsewhere.
    """

    def __init__(self, message: str, found: str = "") -> None:
        super().__init__(message)
        self.found = found


class FullError(RefusedError):
    """No slot could be loaned: reason "full" (no slot free), "cap" (this producer has its share) or "trust" (all that waits
    is trusted more). Raised at once or, with the policy `block`, after the timeout."""


class ClosedError(SageError):
    """The port is closed here, was removed, or was opened before a fork. Open it again."""


class StaleError(SageError):
    """A descriptor, loan or item whose slot has moved on: what it names is gone. Never somebody else's data."""

    exit_code = 1


class ViewsAliveWarning(RuntimeWarning):
    """An array of an item or loan is still referenced after release or send.

    Of an item: the slot stays held until the last reference is gone. Of a loan: the array becomes read-only, but slices that
    were taken before stay writable, and a write through one would be seen by the receiver. Delete such names first, or make
    it an error: `warnings.filterwarnings("error", category=ViewsAliveWarning)`.
    """
