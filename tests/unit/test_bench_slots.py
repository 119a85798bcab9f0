"""The suite `slots` on the null runner: its counts can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sage_edge.bench.slots import run_slots
from sage_edge.dataset import Dataset
from sage_edge.engines.null import NullRunner
from sage_edge.specs import Array


class Unlabelled(Dataset):
    """The null model takes no puzzle identifiers."""

    @property
    def observation(self) -> dict[str, Array]:
        return {"inputs": self.inputs}


def test_counts_of_the_three_ways() -> None:
    needs = np.tile([1, 2, 3, 10], 16)
    inputs = np.repeat(needs[:, None], 4, axis=1).astype(np.int32)
    data = Unlabelled(Path("none"), inputs, inputs, np.zeros(64, np.int32), {})
    with NullRunner(8) as runner:
        report = run_slots(runner, data, "learned", 0.01, 2, 1, lambda stage, done: None)
    upstream, slowest, refill = report["ways"]
    assert (upstream["step_rows_per_answer"], upstream["mean_steps"]) == (16, 16)
    assert (slowest["step_rows_per_answer"], slowest["mean_steps"]) == (10, 4)
    assert refill["mean_steps"] == 4
    assert refill["step_rows_per_answer"] < 5
    assert refill["occupancy"] == 1
    assert all(way["exact_accuracy"] == 1 for way in report["ways"])
    assert [one["load"] for one in report["open_loop"]] == [0.5, 0.8, 0.95]
    assert all(one["latency"]["p50_ms"] <= one["latency"]["p99_ms"] for one in report["open_loop"])
