"""Clocks jump: a laptop wakes up, a server is set right, a battery dies. Nobody may notice in a conversation."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import numpy as np
import pytest
from fake_assistant import Serve
from fastapi.testclient import TestClient

from ai_engineer_track import cache as answer_cache
from ai_engineer_track.cache import AnswerCache
from ai_engineer_track.turn import Turn
from shared import feedback

YEAR = 365 * 24 * 3600.0
SetClock = Callable[[float], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Puts the clock so many seconds ahead of the true one (behind, when negative) for everything that reads the date."""
    true = time.time

    def put(ahead: float) -> None:
        class Skewed(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return datetime.fromtimestamp(true() + ahead, tz or UTC)

        monkeypatch.setattr(time, "time", lambda: true() + ahead)
        monkeypatch.setattr(feedback, "datetime", Skewed)

    return put


@pytest.mark.parametrize("jump", [YEAR, -YEAR, -40 * YEAR])
def test_a_conversation_keeps_its_order_and_its_owner(client: TestClient, set_clock: SetClock, jump: float) -> None:
    first = client.post("/chat", json={"message": "What helps?"}).json()
    set_clock(jump)
    for message in ("And then?", "And after that?"):
        assert client.post("/chat", json={"message": message, "session_id": first["session_id"]}).status_code == 200
    set_clock(0)
    client.post("/chat", json={"message": "Anything else?", "session_id": first["session_id"]})
    history = client.get(f"/sessions/{first['session_id']}")
    assert [e["message"] for e in history.json()["exchanges"]] == [
        "What helps?", "And then?", "And after that?", "Anything else?"
    ]  # fmt: skip


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_feedback_is_taken_whatever_the_date(serve: Serve, tmp_path: Path, set_clock: SetClock, jump: float) -> None:
    client = serve()
    answer = client.post("/chat", json={"message": "What helps?"}).json()
    set_clock(jump)
    assert client.post("/feedback", json={"answer_id": answer["answer_id"], "kind": "thumbs_down"}).status_code == 201
    kept, bad = feedback.read(tmp_path / "artifacts" / "feedback")
    remarks = [record for record in kept if record.kind == "thumbs_down"]
    assert (len(remarks), bad) == (1, [])
    assert abs(datetime.fromisoformat(remarks[0].time).timestamp() - time.time()) < 60


@pytest.mark.parametrize("jump", [YEAR, -YEAR])
def test_the_rate_limit_neither_opens_nor_locks_anybody_out(serve: Serve, set_clock: SetClock, jump: float) -> None:
    client = serve(rate_per_minute=3)
    assert client.post("/chat", json={"message": "What helps?"}).status_code == 200
    set_clock(jump)
    assert [client.post("/chat", json={"message": "What helps?"}).status_code for _ in range(3)] == [200, 200, 429]


def test_answers_cached_under_a_wrong_date_do_not_keep_new_ones_out(
    tmp_path: Path, set_clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_cache, "KEPT", 3)
    store, turn = AnswerCache(tmp_path / "answers.sqlite", "v1", 0.95), Turn(kind="answer", text="[1] Rest.")
    vectors = np.eye(8, dtype=np.float32)
    set_clock(YEAR)
    for n in range(3):
        store.put(f"question {n}", vectors[n], turn, personal=False)
    set_clock(0)
    store.put("a new question", vectors[3], turn, personal=False)
    assert store.get("a new question", vectors[3]) is not None
    store.close()
