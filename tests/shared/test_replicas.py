"""The journal of a replica says what was lost with it, and mistakes are told before anything is started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from shared import replicas
from shared.errors import UserError
from shared.replicas import REPLICA_HEADER, REQUEST_ID, Journal, plan, read_journals


@pytest.fixture
def journaled(tmp_path: Path) -> TestClient:
    app = FastAPI()

    @app.get("/hello")
    async def hello() -> str:
        return "hello"

    @app.get("/bug")
    async def bug() -> str:
        raise RuntimeError("a bug")

    return TestClient(Journal(app, tmp_path / "one.jsonl", "one", "m-1"), raise_server_exceptions=False)


def test_a_request_is_written_down_when_it_begins_and_when_it_ends(journaled: TestClient, tmp_path: Path) -> None:
    answer = journaled.get("/hello", headers={REQUEST_ID: "request-1"})
    assert answer.headers[REPLICA_HEADER] == "one"
    head, begun, ended = map(json.loads, (tmp_path / "one.jsonl").read_text(encoding="utf-8").splitlines())
    assert (head["replica"], head["version"]) == ("one", "m-1")
    assert (begun["begun"], begun["path"]) == ("request-1", "/hello")
    assert (ended["ended"], ended["status"]) == ("request-1", 200)


def test_a_request_that_raises_has_ended_too(journaled: TestClient, tmp_path: Path) -> None:
    journaled.get("/bug")
    (journal,) = read_journals(tmp_path)
    assert (journal.begun, journal.unfinished) == (1, frozenset())


@pytest.mark.parametrize("name", ["short", "x" * 65, "a b c d e f g", "naïve-request"])
def test_a_name_that_does_not_fit_gets_another_one(journaled: TestClient, tmp_path: Path, name: str) -> None:
    journaled.get("/hello", headers={REQUEST_ID: name.encode()})
    assert name not in (tmp_path / "one.jsonl").read_text(encoding="utf-8")
    assert read_journals(tmp_path)[0].begun == 1


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


async def _nothing() -> Message:
    return {"type": "http.request"}


def _begin(journal: Journal, name: str) -> asyncio.Task[None]:
    async def send(_: Message) -> None: ...

    scope = {"type": "http", "path": "/slow", "headers": [(REQUEST_ID.lower().encode(), name.encode())]}
    return asyncio.ensure_future(journal(scope, _nothing, send))


def test_what_was_begun_and_never_ended_is_what_was_lost(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Journal(_never, tmp_path / "r.jsonl", "r", "m-1")
        tasks = [_begin(journal, name) for name in ("request-1", "request-2")]
        await asyncio.sleep(0.01)
        assert read_journals(tmp_path)[0].unfinished == {"request-1", "request-2"}
        with (tmp_path / "r.jsonl").open("a", encoding="utf-8") as stream:
            stream.write('{"begun": "requ')  # killed while it wrote
        assert read_journals(tmp_path)[0].unfinished == {"request-1", "request-2"}
        for task in tasks:
            task.cancel()

    asyncio.run(story())


def test_a_large_journal_begins_anew_with_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "JOURNAL_BYTES", 300)

    async def story() -> None:
        journal = Journal(_never, tmp_path / "r.jsonl", "r", "m-1")
        tasks = [_begin(journal, f"request-{n}") for n in range(20)]
        await asyncio.sleep(0.01)
        assert (tmp_path / "r.jsonl").stat().st_size < 20 * 100
        assert read_journals(tmp_path)[0].unfinished == {f"request-{n}" for n in range(20)}
        for task in tasks:
            task.cancel()

    asyncio.run(story())


def test_a_rolling_update_has_a_place_for_one_more() -> None:
    assert plan("127.0.0.1", 8001, 2, None, 64, 512).places == 3
    assert plan("127.0.0.1", 8001, 2, 8, 64, 512).places == 10
    assert plan("127.0.0.1", 8001, 1, None, 64, 512, gpus=1).gpus == 0.5


def test_fewer_at_most_than_at_least_is_told() -> None:
    with pytest.raises(UserError, match=r"at most 1 replicas, but at least 2 in --max-replicas"):
        plan("127.0.0.1", 8001, 2, 1, 64, 512)
