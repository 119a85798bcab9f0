"""language: what a short spoken command means, with words missing or wrong.

Observation: `text`, a command in English; a word that was heard but not understood is written `<mask>`. Result: `intent`, its
`probability`, `in_scope` (False: none of the known intents, by a calibrated threshold), and `text`, the command as understood:
missing words filled in, and words repaired that the model is sure were mistaken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from sage_edge.irp.engine import EnginePlugin, EngineState
from sage_edge.irp.plugin import Examples, Observation, Result
from sage_edge.irp.spec import PluginSpec
from sage_edge.specs import Array

from .data import data_folder, labelled, load_texts
from .facts import MODEL, SENTENCES, ModelFile
from .tokens import TOKENIZER, WORD, Tokens

FOLDER = Path(__file__).resolve().parent
NOTE = "text"


class Language(EnginePlugin):
    """See the module.

    engine: a bundle in the plugin's folder, or whatever `sage_edge.load` takes. in_scope: the least probability of the
    likeliest intent for a command to be called in scope; repair: the probability from which a word that was there is
    replaced (above 1: never).
    """

    outputs = ("logits", "filled", "filled_probability")

    def __init__(
        self, spec: PluginSpec, engine: str = "bundle", threads: int | None = None, in_scope: float = 0.0,
        repair: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__(spec, str(FOLDER / engine) if (FOLDER / engine).is_dir() else engine, threads)
        self.in_scope, self.repair = in_scope, repair
        self.file = load_yaml(FOLDER / MODEL, ModelFile)
        self._tokens: Tokens | None = None

    @property
    def tokens(self) -> Tokens:
        if self._tokens is None:  # `plugin ls` must not need the library
            self._tokens = Tokens(FOLDER / TOKENIZER)
        return self._tokens

    def prepare(self, observation: Observation) -> tuple[dict[str, Array], Any]:
        """tokens int32 [1, seq_len]. Raises InputError for a text that is empty or too long."""
        text = observation.get("text")
        if not isinstance(text, str) or not (words := self.tokens.normalise(text)):
            raise InputError(f"language: `text`: expected a command of at least one word, found {str(text)[:100]!r}")
        ids, limit = self.tokens.encode(words), self.file.config.seq_len
        if len(ids) > limit:
            raise InputError(f"language: `text`: {len(ids)} tokens are more than the {limit} of a short command")
        return {"tokens": self.tokens.batch([ids], limit)}, words

    def energy_of(self, signals: npt.NDArray[np.float32]) -> float:
        """Entropy of the intent (nats) plus the drift of the meaning in the last step, in proportion to its size."""
        model = self.runner.model
        return float(signals[0, model.signal("entropy_mean")] + signals[0, model.signal("meaning_change")])

    def finish(self, outputs: dict[str, Array], note: Any) -> Result:
        logits = outputs["logits"][0, 0].astype(np.float64)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = int(shares.argmax())
        return {
            "intent": self.file.intents[best], "probability": float(shares[best]),
            "in_scope": bool(shares[best] >= self.in_scope),
            "text": self.understood(str(note), outputs["filled"][0], outputs["filled_probability"][0]),
        }  # fmt: skip

    def understood(self, text: str, filled: Array, probability: Array) -> str:
        """`text` (normalised) with the words of `filled` where one was missing, or is surely another."""
        names, words, at = self.tokens.names, [], 0
        for word in text.split():
            pieces = self.tokens.pieces(word, True)
            found = names[int(filled[at])]
            missing, starts = pieces == (self.tokens.mask,), found.startswith(WORD) and len(found) > 1
            sure = starts and (missing or (found != names[pieces[0]] and probability[at] >= self.repair))
            words.append(found[1:] if sure else word)
            at += len(pieces)
        return " ".join(words)

    def pack(self, state: EngineState) -> dict[str, Array]:
        return {**self.pack_seats(state), NOTE: np.frombuffer(str(state.note).encode(), np.uint8).copy()}

    def unpack(self, arrays: dict[str, Array]) -> EngineState:
        rest = {name: array for name, array in arrays.items() if name != NOTE}
        return self.unpack_seats(rest, arrays[NOTE].astype(np.uint8).tobytes().decode())

    def samples(self, count: int) -> list[Observation]:
        """Sentences of our own, over and over: the check must not need the data."""
        own = self.own_sentences()
        return [{"text": own[i % len(own)][0]} for i in range(count)]

    def own_sentences(self) -> list[tuple[str, str]]:
        """(text, intent) of sentences.csv, written for this project."""
        return labelled(FOLDER / SENTENCES)

    def examples(self, source: str, limit: int | None = None) -> Examples:
        """`calibration` or `report`: halves of CLINC150's validation split, each sentence with a share of its words masked
        (0, 10, 20 or 30 %, in turn; group `masked`). Raises InputError where the data is not there."""
        return load_texts(data_folder()).examples(source, limit)

    def quality(self, result: Result, reference: Any) -> float:
        """1 for the right intent, else 0."""
        return float(result["intent"] == reference)
