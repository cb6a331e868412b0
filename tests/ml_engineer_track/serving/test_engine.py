"""Admission, cancelling and failing: what every engine inherits, on one that only counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from ml_engineer_track.serving.engine import Busy, DoesNotFit, Generation, Stream
from tests.ml_engineer_track.serving.conftest import CountingEngine, generated

Make = Callable[..., CountingEngine]


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def all_of(stream: Stream) -> list[int]:
    return [token.id async for tokens in stream for token in tokens]


def test_tokens_come_in_order_and_end(counting: Make) -> None:
    tokens, finish = generated(counting(), Generation([1], max_tokens=5))
    assert [token.id for token in tokens] == [100, 101, 102, 103, 104]
    assert finish == "length"


def test_many_at_once_all_get_theirs(counting: Make) -> None:
    engine = counting(max_running=8, max_waiting=100)

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(all_of(engine.submit(Generation([1], 1 + n % 7))) for n in range(60)))

    for n, ids in enumerate(asyncio.run(run())):
        assert ids == list(range(100, 101 + n % 7))
    assert engine.stats().running == engine.stats().waiting == engine.stats().reserved_tokens == 0


def test_with_many_at_once_tokens_travel_together_but_first_ones_and_ends_do_not_wait(counting: Make) -> None:
    async def run(chats: int) -> list[list[tuple[float, int]]]:
        engine = counting(seconds=0.002, max_running=32, max_waiting=100)

        async def read(stream: Stream) -> list[tuple[float, int]]:
            start = time.perf_counter()
            return [(time.perf_counter() - start, len(tokens)) async for tokens in stream]

        return await asyncio.gather(*(read(engine.submit(Generation([1], 50))) for _ in range(chats)))

    few, many = asyncio.run(run(2)), asyncio.run(run(16))
    assert all(sum(n for _, n in events) == 50 for events in [*few, *many])
    assert all(len(events) > 25 for events in few)
    assert all(len(events) < 20 for events in many)
    assert all(events[0][0] < 0.05 and events[0][1] <= 2 for events in many)


def test_a_full_queue_is_said_at_once_with_when_to_come_back(counting: Make) -> None:
    engine = counting(seconds=0.02, max_running=1, max_waiting=2)

    async def run() -> None:
        streams = [engine.submit(Generation([1], 50))]
        await until(lambda: engine.stats().running == 1)
        streams += [engine.submit(Generation([1], 1)) for _ in range(2)]
        with pytest.raises(Busy) as refusal:
            engine.submit(Generation([1], 1))
        assert 1 <= refusal.value.retry_after <= 60
        for stream in streams:
            assert await all_of(stream)

    asyncio.run(run())


def test_what_can_never_fit_is_refused_with_the_counts(counting: Make) -> None:
    engine = counting(capacity=100)

    async def run() -> None:
        with pytest.raises(DoesNotFit, match=r"the prompt has 60 tokens and the reply may take 50.* holds 100"):
            engine.submit(Generation([1] * 60, 50))

    asyncio.run(run())


def test_no_more_run_than_their_reservations_allow(counting: Make) -> None:
    engine = counting(seconds=0.002, capacity=100, max_running=10, max_waiting=20)
    most = 0

    async def run() -> None:
        nonlocal most
        streams = [engine.submit(Generation([1] * 20, 20)) for _ in range(8)]  # two fit at a time
        waiting = [asyncio.create_task(all_of(stream)) for stream in streams]
        while not all(task.done() for task in waiting):
            most = max(most, engine.stats().reserved_tokens)
            await asyncio.sleep(0.001)
        assert all(len(task.result()) == 20 for task in waiting)

    asyncio.run(run())
    assert 0 < most <= 100


def test_a_cancelled_request_leaves_within_one_step(counting: Make) -> None:
    engine = counting(seconds=0.01)

    async def run() -> None:
        stream = engine.submit(Generation([1], 500))
        await anext(aiter(stream))
        stream.cancel()
        steps = engine.steps
        await until(lambda: engine.stats().running == 0)
        assert engine.steps <= steps + 2  # the one under way, and the one that may have begun since
        assert [job.stream for job in engine.stopped] == [stream]

    asyncio.run(run())


def test_a_request_cancelled_while_it_waits_never_runs(counting: Make) -> None:
    engine = counting(seconds=0.01, max_running=1)

    async def run() -> None:
        first, second, third = (engine.submit(Generation([1], 20)) for _ in range(3))
        second.cancel()
        assert await all_of(second) == []
        assert second.finish == "cancelled"
        assert len(await all_of(first)) == len(await all_of(third)) == 20
        assert engine.stopped == []

    asyncio.run(run())


def test_a_failed_batch_fails_alone(counting: Make, capsys: pytest.CaptureFixture[str]) -> None:
    engine = counting(seconds=0.005, max_running=2)
    engine.fail_at = lambda e: e.steps == 4

    async def run() -> None:
        streams = [engine.submit(Generation([1], 10)) for _ in range(4)]  # two in the failing batch, two waiting
        got = await asyncio.gather(*map(all_of, streams))
        assert [stream.finish for stream in streams] == ["failed", "failed", "length", "length"]
        assert [len(ids) for ids in got] == [3, 3, 10, 10]
        assert streams[0].error == "the engine failed: the matrix fell over"

    asyncio.run(run())
    assert engine.stats().failures == engine.recovered == 1
    assert engine.stats().reserved_tokens == 0
    assert "the matrix fell over" in capsys.readouterr().err
    assert len(generated(engine, Generation([1], 3))[0]) == 3


def test_closing_ends_what_runs_and_refuses_what_comes(counting: Make) -> None:
    engine = counting(seconds=0.01, max_running=1)

    async def run() -> None:
        streams = [engine.submit(Generation([1], 900)) for _ in range(2)]
        await anext(aiter(streams[0]))
        await asyncio.to_thread(engine.close)
        for stream in streams:
            await all_of(stream)
        assert [stream.finish for stream in streams] == ["cancelled", "cancelled"]
        with pytest.raises(Busy):
            engine.submit(Generation([1], 1))

    asyncio.run(run())
