"""Simulated people: they ask what they were given, answer what they are asked, and say whether they were content."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ai_engineer_track.people import ask_all, content
from shared.errors import UserError
from shared.files import read_jsonl
from shared.library import Question

GOLD = "ankle-sprain/self-care/2"


def a_question(number: int, **changes: Any) -> Question:
    given = {"id": f"q-{number}", "split": "train", "question": f"Question {number}?", "answerable": True, "register": "plain"}
    return Question.model_validate({**given, "leaflets": ["ankle-sprain"], "answer_sentences": [GOLD], **changes})


class Service(BaseHTTPRequestHandler):
    """Asks back once when the message is about 1, quotes the wrong sentence for 2, else the right one."""

    said: list[dict[str, Any]]
    thumbs: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/feedback":
            self.thumbs.append(body)
            return self.reply(201, {"id": "f", "new": True})
        self.said.append(body)
        message = body["message"]
        back = {"feature": "pain", "text": "Where?", "choices": []} if "1" in message else None
        cited = [] if back else [{"sentence_id": "ankle-sprain/symptoms/1" if "2" in message else GOLD}]
        turn = {"kind": "clarify" if back else "answer", "question": back, "citations": cited, "passages": [{"id": "p"}]}
        return self.reply(200, {"answer_id": f"a-{message}", "session_id": "s", "turn": turn | {"model_version": "m-1:q8_0"}})

    def reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Service.said, Service.thumbs = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_everybody_asks_and_gives_a_thumb(url: str, tmp_path: Path) -> None:
    asked = ask_all(url, [a_question(n) for n in (1, 2, 3)], tmp_path / "out.jsonl")
    assert [(one.question_id, one.right) for one in asked] == [("q-1", True), ("q-2", False), ("q-3", True)]
    assert {body["message"] for body in Service.said} == {"Question 1?", "Question 2?", "Question 3?", "I don't know"}
    assert {(t["answer_id"], t["kind"]) for t in Service.thumbs} == {
        ("a-I don't know", "thumbs_up"), ("a-Question 2?", "thumbs_down"), ("a-Question 3?", "thumbs_up"),
    }  # fmt: skip
    assert [row["model_version"] for row in read_jsonl(tmp_path / "out.jsonl")] == ["m-1:q8_0"] * 3


def test_no_service_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the service does not answer") as caught:
        ask_all("http://127.0.0.1:9", [a_question(3)], tmp_path / "out.jsonl")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("answerable", "kind", "cited", "wanted"),
    [
        (True, "answer", [GOLD, "x/symptoms/1"], True),
        (True, "answer", ["x/symptoms/1"], False),
        (True, "not_answered", [], False),
        (False, "not_answered", [], True),
        (False, "answer", [GOLD], False),
    ],
)
def test_who_is_content(answerable: bool, kind: str, cited: list[str], wanted: bool) -> None:
    question = a_question(1, answerable=answerable, answer_sentences=[GOLD] if answerable else [])
    assert content(question, kind, cited) is wanted
