"""Small learned heads: a logistic regression over what a message means, the words it uses, and a few counted features.

Why an AI engineer adds these beside a language model: a 9-million-parameter model decides right too seldom where a mistake
is grave, and a large one is slow and costs money on every message. A head is fitted in a second on the training split,
decides in a millisecond, and gives a probability whose threshold can be chosen by measurement instead of by a prompt.

    head = fitted("emergency", key, lambda: training, folder)     # fitted once, then read from artifacts/heads/

Fitting sees rows of the training split only. Thresholds come from predictions on families of rows that the fit had not seen
(cross-validation on training rows) together with the validation split, which alone would be too small to choose by.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from shared.files import sha256_text

Array = np.ndarray[Any, np.dtype[Any]]
Embed = Callable[[Sequence[str]], Array]
FOLDS = 6
COUNTED = 0.4  # scale of the counted features beside words of unit length: a smaller part is penalised more
STEM = 5  # letters of a word that count: "bleeds", "bleeding" and "bleed" are one word then
VERSION = 2  # part of every key: raise it when the arithmetic below changes


@dataclass
class Examples:
    """Rows to learn from. `vectors` (n, d) unit length, `extra` (n, f) counted features, `labels` and `weights` (n,).

    `groups` keep rows of one family together in cross-validation, `training` marks those a fit may see; the others
    (validation) only take part in choosing the threshold.
    """

    texts: list[str]
    vectors: Array
    extra: Array
    labels: Array
    groups: list[str]
    training: Array
    weights: Array = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not len(self.weights):
            self.weights = np.ones(len(self.texts))

    def part(self, mask: Array) -> Examples:
        kept = np.flatnonzero(mask)
        return Examples(
            [self.texts[i] for i in kept], self.vectors[kept], self.extra[kept], self.labels[kept],
            [self.groups[i] for i in kept], self.training[kept], self.weights[kept],
        )  # fmt: skip


@dataclass
class Head:
    """`coefficients` stand in the order [words | vector | extra]. `strength` is scikit-learn's C, the inverse of the penalty;
    `meaning` scales the vector beside the words: how far to trust what a text is about over how it is said."""

    strength: float = 3.0
    meaning: float = 1.0
    vocabulary: dict[str, int] = field(default_factory=dict)
    idf: Array = field(default_factory=lambda: np.zeros(0))
    mean: Array = field(default_factory=lambda: np.zeros(0))
    scale: Array = field(default_factory=lambda: np.zeros(0))
    coefficients: Array = field(default_factory=lambda: np.zeros(0))
    intercept: float = 0.0
    threshold: float = 0.5

    def fit(self, rows: Examples) -> Head:
        from sklearn.linear_model import LogisticRegression  # slow to import, and only needed here

        counts = Counter(term for text in rows.texts for term in set(terms(text)))
        self.vocabulary = {term: i for i, term in enumerate(sorted(t for t, n in counts.items() if n > 1))}
        self.idf = np.array([1 + np.log((1 + len(rows.texts)) / (1 + counts[t])) for t in self.vocabulary])
        self.mean, self.scale = rows.extra.mean(axis=0), rows.extra.std(axis=0) + 1e-6
        model = LogisticRegression(C=self.strength, max_iter=2000, class_weight="balanced")
        model.fit(self._matrix(rows.texts, rows.vectors, rows.extra), rows.labels, sample_weight=rows.weights)
        self.coefficients, self.intercept = model.coef_[0], float(model.intercept_[0])
        return self

    def probability(self, texts: Sequence[str], vectors: Array, extra: Array) -> Array:
        """(n,) float: how likely each text belongs to the class."""
        if not len(texts):
            return np.zeros(0)
        score = self._matrix(texts, vectors, extra) @ self.coefficients + self.intercept
        return np.asarray(1 / (1 + np.exp(-score)))

    def _matrix(self, texts: Sequence[str], vectors: Array, extra: Array) -> Any:
        from scipy.sparse import csr_matrix, hstack

        cells: list[tuple[int, int, float]] = []
        for row, text in enumerate(texts):
            found = Counter(self.vocabulary[t] for t in terms(text) if t in self.vocabulary)
            weights = {column: (1 + np.log(n)) * self.idf[column] for column, n in found.items()}
            norm = np.sqrt(sum(w * w for w in weights.values())) or 1.0
            cells += [(row, column, weight / norm) for column, weight in weights.items()]
        rows, columns, values = zip(*cells, strict=True) if cells else ((), (), ())
        words = csr_matrix((values, (rows, columns)), shape=(len(texts), len(self.vocabulary)))
        parts = [words, csr_matrix(vectors * self.meaning), csr_matrix((extra - self.mean) / self.scale * COUNTED)]
        return hstack(parts).tocsr()

    def save(self, path: Path) -> None:
        """One .npz without pickled objects, written aside and renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(
            part, vocabulary=np.array(list(self.vocabulary)), idf=self.idf, mean=self.mean, scale=self.scale,
            coefficients=self.coefficients, scalars=np.array([self.strength, self.meaning, self.intercept, self.threshold]),
        )  # fmt: skip
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Head:
        # np.load leaves a file that it opened itself open when it turns out to be damaged
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            words = {str(word): i for i, word in enumerate(stored["vocabulary"])}
            strength, meaning, intercept, threshold = (float(x) for x in stored["scalars"])
            return cls(
                strength, meaning, words, stored["idf"], stored["mean"], stored["scale"], stored["coefficients"], intercept,
                threshold,
            )  # fmt: skip


