"""Memory kinds: where the payloads lie, and who sees them. Chosen once per machine, probed at run time.

A kind is a class with the methods of `MemoryKind`. `shm` is here; others register themselves in `KINDS` under their name, keep
what LAYOUT.md section 9 demands, and import CUDA only inside `probe` and `attach`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sage_edge.errors import MissingDependencyError

if TYPE_CHECKING:
    from sage_edge.mailbox.ports import FocusPort

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class MemoryKind(Protocol):
    """What a kind of memory does for a port that was opened with it."""

    name: str

    def probe(self) -> str | None:
        """None when this machine has it, else the reason why not (one line)."""

    def attach(self, port: FocusPort) -> None:
        """Called once after the port's file was mapped: make the payload visible (set `port.device_base`), or raise."""

    def detach(self, port: FocusPort) -> None:
        """Called before the port's file is unmapped."""


class SharedMemory:
    """POSIX shared memory, seen by the CPU. Everywhere; huge pages where the kernel allows them."""

    name = "shm"

    def probe(self) -> str | None:
        return None if Path("/dev/shm").is_dir() else "/dev/shm does not exist"

    def attach(self, port: FocusPort) -> None:
        """The mapping is the memory: nothing to do."""

    def detach(self, port: FocusPort) -> None:
        """Nothing was attached."""


# name → module:class; a module is imported only when its kind is asked for
KINDS: dict[str, str] = {
    "shm": "sage_edge.mailbox.memory:SharedMemory",
    "shm+cuda": "sage_edge.mailbox.devices:RegisteredMemory",
    "vmm": "sage_edge.mailbox.devices:VmmMemory",
}


def memory_kind(name: str) -> MemoryKind:
    """The kind `name`, probed. Raises MissingDependencyError when this machine or this version does not have it."""
    if name not in KINDS:
        raise MissingDependencyError(f"memory {name!r}: not in this version; it has {', '.join(KINDS)}")
    module, _, attribute = KINDS[name].partition(":")
    kind: MemoryKind = getattr(importlib.import_module(module), attribute)()
    if reason := kind.probe():
        raise MissingDependencyError(f"memory {name!r}: {reason}; use memory: shm")
    return kind


def huge_pages_state() -> str | None:
    """What the kernel does for shared memory that asks for huge pages: always, within_size, advise, never, deny or force.

    None where it does not say.
    """
    try:
        text = SHMEM_ENABLED.read_text(encoding="ascii")
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None
