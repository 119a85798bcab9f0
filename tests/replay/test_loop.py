"""The loop on the null runner: every request gets the steps it needs, whatever it shares a batch with."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.engines.null import NullRunner
from sage_edge.irp.halting import Entropy
from sage_edge.runtime import Session

MAX = NullRunner().model.max_steps


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 9))
def test_steps_reasons_and_traces_are_those_of_each_request_alone(needs: list[int], slots: int) -> None:
    inputs = np.zeros((len(needs), 4), np.int32)
    inputs[:, 0] = needs
    with Session(NullRunner(slots)) as session:
        answers = session.infer({"inputs": inputs}, halt="learned")
    assert len(answers) == len(needs)
    for need, answer in zip(needs, answers, strict=True):
        expected = min(max(need, 1), MAX)
        assert answer.steps == expected
        assert answer.reason == ("learned" if need <= MAX else f"max_steps:{MAX}")
        np.testing.assert_array_equal(answer.prediction, np.full(4, min(need, MAX)))
        assert answer.trace.shape == (expected, 4)
        entropy = answer.trace[:, answer.signals.index("entropy_mean")]
        np.testing.assert_array_equal(entropy, np.maximum(need - np.arange(1, expected + 1), 0))


def test_a_policy_that_never_stops_still_ends_at_the_models_limit() -> None:
    with Session(NullRunner()) as session:
        (answer,) = session.infer({"inputs": np.full((1, 4), 500, np.int32)}, halt=Entropy(1e-9))
    assert (answer.steps, answer.reason) == (MAX, f"max_steps:{MAX}")


def test_max_steps_may_exceed_the_models_own() -> None:
    inputs = np.full((2, 4), 50, np.int32)
    with Session(NullRunner()) as session:
        answers = session.infer({"inputs": inputs}, halt="learned", max_steps=60)
    assert [a.steps for a in answers] == [50, 50]


def test_all_steps_gives_every_step_of_every_request() -> None:
    inputs = np.zeros((5, 4), np.int32)
    inputs[:, 0] = [1, 2, 3, 4, 5]
    with Session(NullRunner(2)) as session:
        parts = list(session.all_steps({"inputs": inputs}, steps=4))
    assert [offset for offset, _ in parts] == [0, 2, 4]
    predictions = np.concatenate([arrays["prediction"] for _, arrays in parts], axis=1)
    np.testing.assert_array_equal(predictions[:, :, 0], np.minimum(np.arange(1, 5)[:, None], inputs[:, 0]))
