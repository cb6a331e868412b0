"""The page about replicas holds the figures of a result file, and what was asked for wrongly is told in one line."""

from __future__ import annotations

import pytest

from benchmarks import replicas
from benchmarks.results import Record, Result
from shared.errors import UserError


@pytest.fixture
def measured() -> Result:
    environment = {"cpu_info": "a CPU", "cpu_cores": 2, "memory_gib": 8.0, "build_commit": "abc1234"}
    case: dict[str, str | int | float] = {"what": "kill", "replicas": 2, "clients": 8}
    figures = {
        "requests": 1234.0,
        "failed": 3.0,
        "in_flight_on_the_killed": 4.0,
        "failed_elsewhere": 0.0,
        "median_e2el_ms": 41.26,
    }
    records = [
        Record(suite="replicas", model="inference", case=case, metrics={**figures, "seconds_until_all_are_back": 7.44}),
        Record(suite="replicas", model="service", case={**case, "what": "update"}, metrics={"requests": 80.0, "failed": 0.0}),
    ]
    return Result(test_time="2026-11-28T00:00:00+00:00", suites=["replicas"], environment=environment, records=records)


def test_the_table_holds_every_figure_and_where_it_was_read(measured: Result) -> None:
    table = replicas.markdown(measured)
    assert "| requests | 1,234 | 80 |" in table
    assert "| seconds until a new replica answered | 7.4 |  |" in table
    assert "2 replicas, 8 clients, a CPU, 2 cores, 8.0 GiB, commit abc1234, 2026-11-28" in table


def test_a_side_that_is_none_is_told() -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match="unknown side 'model' in --side"):
        replicas.run(["model"], 2, None)
