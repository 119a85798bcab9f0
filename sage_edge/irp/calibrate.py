"""Calibrated halting: from recorded traces to a policy with a promise, by distribution-free risk control. Pure.

The promise: with probability `confidence` over the draw of the calibration items, the mean loss of the chosen policy on
new items drawn like them is at most `max_loss`. It needs that the items are independent and that those met later come
from where these came from; nothing is assumed of the model, the signals or how they are spread.

How (Learn then Test, arXiv 2110.01052; for early exits: CALM, arXiv 2207.07061, and "Fast yet Safe", NeurIPS 2024, arXiv
2405.20915): "the mean loss of this policy exceeds max_loss" is tested exactly (0/1 losses) or by betting (losses of at most
1, below 0 where something was gained), see `risk`. A path of policies is tested from the safest, full steps, towards the
boldest, each at the whole error budget 1 - confidence, and ends at the first that is not rejected. This fixed-sequence test
certifies wrongly only if it rejects the first policy on the path that is truly too lossy: one test at one budget, however
fine the grid.

Several families: a fixed share of the items (DESIGN_SHARE, drawn by a fixed seed) only picks the path that looks best;
the others, which had no part in that choice, certify along it at the whole budget. The alternative, splitting the error
budget over the F paths (Bonferroni), uses all items but is the dearer one here: with 4,000 items, max_loss 0.01,
confidence 0.95 and 13 paths it permits a loss rate of 0.57 % on the data, this 0.67 %; it needs 554 items at the least,
this 399, and its price rises with every path. With a single path nothing is set aside.

Abstention (`accept`; selective prediction, arXiv 1705.08500): the items are divided once more. What chose the policy
also chooses a confidence signal and where to begin; fresh items then test "accepted answers are wrong more often than
1 - accept" along that signal's thresholds, strictest first; among accepted items the count of wrong ones is binomial.
Each of the two promises holds with `confidence`; both at once hold with at least 2 x confidence - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.irp.families import FAMILIES, Path, acceptance_paths, needs, paths
from sage_edge.irp.risk import allowed_loss, binomial_bound, binomial_tail, certifies, items_needed, upper_bound
from sage_edge.irp.traces import Steps, Traces, fires, steps_taken

DESIGN_SHARE = 0.25
SPLIT_SEED = 0  # fixed, so that a certificate can be derived again from the same data
Rows = npt.NDArray[np.int64]
Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Loss:
    """A loss by name: `of(traces, taken)` gives values in [-1, 1], [n], of stopping example i after taken[i] steps; below 0
    is gained, and counts against what others lose.

    binary: it only ever gives 0 and 1, so the exact binomial test applies. A plugin passes its own.
    """

    name: str
    of: Callable[[Traces, Steps], npt.NDArray[np.float64] | npt.NDArray[np.bool_]]
    binary: bool = False


def _absolute(traces: Traces, taken: Steps) -> npt.NDArray[np.bool_]:
    return ~traces.exact[np.arange(len(traces)), taken - 1]


def _exact_lost(traces: Traces, taken: Steps) -> npt.NDArray[np.bool_]:
    return traces.exact[:, -1] & _absolute(traces, taken)


def _tokens_lost(traces: Traces, taken: Steps) -> npt.NDArray[np.float64]:
    return np.maximum(0.0, traces.token_accuracy[:, -1] - traces.token_accuracy[np.arange(len(traces)), taken - 1])


LOSSES = {
    "exact_lost": Loss("exact_lost", _exact_lost, binary=True),  # full steps were exactly right, the halted answer not
    "absolute": Loss("absolute", _absolute, binary=True),  # the halted answer is not exactly right
    "tokens_lost": Loss("tokens_lost", _tokens_lost),  # how much token accuracy fell against full steps
}


@dataclass(frozen=True)
class Certified:
    """One policy with its promise: loss_sum over `items` certifies a mean loss of at most `bound` (<= max_loss).

    mean_steps is over those items; threshold is None where the policy is `full` or a plain patience on a combined path.
    """

    family: str
    policy: str
    threshold: float | None
    items: int
    loss_sum: float
    bound: float
    mean_steps: float


@dataclass(frozen=True)
class Acceptance:
    """When to call an answer settled: `policy` fires on the signals of its last step.

    wrong of the accepted (of `items` fresh items) certify an error rate of at most `error_bound` (<= 1 - rate).
    """

    policy: str
    rate: float
    items: int
    accepted: int
    wrong: int
    error_bound: float
    coverage: float


@dataclass(frozen=True)
class Calibration:
    """The outcome: the chosen policy, each family certified on its own (each promise for itself), and acceptance."""

    chosen: Certified
    families: tuple[Certified, ...]
    acceptance: Acceptance | None


@dataclass(frozen=True, eq=False)
class Table:
    """A path replayed over all items: taken int [m, n] and losses float64 [m, n] of its m policies."""

    path: Path
    taken: npt.NDArray[np.int16]
    losses: Losses


@dataclass(frozen=True)
class Promise:
    """What is asked for. Raises InputError, naming the field, for values that promise nothing."""

    max_loss: float = 0.01
    confidence: float = 0.95
    loss: Loss = LOSSES["exact_lost"]
    accept: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("max-loss", self.max_loss), ("confidence", self.confidence), ("accept", self.accept)):
            if value is not None and not 0 < value < 1:
                raise InputError(f"{name}: expected a number between 0 and 1, both excluded, found {value}")

    @property
    def error(self) -> float:
        return 1 - self.confidence


def tabulate(traces: Traces, families: Sequence[str], loss: Loss) -> tuple[Table, ...]:
    """Replay every path of the families whose signals the model gives.

    Raises InputError when none of them is given, or when a loss leaves [-1, 1].
    """
    given = set(traces.names)
    given |= {"energy"} if "entropy_mean" in given else set()  # a bare engine's entropy is its energy
    wanted = [path for family in families for path in paths(family, traces.steps)]
    usable = [path for path in wanted if needs(path) <= given]
    if not usable:
        lacking = sorted(set().union(*(needs(path) for path in wanted)) - given)
        raise InputError(
            f"policy {', '.join(families)}: cannot be calibrated: the model gives no signal {', '.join(lacking)}, or has "
            "too few steps; choose another family"
        )
    tables = []
    for path in usable:
        taken = np.stack([steps_taken(traces, policy) for policy in path.policies])
        losses = np.stack([np.asarray(loss.of(traces, row), np.float64) for row in taken])
        if losses.shape != taken.shape or not (abs(losses) <= 1).all():
            raise InputError(f"loss {loss.name!r}: expected one value in -1..1 for each of the {len(traces)} examples")
        if loss.binary and not np.isin(losses, (0, 1)).all():
            raise InputError(f"loss {loss.name!r}: is declared binary but gives values other than 0 and 1")
        tables.append(Table(path, taken.astype(np.int16), losses))
    return tuple(tables)


def calibrate(traces: Traces, promise: Promise, families: Sequence[str] = FAMILIES) -> Calibration:
    """The policy with the fewest mean steps that keeps the promise, over all paths of `families`.

    Raises InputError when there are too few items for the promise (saying how many would do) or no number would do.
    """
    tables = tabulate(traces, families, promise.loss)
    rows = np.arange(len(traces))
    chosen, acceptance = decide(traces, tables, promise, rows)
    return Calibration(chosen, _each_family(tables, rows, promise), acceptance)


def decide(
    traces: Traces, tables: Sequence[Table], promise: Promise, rows: Rows
) -> tuple[Certified, Acceptance | None]:
    """The choice from the items `rows` (with repetitions, when resampling) of tables that were made once."""
    shuffled = _shuffle(rows)
    design, rest = _split(shuffled, len(tables))
    certify, fresh = (rest[: len(rest) // 2], rest[len(rest) // 2 :]) if promise.accept else (rest, rest[:0])
    _require_items(len(certify), len(shuffled), promise)
    table = _best_looking(tables, design, len(certify), promise)
    chosen = _certify(table, certify, promise, len(shuffled) / len(certify))
    if promise.accept is None:
        return chosen, None
    taken = table.taken[table.path.policies.index(chosen.policy)].astype(np.int64)
    known = np.concatenate((design, certify))
    return chosen, _accept(traces, taken, known, fresh, promise.accept, promise.error, len(shuffled))


def _shuffle(rows: Rows) -> Rows:
    """In an order that has nothing to do with the items: data may come sorted by difficulty."""
    return np.random.default_rng(SPLIT_SEED).permutation(rows)


def _split(shuffled: Rows, count: int) -> tuple[Rows, Rows]:
    """Items that only choose between `count` paths, and the others."""
    cut = math.ceil(DESIGN_SHARE * len(shuffled)) if count > 1 else 0
    return shuffled[:cut], shuffled[cut:]


def _require_items(certifying: int, total: int, promise: Promise) -> None:
    least = items_needed(0.0, promise.max_loss, promise.error, promise.loss.binary)
    assert least is not None  # with no loss at all some number always does
    if certifying >= least:
        return
    share = certifying / total if certifying else DESIGN_SHARE
    raise InputError(
        f"too little data: {total} items cannot show a loss of at most {promise.max_loss:g} with confidence "
        f"{promise.confidence:g}; about {math.ceil(least / share) + 2} items would do if none of them is lost, more if "
        f"some are; give more data or promise less"
    )


def _walk(table: Table, rows: Rows, promise: Promise) -> int:
    """Index of the last policy before the first that these items do not certify; -1 when they do not the first."""
    allowed = allowed_loss(len(rows), promise.max_loss, promise.error) if promise.loss.binary else 0
    for index, row in enumerate(table.losses):
        losses = row[rows]
        if promise.loss.binary:
            certified = losses.sum() <= allowed
        else:
            certified = certifies(losses, promise.max_loss, promise.error, False)
        if not certified:
            return index - 1
    return len(table.losses) - 1


def _best_looking(tables: Sequence[Table], design: Rows, certifying: int, promise: Promise) -> Table:
    """The path that will be certified at the fewest steps, if the items to come are like the design items."""
    if len(tables) == 1:
        return tables[0]
    alike = np.resize(design, certifying)

    def steps(table: Table) -> float:
        index = _walk(table, alike, promise)
        return math.inf if index < 0 else float(table.taken[index, design].mean())

    return min(tables, key=steps)


def _certify(table: Table, rows: Rows, promise: Promise, per_item: float) -> Certified:
    """Fixed-sequence testing along one path. per_item: items in all for each item that certifies."""
    binary, limit, items = promise.loss.binary, promise.max_loss, len(rows)
    index = _walk(table, rows, promise)
    losses = table.losses[max(index, 0), rows]
    if index < 0:
        mean = float(losses.mean())
        enough = items_needed(mean, limit, promise.error, binary)
        cure = (
            f"about {math.ceil(enough * per_item) + 2} items like these would do"
            if enough
            else "no number of items will do: allow a larger loss, or use a better model"
        )
        raise InputError(
            f"full steps already have a loss ({promise.loss.name}) of {mean:.4f} on {items} items, which does "
            f"not show at most {limit:g} with confidence {promise.confidence:g}; {cure}"
        )
    return Certified(
        table.path.family,
        table.path.policies[index],
        table.path.thresholds[index],
        items,
        float(losses.sum()),
        upper_bound(losses, promise.error, binary),
        float(table.taken[index, rows].mean()),
    )


def _each_family(tables: Sequence[Table], rows: Rows, promise: Promise) -> tuple[Certified, ...]:
    """Every family as if it alone had been asked for: the bench shows them side by side."""
    shuffled = _shuffle(rows)
    results = []
    for family in dict.fromkeys(table.path.family for table in tables):
        own = [table for table in tables if table.path.family == family]
        design, certify = _split(shuffled, len(own))
        table = _best_looking(own, design, len(certify), promise)
        results.append(_certify(table, certify, promise, len(shuffled) / len(certify)))
    return tuple(results)


def _accept(
    traces: Traces, taken: Steps, known: Rows, fresh: Rows, rate: float, error: float, total: int
) -> Acceptance:
    """Calibrate the confidence signal: `known` items choose signal and start, `fresh` ones certify along thresholds."""
    wrong = ~traces.exact[np.arange(len(traces)), taken - 1]
    limit, scale = 1 - rate, len(fresh) / len(known)
    best: tuple[int, int, Path, npt.NDArray[np.bool_]] | None = None
    for path, accepts in _sureness(traces, taken):
        counts = accepts[:, known].sum(1)
        wrongs = (accepts & wrong)[:, known].sum(1)
        # What the fresh items would say if they were exactly like these; begin where that is most convincing.
        guess = [
            binomial_tail(math.ceil(w * scale), int(c * scale), limit) for c, w in zip(counts, wrongs, strict=True)
        ]
        start = int(np.argmin(guess))
        end = start
        while end + 1 < len(guess) and guess[end + 1] <= error:
            end += 1
        if best is None or counts[end] > best[0]:
            best = (int(counts[end]), start, path, accepts)
    if best is None:
        raise InputError("accept: the model gives no signal of confidence (entropy_mean, entropy_max, q_halt)")
    _, start, path, accepts = best
    counts, wrongs = accepts[:, fresh].sum(1), (accepts & wrong)[:, fresh].sum(1)
    last = start - 1
    while last + 1 < len(counts) and binomial_tail(int(wrongs[last + 1]), int(counts[last + 1]), limit) <= error:
        last += 1
    if last < start:
        raise InputError(_too_few_accepted(int(counts[start]), int(wrongs[start]), len(fresh), total, rate, error))
    accepted, errors = int(counts[last]), int(wrongs[last])
    bound = binomial_bound(errors, accepted, error)
    return Acceptance(path.policies[last], rate, len(fresh), accepted, errors, bound, accepted / len(fresh))


def _sureness(traces: Traces, taken: Steps) -> list[tuple[Path, npt.NDArray[np.bool_]]]:
    """For each signal of confidence that the model gives, what its thresholds accept after `taken` steps, bool [m, n]."""
    usable = [path for path in acceptance_paths() if needs(path) <= set(traces.names)]
    return [(path, np.stack([fires(traces, policy, taken) for policy in path.policies])) for path in usable]


def _too_few_accepted(accepted: int, wrong: int, fresh: int, total: int, rate: float, error: float) -> str:
    needed = items_needed(wrong / accepted if accepted else 0.0, 1 - rate, error, True)
    share = accepted / total
    cure = (
        f"about {math.ceil(needed / share) + 2} items like these would do"
        if needed and accepted
        else "no number of items like these will do: accept a lower rate, or use a better model"
    )
    return (
        f"accept {rate:g}: of {fresh} items set aside for it, {accepted} were accepted at the most convincing threshold "
        f"and {wrong} of them were wrong, which does not show that rate with confidence {1 - error:g}; {cure}"
    )
