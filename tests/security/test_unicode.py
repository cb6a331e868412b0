"""The edges of Unicode, through the routes and through the agent: an answer or a sentence that says why not, never a fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ai_engineer_track import intake
from ai_engineer_track.red_flags import floor
from ai_engineer_track.turn import KINDS

EDGES = {
    "nothing but accents": "\u0301" * 500,
    "a flood of accents": "".join(c + "\u0336\u0322\u031b" * 20 for c in "What helps against a cold?"),
    "right to left": "\u202eWhat helps\u202c \u2067against\u2069 a cold?",
    "decomposed": "Cafe\u0301 au lait and migraine: what helps?",
    "family": "👨‍👩‍👧‍👦 has a cold 🤧🏽‍♀️, what helps?",
    "flags and tags": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f cold, what helps?",
    "half a surrogate": "What helps \ud800 against a cold?",
    "surrogates the wrong way round": "\udc00\ud800 cold",
    "no characters": "\ufffe\uffff\U0010ffff cold, what helps?",
    "line ends": "What\u2028helps\u2029against\u0085a\x0bcold\x0c?",
    "nul": "What helps\u0000 against a cold?",
    "wide": "Ｗｈａｔ　ｈｅｌｐｓ against a cold?",
    "ligatures and circles": "ﬁrst aid ⓕⓞⓡ a burn?",
    "case that grows": "İSTANBUL ß ŉ ǰ fever: what helps?",
    "numbers": "٣ ੩ Ⅷ ½ ² days of cough, what helps?",
    "byte order mark": "\ufeffWhat helps against a cold?",
    "private": "\ue000\uf8ff what helps against a cold?",
}


@pytest.mark.parametrize("name", EDGES)
def test_every_route_answers(client: TestClient, name: str) -> None:
    text = EDGES[name]
    raw = {"Content-Type": "application/json"}
    for path, body in (
        ("/chat", {"message": text}),
        ("/chat", {"message": "hello", "session_id": text[:20]}),
        ("/feedback", {"answer_id": text[:20], "kind": "thumbs_up", "reason": text[:100]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        (
            "/v1/chat/completions",
            {"model": text[:20], "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        ),
    ):
        for accept in ("application/json", "text/event-stream"):
            reply = client.post(path, content=json.dumps(body), headers={**raw, "Accept": accept})
            assert reply.status_code < 500, (path, body)
            if reply.headers["content-type"].startswith("application/json"):
                json.loads(reply.content.decode("utf-8"))
    printable = text.encode("utf-8", "replace").decode()
    assert client.get("/search", params={"q": printable}).status_code in (200, 422)
    assert client.get("/leaflets/x", params={"slug": printable}).status_code == 404


def test_bytes_that_are_no_text_are_refused(client: TestClient) -> None:
    for body in (b'{"message": "\xff\xfe"}', b"\xff", b'{"message": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", "{}".encode("utf-16")):
        reply = client.post("/chat", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code in (400, 422), body
        assert reply.json()["error"]["message"]
    assert client.get("/search?q=%ff%fe").status_code in (200, 422)
    assert client.get("/leaflets/%ed%a0%80").status_code == 404
    assert client.get("/sessions/%00%ff").status_code == 404


@pytest.mark.parametrize("name", EDGES)
def test_the_agent_answers(talk: Callable[..., Any], name: str) -> None:
    text = EDGES[name].encode("utf-8", "replace").decode()  # half a character never comes past the routes
    (said,) = talk([text])
    assert said.turn.kind in KINDS
    said.turn.model_dump_json().encode()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.text(max_size=60) | st.text(alphabet="a\u0301\u200b\u202e<>&; \U000e0061е\ufeff", max_size=60))
def test_the_intake_makes_one_plain_line_of_anything(message: str) -> None:
    taken = intake.take(message, 8000)
    assert taken.text == " ".join(taken.text.split())
    assert taken.problem or taken.text
    assert not any(c in taken.text for c in "\u200b\u202e\ufeff\U000e0061\n")


@pytest.mark.parametrize(
    "disguise",
    [
        lambda s: "\u200b".join(s),
        lambda s: s.replace("e", "e\u00ad"),
        lambda s: "".join(c + "\u0335" for c in s),
        lambda s: s.translate(str.maketrans("aeops", "аеорѕ")),
        lambda s: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in s),
        lambda s: "".join(chr(0x1D41A + ord(c) - 97) if c.islower() else c for c in s),
        lambda s: s.replace(" ", "\u2003"),
        lambda s: f"<b>{s}</b><!-- x -->",
        lambda s: s.upper(),
    ],
    ids=[
        "zero width",
        "soft hyphens",
        "struck out",
        "Cyrillic",
        "full width",
        "bold letters",
        "wide spaces",
        "markup",
        "capitals",
    ],
)
def test_an_emergency_is_read_by_what_a_person_sees(disguise: Callable[[str], str]) -> None:
    message = disguise("my chest is being crushed and my left arm is numb")
    assert floor(intake.take(message, 8000).text) == "chest pressure with arm, sweat, breath or collapse"
