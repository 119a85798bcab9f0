"""Measure the shipped language model: accuracy, damaged words, halting, out-of-scope commands, linear models beside.

    python -m plugins_irp.language.measure [--data DATA] [--teacher RUN] [-o results.json]

Everything is chosen and calibrated on the calibration half of CLINC150's validation split (and oos_train), and reported on
the other half (and oos_val). Damage is seeded; every sentence is damaged ten times, since which words are hit decides much.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from rich.progress import track

from sage_edge.cli.output import print_table
from sage_edge.device import machine
from sage_edge.errors import one_line_errors
from sage_edge.files import require_writable, sha256, write_atomic
from sage_edge.irp.calibrate import Calibration, Promise, calibrate
from sage_edge.irp.families import PLUGIN_FAMILIES
from sage_edge.irp.plugin import Examples
from sage_edge.irp.spec import load_spec
from sage_edge.irp.traces import Traces, steps_taken
from sage_edge.runtime import Session

from .corrupt import mask_a_share, mask_words, typo
from .data import Pair, Texts, data_folder, load_texts
from .linear import KINDS, Linear
from .plugin import FOLDER, Language
from .tokens import MASK

SEED = 7
DRAWS = 10  # of the damage, for each sentence: of one draw the accuracy differs by 0.5 points from that of the next
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class Reader(Protocol):
    """Another model that stands beside."""

    def right(self, texts: Sequence[str], intents: Sequence[str]) -> Bools:
        """bool [n]: which texts it takes for what they mean."""
        ...


def drop_words(text: str, rate: float, rng: np.random.Generator) -> str:
    """`text` without each word with probability `rate`; the last word left is kept."""
    words = text.split()
    kept = [word for word, draw in zip(words, rng.random(len(words)), strict=True) if draw >= rate]
    return " ".join(kept or words[:1])


def mistype_words(text: str, rate: float, rng: np.random.Generator) -> str:
    """`text` with one mistyped letter in each word with probability `rate`."""
    return " ".join(typo(word, rng) if rng.random() < rate else word for word in text.split())


Damage = Callable[[str, np.random.Generator], str]
DAMAGES: dict[str, Damage] = {
    "none": lambda text, rng: text,
    "10 % masked": lambda text, rng: mask_words(text, 0.1, MASK, rng),
    "20 % masked": lambda text, rng: mask_words(text, 0.2, MASK, rng),
    "30 % masked": lambda text, rng: mask_words(text, 0.3, MASK, rng),
    "a fifth of each masked": lambda text, rng: mask_a_share(text, 0.2, MASK, rng),
    "20 % dropped": lambda text, rng: drop_words(text, 0.2, rng),
    "20 % mistyped": lambda text, rng: mistype_words(text, 0.2, rng),
}


@dataclass(frozen=True, eq=False)
class Run:
    """n texts over s steps. signals float32 [n, s, 1 + k], the plugin's energy first; shares float [n, s, intents]; filled
    int [n, seq_len] and filled_probability float of the last step."""

    signals: npt.NDArray[np.float32]
    shares: Floats
    filled: npt.NDArray[np.int64]
    filled_probability: Floats

    def right(self, plugin: Language, intents: Sequence[str]) -> Bools:
        """bool [n, s]."""
        wanted = np.array([plugin.file.intents.index(intent) for intent in intents])
        return np.asarray(self.shares.argmax(-1) == wanted[:, None], bool)


def run_texts(plugin: Language, texts: Sequence[str]) -> Run:
    """All steps of every text, in batches as large as the engine's."""
    rows = plugin.tokens.batch((plugin.tokens.encode(text) for text in texts), plugin.file.config.seq_len)
    kept: dict[str, list[Any]] = {"signals": [], "shares": [], "filled": [], "filled_probability": []}
    for _, arrays in Session(plugin.runner).all_steps({"tokens": rows}, plugin.max_steps):
        logits = arrays["logits"][:, :, 0].astype(np.float64)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        kept["shares"].append((shares / shares.sum(-1, keepdims=True)).transpose(1, 0, 2))
        signals = arrays["signals"].transpose(1, 0, 2)
        energy = np.array([[[plugin.energy_of(step[None])] for step in row] for row in signals], np.float32)
        kept["signals"].append(np.concatenate((energy, signals), -1))
        kept["filled"].append(arrays["filled"][-1])
        kept["filled_probability"].append(arrays["filled_probability"][-1])
    return Run(**{name: np.concatenate(parts) for name, parts in kept.items()})


