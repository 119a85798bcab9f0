"""The gate: is this engine the model that it claims to be, and is the model alive?

Every step is compared from the reference's own carry, because a recurrent model may amplify rounding without bound: a
free-running comparison is reported beside the model's own amplification of a change of 1e-6, but does not decide.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sage_edge.arrays import read_npz
from sage_edge.engines.runner import Runner, State
from sage_edge.errors import InputError, IntegrityError
from sage_edge.specs import Array

# Largest absolute difference of one step from the same carry. Carry and logits are of order one to ten; two correct fp32
# programs differ by 1e-6 to 1e-5 after one step of 24 layers, and the smallest fault we seed shows at 1e-3.
TOLERANCE = 1e-4
PERTURBATION = 1e-6


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it holds, and the figure or the place that says so."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class StepParity:
    """Error of one step against the reference. `same_carry_*` start from the reference's carry, `free_*` run on."""

    step: int
    same_carry_max: float
    same_carry_mean: float
    prediction_agreement: float
    free_max: float
    free_prediction_agreement: float
    amplification: float


@dataclass(frozen=True)
class Verdict:
    """The findings of a gate. `passed` only when every one holds."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(f.passed for f in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if not f.passed)

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class CheckReport(Verdict):
    """All findings, and the table of steps."""

    steps: tuple[StepParity, ...]
    tolerance: float


@dataclass(frozen=True)
class Reference:
    """What the fp32 torch model did with a few observations, step by step (reference.npz of a bundle).

    observation: arrays [n, ...]; start: context and carry after encode; carries[k], signals[k], outputs[k]: after step k+1.
    """

    observation: dict[str, Array]
    start: dict[str, Array]
    carries: tuple[dict[str, Array], ...]
    signals: tuple[npt.NDArray[np.float32], ...]
    outputs: tuple[dict[str, Array], ...]

    def arrays(self) -> dict[str, Array]:
        """Flat arrays for np.savez: observation/NAME, start/NAME, K/carry/NAME, K/signals, K/output/NAME (K from 1)."""
        flat = {f"observation/{k}": v for k, v in self.observation.items()}
        flat |= {f"start/{k}": v for k, v in self.start.items()}
        for step, (carry, signals, outputs) in enumerate(zip(self.carries, self.signals, self.outputs, strict=True), 1):
            flat |= {f"{step}/carry/{k}": v for k, v in carry.items()}
            flat |= {f"{step}/output/{k}": v for k, v in outputs.items()}
            flat[f"{step}/signals"] = signals
        return flat


def load_reference(path: Path) -> Reference:
    """Read reference.npz. Raises InputError when it is no .npz file, IntegrityError when it holds something else."""
    flat = read_npz(path)

    def part(prefix: str) -> dict[str, Array]:
        return {name.removeprefix(prefix): array for name, array in flat.items() if name.startswith(prefix)}

    steps = sorted(int(name.split("/")[0]) for name in flat if name.endswith("/signals"))
    if not steps or steps != list(range(1, len(steps) + 1)):
        raise IntegrityError(f"{path}: not a reference file: it holds no consecutive steps")
    return Reference(
        part("observation/"),
        part("start/"),
        tuple(part(f"{k}/carry/") for k in steps),
        tuple(flat[f"{k}/signals"] for k in steps),
        tuple(part(f"{k}/output/") for k in steps),
    )


def check(runner: Runner, reference: Reference, tolerance: float = TOLERANCE) -> CheckReport:
    """Compare an active runner with its reference and look for signs of a dead model.

    Raises InputError when the reference does not fit the runner's model.
    """
    if set(reference.start) != {s.name for s in (*runner.model.context, *runner.model.carry)}:
        raise InputError("reference.npz does not hold the context and carry of this model; export the bundle again")
    if len(reference.signals) < runner.model.max_steps:
        raise InputError(
            f"reference.npz holds {len(reference.signals)} of {runner.model.max_steps} steps; export again"
        )
    findings = [encode_parity(runner, reference, tolerance)]
    steps, step_findings = _step_parity(runner, reference, tolerance)
    findings += step_findings
    findings += truthful_signals(runner, reference, tolerance)
    findings += liveness(runner, reference)
    findings.append(slot_independence(runner, reference, tolerance))
    return CheckReport(tuple(findings), steps, tolerance)


def record(runner: Runner, observation: dict[str, Array]) -> Reference:
    """What an active fp32 runner does with observations of any number, step by step: a reference for lowered graphs."""
    checked = runner.model.validate_observation(observation)
    names = output_names(runner)
    parts = []
    for rows in row_chunks(runner, len(next(iter(checked.values())))):
        state = runner.encode(take(checked, rows))
        parts.append([runner.read(state), *(advance(runner, state, names) for _ in range(runner.model.max_steps))])
    whole = [
        {name: np.concatenate([part[k][name] for part in parts]) for name in parts[0][k]} for k in range(len(parts[0]))
    ]
    carry = [spec.name for spec in runner.model.carry]
    return Reference(
        checked,
        whole[0],
        tuple({name: step[name] for name in carry} for step in whole[1:]),
        tuple(step["signals"] for step in whole[1:]),
        tuple({name: step[name] for name in names} for step in whole[1:]),
    )


def row_chunks(runner: Runner, count: int) -> list[slice]:
    """Slices of at most `runner.slots` rows that cover `count` rows."""
    return [slice(i, min(i + runner.slots, count)) for i in range(0, count, runner.slots)]


def take(arrays: dict[str, Array], rows: slice | list[int]) -> dict[str, Array]:
    return {name: array[rows] for name, array in arrays.items()}


def advance(runner: Runner, state: State, names: tuple[str, ...]) -> dict[str, Array]:
    """One step; everything that came of it: carry, signals and decode outputs under their names."""
    signals = runner.refine(state).copy()
    return {**runner.read(state), **runner.decode(state, names), "signals": signals}


def output_names(runner: Runner) -> tuple[str, ...]:
    return tuple(s.name for s in runner.model.prediction)


def expected_at(reference: Reference, step: int, rows: slice) -> dict[str, Array]:
    every = {**reference.carries[step], **reference.outputs[step], "signals": reference.signals[step]}
    return take(every, rows)


def _difference(ours: dict[str, Array], theirs: dict[str, Array]) -> dict[str, npt.NDArray[np.float64]]:
    """|ours - theirs| of all floating arrays; NaN or Inf in ours counts as infinite."""
    result = {}
    for name, wanted in theirs.items():
        if wanted.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                gap = np.abs(ours[name].astype(np.float64) - wanted)
            result[name] = np.where(np.isfinite(gap), gap, np.inf)
    return result


def _allowed(wanted: Array, tolerance: float) -> float:
    """The tolerance, in proportion for tensors whose values exceed ten: fp32 rounding is relative."""
    return tolerance * max(1.0, float(np.abs(wanted).max()) / 10)


def _decided(outputs: dict[str, Array], tolerance: float) -> npt.NDArray[np.bool_] | None:
    """Tokens whose best logit leads by more than rounding can turn; None for models without logits."""
    if "logits" not in outputs:
        return None
    best = np.sort(outputs["logits"].astype(np.float64), axis=-1)
    lead: npt.NDArray[np.bool_] = best[..., -1] - best[..., -2] > 2 * tolerance
    return lead


def encode_parity(runner: Runner, reference: Reference, tolerance: float) -> Finding:
    worst = 0.0
    for rows in row_chunks(runner, len(next(iter(reference.start.values())))):
        state = runner.encode(take(reference.observation, rows))
        wanted = take(reference.start, rows)
        gaps = _difference(runner.read(state), wanted)
        worst = max([worst, *(float(gap.max()) / _allowed(wanted[name], 1) for name, gap in gaps.items())])
    return Finding("encode_parity", worst <= tolerance, f"max error {worst:.2e}, allowed {tolerance:.0e}")


class Worst(NamedTuple):
    """The largest error of one tensor, what is allowed there, and the step."""

    error: float
    allowed: float
    step: int


def _step_parity(
    runner: Runner, reference: Reference, tolerance: float
) -> tuple[tuple[StepParity, ...], list[Finding]]:
    steps, names = runner.model.max_steps, output_names(runner)
    tables = np.zeros((steps, 6))
    worst: defaultdict[str, Worst] = defaultdict(lambda: Worst(0.0, tolerance, 0))
    wrong_predictions = 0
    chunks = row_chunks(runner, len(next(iter(reference.start.values()))))
    for rows in chunks:
        share = 1 / len(chunks)
        begin = take(reference.start, rows)
        free, shaken = runner.write(begin), runner.write(begin)
        for step in range(steps):
            carry = {**begin, **take(reference.carries[step - 1], rows)} if step else begin
            expected = expected_at(reference, step, rows)
            got = advance(runner, runner.write(carry), names)
            for name, gap in _difference(got, expected).items():
                size, allowed = float(gap.max()), _allowed(expected[name], tolerance)
                if size / allowed >= worst[name].error / worst[name].allowed:
                    worst[name] = Worst(size, allowed, step + 1)
                tables[step, 0] = max(tables[step, 0], size)
                tables[step, 1] += share * float(gap.mean()) / len(_difference(got, expected))
            same = got["prediction"] == expected["prediction"]
            decided = _decided(expected, tolerance)
            wrong_predictions += int((~same & decided).sum() if decided is not None else 0)
            tables[step, 2] += share * float(same.mean())
            drifted = advance(runner, free, names)
            drift = _difference(drifted, expected)
            tables[step, 3] = max([tables[step, 3], *(float(g.max()) for g in drift.values())])
            tables[step, 4] += share * float((drifted["prediction"] == expected["prediction"]).mean())
            moved = advance(runner, shaken, names)
            tables[step, 5] = max([tables[step, 5], *(float(g.max()) for g in _difference(moved, drifted).values())])
            if step == 0:
                shaken = shake(runner, shaken)
    findings = [
        Finding(
            f"parity_{name}", w.error <= w.allowed, f"max error {w.error:.2e} at step {w.step}, allowed {w.allowed:.1e}"
        )
        for name, w in worst.items()
    ]
    detail = f"{wrong_predictions} decided outputs differ from the reference"
    findings.append(Finding("parity_prediction", wrong_predictions == 0, detail))
    finite = all(w.error < np.inf for w in worst.values())
    findings.append(Finding("finite", finite, "no NaN or Inf" if finite else "NaN or Inf came out"))
    rows_ = tuple(StepParity(step + 1, *(float(v) for v in tables[step])) for step in range(steps))
    return rows_, findings


def shake(runner: Runner, state: State) -> State:
    """The state with a change of PERTURBATION, of random sign, in every element of the first carry."""
    arrays, name = runner.read(state), runner.model.carry[0].name
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), arrays[name].shape)
    arrays[name] = (arrays[name] + PERTURBATION * signs).astype(arrays[name].dtype)
    # A broken engine's NaN cannot be written back; it is reported elsewhere.
    return runner.write(arrays) if all(np.isfinite(a).all() for a in arrays.values()) else state


def truthful_signals(runner: Runner, reference: Reference, tolerance: float) -> list[Finding]:
    """Recompute, outside the graph, the signals that can be computed from logits and carry."""
    model = runner.model
    names = output_names(runner)
    if "logits" not in names:
        return []
    rows = row_chunks(runner, len(next(iter(reference.start.values()))))[0]
    state = runner.encode(take(reference.observation, rows))
    before = {**runner.read(state), **runner.decode(state, names)}
    worst: dict[str, float] = {}
    argmax_wrong = 0
    for _ in range(model.max_steps):
        after = advance(runner, state, names)
        logits = after["logits"].astype(np.float64)
        argmax_wrong += int((logits.argmax(-1) != after["prediction"]).sum())
        shifted = logits - logits.max(-1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        entropy = -(p * np.log(p + 1e-30)).sum(-1)
        first = model.carry[0].name
        move = np.sqrt(((after[first].astype(np.float64) - before[first]) ** 2).mean((1, 2)))
        size = np.sqrt((before[first].astype(np.float64) ** 2).mean((1, 2)))
        truth = {
            "entropy_mean": entropy.mean(-1),
            "entropy_max": entropy.max(-1),
            "changed": (after["prediction"] != before["prediction"]).mean(-1),
            f"{first}_change": move / (size + 1e-12),
        }
        for name in set(truth) & set(model.signals):
            with np.errstate(invalid="ignore"):
                gap = float(np.abs(after["signals"][:, model.signal(name)] - truth[name]).max())
            worst[name] = max(worst.get(name, 0.0), gap if np.isfinite(gap) else np.inf)
        before = after
    findings = [
        Finding(f"signal_{name}", gap <= 10 * tolerance, f"differs from its definition by {gap:.2e}")
        for name, gap in sorted(worst.items())
    ]
    detail = f"{argmax_wrong} predictions are not the argmax of their logits"
    return [*findings, Finding("prediction_is_argmax", argmax_wrong == 0, detail)]


def liveness(runner: Runner, reference: Reference) -> list[Finding]:
    """A model that ignores its input, never moves, or always wants the same number of steps is refused."""
    model, names = runner.model, output_names(runner)
    rows = row_chunks(runner, len(next(iter(reference.start.values()))))[0]
    observation = take(reference.observation, rows)
    inputs_differ = any(len(np.unique(a, axis=0)) > 1 for a in observation.values())
    state = runner.encode(observation)
    start = runner.read(state)
    findings = []
    halting: list[npt.NDArray[np.float64]] = []
    moved = 0.0
    last = start
    for _ in range(model.max_steps):
        now = advance(runner, state, names)
        if {"q_halt", "q_continue"} <= set(model.signals):
            columns = now["signals"].astype(np.float64)
            halting.append(columns[:, model.signal("q_halt")] - columns[:, model.signal("q_continue")])
        moved = max([moved, *(float(np.abs(now[s.name] - last[s.name]).max()) for s in model.carry)])
        last = now
    findings.append(Finding("refine_moves", moved > 1e-6, f"largest change of the carry in a step: {moved:.2e}"))
    if not inputs_differ:
        detail = "the reference holds only one distinct input; export with --samples of at least two"
        findings.append(Finding("input_sensitivity", False, detail))
    else:
        key = "logits" if "logits" in last else "prediction"
        spread = float(np.ptp(last[key].astype(np.float64), axis=0).max())
        detail = f"outputs of different inputs differ by at most {spread:.2e}"
        findings.append(Finding("input_sensitivity", spread > 1e-3, detail))
    answers = last["prediction"]
    values = len(np.unique(answers))
    detail = f"{values} distinct value(s) over {answers.size} predicted outputs"
    findings.append(Finding("prediction_not_collapsed", values > 1, detail))
    if halting:
        spread = float(np.ptp(np.stack(halting)))
        detail = f"q_halt - q_continue varies by {spread:.2e} over inputs and steps"
        findings.append(Finding("halting_signal_varies", spread > 1e-4, detail))
    return findings


def slot_independence(runner: Runner, reference: Reference, tolerance: float) -> Finding:
    """A request must not see its neighbours: each alone gives what it gave in company, after one step."""
    rows = row_chunks(runner, len(next(iter(reference.start.values()))))[0]
    together = runner.encode(take(reference.observation, rows))
    names = output_names(runner)
    company = advance(runner, together, names)
    worst = 0.0
    for row in range(together.slots):
        alone = advance(runner, runner.encode(take(reference.observation, slice(row, row + 1))), names)
        wanted = take(company, slice(row, row + 1))
        gaps = _difference(alone, wanted)
        worst = max([worst, *(float(gap.max()) / _allowed(wanted[name], 1) for name, gap in gaps.items())])
    return Finding("slot_independence", worst <= tolerance, f"alone and in company differ by {worst:.2e}")
