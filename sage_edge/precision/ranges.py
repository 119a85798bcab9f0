"""How large the activations of the fp32 model become, over real observations and every recursion step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from sage_edge.bundle import Bundle
from sage_edge.engines.onnx_graph import known_shapes
from sage_edge.engines.ort import open_session
from sage_edge.runtime import batches
from sage_edge.specs import Array

if TYPE_CHECKING:
    import onnxruntime as ort

BATCH = 16


@dataclass(frozen=True)
class Ranges:
    """amax float32 [steps, values]: the largest magnitude of each of `values` at each step, over `items` observations.

    channels: for each value that is [slots, positions, n], float32 [n]: the same for its last axis, over all steps.
    """

    values: tuple[str, ...]
    amax: npt.NDArray[np.float32]
    channels: dict[str, npt.NDArray[np.float32]]
    items: int

    @property
    def largest(self) -> dict[str, float]:
        """The largest magnitude of each value over all steps."""
        return dict(zip(self.values, self.amax.max(axis=0).astype(float).tolist(), strict=True))


def collect_ranges(
    folder: Path, graph: Path, bundle: Bundle, values: Sequence[str], observation: dict[str, Array], threads: int,
    progress: Callable[[int], None] | None = None,
) -> Ranges:  # fmt: skip
    """Run the fp32 bundle in `folder` to its last step over `observation` and keep each value's largest magnitude.

    graph: the refine graph to run, that of the bundle or one with the same values; values: names of float values in it;
    progress is called with the number of observations done.
    """
    names = list(dict.fromkeys(values))
    carry = [spec.name for spec in bundle.model.carry]
    encode = open_session(folder / "encode.onnx", threads, optimize=True, spin=False)
    checked = bundle.model.validate_observation(observation, "calibration data")
    done = 0
    with _watched(graph, names, threads) as (refine, widths):
        sizes = np.zeros((bundle.max_steps, sum(widths)), np.float32)
        for batch in batches(checked, BATCH):
            state = dict(zip([s.name for s in bundle.graphs.encode.outputs], encode.run(None, batch), strict=True))
            for step in range(bundle.max_steps):
                outputs = refine.run(None, state)
                state |= dict(zip(carry, outputs[: len(carry)], strict=True))
                sizes[step] = np.maximum(sizes[step], outputs[-1])
            done += len(next(iter(batch.values())))
            if progress:
                progress(done)
    return _ranges(names, widths, sizes, done)


def collect_encode_ranges(
    folder: Path, bundle: Bundle, values: Sequence[str], observation: dict[str, Array], threads: int
) -> Ranges:
    """The same for float values of the encode graph, which runs once: amax float32 [1, values]."""
    names = list(dict.fromkeys(values))
    checked = bundle.model.validate_observation(observation, "calibration data")
    with _watched(folder / "encode.onnx", names, threads) as (encode, widths):
        found = [encode.run(["ranges/all"], batch)[0] for batch in batches(checked, BATCH)]
    return _ranges(names, widths, np.max(found, axis=0, keepdims=True), len(next(iter(checked.values()))))


@contextmanager
def _watched(graph: Path, names: Sequence[str], threads: int) -> Iterator[tuple[ort.InferenceSession, list[int]]]:
    """A session of `graph` that also gives the sizes of values (`_watch`), and how many numbers each takes there."""
    model = onnx.load(str(graph), load_external_data=False)
    widths = _watch(model, names)
    with TemporaryDirectory(prefix="sage-edge-ranges-") as temporary:
        path = Path(temporary) / graph.name
        onnx.save(model, str(path))
        yield open_session(path, threads, optimize=True), widths


def _ranges(names: Sequence[str], widths: Sequence[int], sizes: npt.NDArray[np.float32], items: int) -> Ranges:
    """sizes: float32 [steps, numbers of all values], as `_watch` gives them."""
    edges = np.cumsum([0, *widths])
    parts = [sizes[:, edges[i] : edges[i + 1]] for i in range(len(names))]
    channels = {name: part.max(axis=0) for name, part in zip(names, parts, strict=True) if part.shape[1] > 1}
    return Ranges(tuple(names), np.stack([part.max(axis=1) for part in parts], axis=1), channels, items)


def _watch(model: onnx.ModelProto, names: Sequence[str]) -> list[int]:
    """Add one output to `model`: the largest magnitudes, float32, of each value's channels, or of the value as a whole.

    Returns how many numbers each value takes there.
    """
    graph = model.graph
    known = known_shapes(model)
    graph.initializer.extend([
        numpy_helper.from_array(np.array([-1], np.int64), "ranges/flat"),
        numpy_helper.from_array(np.array([0, 1], np.int64), "ranges/rows"),
    ])  # fmt: skip
    widths = []
    for name in names:
        shape = known.get(name, ())
        by_channel = len(shape) == 3 and isinstance(shape[-1], int)
        widths.append(int(shape[-1]) if by_channel else 1)
        axes = ["ranges/rows"] if by_channel else []
        graph.node.extend([
            helper.make_node("Abs", [name], [f"{name}/abs"]),
            helper.make_node("ReduceMax", [f"{name}/abs", *axes], [f"{name}/amax"], keepdims=0),
            helper.make_node("Reshape", [f"{name}/amax", "ranges/flat"], [f"{name}/sizes"]),
        ])  # fmt: skip
    graph.node.append(helper.make_node("Concat", [f"{name}/sizes" for name in names], ["ranges/all"], axis=0))
    graph.output.append(helper.make_tensor_value_info("ranges/all", TensorProto.FLOAT, [sum(widths)]))
    return widths
