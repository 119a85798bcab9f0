"""`--device this`: the ceilings of this machine's CPU, measured, and a step beside what they predict."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sage_edge.bench.ceiling import gemm_ceiling
from sage_edge.bench.roofline import Ceilings
from sage_edge.bench.timing import Latency, interleave
from sage_edge.engines.runner import Runner

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
COPIED = 256 << 20  # bytes; several times the last cache of a server


def machine_ceilings(threads: int, seconds: float = 1.0) -> Ceilings:
    """Measured: best fp32 GEMM, memory traffic of a copy; read: the last cache. About 4 * `seconds`."""
    gflops = gemm_ceiling(threads, seconds)
    return Ceilings(
        tflops={"fp32": gflops / 1e3},
        dram_gbs=copy_ceiling(threads, seconds),
        l2_mib=last_cache_mib(CACHES),
        source=f"measured on this CPU with {threads} threads: ONNX Runtime's best fp32 MatMul, and a copy of {COPIED >> 20} MiB",
    )


def copy_ceiling(threads: int, seconds: float = 1.0) -> float:
    """GB/s of reading and writing memory: the fastest of several copies, in `threads` pieces at once."""
    source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    pieces = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    fastest = np.inf
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            start = time.perf_counter()
            list(pool.map(lambda piece: np.copyto(*piece), pieces))  # NumPy lets go of the interpreter while it copies
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * COPIED / fastest / 1e9


def last_cache_mib(folder: Path) -> float | None:
    """Size of the CPU's largest cache, MiB, from sysfs; None where the kernel does not say."""
    sizes = []
    for path in folder.glob("index*/size"):
        try:
            found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        except OSError:
            continue
        if found:
            sizes.append(int(found.group(1)) / (1024 if found.group(2) == "K" else 1))
    return max(sizes, default=None)


def measure_step(runner: Runner, slots: int, seconds: float) -> Latency:
    """Latency of one refinement step of an active runner with `slots` slots in use."""
    state = runner.encode(runner.model.random_observation(slots))
    return interleave({"step": lambda: runner.refine(state)}, seconds)["step"]
