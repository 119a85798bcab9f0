"""Damage to a command's words as speech recognition and typing do it, and what each token should be repaired to. Seeded.

Words are the parts between spaces. A sentence is damaged word by word: masked (the recogniser knows that something was
said), dropped (it does not), a letter or two mistyped, or cut into other pieces (the same letters, tokenized otherwise, a
regulariser in the manner of BPE dropout, arXiv 1910.13267).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

IGNORE = -1  # a target that is not counted
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Rates:
    """Probability, per word, of each kind of damage."""

    mask: float = 0.0
    drop: float = 0.0
    typo: float = 0.0
    cut: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """What damage must know of a tokenizer: ids of special tokens, and the ids of a word or of a part of one.

    pieces(text, first) gives the ids of `text`; `first` is whether it begins a word.
    """

    mask: int
    empty: int
    pieces: Callable[[str, bool], tuple[int, ...]]


def typo(word: str, rng: np.random.Generator) -> str:
    """`word` with one letter swapped with the next, left out, doubled or replaced; never empty."""
    at = int(rng.integers(len(word)))
    kind = int(rng.integers(4))
    if kind == 0 and len(word) > 1:
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1 and len(word) > 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[: at + 1] + word[at:]
    return word[:at] + LETTERS[int(rng.integers(len(LETTERS)))] + word[at + 1 :]


def damage(
    words: Sequence[str], rates: Rates, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Token ids of the damaged sentence, and for each the id that it should be repaired to (or IGNORE).

    A masked word becomes one `mask`, whatever its length in tokens; its target is the word if that is one token and
    IGNORE if it is several. A mistyped word's first piece should become the word, its other pieces `empty`, again where
    the word is one token. Intact words should stay. At least one word is kept.
    """
    keep = int(rng.integers(len(words)))
    draws = rng.random((len(words), 4))
    tokens: list[int] = []
    targets: list[int] = []
    for at, word in enumerate(words):
        whole = vocabulary.pieces(word, True)
        single = whole[0] if len(whole) == 1 else IGNORE
        dropped, masked, mistyped, cut = draws[at] < (rates.drop, rates.mask, rates.typo, rates.cut)
        if dropped and at != keep:
            continue
        if masked and at != keep:
            tokens.append(vocabulary.mask)
            targets.append(single)
            continue
        if mistyped:
            found = vocabulary.pieces(typo(word, rng), True)
        elif cut and len(word) > 2:
            place = int(rng.integers(1, len(word)))
            found = vocabulary.pieces(word[:place], True) + vocabulary.pieces(word[place:], False)
        else:
            tokens += whole
            targets += whole
            continue
        tokens += found
        targets += [single] + [vocabulary.empty if single != IGNORE else IGNORE] * (len(found) - 1)
    return tokens, targets


def mask_words(text: str, rate: float, mask: str, rng: np.random.Generator) -> str:
    """`text` with each word replaced by `mask` with probability `rate`; for evaluation."""
    return " ".join(mask if hidden else word for word, hidden in
                    zip(text.split(), rng.random(len(text.split())) < rate, strict=True))  # fmt: skip


def mask_a_share(text: str, rate: float, mask: str, rng: np.random.Generator) -> str:
    """`text` with `rate` of its words replaced by `mask`: their number is rounded up or down at random, so that the mean is
    `rate`, and no sentence loses many more than others; for evaluation."""
    words = text.split()
    count = math.floor(rate * len(words) + rng.random())
    hidden = set(rng.permutation(len(words))[:count].tolist())
    return " ".join(mask if at in hidden else word for at, word in enumerate(words))
