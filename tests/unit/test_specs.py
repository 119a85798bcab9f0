# SPDX-License-Identifier: Apache-2.0
"""Tensor and model specifications: what validate() lets through, what it converts, and what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.errors import InputError
from sage_edge.specs import SLOTS, DType, HRMConfig, ModelSpec, TensorSpec

TOKENS = TensorSpec("tokens", "int32", (SLOTS, 4), 0, 9)
IDENTIFIER = TensorSpec("puzzle_identifiers", "int32", (SLOTS,), 0, 3)
IMAGE = TensorSpec("image", "float32", (SLOTS, 2, 2))
MODEL = ModelSpec((TOKENS, IDENTIFIER), (), (), (), ("q_halt", "q_continue"), 8)
CONFIG = HRMConfig(11, 81, 128, 4, 2, 2, 2, 2, 8)


def complaint(spec: TensorSpec, value: object) -> str:
    with pytest.raises(InputError) as caught:
        spec.validate(value, "request 7")
    assert str(caught.value).startswith(f"request 7: {spec.name!r}")
    return str(caught.value)


@pytest.mark.parametrize(
    "shape", [(), ("slots", 0), ("slots", -1), (4, 4), ("batch", 4), ("slots", "n"), ("slots", 1.5)]
)
def test_a_spec_starts_with_the_slots_and_has_fixed_sizes(shape: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="shape of 't'"):
        TensorSpec("t", "int32", shape)


def test_a_spec_describes_itself() -> None:
    assert TOKENS.describe() == "int32 [slots, 4] with values 0..9"
    assert IMAGE.describe() == "float32 [slots, 2, 2]"
    assert (IMAGE.item_shape, IDENTIFIER.item_shape) == ((2, 2), ())


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int64, np.uint64, ">i4"])
def test_integers_of_any_width_become_the_specs(dtype: Any) -> None:
    checked = TOKENS.validate(np.array([[0, 1, 2, 9]], dtype))
    assert checked.dtype == np.int32
    assert checked.tolist() == [[0, 1, 2, 9]]


def test_lists_are_taken_and_arrays_come_out_contiguous() -> None:
    assert TOKENS.validate([[1, 2, 3, 4]]).dtype == np.int32
    strided = np.arange(24, dtype=np.float64).reshape(2, 2, 6)[:, :, ::3]
    checked = IMAGE.validate(strided)
    assert checked.flags.c_contiguous
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, strided)


def test_an_array_that_fits_is_not_copied() -> None:
    array = np.zeros((3, 2, 2), np.float32)
    assert np.shares_memory(IMAGE.validate(array), array)


@pytest.mark.parametrize(
    ("spec", "value", "expected"),
    [
        (TOKENS, np.zeros((2, 4), np.float32), "expected int32 [slots, 4] with values 0..9, found dtype float32"),
        (TOKENS, np.zeros((2, 4), bool), "found dtype bool"),
        (TOKENS, np.array([["a"] * 4]), "found dtype <U1"),
        (TOKENS, None, "found dtype object"),
        (TOKENS, {"a": 1}, "found dtype object"),
        (IMAGE, np.zeros((1, 2, 2), complex), "found dtype complex128"),
        (TOKENS, np.zeros((2, 5), int), "found shape [2, 5]"),
        (TOKENS, np.zeros(4, int), "found shape [4]"),
        (TOKENS, np.zeros((1, 2, 4), int), "found shape [1, 2, 4]"),
        (IDENTIFIER, np.array(1), "found shape []"),
        (TOKENS, np.zeros((0, 4), int), "holds no request"),
        (TOKENS, np.array([[0, 1, 2, 10]]), "value 10 at [0, 3] is outside 0..9"),
        (TOKENS, np.array([[0, 1, 2, 3], [0, -1, 2, 3]]), "value -1 at [1, 1] is outside 0..9"),
        (TOKENS, np.array([[0, 1, 2, 2**64 - 1]], np.uint64), "value 18446744073709551615 at [0, 3]"),
        (TensorSpec("u", "uint8", (SLOTS,)), np.array([256]), "value 256 at [0] is outside 0..255"),
        (TensorSpec("i", "int32", (SLOTS,)), np.array([2**31]), "is outside -2147483648..2147483647"),
        (IMAGE, np.full((1, 2, 2), np.nan), "holds NaN or Inf"),
        (IMAGE, np.full((1, 2, 2), -np.inf, np.float32), "holds NaN or Inf"),
    ],
)
def test_what_does_not_fit_is_named(spec: TensorSpec, value: object, expected: str) -> None:
    assert expected in complaint(spec, value)


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", np.float64(1e300)), ("float16", np.float32(1e5)), ("float16", np.int32(70000))]
)
def test_a_float_out_of_range_is_refused(dtype: DType, value: Any) -> None:
    with pytest.raises(InputError):
        TensorSpec("x", dtype, (SLOTS,)).validate(np.array([value]))


def test_a_ragged_list_is_refused() -> None:
    complaint(TOKENS, [[1, 2, 3, 4], [1]])


@given(st.lists(st.lists(st.integers(-5, 15), min_size=4, max_size=4), min_size=1, max_size=4))
def test_integers_pass_exactly_when_they_are_in_range(rows: list[list[int]]) -> None:
    if all(0 <= n <= 9 for row in rows for n in row):
        assert TOKENS.validate(np.array(rows)).tolist() == rows
    else:
        assert "is outside 0..9" in complaint(TOKENS, np.array(rows))


def test_an_observation_is_checked_whole_and_comes_in_the_specs_order() -> None:
    tokens, identifiers = np.ones((2, 4), np.int64), np.array([3, 0])
    checked = MODEL.validate_observation({"puzzle_identifiers": identifiers, "tokens": tokens})
    assert list(checked) == ["tokens", "puzzle_identifiers"]
    assert all(array.dtype == np.int32 for array in checked.values())


def test_an_absent_identifier_is_zero() -> None:
    checked = MODEL.validate_observation({"tokens": np.ones((3, 4), np.int32)})
    assert checked["puzzle_identifiers"].tolist() == [0, 0, 0]
    assert checked["puzzle_identifiers"].dtype == np.int32


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({}, "missing array 'tokens'; expected int32 [slots, 4]"),
        ({"puzzle_identifiers": np.zeros(2, int)}, "missing array 'tokens'"),
        (
            {"tokens": np.ones((1, 4), int), "token": np.ones(1)},
            "unknown array 'token'; expected tokens, puzzle_identifiers",
        ),
        (
            {"tokens": np.ones((2, 4), int), "puzzle_identifiers": np.zeros(3, int)},
            "disagree on the number of requests: {'tokens': 2, 'puzzle_identifiers': 3}",
        ),
        ({"tokens": np.full((2, 4), 10)}, "'tokens': value 10 at [0, 0] is outside 0..9"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(arrays: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        MODEL.validate_observation(arrays, "puzzles.npz")
    assert str(caught.value).startswith("puzzles.npz: ")
    assert expected in str(caught.value)


def test_signals_are_found_by_name() -> None:
    assert MODEL.signal("q_continue") == 1
    with pytest.raises(InputError, match="'entropy' is not given by this model; it gives q_halt, q_continue"):
        MODEL.signal("entropy")


@pytest.mark.parametrize(("ndim", "prefix"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (300, 3)])
def test_the_puzzle_prefix_is_rounded_up(ndim: int, prefix: int) -> None:
    config = dataclasses.replace(CONFIG, puzzle_emb_ndim=ndim)
    assert (config.prefix, config.positions) == (prefix, prefix + 81)


@pytest.mark.parametrize(
    "change",
    [{name: 0} for name in ("vocab_size", "seq_len", "hidden_size", "num_heads", "H_layers", "L_layers", "H_cycles",
                            "L_cycles", "halt_max_steps", "num_puzzle_identifiers", "expansion", "rms_norm_eps",
                            "rope_theta")]
    + [{"puzzle_emb_ndim": -1}, {"hidden_size": 130}, {"expansion": float("nan")}, {"rope_theta": float("inf")},
       {"num_heads": 128}],
)  # fmt: skip
def test_a_configuration_of_no_model_names_the_field(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: "):
        dataclasses.replace(CONFIG, **change)


def test_families() -> None:
    assert not CONFIG.bidirectional
    assert dataclasses.replace(CONFIG, family="hrm-bidirectional").bidirectional
    assert dataclasses.replace(CONFIG, num_heads=128, pos_encodings="learned").num_heads == 128  # odd heads, no rope
