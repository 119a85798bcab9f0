"""The same step in PyTorch: eager and compiled with CUDA graphs, in each precision. Logits are part of a step, as in the
original evaluation loop (`sage_edge.bench.peers` does the same on the CPU)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import TYPES
from sage_edge.specs import Array

Step = Callable[[], object]


def peers(model: Any, device: str) -> dict[str, Callable[[dict[str, Array]], Step]]:
    """Contestants by name; each takes context and carry of a batch and gives a call that runs one step and waits for it."""
    kinds = list(TYPES) if device == "cuda" else ["fp32"]
    found = {}
    for kind in kinds:
        found[f"PyTorch eager {kind}"] = _peer(model, device, kind, compiled=False)
        if device == "cuda":
            found[f"torch.compile + CUDA graphs {kind}"] = _peer(model, device, kind, compiled=True)
    return found


def _peer(model: Any, device: str, kind: str, compiled: bool) -> Callable[[dict[str, Array]], Step]:
    def start(state: dict[str, Array]) -> Step:
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        own = copy.deepcopy(model).to(device, TYPES[kind]).eval()

        def step(context: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, ...]:
            z_H, z_L, q = own.step(context, z_H, z_L)
            return z_H, z_L, q, own.logits(z_H)

        # "reduce-overhead" is torch's name for CUDA graphs.
        function = torch.compile(step, mode="reduce-overhead", dynamic=False) if compiled else step
        carry = [torch.from_numpy(state[name]).to(device, TYPES[kind]) for name in ("context", "z_H", "z_L")]

        def run() -> object:
            torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
            with torch.inference_mode():
                if compiled:
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                z_H, z_L, q, _ = function(*carry)
                # The loop reads whether to halt after every step; with graphs, outputs live only until the next one.
                carry[1], carry[2] = (z_H.clone(), z_L.clone()) if compiled else (z_H, z_L)
                return q.cpu()

        return run

    return start
