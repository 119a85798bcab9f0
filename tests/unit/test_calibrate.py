"""Calibration: the promise holds over resampled data where plain tuning breaks it; what cannot be promised is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from sage_edge.errors import InputError
from sage_edge.irp import calibrate as calibrate_module
from sage_edge.irp.calibrate import LOSSES, Loss, Promise, Table, calibrate, decide, tabulate
from sage_edge.irp.families import FAMILIES, FULL, acceptance_paths, paths
from sage_edge.irp.halting import parse_policy
from sage_edge.irp.traces import Traces, fires, steps_taken
from tests.unit.traces_fixture import recorded

DRAWS = 600


@cache
def tables_of(families: tuple[str, ...], loss: str) -> tuple[Table, ...]:
    return tabulate(recorded(), families, LOSSES[loss])


@cache
def taken_of(table: Table) -> np.ndarray:
    return table.taken.astype(np.float64)


def within_binomial_error(confidence: float, draws: int = DRAWS) -> float:
    """The most failures in `draws` that chance explains if each has probability 1 - confidence (three deviations)."""
    return draws * (1 - confidence) + 3 * math.sqrt(draws * confidence * (1 - confidence))


def naive(tables: Sequence[Table], rows: np.ndarray, limit: float) -> tuple[Table, int]:
    """What is usually done: on the calibration data, the fewest steps among all policies whose loss there is allowed."""
    best, fewest = (tables[0], 0), math.inf
    weights = np.bincount(rows, minlength=len(recorded())) / len(rows)
    for table in tables:
        steps = taken_of(table) @ weights
        steps[table.losses @ weights > limit] = math.inf
        if (least := float(steps.min())) < fewest:
            best, fewest = (table, int(steps.argmin())), least
    return best


# 1,500 real items stand for all there is; calibration draws from them, and the risk on all of them is the true one.
@pytest.mark.parametrize(
    ("loss", "max_loss", "confidence", "draws"),
    [("exact_lost", 0.02, 0.9, DRAWS), ("absolute", 0.14, 0.9, DRAWS), ("tokens_lost", 0.01, 0.8, DRAWS // 2)],
)
def test_the_promise_holds_over_resampled_data_and_tuning_breaks_it(
    loss: str, max_loss: float, confidence: float, draws: int
) -> None:
    traces = recorded()
    promise = Promise(max_loss, confidence, LOSSES[loss])
    tables = tables_of(FAMILIES, loss)
    rng = np.random.default_rng(0)
    truth = {p: float(r) for t in tables for p, r in zip(t.path.policies, t.losses.mean(1, dtype=float), strict=True)}
    broken = broken_naive = 0
    steps: list[float] = []
    for _ in range(draws):
        rows = rng.integers(0, len(traces), 700)
        table, index = naive(tables, rows, max_loss)
        broken_naive += truth[table.path.policies[index]] > max_loss
        try:
            chosen, _ = decide(traces, tables, promise, rows)
        except InputError:
            continue  # a promise that is not made is not broken; the number of steps below counts those that were
        assert chosen.bound <= max_loss + 1e-12
        broken += truth[chosen.policy] > max_loss
        steps.append(chosen.mean_steps)
    assert broken <= within_binomial_error(confidence, draws)
    assert broken_naive > within_binomial_error(confidence, draws)
    assert len(steps) > 0.8 * draws
    assert np.mean(steps) < 0.6 * traces.steps  # a promise that never halts would be easy to keep


@pytest.mark.parametrize("family", ["learned", "entropy_max", "combined"])
def test_the_promise_holds_for_a_family_alone(family: str) -> None:
    traces = recorded()
    promise = Promise(0.02, 0.9)
    tables = tuple(table for table in tables_of(FAMILIES, "exact_lost") if table.path.family == family)
    truth = {p: float(r) for t in tables for p, r in zip(t.path.policies, t.losses.mean(1, dtype=float), strict=True)}
    rng = np.random.default_rng(1)
    draws = (rng.integers(0, len(traces), 500) for _ in range(DRAWS))
    broken = sum(truth[decide(traces, tables, promise, rows)[0].policy] > 0.02 for rows in draws)
    assert broken <= within_binomial_error(0.9)


def test_accepted_answers_are_right_as_promised_over_resampled_data(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = recorded()
    seen: dict[bytes, object] = {}  # a few dozen policies come up in all draws; what they accept is worked out once
    slow = calibrate_module._sureness

    def quick(traces: Traces, taken: np.ndarray) -> object:
        key = taken.tobytes()
        if key not in seen:
            seen[key] = slow(traces, taken)
        return seen[key]

    monkeypatch.setattr(calibrate_module, "_sureness", quick)
    promise = Promise(0.03, 0.9, accept=0.98)
    tables = tables_of(FAMILIES, "exact_lost")
    rng = np.random.default_rng(2)
    draws, broken, refused, coverage = 500, 0, 0, []
    for _ in range(draws):
        try:
            chosen, acceptance = decide(traces, tables, promise, rng.integers(0, len(traces), 1200))
        except InputError:
            refused += 1  # a promise that is not made is not broken
            continue
        assert acceptance is not None
        taken = steps_taken(traces, chosen.policy)
        accepted = fires(traces, acceptance.policy, taken)
        right = traces.exact[np.arange(len(traces)), taken - 1]
        broken += right[accepted].mean() < 0.98
        coverage.append(accepted.mean())
    assert broken <= within_binomial_error(0.9, draws)
    assert refused < draws / 10
    assert np.mean(coverage) > 0.7


def test_with_no_effect_of_halting_the_boldest_policy_is_certified() -> None:
    traces = recorded()
    always = replace(traces, exact=np.ones_like(traces.exact))
    assert calibrate(always, Promise(0.01)).chosen.mean_steps == 1


def test_the_choice_does_not_depend_on_the_order_of_families_or_on_the_run() -> None:
    traces = recorded()
    first = calibrate(traces, Promise(0.02))
    assert calibrate(traces, Promise(0.02)) == first
    assert {family.family for family in first.families} == set(FAMILIES)
    assert all(family.bound <= 0.02 for family in first.families)


def test_the_reported_figures_are_those_of_the_policy() -> None:
    """One path: no item is set aside, so loss and steps are those over all items."""
    traces = recorded()
    chosen = calibrate(traces, Promise(0.02), ["learned"]).chosen
    taken = steps_taken(traces, chosen.policy)
    lost = traces.exact[:, -1] & ~traces.exact[np.arange(len(traces)), taken - 1]
    assert (chosen.items, chosen.loss_sum) == (len(traces), lost.sum())
    assert chosen.mean_steps == pytest.approx(taken.mean())
    assert chosen.policy == f"learned:{chosen.threshold:g}"


def item_count(message: str) -> int:
    found = re.search(r"about (\d+) items", message)
    assert found, message
    return int(found[1])


@pytest.mark.parametrize("families", [["learned"], list(FAMILIES)])
@pytest.mark.parametrize("accept", [None, 0.97])
def test_too_little_data_is_refused_with_a_number_that_does(families: list[str], accept: float | None) -> None:
    traces = recorded()
    promise = Promise(0.03, 0.9, accept=accept)
    perfect = replace(traces, exact=np.ones_like(traces.exact))
    with pytest.raises(InputError, match="too little data: 40 items cannot show") as refused:
        calibrate(perfect.take(np.arange(40)), promise, families)
    enough = item_count(str(refused.value))
    calibrate(perfect.take(np.arange(enough)), Promise(0.03, 0.9), families)
    with pytest.raises(InputError, match="too little data"):
        calibrate(perfect.take(np.arange(enough - 12)), promise, families)


def test_a_model_that_is_too_bad_for_the_promise_is_told_so() -> None:
    with pytest.raises(InputError, match="full steps already have a loss .absolute.*no number of items will do"):
        calibrate(recorded(), Promise(0.05, loss=LOSSES["absolute"]))
    with pytest.raises(InputError, match="full steps already have a loss.*about [0-9]+ items like these would do"):
        calibrate(recorded().take(np.arange(300)), Promise(0.13, loss=LOSSES["absolute"]), ["learned"])


def test_an_acceptance_beyond_the_data_is_refused_with_a_number() -> None:
    with pytest.raises(InputError, match="accept 0.999: .* would do"):
        calibrate(recorded(), Promise(0.02, accept=0.999), ["learned"])


@pytest.mark.parametrize("field", ["max_loss", "confidence", "accept"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, math.nan])
def test_a_promise_must_be_between_0_and_1(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field.replace("_", "-")):
        Promise(**{field: value})  # type: ignore[arg-type]


def test_a_family_without_its_signals_is_refused_or_left_out() -> None:
    traces = recorded()
    few = Traces(traces.signals[:, :, 2:3], traces.exact, traces.token_accuracy, ("entropy_mean",))
    with pytest.raises(InputError, match="learned: cannot be calibrated: the model gives no signal q_continue, q_halt"):
        tabulate(few, ["learned"], LOSSES["exact_lost"])
    assert {table.path.family for table in tabulate(few, FAMILIES, LOSSES["exact_lost"])} == {"entropy", "slope"}


def test_a_plugins_loss_must_stay_within_its_bounds() -> None:
    traces = recorded()
    half = Loss("half", lambda t, taken: np.where(taken < t.steps, 0.5, 0.0))
    assert calibrate(traces, Promise(0.02, loss=half), ["learned"]).chosen.loss_sum <= 0.02 * len(traces)
    with pytest.raises(InputError, match="loss 'big': expected one value in -1..1"):
        tabulate(traces, ["patience"], Loss("big", lambda t, taken: taken.astype(float)))
    # What is gained counts against what is lost: a sure gain buys a sure loss.
    even = Loss("even", lambda t, taken: np.where(taken < t.steps, np.where(np.arange(len(t)) % 2, 0.5, -0.5), 0.0))
    lost = Loss("lost", lambda t, taken: np.where(taken < t.steps, np.where(np.arange(len(t)) % 2, 0.5, 0.0), 0.0))
    bold, careful = (calibrate(traces, Promise(0.05, loss=loss), ["patience"]).chosen for loss in (even, lost))
    assert bold.mean_steps < careful.mean_steps
    assert bold.loss_sum < 0.05 * len(traces)
    with pytest.raises(InputError, match="declared binary but gives values"):
        tabulate(traces, ["patience"], Loss("half", half.of, binary=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_starts_at_full_steps_and_its_policies_read_back(family: str, steps: int) -> None:
    for path in paths(family, steps):
        assert path.policies[0] == FULL
        assert len(path.policies) == len(path.thresholds)
        for policy in path.policies:
            parse_policy(policy, steps)


def test_paths_go_from_safe_to_bold() -> None:
    traces = recorded()
    for family in FAMILIES:
        for path in paths(family, traces.steps):
            mean = [steps_taken(traces, policy).mean() for policy in path.policies[:: max(1, len(path.policies) // 12)]]
            assert mean == sorted(mean, reverse=True), path.policies[-1]
    for path in acceptance_paths():
        counts = [fires(traces, p, np.full(len(traces), 3)).sum() for p in path.policies[::12]]
        assert counts == sorted(counts)


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(InputError, match="family 'luck' is not known; use learned, entropy"):
        paths("luck", 8)
