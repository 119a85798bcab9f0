"""What every report of the bench begins with: what ran, where, on what."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sage_edge import __version__
from sage_edge.device import machine


def header(case: str, threads: int, versions: dict[str, str | None]) -> dict[str, Any]:
    """case: what is measured. threads: that may compute. versions: of the distributions that are measured."""
    return {
        "case": case, "command": "sage-edge " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(),
        "machine": asdict(machine()), "threads": threads, "python": platform.python_version(),
        "versions": {"sage-edge": __version__, **versions},
    }  # fmt: skip


def commit() -> str | None:
    """Commit of the sage-edge source tree this runs from, with `+` when it has changes; None outside of one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # An installation inside somebody else's repository must not report that repository's commit.
        if not (Path(git("rev-parse", "--show-toplevel")) / "sage_edge" / "bench" / Path(__file__).name).is_file():
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
