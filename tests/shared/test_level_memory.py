"""A process that serves keeps its memory level."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: Prints by how many MB the process grew over texts of ever new lengths, after as many to begin with.
EMBED = """
import random, sys
import psutil
if sys.argv[1] == "level":
    from shared.level_memory import keep_memory_level
    keep_memory_level()
from shared.passages import embedder
chance, words = random.Random(7), "the knee hurts since monday and walking is hard".split()
def embed(times):
    for _ in range(times):
        texts = range(chance.choice((1, 2, 3, 5)))
        embedder().embed([" ".join(chance.choices(words, k=chance.randrange(3, 200))) for _ in texts])
    return psutil.Process().memory_info().rss / 1e6
print(-embed(60) + embed(60))
"""


@pytest.mark.slow
def test_texts_of_ever_new_lengths_cost_no_memory() -> None:
    def grown(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", EMBED, how], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])

    level, free = grown("level"), grown("free")
    assert level < free / 2, (level, free)


def test_values_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from shared.level_memory import keep_memory_level

    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "9")  # so that this process keeps its arenas
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    keep_memory_level()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ.pop("LRU_CACHE_CAPACITY") == "64"
