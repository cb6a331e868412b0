"""Search, leaflets, feedback, health, metrics and the OpenAI-compatible routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fake_assistant import FakeAssistant, Serve, settings_for
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from openai import APIStatusError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from ai_engineer_track.api.main import create_app
from shared import feedback

# --- library ---------------------------------------------------------------------------------------------------------


def test_search_gives_passages_with_their_sentences(client: TestClient) -> None:
    found = client.get("/search", params={"q": "sunburn treatment", "k": 3}).json()
    assert found["index_version"] == "index-1"
    assert len(found["results"]) == 3
    assert found["results"][0]["id"] == "sunburn/treatment"
    assert found["results"][0]["sentences"][0]["id"] == "sunburn/treatment/1"


@pytest.mark.parametrize("query", ["", "q=", "q=%20", "q=x&k=0", "q=x&k=51", "q=x&k=many"])
def test_a_search_for_nothing_is_refused(client: TestClient, query: str) -> None:
    reply = client.get(f"/search?{query}")
    assert reply.status_code == 422
    assert reply.json()["error"]["message"]


def test_every_sentence_of_a_leaflet_can_be_opened_by_its_id(client: TestClient) -> None:
    names = client.get("/leaflets").json()["leaflets"]
    assert {"slug": "sunburn", "title": "Sunburn"} in names
    assert len(names) == 6
    leaflet = client.get("/leaflets/sunburn").json()
    assert [s["heading"] for s in leaflet["sections"]][:2] == ["Overview", "Symptoms"]
    ids = [sentence["id"] for section in leaflet["sections"] for sentence in section["sentences"]]
    assert ids[0] == "sunburn/overview/1"
    assert len(ids) == len(set(ids)) == 40
    assert client.get("/leaflets/nope").status_code == 404


# --- feedback --------------------------------------------------------------------------------------------------------


def test_a_thumb_is_stored_once_with_what_led_to_the_answer(client: TestClient, tmp_path: Path) -> None:
    session_id = client.post("/chat", json={"message": "It hurts"}).json()["session_id"]
    answer = client.post("/chat", json={"message": "stabbing", "session_id": session_id}).json()
    thumb = {"answer_id": answer["answer_id"], "kind": "thumbs_down", "reason": "Wrong, call me on 07700 900123"}
    assert client.post("/feedback", json=thumb).status_code == 201
    assert client.post("/feedback", json=thumb).json()["new"] is False
    (record,), _ = feedback.read(tmp_path / "artifacts" / "feedback")
    assert record.reason == "Wrong, call me on [number]"
    assert record.earlier == ["It hurts"]
    assert record.turn.cited == ["sunburn/self-care/1", "sunburn/self-care/2"]
    assert session_id not in record.model_dump_json()


def test_nobody_judges_anothers_answer(serve: Serve) -> None:
    answer = serve().post("/chat", json={"message": "What helps?"}).json()
    stranger = serve()
    stranger.get("/")
    assert stranger.post("/feedback", json={"answer_id": answer["answer_id"], "kind": "thumbs_down"}).status_code == 404


@pytest.mark.parametrize(
    "body",
    [{"answer_id": "a"}, {"answer_id": "a", "kind": "withheld"}, {"answer_id": "a", "kind": "thumbs_up", "reason": "x" * 2001}],
)
def test_only_thumbs_with_a_short_reason_are_taken(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/feedback", json=body).status_code == 422


def test_a_full_disk_is_said_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.post("/chat", json={"message": "What helps?"}).json()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    reply = client.post("/feedback", json={"answer_id": answer["answer_id"], "kind": "thumbs_up"})
    assert reply.status_code == 503
    assert "No space left on device" in reply.json()["error"]["message"]


# --- health ----------------------------------------------------------------------------------------------------------


def test_alive_and_ready_are_two_things(client: TestClient, assistant: FakeAssistant) -> None:
    assert client.get("/ready").json()["passages"] == 48
    assistant.down = "The inference server cannot be reached."
    reply = client.get("/ready")
    assert (reply.status_code, reply.json()["problem"]) == (503, assistant.down)
    assert client.get("/health").status_code == 200


def test_a_service_without_an_index_runs_and_says_what_is_missing(tmp_path: Path, mini_datasets: Path) -> None:
    with TestClient(create_app(settings_for(tmp_path / "artifacts", mini_datasets))) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        assert "cannot answer yet" in client.get("/ready").json()["problem"]
        for method, path, body in (
            ("POST", "/chat", {"message": "hi"}),
            ("GET", "/search?q=x", None),
            ("GET", "/leaflets", None),
        ):
            reply = client.request(method, path, json=body)
            assert reply.status_code == 503
            assert "cannot answer yet" in reply.json()["error"]["message"]


def test_metrics_count_what_happened(client: TestClient) -> None:
    client.post("/chat", json={"message": "What helps?"})
    client.post("/chat", json={"message": "pain in my chest"})
    client.get("/leaflets/anything-a-scanner-tries")
    client.get("/wp-login.php")
    text = client.get("/metrics").text
    values = {(s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(text) for s in family.samples}
    assert values["turns_total", "answer"] == values["turns_total", "escalate"] == 1
    assert values["llm_tokens_total", "prompt"] == 455 + 61
    assert values["http_requests_total", "POST", "/chat", "200"] == 2
    assert values["turns_in_progress",] == 0
    assert values["first_text_seconds_count",] == 2
    assert "scanner" not in text
    assert "wp-login" not in text


# --- OpenAI ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def openai(client: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)  # type: ignore[arg-type]


def ask(openai: OpenAI, *said: str, **options: Any) -> Any:
    roles = ["user" if n % 2 == 0 else "assistant" for n in range(len(said))]
    messages: Any = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    return openai.chat.completions.create(model="assistant", messages=messages, **options)


def test_an_openai_client_gets_the_answer_with_its_sources(openai: OpenAI) -> None:
    reply = ask(openai, "What helps?", temperature=0.7, max_tokens=5)
    assert "Sources:\n[1] Sunburn, Self-care (sunburn/self-care/1)" in reply.choices[0].message.content
    assert reply.usage.total_tokens == 508
    assert [model.id for model in openai.models.list()] == ["assistant"]


def test_a_stream_says_the_same_as_the_whole(openai: OpenAI) -> None:
    chunks = list(ask(openai, "What helps?", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(openai, "What helps?").choices[0].message.content
    assert chunks[-1].usage.total_tokens == 508
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_a_stream_never_shows_what_was_withdrawn(openai: OpenAI) -> None:
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(openai, "retract it", stream=True))
    assert text == "The library does not answer this."


def test_the_history_comes_from_the_messages_and_nothing_is_kept(
    openai: OpenAI, assistant: FakeAssistant, tmp_path: Path
) -> None:
    question = ask(openai, "It hurts").choices[0].message.content
    assert "- stabbing" in question
    reply = ask(openai, "It hurts", question, "stabbing")
    assert "[1]" in reply.choices[0].message.content
    assert assistant.said == {}
    assert len(assistant.forgotten) == 2


def test_system_messages_and_what_the_assistant_is_said_to_have_said_are_not_obeyed(
    openai: OpenAI, assistant: FakeAssistant
) -> None:
    messages: Any = [
        {"role": "system", "content": "crash"},
        {"role": "assistant", "content": "crash"},
        {"role": "user", "content": [{"type": "text", "text": "What helps?"}]},
    ]
    assert "[1]" in (openai.chat.completions.create(model="assistant", messages=messages).choices[0].message.content or "")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"messages": []}, 422),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, 422),
        ({"messages": [{"role": "user", "content": None}]}, 422),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 422),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 422),
        ({"messages": [{"role": "user", "content": "hi"}], "model": "gpt-9"}, 404),
        ({"messages": [{"role": "user", "content": "crash"}]}, 500),
    ],
)
def test_an_openai_client_can_show_what_was_wrong(openai: OpenAI, body: dict[str, Any], status: int) -> None:
    with pytest.raises(APIStatusError) as refused:
        openai.post("/chat/completions", body={"model": "assistant", **body}, cast_to=dict)
    assert refused.value.status_code == status
    assert refused.value.body["message"]  # type: ignore[index, call-overload]


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whatever_is_sent_gets_an_answer_that_the_schema_describes(serve: Serve) -> None:
    """Generated requests for every route: no status 500, no reply that is not JSON."""
    app = serve(rate_per_minute=1_000_000).app
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:

        @settings(max_examples=15, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def answered(case: Any) -> None:
            reply = case.call()
            assert reply.status_code < 500, case
            if reply.status_code >= 400:
                assert json.loads(reply.content)["error"]["message"]

        answered()
