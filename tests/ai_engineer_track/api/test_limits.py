"""Token, size and rate limits, request ids and security headers, on every route alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_assistant import Serve
from fastapi import HTTPException
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from ai_engineer_track.api.limits import OPEN_PATHS, Gate, RateLimit, same_token

SECRET = SecretStr("s3cret-ü")


def test_without_the_token_nothing_is_told_but_page_and_probes(serve: Serve) -> None:
    client = serve(token=SECRET)
    routes = [(method, path) for path, methods in client.app.openapi()["paths"].items() for method in methods]  # type: ignore[attr-defined]
    assert len(routes) > 8
    for method, path in routes:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            reply = client.request(method, path, headers=headers)
            assert (reply.status_code == 401) == (path not in OPEN_PATHS), (method, path)
    assert client.get("/openapi.json").status_code == 401
    refused = client.get("/metrics")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "token" in refused.json()["error"]["message"]
    assert client.get("/").status_code == 200


def test_with_the_token_it_works(serve: Serve) -> None:
    headers = {"Authorization": b"bearer " + SECRET.get_secret_value().encode()}
    assert serve(token=SECRET).get("/metrics", headers=headers).status_code == 200


@given(given=st.text(), wanted=st.text(min_size=1))
def test_tokens_are_compared_whole(given: str, wanted: str) -> None:
    assert same_token(given, wanted) == (given == wanted)


def test_a_body_too_large_is_refused_with_and_without_an_announced_length(client: TestClient) -> None:
    limit = 32 * 8000

    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 1000

    announced = client.post("/chat", content=b" " * (limit + 1), headers={"Content-Type": "application/json"})
    chunked = client.post("/chat", content=chunks(), headers={"Content-Type": "application/json"})
    for reply in (announced, chunked):
        assert reply.status_code == 413
        assert "too large" in reply.json()["error"]["message"]
    for nonsense in ("-1", "ten", "9" * 5000):
        assert client.post("/chat", content=b"{}", headers={"Content-Length": nonsense}).status_code == 413


def test_too_many_messages_are_told_how_long_to_wait(serve: Serve) -> None:
    client = serve(rate_per_minute=3)
    assert [client.get("/search?q=x").status_code for _ in range(4)] == [200, 200, 200, 429]
    for method, path, body in (
        ("POST", "/chat", {"message": "hello"}),
        ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("POST", "/feedback", {"answer_id": "a", "kind": "thumbs_up"}),
    ):
        reply = client.request(method, path, json=body)
        assert reply.status_code == 429
        assert 0 < int(reply.headers["retry-after"]) <= 20
    assert client.get("/health").status_code == 200


def test_a_bucket_refills_and_one_client_does_not_use_up_anothers() -> None:
    now = [0.0]
    rate = RateLimit(2, clock=lambda: now[0])
    rate.take("a")
    rate.take("a")
    with pytest.raises(HTTPException) as refused:
        rate.take("a")
    assert refused.value.headers == {"Retry-After": "30"}
    rate.take("b")
    now[0] += 30
    rate.take("a")
    with pytest.raises(HTTPException):
        rate.take("a")


def test_a_flood_of_addresses_does_not_fill_the_memory() -> None:
    now = [0.0]
    rate = RateLimit(60, clock=lambda: now[0])
    for n in range(30_000):
        now[0] += 0.01
        rate.take(str(n))
    assert len(rate._buckets) <= 10_001


def test_every_reply_has_an_id_and_the_security_headers(client: TestClient) -> None:
    for path in ("/", "/app.js", "/health", "/nothing/here", "/sessions/x"):
        headers = client.get(path).headers
        assert len(headers["x-request-id"]) >= 8
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_a_sensible_request_id_is_kept_and_any_other_replaced(client: TestClient) -> None:
    assert client.get("/health", headers={"X-Request-ID": "trace-1234.abc"}).headers["x-request-id"] == "trace-1234.abc"
    for given_id in ("short", "x" * 65, "with space 12", "<script>alert"):
        assert client.get("/health", headers={"X-Request-ID": given_id}).headers["x-request-id"] != given_id


def test_other_sites_may_not_call(client: TestClient) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    preflight = client.options("/chat", headers=origin)
    assert preflight.status_code == 403
    assert not any(name.startswith("access-control") for name in preflight.headers)
    form = client.post("/chat", content='{"message": "hi"}', headers={"Content-Type": "text/plain", **origin})
    assert form.status_code == 403


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/%2e%2e/settings.py", "/app.js/../../settings.py", "/docs", "/redoc"])
def test_nothing_but_the_page_is_served_as_a_file(client: TestClient, path: str) -> None:
    reply = client.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "There is nothing at this address."


def in_another_process(path: Path, session_id: str, then: str) -> subprocess.Popen[str]:
    """A process that has taken the conversation's place (it says so), and then does `then`."""
    code = "import time; from pathlib import Path; from ai_engineer_track.api.limits import Gate; "
    code += f"gate = Gate(9, Path({str(path)!r})); gate.enter({session_id!r}); print('in', flush=True); {then}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "in\n"
    return process


def test_a_conversation_is_worked_on_by_one_process_at_a_time(tmp_path: Path) -> None:
    gate = Gate(9, tmp_path / "working.lock")
    other = in_another_process(tmp_path / "working.lock", "s-1", "time.sleep(60)")
    try:
        assert gate.busy("s-1")
        with pytest.raises(HTTPException) as refused:
            gate.enter("s-1")
        assert refused.value.status_code == 409
        gate.enter("s-2")  # another conversation has its own place
        gate.leave("s-2")
    finally:
        other.kill()  # as a replica dies: its place is free at once
        other.wait()
    assert not gate.busy("s-1")
    gate.enter("s-1")
    gate.close()


def test_a_place_that_was_refused_for_want_of_room_is_free_for_others(tmp_path: Path) -> None:
    full = Gate(1, tmp_path / "working.lock")
    full.enter("s-1")
    with pytest.raises(HTTPException) as refused:
        full.enter("s-2")
    assert refused.value.status_code == 503
    in_another_process(tmp_path / "working.lock", "s-2", "pass").wait()
    full.close()


@pytest.mark.parametrize("path", ["/", "/chat", "/search?q=x", "/metrics", "/sessions/x", "/v1/models", "/openapi.json"])
def test_a_name_that_was_pointed_here_gets_nothing(client: TestClient, path: str) -> None:
    """DNS rebinding: the page that owns the name could read every reply."""
    reply = client.get(path, headers={"Host": "attacker.example:8000"})
    assert reply.status_code == 403
    assert "ALLOWED_HOSTS" in reply.json()["error"]["message"]
    assert "set-cookie" not in reply.headers


def test_no_redirect_leads_to_a_host_the_client_named(client: TestClient) -> None:
    reply = client.get("/leaflets/", headers={"Host": "attacker.example"}, follow_redirects=False)
    assert "location" not in reply.headers
    assert reply.status_code == 403
