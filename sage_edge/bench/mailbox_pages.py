"""How many pages of memory this process touches, as the MMU saw it: a copy of a payload cannot hide from that.

The kernel clears the accessed bit of every page-table entry on a write to /proc/self/clear_refs, the MMU sets it on the next
access of any kind, and `Referenced` in smaps_rollup adds up who has it set (proc_pid_clear_refs(5), proc_pid_smaps(5)). What the
kernel itself copies into or out of this process's buffers counts too, since it does so through the same entries.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

ROLLUP = Path("/proc/self/smaps_rollup")
CLEAR = Path("/proc/self/clear_refs")


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
            found = re.search(r"^Referenced:\s*(\d+) kB", ROLLUP.read_text(), re.M)
        except OSError:
            return None
        return int(found.group(1)) * 1024 // os.sysconf("SC_PAGE_SIZE") if found else None
