"""Halting policies: pure functions over the history of signals.

A policy is written as text: `learned`, `learned:1.5`, `patience:2`, `entropy:0.05`, `entropy_max:0.3`, `slope:0.01,3`,
`energy:0.1`, `feasible:0`, `max_steps:6`, `deadline:20`, joined with `and`, `or` and parentheses, e.g.
`learned or deadline:20`. The model's own maximum of steps always holds as well. The text of a policy reads back as the
same policy, to the last bit of a threshold.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
ENERGY = ("energy", "entropy_mean")  # a plugin's own energy; for a bare engine, its mean token entropy


@dataclass(frozen=True)
class History:
    """What has been seen of n requests that may stand at different steps.

    signals float32 [n, capacity, k]: row i holds its steps 1..steps[i], the rest is unused. steps int [n], >= 1.
    elapsed_ms float [n]: time since each request was admitted. names: the k signal names.
    """

    signals: Floats
    steps: npt.NDArray[np.int64]
    elapsed_ms: npt.NDArray[np.float64]
    names: tuple[str, ...]

    def at(self, name: str, back: int = 0) -> Floats:
        """Signal `name` of each request `back` steps ago, [n]; NaN where the request had not begun."""
        if name not in self.names:
            raise InputError(f"halting: signal {name!r} is not given by this model; it gives {', '.join(self.names)}")
        index = self.steps - 1 - back
        column = self.signals[:, :, self.names.index(name)]
        if not back:  # what most policies ask for, every step
            return column[np.arange(len(index)), index]
        values = column[np.arange(len(index)), np.maximum(index, 0)]
        known: Floats = np.where(index >= 0, values, np.float32(np.nan)).astype(np.float32)
        return known

    def energy(self, back: int = 0) -> Floats:
        """The energy of each request `back` steps ago, [n]: signal `energy`, else `entropy_mean`."""
        return self.at(next((name for name in ENERGY if name in self.names), ENERGY[0]), back)


def number(value: float) -> str:
    """The shortest text that reads back as `value`."""
    return short if float(short := f"{value:g}") == value else repr(value)


class Policy(ABC):
    """Decides for every request whether it is done. Stateless: the same history always gives the same decision."""

    @abstractmethod
    def halts(self, history: History) -> Bools:
        """bool [n]: which requests stop now."""

    def reasons(self, history: History) -> list[str]:
        """Per request the policy that stopped it, or "" where it goes on."""
        return [str(self) if stop else "" for stop in self.halts(history)]

    @abstractmethod
    def __str__(self) -> str: ...


@dataclass(frozen=True)
class MaxSteps(Policy):
    """Stop after `steps` steps."""

    steps: int

    def halts(self, history: History) -> Bools:
        done: Bools = history.steps >= self.steps
        return done

    def __str__(self) -> str:
        return f"max_steps:{self.steps}"


@dataclass(frozen=True)
class Learned(Policy):
    """Stop when the model's own halting head says so: q_halt > q_continue (arXiv 2506.21734, adaptive computation).

    A `margin` (logits, any sign) asks for q_halt - q_continue > margin instead: larger is more careful.
    """

    margin: float = 0.0

    def halts(self, history: History) -> Bools:
        return history.at("q_halt") - history.at("q_continue") > self.margin

    def __str__(self) -> str:
        return f"learned:{number(self.margin)}" if self.margin else "learned"


@dataclass(frozen=True)
class Patience(Policy):
    """Stop when the prediction has not changed for `steps` steps in a row (arXiv 2006.04152)."""

    steps: int

    def halts(self, history: History) -> Bools:
        still = np.ones(len(history.steps), dtype=bool)
        for back in range(self.steps):
            still &= history.at("changed", back) == 0
        # "Unchanged at step 1" only compares with the initial state, in which nothing was predicted yet.
        return still & (history.steps > self.steps)

    def __str__(self) -> str:
        return f"patience:{self.steps}"


@dataclass(frozen=True)
class Entropy(Policy):
    """Stop when the mean token entropy (nats) is below `threshold`."""

    threshold: float

    def halts(self, history: History) -> Bools:
        return history.at("entropy_mean") < self.threshold

    def __str__(self) -> str:
        return f"entropy:{number(self.threshold)}"


@dataclass(frozen=True)
class EntropyMax(Policy):
    """Stop when even the least certain token has an entropy (nats) below `threshold`."""

    threshold: float

    def halts(self, history: History) -> Bools:
        return history.at("entropy_max") < self.threshold

    def __str__(self) -> str:
        return f"entropy_max:{number(self.threshold)}"


@dataclass(frozen=True)
class Slope(Policy):
    """Stop when the energy has fallen by less than `epsilon` a step over the last `window` steps (the IRP default)."""

    epsilon: float
    window: int

    def halts(self, history: History) -> Bools:
        fall = (history.energy(self.window) - history.energy()) / self.window
        return fall < self.epsilon  # NaN, where the window is not full, compares false

    def __str__(self) -> str:
        return f"slope:{number(self.epsilon)},{self.window}"


@dataclass(frozen=True)
class EnergyBelow(Policy):
    """Stop when the energy is below `threshold` (in the plugin's own unit, any sign)."""

    threshold: float

    def halts(self, history: History) -> Bools:
        return history.energy() < self.threshold

    def __str__(self) -> str:
        return f"energy:{number(self.threshold)}"


@dataclass(frozen=True)
class Feasible(Policy):
    """Stop when the constraints hold with at least `margin`: signal `margin`, which a plugin with hard constraints gives
    (positive: all hold; in the unit of its constraints)."""

    margin: float = 0.0

    def halts(self, history: History) -> Bools:
        return history.at("margin") >= self.margin

    def __str__(self) -> str:
        return f"feasible:{number(self.margin)}" if self.margin else "feasible"


@dataclass(frozen=True)
class Deadline(Policy):
    """Stop when `milliseconds` have passed since the request was admitted; checked after every step."""

    milliseconds: float

    def halts(self, history: History) -> Bools:
        return history.elapsed_ms >= self.milliseconds

    def __str__(self) -> str:
        return f"deadline:{number(self.milliseconds)}"


@dataclass(frozen=True)
class AnyOf(Policy):
    """Stop when any part says so; the reason is the first part that did."""

    parts: tuple[Policy, ...]

    def halts(self, history: History) -> Bools:
        done: Bools = np.any([part.halts(history) for part in self.parts], axis=0)
        return done

    def reasons(self, history: History) -> list[str]:
        columns = zip(*(part.reasons(history) for part in self.parts), strict=True)
        return [next((reason for reason in column if reason), "") for column in columns]

    def __str__(self) -> str:
        return " or ".join(str(part) for part in self.parts)


@dataclass(frozen=True)
class AllOf(Policy):
    """Stop when all parts say so."""

    parts: tuple[Policy, ...]

    def halts(self, history: History) -> Bools:
        done: Bools = np.all([part.halts(history) for part in self.parts], axis=0)
        return done

    def __str__(self) -> str:
        return " and ".join(f"({part})" if isinstance(part, AnyOf) else str(part) for part in self.parts)


HELP = (
    "learned[:MARGIN] | patience:STEPS | entropy:NATS | entropy_max:NATS | slope:EPSILON,WINDOW | energy:E | "
    "feasible[:MARGIN] | deadline:MS | max_steps:N | full, joined with `and`, `or` and parentheses"
)


def parse_policy(text: str, max_steps: int) -> Policy:
    """The policy that `text` describes, with the model's `max_steps` as the last resort.

    `full` (alone) runs every step. Raises InputError quoting the part that is not understood.
    """
    limit = MaxSteps(max_steps)
    if text.strip() == "full":
        return limit
    tokens = re.findall(r"[()]|[^\s()]+", text)
    policy, rest = _either(tokens, text)
    if rest:
        raise InputError(f"halting policy {text!r}: {rest[0]!r} is not expected there; use {HELP}")
    return AnyOf((*(policy.parts if isinstance(policy, AnyOf) else (policy,)), limit))


def limited(halt: str | Policy, limit: int) -> Policy:
    """The policy that `halt` is or names, never beyond `limit` steps. Raises InputError for a text not understood."""
    if isinstance(halt, str):
        return parse_policy(halt, limit)
    return AnyOf((*(halt.parts if isinstance(halt, AnyOf) else (halt,)), MaxSteps(limit)))


def _either(tokens: list[str], text: str) -> tuple[Policy, list[str]]:
    parts, rest = _chain(tokens, text, "or")
    return (parts[0] if len(parts) == 1 else AnyOf(parts)), rest


def _chain(tokens: list[str], text: str, word: str) -> tuple[tuple[Policy, ...], list[str]]:
    parts: list[Policy] = []
    while True:
        if word == "or":
            inner, tokens = _chain(tokens, text, "and")
            parts.append(inner[0] if len(inner) == 1 else AllOf(inner))
        else:
            part, tokens = _single(tokens, text)
            parts.append(part)
        if not tokens or tokens[0] != word:
            return tuple(parts), tokens
        tokens = tokens[1:]


def _single(tokens: list[str], text: str) -> tuple[Policy, list[str]]:
    if not tokens:
        raise InputError(f"halting policy {text!r}: a policy is missing at the end; use {HELP}")
    head, rest = tokens[0], tokens[1:]
    if head == "(":
        policy, rest = _either(rest, text)
        if not rest or rest[0] != ")":
            raise InputError(f"halting policy {text!r}: a closing parenthesis is missing")
        return policy, rest[1:]
    name, _, argument = head.partition(":")
    try:
        return _build(name, argument.split(",") if argument else []), rest
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"halting policy {text!r}: {head!r} is not understood; use {HELP}") from error


