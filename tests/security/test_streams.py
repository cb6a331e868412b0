"""Whatever is sent to the routes that stream: a stream that comes to its end, or an error in JSON. No 500, no hang."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from fake_assistant import Serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ml_engineer_track.serving.conftest import base_tokenizer, counting  # noqa: F401
from tests.ml_engineer_track.serving.test_app import running

fuzz = settings(max_examples=60, suppress_health_check=list(HealthCheck))
TEXT = st.text(max_size=30) | st.sampled_from(["It hurts", "worried", "retract this", "chest", "", " ", "\x00", "🤕"])
ODD: Any = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats(allow_nan=False) | TEXT | st.lists(TEXT, max_size=2)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", "root"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT | ODD}), max_size=4)
PLAUSIBLE = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(min_size=1, max_size=20)}), min_size=1)


def ended(reply: httpx.Response, last: tuple[str, ...]) -> bool:
    """A stream that ends as it should, or an error in JSON."""
    assert reply.status_code < 500
    if reply.headers["content-type"].startswith("text/event-stream"):
        blocks = [block for block in reply.text.split("\n\n") if block.strip()]
        return blocks[-1].startswith(last)
    return bool(json.loads(reply.content)["error"]["message"]) if reply.status_code >= 400 else True


def test_the_services_streams(serve: Serve) -> None:
    client = serve(rate_per_minute=10**6)

    @fuzz
    @given(body=st.fixed_dictionaries({"message": TEXT | ODD}, optional={"session_id": TEXT | ODD}), accept=st.booleans())
    def chat(body: dict[str, Any], accept: bool) -> None:
        accepted = "text/event-stream" if accept else "text/event-stream, */*;q=0.1"
        reply = client.post("/chat", json=body, headers={"Accept": accepted})
        assert ended(reply, ("event: done", "event: error")), body

    @fuzz
    @given(
        body=st.fixed_dictionaries(
            {"messages": MESSAGES | PLAUSIBLE | ODD, "stream": st.just(True)}, optional={"stream_options": ODD}
        )
    )
    def completions(body: dict[str, Any]) -> None:
        assert ended(client.post("/v1/chat/completions", json=body), ("data: [DONE]",)), body

    chat()
    completions()


@pytest.mark.timeout(200)
def test_the_inference_servers_streams(counting: Any, base_tokenizer: Any) -> None:  # noqa: F811
    sampled = {
        "max_tokens": st.integers(-1, 20) | ODD, "temperature": ODD, "top_p": ODD, "n": st.integers(0, 3) | ODD, "stop": ODD,
        "seed": ODD, "stream_options": st.none() | st.just({"include_usage": True}) | ODD, "logprobs": ODD,
        "structured_outputs": st.none() | st.fixed_dictionaries({"regex": TEXT}) | st.fixed_dictionaries({"choice": ODD}) | ODD,
    }  # fmt: skip
    with running(counting(), base_tokenizer) as address, httpx.Client(base_url=address, timeout=60) as client:

        @fuzz
        @given(
            body=st.fixed_dictionaries({"messages": PLAUSIBLE | MESSAGES | ODD, "stream": st.just(True)}, optional=sampled),
            model=st.sampled_from(["counting", "counting", "none", "../x"]),
        )
        def chat(body: dict[str, Any], model: str) -> None:
            assert ended(client.post("/v1/chat/completions", json={"model": model, **body}), ("data: [DONE]",)), body

        @fuzz
        @given(
            body=st.fixed_dictionaries(
                {"prompt": TEXT | ODD | st.lists(st.integers(-1, 9000)), "stream": st.just(True)}, optional=sampled
            )
        )
        def complete(body: dict[str, Any]) -> None:
            assert ended(client.post("/v1/completions", json={"model": "counting", **body}), ("data: [DONE]",)), body

        chat()
        complete()
        assert client.get("/ready").status_code == 200
