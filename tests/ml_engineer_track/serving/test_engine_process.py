"""An engine in another process: the same promises as in this one, and what a crash of that process costs."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track.serving.engine import Engine, Generation, Stream, Token
from ml_engineer_track.serving.engine_process import EngineProcess
from shared.errors import UserError

sys.path.append(str(Path(__file__).parent))
Scripted: Any = importlib.import_module("scripted_engine").Scripted
Restless: Any = importlib.import_module("scripted_engine").Restless


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    made = EngineProcess(Scripted)
    made.start()
    yield made
    made.close()
    assert not made.alive()


async def read(stream: Stream) -> list[Token]:
    return [token async for tokens in stream for token in tokens]


async def ask(engine: Engine, first: int, max_tokens: int = 5) -> tuple[list[int], str | None, str | None]:
    stream = engine.submit(Generation([first], max_tokens))
    return [token.id for token in await read(stream)], stream.finish, stream.error


def test_tokens_come_with_all_they_carry(engine: EngineProcess) -> None:
    async def run() -> list[Token]:
        return await read(engine.submit(Generation([5], 3)))

    assert asyncio.run(run()) == [Token(n, -0.5, ((7, -1.0),)) for n in (100, 101, 102)]


def test_many_at_once_all_get_theirs(engine: EngineProcess) -> None:
    async def run() -> list[tuple[list[int], str | None, str | None]]:
        return await asyncio.gather(*(ask(engine, 5, 1 + n % 7) for n in range(40)))

    for n, (ids, finish, _) in enumerate(asyncio.run(run())):
        assert (ids, finish) == (list(range(100, 101 + n % 7)), "length")
    assert engine.stats().running == engine.stats().waiting == engine.stats().reserved_tokens == 0


def test_a_cancelled_request_leaves_the_batch_there_too(engine: EngineProcess) -> None:
    async def run() -> None:
        stream = engine.submit(Generation([5], 900))
        other = asyncio.create_task(ask(engine, 5, 30))
        await anext(aiter(stream))
        stream.cancel()
        assert len(await read(stream)) < 100
        assert stream.finish == "cancelled"
        assert (await other)[0] == list(range(100, 130))

    asyncio.run(run())
    assert engine.jobs == {}


def test_what_cannot_begin_fails_alone(engine: EngineProcess) -> None:
    async def run() -> None:
        refused, fine = await asyncio.gather(ask(engine, Scripted.REFUSE), ask(engine, 5))
        assert refused == ([], "failed", "the engine failed: a prompt like that")
        assert fine[1] == "length"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("first", "why"),
    [(Scripted.FAIL, "the engine failed: the matrix fell over"), (Scripted.CRASH, "its process ended (exit status -9)")],
)
def test_a_failed_or_crashed_batch_fails_alone_and_the_next_is_served(
    engine: EngineProcess, first: int, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = engine.stats().failures

    async def run() -> None:
        gone, with_it = await asyncio.gather(ask(engine, first, 50), ask(engine, 5, 500))
        assert gone[1] == with_it[1] == "failed"
        assert why in str(with_it[2])
        assert await ask(engine, 5) == (list(range(100, 105)), "length", None)

    asyncio.run(run())
    assert engine.stats().failures == failures + 1
    assert engine.stats().reserved_tokens == 0


def test_a_process_that_died_while_nothing_ran_is_replaced(engine: EngineProcess) -> None:
    assert engine.process is not None
    engine.process.kill()
    engine.process.join()
    assert asyncio.run(ask(engine, 5))[1] == "length"


def test_what_cannot_be_loaded_is_said_here_and_leaves_no_process() -> None:
    engine = EngineProcess(partial(Scripted, loads=False))
    with pytest.raises(UserError, match=r"no such file in here\. Bring one"):
        engine.start()
    engine.close()
    assert not engine.alive()


def test_the_process_outlives_the_signals_of_the_server_but_not_the_server(engine: EngineProcess) -> None:
    assert engine.process is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.process.pid or 0, number)
    assert asyncio.run(ask(engine, 5))[1] == "length"
    engine.pipe.close()  # what the system does when the server is gone
    engine.process.join(20)
    assert not engine.alive()


def test_a_rest_that_fails_costs_at_most_the_next_request(capfd: pytest.CaptureFixture[str]) -> None:
    made = EngineProcess(Restless)
    made.start()
    try:
        replies = []
        for _ in range(4):
            replies.append(asyncio.run(ask(made, 5, 2)))
            time.sleep(0.5)  # long enough to rest
        assert [finish for _, finish, _ in replies].count("length") >= 3
        assert replies[-1] == ([100, 101], "length", None)
    finally:
        made.close()
    assert "no rest" in capfd.readouterr().err
