"""The API over an engine that only counts: statuses, error bodies, queues, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.serving.app import State, create_app
from ml_engineer_track.serving.engine import Token
from ml_engineer_track.serving.text import TextStream
from tests.ml_engineer_track.serving.conftest import CountingEngine, served

Make = Callable[..., CountingEngine]
CHAT: dict[str, Any] = {"model": "counting", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}


@contextmanager
def running(engine: CountingEngine, tokenizer: PreTrainedTokenizerBase, drain: int | None = None) -> Iterator[str]:
    """The app on a socket of its own, in a thread; when it ends, running replies have `drain` seconds."""

    async def load(state: State) -> None:
        state.models["counting"] = served(engine, tokenizer)
        state.not_ready = ""

    taken = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(State(), load), log_level="critical", timeout_graceful_shutdown=drain)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([taken],))
    thread.start()
    address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    try:
        wait(lambda: httpx.get(f"{address}/ready").status_code == 200)
        yield address
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def wait(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.01)
    raise AssertionError("did not come about in time")


@pytest.fixture
def slow(counting: Make, base_tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, CountingEngine]]:
    engine = counting(seconds=0.02, max_running=1, max_waiting=1)
    with running(engine, base_tokenizer) as address:
        yield address, engine


def test_a_full_queue_gets_429_with_retry_after(slow: tuple[str, CountingEngine]) -> None:
    address, _ = slow

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(client.post(f"{address}/v1/chat/completions", json=CHAT) for _ in range(12)))

    answers = asyncio.run(run())
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(slow: tuple[str, CountingEngine], stream: bool) -> None:
    address, engine = slow
    body = json.dumps({**CHAT, "max_tokens": 400, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as connection:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait(lambda: engine.stats().running == 1)
        if stream:
            assert connection.recv(64)
    left = engine.steps
    wait(lambda: engine.stats().running == 0)
    assert engine.steps - left < 30  # 400 were asked for


def test_a_failing_engine_gives_503_and_the_server_lives_on(
    slow: tuple[str, CountingEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    address, engine = slow
    engine.fail_at = lambda e: e.steps == 1
    answer = httpx.post(f"{address}/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.status_code == 503
    assert "matrix fell over" in answer.json()["error"]["message"]
    assert httpx.post(f"{address}/v1/chat/completions", json=CHAT).status_code == 200


def test_an_engine_that_fails_in_the_middle_of_a_stream_ends_it_with_an_error(
    slow: tuple[str, CountingEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    address, engine = slow
    engine.fail_at = lambda e: e.steps == 3
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="matrix fell over"):
        list(client.chat.completions.create(**CHAT, stream=True))


def test_the_first_word_is_on_its_way_before_the_engine_takes_another_step(
    counting: Make, base_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose steps hold the interpreter would otherwise keep every word until its reply is whole."""
    monkeypatch.setattr("ml_engineer_track.serving.engine.PATIENCE_SECONDS", 20)
    engine = counting()
    engine.fail_at = lambda e: bool(sum(range(300_000)) < 0)  # some milliseconds of arithmetic that cannot be interrupted
    engine.do_begin = lambda job: setattr(job, "state", 1000)  # type: ignore[method-assign]  # from there on tokens are words
    steps_before: list[int] = []

    async def load(state: State) -> None: ...

    state = State(not_ready="")
    state.models["counting"] = served(engine, base_tokenizer)
    body = json.dumps({**CHAT, "max_tokens": 200, "stream": True}).encode()

    async def send(message: Any) -> None:
        if b'"content": "' in message.get("body", b""):
            steps_before.append(engine.steps)

    async def run() -> None:
        requests = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            return next(requests, None) or await asyncio.Event().wait()

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
            "scheme": "http", "headers": [(b"content-type", b"application/json")], "server": ("x", 80), "client": ("x", 1),
        }  # fmt: skip
        await create_app(state, load)(scope, receive, send)

    asyncio.run(run())
    assert steps_before[0] == 1
    assert steps_before[-1] == 200


def test_what_can_never_fit_the_cache_is_refused_at_once_with_the_counts(
    counting: Make, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = counting(capacity=100)
    with running(engine, base_tokenizer) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json={**CHAT, "max_tokens": 200})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "does_not_fit")
    assert "the reply may take 200; the key-value cache of this server holds 100" in answer.json()["error"]["message"]
    assert engine.steps == 0


def test_draining_ends_at_its_deadline(counting: Make, base_tokenizer: PreTrainedTokenizerBase) -> None:
    """A reply that would take ten seconds more does not keep the server from ending after one."""
    engine = counting(seconds=0.03, max_running=2)

    def read(address: str) -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{address}/v1/chat/completions", json={**CHAT, "max_tokens": 400, "stream": True}, timeout=60)

    with running(engine, base_tokenizer, drain=1) as address:
        reader = threading.Thread(target=read, args=(address,))
        reader.start()
        wait(lambda: engine.stats().running == 1)
        told = time.perf_counter()
    assert time.perf_counter() - told < 9
    reader.join(timeout=20)
    assert engine.stats().running == 0


