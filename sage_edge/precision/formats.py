"""Numbers of the quantised formats: symmetric scales, INT8 codes and FP8 (E4M3FN) codes.

Scales are representable in float16, so that a Q node with a float32 scale and a DQ node with a float16 one agree exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from sage_edge.specs import Array

Quantised = Literal["int8", "fp8"]

INT8_MAX = 127.0  # symmetric: -128 is not used for weights, and the zero point is 0
FP8_MAX = 448.0  # largest finite value of E4M3FN (arXiv 2209.05433, table 1; ONNX "Float stored in 8 bits")
FP16_MAX = 65504.0
# Below the smallest normal float16 a scale would lose its own digits.
SMALLEST_SCALE = 2.0**-14

# What a product of this precision costs beside one in fp32, by bytes of its weights and by the arithmetic rate of the
# tensor cores of Orin, Ada and Hopper alike: halved for FP16, halved again for 8 bits.
COST: dict[str, float] = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25, "fp8": 0.25}


def largest(precision: Quantised) -> float:
    """The magnitude that the largest code stands for at a scale of one."""
    return INT8_MAX if precision == "int8" else FP8_MAX


def scale_for(amax: float, precision: Quantised) -> float:
    """The symmetric scale, representable in float16, whose largest code is `amax` or, by float16's rounding, just about.

    amax: a magnitude, >= 0 and finite; 0 gives 1 (whatever the scale, all codes are 0). A scale beyond float16 is cut.
    """
    if amax <= 0:
        return 1.0
    return float(np.float16(min(max(amax / largest(precision), SMALLEST_SCALE), FP16_MAX)))


def quantise(values: Array, scale: Array | float, precision: Quantised) -> npt.NDArray[np.int8] | npt.NDArray[np.uint8]:
    """Codes of float32 `values` under a broadcast scale: int8 in -127..127, or the bytes of E4M3FN; both saturate."""
    scaled: npt.NDArray[np.float32] = np.divide(values, scale, dtype=np.float32)
    if precision == "int8":
        return np.clip(np.rint(scaled), -INT8_MAX, INT8_MAX).astype(np.int8)
    return encode_fp8(scaled)


def dequantise(codes: Array, scale: Array | float, precision: Quantised) -> npt.NDArray[np.float32]:
    """What codes stand for, float32."""
    values = codes.astype(np.float32) if precision == "int8" else fp8_values()[codes]
    return np.asarray(values * np.asarray(scale, np.float32), np.float32)


@lru_cache(maxsize=1)
def fp8_values() -> npt.NDArray[np.float32]:
    """The value of each of the 256 codes of E4M3FN: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 0x7F and 0xFF are NaN."""
    magnitudes = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        magnitudes.append(math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))
    return np.array([*magnitudes, np.nan, *(-m for m in magnitudes), np.nan], np.float32)


def encode_fp8(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The nearest codes of E4M3FN, ties to the even one; beyond the range the largest finite (ONNX: saturate)."""
    table = fp8_values()[:127].astype(np.float64)
    size = np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(table, size), 1, 126)
    below = above - 1
    middle = (table[above] + table[below]) / 2
    # A code's last bit is that of its mantissa, so "even" is the even code.
    code = np.where((size > middle) | ((size == middle) & (above % 2 == 0)), above, below)
    return np.asarray(code | (np.signbit(values).astype(np.uint8) << 7), np.uint8)
