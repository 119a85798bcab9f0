"""The plugin's own tokenizer: byte-fallback BPE in tokenizer.json, read with `tokenizers` (extra `language`).

Text is normalised (NFKC, lower case, no punctuation or quotes around words) and cut at spaces; a character that training
never saw becomes its UTF-8 bytes, so every text has tokens and comes back. Special tokens: `<pad>` 0, `<mask>` 1 (a word
that was not understood), `<empty>` 2 (a place where nothing was said; only ever put out).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
PAD, MASK, EMPTY = "<pad>", "<mask>", "<empty>"
SPECIAL = (PAD, MASK, EMPTY)
WORD = "▁"  # stands before the first piece of a word, as in SentencePiece


class Tokens:
    """Text to ids and back. Raises InputError for a file that is not ours, MissingDependencyError without `tokenizers`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tokenizer_class = _library().Tokenizer
        try:
            self.tokenizer: Tokenizer = tokenizer_class.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{path}: not a tokenizer file: {error}") from error
        ids = [self.tokenizer.token_to_id(name) for name in SPECIAL]
        if ids != [0, 1, 2]:
            raise InputError(f"{path}: expected {', '.join(SPECIAL)} as ids 0, 1, 2, found {ids}")
        self.pad, self.mask, self.empty = ids
        self.size: int = self.tokenizer.get_vocab_size()
        self.names = [str(self.tokenizer.id_to_token(i)) for i in range(self.size)]
        self.pieces = lru_cache(maxsize=65536)(self._pieces)

    def normalise(self, text: str) -> str:
        """The text that the model sees: lower case, NFKC, single spaces."""
        return normalised(text, self.tokenizer.normalizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, word by word; any text has some, but for one without words."""
        return self.ids(self.normalise(text).split())

    def ids(self, words: Iterable[str]) -> list[int]:
        """Ids of the words of a normalised text."""
        return [piece for word in words for piece in self.pieces(word, True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; padding and empty places vanish, a mask reads `<mask>`."""
        kept = [i for i in ids if i not in (self.pad, self.empty)]
        out: str = self.tokenizer.decode(kept, skip_special_tokens=False)
        return " ".join(out.replace(MASK, f" {MASK} ").split())

    def _pieces(self, text: str, first: bool) -> tuple[int, ...]:
        """Ids of one word, or of a later part of one (`first` False). Of normalised text without spaces."""
        if text in SPECIAL:
            return (SPECIAL.index(text),)
        return tuple(piece.id for piece in self.tokenizer.model.tokenize(WORD + text if first else text))

    def batch(self, sequences: Iterable[Sequence[int]], length: int, fill: int = 0) -> npt.NDArray[np.int32]:
        """int32 [n, length], padded with `fill`; what is longer is cut at the end."""
        rows = list(sequences)
        out = np.full((len(rows), length), fill, np.int32)
        for row, ids in enumerate(rows):
            out[row, : min(len(ids), length)] = ids[:length]
        return out

    def batches(
        self, sequences: Sequence[Sequence[int]], size: int
    ) -> Iterator[tuple[list[int], npt.NDArray[np.int32]]]:
        """`size` at a time, the shortest first: their places in `sequences`, and int32 [n, length of the longest]."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield part, self.batch((sequences[i] for i in part), len(sequences[part[-1]]))


@lru_cache(maxsize=1)
def normaliser() -> Any:
    """What tokenizers trained here normalise with. Raises MissingDependencyError without `tokenizers`."""
    library = _library()
    replace, regex = library.normalizers.Replace, library.Regex
    return library.normalizers.Sequence([
        library.normalizers.NFKC(),
        library.normalizers.Lowercase(),
        replace("\u2019", "'"),
        replace(regex(r"[\"'?!.,;:]+(?=\s|$)"), ""),  # speech recognition gives none of these
        replace(regex(r"(?:(?<=\s)|^)[\"']+"), ""),
        library.normalizers.Strip(),
    ])  # fmt: skip


def normalised(text: str, by: Any) -> str:
    """`text` as the normaliser `by` leaves it, with single spaces."""
    return " ".join(str(by.normalize_str(text)).split())


def train_tokenizer(texts: Iterable[str], size: int, path: Path) -> None:
    """Write tokenizer.json: `size` tokens in all, among them the special ones and 256 bytes. Deterministic."""
    library = _library()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    pre = library.pre_tokenizers.Sequence(
        [library.pre_tokenizers.WhitespaceSplit(), library.pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    learner = library.Tokenizer(library.models.BPE())
    learner.normalizer, learner.pre_tokenizer = normaliser(), pre
    learner.train_from_iterator(
        texts, library.trainers.BpeTrainer(vocab_size=size - len(SPECIAL) - 256, show_progress=False)
    )
    learnt = json.loads(learner.to_str())["model"]
    order = [*SPECIAL, *bytes_, *sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)]
    model = library.models.BPE(
        vocab={token: at for at, token in enumerate(order)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        byte_fallback=True,
    )
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normaliser(), pre
    tokenizer.decoder = library.decoders.Sequence(
        [library.decoders.ByteFallback(), library.decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(path))


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the language plugin needs tokenizers: pip install 'sage-edge[language]'"
        ) from error
    return tokenizers