def _build(name: str, arguments: list[str]) -> Policy:
    def whole(value: str) -> int:
        if (number := int(value)) < 1:
            raise ValueError(value)
        return number

    def positive(value: str) -> float:
        number = float(value.removesuffix("ms"))
        if not 0 < number < float("inf"):
            raise ValueError(value)
        return number

    def finite(value: str) -> float:
        if not abs(number := float(value)) < float("inf"):
            raise ValueError(value)
        return number

    if name == "slope":
        epsilon, window = arguments or ("0.01", "3")
        return Slope(positive(epsilon), whole(window))
    if name == "learned":
        (margin,) = arguments or ("0",)
        return Learned(finite(margin))
    if name == "feasible":
        (margin,) = arguments or ("0",)
        return Feasible(finite(margin))
    (value,) = arguments or {"patience": ("2",), "entropy": ("0.05",), "entropy_max": ("0.1",)}[name]
    if name == "patience":
        return Patience(whole(value))
    if name == "entropy":
        return Entropy(positive(value))
    if name == "entropy_max":
        return EntropyMax(positive(value))
    if name == "energy":
        return EnergyBelow(finite(value))
    if name == "deadline":
        return Deadline(positive(value))
    if name == "max_steps":
        return MaxSteps(whole(value))
    raise KeyError(name)
