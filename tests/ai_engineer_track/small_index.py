"""A few leaflets with vectors made of hashed words: no model to load, and the interface of the real index and retriever."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from shared import library as lib
from shared.chat import Source
from shared.passages import Passage, leaflet_passages, unit_texts

LEAFLETS = (
    "migraine", "tension-headache", "cluster-headache", "heart-attack", "angina", "stroke",
    "ankle-sprain", "ankle-fracture", "plantar-fasciitis", "paracetamol",
)  # fmt: skip


class Hit(BaseModel):
    passage: Passage
    score: float
    dense_rank: int | None = None
    bm25_rank: int | None = None
    dense_score: float | None = None


class SmallIndex:
    version = "small-1"

    def __init__(self, extra: Sequence[Passage] = ()) -> None:
        library = lib.load_library()
        passages = [p for slug in LEAFLETS for p in leaflet_passages(library.leaflets[slug], f"{slug}.md")]
        self.passages = {p.id: p for p in [*passages, *extra]}
        self.vectors = embed([text for p in self.passages.values() for text in unit_texts(p)])

    def embed(self, texts: Sequence[str]) -> Any:
        return embed(texts)


class SmallRetriever:
    def __init__(self, index: SmallIndex) -> None:
        self.index = index

    def search(self, query: str, k: int | None = None, mode: Any = None, where: dict[str, Any] | None = None) -> list[Hit]:
        wanted = (where or {}).get("document")
        passages = [p for p in self.index.passages.values() if wanted in (None, p.document)]
        scores = embed([unit_texts(p)[0] for p in passages]) @ embed([query])[0]
        order = np.argsort(-scores)[: k or 5]
        return [Hit(passage=passages[i], score=float(scores[i]), dense_rank=n) for n, i in enumerate(order, start=1)]

    def best_sentences(self, query: str, hits: Sequence[Hit], n: int) -> list[Source]:
        sentences = [s for h in hits for s in h.passage.sentences]
        if not sentences:
            return []
        scores = embed([f"{s.heading}: {s.text}" for s in sentences]) @ embed([query])[0]
        return [sentences[i] for i in sorted(np.argsort(-scores)[:n])]


def embed(texts: Sequence[str]) -> Any:
    """(n, 384) float32, unit length: counts of hashed word beginnings."""
    vectors = np.full((len(texts), 384), 1e-6, np.float32)
    for row, text in enumerate(texts):
        for word in re.findall(r"[a-z0-9']+", text.lower()):
            vectors[row, zlib.crc32(word[:5].encode()) % 384] += 0.3 if len(word) < 4 else 1.0
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
