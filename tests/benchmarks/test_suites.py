"""Every suite on a tiny model: the records have the figures the report relies on, and what cannot be read is null."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import energy, latency, limits, peers, quality, retrieval, sustained, training
from benchmarks.budget import Task
from benchmarks.limits import Limits
from ml_engineer_track.models import load_model, weight_bytes
from shared.errors import UserError

WALLS = Limits(memory_bandwidth=1e10, matmul_peak=1e12)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_the_limits_of_the_device_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "buffer_bytes", lambda target: 2**26)
    monkeypatch.setattr(limits, "matmul_peak", lambda target, dtype: 1e11)
    (record,) = limits.measure(Task("limits", {}, 60))
    # Any machine this runs on moves between 0.2 GB/s and 20 TB/s.
    assert 2e8 < (record.metrics["memory_bandwidth"] or 0) < 2e13
    assert record.metrics["memory_bandwidth"] == max(max(v) for v in record.samples.values())
    assert limits.limits_of(record).matmul_peak == 1e11


def test_decode_bytes_and_prefill_flops_are_counted_by_hand(micro_path: str) -> None:
    model = load_model(micro_path, torch.float32)
    body = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert sum(p.numel() for p in model.parameters()) == body + 8192 * 64
    assert limits.prefill_flops(model, 3, 10) == 3 * (2 * body * 10 + 2 * 2 * 64 * 100 + 2 * 8192 * 64)
    kv = 2 * 2 * 2 * 16 * 4
    assert limits.decode_bytes(model, 3, 10) == weight_bytes(model) + 3 * 10 * kv


def test_shares_are_null_without_limits() -> None:
    assert limits.mbu(1e9, 0.5, WALLS) == pytest.approx(0.2)
    assert limits.mfu(1e11, 0.5, WALLS) == pytest.approx(0.2)
    assert limits.mbu(1e9, 0.5, None) is None
    assert limits.mfu(1e9, 0.5, None) is None


# --- latency ---------------------------------------------------------------------------------------------------------


def test_latency_measures_both_sweeps_of_every_model(micro_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BATCHES", (1, 2))
    monkeypatch.setattr(latency, "CONTEXTS", (16, 600))  # 600 is beyond the model's 512
    monkeypatch.setattr(latency, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(latency, "NEW_TOKENS", 4)
    memory = {"max_ram": 10, "model_ram": 5, "max_process_vram": None, "max_allocated": None}
    monkeypatch.setattr(latency, "memory", lambda path, options: memory)
    records = list(latency.measure(Task("latency", {"a": micro_path, "b": micro_path}, 300), WALLS))
    runs = [r for r in records if r.case["what"] == "run"]
    assert [(r.model, r.case["batch"], r.case["prompt_tokens"]) for r in runs] == [
        (m, b, t) for b, t in ((1, 8), (2, 8), (1, 16)) for m in ("a", "b")
    ]
    for record in runs:
        assert len(record.samples["ttft_ms"]) == len(record.samples["tpot_ms"]) == 5
        assert len(record.samples["itl_ms"]) == 15
        assert all((record.metrics[k] or 0) > 0 for k in ("median_ttft_ms", "decode_throughput", "decode_mbu", "prefill_mfu"))
    assert {r.case["what"] for r in records} == {"load", "run", "memory"}


def test_latency_skips_what_does_not_fit_and_says_so(micro_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "BATCHES", (1,))
    monkeypatch.setattr(latency, "CONTEXTS", ())
    task = Task("latency", {"a": micro_path}, 0.0)
    assert [r.case["what"] for r in latency.measure(task, None)] == ["load"]
    assert len(task.skipped) == 2
    assert "batch 1, 256 prompt tokens" in task.skipped[0]


# --- training --------------------------------------------------------------------------------------------------------


def test_training_measures_both_methods_until_the_last_batch(micro_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ROW_TOKENS", 16)
    monkeypatch.setattr(training, "REPLY_TOKENS", 4)
    monkeypatch.setattr(training, "LAST_BATCH", 4)
    monkeypatch.setattr(training, "memory", lambda path, method, batch: {"max_ram": 1.0, "max_allocated": None})
    records = list(training.measure(Task("training", {"a": micro_path}, 300), WALLS))
    steps = {(r.case["method"], r.case["batch"]): r for r in records if r.case["what"] == "steps"}
    assert set(steps) == {(m, b) for m in ("lora", "qlora") for b in (2, 4)}
    for record in steps.values():
        assert len(record.samples["tokens_per_second"]) == 5
        assert (record.metrics["tokens_per_second"] or 0) > 0
        assert 0 < (record.metrics["mfu"] or 0) < 1
        assert 0 <= (record.metrics["data_wait_share"] or 0) < 1
    assert len([r for r in records if r.case["what"] == "memory"]) == 4


def test_lora_and_qlora_need_the_same_flops(micro_path: str) -> None:
    plain, quantised = (training.Trainer(micro_path, method) for method in training.METHODS)
    assert plain.flops_per_token == quantised.flops_per_token > 0


def test_training_rates_are_totals_over_totals() -> None:
    steps = [training.Step(1.0, 0.1), training.Step(3.0, 0.1)]
    record = training.describe("a", "lora", 4, steps, 1e6, WALLS)
    assert record.metrics["tokens_per_second"] == pytest.approx(2 * 4 * training.ROW_TOKENS / 4.0)
    assert record.metrics["data_wait_share"] == pytest.approx(0.05)
    assert record.metrics["mfu"] == pytest.approx(1e6 * 2 * 4 * training.ROW_TOKENS / 4.0 / 1e12)


# --- retrieval -------------------------------------------------------------------------------------------------------


def some_vectors(n: int) -> np.ndarray:
    made = np.random.default_rng(0).normal(size=(n, 16))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def test_exact_search_finds_the_nearest() -> None:
    vectors = some_vectors(200)
    found, times = retrieval.exact_search(vectors, vectors[:5])
    assert [row[0] for row in found] == [0, 1, 2, 3, 4]
    assert all(len(set(row)) == retrieval.TOP for row in found)
    assert len(times) == 5


def test_a_collection_is_filled_asked_and_set_against_exact_search() -> None:
    vectors = some_vectors(500)
    record = retrieval.collection(vectors, vectors[:20], 500)
    assert 0.8 <= (record.metrics["recall_at_10"] or 0) <= 1
    assert len(record.samples["query_ms"]) == 20
    assert len(record.samples["ingest_throughput"]) >= 5
    assert (record.metrics["disk_bytes"] or 0) > 500 * 16 * 4
    assert (record.metrics["ingest_throughput"] or 0) > 0


def test_a_crowd_keeps_the_real_vectors_and_stays_on_the_unit_sphere() -> None:
    real = some_vectors(50)
    crowd = retrieval.crowd(real, 300, 7)
    assert crowd.shape == (300, 16)
    assert np.array_equal(crowd[:50], real)
    assert np.allclose(np.linalg.norm(crowd, axis=1), 1, atol=1e-5)
    assert np.array_equal(crowd, retrieval.crowd(real, 300, 7))
    asked = retrieval.queries(real, 7)
    assert asked.shape == (retrieval.QUERIES, 16)
    assert not (asked[:, None] == real[None]).all(-1).any()


def test_large_collections_wait_for_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        retrieval, "embedding", lambda texts, seed: (retrieval.Record(suite="retrieval", model="m"), some_vectors(50))
    )
    monkeypatch.setattr(retrieval, "SIZES", (100, 10_000_000))
    monkeypatch.setattr(retrieval, "QUERIES", 10)
    task = Task("retrieval", {}, 100)
    assert len(list(retrieval.measure(task))) == 2
    assert "10,000,000 passages" in task.skipped[0]


# --- quality, energy, sustained --------------------------------------------------------------------------------------


def test_quality_without_a_published_model_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    current = quality.current
    monkeypatch.setattr(quality, "current", lambda: current(tmp_path))
    task = Task("quality", {}, 10)
    assert list(quality.measure(task)) == []
    assert "no model has been published" in task.skipped[0]


def package(root: Path, name: str, energy_uj: int, top: int = 1000) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(f"{energy_uj}\n", encoding="ascii")
    (folder / "max_energy_range_uj").write_text(f"{top}\n", encoding="ascii")
    return folder


def test_rapl_sums_packages_and_survives_a_counter_that_starts_again(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 900), package(tmp_path, "intel-rapl:1", 100)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0, counted there already
    kind, meter = energy.rapl_meter(tmp_path)
    assert kind == "RAPL, 2 CPU packages"
    assert meter
    assert meter() == 0
    (first / "energy_uj").write_text("50", encoding="ascii")
    (second / "energy_uj").write_text("200", encoding="ascii")
    assert meter() == pytest.approx((150 + 100) / 1e6)


def test_energy_is_null_where_there_is_no_meter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert energy.rapl_meter(tmp_path) == ("no RAPL counters on this machine", None)
    monkeypatch.setattr(energy, "find_meter", lambda: ("no meter", None))
    records = list(energy.measure(Task("energy", {"a": "x"}, 10)))
    assert len(records) == len(energy.BATCHES)
    assert all(set(r.metrics.values()) == {None} and r.note == "no meter" for r in records)


def test_energy_for_each_token_is_what_the_meter_says(monkeypatch: pytest.MonkeyPatch) -> None:
    joules = iter(range(0, 10_000, 640))  # every reading is 640 J more
    monkeypatch.setattr("ml_engineer_track.benchmark.one_run", lambda *a: None)
    monkeypatch.setattr(energy.time, "perf_counter", iter(range(10_000)).__next__)
    used, seconds = energy.tokens_energy(object(), 1, lambda: float(next(joules)))
    assert used == [640.0] * 5
    assert all(s > 0 for s in seconds)


def test_sustained_load_is_a_series_over_time(micro_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustained, "BATCH", 1)
    monkeypatch.setattr(sustained, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(sustained, "NEW_TOKENS", 2)
    (record,) = sustained.measure(Task("sustained", {"a": micro_path}, 4.0))
    lengths = {len(values) for values in record.series.values()}
    assert len(lengths) == 1
    assert lengths.pop() >= 2
    assert (record.metrics["last_to_first"] or 0) > 0
    assert all(v is not None for v in record.series["ram_bytes"])


def test_throttling_shows_as_a_ratio_below_one() -> None:
    assert sustained.last_to_first([100.0] * 20 + [60.0] * 20) == pytest.approx(0.6)


# --- peers -----------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(
    micro_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "HOME", tmp_path)
    result, path = peers.run(["trl", "lm-eval"], False, micro_path, tmp_path / "out.json")
    assert [line.split(".")[0] for line in result.skipped] == [
        "peers: trl: not installed here",
        "peers: lm-eval: not installed here",
    ]
    assert "make bench-peers PEERS=trl INSTALL=1" in result.skipped[0]
    assert path.exists()
    with pytest.raises(UserError, match="unknown peer 'vlm'"):
        peers.run(["vlm"], False, micro_path, None)


def test_a_peers_program_ends_with_a_line_of_figures() -> None:
    python = Path(sys.executable)
    source = "import sys, json; print('noise'); print(json.dumps({'ttft_ms': [1.0, 2.0, 3.0], 'tokens_per_second': [1.0, 3.0]}))"
    record = peers.of_samples("x", {}, peers.program(python, source))
    assert record.metrics["median_ttft_ms"] == 2.0
    assert record.metrics["tokens_per_second"] == pytest.approx(1.5)  # equal work at 1 and at 3 a second
    for wrong, says in (("raise SystemExit('broken')", "failed: broken"), ("print('nothing')", "printed no figures: nothing")):
        with pytest.raises(UserError, match=says):
            peers.program(python, wrong)
