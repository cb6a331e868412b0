"""Reviewing over HTTP: a failed answer is handed out, two opinions make a label, and strangers see nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_assistant import Serve
from fastapi.testclient import TestClient
from pydantic import SecretStr

from shared import labels

Open = Callable[..., TestClient]


@pytest.fixture
def here(serve: Serve) -> Open:
    """`here()` is a client on the machine itself."""

    def start(**api: Any) -> TestClient:
        client = serve(**api)
        client.base_url = "http://127.0.0.1:8000"  # type: ignore[assignment]
        return client

    return start


def ask(client: TestClient, message: str = "retract this") -> str:
    return str(client.post("/chat", json={"message": message}).json()["answer_id"])


def next_task(client: TestClient, reviewer: str) -> Any:
    return client.get("/reviews/next", params={"reviewer": reviewer}).json()


def give(client: TestClient, answer_id: str, reviewer: str, action: str, sentences: list[str] | None = None) -> Any:
    body = {"answer_id": answer_id, "reviewer": reviewer, "action": action, "sentences": sentences or []}
    return client.post("/reviews", json=body)


def test_a_failed_answer_comes_with_all_that_is_needed_to_judge_it(here: Open) -> None:
    client = here()
    asked = client.post("/chat", json={"message": "It hurts, I'm Ann Lee"}).json()
    ask(client, "What helps?")  # a good answer is not looked at
    body = {"message": "retract this", "session_id": asked["session_id"]}
    answer_id = client.post("/chat", json=body).json()["answer_id"]
    task = next_task(client, "ab")["task"]
    assert task["answer_id"] == answer_id
    assert task["question"] == "retract this"
    assert task["earlier"] == [["It hurts, I'm [name]", asked["turn"]["text"]]]
    assert {(r["kind"], r["counts"]) for r in task["reasons"]} == {
        ("judge_failed", False), ("withheld", True), ("clarify_failed", True),
    }  # fmt: skip
    assert task["sources"][0]["id"] == "sunburn/overview"
    assert task["sources"][0]["sentences"][0]["id"] == "sunburn/overview/1"
    assert task["model_version"] == "m-fake"
    assert task["opinions"] == []


def test_two_opinions_make_a_label_and_the_answer_is_done(here: Open, tmp_path: Path) -> None:
    client = here()
    answer_id = ask(client)
    first = give(client, answer_id, "ab", "answer", ["sunburn/self-care/2", "sunburn/self-care/1"])
    assert (first.status_code, first.json()) == (201, {"labelled": False, "agreed": None})
    assert next_task(client, "ab")["task"] is None
    assert next_task(client, "cd")["task"]["opinions"] == []  # the second does not see the first
    second = give(client, answer_id, "cd", "answer", ["sunburn/self-care/1", "sunburn/self-care/2"])
    assert second.json() == {"labelled": True, "agreed": True}
    (label,), _ = labels.read(tmp_path / "artifacts" / "feedback")
    assert label.answer_sentences == ["sunburn/self-care/2", "sunburn/self-care/1"]
    assert (label.answer_id, label.reviewers, label.model_version) == (answer_id, ["ab", "cd"], "m-fake")
    shown = next_task(client, "ef")
    assert shown["task"] is None
    assert (shown["progress"]["labelled"], shown["progress"]["waiting"], shown["progress"]["agreement"]["same"]) == (1, 0, 1)
    assert give(client, answer_id, "ef", "decline").status_code == 409


def test_a_third_sees_both_opinions_and_decides(here: Open, tmp_path: Path) -> None:
    client = here()
    answer_id = ask(client)
    give(client, answer_id, "ab", "escalate")
    assert give(client, answer_id, "cd", "clarify").json() == {"labelled": False, "agreed": None}
    assert {(o["reviewer"], o["action"]) for o in next_task(client, "ef")["task"]["opinions"]} == {
        ("ab", "escalate"), ("cd", "clarify"),
    }  # fmt: skip
    assert give(client, answer_id, "ef", "escalate").json() == {"labelled": True, "agreed": False}
    (label,), _ = labels.read(tmp_path / "artifacts" / "feedback")
    assert (label.action, label.agreed) == ("escalate", False)


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"answer_id": "a-unknown"}, 404, "no such answer"),
        ({"sentences": ["sunburn/self-care/99"]}, 422, "no sentence"),
        ({"sentences": ["../../etc/passwd"]}, 422, "no sentence"),
        ({"sentences": []}, 422, "needs sentences"),
        ({"action": "guess"}, 422, "action"),
        ({"reviewer": "Ann Lee"}, 422, "reviewer"),
        ({"note": "my phone is 020 7946 0018"}, 422, "note"),
    ],
)
def test_an_opinion_that_cannot_be_gets_one_sentence(here: Open, change: dict[str, Any], status: int, sentence: str) -> None:
    client = here()
    body = {"answer_id": ask(client), "reviewer": "ab", "action": "answer", "sentences": ["sunburn/self-care/1"], **change}
    reply = client.post("/reviews", json=body)
    assert reply.status_code == status
    assert sentence in reply.json()["error"]["message"]
    assert client.get("/reviews/next", params={"reviewer": "A B"}).status_code == 422


def test_nobody_gives_two_opinions(here: Open) -> None:
    client = here()
    answer_id = ask(client)
    assert give(client, answer_id, "ab", "decline").status_code == 201
    assert give(client, answer_id, "ab", "escalate").status_code == 409


def test_without_a_token_it_only_works_on_the_machine_itself(serve: Serve, here: Open) -> None:
    assert here().get("/reviews/next", params={"reviewer": "ab"}).status_code == 200
    for client in (serve(), here(host="0.0.0.0"), here(host="192.0.2.1")):  # another name leads here; open to the network
        refused = client.get("/reviews/next", params={"reviewer": "ab"})
        assert refused.status_code == 403
        assert "API_TOKEN" in refused.json()["error"]["message"]
        assert client.post("/reviews", json={"answer_id": "a", "reviewer": "ab", "action": "decline"}).status_code == 403


def test_with_a_token_only_who_has_it(serve: Serve) -> None:
    client = serve(host="0.0.0.0", token=SecretStr("s3cret"))
    params = {"reviewer": "ab"}
    assert client.get("/reviews/next", params=params).status_code == 401
    assert client.get("/reviews/next", params=params, headers={"Authorization": "Bearer s3cret"}).status_code == 200


@pytest.mark.parametrize(("path", "kind"), [("/review", "html"), ("/review.js", "javascript"), ("/page.js", "javascript")])
def test_the_page_comes_with_its_content_policy(here: Open, path: str, kind: str) -> None:
    reply = here().get(path)
    assert reply.status_code == 200
    assert kind in reply.headers["content-type"]
    assert "default-src 'none'" in reply.headers["content-security-policy"]
