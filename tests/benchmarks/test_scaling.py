"""The interconnect model's arithmetic, the page it fills, and a real measurement of two workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import interconnect as ic
from benchmarks import scaling as s
from shared.errors import UserError

LINK = ic.Link("a cable", bandwidth=1e9, latency=1e-5)


def test_a_ring_of_four_sends_six_messages_of_a_quarter() -> None:
    assert ic.all_reduce(4, 4e8, LINK) == pytest.approx(6 * (1e-5 + 1e8 / 1e9))
    assert ic.all_reduce(1, 4e8, LINK) == 0


def test_fsdp_moves_one_and_a_half_times_what_ddp_does_where_all_is_trained() -> None:
    wire = ic.Link("no latency", 1e9, 0.0)
    ddp, fsdp = ic.Load("", 1, 1e9), ic.Load("", 1, 1e9, gathered=1e9)
    assert fsdp.seconds(8, wire) == pytest.approx(1.5 * ddp.seconds(8, wire))


@given(st.floats(1e6, 1e12), st.floats(1e-7, 1e-2), st.integers(2, 64))
def test_a_link_is_found_again_from_its_times(bandwidth: float, latency: float, workers: int) -> None:
    link = ic.Link("x", bandwidth, latency)
    found = ic.fitted("x", workers, {n: [ic.all_reduce(workers, n, link)] * 3 for n in (4, 2**16, 2**20, 2**28)})
    for size in (2**10, 2**24):
        assert ic.all_reduce(workers, size, found) == pytest.approx(ic.all_reduce(workers, size, link), rel=1e-3)


@given(st.sampled_from(ic.LOADS), st.sampled_from(ic.LINKS))
def test_more_workers_never_raise_the_share_of_computing(load: ic.Load, link: ic.Link) -> None:
    shares = [ic.efficiency(1.0, load.seconds(n, link)) for n in (1, 2, 8, 64, 512)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)


def test_adapters_are_as_large_as_peft_makes_them() -> None:
    """Of Llama-2-7B with rank 16 on every projection: 39,976,960 weights, as PEFT prints it."""
    assert ic.LLAMA_ADAPTER == 39_976_960


@pytest.mark.parametrize("workers", [1, 3, 4096])
def test_workers_that_cannot_be_measured_are_refused(workers: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be measured"):
        s.run(workers, 5, tmp_path / "result.json")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_workers_are_measured_and_the_page_can_be_filled(tmp_path: Path) -> None:
    result, path = s.run(2, 5, tmp_path / "result.json")
    assert path.exists()
    steps = [r for r in result.records if r.case["what"] == "steps"]
    assert [(r.case["workers"], r.case["strategy"]) for r in steps] == [(1, "ddp"), (1, "ddp"), (2, "ddp"), (2, "fsdp")]
    assert all(len(r.samples["step_seconds"]) == 5 for r in steps)
    assert "| 2 | fsdp |" in s.measured_table(result)
    assert all((value or 0) > 0 for r in result.records for name, value in r.metrics.items() if name != "latency")
