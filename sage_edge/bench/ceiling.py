"""The machine's measured GEMM ceiling, beside which a latency can be judged."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sage_edge.engines.ort import open_session

# Large enough to be bound by arithmetic, small enough for the last-level cache of an edge CPU.
SHAPES = ((512, 1024, 1024), (1024, 1024, 1024), (656, 512, 3072))


def gemm_ceiling(threads: int, seconds: float = 1.0) -> float:
    """Best fp32 GFLOP/s of ONNX Runtime's MatMul with constant weights over a few shapes, `seconds` each."""
    best = 0.0
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as folder:
        for rows, inner, columns in SHAPES:
            weight = numpy_helper.from_array(rng.standard_normal((inner, columns), np.float32), "w")
            graph = helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["y"])], "gemm",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inner])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])], [weight],
            )  # fmt: skip
            path = Path(folder) / "gemm.onnx"
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), str(path))
            session = open_session(path, threads, optimize=True)
            feeds = {"x": rng.standard_normal((rows, inner), np.float32)}
            session.run(None, feeds)
            began, fastest = time.perf_counter(), np.inf
            while time.perf_counter() - began < seconds:
                start = time.perf_counter()
                session.run(None, feeds)
                fastest = min(fastest, time.perf_counter() - start)
            best = max(best, 2 * rows * inner * columns / fastest / 1e9)
    return best
