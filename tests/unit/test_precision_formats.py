"""Codes and scales: against ONNX Runtime's own Q/DQ, over all codes, and by properties."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from sage_edge.precision.formats import (
    FP8_MAX,
    INT8_MAX,
    SMALLEST_SCALE,
    dequantise,
    encode_fp8,
    fp8_values,
    largest,
    quantise,
    scale_for,
)  # fmt: skip
from sage_edge.precision.rewrite import is_int8_weight, quantise_weight

finite = st.floats(-1e4, 1e4, width=32)


def runtime_round_trip(values: np.ndarray, scale: float, dtype: int) -> np.ndarray:
    """ONNX Runtime's QuantizeLinear and DequantizeLinear of opset 19."""
    zero = helper.make_tensor("zero", dtype, [], b"\0", raw=True)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
         helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"])],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [numpy_helper.from_array(np.float32(scale), "scale"), zero],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": values})[0])


def test_the_values_of_e4m3fn() -> None:
    values = fp8_values()
    assert values[0x7E] == FP8_MAX == np.nanmax(values)
    assert values[0x01] == 2.0**-9  # the smallest subnormal
    assert values[0x08] == 2.0**-6  # the smallest normal
    assert values[0x38] == 1.0
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    assert np.isfinite(np.delete(values, [0x7F, 0xFF])).all()
    np.testing.assert_array_equal(values[0x80:0xFF], -values[:0x7F])


def test_every_finite_code_of_fp8_is_its_own_nearest() -> None:
    codes = np.array([c for c in range(256) if c not in (0x7F, 0xFF)], np.uint8)
    np.testing.assert_array_equal(encode_fp8(fp8_values()[codes]), codes)


@given(arrays(np.float32, 64, elements=finite))
def test_fp8_rounds_as_onnx_runtime_does(values: np.ndarray) -> None:
    ours = dequantise(quantise(values, 0.5, "fp8"), 0.5, "fp8")
    np.testing.assert_array_equal(ours, runtime_round_trip(values, 0.5, TensorProto.FLOAT8E4M3FN))


def test_fp8_ties_go_to_even_and_large_values_saturate() -> None:
    table = fp8_values()[:127]
    middles = ((table[:-1].astype(np.float64) + table[1:]) / 2).astype(np.float32)
    codes = encode_fp8(middles)
    assert (codes % 2 == 0).all()
    assert encode_fp8(np.array([1e30, -1e30, np.inf], np.float32)).tolist() == [0x7E, 0xFE, 0x7E]


@given(arrays(np.float32, 64, elements=finite))
def test_int8_rounds_as_onnx_runtime_does(values: np.ndarray) -> None:
    scale = scale_for(float(np.abs(values).max()), "int8")
    ours = dequantise(quantise(values, scale, "int8"), scale, "int8")
    theirs = runtime_round_trip(values, scale, TensorProto.INT8)
    # -128 is the one code that ours leaves out.
    np.testing.assert_array_equal(ours, np.maximum(theirs, -INT8_MAX * np.float32(scale)))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@given(amax=st.floats(0, 1e6))
def test_a_scale_is_a_float16_that_just_covers_the_range(kind: Literal["int8", "fp8"], amax: float) -> None:
    scale = scale_for(amax, kind)
    assert float(np.float16(scale)) == scale
    assert scale >= SMALLEST_SCALE
    if amax > 0:
        assert scale * largest(kind) >= amax * (1 - 2**-11)
    if amax > SMALLEST_SCALE * largest(kind):
        assert scale * largest(kind) <= amax * (1 + 2**-11)


@given(arrays(np.float32, (6, 4), elements=st.floats(-3, 3, width=32)))
def test_quantising_what_the_codes_stand_for_gives_the_codes_again(weight: np.ndarray) -> None:
    """The CPU form quantises a stripped weight anew: it must be the bundle's weight, code for code."""
    codes, scales = quantise_weight(weight, "int8")
    again, scales_again = quantise_weight(dequantise(codes, scales, "int8"), "int8")
    np.testing.assert_array_equal(again, codes)
    speaks = (codes != 0).any(axis=0)
    np.testing.assert_array_equal(scales_again[speaks], scales[speaks])


def test_each_column_of_a_weight_has_its_own_scale() -> None:
    weight = np.array([[1.0, 1000.0], [-0.5, 1.0]], np.float32)
    codes, scales = quantise_weight(weight, "int8")
    assert scales[0] == pytest.approx(1 / 127, rel=1e-3)
    assert scales[1] == pytest.approx(1000 / 127, rel=1e-3)
    assert codes[:, 0].tolist() == [127, -64]


def test_parts_of_an_int8_weight_are_known_by_name() -> None:
    assert is_int8_weight("model.L_level.layers.0.mlp.gate_up_proj.weight/int8")
    assert is_int8_weight("fuse.model.L_level.layers.0.mlp.gate_up_proj.weight/int8.1")
    assert not is_int8_weight("model.L_level.layers.0.mlp.gate_up_proj.weight")
    assert not is_int8_weight("model.L_level.layers.0.mlp.gate_up_proj.weight/fp16")
