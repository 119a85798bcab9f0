"""The loop: requests in, answers out, each with as many steps as its halting policy asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError
from sage_edge.irp.certificate import CERTIFIED, Certificate, uses_certificate
from sage_edge.irp.halting import AnyOf, History, MaxSteps, Policy, parse_policy
from sage_edge.specs import Array


@dataclass(frozen=True)
class Answer:
    """What one request got.

    prediction: the `prediction` output of decode for this request (for HRM int32 [seq_len]); steps: refinement steps
    taken; reason: the policy that stopped it; trace: float32 [steps, k], the signals after each step; signals: their
    names; milliseconds: from admission to answer; settled: False where the certificate's acceptance is not sure enough of
    the prediction, which is then only the best so far (always True without one).
    """

    prediction: Array
    steps: int
    reason: str
    trace: npt.NDArray[np.float32]
    signals: tuple[str, ...]
    milliseconds: float
    settled: bool = True


class Session:
    """A loaded engine that answers requests; the door for a robot's own program.

    with sage_edge.load("sudoku9") as session:
        for answer in session.infer({"inputs": puzzles}):
            print(answer.prediction, answer.steps, answer.reason)
    """

    def __init__(self, runner: Runner, certificate: Certificate | None = None) -> None:
        self.runner = runner
        self.certificate = certificate

    def __enter__(self) -> Session:
        self.runner.activate()
        return self

    def __exit__(self, *exception: object) -> None:
        self.runner.deactivate()

    @property
    def default_halt(self) -> str:
        """`certified` for an engine with a certificate, else `learned`."""
        return CERTIFIED if self.certificate else "learned"

    def policy(self, halt: str | Policy | None = None, max_steps: int | None = None) -> Policy:
        """The policy that `halt` names (None: the default), never beyond `max_steps` (the model's own when None).

        Raises InputError, also for `certified` on an engine that has no certificate.
        """
        limit = max_steps or self.runner.model.max_steps
        halt = self.default_halt if halt is None else halt
        if isinstance(halt, str) and uses_certificate(halt):
            if self.certificate is None:
                raise InputError(
                    f"halting policy {halt!r}: this engine has no certificate; `sage-edge calibrate ENGINE --data DIR` makes one"
                )
            halt = self.certificate.expand(halt)
        return AnyOf((halt, MaxSteps(limit))) if isinstance(halt, Policy) else parse_policy(halt, limit)

    def infer(
        self,
        observation: dict[str, Array],
        halt: str | Policy | None = None,
        max_steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answers to n requests, in their order; any n, cut into batches of the engine's slots.

        halt: a policy or its text; by default the engine's certified policy, else `learned`.
        observation: arrays by name, first axis the requests (HRM: `inputs` int32 [n, seq_len], optional
        `puzzle_identifiers` int32 [n]). Raises InputError for bad arrays or an unknown policy.
        """
        policy = self.policy(halt, max_steps)
        certified = self.certificate is not None and (halt is None or uses_certificate(halt))
        accepts = self.certificate.accepts() if certified and self.certificate else None
        checked = self.runner.model.validate_observation(observation)
        answers: list[Answer] = []
        for batch in batches(checked, self.runner.slots):
            answers += self._answer(batch, policy, accepts)
            if progress:
                progress(len(answers))
        return answers

    def _answer(self, batch: dict[str, Array], policy: Policy, accepts: Policy | None) -> list[Answer]:
        runner, model = self.runner, self.runner.model
        began = time.perf_counter()
        state = runner.encode(batch)
        active = np.arange(state.slots)
        signals = np.full((state.slots, 16, len(model.signals)), np.nan, np.float32)
        answers: dict[int, Answer] = {}
        step = 0
        while len(active):
            if step == signals.shape[1]:
                signals = np.concatenate((signals, np.full_like(signals, np.nan)), axis=1)
            signals[active, step] = runner.refine(state)
            step += 1
            elapsed = (time.perf_counter() - began) * 1e3
            steps = np.full(len(active), step)
            history = History(signals[active], steps, np.full(len(active), elapsed), model.signals)
            reasons = policy.reasons(history)
            stopped = [row for row, reason in enumerate(reasons) if reason]
            if not stopped:
                continue
            settled = np.ones(len(active), bool) if accepts is None else accepts.halts(history)
            predictions = runner.decode(state)["prediction"]
            elapsed = (time.perf_counter() - began) * 1e3
            for row in stopped:
                slot = int(active[row])
                trace = signals[slot, :step].copy()
                answers[slot] = Answer(
                    predictions[row], step, reasons[row], trace, model.signals, elapsed, bool(settled[row])
                )
            going = [row for row, reason in enumerate(reasons) if not reason]
            active = active[going]
            if going:
                state = runner.select(state, going)
        return [answers[slot] for slot in sorted(answers)]

    def all_steps(self, observation: dict[str, Array], steps: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """Run `steps` steps without halting and give (offset of the batch, arrays) for each batch.

        The arrays are `logits` [steps, n, ...], `prediction` [steps, n, ...] and `signals` float32 [steps, n, k].
        """
        names = tuple(spec.name for spec in self.runner.model.prediction)
        offset = 0
        checked = self.runner.model.validate_observation(observation)
        for batch in batches(checked, self.runner.slots):
            state = self.runner.encode(batch)
            kept: dict[str, list[Array]] = {name: [] for name in (*names, "signals")}
            for _ in range(steps):
                kept["signals"].append(self.runner.refine(state).copy())
                for name, array in self.runner.decode(state, names).items():
                    kept[name].append(array)
            yield offset, {name: np.stack(arrays) for name, arrays in kept.items()}
            offset += state.slots


def batches(observation: dict[str, Array], size: int) -> Iterator[dict[str, Array]]:
    count = len(next(iter(observation.values())))
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in observation.items()}
