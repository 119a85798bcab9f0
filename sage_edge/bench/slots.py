"""`sage-edge bench --suite slots`: what refilling slots brings, against static batches, and latency under load.

Three ways to serve the same requests with the same engine at the same batch size, in turn within one run:
to the last step      static batches, every request runs every step: what the original evaluation code does
to the slowest        static batches that end when the last member has halted
refill                a halted slot takes the next request (sage_edge.pool)

Then an open loop: requests arrive at random (Poisson) at shares of the measured capacity, whether or not the earlier ones
are answered, and latency counts from the time at which a request was due to arrive. A loop that waits for answers before
it sends would leave out exactly the requests that suffer ("coordinated omission", G. Tene).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.bench.timing import Latency
from sage_edge.dataset import Dataset
from sage_edge.engines.runner import Runner
from sage_edge.irp.halting import History, Policy, limited
from sage_edge.pool import Pool, Statistics, Ticket
from sage_edge.runtime import batches
from sage_edge.specs import Array

LOADS = (0.5, 0.8, 0.95)
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Served:
    """What one way of serving gave for n requests. cpu_s: of the whole process, all threads; step_rows: slots x steps
    computed; occupancy: share of them that a request needed."""

    prediction: Array
    steps: npt.NDArray[np.int64]
    wall_s: float
    cpu_s: float
    step_rows: int
    occupancy: float
    statistics: Statistics | None = None


def to_last_step(runner: Runner, observation: dict[str, Array], policy: Policy) -> Served:
    """Static batches, every step for everybody; the policy is not asked."""
    return _static(runner, observation, None)


def to_slowest(runner: Runner, observation: dict[str, Array], policy: Policy) -> Served:
    """Static batches; each request's answer is that of the step at which it halts, the batch ends with the last."""
    return _static(runner, observation, policy)


def _static(runner: Runner, observation: dict[str, Array], policy: Policy | None) -> Served:
    model = runner.model
    predictions, steps, rows = [], [], 0
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches(observation, runner.slots):
        state = runner.encode(batch)
        taken = np.zeros(state.slots, np.int64)
        signals = np.empty((state.slots, model.max_steps, len(model.signals)), np.float32)
        answer: Array | None = None
        for step in range(1, model.max_steps + 1):
            signals[:, step - 1] = runner.refine(state)
            rows += state.slots
            at = np.full(state.slots, step)
            done = (
                at >= model.max_steps
                if policy is None
                else policy.halts(History(signals, at, np.zeros(len(at)), model.signals))
            )
            if (new := done & (taken == 0)).any():
                decoded = runner.decode(state)["prediction"]
                answer = decoded.copy() if answer is None else answer
                answer[new], taken[new] = decoded[new], step
            if taken.all():
                break
        assert answer is not None
        predictions.append(answer)
        steps.append(taken)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    needed = np.concatenate(steps)
    return Served(np.concatenate(predictions), needed, wall, cpu, rows, float(needed.sum() / rows))


def refill(runner: Runner, observation: dict[str, Array], policy: Policy) -> Served:
    """The pool, all requests waiting from the start; the time includes the end, when slots run empty."""
    count = len(next(iter(observation.values())))
    pool = Pool(runner, capacity=count, timer=time.thread_time)
    wall, cpu = time.perf_counter(), time.process_time()
    tickets = [pool.submit({n: a[row] for n, a in observation.items()}, policy) for row in range(count)]
    loaded = 1.0
    while not pool.idle:
        pool.tick()
        if pool.waiting:
            loaded = pool.stats.used / pool.stats.full
    answers = [ticket.result() for ticket in tickets]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Served(
        np.stack([answer.prediction for answer in answers]),
        np.array([answer.steps for answer in answers]),
        wall, cpu, pool.stats.rows, loaded, pool.stats,
    )  # fmt: skip


WAYS: dict[str, Callable[[Runner, dict[str, Array], Policy], Served]] = {
    "to the last step": to_last_step,
    "to the slowest": to_slowest,
    "refill": refill,
}


