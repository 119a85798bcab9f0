"""A namespace of ports: private directories in shared memory, and the way to open, list, watch and remove ports."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sage_edge.errors import InputError, MissingDependencyError
from sage_edge.mailbox import layout
from sage_edge.mailbox.errors import MismatchError
from sage_edge.mailbox.memory import memory_kind
from sage_edge.mailbox.spec import PortSpec, PortTable, check_name, explain_difference, load_ports

try:
    from sage_edge.mailbox import _native
except ImportError as error:
    raise MissingDependencyError(
        f"sage_edge.mailbox._native is not built for this Python ({error}); "
        "`pip install .` builds it, `make native` builds it in a source tree"
    ) from error

from sage_edge.mailbox.ports import BroadcastPort, FocusPort
from sage_edge.mailbox.view import PortStats, PortView, Tap

DEFAULT_SPIN_US = 20.0


def root() -> Path:
    """The user's directory of namespaces: $SAGE_EDGE_SHM or /dev/shm/sage-edge-UID."""
    return Path(os.environ.get("SAGE_EDGE_SHM") or f"/dev/shm/sage-edge-{os.geteuid()}")


class Mailbox:
    """The ports of one namespace. `ports`: a ports.yaml or its table; without it, `spec` is needed to open a port.

    Raises InputError for a bad name or table, and when a directory belongs to somebody else or others may enter it.
    """

    def __init__(self, namespace: str = "default", ports: Path | str | PortTable | None = None) -> None:
        self.namespace = _checked(namespace)
        self.table = ports if isinstance(ports, PortTable) or ports is None else load_ports(ports)

    @property
    def directory(self) -> Path:
        return root() / self.namespace

    def focus(self, name: str, spec: PortSpec | None = None, *, spin_us: float = DEFAULT_SPIN_US) -> FocusPort:
        """Open the focus port `name`, creating it if absent. spin_us: how long a wait spins before it sleeps (inf: always).

        Raises InputError for an unknown port, MismatchError when the port in memory is another one, MissingDependencyError
        when this machine does not have its kind of memory.
        """
        spec = self._spec(name, spec, "focus")
        kind = memory_kind(spec.memory)
        page = layout.HUGE_PAGE if spec.hugepages else layout.PAGE
        arguments = {
            "slots": spec.depth, "rings": 0, "slot_bytes": layout.round_up(spec.slot_bytes, page), "record_bytes": 0,
            "policy": layout.POLICIES[spec.policy], "per_producer": spec.per_producer,
            "ttl_us": round((spec.ttl_ms or 0) * 1000), "shape": spec.shape,
            "dtype": None if spec.dtype is None else np.dtype(spec.dtype),
        }  # fmt: skip
        with self._opening(name, spec, arguments) as complete:
            return FocusPort(complete, spec, self.directory, spin_us, kind)
        raise AssertionError("_opening does not swallow errors")

    def broadcast(self, name: str, spec: PortSpec | None = None, *, spin_us: float = DEFAULT_SPIN_US) -> BroadcastPort:
        """Open the broadcast port `name`, as `focus` does. A reader begins with what is sent from now on."""
        spec = self._spec(name, spec, "broadcast")
        if spec.memory != "shm":
            raise InputError(f"port {name!r}: memory {spec.memory}: broadcast ports have memory: shm")
        size = spec.record_dtype.itemsize
        arguments = {
            "slots": layout.ring_cells(spec.depth), "rings": spec.producers, "slot_bytes": layout.cell_bytes(size),
            "record_bytes": size, "policy": 0, "per_producer": 0, "ttl_us": 0, "dtype": spec.record_dtype,
        }  # fmt: skip
        with self._opening(name, spec, arguments) as complete:
            return BroadcastPort(complete, spec, self.directory, spin_us)
        raise AssertionError("_opening does not swallow errors")

    def names(self) -> list[str]:
        """The ports that exist in memory now, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.directory) if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def view(self, name: str) -> PortView:
        """A read-only look at a port: statistics and tap from one mapping. Raises InputError, MismatchError."""
        _checked(name)
        with self._directory(create=False) as directory:
            return PortView(_native.Observer(directory, name), name)

    def stats(self, name: str) -> PortStats:
        return self.view(name).stats()

    def tap(self, name: str) -> Tap:
        return self.view(name).tap()

    def remove(self, name: str) -> None:
        """Remove a port. Who has it open gets ClosedError at the next operation. A damaged file is unlinked."""
        _checked(name)
        with self._directory(create=False) as directory:
            try:
                _native.remove_port(directory, name)
            except MismatchError:
                os.unlink(name, dir_fd=directory)
            for leftover in os.listdir(directory):
                # A name may hold dots: what comes after it must be an index and an identity, or it is another port's.
                fifo = re.fullmatch(rf"\.wait\.{re.escape(name)}\.\d+\.[0-9a-f]+", leftover)
                if fifo or leftover.startswith(f".exchange.{name}@"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(leftover, dir_fd=directory)

    @staticmethod
    def namespaces() -> list[str]:
        """All namespaces of this user, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(root()) if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def _spec(self, name: str, spec: PortSpec | None, kind: str) -> PortSpec:
        _checked(name)
        if spec is None:
            if self.table is None:
                raise InputError(f"port {name!r}: no table of ports was given; pass ports= to Mailbox, or spec= here")
            spec = self.table.spec(name)
        if spec.kind != kind:
            raise InputError(f"port {name!r}: is a {spec.kind} port; open it with {spec.kind}()")
        return spec

    @contextlib.contextmanager
    def _opening(self, name: str, spec: PortSpec, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._directory(create=True) as directory:
            try:
                yield {
                    **arguments, "directory": directory, "name": name, "spec": spec.canonical(), "label": _label(),
                    "kind": layout.KINDS[spec.kind], "memory": layout.MEMORIES[spec.memory],
                    "flags": layout.FLAG_HUGE_PAGES if spec.hugepages else 0,
                }  # fmt: skip
            except MismatchError as error:
                if error.found:
                    difference = explain_difference(error.found, spec.canonical())
                    raise MismatchError(
                        f"{error}: {difference}\n  in memory: {error.found}\n  asked for: {spec.canonical()}\n"
                        f"change one of them, or remove the port (sage-edge mailbox rm {name})",
                        error.found,
                    ) from None
                raise

    @contextlib.contextmanager
    def _directory(self, create: bool) -> Iterator[int]:
        """The namespace's directory as a descriptor; every step on the way is ours alone and no link."""
        outer = _private_directory(None, str(root()), create)
        try:
            inner = _private_directory(outer, self.namespace, create)
        finally:
            os.close(outer)
        try:
            yield inner
        finally:
            os.close(inner)


def _private_directory(parent: int | None, name: str, create: bool) -> int:
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such directory; there are no ports here yet") from error
    except OSError as error:
        raise InputError(f"{name}: not a directory that can be used for ports: {error.strerror}") from error
    info = os.fstat(directory)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        os.close(directory)
        raise InputError(
            f"{name}: expected a directory of user {os.geteuid()} with permissions 0700, found user {info.st_uid}, "
            f"permissions {stat.S_IMODE(info.st_mode):04o}; remove it, or set SAGE_EDGE_SHM to another"
        )
    return directory


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise InputError(str(error)) from error


def _label() -> str:
    """What others see as this process's name: the script or module, at most 31 bytes."""
    return (
        Path(sys.argv[0] if sys.argv else "").name.encode("utf-8", "replace")[:31].decode("utf-8", "ignore") or "python"
    )
