"""Cold start and memory of the runtime process, measured from outside in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from sage_edge.errors import SageError
from sage_edge.specs import Array

# What a robot's program does first: import, open, answer one request. Reports its own peak memory.
PROGRAM = """
import sys
import numpy as np
import sage_edge
with np.load(sys.argv[2]) as data, sage_edge.load(sys.argv[1]) as session:
    session.infer({name: data[name] for name in data.files})
print("answered", flush=True)
from sage_edge.device import peak_rss_mib
import json
print(json.dumps({"rss": peak_rss_mib(), "foreign": sorted({"torch", "onnx"} & set(sys.modules))}))
"""


@dataclass(frozen=True)
class ColdStart:
    """Medians over `runs` fresh processes: seconds from the start of Python to the first answer, and peak RSS (MiB)."""

    runs: int
    first_answer_s: float
    slowest_s: float
    peak_rss_mib: float | None


def cold_start(engine: Path, request: dict[str, Array], folder: Path, runs: int = 5) -> ColdStart:
    """Start the runtime `runs` times on an engine that is already built and answer one request (first axis 1)."""
    path = folder / "request.npz"
    np.savez(path, **request)  # type: ignore[arg-type]
    seconds, memory = [], []
    for _ in range(runs):
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(engine), str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        seconds.append(time.perf_counter() - began)
        rest = process.communicate()[0]
        if first.strip() != "answered" or process.returncode:
            raise SageError(f"{engine}: a fresh process could not answer a request (exit code {process.returncode})")
        report = json.loads(rest)
        if report["foreign"]:
            raise SageError(f"the runtime process imported {', '.join(report['foreign'])}: its memory says nothing")
        memory.append(report["rss"])
    known = [m for m in memory if m is not None]
    return ColdStart(runs, median(seconds), max(seconds), median(known) if known else None)