def test_nothing_is_answered_before_the_models_are_ready(base_tokenizer: PreTrainedTokenizerBase) -> None:
    async def never(state: State) -> None:
        await asyncio.sleep(60)

    async def run() -> None:
        transport = httpx.ASGITransport(create_app(State(), never))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            assert (await client.get("/health")).status_code == 200
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()["why"]) == (503, "loading")
            answer = await client.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "not_ready"

    asyncio.run(run())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": "other"}, "no model 'other' here; there is: counting"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"max_tokens": 600}, "at most 512 tokens; the prompt has"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"n": 17}, "n: Input should be less than or equal to 16"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"tools": [{}]}, "tools"),
    ({"nonsense": 1}, "nonsense: Extra inputs are not permitted"),
    ({"structured_outputs": {"regex": "((("}}, "missing )"),
    ({"structured_outputs": {"grammar": "x"}}, "does not begin with a rule"),
    ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "exactly one"),
    ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, "exclude each other"),
    ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "unknown type 3"),
]


@pytest.fixture(scope="module")
def plain(base_tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    engine = CountingEngine()
    engine.start()
    with running(engine, base_tokenizer) as address:
        yield address
    engine.close()


@pytest.mark.parametrize(("change", "why"), WRONG)
def test_a_wrong_request_gets_400_with_the_reason_in_openais_shape(plain: str, change: dict[str, Any], why: str) -> None:
    answer = httpx.post(f"{plain}/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert why in error["message"]


@pytest.mark.parametrize(("content", "status"), [(b"{bad", 400), (b"[]", 400), (b"", 400), (b"\xff\xfe", 400)])
def test_malformed_json_gets_400(plain: str, content: bytes, status: int) -> None:
    answer = httpx.post(f"{plain}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_unknown_paths_and_methods_have_the_same_shape(plain: str, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{plain}{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [[], [[]], [99999], [-1], "", [""]])
def test_prompts_without_tokens_of_this_model_are_refused(plain: str, prompt: Any) -> None:
    answer = httpx.post(f"{plain}/v1/completions", json={"model": "counting", "prompt": prompt})
    assert answer.status_code == 400, answer.text


def test_what_clients_send_without_meaning_it_is_accepted(plain: str) -> None:
    harmless = {"user": "u", "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "store": False, "tools": []}
    answer = httpx.post(f"{plain}/v1/chat/completions", json={**CHAT, **harmless})
    assert answer.status_code == 200, answer.text


def test_metrics_count_what_happened(plain: str) -> None:
    httpx.post(f"{plain}/v1/chat/completions", json=CHAT)
    text = httpx.get(f"{plain}/metrics").text
    assert 'http_requests_total{path="/v1/chat/completions",status="200"}' in text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "generation_tokens_total",
                 "time_to_first_token_seconds_count", "e2e_request_latency_seconds_count", "engine_failures_total"):  # fmt: skip
        assert f'{name}{{model="counting"}}' in text


# --- text --------------------------------------------------------------------------------------------------------------


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        piece = stream.add([Token(token)])
        found.append(piece.text)
        if piece.stopped:
            return found, True
    return [*found, stream.rest()], False


@pytest.mark.parametrize("text", ["Fever and chills.", "Ärzte – “quotes” 🤒 日本", "[1] Rest. [12] Sleep.", "  two  spaces\n"])
def test_the_pieces_of_a_text_are_the_text(base_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert "".join(pieces(base_tokenizer, text)[0]) == text
    assert not any("\ufffd" in piece for piece in pieces(base_tokenizer, text)[0])


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("chills", "Fever and "),
        (" and chills.", "Fever"),
        ("F", ""),
        ("no", "Fever and chills."),
        ("s.x", "Fever and chills."),
    ],
)
def test_no_piece_of_a_stop_text_is_shown(base_tokenizer: PreTrainedTokenizerBase, stop: str, shown: str) -> None:
    assert "".join(pieces(base_tokenizer, "Fever and chills.", "zzz", stop)[0]) == shown


def test_a_page_elsewhere_cannot_use_the_server(slow: tuple[str, CountingEngine]) -> None:
    address, engine = slow
    for headers in ({"Host": "attacker.example"}, {"Origin": "https://attacker.example"}, {"Sec-Fetch-Site": "cross-site"}):
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
            answer = httpx.request(method, f"{address}{path}", json=CHAT if method == "POST" else None, headers=headers)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "foreign_request"
    assert engine.stats().running == 0


def test_a_body_without_end_is_refused(slow: tuple[str, CountingEngine]) -> None:
    address, _ = slow

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    whole = httpx.post(f"{address}/v1/chat/completions", content=b" " * 8_000_001, timeout=60)
    pieces = httpx.post(f"{address}/v1/chat/completions", content=endless(), timeout=60)
    for answer in (whole, pieces):
        assert answer.status_code == 413
        assert "too large" in answer.json()["error"]["message"]
