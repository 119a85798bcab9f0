"""Halting policies: what they decide on histories made by hand, and the language they are written in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.errors import InputError
from sage_edge.irp.halting import History, parse_policy

NAMES = ("q_halt", "q_continue", "entropy_mean", "changed", "entropy_max")


Values = list[float] | None


def stops_at(
    policy: str,
    *,
    q_halt: Values = None,
    entropy: Values = None,
    changed: Values = None,
    elapsed: Values = None,
    limit: int = 100,
) -> tuple[int, str]:
    """The first step at which `policy` stops a request with these signals, and its reason."""
    length = max(len(x) for x in (q_halt, entropy, changed, elapsed) if x is not None)
    table = np.zeros((1, length, len(NAMES)), np.float32)
    for name, values in (("q_halt", q_halt), ("entropy_mean", entropy), ("changed", changed)):
        if values is not None:
            table[0, :, NAMES.index(name)] = values
    decide = parse_policy(policy, limit)
    for step in range(1, length + 1):
        seen = table.copy()
        seen[:, step:] = np.nan  # a policy that peeks into the future would decide on NaN
        at = np.array([elapsed[step - 1] if elapsed else 0.0])
        history = History(seen, np.array([step]), at, NAMES)
        if decide.halts(history)[0]:
            return step, decide.reasons(history)[0]
        assert decide.reasons(history) == [""]
    return 0, ""


def test_learned_stops_when_halting_beats_continuing() -> None:
    assert stops_at("learned", q_halt=[-1, 0, 0.1, 5]) == (3, "learned")


def test_a_margin_makes_the_learned_rule_more_careful_or_bolder() -> None:
    assert stops_at("learned:0.5", q_halt=[-1, 0.5, 0.6]) == (3, "learned:0.5")
    assert stops_at("learned:-2", q_halt=[-3, -1.5, 0.6]) == (2, "learned:-2")
    assert str(parse_policy("learned:0", 9)) == str(parse_policy("learned", 9))


def test_entropy_max_looks_at_the_least_certain_token() -> None:
    history = History(
        np.array([[[0, 0, 0.1, 0, 0.2]], [[0, 0, 0.01, 0, 0.3]]], np.float32), np.array([1, 1]), np.zeros(2), NAMES
    )
    assert parse_policy("entropy_max:0.25", 9).halts(history).tolist() == [True, False]


def test_patience_needs_that_many_unchanged_steps() -> None:
    assert stops_at("patience:2", changed=[0, 0.5, 0, 0, 0]) == (4, "patience:2")
    # Step 1 compares with the initial state: "unchanged" there is not evidence.
    assert stops_at("patience:1", changed=[0, 0, 0]) == (2, "patience:1")


def test_entropy_stops_below_the_threshold() -> None:
    assert stops_at("entropy:0.05", entropy=[1, 0.05, 0.04]) == (3, "entropy:0.05")


def test_slope_needs_a_full_window() -> None:
    assert stops_at("slope:0.01,2", entropy=[1.0, 1.0, 0.9, 0.895, 0.89]) == (5, "slope:0.01,2")
    assert stops_at("slope:0.01,2", entropy=[1.0, 1.0, 1.0]) == (3, "slope:0.01,2")


def test_rising_energy_counts_as_no_progress() -> None:
    assert stops_at("slope:0.01,1", entropy=[0.5, 0.9])[0] == 2


def test_deadline_uses_the_time_since_admission() -> None:
    assert stops_at("deadline:20", elapsed=[5, 19.9, 20, 30]) == (3, "deadline:20")
    assert stops_at("deadline:20ms", elapsed=[25]) == (1, "deadline:20")


def test_max_steps_and_the_models_own_limit() -> None:
    assert stops_at("max_steps:3", q_halt=[-1] * 5) == (3, "max_steps:3")
    assert stops_at("learned", q_halt=[-1] * 5, limit=4) == (4, "max_steps:4")
    assert stops_at("full", q_halt=[9] * 5, limit=5) == (5, "max_steps:5")
    assert stops_at("max_steps:9", q_halt=[-1] * 5, limit=2) == (2, "max_steps:2")


def test_and_or_and_parentheses() -> None:
    q, entropy = [1.0, 1, 1, 1], [1, 0.5, 0.01, 0.01]
    assert stops_at("learned and entropy:0.1", q_halt=q, entropy=entropy) == (3, "learned and entropy:0.1")
    assert stops_at("entropy:0.1 or learned", q_halt=q, entropy=entropy) == (1, "learned")
    assert stops_at("learned and (entropy:0.1 or max_steps:2)", q_halt=q, entropy=entropy)[0] == 2
    # `and` binds more tightly than `or`.
    assert stops_at("max_steps:4 or learned and entropy:0.1", q_halt=q, entropy=entropy)[0] == 3


def test_requests_at_different_steps_are_decided_together() -> None:
    table = np.full((3, 5, len(NAMES)), np.nan, np.float32)
    table[0, :2, 2], table[1, :5, 2], table[2, :1, 2] = 0.5, (0.5, 0.5, 0.5, 0.5, 0.01), 0.01
    history = History(table, np.array([2, 5, 1]), np.zeros(3), NAMES)
    assert parse_policy("entropy:0.05", 100).halts(history).tolist() == [False, True, True]


def test_a_signal_that_the_model_does_not_give_is_named() -> None:
    history = History(np.zeros((1, 1, 1), np.float32), np.array([1]), np.zeros(1), ("q_halt",))
    with pytest.raises(InputError, match="'q_continue' is not given by this model; it gives q_halt"):
        parse_policy("learned", 3).halts(history)


@pytest.mark.parametrize(
    "text",
    ["", "sometimes", "learned:x", "learned:nan", "learned:inf", "learned:1,2", "entropy_max:0",
     "patience:0", "patience:x", "patience:1.5", "entropy:-1", "entropy:nan", "entropy:inf",
     "slope:0.1", "slope:0.1,0", "slope:0.1,2,3", "deadline:0", "learned or", "or learned", "(learned", "learned)",
     "learned entropy:0.1", "full or learned", "max_steps:0", "max_steps"],
)  # fmt: skip
def test_what_is_not_a_policy_is_quoted_back(text: str) -> None:
    with pytest.raises(InputError, match="halting policy"):
        parse_policy(text, 8)


LEAVES = st.one_of(
    st.just("learned"),
    st.floats(-50, 50).map(lambda v: f"learned:{v!r}"),
    st.floats(1e-12, 5).map(lambda v: f"entropy_max:{v!r}"),
    st.integers(1, 9).map(lambda n: f"patience:{n}"),
    st.integers(1, 9).map(lambda n: f"max_steps:{n}"),
    st.sampled_from([0.001, 0.05, 1.5]).map(lambda v: f"entropy:{v:g}"),
    st.tuples(st.sampled_from([0.01, 0.5]), st.integers(1, 4)).map(lambda t: f"slope:{t[0]:g},{t[1]}"),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})"),
)


@given(TREES, st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_text_of_a_policy_reads_back_as_the_same_policy(text: str, limit: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    signals = rng.choice([0.0, 0.04, 0.5, 1.0], (20, 12, len(NAMES))).astype(np.float32)
    history = History(signals, rng.integers(1, 13, 20), np.zeros(20), NAMES)
    policy = parse_policy(text, limit)
    again = parse_policy(str(policy), limit)
    assert str(again).startswith(str(policy))  # the limit of steps is added once more
    np.testing.assert_array_equal(policy.halts(history), again.halts(history))
    reasons = policy.reasons(history)
    assert [bool(r) for r in reasons] == policy.halts(history).tolist()
    assert all(policy.halts(history)[history.steps >= limit])
