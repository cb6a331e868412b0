"""How well the library covers a message: the features behind "ask back?" and "can this be answered at all?".

Why an AI engineer looks at retrieval scores and not only at what was found: a search always returns something. Whether
it is the answer shows in how near the best passage is, how far ahead of the next document, and how many look alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ai_engineer_track.heads import Array
from shared.passages import Passage

SHARPNESS = 20.0  # turns cosines of documents into shares; 0.05 more cosine is 2.7 times the share
NEAREST = 5


class Index(Protocol):
    """The part of `ingest.Index` the agent's decisions need."""

    version: str
    #: (units, d): for every passage in order, first the whole of it, then its sentences
    vectors: Any

    @property
    def passages(self) -> Mapping[str, Passage]: ...

    def embed(self, texts: Sequence[str]) -> Any: ...


class Evidence:
    """Cosines of a message with every unit of the index, summed up. Computes with the whole matrix: 5,000 rows take 1 ms."""

    def __init__(self, index: Index) -> None:
        self.index = index
        passages = list(index.passages.values())
        sizes = [1 + len(p.sentences) for p in passages]
        self.documents = list(dict.fromkeys(p.document for p in passages))
        place = {name: i for i, name in enumerate(self.documents)}
        self._document = np.repeat([place[p.document] for p in passages], sizes)
        whole = np.zeros(sum(sizes), dtype=bool)
        whole[np.cumsum([0, *sizes[:-1]])] = True
        self._whole = whole
        self.titles = {p.document: p.title for p in passages}
        texts = (f"{p.title} {' '.join(p.names)} {p.text}" for p in passages)
        self.vocabulary = {word for text in texts for word in words_of(text)}

    def document_scores(self, vectors: Array) -> Array:
        """(n, documents): the cosine of each document's nearest unit."""
        cosines = vectors @ np.asarray(self.index.vectors).T
        found = np.full((len(vectors), len(self.documents)), -1.0)
        for row, line in enumerate(cosines):
            np.maximum.at(found[row], self._document, line)
        return found

    def mean_scores(self, vectors: Array) -> Array:
        """(n, documents): the mean cosine of each document's three nearest units, steadier than the nearest alone."""
        cosines = vectors @ np.asarray(self.index.vectors).T
        found = np.zeros((len(vectors), len(self.documents)))
        for document in range(len(self.documents)):
            own = np.sort(cosines[:, self._document == document], axis=1)
            found[:, document] = own[:, -3:].mean(axis=1)
        return found

    def features(self, texts: Sequence[str], vectors: Array) -> Array:
        """(n, 11): nearness of passages and sentences, the lead of the first document, how many documents share the rest,
        length, whether it asks or has numbers, and the share of its words the library never uses."""
        cosines = vectors @ np.asarray(self.index.vectors).T
        documents = self.document_scores(vectors)
        rows = []
        for text, line, scores in zip(texts, cosines, documents, strict=True):
            passages, sentences = np.sort(line[self._whole])[::-1], np.sort(line[~self._whole])[::-1]
            best = np.sort(scores)[::-1][:NEAREST]
            shares = spread(best)
            words = words_of(text)
            rows.append(
                [
                    sentences[0], sentences[:NEAREST].mean(), passages[0], passages[:NEAREST].mean(),
                    best[0] - best[min(1, len(best) - 1)], best[0] - best[min(2, len(best) - 1)],
                    float(-(shares * np.log(shares)).sum()), float(np.log1p(len(words))),
                    float("?" in text), float(any(c.isdigit() for c in text)),
                    sum(w not in self.vocabulary for w in words) / max(1, len(words)),
                ]
            )  # fmt: skip
        return np.array(rows, dtype=float)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']{3,}", text.lower().replace("’", "'"))


def spread(scores: Array) -> Array:
    """Shares that sum to 1, from cosines: softmax at SHARPNESS."""
    weights = np.exp((scores - scores.max()) * SHARPNESS)
    return np.asarray(weights / weights.sum())
