"""The errors that a user may meet. Each says what happened, where, and what to do; the CLI turns them into exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SageError(Exception):
    """Base of all errors that sage-edge raises on purpose. The CLI prints the message and exits with `exit_code`."""

    exit_code = 2


class InputError(SageError):
    """A file, a field or an argument is not what was expected (exit code 2)."""


class IntegrityError(InputError):
    """A file does not match the digest or the format that its manifest promises (exit code 2)."""


class GateError(SageError):
    """A gate or a check refused a model (exit code 1)."""

    exit_code = 1


class MissingDependencyError(SageError):
    """An optional part is needed; the message names the extra that brings it (exit code 2)."""


class EngineError(SageError):
    """The engine failed while it worked on this request, or gave NaN (exit code 1); others are not affected."""

    exit_code = 1


class DeviceLostError(EngineError):
    """The device is lost to this process: every further call fails, only a new process helps (exit code 3)."""

    exit_code = 3


class RefusedError(SageError):
    """A request got no answer, for a reason that is not in its input (exit code 1).

    reason: "queue_full", "dropped" (a full queue made room for a newer one), "cancelled", or "deadline" (it passed before
    the first step, so that there is no best-so-far answer).
    """

    exit_code = 1

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@contextmanager
def one_line_errors() -> Iterator[None]:
    """For the main function of a script outside the CLI: a user's error ends it with one line and exit code 1."""
    try:
        yield
    except SageError as error:
        raise SystemExit(f"error: {error}") from error
