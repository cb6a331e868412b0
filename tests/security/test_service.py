"""The service and its page as an attacker finds them: files, faults, patterns, disk."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_assistant import FakeAssistant, Serve
from fastapi.testclient import TestClient

from ai_engineer_track import harm, intake, red_flags
from ai_engineer_track.api.feedback import EARLIER
from ai_engineer_track.api.main import WEB
from ai_engineer_track.cache import AnswerCache
from shared import feedback
from shared.feedback import scrub


def test_what_people_said_is_readable_by_the_owner_alone(client: TestClient, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    (artifacts / "feedback").mkdir(parents=True)
    (artifacts / "feedback" / "feedback.jsonl").touch(mode=0o644)  # one from before
    answer = client.post("/chat", json={"message": "What helps?"}).json()
    client.post("/feedback", json={"answer_id": answer["answer_id"], "kind": "thumbs_down"})
    AnswerCache(artifacts / "cache" / "answers.sqlite", "v", 0.9).close()
    files = [path for path in artifacts.rglob("*") if path.is_file() and path.suffix != ".npz"]
    assert {"sessions.sqlite", "feedback.jsonl", "answers.sqlite"} <= {path.name for path in files}
    assert [path.name for path in files if path.stat().st_mode & 0o077] == []


def test_a_fault_names_no_file_of_this_machine(
    talk: Callable[..., Any], client: TestClient, assistant: FakeAssistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    from langgraph.checkpoint.memory import InMemorySaver

    class Full(InMemorySaver):
        def put(self, *_: Any, **__: Any) -> Any:
            raise OSError(28, "No space left on device", "/home/somebody/artifacts/sessions.sqlite")

        aput = put

    (said,) = talk(["What helps against a migraine?"], saver=Full())
    assert said.turn.kind == "unavailable"
    assert "/home" not in said.turn.model_dump_json()

    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/home/somebody/secret.py, line 3")

    monkeypatch.setattr(assistant, "run_turn", broken)
    for accept in ("application/json", "text/event-stream"):
        with TestClient(client.app, raise_server_exceptions=False) as quiet:
            reply = quiet.post("/chat", json={"message": "hello"}, headers={"Accept": accept})
            assert "/home" not in reply.text
            assert "Traceback" not in reply.text
            assert "went wrong on our side" in reply.text


def test_a_long_conversation_is_not_copied_into_every_record(client: TestClient, tmp_path: Path) -> None:
    session = client.post("/chat", json={"message": "message 0"}).json()["session_id"]
    for number in range(1, EARLIER + 10):
        last = client.post("/chat", json={"message": f"message {number}", "session_id": session}).json()
    client.post("/feedback", json={"answer_id": last["answer_id"], "kind": "thumbs_down"})
    (record,), _ = feedback.read(tmp_path / "artifacts" / "feedback")
    assert len(record.earlier) == EARLIER
    assert record.earlier[-1] == f"message {EARLIER + 8}"


def test_the_page_has_no_way_to_make_markup_of_text() -> None:
    """Neither the page of the people nor that of the reviewers, who read what an attacker wrote."""
    scripts, pages = sorted(WEB.glob("**/*.js")), sorted(WEB.glob("**/*.html"))
    assert {path.name for path in (*scripts, *pages)} >= {"app.js", "page.js", "review.js", "index.html", "review.html"}
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|ContextualFragment|srcdoc"
    for path in scripts:
        assert not re.findall(sinks, path.read_text(encoding="utf-8")), path.name
    for path in pages:
        markup = path.read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|javascript:|https?://", markup), path.name


@pytest.mark.parametrize(
    "name", ["../x", "..%2fx", "%2e%2e%2f", "x/../../y", "\x00", "s-1;DROP TABLE sessions", "' OR 1=1 --", "s" * 5000]
)
def test_no_name_of_a_conversation_or_leaflet_leads_elsewhere(client: TestClient, name: str) -> None:
    client.post("/chat", json={"message": "hello"})
    for path in (f"/sessions/{name!s}", f"/leaflets/{name!s}"):
        reply = client.get(path.replace("\x00", "%00"))
        assert reply.status_code in (400, 404)
        assert "hello" not in reply.text
    assert client.post("/chat", json={"message": "x", "session_id": name}).status_code in (404, 422)


def test_no_header_of_a_client_comes_back_in_one_of_ours(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    given = "abcdefgh\r\nSet-Cookie: client=stolen"
    reply = client.get(
        "/nothing", headers={"X-Request-ID": given, "X-Forwarded-Host": "attacker.example", "Cookie": "client=x.y"}
    )
    assert "stolen" not in str(reply.headers)
    assert "attacker" not in str(reply.headers)
    client.post("/chat", json={"message": "line one\nERROR forged line of the log"})
    assert "forged" not in caplog.text


def slow_messages() -> list[str]:
    """Repetitions of every word the patterns know, in messages of the longest length taken."""
    patterns = [*red_flags.ALARMS.values(), *red_flags.REASSURANCES.values(), *(g.pattern for g in harm.GROUPS.values())]
    words = sorted({word for pattern in patterns for word in re.findall(r"[a-z]{3,}", pattern)})
    rng = random.Random(7)
    mixed = [" ".join(rng.choice(words) for _ in range(1500)) for _ in range(3)]
    same = [f"{word} " * 2000 for word in rng.sample(words, 12)]
    odd = [
        "<script " * 1000,
        "<!--" * 2000,
        "<" * 8000,
        "i'm not " * 1000,
        "+1 (" * 2000,
        "1 " * 4000,
        "Ab " * 2700,
        "a.a@" * 2000,
    ]
    return [message[:8000] for message in (*mixed, *same, *odd)]


def test_no_message_makes_the_patterns_slow(serve: Serve) -> None:
    for message in slow_messages():
        began = time.process_time()
        taken = intake.take(message, 8000)
        red_flags.floor(taken.text)
        red_flags.features(taken.text)
        harm.features([taken.text])
        scrub(message)
        assert time.process_time() - began < 3, message[:40]