def saturated(
    runner: Runner, data: Dataset, policy: Policy, rounds: int, threads: int, progress: Progress
) -> dict[str, Any]:
    """All ways in turn, `rounds` times over all examples; medians of throughput, by wall clock and by CPU time."""
    served: dict[str, list[Served]] = {name: [] for name in WAYS}
    for number in range(rounds):
        for place, (name, way) in enumerate(WAYS.items()):
            progress(f"saturating load, {name}", (number * len(WAYS) + place) / rounds / len(WAYS))
            served[name].append(way(runner, data.observation, policy))
    base = float(np.median([len(data) / run.wall_s for run in served["to the last step"]]))
    base_cpu = float(np.median([len(data) / run.cpu_s for run in served["to the last step"]]))
    rows = []
    for name, runs in served.items():
        rate = float(np.median([len(data) / run.wall_s for run in runs]))
        rate_cpu = float(np.median([len(data) / run.cpu_s for run in runs]))
        rows.append({
            "way": name, "answers_per_s": rate, "times_upstream": rate / base,
            "answers_per_cpu_s": rate_cpu, "times_upstream_by_cpu": rate_cpu / base_cpu,
            "exact_accuracy": float(data.exact(runs[0].prediction).mean()),
            "mean_steps": float(runs[0].steps.mean()), "step_rows_per_answer": runs[0].step_rows / len(data),
            "occupancy": runs[0].occupancy,
        })  # fmt: skip
    return {"examples": len(data), "rounds": rounds, "ways": rows, "overhead": overhead(served, runner, threads)}


def overhead(served: dict[str, list[Served]], runner: Runner, threads: int) -> dict[str, float]:
    """CPU time of the scheduler a tick, and of submission and of moving data, beside a step at full batch.

    What other programs take from this machine lengthens a step's wall time and would flatter the share; so a step counts as
    the fastest one seen, or as its CPU time over `threads` (that of upstream's way, which does little else), whichever is
    less.
    """
    statistics = [run.statistics for run in served["refill"] if run.statistics]
    ticks = sum(s.ticks for s in statistics)
    scheduling = sum(s.scheduling_s for s in statistics) / ticks * 1e3
    submitting = sum(s.submitting_s for s in statistics) / ticks * 1e3
    moving = sum(s.moving_s for s in statistics) / ticks * 1e3
    fastest = min(s.fastest_step_s.get(runner.slots, np.inf) for s in statistics) * 1e3
    cpu = min(run.cpu_s / run.step_rows for run in served["to the last step"]) * runner.slots / threads * 1e3
    step = min(fastest, cpu)
    return {
        "scheduling_ms_per_tick": scheduling, "submitting_ms_per_tick": submitting,
        "moving_ms_per_tick": moving, "fastest_step_ms": fastest,
        "step_cpu_ms_per_thread": cpu, "step_ms": step, "share_of_step": scheduling / step,
        "share_with_submission": (scheduling + submitting) / step,
        "share_with_moving": (scheduling + submitting + moving) / step,
    }  # fmt: skip


def open_loop(runner: Runner, data: Dataset, policy: Policy, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Poisson arrivals of `rate` requests a second for `seconds`; latency from the intended arrival to the answer."""
    rng = np.random.default_rng(seed)
    count = max(8, round(rate * seconds))
    due = np.cumsum(rng.exponential(1 / rate, count))
    pool = Pool(runner, capacity=count)
    began = pool.clock()
    tickets: list[Ticket] = []
    while len(tickets) < count or not pool.idle:
        now = pool.clock() - began
        while len(tickets) < count and due[len(tickets)] <= now:
            at = len(tickets)
            one = {name: array[at % len(data)] for name, array in data.observation.items()}
            tickets.append(pool.submit(one, policy, arrived=began + due[at]))
        if pool.idle and len(tickets) < count:
            time.sleep(max(0.0, due[len(tickets)] - (pool.clock() - began)))
        pool.tick()
    spent = pool.clock() - began
    answers = [ticket.result() for ticket in tickets]
    latency = Latency.of([(answer.waited_ms + answer.milliseconds) / 1e3 for answer in answers])
    stats = pool.stats
    return {"rate_per_s": rate, "answers": count, "answers_per_s": count / spent, "latency": asdict(latency),
            "waited_p95_ms": float(np.percentile([answer.waited_ms for answer in answers], 95)),
            "rows_used": stats.used / stats.rows}  # fmt: skip


def run_slots(
    runner: Runner, data: Dataset, halt: str, seconds: float, rounds: int, threads: int, progress: Progress
) -> dict[str, Any]:
    """The section `slots` of a report. runner: active. seconds: length of each open-loop measurement;
    threads: those of the runner."""
    policy = limited(halt, runner.model.max_steps)
    warm = {name: array[: runner.slots] for name, array in data.observation.items()}
    to_last_step(runner, warm, policy)
    report: dict[str, Any] = {
        "slots": runner.slots,
        "halt": halt,
        **saturated(runner, data, policy, rounds, threads, progress),
    }
    capacity = report["ways"][-1]["answers_per_s"]
    report["open_loop"] = []
    for number, load in enumerate(LOADS):
        progress(f"open loop at {load:.0%} of capacity", number / len(LOADS))
        report["open_loop"].append({"load": load, **open_loop(runner, data, policy, load * capacity, seconds, number)})
    return report
