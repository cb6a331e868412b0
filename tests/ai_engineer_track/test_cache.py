"""The same question, or one that means the same, is answered once per index, model and contract."""

import sqlite3

import numpy as np
import pytest

from ai_engineer_track.cache import AnswerCache, meaning
from ai_engineer_track.turn import Step, Turn

ONE = np.eye(4, dtype=np.float32)[0]
NEAR = np.array([0.99, 0.141, 0, 0], np.float32)
FAR = np.eye(4, dtype=np.float32)[1]
TURN = Turn(kind="answer", text="[1] Rest.", trace=[Step(node="answer", seconds=1.0)], cost=0.5)


@pytest.fixture
def cache(tmp_path):
    made = AnswerCache(tmp_path / "c.sqlite", "v1", 0.95)
    yield made
    made.close()


def test_exact_and_similar_questions_hit_others_miss(cache):
    assert cache.get("what helps migraine", ONE) is None
    cache.put("What helps migraine?", ONE, TURN, personal=False)
    assert cache.get("what helps  MIGRAINE", FAR).text == TURN.text
    assert cache.get("what eases a migraine", NEAR).text == TURN.text
    assert cache.get("what eases a migraine", FAR) is None


def test_a_stored_answer_carries_no_old_trace_or_cost(cache):
    cache.put("q", ONE, TURN, personal=False)
    assert (cache.get("q", ONE).trace, cache.get("q", ONE).cost) == ([], 0.0)


@pytest.mark.parametrize(
    "other", ["dose for a child of 12", "dose for an adult", "no dose for a child of 2", "dose for a child of 2 when pregnant"]
)
def test_near_in_meaning_is_not_the_same_when_a_small_word_turns_it(cache, other):
    cache.put("dose for a child of 2", ONE, TURN, personal=False)
    assert cache.get(other, NEAR) is None
    assert meaning("dose for a child of 2") != meaning(other)


@pytest.mark.parametrize("kind", ["escalate", "decline", "clarify", "unavailable"])
def test_kinds_that_are_never_reused(cache, kind):
    cache.put("q", ONE, TURN.model_copy(update={"kind": kind}), personal=False)
    assert len(cache) == 0


def test_personal_answers_are_never_kept(cache):
    cache.put("q", ONE, TURN, personal=True)
    assert len(cache) == 0


def test_another_version_sees_nothing_of_the_old_one(tmp_path):
    for version, expected in (("v1", None), ("v1", TURN.text), ("v2", None), ("v1", None)):
        cache = AnswerCache(tmp_path / "c.sqlite", version, 0.95)
        found = cache.get("q", ONE)
        assert (found and found.text) == expected
        if version == "v1" and found is None:
            cache.put("q", ONE, TURN, personal=False)
        cache.close()


def test_the_oldest_answers_make_room(cache, monkeypatch):
    monkeypatch.setattr("ai_engineer_track.cache.KEPT", 3)
    for i in range(5):
        cache.put(f"q{'abcde'[i]}", np.eye(8, dtype=np.float32)[i], TURN, personal=False)
    assert len(cache) == 3
    assert cache.get("qa", np.eye(8, dtype=np.float32)[7]) is None


def test_two_processes_share_their_answers(tmp_path):
    """Two connections to one file, as two replicas have."""
    one, other = (AnswerCache(tmp_path / "c.sqlite", "v1", 0.95) for _ in range(2))
    one.put("What helps migraine?", ONE, TURN, personal=False)
    assert other.get("what helps  MIGRAINE", FAR).text == TURN.text
    assert other.get("what eases a migraine", NEAR).text == TURN.text
    one.close()
    other.close()


def test_answers_of_others_make_room_and_are_made_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr("ai_engineer_track.cache.KEPT", 3)
    one, other = (AnswerCache(tmp_path / "c.sqlite", "v1", 0.95) for _ in range(2))
    for i in range(8):
        (one, other)[i % 2].put(f"q{'abcdefgh'[i]}", np.eye(8, dtype=np.float32)[i], TURN, personal=False)
    assert [one.get(f"q{letter}", np.zeros(8, np.float32)) is not None for letter in "abcdefgh"] == [False] * 5 + [True] * 3
    one.close()
    other.close()


def test_a_damaged_file_is_begun_anew(tmp_path):
    (tmp_path / "c.sqlite").write_bytes(b"this is no database" * 100)
    cache = AnswerCache(tmp_path / "c.sqlite", "v1", 0.95)
    cache.put("q", ONE, TURN, personal=False)
    assert len(cache) == 1
    cache.close()


def test_a_full_disk_costs_the_entry_only(cache, monkeypatch):
    class Full:
        def execute(self, *_):
            raise sqlite3.OperationalError("database or disk is full")

        def rollback(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr(cache, "_db", Full())
    cache.put("q", ONE, TURN, personal=False)
    assert len(cache) == 0
