"""What a model gets right, step by step and under each halting policy, from one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.dataset import Dataset
from sage_edge.irp.calibrate import Promise, calibrate
from sage_edge.irp.certificate import Certificate, certify
from sage_edge.irp.families import FAMILIES
from sage_edge.irp.traces import Traces, fires, steps_taken
from sage_edge.runtime import Session

__all__ = ["PolicyScore", "Traces", "collect", "oracle", "per_step", "score", "steps_taken"]


@dataclass(frozen=True)
class PolicyScore:
    """One policy on one dataset: means over the examples; `standard_error` is that of exact accuracy."""

    policy: str
    exact_accuracy: float
    standard_error: float
    token_accuracy: float
    mean_steps: float
    steps_histogram: tuple[int, ...]


def collect(session: Session, data: Dataset, steps: int, progress: Callable[[int], None] | None = None) -> Traces:
    """Run every example for `steps` steps and keep what `Traces` holds."""
    signals, exact, tokens = [], [], []
    for offset, arrays in session.all_steps(data.observation, steps):
        count = arrays["prediction"].shape[1]
        rows = slice(offset, offset + count)
        exact.append(np.stack([data.exact(p, rows) for p in arrays["prediction"]], axis=1))
        tokens.append(np.stack([data.token_accuracy(p, rows) for p in arrays["prediction"]], axis=1))
        signals.append(arrays["signals"].transpose(1, 0, 2).astype(np.float32))
        if progress:
            progress(offset + count)
    names = session.runner.model.signals
    return Traces(np.concatenate(signals), np.concatenate(exact), np.concatenate(tokens), names)


def score(traces: Traces, policy: str, rows: npt.NDArray[np.bool_] | None = None) -> PolicyScore:
    """Score a policy on all examples, or on those where `rows` is true. A deadline never fires in a replay."""
    taken = steps_taken(traces, policy)
    chosen = np.arange(len(taken)) if rows is None else np.flatnonzero(rows)
    exact = traces.exact[chosen, taken[chosen] - 1]
    tokens = traces.token_accuracy[chosen, taken[chosen] - 1]
    rate = float(exact.mean())
    return PolicyScore(
        policy,
        rate,
        float(np.sqrt(rate * (1 - rate) / len(chosen))),
        float(tokens.mean()),
        float(taken[chosen].mean()),
        tuple(int(n) for n in np.bincount(taken[chosen], minlength=traces.exact.shape[1] + 1)[1:]),
    )


def oracle(traces: Traces) -> PolicyScore:
    """The unreachable best: stop at the first step whose answer is right; run to the end where none is."""
    steps = traces.exact.shape[1]
    first = np.where(traces.exact.any(1), traces.exact.argmax(1) + 1, steps)
    rate = float(traces.exact.any(1).mean())
    tokens = traces.token_accuracy[np.arange(len(first)), first - 1]
    histogram = tuple(int(n) for n in np.bincount(first, minlength=steps + 1)[1:])
    error = float(np.sqrt(rate * (1 - rate) / len(first)))
    return PolicyScore("oracle", rate, error, float(tokens.mean()), float(first.mean()), histogram)


def per_step(traces: Traces) -> list[dict[str, Any]]:
    """The halting table: for each step the accuracy there, and how many would have stopped by the learned rule."""
    learned = steps_taken(traces, "learned")
    return [
        {
            "step": step + 1,
            "exact_accuracy": float(traces.exact[:, step].mean()),
            "token_accuracy": float(traces.token_accuracy[:, step].mean()),
            "mean_entropy": float(traces.signals[:, step, traces.names.index("entropy_mean")].mean()),
            "stopped_by_learned": float((learned <= step + 1).mean()),
        }
        for step in range(traces.exact.shape[1])
    ]


def certificate_for(
    session: Session, engine: Path, data: Dataset, promise: Promise, families: Sequence[str] = FAMILIES,
    progress: Callable[[int], None] | None = None,
) -> Certificate:  # fmt: skip
    """Calibrate the engine in the folder `engine`, open in `session`, on `data`; nothing is written.

    Raises InputError when the data cannot carry the promise.
    """
    model = session.runner.model
    traces = collect(session, data, model.max_steps, progress)
    calibration = calibrate(traces, promise, families)
    return certify(calibration, promise, tuple(families), engine=engine, data_sha256=data.sha256, items=len(data),
                   max_steps=model.max_steps)  # fmt: skip


def certified_scores(traces: Traces, certificate: Certificate) -> list[PolicyScore]:
    """Each family as certified alone, then the certificate's choice, on (other) traces."""
    alone = [
        replace(score(traces, c.policy), policy=f"{c.family}, certified: {c.policy}") for c in certificate.families
    ]
    chosen = replace(score(traces, certificate.policy), policy=f"certified: {certificate.policy}")
    return [*alone, chosen]


def acceptance_score(traces: Traces, certificate: Certificate) -> dict[str, Any] | None:
    """Coverage and accuracy of settled answers under the certificate; None when it says nothing of acceptance."""
    if certificate.acceptance is None:
        return None
    taken = steps_taken(traces, certificate.policy)
    settled = fires(traces, certificate.acceptance.policy, taken)
    exact = traces.exact[np.arange(len(traces)), taken - 1]
    return {
        "policy": certificate.acceptance.policy, "rate": certificate.acceptance.rate, "examples": len(traces),
        "coverage": float(settled.mean()),
        "settled_exact": float(exact[settled].mean()) if settled.any() else None,
        "unsettled_exact": float(exact[~settled].mean()) if (~settled).any() else None,
    }  # fmt: skip
