"""Channels of one activation brought to one size, at no cost and without changing the model.

One scale for a whole activation serves badly when a few channels are much larger than the others. Where a channel comes
out of a product, unmixed, and goes into the next, its size is a free choice: columns of the first weight divided by s, rows
of the second multiplied by s. That holds for the values of an attention (softmax(qk) v, then o_proj) and for the `up` half
of a SwiGLU (silu(gate) * up, then down_proj). Cross-layer equalisation (arXiv 1906.04721) with SmoothQuant's balance between
activations and weights (arXiv 2211.10438, eq. 4). Every s is a power of two, so that the float32 model stays the same bit
for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, numpy_helper

from sage_edge.engines.onnx_graph import Graph, attribute, is_standard
from sage_edge.precision.layers import Layer

# Share of the spread that the weights take over; 0.75 was best for both SwiGLU and attention values of sudoku9.
BALANCE = 0.75
# Beyond this a channel that hardly speaks would be blown up: 2^±6 covers what trained models show.
LARGEST_SHIFT = 6


@dataclass(frozen=True)
class Pair:
    """Columns `first` .. `first` + inner of `producer`'s weight become the input channels of `consumer`."""

    producer: str
    first: int
    consumer: Layer


def find_pairs(model: onnx.ModelProto, layers: tuple[Layer, ...]) -> tuple[Pair, ...]:
    """The layers of `model` whose input channels come unmixed out of another product, alike in all its uses."""
    graph = Graph(model)
    pairs = []
    for layer in (x for x in layers if not x.is_convolution):
        sources = {_source(graph, name, layer.shape[0]) for name in layer.inputs}
        source = sources.pop() if len(sources) == 1 else None
        if source is not None:
            pairs.append(Pair(*source, layer))
    # A weight whose columns feed several consumers cannot follow them all; each part may serve one.
    claims = [(p.producer, p.first) for p in pairs]
    return tuple(p for p in pairs if claims.count((p.producer, p.first)) == 1 and _only_use(graph, p))


def equalise(model: onnx.ModelProto, pairs: tuple[Pair, ...], channels: Mapping[str, npt.NDArray[np.float32]]) -> (
    dict[str, npt.NDArray[np.float32]]
):  # fmt: skip
    """Rescale the weights of `pairs` in `model`, in place. Returns the largest magnitudes of the channels afterwards.

    channels: for each input of a consumer, float32 [inner], the largest magnitude of each channel over real traces.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    result: dict[str, npt.NDArray[np.float32]] = {}
    for pair in pairs:
        layer = pair.consumer
        consumer = numpy_helper.to_array(tensors[layer.weight])
        producer = numpy_helper.to_array(tensors[pair.producer]).copy()
        sizes = np.max([channels[name] for name in layer.inputs], axis=0)
        factor = _factors(sizes, np.abs(consumer).max(axis=1))
        columns = slice(pair.first, pair.first + layer.shape[0])
        producer[:, columns] /= factor
        for name, array in ((layer.weight, consumer * factor[:, None]), (pair.producer, producer)):
            tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        result.update({name: np.asarray(channels[name] / factor, np.float32) for name in layer.inputs})
    return result


def _factors(sizes: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Powers of two [inner] to divide channels of these sizes by; 1 for channels that are always zero."""
    with np.errstate(divide="ignore"):
        wanted = BALANCE * np.log2(sizes) - (1 - BALANCE) * np.log2(weights)
    speaks = np.isfinite(wanted)
    if not speaks.any():
        return np.ones_like(sizes)
    # Around the middle channel, so that the activation keeps its size as a whole.
    shift = np.rint(np.where(speaks, wanted - np.median(wanted[speaks]), 0.0))
    return np.asarray(np.exp2(np.clip(shift, -LARGEST_SHIFT, LARGEST_SHIFT)), np.float32)


def _source(graph: Graph, name: str, inner: int) -> tuple[str, int] | None:
    """The weight and first column that the channels of `name` come from, or None."""
    gated = graph.made(name, "Mul")
    if gated is not None:
        for value, other in (tuple(gated.input), tuple(gated.input)[::-1]):
            # The gate is not linear in its own part: only the other factor's size is free.
            if value not in graph.constants and not graph.made(value, "Mul") and graph.made(other, "Mul"):
                return _part(graph, value, inner)
        return None
    joined = graph.made(name, "Reshape")
    turned = graph.made(joined.input[0], "Transpose") if joined is not None else None
    product = graph.made(turned.input[0], "MatMul") if turned is not None else None
    if product is None or graph.made(product.input[0], "Softmax") is None:
        return None
    heads = graph.made(product.input[1], "Transpose")
    split = graph.made(heads.input[0], "Reshape") if heads is not None else None
    if (
        split is None
        or heads is None
        or turned is None
        or attribute(turned, "perm", None) != attribute(heads, "perm", None)
    ):
        return None
    return _part(graph, split.input[0], inner)


def _part(graph: Graph, name: str, inner: int) -> tuple[str, int] | None:
    """`name` as one of the equal parts of x @ W: the weight and the part's first column."""
    split = graph.made(name, "Split")
    product = graph.made(split.input[0], "MatMul") if split is not None else None
    weight = graph.array(product.input[1]) if product is not None else None
    if split is None or product is None or weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return None
    if weight.shape[1] != inner * len(split.output) or attribute(split, "axis", 0) not in (-1, 2):
        return None
    return product.input[1], list(split.output).index(name) * inner


def _only_use(graph: Graph, pair: Pair) -> bool:
    """Whether every product with the producer's weight is split, and this part of it is read exactly once."""
    for product in graph.readers[pair.producer]:
        readers = graph.readers.get(product.output[0], [])
        if not is_standard(product, "MatMul") or len(readers) != 1 or not is_standard(readers[0], "Split"):
            return False
        if not _read_once(graph, readers[0], pair.first // pair.consumer.shape[0]):
            return False
    return True


def _read_once(graph: Graph, split: NodeProto, part: int) -> bool:
    name = split.output[part]
    return graph.reads[name] == 1 and name not in graph.outputs
