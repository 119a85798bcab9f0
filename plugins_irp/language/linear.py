"""Linear models on the same data, to compare with: TF-IDF n-grams and a linear support vector machine (scikit-learn)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import MissingDependencyError

from .data import Pair
from .tokens import MASK

KINDS = ("words", "words and letters")


class Linear:
    """kind: `words` (1- and 2-grams), or `words and letters` (also 2- to 5-grams of letters within words)."""

    def __init__(self, train: Sequence[Pair], kind: str) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.pipeline import make_pipeline, make_union
            from sklearn.svm import LinearSVC
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "the linear models need scikit-learn: pip install 'sage-edge[train]'"
            ) from error
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2)
        features = {"words": words, "words and letters": make_union(words, letters)}[kind]
        self.model: Any = make_pipeline(features, LinearSVC(C=0.5, random_state=0))
        self.model.fit([text for text, _ in train], [intent for _, intent in train])

    def right(self, texts: Sequence[str], intents: Sequence[str]) -> npt.NDArray[np.bool_]:
        """bool [n]. A masked word is left out: it says nothing to a bag of words."""
        found = self.model.predict([text.replace(MASK, " ") for text in texts])
        return np.asarray(found == np.asarray(intents), bool)
