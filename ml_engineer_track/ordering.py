"""Puts the numbered sentences of a prompt into the order in which the product shows them: likeliest first.

Why an ML engineer trains on prompts as they will be served: where a sentence stands is information. In use the ranker has put
the best sentence first; a model that was tuned on shuffled prompts has learned that places say nothing, and throws that away.
So the training prompts are ordered by the same ranker with the same function.

    python -m ml_engineer_track curate      (this module is part of it; it has no command of its own)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from shared.chat import Source
from shared.library import Leaflet
from shared.passages import leaflet_passages, unit_texts
from shared.ranking import Corpus, Ranker, sentence_ratings


class ServedOrder:
    """The order of sources for a question. `embed` is asked once, for the units of all leaflets and for all questions."""

    def __init__(
        self,
        leaflets: Iterable[Leaflet],
        questions: Sequence[str],
        ranker: Ranker,
        embed: Callable[[Sequence[str]], np.ndarray],
    ) -> None:
        passages = [p for leaf in leaflets for p in leaflet_passages(leaf, f"{leaf.id}.md")]
        texts = [text for p in passages for text in unit_texts(p)]
        vectors = embed([*texts, *questions])
        self._ranker = ranker
        self._corpus = Corpus(passages, vectors[: len(texts)])
        self._vectors = dict(zip(questions, vectors[len(texts) :], strict=True))
        self._place = {p.id: n for n, p in enumerate(passages)}

    def __call__(self, question: str, sources: Sequence[Source]) -> list[Source]:
        """`sources`, those most likely to hold the answer first. KeyError for a question or a sentence that was not given."""
        places = [self._place[key] for key in dict.fromkeys(s.id.rsplit("/", 1)[0] for s in sources)]
        rating = sentence_ratings(self._ranker, self._corpus, question, self._vectors[question], places)
        return sorted(sources, key=lambda s: -rating[s.id])
