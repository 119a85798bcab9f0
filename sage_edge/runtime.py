"""The loop: requests in, answers out, each with as many steps as its halting policy asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sage_edge.engines.runner import Runner
from sage_edge.irp.halting import AnyOf, History, MaxSteps, Policy, parse_policy
from sage_edge.specs import Array


@dataclass(frozen=True)
class Answer:
    """What one request got.

    prediction: the `prediction` output of decode for this request (for HRM int32 [seq_len]); steps: refinement steps
    taken; reason: the policy that stopped it; trace: float32 [steps, k], the signals after each step; signals: their
    names; milliseconds: from admission to answer.
    """

    prediction: Array
    steps: int
    reason: str
    trace: npt.NDArray[np.float32]
    signals: tuple[str, ...]
    milliseconds: float


class Session:
    """A loaded engine that answers requests; the door for a robot's own program.

    with sage_edge.load("sudoku9") as session:
        for answer in session.infer({"inputs": puzzles}, halt="learned"):
            print(answer.prediction, answer.steps, answer.reason)
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def __enter__(self) -> Session:
        self.runner.activate()
        return self

    def __exit__(self, *exception: object) -> None:
        self.runner.deactivate()

    def policy(self, halt: str | Policy, max_steps: int | None = None) -> Policy:
        """The policy that `halt` names, never beyond `max_steps` (the model's own when None). Raises InputError."""
        limit = max_steps or self.runner.model.max_steps
        return AnyOf((halt, MaxSteps(limit))) if isinstance(halt, Policy) else parse_policy(halt, limit)

    def infer(
        self,
        observation: dict[str, Array],
        halt: str | Policy = "learned",
        max_steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answers to n requests, in their order; any n, cut into batches of the engine's slots.

        observation: arrays by name, first axis the requests (HRM: `inputs` int32 [n, seq_len], optional
        `puzzle_identifiers` int32 [n]). Raises InputError for bad arrays or an unknown policy.
        """
        policy = self.policy(halt, max_steps)
        checked = self.runner.model.validate_observation(observation)
        answers: list[Answer] = []
        for batch in batches(checked, self.runner.slots):
            answers += self._answer(batch, policy)
            if progress:
                progress(len(answers))
        return answers

    def _answer(self, batch: dict[str, Array], policy: Policy) -> list[Answer]:
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
            predictions = runner.decode(state)["prediction"]
            elapsed = (time.perf_counter() - began) * 1e3
            for row in stopped:
                slot = int(active[row])
                answers[slot] = Answer(
                    predictions[row], step, reasons[row], signals[slot, :step].copy(), model.signals, elapsed
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
