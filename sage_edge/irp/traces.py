"""Recorded signals of a whole dataset, and halting policies replayed over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sage_edge.irp.halting import History, parse_policy

Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Traces:
    """Everything that policies and reports need of n examples over s steps; no logits are kept.

    signals float32 [n, s, k]; exact bool [n, s] and token_accuracy float [n, s]: how right the prediction after each
    step is; names: the k signal names.
    """

    signals: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]
    token_accuracy: npt.NDArray[np.float64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def steps(self) -> int:
        return int(self.exact.shape[1])

    def take(self, rows: npt.NDArray[np.int64]) -> Traces:
        """The examples `rows`, in that order."""
        return Traces(self.signals[rows], self.exact[rows], self.token_accuracy[rows], self.names)


def steps_taken(traces: Traces, policy: str) -> Steps:
    """How many steps each example takes under `policy`, int [n]: the recorded signals are replayed through it.

    A deadline never fires in a replay. Raises InputError for a policy that is not understood, or a signal not recorded.
    """
    count, steps = traces.exact.shape
    decide = parse_policy(policy, steps)
    taken = np.zeros(count, np.int64)
    for step in range(1, steps + 1):
        history = History(traces.signals, np.full(count, step, np.int64), np.zeros(count), traces.names)
        taken[(taken == 0) & decide.halts(history)] = step
    return taken


def fires(traces: Traces, policy: str, taken: Steps) -> npt.NDArray[np.bool_]:
    """Whether `policy` would say "stop" after step `taken` of each example, bool [n]; its limit of steps left aside."""
    # Beyond every step, so that the limit that parse_policy adds says nothing here.
    decide = parse_policy(policy, traces.steps + 1)
    return decide.halts(History(traces.signals, taken, np.zeros(len(traces)), traces.names))
