"""Sources come in the order the ranker finds them likely, with the vectors of the real sentence model."""

from __future__ import annotations

from pathlib import Path

import pytest

from ml_engineer_track.ordering import ServedOrder
from shared.chat import Source
from shared.library import load_library
from shared.passages import embedder
from tests.ml_engineer_track.conftest import RANKER


def test_the_sentence_nearest_to_the_question_comes_first_and_none_is_lost(mini_datasets: Path) -> None:
    library = load_library(mini_datasets)
    leaf = library.leaflets["common-cold"]
    sources = [Source(id=s.id, heading="", text=s.text) for s in leaf.sentences()][:12]
    order = ServedOrder(library, [s.text for s in sources], RANKER, embedder().embed)
    for source in sources:
        ordered = order(source.text, sources)
        assert ordered[0] == source
        assert sorted(s.id for s in ordered) == sorted(s.id for s in sources)
    with pytest.raises(KeyError):
        order("a question nobody announced", sources)
