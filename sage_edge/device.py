"""Facts about this machine, for manifests, cache keys and reports. A fact that cannot be read is None, never a guess."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The machine at hand. `cpu_features` holds the vector extensions that change how a CPU engine is compiled."""

    architecture: str
    cpu: str | None
    cpu_features: tuple[str, ...]
    cores: int
    memory_mib: int | None
    kernel: str
    jetson: str | None

    @property
    def key(self) -> str:
        """What an engine for this CPU depends on."""
        return f"{self.architecture}/{self.cpu}/{'+'.join(self.cpu_features)}"


VECTOR_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm",
                   "bf16", "sve")  # fmt: skip


def machine() -> Machine:
    info = _read(Path("/proc/cpuinfo")) or ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info, re.M)
    name = re.search(r"^model name\s*:\s*(.*)$", info, re.M)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read(Path("/proc/meminfo")) or "", re.M)
    board = _read(Path("/proc/device-tree/model"))
    present = set(flags.group(1).split()) if flags else set()
    return Machine(
        architecture=platform.machine(),
        cpu=name.group(1).strip() if name else None,
        cpu_features=tuple(f for f in VECTOR_FEATURES if f in present),
        cores=usable_cores(),
        memory_mib=int(memory.group(1)) // 1024 if memory else None,
        kernel=platform.release(),
        jetson=board.strip("\0 \n") if board and "jetson" in board.lower() else None,
    )


def usable_cores() -> int:
    """Cores that this process may run on (affinity and cgroup masks), not those that the board has."""
    return len(os.sched_getaffinity(0))


def version(distribution: str) -> str | None:
    """Installed version of a Python distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def peak_rss_mib() -> float | None:
    """Highest resident memory of this process so far, MiB."""
    match = re.search(r"^VmHWM:\s*(\d+) kB", _read(Path("/proc/self/status")) or "", re.M)
    return int(match.group(1)) / 1024 if match else None


def resident_mib() -> float | None:
    """Resident memory of this process now, MiB (the second field of /proc/self/statm is in pages; proc(5))."""
    text = _read(Path("/proc/self/statm"))
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20) if text else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
