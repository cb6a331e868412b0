"""The routes with everything real behind them but the language model: index, retriever, graph and memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from small_index import LEAFLETS
from stub_llm import StubServer

from ai_engineer_track.api.main import create_app
from ai_engineer_track.settings import AiSettings, load_ai_settings
from ai_engineer_track.turn import KINDS
from shared import library as lib

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AiSettings]:
    """Settings of a service over a few real leaflets, with their index built and a stub for the model."""
    from ai_engineer_track.ingest import ingest

    corpus = tmp_path_factory.mktemp("corpus")
    for slug in LEAFLETS:
        shutil.copy(lib.DATASETS / "health_library" / f"{slug}.md", corpus)
    with StubServer() as stub:
        artifacts = tmp_path_factory.mktemp("artifacts")
        settings = load_ai_settings("tiny", llm_base_url=stub.url, corpus=str(corpus), artifacts=str(artifacts))
        ingest(settings)
        yield settings


@pytest.fixture(scope="module")
def client(whole: AiSettings) -> Iterator[TestClient]:
    with TestClient(create_app(whole)) as client:
        yield client


def holding(folder: Path, words: str) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and words.encode() in path.read_bytes()]


def test_a_message_goes_all_the_way(client: TestClient) -> None:
    assert client.get("/ready").json()["problem"] is None
    reply = client.post("/chat", json={"message": "What helps against a migraine?"}, headers={"Accept": "text/event-stream"})
    names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
    assert names[-1] == "done"
    assert "step" in names
    (exchange,) = client.get(f"/sessions/{reply.headers['x-session-id']}").json()["exchanges"]
    turn = exchange["turn"]
    assert turn["kind"] in KINDS
    assert turn["kind"] != "unavailable"
    assert {"triage", "retrieve"} <= {step["node"] for step in turn["trace"]}
    for citation in turn["citations"]:
        leaflet = client.get(f"/leaflets/{citation['leaflet']}").json()
        sentences = {s["id"]: s["text"] for section in leaflet["sections"] for s in section["sentences"]}
        assert sentences[citation["sentence_id"]] == citation["text"]
    found = client.get("/search", params={"q": "migraine"}).json()["results"]
    assert found[0]["document"] == "migraine"


def test_an_emergency_is_escalated_without_any_model_call(client: TestClient) -> None:
    body = client.post("/chat", json={"message": "My chest is being crushed, my left arm is numb and I can't breathe"}).json()
    assert body["turn"]["kind"] == "escalate"
    assert sum(step["prompt_tokens"] for step in body["turn"]["trace"]) == 0


def test_a_deleted_conversation_leaves_no_trace_on_the_disk(client: TestClient, whole: AiSettings) -> None:
    session_id = client.post("/chat", json={"message": "What helps against a zebra umbrella migraine?"}).json()["session_id"]
    assert holding(whole.artifacts / "service", "zebra umbrella")
    assert client.delete(f"/sessions/{session_id}").status_code == 204
    left = holding(whole.artifacts, "zebra umbrella")
    assert left in ([], ["feedback.jsonl"])  # feedback stays, by design, without anything that names the person


def test_a_conversation_and_its_open_question_survive_a_restart(client: TestClient, whole: AiSettings) -> None:
    asked = client.post("/chat", json={"message": "My head has been aching on and off all week."}).json()
    with TestClient(create_app(whole), cookies=client.cookies) as later:
        reply = later.post("/chat", json={"message": "on one side, throbbing", "session_id": asked["session_id"]})
        assert reply.status_code == 200
        exchanges = later.get(f"/sessions/{asked['session_id']}").json()["exchanges"]
        assert [e["message"] for e in exchanges] == ["My head has been aching on and off all week.", "on one side, throbbing"]
        assert exchanges[1]["turn"]["kind"] in ("clarify", "answer", "not_answered")


def test_with_the_model_gone_people_are_told_so(whole: AiSettings) -> None:
    gone = whole.llm.model_copy(update={"base_url": "http://127.0.0.1:9/v1", "retries": 0})
    cache = whole.cache.model_copy(update={"enabled": False})
    with TestClient(create_app(whole.model_copy(update={"llm": gone, "cache": cache}))) as client:
        reply = client.get("/ready")
        assert reply.status_code == 503
        assert "language model does not answer" in reply.json()["problem"]
        answer = client.post("/chat", json={"message": "What helps against a migraine?"})
        assert answer.status_code == 200
        assert answer.json()["turn"]["kind"] == "unavailable"
