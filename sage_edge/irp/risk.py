"""Distribution-free tests and bounds on a mean loss, from n independent losses and nothing else.

Losses of 0 and 1: exact binomial tails (Clopper and Pearson 1934). Losses of at most 1: testing by betting (Waudby-Smith
and Ramdas, arXiv 2010.15110; for risk control: Bates et al., arXiv 2101.02703, proposition 5). A capital of 1 is staked, loss by
loss, on the mean being below the limit; if it is not, the capital reaches 1 / error with probability `error` at most (Ville's
inequality). A loss may lie below 0, where something was gained: only a large one can take the capital, whatever the others
are. Losses that vary little are certified from far fewer items than by Hoeffding-Bentkus, which must take
them for 0 and 1. All are valid at every n; none assumes a shape of the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

LARGEST = 10_000_000  # more items than anybody will label; the search for a sufficient number ends here
Losses = npt.NDArray[np.float64]


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


def stakes(losses: Losses, error: float) -> Losses:
    """What is staked on each loss, [n], in 0..1: more where those before it varied little. A stake must not know its loss."""
    count = np.arange(1, len(losses) + 1)
    means = (0.5 + np.cumsum(losses)) / (count + 1)
    spread = np.cumsum((losses - means) ** 2)
    variance = (0.25 + np.concatenate(([0.0], spread[:-1]))) / count
    return np.asarray(np.minimum(1.0, np.sqrt(2 * math.log(1 / error) / (len(losses) * variance))), np.float64)


def _won(losses: Losses, staked: Losses, limit: float, error: float) -> bool:
    return bool(np.cumsum(np.log1p(staked * (limit - losses))).max() >= math.log(1 / error))


def certifies(losses: Losses, limit: float, error: float, binary: bool) -> bool:
    """Whether "the mean loss exceeds `limit`" is rejected at `error`. losses of at most 1, in an order that does not depend
    on them; binary: each is 0 or 1. 0 < limit < 1, 0 < error < 1."""
    if not len(losses):
        return False
    if binary:
        return binomial_tail(round(float(losses.sum())), len(losses), limit) <= error
    return _won(losses, stakes(losses, error), limit, error)


def binomial_bound(successes: int, trials: int, error: float) -> float:
    """Upper confidence bound on a rate: the smallest that so few successes reject at `error`."""
    return _smallest(lambda rate: binomial_tail(successes, trials, rate) <= error, successes / trials)


def upper_bound(losses: Losses, error: float, binary: bool) -> float:
    """Upper confidence bound on the mean of the losses: the smallest limit that they certify at `error`."""
    if binary:
        return binomial_bound(round(float(losses.sum())), len(losses), error)
    staked = stakes(losses, error)
    return _smallest(lambda limit: _won(losses, staked, limit, error), 0.0)


def _smallest(holds: Callable[[float], bool], low: float) -> float:
    """Where `holds` begins between `low` and 1, from above."""
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def allowed_loss(items: int, limit: float, error: float) -> int:
    """The most losses of 1 among `items` of 0 and 1 that still certify `limit`; -1 when even no loss at all does not."""
    low, high = -1, math.ceil(items * limit)  # at the limit itself no number of items rejects
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_tail(middle, items, limit) <= error:
            low = middle
        else:
            high = middle
    return low


def items_needed(rate: float, limit: float, error: float, binary: bool) -> int | None:
    """How many items would certify `limit` if their mean loss were `rate` (each that much, unless binary); None when no
    realistic number would."""
    if rate >= limit:
        return None

    def enough(items: int) -> bool:
        if binary:
            return binomial_tail(math.ceil(rate * items), items, limit) <= error
        return certifies(np.full(items, rate), limit, error, binary)

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
