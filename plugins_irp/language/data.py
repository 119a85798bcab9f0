"""The texts that the language plugin is trained and measured on; they are not part of the repository.

`clinc150_train_val.json.gz`: CLINC150 (Larson et al., EMNLP 2019, doi 10.18653/v1/D19-1131; github.com/clinc/oos-eval, CC BY
3.0) as {train, val, oos_train, oos_val}, each a list of [text, intent]. Its test split is not used: it is kept for a final
comparison. The validation split is halved: one half to choose and to calibrate, one to report.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sage_edge.errors import InputError
from sage_edge.irp.plugin import Examples

from .corrupt import mask_words
from .tokens import MASK, normalised, normaliser

CLINC = "clinc150_train_val.json.gz"
VARIABLE = "SAGE_EDGE_DATA"
SPLIT_SEED = 0
RATES = (0.0, 0.1, 0.2, 0.3)  # shares of masked words in what halting is calibrated and measured on
Pair = tuple[str, str]  # text, intent


@dataclass(frozen=True)
class Texts:
    """In scope: train; calibration and report, the halves of val. Out of scope: oos_calibration (oos_train of the source)
    and oos_report (oos_val). The last `added` of train are not CLINC150's own."""

    train: tuple[Pair, ...]
    calibration: tuple[Pair, ...]
    report: tuple[Pair, ...]
    oos_calibration: tuple[str, ...]
    oos_report: tuple[str, ...]
    added: int = 0

    @property
    def intents(self) -> tuple[str, ...]:
        return tuple(sorted({intent for _, intent in self.train}))

    def first(self, limit: int | None) -> Texts:
        """The same with at most `limit` texts of each part but train, spread over the intents."""
        if limit is None:
            return self
        parts = {name: part for name, part in vars(self).items() if name not in ("train", "added")}
        return replace(self, **{name: p[:: max(1, len(p) // limit)][:limit] for name, p in parts.items()})

    def also(self, path: Path) -> Texts:
        """The same with the training sentences of a CSV file (`labelled`) as well, less those that are, to the model, a sentence
        of another part. Raises InputError, also for an intent that there is not."""
        pairs = labelled(path)
        if unknown := {intent for _, intent in pairs}.difference(self.intents):
            raise InputError(f"{path}: {sorted(unknown)[0]!r}: expected one of the {len(self.intents)} intents")
        held_out = [text for text, _ in (*self.calibration, *self.report)] + [*self.oos_calibration, *self.oos_report]
        seen = {normalised(text, normaliser()) for text in held_out}
        more = tuple(pair for pair in pairs if normalised(pair[0], normaliser()) not in seen)
        return replace(self, train=self.train + more, added=self.added + len(more))

    def examples(self, source: str, limit: int | None = None) -> Examples:
        """Of `calibration` or `report`, in a fixed random order, with RATES of their words masked in turn."""
        if source not in ("calibration", "report"):
            raise InputError(f"language: examples {source!r}: expected calibration or report")
        pairs: tuple[Pair, ...] = getattr(self, source)
        rng = np.random.default_rng(SPLIT_SEED)
        order = rng.permutation(len(pairs))
        rates = [RATES[i % len(RATES)] for i in range(len(order))]
        texts = [mask_words(pairs[i][0], rate, MASK, rng) for i, rate in zip(order, rates, strict=True)]
        cut = slice(0, limit)
        return Examples(
            [{"text": text} for text in texts[cut]],
            [pairs[i][1] for i in order[cut]],
            {"masked": [100 * rate for rate in rates[cut]]},
        )


def data_folder() -> Path:
    """$SAGE_EDGE_DATA/language, else ../shared/data/language beside the repository."""
    if own := os.environ.get(VARIABLE):
        return Path(own) / "language"
    return Path(__file__).resolve().parents[3] / "shared" / "data" / "language"


def load_texts(folder: Path, also: Sequence[Path] = ()) -> Texts:
    """Read CLINC150, and CSV files of more training sentences. Raises InputError naming the file, what was
    expected and what to do."""
    path = folder / CLINC
    if not path.is_file():
        raise InputError(
            f"{path}: missing; make it of CLINC150 (github.com/clinc/oos-eval): gzipped JSON with train, val, oos_train and "
            f"oos_val, in a folder `language` of the one that ${VARIABLE} names"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            raw = json.load(handle)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: expected gzipped JSON: {error}") from error
    train, val, oos_train, oos_val = (_pairs(raw, name, path) for name in ("train", "val", "oos_train", "oos_val"))
    calibration, report = halves(val)
    if not calibration or not report:
        raise InputError(f"{path}: 'val': expected at least two of an intent, to be halved")
    texts = Texts(train, calibration, report, tuple(t for t, _ in oos_train), tuple(t for t, _ in oos_val))
    for more in also:
        texts = texts.also(more)
    return texts


def _pairs(raw: Any, name: str, path: Path) -> tuple[Pair, ...]:
    rows = raw.get(name) if isinstance(raw, dict) else None

    def is_pair(row: Any) -> bool:
        return isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) and part.strip() for part in row)

    if not isinstance(rows, list) or not rows or not all(is_pair(row) for row in rows):
        raise InputError(f"{path}: {name!r}: expected a list of [text, intent]")
    return tuple((text, intent) for text, intent in rows)


def halves(pairs: Sequence[Pair]) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Two halves with equally many of each intent, drawn by a fixed seed."""
    rng = np.random.default_rng(SPLIT_SEED)
    first: list[Pair] = []
    second: list[Pair] = []
    for intent in sorted({intent for _, intent in pairs}):
        own = [pair for pair in pairs if pair[1] == intent]
        order = rng.permutation(len(own))
        first += [own[i] for i in order[: len(own) // 2]]
        second += [own[i] for i in order[len(own) // 2 :]]
    return tuple(first), tuple(second)


def labelled(path: Path) -> list[Pair]:
    """(text, intent) of a CSV file with the columns text and intent. Raises InputError."""
    try:
        with path.open(newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        pairs = [(row["text"], row["intent"]) for row in rows]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected a CSV file with the columns text and intent: {error}") from error
    for line, pair in enumerate(pairs, 1):
        if not all(part and part.strip() for part in pair):
            raise InputError(f"{path}: row {line}: expected a text and an intent, found {pair}")
    return pairs
