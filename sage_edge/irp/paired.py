"""Two answers to the same items: did one lose accuracy against the other? Exact test and interval for paired proportions.

lost: items that the first gets right and the second wrong; won: the other way round. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from sage_edge.irp.risk import binomial_tail


@dataclass(frozen=True)
class Paired:
    """Counts over the same items: right in both, lost, won, wrong in both."""

    both: int
    lost: int
    won: int
    neither: int

    @classmethod
    def of(cls, first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Paired:
        """first, second: bool [n], whether each item is answered rightly."""
        counts = (first & second, first & ~second, ~first & second, ~first & ~second)
        return cls(*(int(c.sum()) for c in counts))

    @property
    def items(self) -> int:
        return self.both + self.lost + self.won + self.neither

    @property
    def loss(self) -> float:
        """Fall of accuracy from the first to the second, as a share of the items."""
        return (self.lost - self.won) / self.items

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test of "both are right equally often": binomial in the items that differ.

        McNemar 1947, Psychometrika 12:153; its exact form after Mosteller 1952.
        """
        differing = self.lost + self.won
        return min(1.0, 2 * binomial_tail(min(self.lost, self.won), differing, 0.5)) if differing else 1.0

    def interval(self, confidence: float) -> tuple[float, float]:
        """Two-sided interval for the loss: Newcombe's method 10 for paired proportions (Statistics in Medicine 1998, 17:2635).

        It joins the Wilson intervals of both accuracies through their correlation (with continuity correction), stays
        within -1..1 and does not collapse where nothing differs, which Wald's interval does.
        """
        n = self.items
        first, second = (self.both + self.lost) / n, (self.both + self.won) / n
        low1, high1 = wilson(first, n, confidence)
        low2, high2 = wilson(second, n, confidence)
        phi = self._correlation()
        down = (first - low1) ** 2 - 2 * phi * (first - low1) * (high2 - second) + (high2 - second) ** 2
        up = (high1 - first) ** 2 - 2 * phi * (high1 - first) * (second - low2) + (second - low2) ** 2
        return self.loss - math.sqrt(max(0.0, down)), self.loss + math.sqrt(max(0.0, up))

    def _correlation(self) -> float:
        a, b, c, d = self.both, self.lost, self.won, self.neither
        scale = math.sqrt((a + b) * (c + d) * (a + c) * (b + d))
        product = float(a * d - b * c)
        if product > 0:
            product = max(product - self.items / 2, 0.0)
        return product / scale if scale else 0.0


def items_to_show(loss: float, confidence: float) -> int:
    """How many items would show a fall of at most `loss` (a share) if none differed between the two; 0 < loss < 1."""
    low, high = 0, 1
    while Paired(high, 0, 0, 0).interval(confidence)[1] > loss:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if Paired(middle, 0, 0, 0).interval(confidence)[1] > loss else (low, middle)
    return high


def wilson(rate: float, items: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval for a proportion (JASA 1927, 22:209)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = rate + z * z / (2 * items)
    reach = z * math.sqrt(rate * (1 - rate) / items + z * z / (4 * items * items))
    scale = 1 + z * z / items
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)
