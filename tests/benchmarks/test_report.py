"""The report: every section has its chart and its table, nothing is fetched, and what is missing is named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as commands
from benchmarks import report, results
from benchmarks.results import Record, Result, spread, write
from shared.errors import UserError

SECTIONS = (
    "Quality, size and latency", "Latency", "Serving: closed loop", "Serving: Poisson arrivals", "Serving: reused prefix",
    "Fine-tuning", "Loss curves", "Retrieval", "Judge calibration", "Sustained load: throughput, memory and clocks over time",
    "Energy", "Peers", "What changed since the last run",
)  # fmt: skip


# --- a run with every kind of record; its figures are made up -----------------------------------------------------

VARIANTS = {"bf16": (18.4e6, 5.0, 0.41), "nf4": (7.9e6, 4.2, 0.40), "int8": (11.4e6, 11.0, 0.41)}


def times(name: str, middle: float) -> dict[str, float | None]:
    return spread(name, [middle * f for f in (0.95, 0.98, 1.0, 1.03, 1.2)])


def samples(name: str, middle: float) -> dict[str, list[float]]:
    return {name: [middle * f for f in (0.95, 0.98, 1.0, 1.03, 1.2)]}


def record(suite: str, model: str, case: dict[str, Any], metrics: dict[str, Any], **more: Any) -> Record:
    return Record(suite=suite, model=model, case=case, metrics=metrics, **more)


def served(rate: float, ttft: float, tpot: float, **more: Any) -> dict[str, Any]:
    base = {"output_throughput": 32 * rate, "request_throughput": rate, "completed": 60.0, "rejected": 0.0, "failed": 0.0}
    return {**base, **times("ttft", ttft), **times("tpot", tpot), **more}


RECORDS = [
    record("limits", "this device", {"dtype": "bfloat16"}, {"memory_bandwidth": 2.1e10, "matmul_peak": 4.2e11}),
    *(
        record("quality", name, {"version": "m-1"}, {
            "weight_bytes": size, "grounded/evidence_f1": f1, "grounded/evidence_f1/low": f1 - 0.06,
            "grounded/evidence_f1/high": f1 + 0.06, "grounded/decision_accuracy": 0.8, "grounded/decision_accuracy/low": 0.74,
            "grounded/decision_accuracy/high": 0.86,
            **{f"judge/{r}_kappa{end}": 0.3 + 0.1 * n + d for n, r in enumerate(("grounded", "safe", "helpful"))
               for end, d in (("", 0.0), ("/low", -0.15), ("/high", 0.15))},
            "judge/grounded_kappa/n": 72.0,
        })
        for name, (size, _, f1) in VARIANTS.items()
    ),
    *(record("latency", n, {"what": "load"}, {**times("load", 200), "weight_bytes": v[0]}) for n, v in VARIANTS.items()),
    *(
        record("latency", name, {"what": "run", "batch": batch, "prompt_tokens": tokens, "new_tokens": 32},
               {**times("ttft", 0.07 * tokens * batch**0.8), **times("tpot", tpot * batch**0.3),
                "prefill_throughput": 14000.0, "decode_throughput": 1e3 * batch**0.7 / tpot, "decode_mbu": 0.17,
                "prefill_mfu": 0.3},
               samples=samples("tpot_ms", tpot))
        for name, (_, tpot, _) in VARIANTS.items()
        for batch, tokens in ((1, 256), (4, 256), (16, 256), (32, 256), (1, 64), (1, 512), (1, 1920))
    ),
    *(record("latency", n, {"what": "memory", "batch": 1}, {"max_ram": 4.5e8, "max_process_vram": None}) for n in VARIANTS),
    record("serving", "model.generate, one at a time", {"what": "in process", "batch": 1}, {"output_throughput": 100.0}),
    record("serving", "model.generate, static batch of 32", {"what": "in process", "batch": 32}, {"output_throughput": 700.0}),
    *(
        record("serving", "server, bf16", {"what": "closed", "max_concurrency": c, "prompt_tokens": 256, "new_tokens": 32},
               served(60 * c / (c + 12), 20 + 6 * c, 4 + 0.4 * c), samples=samples("output_throughput", 1000.0))
        for c in (1, 8, 32, 128)
    ),
    *(
        record("serving", "server, bf16", {"what": "open", "mix": mix, "rate_share": share, "slo": "ttft:1000 tpot:100"},
               served(40 * min(share, 1.0), 30 * math.exp(3 * share), 9.0, request_rate=40 * share,
                      request_goodput=40 * min(share, 1.0) * (1.0 if share < 1 else 0.4), saturated=float(share > 1)))
        for mix in ("chat", "rag")
        for share in (0.25, 0.5, 0.75, 0.9, 1.0, 1.25)
    ),
    record("serving", "server, bf16", {"what": "prefix", "prefix_tokens": 600},
           {**times("ttft_cold", 60), **times("ttft_reused", 8), "reused_to_cold": 0.133}),
    *(
        record("training", "bf16", {"what": "steps", "method": method, "batch": batch, "row_tokens": 256},
               {"tokens_per_second": rate * batch / (batch + 3), "mfu": 0.22, "data_wait_share": 0.004})
        for method, rate in (("lora", 4000.0), ("qlora", 2600.0))
        for batch in (2, 4, 8, 16)
    ),
    *(record("training", "bf16", {"what": "memory", "method": m, "batch": 16}, {"max_ram": 1.4e9}) for m in ("lora", "qlora")),
    record("retrieval", "sentence model", {"what": "embedding", "passages": 1000},
           {"embed_throughput": 310.0, **times("embed_query", 9.0)}),
    *(
        record("retrieval", "chroma", {"what": "search", "passages": n},
               {"ingest_throughput": 2e4 / math.log10(n), **times("query", math.log10(n)), **times("exact_query", n / 6e3),
                "recall_at_10": 1.02 - 0.01 * math.log10(n), "disk_bytes": 2200.0 * n})
        for n in (1_000, 10_000, 100_000)
    ),
    record("sustained", "bf16", {"batch": 8}, {"output_throughput": 900.0, "last_to_first": 0.83},
           series={"seconds": [5.0 * n for n in range(120)],
                   "output_throughput": [1000 - 170 * (1 - math.exp(-n / 30)) for n in range(120)],
                   "ram_bytes": [4.4e8 + 1e5 * n for n in range(120)], "cpu_mhz": [3500 - 6.0 * min(n, 60) for n in range(120)],
                   "cpu_celsius": [None] * 120, "gpu_mhz": [None] * 120, "gpu_celsius": [None] * 120}),
    record("energy", "bf16", {"batch": 1}, {"joules_per_token": None, "watts": None, "idle_watts": None}, note="no meter"),
    record("peers", "llama.cpp (llama-cpp-python), Q8_0", {"what": "closed", "max_concurrency": 1}, served(25, 22, 1.1)),
    record("peers", "TRL SFTTrainer", {"what": "steps", "method": "lora", "batch": 8}, {"tokens_per_second": 2100.0}),
]  # fmt: skip

TRAINING: dict[str, Any] = {
    "version": "m-1",
    "training": {
        "method": "lora",
        "loss": [2.0 * math.exp(-n / 80) + 0.7 + 0.05 * math.sin(n) for n in range(300)],
        "validation": [{"step": s, "loss": 2.0 * math.exp(-s / 80) + 0.75} for s in range(50, 301, 50)],
    },
}

# --- the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(make_result: Callable[..., Result]) -> str:
    before = make_result(RECORDS, time="2026-11-22T10:00:00+00:00", build_commit="older00")
    return report.page(make_result(RECORDS), before, TRAINING)


def test_every_section_is_there_and_every_chart_has_its_table(page: str) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [*SECTIONS, "Not measured"]
    for body in page.split("<h2>")[1:]:
        assert body.count("<table>") >= min(1, body.count("<svg")), body[:60]
    assert page.count("<svg") >= 11


def test_the_page_is_self_contained(page: str) -> None:
    assert "<script" not in page
    outside = [link for link in re.findall(r'(?:src|href)="([^"]+)"', page) if not link.startswith("#")]
    assert outside == []


def test_figures_that_are_null_are_a_dash_and_never_a_zero(page: str) -> None:
    energy = page[page.index("<h2>Energy</h2>") : page.index("<h2>Peers</h2>")]
    assert "<td>-</td>" in energy
    assert "<td>0</td>" not in energy


def test_a_run_without_figures_names_its_empty_sections(make_result: Callable[..., Result]) -> None:
    made = report.page(make_result([]))
    assert re.findall(r"<h2>(.*?)</h2>", made) == ["Not measured"]
    assert "No figures in this run for: Quality, size and latency; Latency;" in made


def test_a_disturbed_run_says_so_on_the_page_and_in_the_table(make_result: Callable[..., Result]) -> None:
    run = make_result(RECORDS, busy_share=0.7)
    assert "other programs used 70% of the machine" in report.page(run)
    assert "other programs used 70% of the machine" in report.markdown(run)


def test_changes_name_what_got_worse_and_count_the_rest(make_result: Callable[..., Result]) -> None:
    def one(factor: float) -> list[Record]:
        values = [factor * v for v in (10.0, 10.1, 10.2, 9.9, 9.8)]
        return [
            Record(suite="latency", model="bf16", case={"batch": 1}, samples={"ttft_ms": values}),
            Record(suite="latency", model="bf16", case={"batch": 2}, samples={"ttft_ms": [10.0, 10.1, 10.2, 9.9, 9.8]}),
        ]

    told = report.changes(make_result(one(2.0)), make_result(one(1.0), build_commit="older00"))
    assert "batch=1" in told
    assert "worse" in told
    assert "1 of 2 figures: no difference" in told
    refused = report.changes(make_result(one(1.0)), make_result(one(1.0), build_commit="older00", cpu_info="Another"))
    assert "Not compared: more than one thing differs" in refused


def test_the_markdown_table_has_a_row_for_every_record(make_result: Callable[..., Result]) -> None:
    rows = [line for line in report.markdown(make_result(RECORDS)).splitlines() if line.startswith("| ")]
    assert len(rows) == len(RECORDS) + 1
    assert len({line.count("|") for line in rows}) == 1


def test_the_report_of_the_latest_run_is_written(
    make_result: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "none")
    with pytest.raises(UserError, match="no results yet"):
        report.write()
    write(make_result(RECORDS, time="2026-11-21T10:00:00+00:00"), tmp_path / "runs" / "b.json")
    write(make_result(RECORDS), tmp_path / "runs" / "a.json")
    (tmp_path / "runs" / "old.json").write_text(json.dumps({"schema_version": 0}), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["benchmarks", "report"])
    assert commands.main() == 0
    assert "left out: result has schema 0" in capsys.readouterr().out
    text = (tmp_path / "artifacts" / "reports" / "benchmarks.html").read_text(encoding="utf-8")
    assert "Benchmarks, 2026-11-23" in text
    assert "Against the run of 2026-11-21" in text
    assert (tmp_path / "artifacts" / "reports" / "benchmarks.md").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--suite", "speed"], "unknown suite 'speed'"),
        (["run", "--suite", "latency,serving", "--budget", "10s"], "the budget is too small"),
        (["run", "--budget", "soon"], "not a duration"),
        (["run", "--device", "tpu"], "unknown device 'tpu'"),
        (["run", "--model", "./nowhere"], "no model here"),
        (["run", "--goodput", "speed:3"], "not an SLO"),
        (["fit", "--model", "ml_engineer_track/base_model", "--method", "dpo"], "unknown value 'dpo'"),
        (["report", "nowhere.json"], "no such result file"),
        (["compare", "nowhere.json", "nowhere.json"], "no such result file"),
        (["peers", "--only", "vlm"], "unknown peer"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert commands.main() == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "run", "--device", "cuda"])
    assert commands.main() == 2
    assert "no CUDA GPU" in capsys.readouterr().err
