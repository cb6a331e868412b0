"""Result files and budgets: what is written can be read, what cannot be trusted is refused, time is shared as promised."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import results, runner
from benchmarks.budget import Task, interleaved, parse_duration, plan, share
from benchmarks.results import Record, Result, spread
from shared.errors import UserError

MINIMUM = {"latency": 30.0, "serving": 60.0, "quality": 1.0}
WEIGHT = {"latency": 3.0, "serving": 5.0, "quality": 0.05}


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_result_is_read_as_it_was_written(make_result: Callable[..., Result], tmp_path: Path) -> None:
    record = Record(
        suite="latency", model="bf16", case={"batch": 1}, metrics={"mfu": None, "x": 0.5}, samples={"ttft_ms": [1.0, 2.0]}
    )
    written = make_result([record])
    results.write(written, tmp_path / "a.json")
    assert results.read(tmp_path / "a.json") == written


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", "not JSON"),
        ("[1]", "no schema_version"),
        ('{"schema_version": 0}', "has schema 0, this code reads 1. .*Measure again"),
        ('{"schema_version": 99}', "has schema 99, this code reads 1. .*Update the code"),
        ('{"schema_version": 1}', "result field test_time"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says.replace(". .*", ".*")):
        results.read(tmp_path / "a.json")
    with pytest.raises(UserError, match="no such result file"):
        results.read(tmp_path / "b.json")


def test_the_environment_says_what_a_reader_needs() -> None:
    found = results.environment()
    assert {"cpu_info", "n_threads", "gpu_info", "libraries", "build_commit", "power_source", "busy_share"} <= set(found)
    assert 0 <= found["busy_share"] <= 1
    assert json.loads(json.dumps(found)) == found


def test_a_spread_is_null_without_samples() -> None:
    assert set(spread("ttft", []).values()) == {None}
    assert spread("ttft", [1.0, 2.0, 9.0])["median_ttft_ms"] == 2.0


def test_model_info_hashes_weights_and_knows_nothing_of_a_hub_id(micro_path: str) -> None:
    mine = results.model_info(micro_path)
    assert mine.sha256
    assert (mine.model_size or 0) > 1000
    assert results.model_info("somebody/something").sha256 is None


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), (" 2M ", 120)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "five", "5 m", "-3s", "0", "m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a duration"):
        parse_duration(text)


def test_named_suites_are_a_promise_and_unnamed_ones_are_left_out() -> None:
    assert plan(["latency", "serving"], True, MINIMUM, 100) == (["latency", "serving"], [])
    with pytest.raises(UserError, match="latency, serving need at least 90 s, 80 s given"):
        plan(["latency", "serving"], True, MINIMUM, 80)
    assert plan(["latency", "serving", "quality"], False, MINIMUM, 80) == (["latency", "quality"], ["serving"])
    with pytest.raises(UserError, match="shortest suite needs 1 s"):
        plan(["latency", "quality"], False, MINIMUM, 0.5)
    with pytest.raises(UserError, match="unknown suite 'speed'"):
        plan(["speed"], True, MINIMUM, None)


def test_shares_use_the_budget_and_keep_the_minimum_of_those_to_come() -> None:
    first = share("latency", ["serving", "quality"], WEIGHT, MINIMUM, 300)
    assert first == pytest.approx(300 * 3 / 8.05)
    assert share("serving", ["quality"], WEIGHT, MINIMUM, 300 - first) <= 300 - first - 1
    assert share("latency", ["serving"], WEIGHT, MINIMUM, 92) == pytest.approx(32)  # 60 stay for serving


def test_a_case_that_does_not_fit_is_skipped_by_name() -> None:
    task = Task("latency", {}, 10)
    assert task.fits(5, "batch 1")
    assert not task.fits(50, "batch 64")
    assert len(task.skipped) == 1
    assert task.skipped[0].startswith("latency: batch 64 (about 50 s")


def test_sides_take_turns_and_each_is_first_in_turn() -> None:
    calls: list[str] = []
    sides = {name: (lambda n=name: (calls.append(n), len(calls))[1]) for name in ("a", "b")}
    found = interleaved(sides, repeats=4)
    assert calls == ["a", "b", "b", "a"] * 2
    assert {name: len(values) for name, values in found.items()} == {"a": 4, "b": 4}


# --- the runner ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's limits as already known: measuring them takes seconds."""
    known = Record(suite="limits", model="this device", metrics={"memory_bandwidth": 1e10, "matmul_peak": 1e11})
    monkeypatch.setattr(runner.limits, "measure", lambda task: iter([known]))


def entries(measure: runner.Suite) -> dict[str, runner.Entry]:
    return {"first": runner.Entry(measure, 1, 1), "second": runner.Entry(measure, 1, 1)}


def request(tmp_path: Path, model: str, **given: object) -> runner.Request:
    return runner.Request(model=model, out=tmp_path / "out.json", **given)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_limits")
def test_a_run_hands_every_suite_its_time_and_writes_everything(micro_path: str, tmp_path: Path) -> None:
    given: list[tuple[str, float]] = []

    def measure(task: Task, walls: object) -> Iterator[Record]:
        assert walls == runner.Limits(1e10, 1e11)
        given.append((task.suite, task.seconds))
        yield Record(suite=task.suite, model=next(iter(task.models)))
        task.skip("the rest")

    result, path = runner.run(request(tmp_path, micro_path, budget=100.0), entries(measure))
    assert [name for name, _ in given] == ["first", "second"]
    assert given[0][1] == pytest.approx(50, abs=5)
    assert given[1][1] == pytest.approx(100, abs=8)  # the first left all of its time
    stored = results.read(path)
    assert stored == result
    assert stored.status == "complete"
    assert [r.suite for r in stored.records] == ["limits", "first", "second"]
    assert stored.skipped == ["first: the rest", "second: the rest"]
    assert next(iter(stored.models.values())).sha256


@pytest.mark.usefixtures("no_limits")
def test_an_interrupted_run_keeps_what_was_measured(micro_path: str, tmp_path: Path) -> None:
    def measure(task: Task, walls: object) -> Iterator[Record]:
        yield Record(suite=task.suite, model="m")
        raise KeyboardInterrupt

    _, path = runner.run(request(tmp_path, micro_path), entries(measure))
    stored = results.read(path)
    assert stored.status == "interrupted"
    assert [r.suite for r in stored.records] == ["limits", "first"]


@pytest.mark.usefixtures("no_limits")
def test_a_suite_that_cannot_run_is_skipped_and_the_next_one_runs(micro_path: str, tmp_path: Path) -> None:
    def measure(task: Task, walls: object) -> Iterator[Record]:
        if task.suite == "first":
            raise UserError("no server", "here")
        yield Record(suite=task.suite, model="m")

    result, _ = runner.run(request(tmp_path, micro_path), entries(measure))
    assert result.skipped == ["first: no server in here"]
    assert [r.suite for r in result.records] == ["limits", "second"]


def test_a_busy_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    runner.warn_if_busy({"busy_share": 0.8, "load_average": [1.9, 1.0, 1.0]})
    assert "other programs use 80%" in capsys.readouterr().out
    runner.warn_if_busy({"busy_share": 0.1, "load_average": [0.1, 0.1, 0.1]})
    assert capsys.readouterr().out == ""


def test_a_model_that_is_not_there_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model here"):
        runner.run(request(tmp_path, str(tmp_path)))
    assert not (tmp_path / "out.json").exists()
