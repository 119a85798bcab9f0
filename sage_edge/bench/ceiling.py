"""The machine's measured GEMM ceiling and how much arithmetic a step needs, so that a latency can be judged."""

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


def matmul_gflop(graph_file: Path, slots: int) -> float:
    """GFLOP of all MatMul and Gemm nodes of a graph at `slots` slots; elementwise work is not counted."""
    model = onnx.load(str(graph_file), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = slots
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    total = 0
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            inner = shapes[node.input[0]][-1]
            total += 2 * inner * int(np.prod(shapes[node.output[0]]))
    return total / 1e9
