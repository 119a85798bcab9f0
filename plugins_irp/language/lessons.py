"""Training sentences, damaged anew each time they are drawn, and lessons: such sentences with what a teacher thinks of them.

Lessons lie in files of a pass over the training sentences each (`lessons-0.npz`, ...), which `teacher.py` writes; beside them
`words.npz` holds what the teacher knew of each token before it was taught anything here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.arrays import read_npz, write_npz
from sage_edge.errors import InputError

from .corrupt import IGNORE, Rates, Vocabulary, damage
from .data import Texts
from .tokens import Tokens

CROSSED = 0.25  # of the sentences are put together of two of the same intent
REWORDED = 0.8  # of the sentences get other words, where any are known that are near theirs: up to half of them
LIGHT = Rates(mask=0.05, typo=0.02, cut=0.1)
LESSONS, WORDS = "lessons-*.npz", "words.npz"
CURVES = {"val_0": "clean", "val_20": "20 % of words masked"}  # what `checks` gives, by the labels of a learning curve

Ints = npt.NDArray[np.int32]
Shares = npt.NDArray[np.float32]


def batches_of_like_length(lengths: npt.NDArray[np.int64], batch: int, rng: np.random.Generator) -> list[list[int]]:
    """Rows of one epoch in batches: shuffled, sorted by length within stretches of 16 batches; what is left over is left.

    Raises InputError for a batch that is larger than all of them.
    """
    if batch > len(lengths):
        raise InputError(f"batch: expected at most {len(lengths)}, as many as there are sentences, found {batch}")
    order = rng.permutation(len(lengths))
    stretch = 16 * batch
    parts = (order[i : i + stretch] for i in range(0, len(order), stretch))
    flat = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    cut = [flat[i : i + batch].tolist() for i in range(0, len(flat) - batch + 1, batch)]
    return [cut[i] for i in rng.permutation(len(cut))]


class Shuffled:
    """Endless shuffled batches of rows; those of a batch are of like length.

    length: of the sentence of each row, int64 [n]. own: whether it is the data's own, bool [n].
    """

    def __init__(
        self, length: npt.NDArray[np.int64], own: npt.NDArray[np.bool_], batch: int, rng: np.random.Generator
    ) -> None:
        self.length, self.own, self.batch, self.rng = length, own, batch, rng
        self.own_only = False
        self.queue: list[list[int]] = []

    def before(self, step: int, steps: int, ending: float) -> None:
        """To be called before each step of a training: in the last `ending` of its steps only the data's own sentences are
        drawn. Sentences that were added teach more words; how people spoke to the data's makers, only these can."""
        first = steps - round(ending * steps)
        self.own_only = step >= first
        if step == first and not self.own.all():
            self.queue = []

    def refill(self) -> None:
        """One more epoch."""
        rows = np.flatnonzero(self.own) if self.own_only else np.arange(len(self.length))
        self.queue = [rows[part].tolist() for part in batches_of_like_length(self.length[rows], self.batch, self.rng)]

    def rows(self) -> list[int]:
        """Of the next batch."""
        if not self.queue:
            self.refill()
        return self.queue.pop()

    def state(self) -> dict[str, Any]:
        """What the state of a training holds of this."""
        return {"queue": self.queue, "rows": len(self.length)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave. Raises InputError where it is of other rows."""
        if state["rows"] != len(self.length):
            raise InputError(
                f"the state in RUN is of a training on {state['rows']} sentences or lessons, here are {len(self.length)}; "
                f"give the same ones, or another folder as RUN"
            )
        self.queue = state["queue"]


class Stream(Shuffled):
    """Batches of damaged training sentences.

    near: words by which a word may be replaced (in the manner of TinyBERT's data augmentation, arXiv 1909.10351): the model
    is to meet more words than the training sentences have.
    """

    def __init__(
        self, texts: Texts, tokens: Tokens, batch: int, rng: np.random.Generator,
        near: Mapping[str, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.tokens, self.near = tokens, near or {}
        self.vocabulary = Vocabulary(tokens.mask, tokens.empty, tokens.pieces)
        number = {name: i for i, name in enumerate(texts.intents)}
        self.words = [tokens.normalise(text).split() for text, _ in texts.train]
        self.labels = np.array([number[intent] for _, intent in texts.train], np.int32)
        self.alike = [np.flatnonzero(self.labels == label) for label in range(len(texts.intents))]
        own = np.arange(len(self.words)) < len(self.words) - texts.added
        super().__init__(np.array([len(w) for w in self.words]), own, batch, rng)

    def rates(self) -> Rates:
        """A fifth of the sentences gets little damage, the others any amount up to three fifths of their words."""
        draw, mask, drop = self.rng.random(3)
        return LIGHT if draw < 0.2 else Rates(mask=0.6 * mask, drop=0.1 * drop, typo=0.06, cut=0.1)

    def sentence(self, row: int) -> list[str]:
        """The words of a sentence; sometimes it ends as another of the same intent does."""
        words = self.words[row]
        if self.rng.random() >= CROSSED:
            return words
        other = self.words[self.rng.choice(self.alike[self.labels[row]])]
        share = self.rng.random()
        crossed = words[: round(share * len(words))] + other[round(share * len(other)) :]
        return crossed or words

    def reworded(self, words: list[str]) -> list[str]:
        """Perhaps some words replaced by words that are near them."""
        if not self.near or self.rng.random() >= REWORDED:
            return words
        share = 0.5 * self.rng.random()
        return [
            str(self.rng.choice(self.near[word])) if word in self.near and self.rng.random() < share else word
            for word in words
        ]

    def draw(self, limit: int) -> tuple[Ints, Ints, Ints]:
        """The next batch, as `damaged` gives it."""
        return self.damaged(self.rows(), limit)

    def damaged(self, rows: Sequence[int], limit: int) -> tuple[Ints, Ints, Ints]:
        """Damaged tokens of the sentences of `rows` and what they should be, int32 [rows, n], n at most `limit`; intents
        int32 [rows], IGNORE for a sentence of other words, which may mean something else."""
        plain = [self.sentence(row) for row in rows]
        said = [self.reworded(words) for words in plain]
        pairs = [damage(words, self.rates(), self.vocabulary, self.rng) for words in said]
        same = [words == other for words, other in zip(plain, said, strict=True)]
        length = min(limit, max(len(found) for found, _ in pairs))
        damaged = self.tokens.batch((found for found, _ in pairs), length)
        wanted = self.tokens.batch((wanted for _, wanted in pairs), length, IGNORE)
        return damaged, wanted, np.where(same, self.labels[rows], IGNORE).astype(np.int32)


class Check:
    """Calibration sentences with a fixed share of masked words, in batches of like length."""

    def __init__(self, texts: Texts, tokens: Tokens, rate: float) -> None:
        rng = np.random.default_rng(1)
        vocabulary = Vocabulary(tokens.mask, tokens.empty, tokens.pieces)
        pairs, wanted = texts.calibration, Rates(mask=rate)
        rows = [damage(tokens.normalise(text).split(), wanted, vocabulary, rng)[0] for text, _ in pairs]
        labels = [texts.intents.index(intent) for _, intent in pairs]
        self.batches = [
            (array, np.array([labels[i] for i in part], np.int32)) for part, array in tokens.batches(rows, 250)
        ]

    def accuracy(self, intents: Callable[[Ints], Ints]) -> float:
        """Share of right intents, by the intents int32 [n] that `intents` gives for tokens int32 [n, m]."""
        right = sum(int((intents(tokens) == labels).sum()) for tokens, labels in self.batches)
        return right / sum(len(labels) for _, labels in self.batches)


def checks(texts: Texts, tokens: Tokens) -> dict[str, Check]:
    """What a training is watched on: nothing masked, and a fifth of the words."""
    return {f"val_{round(100 * rate)}": Check(texts, tokens, rate) for rate in (0.0, 0.2)}


def write_lessons(path: Path, stream: Stream, opinion: Callable[[Ints], Shares], limit: int) -> None:
    """One pass over the training sentences. opinion(tokens int32 [n, m]): the teacher's shares of the intents, [n, intents];
    the likeliest is the intent of a sentence that has none of its own."""
    stream.refill()
    tokens, targets, intents, shares, own = [], [], [], [], []
    while stream.queue:
        rows = stream.rows()
        damaged, wanted, labels = stream.damaged(rows, limit)
        short = ((0, 0), (0, limit - damaged.shape[1]))
        tokens.append(np.pad(damaged, short))
        targets.append(np.pad(wanted, short, constant_values=IGNORE))
        shares.append(opinion(damaged))
        intents.append(np.where(labels == IGNORE, shares[-1].argmax(-1), labels).astype(np.int32))
        own.append(stream.own[rows])
    write_npz(path, {
        "tokens": np.concatenate(tokens).astype(np.int16), "targets": np.concatenate(targets).astype(np.int16),
        "intents": np.concatenate(intents), "shares": np.concatenate(shares).astype(np.float16),
        "own": np.concatenate(own),
    })  # fmt: skip


def write_words(folder: Path, vectors: Shares) -> None:
    """vectors float32 [vocab, n], zeros where nothing is known of a token."""
    write_npz(folder / WORDS, {"vectors": vectors})


def read_words(folder: Path, vocab: int) -> Shares:
    """What `write_words` wrote. Raises InputError where it is not of `vocab` tokens."""
    vectors = read_npz(folder / WORDS).get("vectors")
    if vectors is None or vectors.ndim != 2 or len(vectors) != vocab or not np.isfinite(vectors).all():
        raise InputError(
            f"{folder / WORDS}: expected finite `vectors` [{vocab}, n]; write them anew with language.teacher"
        )
    return np.asarray(vectors, np.float32)


class Lessons(Shuffled):
    """Batches of all lessons of a folder.

    Raises InputError where there are none, or where they are of other intents than `intents` many.
    """

    def __init__(self, folder: Path, batch: int, intents: int, rng: np.random.Generator) -> None:
        parts = [read_npz(path) for path in sorted(folder.glob(LESSONS))]
        if not parts:
            raise InputError(f"{folder}: no {LESSONS}; write them with `python -m plugins_irp.language.teacher`")
        try:
            whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            self.tokens, self.targets = whole["tokens"], whole["targets"]
            self.intents, self.shares, own = whole["intents"], whole["shares"], whole["own"]
        except (KeyError, ValueError) as error:
            raise InputError(f"{folder}: {LESSONS} do not belong together: {error}; write them anew") from error
        if self.shares.shape[1:] != (intents,):
            raise InputError(f"{folder}: lessons of {self.shares.shape[1]} intents, the texts have {intents}")
        super().__init__((self.tokens != 0).sum(1), own, batch, rng)

    def draw(self) -> tuple[Ints, Ints, Ints, Shares]:
        """Damaged tokens and what they should be, int32 [batch, n]; intents int32 [batch]; the teacher's shares, float32."""
        rows = self.rows()
        cut = slice(0, int(self.length[rows].max()))
        return (
            self.tokens[rows, cut].astype(np.int32), self.targets[rows, cut].astype(np.int32),
            self.intents[rows], self.shares[rows].astype(np.float32),
        )  # fmt: skip


def ending_argument(parser: argparse.ArgumentParser) -> None:
    """The option that `Shuffled.before` is given."""
    parser.add_argument(
        "--ending",
        type=float,
        default=0.3,
        help="last fraction of the run without sentences that are not the data's own",
    )
