"""Comparisons: real differences are found, noise is not, and runs that say nothing about each other are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as commands
from benchmarks import compare as c
from benchmarks.results import Record, Result, write
from shared.errors import UserError

UNDECIDED = "no difference that this many samples can show"


def run_of(values: list[float], metric: str = "ttft_ms", model: str = "bf16", batch: int = 1) -> list[Record]:
    return [Record(suite="latency", model=model, case={"batch": batch}, samples={metric: values})]


def noise(seed: int, n: int = 5, factor: float = 1.0) -> list[float]:
    return [float(x) for x in factor * np.exp(np.random.default_rng(seed).normal(0, 0.05, n))]


@pytest.mark.parametrize(
    ("metric", "factor", "verdict"),
    [
        ("ttft_ms", 1.5, "worse"),
        ("ttft_ms", 0.6, "better"),
        ("output_throughput", 1.5, "better"),
        ("tokens_per_second", 0.6, "worse"),
    ],
)
def test_a_real_difference_is_found_and_its_direction_known(
    metric: str, factor: float, verdict: str, make_result: Callable[..., Result]
) -> None:
    (found,) = c.compare(make_result(run_of(noise(1), metric)), make_result(run_of(noise(2, factor=factor), metric)))
    assert found.verdict == verdict
    assert found.low <= found.ratio <= found.high
    assert found.ratio == pytest.approx(factor, rel=0.15)
    assert found.n == (5, 5)


def test_noise_is_not_called_a_difference(make_result: Callable[..., Result]) -> None:
    alarms = 0
    for seed in range(60):
        (found,) = c.compare(make_result(run_of(noise(2 * seed))), make_result(run_of(noise(2 * seed + 1))))
        alarms += found.verdict != UNDECIDED
    assert alarms <= 6  # 60 pairs of equal runs, five samples each


def test_the_interval_covers_the_true_ratio(make_result: Callable[..., Result]) -> None:
    covered = 0
    for seed in range(100):
        (found,) = c.compare(make_result(run_of(noise(2 * seed, 30))), make_result(run_of(noise(2 * seed + 1, 30, factor=1.1))))
        covered += found.low <= 1.1 <= found.high
    assert covered >= 90


def test_a_difference_below_the_threshold_is_not_one(make_result: Callable[..., Result]) -> None:
    a, b = [1.0, 1.001, 1.002, 0.999, 0.998], [1.03, 1.031, 1.032, 1.029, 1.028]
    (found,) = c.compare(make_result(run_of(a)), make_result(run_of(b)), threshold=0.05)
    assert found.verdict == UNDECIDED
    (found,) = c.compare(make_result(run_of(a)), make_result(run_of(b)), threshold=0.01)
    assert found.verdict == "worse"


def test_looking_at_many_figures_asks_more_of_each(make_result: Callable[..., Result]) -> None:
    record = Record(suite="latency", model="bf16")
    a, b = noise(5, 8), noise(6, 8, factor=1.12)
    alone = c.compare_samples(record, "ttft_ms", a, b, 1, 0.05, 7)
    among_many = c.compare_samples(record, "ttft_ms", a, b, 1000, 0.05, 7)
    assert (alone.low, alone.high) == (among_many.low, among_many.high)
    assert alone.verdict == "worse"
    assert among_many.verdict == UNDECIDED


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"busy_share": 0.9}, "disturbed: other programs used 90%"),
        ({"cpu_info": "Another", "build_commit": "def5678"}, r"the machine \(cpu_info\); the software \(build_commit\)"),
        ({"sha256": "bb", "n_threads": 16}, r"the machine \(n_threads\); the model"),
    ],
)
def test_runs_that_are_not_comparable_are_refused_with_the_reason(
    changed: dict[str, object], says: str, make_result: Callable[..., Result]
) -> None:
    with pytest.raises(UserError, match=says):
        c.compare(make_result(run_of(noise(1))), make_result(run_of(noise(2)), **changed))


@pytest.mark.parametrize("changed", [{"cpu_info": "Another"}, {"build_commit": "def5678"}, {"sha256": "bb"}])
def test_one_difference_is_what_a_comparison_is_for(changed: dict[str, object], make_result: Callable[..., Result]) -> None:
    assert len(c.compare(make_result(run_of(noise(1))), make_result(run_of(noise(2)), **changed))) == 1


def test_different_cases_are_not_compared_with_each_other(make_result: Callable[..., Result]) -> None:
    with pytest.raises(UserError, match="no case in common"):
        c.compare(make_result(run_of(noise(1), batch=1)), make_result(run_of(noise(2), batch=4)))
    with pytest.raises(UserError, match="no case in common with 5 samples"):
        c.compare(make_result(run_of(noise(1)[:4])), make_result(run_of(noise(2))))


def test_a_run_is_found_by_its_commit(make_result: Callable[..., Result], tmp_path: Path) -> None:
    paths = [tmp_path / "1.json", tmp_path / "2.json"]
    for path, commit in zip(paths, ("aaa1111", "bbb2222"), strict=True):
        write(make_result(run_of(noise(1)), build_commit=commit), path)
    assert c.find("bbb2222ffff", lambda: paths).environment["build_commit"] == "bbb2222"
    assert c.find(str(paths[0])).environment["build_commit"] == "aaa1111"
    with pytest.raises(UserError, match="no result of 'ccc'"):
        c.find("ccc", lambda: paths)


def test_the_exit_status_is_for_ci(
    make_result: Callable[..., Result], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, other = (tmp_path / name for name in ("a.json", "b.json", "other.json"))
    write(make_result(run_of(noise(1))), a)
    write(make_result(run_of(noise(2, factor=2.0))), b)
    write(make_result(run_of(noise(2)), cpu_info="Another", python="3.12"), other)

    def status(*arguments: Path) -> int:
        monkeypatch.setattr("sys.argv", ["benchmarks", "compare", *map(str, arguments)])
        return commands.main()

    assert status(a, a) == 0
    assert status(b, a) == 0
    assert status(a, b) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last)[0]["verdict"] == "worse"
    assert status(a, other) == 2
    assert "more than one thing differs" in capsys.readouterr().err
