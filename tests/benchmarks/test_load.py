"""The load generator against a server whose delays are known, and its arithmetic against figures worked out by hand."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.load import Answer, Ask, Load, Target, arrivals, closed_loop, figures, keeps, open_loop, samples

#: A busy test machine can only be late; this much later than the truth is still accepted, in seconds.
SLACK = 0.25
ASKS = [Ask("one two three", 6)]


def ask_closed(stub: Any, concurrency: int, requests: int) -> Load:
    return asyncio.run(closed_loop(Target(stub.url, "stub", {"ignore_eos": True}), ASKS, concurrency, 0.0, requests))


# --- against known truth ---------------------------------------------------------------------------------------------


def test_ttft_tpot_and_e2el_are_the_servers_own_delays(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.4, each=0.05)
    (answer,) = ask_closed(stub, 1, 1).answers
    assert answer.ok
    # An empty role chunk comes first and must not count as the first token.
    assert 0.4 <= answer.ttft <= 0.4 + SLACK
    assert len(answer.itl) == 5
    assert 0.045 <= statistics.median(answer.itl) <= 0.05 + SLACK
    assert answer.tpot == pytest.approx((answer.e2el - answer.ttft) / 5)
    assert answer.e2el == pytest.approx(answer.ttft + sum(answer.itl))
    assert answer.e2el >= 0.4 + 5 * 0.05 - 0.01


def test_tokens_are_the_servers_count_and_throughput_follows(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.1, each=0.02)
    load = ask_closed(stub, 2, 4)
    found = figures([load], {"ttft": 60_000})
    assert found["completed"] == 4
    assert found["total_input_tokens"] == 4 * 6
    assert found["total_output_tokens"] == 4 * 6
    assert found["output_throughput"] == pytest.approx(24 / load.duration)
    # Two clients, two requests each: not less than two service times, and nowhere near four.
    assert 2 * 0.2 <= load.duration <= 2 * 0.2 + 4 * SLACK


def test_a_closed_loop_never_has_more_in_flight_than_its_clients(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.05, each=0.0)
    load = ask_closed(stub, 3, 9)
    assert stub.most == 3
    assert 9 <= len(load.answers) <= 11


def test_a_queue_in_the_server_shows_in_ttft(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.2, each=0.0, slots=1)
    waited = sorted(a.ttft for a in ask_closed(stub, 3, 3).answers)
    assert waited[0] >= 0.2
    assert waited[1] >= 0.4
    assert waited[2] >= 0.6


def test_an_open_loop_sends_on_time_whatever_the_server_does(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.5, each=0.0, slots=1)
    load = asyncio.run(open_loop(Target(stub.url, "stub", {"ignore_eos": True}), ASKS, rate=20, requests=8, seed=1))
    assert all(a.ok for a in load.answers)
    planned = arrivals(20, 8, 1)
    # All were sent long before the first of eight slow replies was over.
    assert stub.arrived[-1] - stub.arrived[0] <= planned[-1] + SLACK
    assert stub.most == 8
    assert load.duration >= 8 * 0.5


def test_refused_requests_are_counted_apart(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.3, each=0.0, slots=2, queue=False)
    target = Target(stub.url, "stub", {"ignore_eos": True})
    load = asyncio.run(open_loop(target, ASKS, rate=200, requests=6, seed=1))
    found = figures([load], {})
    assert found["rejected"] == 4
    assert found["completed"] == 2
    assert found["failed"] == 0
    assert {a.retry_after for a in load.answers if a.status == 429} == {"1"}


def test_a_stream_that_breaks_off_is_a_failure(make_stub: Callable[..., Any]) -> None:
    stub = make_stub(first=0.01, each=0.0, breaks_after=2)
    (answer,) = ask_closed(stub, 1, 1).answers
    assert not answer.ok
    assert "broke off" in answer.error
    assert figures([Load([answer], 1.0)], {})["failed"] == 1


def test_no_server_is_a_failure_and_not_an_exception() -> None:
    load = asyncio.run(closed_loop(Target("http://127.0.0.1:9", "none"), ASKS, 1, 0.0, 1))
    assert not load.answers[0].ok
    assert load.answers[0].error


# --- arithmetic ------------------------------------------------------------------------------------------------------


def made(ttft: float, gaps: list[float]) -> Answer:
    tokens = len(gaps) + 1
    return Answer(ok=True, status=200, ttft=ttft, itl=gaps, e2el=ttft + sum(gaps), prompt_tokens=10, output_tokens=tokens)


def test_figures_are_vllms_formulas() -> None:
    first = Load([made(0.1, [0.01, 0.03]), made(0.3, [0.02, 0.02])], 2.0)
    second = Load([made(0.2, [0.05]), Answer(status=500)], 3.0)
    found = figures([first, second], {"ttft": 250, "tpot": 25})
    assert found["request_throughput"] == pytest.approx(3 / 5)
    assert found["output_throughput"] == pytest.approx(8 / 5)
    assert found["total_token_throughput"] == pytest.approx((30 + 8) / 5)
    assert found["median_ttft_ms"] == pytest.approx(200)
    assert found["mean_itl_ms"] == pytest.approx(1e3 * (0.01 + 0.03 + 0.02 + 0.02 + 0.05) / 5)
    assert found["median_tpot_ms"] == pytest.approx(20)
    assert found["failed"] == 1
    # Only the first request keeps both bounds: the second waits too long, the third writes too slowly.
    assert found["request_goodput"] == pytest.approx(1 / 5)


def test_percentiles_are_over_all_requests_and_not_means_over_rounds() -> None:
    slow = Load([made(1.0, [0.1])], 1.0)
    fast = Load([made(0.1, [0.1]) for _ in range(99)], 1.0)
    assert figures([slow, fast], {})["median_ttft_ms"] == pytest.approx(100)
    assert samples([slow, fast])["output_throughput"] == pytest.approx([2, 198])


def test_a_round_without_answers_has_null_times() -> None:
    found = figures([Load([Answer(status=500)], 1.0)], {})
    assert found["median_ttft_ms"] is None
    assert found["output_throughput"] == 0


@pytest.mark.parametrize(
    ("slo", "kept"),
    [({"ttft": 100}, True), ({"ttft": 99}, False), ({"tpot": 20.1}, True), ({"itl": 29}, False), ({"e2el": 140.1}, True)],
)
def test_an_slo_is_kept_only_when_every_bound_is(slo: dict[str, float], kept: bool) -> None:
    assert keeps(made(0.1, [0.01, 0.03]), slo) is kept


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    moments = arrivals(10, 4000, 3)
    gaps = [b - a for a, b in itertools.pairwise(moments)]
    assert moments == arrivals(10, 4000, 3) != arrivals(10, 4000, 4)
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.06)
    # An exponential distribution's standard deviation is its mean.
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.08)
