"""Two replicas of the service as a user starts them, with a stub for the model: state they share, a kill, and new documents."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from small_index import LEAFLETS
from stub_llm import StubServer

from ai_engineer_track.api.ray_serve import serve_ray
from ai_engineer_track.settings import load_ai_settings
from benchmarks import replicas as drill
from shared import library as lib
from shared.errors import UserError
from shared.replicas import REPLICA_HEADER, read_journals

pytest.importorskip("ray")


def test_no_model_is_told_before_anything_is_started(tmp_path: Path) -> None:
    settings = load_ai_settings("smoke", artifacts=str(tmp_path), port="0")
    with pytest.raises(UserError, match="no model has been published"):
        serve_ray(settings, 2, None)


def test_a_port_that_is_taken_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = load_ai_settings("smoke", artifacts=str(tmp_path), port=str(port))
        with pytest.raises(UserError, match=rf"cannot listen .* 127.0.0.1:{port}"):
            serve_ray(settings, 2, None)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[drill.Side]:
    corpus = tmp_path_factory.mktemp("corpus")
    for slug in LEAFLETS:
        shutil.copy(lib.DATASETS / "health_library" / f"{slug}.md", corpus)
    with StubServer() as stub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_BASE_URL", stub.url)
        patch.setenv("CORPUS", str(corpus))
        patch.setenv("ARTIFACTS", str(tmp_path_factory.mktemp("artifacts")))
        with drill.running("service", 2) as running:
            yield running


def replies(side: drill.Side, client: httpx.Client, session_id: str, path: str) -> set[str]:
    """Which replicas answered, asked until both have."""
    seen: set[str] = set()
    for _ in range(60):
        reply = client.get(f"{side.url}{path.format(session_id)}")
        assert reply.status_code == 200, reply.text
        seen.add(reply.headers[REPLICA_HEADER])
        if len(seen) == 2:
            break
    return seen


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_conversation_is_the_same_whichever_replica_is_asked(side: drill.Side) -> None:
    with httpx.Client(timeout=120) as client:
        asked = client.post(f"{side.url}/chat", json={"message": "My head has been aching on and off all week."}).json()
        session_id = asked["session_id"]
        assert len(replies(side, client, session_id, "/sessions/{}")) == 2  # the cookie's key and what was said are shared
        message = {"message": "on one side, throbbing", "session_id": session_id}
        streamed = client.post(f"{side.url}/chat", json=message, headers={"Accept": "text/event-stream"})
        names = [line.removeprefix("event: ") for line in streamed.text.splitlines() if line.startswith("event: ")]
        assert names[-1] == "done"
        exchanges = client.get(f"{side.url}/sessions/{session_id}").json()["exchanges"]
        assert [e["message"] for e in exchanges] == ["My head has been aching on and off all week.", "on one side, throbbing"]
    with httpx.Client() as stranger:
        assert {stranger.get(f"{side.url}/sessions/{session_id}").status_code for _ in range(10)} == {404}
        assert "<title>" in stranger.get(side.url).text


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.anyio
async def test_a_killed_replica_takes_along_only_what_it_was_working_on(side: drill.Side) -> None:
    found = (await drill.under_load(side, "kill", 2, drill.kill_one)).metrics
    assert found["in_flight_on_the_killed"] > 0
    assert found["failed_elsewhere"] == 0
    assert len(drill.alive(side)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.anyio
async def test_new_documents_replace_all_and_no_message_fails(side: drill.Side) -> None:
    before = {journal.version for journal in drill.alive(side)}
    found = (await drill.under_load(side, "update", 2, drill.update)).metrics
    assert found["failed"] == 0
    assert found["old_version_afterwards"] == 0
    after = {journal.version for journal in drill.alive(side)}
    assert len(before) == len(after) == 1
    assert before != after
    assert len(read_journals(side.journals)) >= 5  # two, one for the killed, two for the update
