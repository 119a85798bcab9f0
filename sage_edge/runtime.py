"""A loaded engine that answers requests, each with as many steps as its halting policy asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError
from sage_edge.irp.certificate import CERTIFIED, Certificate, uses_certificate
from sage_edge.irp.halting import Policy, limited
from sage_edge.pool import Answer, Pool, Ticket
from sage_edge.specs import Array

__all__ = ["Answer", "Session"]


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
        halt = self.default_halt if halt is None else halt
        if isinstance(halt, str) and uses_certificate(halt):
            if self.certificate is None:
                raise InputError(
                    f"halting policy {halt!r}: this engine has no certificate; `sage-edge calibrate ENGINE --data DIR` makes one"
                )
            halt = self.certificate.expand(halt)
        return limited(halt, max_steps or self.runner.model.max_steps)

    def infer(
        self,
        observation: dict[str, Array],
        halt: str | Policy | None = None,
        max_steps: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answers to n requests, in their order; any n. A slot whose request halts takes the next one (see `pool`).

        halt: a policy or its text; by default the engine's certified policy, else `learned`.
        observation: arrays by name, first axis the requests (HRM: `inputs` int32 [n, seq_len], optional
        `puzzle_identifiers` int32 [n]). Raises InputError for bad arrays or an unknown policy.
        """
        policy = self.policy(halt, max_steps)
        certified = self.certificate is not None and (halt is None or uses_certificate(halt))
        accepts = self.certificate.accepts() if certified and self.certificate else None
        checked = self.runner.model.validate_observation(observation)
        pool = Pool(self.runner)
        tickets: list[Ticket] = []
        for row in range(len(next(iter(checked.values())))):
            while pool.waiting > self.runner.slots:  # enough to fill every slot; more would only make the queue long
                pool.tick()
                if progress:
                    progress(pool.stats.answered)
            one = {name: array[row] for name, array in checked.items()}
            tickets.append(pool.submit(one, policy, max_steps, accepts=accepts))
        while not pool.idle:
            pool.tick()
            if progress:
                progress(pool.stats.answered)
        return [ticket.result() for ticket in tickets]

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
