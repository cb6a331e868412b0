"""The search for the steady rate, and what counts as answered, refused and failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import pytest

from benchmarks import steady
from benchmarks.people import Reply, messages
from shared.settings import load_settings


def reply(first_word: float | None = 0.5, status: int = 200, retry_after: str = "", error: str = "") -> Reply:
    return Reply("hello", status=status, first_word=first_word, retry_after=retry_after, error=error)


def test_a_refusal_is_no_failure_and_a_broken_stream_is() -> None:
    replies = [
        reply(),
        reply(3.0),
        reply(None, 429, "2"),
        reply(None, 503),
        reply(0.1, error="the stream broke off"),
        reply(None),
    ]
    found = steady.summed_up(replies, rate=6.0, seed=7)
    assert (found.sent, found.answered, found.refused, found.failed) == (6, 2, 2, 2)
    assert found.refused_without_retry_after == 1
    assert found.goodput == pytest.approx(1.0)
    assert not found.good


@pytest.mark.parametrize("limit", [0.3, 0.5, 3.3, 17.0])
def test_the_search_ends_just_below_the_limit(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    def hold(url: str, texts: Sequence[str], rate: float, seed: int) -> steady.Round:
        return steady.summed_up([reply(0.5 if rate <= limit else 2.5)] * len(texts), rate, seed)

    monkeypatch.setattr(steady, "hold", hold)
    texts: Iterator[str] = (str(n) for n in count())
    rounds = list(steady.search("", texts, 1.0, 7))
    best = max((r.rate for r in rounds if r.good), default=0.0)
    worst = min(r.rate for r in rounds if not r.good)
    assert best <= limit < worst
    assert worst - best <= max(steady.FIRST_RATE, limit / 4)
    assert len(rounds) < 12


def test_no_message_is_sent_twice_and_the_seed_decides_the_order() -> None:
    datasets = load_settings("tiny").datasets
    found = messages(datasets, 7)
    assert len(found) > 4000
    assert len(set(found)) == len(found)
    assert messages(datasets, 7) == found
    assert messages(datasets, 8) != found
