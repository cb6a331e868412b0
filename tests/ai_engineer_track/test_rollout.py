"""Promotion, rollback, canary and shadow while people are talking: nobody is dropped, and nobody meets a bad version."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from small_versions import SERVER, EchoRoles, publish

from ai_engineer_track import rollout
from ai_engineer_track.assistant import Assistant
from ai_engineer_track.inference import Server, Servers
from ai_engineer_track.llm import Llm
from ai_engineer_track.rollout import SHADOWS_WAITING, Arm, Shadows, Watcher, in_share
from ai_engineer_track.settings import AiSettings, load_ai_settings
from ai_engineer_track.turn import Turn
from shared import handoff
from shared.errors import UserError
from shared.rollout import Rollout, clear_rollout, write_rollout


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AiSettings:
    """Versions m-1 (current), m-2, m-slow and m-bad are published, and served by the stand-in."""
    package = tmp_path / "here" / "ml_engineer_track"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SERVER, encoding="utf-8")
    monkeypatch.chdir(package.parent)  # `python -m` looks here first
    monkeypatch.setattr(rollout, "POLL_SECONDS", 0.05)
    loaded = load_ai_settings("smoke", artifacts=tmp_path / "artifacts")
    for version in ("m-bad", "m-slow", "m-2", "m-1"):
        publish(loaded.artifacts / "models", version)
    return loaded.model_copy(update={"llm": loaded.llm.model_copy(update={"timeout_s": 20.0, "retries": 0})})


@asynccontextmanager
async def serving(settings: AiSettings) -> AsyncIterator[Any]:
    """An assistant that follows the files, as `open_assistant` puts it together, with roles that echo."""
    saver = InMemorySaver()

    def make(server: Server) -> Arm:
        llm = Llm(server.serves(settings).llm)
        roles: Any = EchoRoles(llm, llm)
        roles.index = SimpleNamespace(version="i-1")
        return Arm(roles, saver, server)

    with Servers(settings) as servers:
        assistant = Assistant(make(await asyncio.to_thread(servers.current)))
        await assistant.problem()
        watcher = Watcher(assistant, servers, make)
        work = [asyncio.create_task(watcher.run()), asyncio.create_task(assistant.shadows.run())]
        try:
            yield SimpleNamespace(assistant=assistant, servers=servers, models=servers.models, watcher=watcher)
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            await assistant.current.close()


async def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.02)


async def talk_while(assistant: Assistant, happening: Any, people: int = 6) -> list[Turn]:
    """People who ask without a pause, each in a session of their own, until `happening` has happened."""
    task, turns = asyncio.ensure_future(happening), list[Turn]()

    async def person(name: str) -> None:
        n = 0
        while not task.done() or n < 2:
            turns.append(await assistant.run_turn(name, f"{name} {n}"))
            assert turns[-1].kind == "unavailable" or turns[-1].text.endswith(f"says: {name} {n}")
            n += 1

    await asyncio.gather(*(person(f"p{n}") for n in range(people)), task)
    return turns


def test_promotion_and_rollback_under_load_drop_nobody(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:

            async def there_and_back() -> None:
                first = one.assistant.current.server
                await asyncio.sleep(0.2)
                handoff.set_current(one.models, "m-2")
                await until(lambda: one.assistant.current.version == "m-2")
                await until(lambda: not first.alive)
                second = one.assistant.current.server
                await asyncio.sleep(0.3)
                handoff.set_current(one.models, "m-1")
                await until(lambda: one.assistant.current.version == "m-1")
                await until(lambda: not second.alive)

            turns = await talk_while(one.assistant, there_and_back())
            assert Counter(turn.kind for turn in turns) == {"answer": len(turns)}
            assert {turn.model_version for turn in turns} == {"m-1:q4_0", "m-2:q4_0"}
            assert all(turn.text.startswith(turn.model_version.split(":")[0]) for turn in turns)
            assert all(turn.arm == "current" for turn in turns)
            assert one.assistant.model_version == "m-1:q4_0"

    asyncio.run(story())


def test_a_canary_answers_its_share_of_the_sessions_and_then_becomes_current_without_a_new_start(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            trial = Rollout(candidate="m-2", mode="canary", share=0.5)
            write_rollout(one.models, trial)
            await until(lambda: one.assistant.candidate is not None)
            assert one.assistant.candidate.roles.judge_llm is one.assistant.current.judge_llm  # one judge for both
            assert not one.assistant.current.roles.caching
            sessions = [f"s-{n}" for n in range(12)]
            for _ in range(2):  # the same session meets the same version again
                turns = await asyncio.gather(*(one.assistant.run_turn(s, "hello") for s in sessions))
                for session, turn in zip(sessions, turns, strict=True):
                    chosen = in_share(session, trial)
                    assert (turn.arm, turn.model_version) == (("candidate", "m-2:q4_0") if chosen else ("current", "m-1:q4_0"))
            server = one.assistant.candidate.server

            async def promote() -> None:
                handoff.set_current(one.models, "m-2")
                clear_rollout(one.models)
                await until(lambda: one.assistant.current.version == "m-2" and one.assistant.candidate is None)

            turns = await talk_while(one.assistant, promote())
            assert {turn.kind for turn in turns} == {"answer"}
            assert one.assistant.current.server is server
            assert one.assistant.current.roles.caching
            assert one.assistant.current.roles.judge_llm is one.assistant.current.llm
            assert Path("started").read_text().split() == ["m-1", "m-2"]

    asyncio.run(story())


@pytest.mark.parametrize("damage", ["parity", "checksum", "missing"])
def test_a_candidate_that_cannot_be_served_is_never_met_and_is_told_of_once(
    settings: AiSettings, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            version = {"parity": "m-bad", "checksum": "m-2", "missing": "m-3"}[damage]
            if damage == "checksum":
                (one.models / "m-2" / "q4_0" / "config.json").write_text("[]")
            write_rollout(one.models, Rollout(candidate=version, mode="canary", share=1.0))
            turns = await talk_while(one.assistant, until(lambda: bool(caplog.records)))
            await asyncio.sleep(0.5)
            turns.append(await one.assistant.run_turn("late", "hello"))
            assert {(turn.kind, turn.model_version) for turn in turns} == {("answer", "m-1:q4_0")}
            said = [record.getMessage() for record in caplog.records]
            assert len(said) == 1
            assert said[0].startswith(f"version {version} does not answer anybody: ")
            assert {"parity": "golden prompt", "checksum": "config.json", "missing": "there is no version"}[damage] in said[0]

    asyncio.run(story())


def test_a_promotion_to_a_version_that_cannot_be_served_keeps_the_old_one(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            handoff.set_current(one.models, "m-bad")
            await until(lambda: "m-bad" in one.watcher._refused)
            assert (await one.assistant.run_turn("s", "hello")).model_version == "m-1:q4_0"
            handoff.set_current(one.models, "m-2")  # and the next promotion is not held up by it
            await until(lambda: one.assistant.current.version == "m-2")
            assert (await one.assistant.run_turn("s", "hello")).model_version == "m-2:q4_0"

    asyncio.run(story())


def test_a_candidate_that_dies_costs_nobody_an_answer(settings: AiSettings, caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            write_rollout(one.models, Rollout(candidate="m-2", mode="canary", share=1.0))
            await until(lambda: one.assistant.candidate is not None)
            asked = await one.assistant.run_turn("s", "vague")
            assert (asked.kind, asked.arm) == ("clarify", "candidate")

            async def kill() -> None:
                await asyncio.sleep(0.15)
                os.kill(one.assistant.candidate.server.process.pid, signal.SIGKILL)
                await until(lambda: one.assistant.candidate is None)

            turns = await talk_while(one.assistant, kill())
            assert {turn.kind for turn in turns} == {"answer"}
            assert turns[-1].arm == "current"
            reply = await one.assistant.run_turn("s", "there")  # the question back is still open, for the other version
            assert reply.text == "m-1 says: vague there"
            await asyncio.sleep(0.3)
            assert Path("started").read_text().split() == ["m-1", "m-2"]  # it is not tried again

    asyncio.run(story())


def test_a_reply_to_a_question_back_is_gone_through_again_by_the_current_version(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            write_rollout(one.models, Rollout(candidate="m-2", mode="canary", share=1.0))
            await until(lambda: one.assistant.candidate is not None)
            await one.assistant.run_turn("s", "vague")
            candidate = one.assistant.candidate
            events: list[Any] = []

            async def refuse(*_: Any, **__: Any) -> Any:
                raise rollout_unavailable()

            candidate.roles.router.small.chat = refuse  # alive, and yet it does not answer
            told: list[Turn] = []
            turn = await one.assistant.run_turn("s", "there", events.append, lambda turn, _: told.append(turn))
            assert (turn.text, turn.arm) == ("m-1 says: vague there", "current")
            assert [(t.kind, t.arm, t.model_version) for t in told] == [("unavailable", "candidate", "m-2:q4_0")]  # it counts
            assert any(event.type == "text" and event.data == {"delta": "", "replace": True} for event in events)

    def rollout_unavailable() -> Exception:
        from ai_engineer_track.llm import LlmUnavailable

        return LlmUnavailable("out of memory")

    asyncio.run(story())


def test_a_shadow_is_only_recorded(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            write_rollout(one.models, Rollout(candidate="m-2", mode="shadow", share=1.0))
            await until(lambda: one.assistant.candidate is not None)
            told: list[tuple[Turn, float]] = []
            first = await one.assistant.run_turn("s", "vague", on_other=lambda turn, seconds: told.append((turn, seconds)))
            second = await one.assistant.run_turn("s", "there", on_other=lambda turn, seconds: told.append((turn, seconds)))
            assert (first.kind, first.arm, second.text) == ("clarify", "current", "m-1 says: vague there")
            await until(lambda: len(told) == 2)
            assert [turn.kind for turn, _ in told] == ["clarify", "answer"]
            assert told[1][0].text == "m-2 says: vague there"
            assert {turn.model_version for turn, _ in told} == {"m-2:q4_0"}
            assert 0.1 < told[1][1] < 20

    asyncio.run(story())


def test_shadows_wait_for_quiet_and_the_oldest_are_forgotten() -> None:
    async def story() -> None:
        busy, seen = True, list[int]()
        shadows = Shadows(lambda: not busy)

        def work(n: int) -> Callable[[], Any]:
            async def do() -> None:
                seen.append(n)
                if n == SHADOWS_WAITING:
                    raise RuntimeError("a shadow's fault")

            return do

        for n in range(SHADOWS_WAITING + 5):
            shadows.offer(work(n))
        running = asyncio.create_task(shadows.run())
        await asyncio.sleep(0.2)
        assert seen == []
        busy = False
        await until(lambda: len(seen) == SHADOWS_WAITING)
        assert seen == list(range(5, SHADOWS_WAITING + 5))
        running.cancel()

    asyncio.run(story())


def test_a_rollback_does_not_wait_for_a_candidate_that_is_starting(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            handoff.set_current(one.models, "m-2")
            await until(lambda: one.assistant.current.version == "m-2")
            write_rollout(one.models, Rollout(candidate="m-slow", mode="canary", share=1.0))
            await until(lambda: "m-slow" in one.watcher._starting)
            handoff.set_current(one.models, "m-1")
            await until(lambda: one.assistant.current.version == "m-1")
            clear_rollout(one.models)
            await until(lambda: set(one.watcher.arms) == {"m-1"} and not one.watcher._starting)

    asyncio.run(story())


def test_a_current_version_whose_server_died_is_started_again(settings: AiSettings) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            first = one.assistant.current.server
            os.kill(first.process.pid, signal.SIGKILL)
            await until(lambda: one.assistant.current.server is not first)
            assert (await one.assistant.run_turn("s", "hello")).text == "m-1 says: hello"

    asyncio.run(story())


@pytest.mark.parametrize("text", ["{", '{"schema_version": 2}'])
def test_a_damaged_rollout_is_none_and_is_told_of_once(settings: AiSettings, caplog: pytest.LogCaptureFixture, text: str) -> None:
    async def story() -> None:
        async with serving(settings) as one:
            (one.models / "rollout.json").write_text(text)
            await until(lambda: bool(caplog.records))
            await asyncio.sleep(0.3)
            assert (await one.assistant.run_turn("s", "hello")).model_version == "m-1:q4_0"
            told = [record.getMessage() for record in caplog.records if record.name.startswith("ai_engineer_track")]
            assert len(told) == 1
            assert "rollout.json" in told[0]

    asyncio.run(story())


def test_nothing_runs_on_when_the_service_ends_while_a_server_starts(settings: AiSettings) -> None:
    async def story() -> list[Any]:
        async with serving(settings) as one:
            write_rollout(one.models, Rollout(candidate="m-slow", mode="canary", share=1.0))
            await until(lambda: Path("started").read_text().split() == ["m-1", "m-slow"])
            return [one.assistant.current.server, one.servers]

    began = time.monotonic()
    server, servers = asyncio.run(story())
    assert time.monotonic() - began < 60
    assert not server.alive
    assert servers._running == []


def test_a_version_that_is_not_there_is_a_users_mistake(settings: AiSettings) -> None:
    with Servers(settings) as servers, pytest.raises(UserError, match=r"there is no version 'm-9'"):
        servers.start("m-9")


def test_a_larger_share_keeps_the_sessions_of_a_smaller_one_and_is_about_right() -> None:
    sessions = [f"s-{n}" for n in range(4000)]
    chosen = {
        share: {s for s in sessions if in_share(s, Rollout(candidate="m-2", mode="canary", share=share))}
        for share in (0.1, 0.5, 1.0)
    }
    assert chosen[0.1] < chosen[0.5] < chosen[1.0] == set(sessions)
    assert 0.08 < len(chosen[0.1]) / 4000 < 0.12
    other = {s for s in sessions if in_share(s, Rollout(candidate="m-3", mode="canary", share=0.1))}
    assert other != chosen[0.1]  # not always the same people