def damaged(pairs: Sequence[Pair], damage: Damage, draw: int = 0) -> tuple[list[str], list[str]]:
    """(texts, intents) under one kind of damage; the same each time for a number of the draw."""
    rng = np.random.default_rng([SEED, draw])
    return [damage(text, rng) for text, _ in pairs], [intent for _, intent in pairs]


def interval(values: Floats | Bools) -> tuple[float, float]:
    """Mean over sentences and its standard error, in per cent. values [n]: 0 or 1, or shares of draws."""
    return 100 * float(values.mean()), 100 * float(values.std()) / math.sqrt(len(values))


def accuracy(
    plugin: Language, pairs: Sequence[Pair], beside: Mapping[str, Reader], policy: str, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """One row a kind of damage: the model after each step, halted, and the models beside it. `lost` is against the same
    sentences without damage."""
    rows: list[dict[str, Any]] = []
    whole: dict[str, Floats] = {}
    for name, damage in track(DAMAGES.items(), "accuracy"):
        # Share of the draws in which a sentence is understood, [n], or [n, steps].
        shares: dict[str, list[Floats]] = {}
        steps = []
        for draw in range(1 if name == "none" else draws):
            texts, intents = damaged(pairs, damage, draw)
            run = run_texts(plugin, texts)
            right = run.right(plugin, intents)
            taken = steps_taken(traces_of(plugin, run, right), policy)
            steps.append(float(taken.mean()))
            found = {"per_step": right, "full": right[:, -1], "halted": right[np.arange(len(right)), taken - 1]}
            for key, hits in (found | {key: other.right(texts, intents) for key, other in beside.items()}).items():
                shares.setdefault(key, []).append(hits.astype(np.float64))
        means = {key: np.asarray(np.mean(values, 0), np.float64) for key, values in shares.items()}
        per_step = means.pop("per_step")
        whole = whole or means
        cells = {}
        for key, values in means.items():
            value, error = interval(values)
            lost, lost_error = interval(whole[key] - values)
            cells[key] = {"right": value, "error": error, "lost": lost, "lost_error": lost_error}
        rows.append({
            "damage": name, "draws": len(steps), "per_step": (100 * per_step.mean(0)).tolist(),
            "steps": float(np.mean(steps)), **cells,
        })  # fmt: skip
    return rows


def traces_of(plugin: Language, run: Run, right: Bools) -> Traces:
    return Traces(run.signals, right, right.astype(np.float64), plugin.signals)


def examples_run(plugin: Language, examples: Examples) -> tuple[Traces, Floats]:
    """Traces of what halting is calibrated and measured on, and the share of masked words of each."""
    run = run_texts(plugin, [str(observation["text"]) for observation in examples.observations])
    return traces_of(plugin, run, run.right(plugin, examples.references)), np.asarray(examples.groups["masked"])


def halting(plugin: Language, texts: Texts) -> tuple[Calibration, list[dict[str, Any]]]:
    """The certificate from the calibration half, and what it does on the report half, by share of masked words."""
    calibration = calibrate(examples_run(plugin, texts.examples("calibration"))[0], Promise(), PLUGIN_FAMILIES)
    traces, masked = examples_run(plugin, texts.examples("report"))
    taken = steps_taken(traces, calibration.chosen.policy)
    first = np.where(traces.exact.any(1), traces.exact.argmax(1) + 1, traces.steps)
    rows = []
    for name, part in [("all", masked >= 0), *((f"{value:g} %", masked == value) for value in np.unique(masked))]:
        index = np.flatnonzero(part)
        lost = traces.exact[index, -1] & ~traces.exact[index, taken[index] - 1]
        rows.append({
            "masked": name, "examples": len(index), "full": interval(traces.exact[index, -1])[0],
            "halted": interval(traces.exact[index, taken[index] - 1])[0], "lost": 100 * float(lost.mean()),
            "steps": float(taken[index].mean()), "saved": 100 * (1 - float(taken[index].mean()) / traces.steps),
            "oracle": interval(np.asarray(traces.exact[index].any(1), bool))[0], "oracle_steps": float(first[index].mean()),
        })  # fmt: skip
    return calibration, rows


def auroc(inside: Floats, outside: Floats) -> float:
    """Probability that a command in scope has a higher score than one out of scope (ties count half)."""
    return float((inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean())


def scope(plugin: Language, texts: Texts, policy: str) -> dict[str, Any]:
    """Out-of-scope commands by the probability of the likeliest intent when `policy` halts: thresholds from the calibration
    half, results on the other. `balanced` weighs in-scope and out-of-scope errors alike; the others accept a share of
    false alarms."""

    def answers(items: Sequence[str]) -> tuple[Floats, npt.NDArray[np.int64]]:
        run = run_texts(plugin, items)
        nothing = np.zeros(run.shares.shape[:2], bool)
        last = run.shares[np.arange(len(items)), steps_taken(traces_of(plugin, run, nothing), policy) - 1]
        return np.asarray(last.max(-1), np.float64), np.asarray(last.argmax(-1), np.int64)

    inside, _ = answers([t for t, _ in texts.calibration])
    outside, _ = answers(texts.oos_calibration)
    strange, _ = answers(texts.oos_report)
    known, found = answers([t for t, _ in texts.report])
    right = found == [plugin.file.intents.index(intent) for _, intent in texts.report]
    grid = np.unique(np.concatenate((inside, outside)))
    balance = [(inside >= t).mean() + (outside < t).mean() for t in grid]
    thresholds = {"balanced": float(grid[int(np.argmax(balance))])}
    thresholds |= {f"{alarms} % false alarms": float(np.quantile(inside, alarms / 100)) for alarms in (2, 5, 10)}
    rows = [
        {
            "threshold": name, "value": value, "oos_recall": 100 * float((strange < value).mean()),
            "in_scope_rejected": 100 * float((known < value).mean()),
            "in_scope_right": 100 * float(((known >= value) & right).mean()),
        }
        for name, value in thresholds.items()
    ]  # fmt: skip
    return {"auroc_calibration": auroc(inside, outside), "auroc_report": auroc(known, strange), "rows": rows}


def understood(plugin: Language, texts: Sequence[str]) -> list[str]:
    """Normalised texts as the plugin gives them back after all steps."""
    run = run_texts(plugin, texts)
    return [plugin.understood(t, f, p) for t, f, p in zip(texts, run.filled, run.filled_probability, strict=True)]


def filling(plugin: Language, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Share of masked words that are filled with the very word (20 % masked); what repair does to mistyped words, and how
    many words it replaces in a text without fault."""
    rng = np.random.default_rng(SEED)
    whole = [plugin.tokens.normalise(text) for text, _ in pairs]
    hidden = [mask_words(text, 0.2, MASK, rng) for text in whole]
    guess = understood(plugin, hidden)
    right = [a == c for h, g, w in zip(hidden, guess, whole, strict=True)
             for a, b, c in zip(g.split(), h.split(), w.split(), strict=True) if b == MASK]  # fmt: skip
    wrong = [mistype_words(text, 0.2, rng) for text in whole]
    mended = understood(plugin, wrong)
    triples = [t for m, b, w in zip(mended, wrong, whole, strict=True) for t in
               zip(m.split(), b.split(), w.split(), strict=True)]  # fmt: skip
    changed = [(m, b, w) for m, b, w in triples if m != b]
    broken = [(m, b, w) for m, b, w in triples if b != w]
    kept = zip(understood(plugin, whole), whole, strict=True)
    spoilt = [a != b for mended_text, text in kept for a, b in zip(mended_text.split(), text.split(), strict=True)]
    return {
        "masked_words": len(right), "filled_right": 100 * float(np.mean(right)),
        "mistyped_words": len(broken), "repaired": 100 * float(np.mean([m == w for m, _, w in broken])),
        "replaced_words": len(changed),
        "replaced_right": 100 * float(np.mean([m == w for m, _, w in changed])) if changed else None,
        "faultless_words": len(spoilt), "spoilt": 100 * float(np.mean(spoilt)),
    }  # fmt: skip


def measure(plugin: Language, texts: Texts, more: Mapping[str, Reader]) -> dict[str, Any]:
    """Everything; the plugin is active. more: models that stand beside besides the linear ones."""
    beside = {**{kind: Linear(texts.train, kind) for kind in KINDS}, **more}
    calibration, rows = halting(plugin, texts)
    return {
        "weights_sha256": plugin.file.weights_sha256, "tokenizer_sha256": sha256(plugin.tokens.path),
        "machine": asdict(machine()), "command": "python -m plugins_irp.language.measure " + " ".join(sys.argv[1:]),
        "examples": {"report": len(texts.report), "calibration": len(texts.calibration),
                     "oos_report": len(texts.oos_report), "oos_calibration": len(texts.oos_calibration)},
        "accuracy": accuracy(plugin, texts.report, beside, calibration.chosen.policy),
        "certified": asdict(calibration.chosen), "families": [asdict(f) for f in calibration.families], "halting": rows,
        "scope": scope(plugin, texts, calibration.chosen.policy), "filling": filling(plugin, texts.report),
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """The results as tables on standard output."""
    rows = found["accuracy"]
    models = [key for key, cell in rows[0].items() if isinstance(cell, dict)]
    print_table("in-scope accuracy, %, report half (lost to the damage)", ("damage", *models, "steps", "per step"),
                [(r["damage"], *(f"{r[k]['right']:.1f} ± {r[k]['error']:.1f} ({r[k]['lost']:.1f} ± {r[k]['lost_error']:.1f})"
                                 for k in models),
                 f"{r['steps']:.2f}", " ".join(f"{v:.1f}" for v in r["per_step"])) for r in rows])  # fmt: skip
    print_table(f"halting, certified: {found['certified']['policy']}",
                ("masked", "examples", "full", "halted", "lost", "steps", "saved", "oracle", "its steps"),
                [(r["masked"], str(r["examples"]), *(f"{r[k]:.1f}" for k in ("full", "halted", "lost")), f"{r['steps']:.2f}",
                 f"{r['saved']:.0f} %", f"{r['oracle']:.1f}", f"{r['oracle_steps']:.2f}") for r in found["halting"]])  # fmt: skip
    print_table(f"out of scope, AUROC {found['scope']['auroc_report']:.3f}",
                ("threshold", "value", "out-of-scope recall", "in scope rejected", "in scope right"),
                [(r["threshold"], f"{r['value']:.3f}", f"{r['oos_recall']:.1f}", f"{r['in_scope_rejected']:.1f}",
                 f"{r['in_scope_right']:.1f}") for r in found["scope"]["rows"]])  # fmt: skip
    print(found["filling"])


@one_line_errors()
def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder with clinc150_train_val.json.gz")
    parser.add_argument(
        "--also", type=Path, action="append", default=[],
        help="CSV file of more sentences, from which the teacher has learned; the linear models do here",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="only this many sentences of each part, for a quick look")
    parser.add_argument("--teacher", type=Path, help="RUN of language.teacher: what it taught is measured as well")
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if arguments.output:
        require_writable(arguments.output)
    more: dict[str, Reader] = {}
    if arguments.teacher:
        from .teacher import Taught  # torch, which nothing else here needs

        more["teacher"] = Taught(arguments.data, arguments.teacher, also=arguments.also)
    spec = load_spec(FOLDER)
    with Language(spec, **spec.options) as plugin:
        found = measure(plugin, load_texts(arguments.data, arguments.also).first(arguments.limit), more)
    show(found)
    if arguments.output:
        write_atomic(arguments.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
