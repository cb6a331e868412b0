"""Exercise 8: by meaning, by words, or both?    python artifacts/workshop/ex8.py

Validation questions only: what is chosen here must not be chosen on the test split.
"""

from __future__ import annotations

from ai_engineer_track.ingest import open_index
from ai_engineer_track.retrieve import MODES, Retriever
from ai_engineer_track.settings import load_ai_settings
from benchmarks.workshop.place import keep_run, script
from shared import library as lib
from shared.metrics import estimate_difference, estimate_mean

# --- change this -------------------------------------------------------------------------------------------------------
RRF_K = 60  # reciprocal rank fusion adds 1 / (RRF_K + rank): the larger, the less the first places count for
CANDIDATES = 30  # passages each of the two rankings hands to the fusion
# ------------------------------------------------------------------------------------------------------------------------
K = 5


def main() -> None:
    settings = load_ai_settings("tiny")
    options = settings.retrieve.model_copy(update={"rrf_k": RRF_K, "candidates": CANDIDATES})
    settings = settings.model_copy(update={"retrieve": options})
    rows = lib.read_rows(settings.datasets, "questions.jsonl", lib.Question)[0]
    asked = [q for q in rows if q.split == "validation" and q.answerable]
    index = open_index(settings)
    retriever = Retriever(index, settings)
    hits: dict[str, list[float]] = {}
    for mode in MODES:
        if mode == "reranked" and not retriever.ranker:
            continue
        hits[mode] = []
        for question in asked:
            documents = {hit.passage.document for hit in retriever.search(question.question, K, mode)}
            hits[mode].append(float(bool(documents & set(question.leaflets))))
    index.close()
    print(f"{len(asked)} validation questions, a right leaflet among the first {K} passages; value [95 % interval]")
    for name, found in hits.items():
        print(f"  {name:<9} {estimate_mean(found, 1000, 7)}")
    print(f"  fused - dense, question by question {estimate_difference(hits['fused'], hits['dense'], 1000, 7)}")
    pairs = list(zip(hits["dense"], hits["bm25"], strict=True))
    cells = {
        "both": pairs.count((1.0, 1.0)),
        "only dense": pairs.count((1.0, 0.0)),
        "only bm25": pairs.count((0.0, 1.0)),
        "neither": pairs.count((0.0, 0.0)),
    }
    print("  found by " + ", ".join(f"{name} {n}" for name, n in cells.items()))
    totals = {mode: int(sum(found)) for mode, found in hits.items()}
    keep_run(8, {"rrf_k": RRF_K, "candidates": CANDIDATES, "questions": len(asked), "cells": cells, "found": totals})


if __name__ == "__main__":
    script(main)
