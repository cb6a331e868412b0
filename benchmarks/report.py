"""The report of a run: one self-contained HTML page, and one Markdown table for a README or a pull request.

    python -m benchmarks report [RESULT] [--into artifacts/reports]

No network, no script; every chart is followed by the table it was drawn from; what was skipped is said. Sections without
figures are left out and named at the end (sections.py makes them, charts.py draws).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import results, sections
from benchmarks.compare import compare
from benchmarks.results import BUSY, Record, Result
from benchmarks.sections import case_text, number
from shared.errors import UserError
from shared.files import write_text
from shared.page import document, heading, paragraph, table
from shared.settings import load_settings


def write(path: Path | None = None, into: Path | None = None) -> tuple[Path, Path]:
    """Write the page and the table of a run (default: the latest one); returns their paths. UserError without a run."""
    artifacts = load_settings("tiny").artifacts
    stored = results.stored()
    if path is None:
        if not stored:
            raise UserError("no results yet", str(results.RUNS), "Run `make bench`")
        path = stored[-1]
    result = results.read(path)
    earlier = [run for p in stored if (run := results.read(p)).test_time < result.test_time]
    folder = into or artifacts / "reports"
    training = _training_report(artifacts / "reports" / "ml.json")
    write_text(folder / "benchmarks.html", page(result, earlier[-1] if earlier else None, training))
    write_text(folder / "benchmarks.md", markdown(result))
    return folder / "benchmarks.html", folder / "benchmarks.md"


def page(result: Result, before: Result | None = None, training: dict[str, Any] | None = None) -> str:
    """The whole page. `training` is the ML track's report, where one exists: its loss curves are shown."""
    made = {
        "Quality, size and latency": sections.pareto(result),
        "Latency": sections.latency(result),
        "Serving: closed loop": sections.closed(result),
        "Serving: Poisson arrivals": sections.opened(result),
        "Serving: reused prefix": sections.prefix(result),
        "Engines side by side": sections.engines(result),
        "Fine-tuning": sections.finetuning(result),
        "Loss curves": sections.losses(training),
        "Retrieval": sections.retrieval(result),
        "Judge calibration": sections.judge(result),
        "Sustained load: throughput, memory and clocks over time": sections.sustained(result),
        "Energy": sections.energy(result),
        "Peers": sections.peers(result),
        "What changed since the last run": changes(result, before),
    }
    shown = [heading(title) + body for title, body in made.items() if body]
    empty = [title for title, body in made.items() if not body]
    closing = paragraph(f"No figures in this run for: {'; '.join(empty)}.") if empty else ""
    title = f"Benchmarks, {result.test_time[:10]}"
    return document(title, [heading(title, 1), opening(result), *shown, heading("Not measured"), skipped(result), closing])


def opening(result: Result) -> str:
    """The machine, how the run went, and the limits of the device."""
    e = result.environment
    told = f"{machine(result)}. {result.seconds / 60:.1f} minutes, {result.status}; commit {e.get('build_commit')}."
    rows = [[k, json.dumps(v) if isinstance(v, dict | list) else str(v)] for k, v in e.items() if k != "libraries"]
    rows += [[name, str(version)] for name, version in (e.get("libraries") or {}).items()]
    walls = [[key, f"{value:.4g}"] for r in result.of("limits") for key, value in r.metrics.items() if value is not None]
    return (
        paragraph(told, lead=True)
        + (paragraph(disturbed(result)) if disturbed(result) else "")
        + paragraph("Percentiles over raw samples; what this device cannot tell is -. Names and formulas: benchmarks/README.md.")
        + (heading("Limits of this device", 3) + table(["limit", "bytes/s or FLOP/s"], walls) if walls else "")
        + "<details><summary>Machine and versions</summary>"
        + table(["", ""], rows)
        + "</details>"
    )


def machine(result: Result) -> str:
    e = result.environment
    return f"{e.get('cpu_info')}, {e.get('n_threads')} threads, {e.get('memory_gib')} GiB; GPU: {e.get('gpu_info') or 'none'}"


def disturbed(result: Result) -> str:
    share = float(result.environment.get("busy_share") or 0)
    if share <= BUSY:
        return ""
    return f"Disturbed: other programs used {share:.0%} of the machine at the start; its times are worse than it can do."


def changes(result: Result, before: Result | None) -> str:
    """What got better or worse since the run before; empty without one."""
    if before is None:
        return ""
    title = paragraph(f"Against the run of {before.test_time}, commit {before.environment.get('build_commit')}.")
    try:
        found = compare(before, result)
    except UserError as error:
        return title + paragraph(f"Not compared: {error}.")
    told = [c for c in found if c.verdict in ("better", "worse")]
    rows = [
        [c.suite, c.model, c.case, c.metric, number(c.a), number(c.b), f"{c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}]", c.verdict]
        for c in told
    ]
    rest = paragraph(f"{len(found) - len(told)} of {len(found)} figures: no difference that this many samples can show.")
    head = ["suite", "model", "case", "figure", "before", "now", "ratio [95 % interval]", ""]
    return title + (table(head, rows) if rows else "") + rest


def skipped(result: Result) -> str:
    if not result.skipped:
        return paragraph("Nothing was skipped.")
    return table(["what was skipped, and why"], [[line] for line in result.skipped])


def markdown(result: Result) -> str:
    """One table for a README: every case with its main figures."""
    commit = f"commit {result.environment.get('build_commit')}, {result.test_time[:10]}, {result.status}"
    rows = [f"| {r.suite} | {r.model} | {case_text(r)} | {main_figures(r)} |" for r in result.records]
    lines = [f"{machine(result)}; {commit}. {disturbed(result)}".rstrip(), ""]
    lines += ["| suite | model | case | figures |", "|---|---|---|---|", *rows, ""]
    return "\n".join([*lines, *(f"- skipped: {line}" for line in result.skipped)]).rstrip() + "\n"


#: what the Markdown table shows of a record, in this order
MAIN = (
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "output_throughput", "request_goodput", "decode_throughput", "decode_mbu",
    "tokens_per_second", "mfu", "max_ram", "max_allocated", "ingest_throughput", "embed_throughput", "median_query_ms",
    "p99_query_ms", "recall_at_10", "grounded/evidence_f1", "grounded/decision_accuracy", "joules_per_token", "last_to_first",
    "median_load_ms", "reused_to_cold", "memory_bandwidth", "matmul_peak", "times_one_at_a_time", "grammar_cost", "same_replies",
    "value", "bound", "met",
)  # fmt: skip


def main_figures(record: Record) -> str:
    known = [f"{key} {number(record.metrics[key])}" for key in MAIN if record.metrics.get(key) is not None]
    return ", ".join(known) or "null on this device"


def _training_report(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found) if {"training", "version"} <= set(found) else None
    except (OSError, ValueError, TypeError):
        return None
