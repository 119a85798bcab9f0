"""The errors that a user may meet. Each says what happened, where, and what to do; the CLI turns them into exit codes."""

from __future__ import annotations


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
