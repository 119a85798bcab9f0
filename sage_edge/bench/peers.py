"""Other ways to run the same weights on the same inputs: eager PyTorch (fp32, bf16), torch.compile, OpenVINO.

Each peer is a function that takes (context, z_H, z_L) of a batch and returns a call that runs one step, logits included,
as the original evaluation loop does. Only this module of the bench imports torch, and only when peers are asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sage_edge.device import version
from sage_edge.specs import Array

Step = Callable[[], object]
Peer = Callable[[dict[str, Array]], Step]


def available() -> dict[str, str]:
    """Installed peers and their versions."""
    found = {name: version(name) for name in ("torch", "openvino")}
    return {name: text for name, text in found.items() if text and importlib.util.find_spec(name)}


def torch_peers(model: Any, threads: int, compiled: bool) -> dict[str, Peer]:
    """Eager and (with a C++ compiler at hand) compiled peers of a torch HRM, in inference mode."""
    import torch

    torch.set_num_threads(threads)

    def step(context: Any, z_H: Any, z_L: Any) -> Any:
        z_H, z_L, q = model.step(context, z_H, z_L)
        return z_H, z_L, q, model.logits(z_H)

    def peer(function: Any) -> Peer:
        def start(state: dict[str, Array]) -> Step:
            carry = [torch.from_numpy(state[name]) for name in ("context", "z_H", "z_L")]

            def run() -> object:
                with torch.inference_mode():
                    carry[1], carry[2], *_ = function(*carry)
                return carry

            return run

        return start

    peers = {"PyTorch eager": peer(step)}
    # The original code's default: bfloat16 arithmetic, with the fp32 weights cast anew in every call.
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
    peers["PyTorch eager bf16"] = peer(autocast(step))
    if compiled:
        peers["torch.compile"] = peer(torch.compile(step))
    return peers


def openvino_peer(bundle: Path, threads: int) -> dict[str, Peer]:
    """OpenVINO on the bundle's own refine graph, fp32, tuned for latency."""
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(str(bundle / "refine.onnx"), "CPU", settings)

    def start(state: dict[str, Array]) -> Step:
        request = compiled.create_infer_request()
        inputs = {name: openvino.Tensor(array, shared_memory=True) for name, array in state.items()}

        def run() -> object:
            request.infer(inputs, share_inputs=True)
            for port, name in ((0, "z_H"), (1, "z_L")):
                inputs[name] = openvino.Tensor(request.get_output_tensor(port).data.copy())
            return request

        return run

    return {"OpenVINO": start}
