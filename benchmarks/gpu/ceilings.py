"""The ceilings of a device as torch reaches them: products of each type, and a copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from sage_edge.bench.roofline import Ceilings

SIZE = 4096  # of a square product: large enough for every GPU, 2 * 4096 ** 3 operations
SMALL = 512  # on a CPU
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def seconds_of(work: Callable[[], object], device: str, budget: float) -> float:
    """The fastest of as many runs as fit into `budget` seconds, by the device's own clock where it has one."""
    for _ in range(3):
        work()
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < budget:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            end.synchronize()
            fastest = min(fastest, start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            work()
            fastest = min(fastest, time.perf_counter() - before)
    return fastest


def _product(size: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def device_ceilings(device: str, budget: float = 0.5) -> Ceilings:
    """Measured dense TFLOP/s by type and GB/s; the L2 as CUDA says it. About three seconds."""
    size = SIZE if device == "cuda" else SMALL
    tflops = {}
    for name, dtype in TYPES.items():
        if device != "cuda" and name != "fp32":
            continue
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        tflops[name] = 2 * size**3 / seconds_of(_product(size, device, dtype), device, budget) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    block = torch.empty((1 << 30 if device == "cuda" else 1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    rate = 2 * block.numel() / seconds_of(lambda: target.copy_(block), device, budget) / 1e9
    l2 = torch.cuda.get_device_properties(0).L2_cache_size / (1 << 20) if device == "cuda" else None
    source = f"measured with torch {torch.__version__}: best of products {size} x {size}, and of a copy"
    return Ceilings(tflops, rate, l2, source)