def fitted(
    name: str,
    key: str,
    rows: Callable[[], Examples],
    choose: Callable[[Array, Array], float],
    folder: Path,
    strength: float = 3.0,
    meaning: float = 1.0,
) -> Head:
    """The head `name`, from its file when `key` is the same, else fitted, given a threshold, and stored.

    `choose` gets probabilities (n,) of rows the fit had not seen, and their labels, and returns the threshold.
    """
    path = folder / f"{name}-{sha256_text(f'{VERSION} {strength} {meaning} {key}')[:16]}.npz"
    try:
        return Head.load(path)
    except (OSError, EOFError, ValueError, KeyError, BadZipFile):  # not there, or not whole
        pass
    data = rows()
    head = Head(strength, meaning).fit(data.part(data.training))
    head.threshold = choose(unseen(data, strength, meaning), data.labels)
    head.save(path)
    return head


def unseen(rows: Examples, strength: float = 3.0, meaning: float = 1.0) -> Array:
    """(n,) probabilities by fits that saw neither the row nor its family: six-fold on training rows, plain on the others."""
    found = np.zeros(len(rows.texts))
    families = sorted(set(rows.groups))
    np.random.default_rng(0).shuffle(families)
    family = np.array(rows.groups)
    for fold in range(FOLDS):
        held = np.isin(family, families[fold::FOLDS]) & rows.training
        if held.any():
            found[held] = _predict(rows, ~held & rows.training, held, strength, meaning)
    if (~rows.training).any():
        found[~rows.training] = _predict(rows, rows.training, ~rows.training, strength, meaning)
    return found


def at_sensitivity(sensitivity: float, margin: float = 0.0) -> Callable[[Array, Array], float]:
    """Chooses the threshold that finds this share of the positive rows, lowered by `margin` for families yet unknown."""

    def choose(probabilities: Array, labels: Array) -> float:
        found = np.sort(probabilities[labels.astype(bool)])
        return float(found[int((1 - sensitivity) * len(found))]) - margin if len(found) else 0.5

    return choose


def at_specificity(specificity: float) -> Callable[[Array, Array], float]:
    """Chooses the threshold that lets this share of the negative rows pass."""

    def choose(probabilities: Array, labels: Array) -> float:
        passed = np.sort(probabilities[~labels.astype(bool)])
        return float(passed[min(len(passed) - 1, int(specificity * len(passed)))]) if len(passed) else 0.5

    return choose


def terms(text: str) -> list[str]:
    """Beginnings of words, numbers, marks of excitement, and pairs of neighbours."""
    words = [w[:STEM] for w in re.findall(r"[a-z']+|[!?]|\d+", text.lower().replace("’", "'"))]
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def family(row_id: str) -> str:
    """`em-back-pain-05` -> `back-pain`: rows of one family share a leaflet, and must not be on both sides of a fold."""
    return re.sub(r"^[a-z]+-|-[0-9]+$", "", row_id)


def file_key(*paths: Path, **more: object) -> str:
    """A key that changes with the content of files, or with any of `more`."""
    contents = [sha256_text(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else "" for path in paths]
    return json.dumps([contents, sorted((name, str(value)) for name, value in more.items())])


def _predict(rows: Examples, seen: Array, held: Array, strength: float, meaning: float) -> Array:
    part = rows.part(held)
    return Head(strength, meaning).fit(rows.part(seen)).probability(part.texts, part.vectors, part.extra)
