"""The routes with everything real behind them but the language model: index, retriever, graph and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ai_engineer_track.api.main import create_app
from ai_engineer_track.settings import AiSettings
from ai_engineer_track.turn import KINDS

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(settings: AiSettings, mini_datasets: Path) -> AiSettings:
    """Settings of a service whose index is built and whose model is the stub."""
    from ai_engineer_track.ingest import ingest

    made = settings.model_copy(update={"datasets": mini_datasets})
    ingest(made)
    return made


def test_a_message_goes_all_the_way_and_leaves_nothing_when_deleted(whole: AiSettings) -> None:
    with TestClient(create_app(whole)) as client:
        assert client.get("/ready").json()["problem"] is None
        said = "What helps with sunburn, zebra umbrella?"
        reply = client.post("/chat", json={"message": said}, headers={"Accept": "text/event-stream"})
        names = [line.removeprefix("event: ") for line in reply.text.splitlines() if line.startswith("event: ")]
        assert names[-1] == "done"
        assert "step" in names
        session_id = reply.headers["x-session-id"]
        (exchange,) = client.get(f"/sessions/{session_id}").json()["exchanges"]
        assert exchange["turn"]["kind"] in KINDS
        assert exchange["turn"]["kind"] != "unavailable"
        assert [step["node"] for step in exchange["turn"]["trace"]]
        for citation in exchange["turn"]["citations"]:
            leaflet = client.get(f"/leaflets/{citation['leaflet']}").json()
            assert citation["text"] in [s["text"] for section in leaflet["sections"] for s in section["sentences"]]
        assert client.get("/search", params={"q": "sunburn"}).json()["results"][0]["document"] == "sunburn"
        assert client.delete(f"/sessions/{session_id}").status_code == 204
        left = [path.name for path in (whole.artifacts / "service").iterdir() if b"zebra umbrella" in path.read_bytes()]
        assert left == []


def test_a_conversation_goes_on_after_a_restart(whole: AiSettings) -> None:
    with TestClient(create_app(whole)) as client:
        session_id = client.post("/chat", json={"message": "It hurts and I feel hot"}).json()["session_id"]
        cookies = client.cookies
    with TestClient(create_app(whole), cookies=cookies) as client:
        reply = client.post("/chat", json={"message": "it began suddenly", "session_id": session_id})
        assert reply.status_code == 200
        assert len(client.get(f"/sessions/{session_id}").json()["exchanges"]) == 2


def test_with_the_model_gone_people_are_told_so(whole: AiSettings) -> None:
    dead = whole.model_copy(update={"llm": whole.llm.model_copy(update={"base_url": "http://127.0.0.1:9/v1", "retries": 0})})
    with TestClient(create_app(dead)) as client:
        reply = client.get("/ready")
        assert reply.status_code == 503
        assert "language model does not answer" in reply.json()["problem"]
        assert client.post("/chat", json={"message": "What helps with sunburn?"}).status_code == 200
