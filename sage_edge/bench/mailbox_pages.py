"""How many pages of memory this process touches, as the MMU saw it: a copy of a payload cannot hide from that.

The kernel clears the accessed bit of every page-table entry on a write to /proc/self/clear_refs, the MMU sets it on the next
access of any kind, and `Referenced` in smaps says who has it set (proc_pid_clear_refs(5), proc_pid_smaps(5)). What the
kernel itself copies into or out of this process's buffers counts too, since it does so through the same entries.
Read-only mappings of files (programs and libraries) are left out: a copy cannot land there, and the kernel reports a page of
theirs as referenced when any other process has used it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
CLEAR = Path("/proc/self/clear_refs")
# address range, permissions, offset, device, inode, path; then `Name: value` lines
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (?P<permissions>\S{4}) \S+ \S+ (?P<inode>\d+) *(?P<path>.*)$")
_REFERENCED = re.compile(r"^Referenced: +(\d+) kB$")
_MEMORY_FILES = ("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV")


class Pages:
    """Counts from here on. Huge pages count as all the small ones they hold."""

    def __init__(self) -> None:
        self.cleared = True
        try:
            CLEAR.write_text("1")
        except OSError:
            self.cleared = False

    def touched(self) -> int | None:
        """Pages touched since; None where this kernel does not say."""
        if not self.cleared:
            return None
        try:
            text = SMAPS.read_text(errors="replace")
        except OSError:
            return None
        return count(text) // os.sysconf("SC_PAGE_SIZE")


def count(smaps: str) -> int:
    """Referenced bytes of all mappings that a copy of a payload could be in."""
    total, counts = 0, False
    for line in smaps.splitlines():
        if found := _MAPPING.match(line):
            library = found["inode"] != "0" and not found["path"].startswith(_MEMORY_FILES)
            counts = "w" in found["permissions"] or not library
        elif counts and (found := _REFERENCED.match(line)):
            total += int(found[1]) * 1024
    return total
