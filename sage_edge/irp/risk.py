"""Distribution-free tests and bounds on a mean loss, from n independent losses and nothing else.

Binomial tails are exact (Clopper and Pearson 1934). For losses anywhere in [0, 1] the Hoeffding-Bentkus p-value of
Learn-then-Test (arXiv 2110.01052, section 3; Bates et al., arXiv 2101.02703) is used. All are valid at every n; none
assumes a shape of the distribution.
"""

from __future__ import annotations

import math

import numpy as np

LARGEST = 10_000_000  # more items than anybody will label; the search for a sufficient number ends here


def binomial_tail(successes: int, trials: int, rate: float) -> float:
    """P(Binomial(trials, rate) <= successes), summed in logarithms: no underflow, relative error about 1e-12."""
    if successes < 0 or rate >= 1:
        return float(successes >= trials)
    if successes >= trials or rate <= 0:
        return 1.0
    j = np.arange(1, successes + 1)
    log_choose = np.concatenate(([0.0], np.cumsum(np.log((trials - j + 1) / j))))
    counts = np.arange(successes + 1)
    terms = log_choose + counts * math.log(rate) + (trials - counts) * math.log1p(-rate)
    top = float(terms.max())
    return min(1.0, math.exp(top + math.log(float(np.exp(terms - top).sum()))))


def p_value(total_loss: float, items: int, limit: float, binary: bool) -> float:
    """p-value of "the mean loss exceeds `limit`", given `items` losses in [0, 1] that sum to `total_loss`.

    binary: every loss is 0 or 1, so the binomial tail is exact; otherwise Hoeffding-Bentkus. 0 < limit < 1.
    """
    if items <= 0:
        return 1.0
    if binary:
        return binomial_tail(round(total_loss), items, limit)
    mean = min(total_loss / items, limit)
    hoeffding = math.exp(-items * _divergence(mean, limit))
    # A sum of floats may land a rounding error above a whole number; one more success only makes the p-value larger.
    bentkus = math.e * binomial_tail(math.ceil(total_loss), items, limit)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence between Bernoulli(a) and Bernoulli(b), nats."""
    left = a * math.log(a / b) if a > 0 else 0.0
    right = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return left + right


def upper_bound(total_loss: float, items: int, error: float, binary: bool) -> float:
    """The smallest limit that these losses certify at error probability `error`: an upper confidence bound on the mean."""
    low, high = min(1.0, total_loss / items), 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if p_value(total_loss, items, middle, binary) <= error:
            high = middle
        else:
            low = middle
    return high


def allowed_loss(items: int, limit: float, error: float, binary: bool) -> int:
    """The largest whole total loss on `items` that still certifies `limit`; -1 when even no loss at all does not."""
    low, high = -1, math.ceil(items * limit)  # at the limit itself no number of items rejects
    while high - low > 1:
        middle = (low + high) // 2
        if p_value(middle, items, limit, binary) <= error:
            low = middle
        else:
            high = middle
    return low


def items_needed(rate: float, limit: float, error: float, binary: bool) -> int | None:
    """How many items would certify `limit` if their mean loss were `rate`; None when no realistic number would."""

    def enough(items: int) -> bool:
        return p_value(math.ceil(rate * items), items, limit, binary) <= error

    high = 1
    while not enough(high):
        high *= 2
        if high > LARGEST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
