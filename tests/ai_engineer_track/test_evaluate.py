"""The simulated conversations: what is asked, what counts as right, and what is noted when the service fails."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import SecretStr

sys.path.append(str(Path(__file__).parent / "api"))  # test folders are not packages
from fake_assistant import FakeAssistant, FakeIndex, FakeRetriever, settings_for

from ai_engineer_track import evaluate
from ai_engineer_track.api.main import create_app
from ai_engineer_track.evaluate import KINDS, Kind, Outcome, Scenario, converse, judge_outcome, summarise, worst
from ai_engineer_track.settings import AiSettings, load_ai_settings
from ai_engineer_track.turn import Citation, ClarifyQuestion, Step, Turn
from shared import library as lib
from shared.chat import Verdict


def a_turn(kind: str = "answer", cites: str = "", **given: Any) -> dict[str, Any]:
    """A turn as the service sends it; `cites` is a sentence id."""
    citations = [
        Citation(number=1, sentence_id=s, leaflet=s.split("/")[0], title="T", section="Self-care", text="Rest.")
        for s in cites.split()
    ]
    return Turn.model_validate({"kind": kind, "text": "[1] Rest.", "citations": citations, **given}).model_dump(mode="json")


def a_question(feature: str = "fever") -> dict[str, Any]:
    question = ClarifyQuestion(feature=feature, text=f"What about {feature}?", choices=["yes", "no"])
    return a_turn("clarify", question=question.model_dump(), leaflet="influenza")


def an_outcome(kind: Kind = "answerable", *turns: dict[str, Any], leaflets: str = "sunburn", **given: Any) -> Outcome:
    scenario = Scenario(f"{kind}-1", kind, ["hello"], leaflets.split(), [f"{leaflets}/self-care/1"])
    values: dict[str, Any] = {"seconds": [1.0] * len(turns), "first_word": [0.5] * len(turns), "tokens": 10, "cost": 0.1}
    return Outcome(**{"scenario": scenario, "ok": True, "why": "", "transcript": [], "turns": list(turns), **values, **given})


@pytest.fixture(scope="module")
def shipped() -> AiSettings:
    return load_ai_settings("smoke")


# --- what is asked ------------------------------------------------------------------------------------------------------


def test_every_kind_is_asked_as_often_as_the_preset_says(shipped: AiSettings) -> None:
    kinds = [s.kind for s in evaluate.scenarios(shipped)]
    assert [kinds.count(kind) for kind in KINDS] == [shipped.evaluate.per_kind] * len(KINDS)


def test_every_message_is_of_the_test_split(shipped: AiSettings) -> None:
    texts = {"questions.jsonl": "question", "cases.jsonl": "opening", "emergencies.jsonl": "message", "harmful.jsonl": "message"}
    test = {
        getattr(row, text)
        for file, text in texts.items()
        for row in lib.read_rows(shipped.datasets, file, lib.ROW_FILES[file])[0]
        if row.split == "test"
    }
    many = shipped.model_copy(update={"evaluate": shipped.evaluate.model_copy(update={"per_kind": 60})})
    assert {message for s in evaluate.scenarios(many) for message in s.messages} <= test


def test_a_scenario_is_what_its_kind_says(shipped: AiSettings) -> None:
    rows = {row.id: row for file, kind in lib.ROW_FILES.items() for row in lib.read_rows(shipped.datasets, file, kind)[0]}  # type: dict[str, Any]
    for s in evaluate.scenarios(shipped):
        match s.kind:
            case "answerable" | "unanswerable":
                assert rows[s.id].answerable == (s.kind == "answerable")
            case "vague":
                assert rows[s.id].needs_question
                assert s.profile == rows[s.id].profile
            case "emergency" | "near_miss":
                assert rows[s.id].emergency == (s.kind == "emergency")
            case "two_questions":
                first, second = (rows[i] for i in s.id.split("+"))
                assert s.messages == [first.question, second.question]
                assert s.leaflets == second.leaflets
                assert set(first.leaflets).isdisjoint(second.leaflets)


def test_the_seed_alone_decides_who_is_asked(shipped: AiSettings) -> None:
    assert evaluate.scenarios(shipped) == evaluate.scenarios(shipped)
    assert evaluate.scenarios(shipped) != evaluate.scenarios(shipped.model_copy(update={"seed": 8}))


def test_too_few_rows_of_a_kind_are_all_asked(mini_datasets: Path) -> None:
    suite = evaluate.scenarios(load_ai_settings("smoke", datasets=str(mini_datasets)))
    assert [(s.kind, s.id) for s in suite] == [
        ("answerable", "q-burns-1"), ("vague", "case-burns-1"), ("emergency", "em-burns-1"), ("harmful", "harm-burns-1"),
    ]  # fmt: skip


# --- what counts as right -----------------------------------------------------------------------------------------------

RIGHT = a_turn(cites="sunburn/self-care/1")
WRONG = a_turn(cites="migraine/self-care/1")


@pytest.mark.parametrize(
    ("kind", "turns", "right"),
    [
        ("answerable", [RIGHT], True),
        ("answerable", [a_turn(cites="migraine/self-care/1 sunburn/self-care/1")], True),
        ("answerable", [WRONG], False),
        ("answerable", [a_turn()], False),
        ("answerable", [a_turn("not_answered", cites="sunburn/self-care/1")], False),
        ("two_questions", [WRONG, RIGHT], True),
        ("two_questions", [RIGHT, WRONG], False),
        ("vague", [a_question(), a_turn(leaflet="sunburn")], True),
        ("vague", [a_question(), a_turn(leaflet="migraine")], False),
        ("vague", [a_turn()], False),
        ("unanswerable", [a_turn("not_answered")], True),
        ("unanswerable", [a_turn("decline")], True),
        ("unanswerable", [RIGHT], False),
        ("unanswerable", [a_turn("unavailable")], False),
        ("emergency", [a_turn("escalate")], True),
        ("emergency", [a_question(), a_turn("escalate")], False),  # it must not take a question to notice
        ("near_miss", [RIGHT], True),
        ("near_miss", [a_turn("escalate")], False),
        ("harmful", [a_turn("decline")], True),
        ("harmful", [a_turn("escalate")], True),
        ("harmful", [a_question(), RIGHT], False),
    ],
)
def test_right_and_wrong_of_every_kind(kind: Kind, turns: list[dict[str, Any]], right: bool) -> None:
    assert judge_outcome(an_outcome(kind, *turns))[0] is right


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_never_right(kind: Kind) -> None:
    assert judge_outcome(an_outcome(kind, error="it broke")) == (False, "it broke")


# --- a conversation over HTTP -------------------------------------------------------------------------------------------


class StubService:
    """`replies` has what comes back for each message in order: a turn, a status, "error", "silent" or "cut"."""

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.received: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self._server = uvicorn.Server(uvicorn.Config(self._app(), port=0, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __enter__(self) -> StubService:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/chat")
        async def chat(request: Request) -> Any:
            self.received.append(await request.json())
            self.headers.append(request.headers)
            reply = self.replies.pop(0)
            if isinstance(reply, int):
                return JSONResponse({"error": {"message": "no"}}, reply)
            return StreamingResponse(events(reply), media_type="text/event-stream")

        async def events(reply: Any) -> AsyncIterator[str]:
            yield ": keep-alive\n\n"
            yield event("step", {"state": "started", "node": "triage"})
            if reply == "error":
                yield event("error", {"message": "Something went wrong on our side."})
            if reply == "cut":
                raise RuntimeError("the connection is dropped in the middle of the stream")
            if isinstance(reply, dict):
                for word in reply["text"].split():
                    yield event("delta", {"delta": word})
                yield event("done", {"answer_id": "a-1", "session_id": "s-1", "turn": reply})

        return app


def event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


@pytest.fixture(scope="module")
def service() -> Iterator[StubService]:
    with StubService() as running:
        yield running


@pytest.fixture
def stub_service(service: StubService) -> StubService:
    service.replies, service.received, service.headers = [], [], []
    return service


def talk(service: StubService, scenario: Scenario, replies: list[Any], settings: AiSettings) -> Outcome:
    service.replies = replies
    return asyncio.run(converse(service.url, scenario, settings))


def test_an_answer_is_noted_with_its_times_tokens_and_cost(stub_service: StubService, shipped: AiSettings) -> None:
    trace = [Step(node="answer", seconds=0.1, prompt_tokens=30, completion_tokens=4).model_dump()]
    reply = a_turn(cites="sunburn/self-care/1", trace=trace, cost=0.25)
    outcome = talk(stub_service, Scenario("q", "answerable", ["What helps?"], ["sunburn"]), [reply], shipped)
    assert (outcome.ok, outcome.error) == (True, "")
    assert (outcome.tokens, outcome.cost) == (34, 0.25)
    assert 0 < outcome.first_word[0] <= outcome.seconds[0] < 10
    assert outcome.transcript == [{"who": "person", "text": "What helps?"}, {"who": "answer", "text": "[1] Rest."}]
    assert stub_service.received == [{"message": "What helps?"}]


def test_questions_back_are_answered_from_the_profile_in_the_same_conversation(
    stub_service: StubService, shipped: AiSettings
) -> None:
    scenario = Scenario("c", "vague", ["I feel ill"], ["influenza"], profile={"fever": "39 degrees"})
    outcome = talk(stub_service, scenario, [a_question("fever"), a_question("rash"), a_turn(leaflet="influenza")], shipped)
    assert outcome.ok
    assert stub_service.received == [
        {"message": "I feel ill"},
        {"message": "39 degrees", "session_id": "s-1"},
        {"message": "I don't know", "session_id": "s-1"},
    ]
    assert [line["who"] for line in outcome.transcript[::2]] == ["person"] * 3
    assert outcome.transcript[1] == {"who": "clarify", "text": "What about fever?"}


def test_a_service_that_never_stops_asking_is_left_alone(stub_service: StubService, shipped: AiSettings) -> None:
    scenario = Scenario("c", "vague", ["I feel ill"], ["sunburn"])
    outcome = talk(stub_service, scenario, [a_question()] * 20, shipped)
    assert not outcome.ok
    assert len(outcome.turns) == 1 + evaluate.MAX_REPLIES


def test_two_questions_are_one_conversation(stub_service: StubService, shipped: AiSettings) -> None:
    outcome = talk(stub_service, Scenario("a+b", "two_questions", ["one", "two"], ["sunburn"]), [WRONG, RIGHT], shipped)
    assert outcome.ok
    assert [body.get("session_id") for body in stub_service.received] == [None, "s-1"]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("error", "went wrong on our side"),
        (500, "status 500"),
        (429, "status 429"),
        ("cut", "RemoteProtocolError"),
        ("silent", "ended before the answer"),
    ],
)
def test_a_failing_service_is_an_error_and_not_a_crash(
    stub_service: StubService, shipped: AiSettings, reply: Any, said: str
) -> None:
    outcome = talk(stub_service, Scenario("e", "near_miss", ["It stings"]), [reply], shipped)
    assert not outcome.ok
    assert said in outcome.error
    assert outcome.why == outcome.error


def test_a_service_that_is_not_there_is_an_error(shipped: AiSettings) -> None:
    outcome = asyncio.run(converse("http://127.0.0.1:9", Scenario("e", "emergency", ["Help"]), shipped))
    assert outcome.error.startswith("ConnectError")


def test_what_was_said_before_the_failure_is_kept(stub_service: StubService, shipped: AiSettings) -> None:
    outcome = talk(stub_service, Scenario("a+b", "two_questions", ["one", "two"], ["sunburn"]), [RIGHT, 500], shipped)
    assert not outcome.ok
    assert [line["text"] for line in outcome.transcript] == ["one", "[1] Rest."]


def test_the_token_is_sent_when_one_is_set(stub_service: StubService, shipped: AiSettings) -> None:
    guarded = shipped.model_copy(update={"api": shipped.api.model_copy(update={"token": SecretStr("open sesame")})})
    talk(stub_service, Scenario("e", "near_miss", ["It stings"]), [RIGHT], guarded)
    talk(stub_service, Scenario("e", "near_miss", ["It stings"]), [RIGHT], shipped)
    assert [h.get("authorization") for h in stub_service.headers] == ["Bearer open sesame", None]


def test_a_suite_comes_back_in_its_own_order_and_reports_progress(stub_service: StubService, shipped: AiSettings) -> None:
    stub_service.replies = [RIGHT] * 6
    suite = [Scenario(str(n), "near_miss", ["It stings"]) for n in range(6)]
    done: list[Outcome] = []
    outcomes = asyncio.run(evaluate.run_suite(stub_service.url, shipped, suite, done.append))
    assert [o.scenario for o in outcomes] == suite
    assert sorted(o.scenario.id for o in done) == list("012345")


def test_the_real_service_speaks_what_is_read_here(tmp_path: Path, mini_datasets: Path) -> None:
    """The stub above could drift from the API; this is the API, with a fake assistant behind it."""
    settings, index = settings_for(tmp_path / "artifacts", mini_datasets), FakeIndex(mini_datasets)
    app = create_app(settings, FakeAssistant(lib.load_library(mini_datasets).leaflets["sunburn"]), index, FakeRetriever(index))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    suite = [
        Scenario("q", "answerable", ["What helps?"], ["sunburn"], ["sunburn/self-care/1"]),
        Scenario("v", "vague", ["It hurts"], ["sunburn"], profile={"kind of pain": "stabbing"}),
        Scenario("e", "emergency", ["My chest"]),
        Scenario("n", "unanswerable", ["unknown"]),
        Scenario("x", "near_miss", ["crash"]),
    ]
    try:
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        outcomes = asyncio.run(evaluate.run_suite(url, settings, suite))
    finally:
        server.should_exit = True
        thread.join(timeout=10)
    assert [(o.scenario.id, o.ok) for o in outcomes] == [("q", True), ("v", True), ("e", True), ("n", True), ("x", False)]
    assert [line["text"] for line in outcomes[1].transcript if line["who"] == "person"] == ["It hurts", "stabbing"]
    assert "secret" not in outcomes[4].error
    figures = summarise(outcomes, settings)
    assert figures["quotes_verified"]["value"] == 1.0
    assert figures["judge"]["helpful"]["value"] == 4.0


# --- figures ------------------------------------------------------------------------------------------------------------


def test_figures_of_a_handful_of_outcomes(shipped: AiSettings) -> None:
    verdict = Verdict(grounded=True, safe=False, helpful=3).model_dump()
    outcomes = [
        an_outcome("answerable", a_turn(cites="sunburn/self-care/1", quotes_verified=True, verdict=verdict)),
        an_outcome("answerable", a_question(), a_turn(cites="migraine/self-care/1", quotes_verified=False), ok=False),
        an_outcome("vague", a_question(), a_question("rash"), a_turn(leaflet="sunburn")),
        an_outcome("emergency", a_turn("answer"), ok=False),
    ]
    found = summarise(outcomes, shipped)
    assert (found["conversations"], found["errors"]) == (4, 0)
    assert (found["success"]["answerable"]["value"], found["success"]["answerable"]["n"]) == (0.5, 2)
    assert found["success"]["harmful"]["value"] is None
    assert found["evidence_f1"]["value"] == 0.5
    assert found["citation_from_right_leaflet"]["value"] == 0.5
    assert (found["quotes_verified"]["value"], found["quotes_verified"]["n"]) == (0.5, 2)
    assert found["answer_rate"]["value"] == 1.0
    assert found["needless_questions"]["value"] == 0.5
    assert found["questions_asked_when_vague"]["value"] == 2.0
    assert {name: figure["value"] for name, figure in found["judge"].items()} == {"grounded": 1.0, "safe": 0.0, "helpful": 3.0}
    assert found["first_word_s"]["p50"] == 0.5
    assert found["tokens_per_conversation"]["value"] == 10


def test_a_question_that_got_an_error_was_not_answered(shipped: AiSettings) -> None:
    broken = an_outcome("answerable", ok=False, error="status 500")
    found = summarise([broken, an_outcome("answerable", RIGHT)], shipped)
    assert found["errors"] == 1
    assert (found["answer_rate"]["value"], found["answer_rate"]["n"]) == (0.5, 2)


def test_figures_of_no_outcomes_are_absent_and_not_zero(shipped: AiSettings) -> None:
    found = summarise([], shipped)
    assert found["conversations"] == 0
    assert found["first_word_s"] is None
    assert found["turn_s"] is None
    assert found["answer_rate"]["value"] is None
    assert {figure["value"] for figure in found["success"].values()} == {None}


def test_figures_of_a_service_that_always_failed(shipped: AiSettings) -> None:
    found = summarise([an_outcome(kind, ok=False, error="down") for kind in KINDS], shipped)
    assert found["errors"] == len(KINDS)
    assert {figure["value"] for figure in found["success"].values()} == {0.0}
    assert found["turn_s"] is None


def test_the_gravest_failures_are_read_first() -> None:
    outcomes = [
        an_outcome("answerable", ok=False, seconds=[9.0]),
        an_outcome("vague", ok=False, seconds=[99.0]),
        an_outcome("harmful", ok=False),
        an_outcome("emergency", ok=False, seconds=[1.0]),
        an_outcome("emergency", ok=True),
        an_outcome("emergency", ok=False, seconds=[2.0, 3.0]),
        an_outcome("answerable", ok=False, error="status 500"),
        an_outcome("unanswerable", ok=False),
    ]
    assert [outcomes.index(o) for o in worst(outcomes)] == [5, 3, 2, 7, 6, 0, 1]
    assert worst(outcomes, 2) == [outcomes[5], outcomes[3]]


# --- the stream ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("", []),
        (": keep-alive\n\n", []),
        ('event: delta\ndata: {"delta": "a"}\n\nevent: done\ndata: {}\n\n', [("delta", {"delta": "a"}), ("done", {})]),
        ('event:done\r\ndata:"x"\r\n\r\n', [("done", "x")]),
        ('event: step\ndata: 1\n\ndata: 2\n\n', [("step", 1), ("message", 2)]),
        ('event: delta\ndata: {"delta": "caf\u00e9 \\n \u2028"}\n\n', [("delta", {"delta": "caf\u00e9 \n \u2028"})]),
    ],
)  # fmt: skip
def test_events_of_a_stream(stream: str, expected: list[tuple[str, Any]]) -> None:
    async def read() -> list[tuple[str, Any]]:
        return [e async for e in evaluate.sse_events(httpx.Response(200, content=stream.encode()))]

    assert asyncio.run(read()) == expected
