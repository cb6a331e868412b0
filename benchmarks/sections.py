"""The sections of the report, one function each: the records of a suite become a chart and the table it was drawn from.

A function returns "" when the run has no such figures; the page then names the section as left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import charts
from benchmarks.results import Record, Result
from shared.page import paragraph, table

NONE = "-"
#: joined by spaces that do not break
SLASH = "\u00a0/\u00a0"
P3 = SLASH.join(("p50", "p90", "p99,\u00a0ms"))
Column = tuple[str, Callable[[Record], str]]
TTFT: Column = (f"ttft {P3}", lambda r: times(r, "ttft"))
TPOT: Column = (f"tpot {P3}", lambda r: times(r, "tpot"))
SIDE: Column = ("", lambda r: r.model)
ANSWERED: tuple[Column, ...] = (
    ("completed", lambda r: number(r.metrics.get("completed"))),
    ("rejected (429)", lambda r: number(r.metrics.get("rejected"))),
    ("failed", lambda r: number(r.metrics.get("failed"))),
)


def pareto(result: Result) -> str:
    """Quality against latency, circles by size; the chart holds the variants with all three."""
    key, score = "grounded/evidence_f1", interval
    runs = _where(result, "latency", what="run", batch=1, prompt_tokens=256)
    speed = {r.model: r.metrics.get("median_tpot_ms") for r in runs}
    quality = {r.model: r.metrics for r in result.of("quality")}
    points = {
        name: (tpot, float(m[key] or 0), float(m["weight_bytes"] or 0))
        for name, m in quality.items()
        if m.get(key) is not None and (tpot := speed.get(name)) is not None
    }
    drawn = charts.pareto(points, "time per token at batch 1, ms", "evidence F1", "weights in memory") if points else ""
    columns: list[Column] = [
        ("variant", lambda r: r.model),
        ("evidence F1 [95 % interval]", lambda r: score(r, key)),
        ("decision accuracy [95 % interval]", lambda r: score(r, "grounded/decision_accuracy")),
        ("weights, MB", lambda r: megabytes(r.metrics.get("weight_bytes"))),
        ("tpot p50, ms", lambda r: number(speed.get(r.model))),
    ]
    return drawn + _table(result.of("quality"), columns) if quality else ""


def latency(result: Result) -> str:
    """Decode throughput over the batch, time to first token over the context, loading and memory."""
    runs = _where(result, "latency", what="run")
    if not runs:
        return ""
    batches = [r for r in runs if r.case["prompt_tokens"] == 256]
    contexts = [r for r in runs if r.case["batch"] == 1]
    memory = {r.model: r.metrics for r in _where(result, "latency", what="memory")}
    columns: list[Column] = [
        ("model", lambda r: r.model), _case("batch", "batch"), _case("prompt tokens", "prompt_tokens"), TTFT, TPOT,
        _metric("prefill tokens/s", "prefill_throughput"), _metric("decode tokens/s", "decode_throughput"),
        _metric("decode MBU", "decode_mbu"), _metric("prefill MFU", "prefill_mfu"),
    ]  # fmt: skip
    loading: list[Column] = [
        ("model", lambda r: r.model),
        (f"load {P3}", lambda r: times(r, "load")),
        ("weights, MB", lambda r: megabytes(r.metrics.get("weight_bytes"))),
        ("max_ram, MB", lambda r: megabytes(memory.get(r.model, {}).get("max_ram"))),
        ("max_process_vram, MB", lambda r: megabytes(memory.get(r.model, {}).get("max_process_vram"))),
    ]
    cache = result.environment.get("last_level_cache")
    size = f" ({cache / 2**20:.0f} MiB here)" if cache else ""
    note = f"MBU above 1 is possible where the weights fit in the last-level cache{size}: they are then not read from memory."
    return (
        charts.lines(_sides(batches, "batch", "decode_throughput"), "batch size", "decode, tokens/s", log_x=True)
        + charts.lines(_sides(contexts, "prompt_tokens", "median_ttft_ms"), "prompt tokens", "ttft p50, ms", log_x=True)
        + _table(runs, columns)
        + paragraph(note)
        + _table(_where(result, "latency", what="load"), loading)
    )


def closed(result: Result) -> str:
    """Throughput over concurrency, with the same model without a server as the floor."""
    runs, floor = _where(result, "serving", what="closed"), _where(result, "serving", what="in process")
    one = next((r.metrics["output_throughput"] for r in floor if r.case.get("batch") == 1), None)
    columns: list[Column] = [
        SIDE, _case("concurrent", "max_concurrency"), _metric("output tokens/s", "output_throughput"),
        ("times one at a time", lambda r: ratio(r.metrics.get("output_throughput"), one)), TTFT, TPOT, *ANSWERED,
    ]  # fmt: skip
    sides = _sides(runs, "max_concurrency", "output_throughput")
    drawn = charts.lines(sides, "concurrent chats", "output tokens/s", log_x=True) if sides else ""
    return drawn + _table([*floor, *runs], columns) + _notes(runs) if runs or floor else ""


def opened(result: Result) -> str:
    """Goodput and waiting over the arrival rate."""
    runs = [r.model_copy(update={"model": f"{r.model}, {r.case['mix']}"}) for r in _where(result, "serving", what="open")]
    if not runs:
        return ""
    columns: list[Column] = [
        SIDE, _metric("request_rate, 1/s", "request_rate"), _metric("request_throughput, 1/s", "request_throughput"),
        _metric("request_goodput, 1/s", "request_goodput"), TTFT, TPOT,
        ("saturated", lambda r: "yes" if r.metrics.get("saturated") else "no"), *ANSWERED,
    ]  # fmt: skip
    return (
        paragraph(f"Goodput counts requests that keep {runs[0].case['slo']} (milliseconds).")
        + charts.lines(_sides(runs, "request_rate", "request_goodput"), "requests sent, 1/s", "request_goodput, 1/s")
        + charts.lines(_sides(runs, "request_rate", "p99_ttft_ms"), "requests sent, 1/s", "ttft p99, ms", log_y=True)
        + _table(runs, columns)
    )


def prefix(result: Result) -> str:
    runs = _where(result, "serving", what="prefix")
    columns: list[Column] = [
        SIDE,
        _case("prefix, tokens", "prefix_tokens"),
        (f"ttft cold {P3}", lambda r: times(r, "ttft_cold")),
        (f"ttft reused {P3}", lambda r: times(r, "ttft_reused")),
        _metric("reused / cold", "reused_to_cold"),
    ]
    return _table(runs, columns) if runs else ""


def engines(result: Result) -> str:
    """Every side of the engine comparison in one table, and what was to be reached: met, missed, or not measured."""
    goals = _where(result, "engines", what="goal")
    sides = [r for r in result.of("engines") if r not in goals]
    columns: list[Column] = [
        SIDE, ("case", engine_case), _metric("output tokens/s", "output_throughput"),
        _metric("times one at a time", "times_one_at_a_time"),
        (f"ttft {P3}", lambda r: times(r, "ttft_reused") if r.case["what"] == "prefix" else times(r, "ttft")), TPOT,
        _metric("time per token, with / without grammar", "grammar_cost"),
        ("tokens the grammar forced", lambda r: percent(r.metrics.get("forced_share"))),
        ("max_ram, MB", lambda r: megabytes(r.metrics.get("max_ram"))),
        _metric("tokens written", "total_output_tokens"), _metric("rounds", "rounds"), *ANSWERED, ("note", lambda r: r.note),
    ]  # fmt: skip
    verdicts: list[Column] = [
        ("model", lambda r: r.model), ("goal", lambda r: str(r.case["goal"])),
        ("bound", lambda r: f"at {r.case['at']} {number(r.metrics['bound'])}"), _metric("measured", "value"),
        ("lowest and highest round", lambda r: SLASH.join(number(r.metrics[f"{end}_round"]) for end in ("lowest", "highest"))),
        ("reached", lambda r: {None: "not measured", 1.0: "met"}.get(r.metrics["met"], "missed")),
    ]  # fmt: skip
    told = paragraph(
        "Sides of a comparison took turns on the same machine with the same chats. The ttft of a prefix is the reused one."
    )
    return told + _table(sides, columns) + (_table(goals, verdicts) if goals else "") if sides else ""


def engine_case(record: Record) -> str:
    case = record.case
    many = f", {case['max_concurrency']} at once" if "max_concurrency" in case else ""
    lengths = f", {case['prompt_tokens']} + {case['new_tokens']} tokens" if "prompt_tokens" in case else ""
    return f"{case.get('grammar', case['what'])}{many}{lengths}"


def finetuning(result: Result) -> str:
    runs = [r.model_copy(update={"model": f"{r.model}, {r.case['method']}"}) for r in _where(result, "training", what="steps")]
    memory = {(f"{r.model}, {r.case['method']}", r.case["batch"]): r.metrics for r in _where(result, "training", what="memory")}

    def peak(key: str) -> Callable[[Record], str]:
        return lambda r: megabytes(memory.get((r.model, r.case["batch"]), {}).get(key))

    columns: list[Column] = [
        SIDE, _case("batch", "batch"), _metric("tokens/s", "tokens_per_second"), _metric("MFU", "mfu"),
        ("waiting for data", lambda r: percent(r.metrics.get("data_wait_share"))),
        ("max_ram, MB", peak("max_ram")), ("max_allocated (VRAM), MB", peak("max_allocated")),
    ]  # fmt: skip
    drawn = charts.lines(_sides(runs, "batch", "tokens_per_second"), "rows in a batch", "tokens/s", log_x=True) if runs else ""
    return drawn + _table(runs, columns) if runs else ""


def losses(training: dict[str, Any] | None) -> str:
    """The loss curves of the ML track's last run, from its own report."""
    if not training:
        return ""
    run = training["training"]
    every = max(1, len(run["loss"]) // 40)
    sides = {
        "training": [(float(n), float(loss)) for n, loss in enumerate(run["loss"], start=1)][::every],
        "validation": [(float(v["step"]), float(v["loss"])) for v in run["validation"]],
    }
    rows = [[f"{v['step']:.0f}", f"{v['loss']:.4f}"] for v in run["validation"]]
    told = paragraph(f"{run['method']}, version {training['version']}; from the ML track's report.")
    return told + charts.lines(sides, "step", "weighted loss, nats") + table(["step", "validation loss"], rows)


def retrieval(result: Result) -> str:
    runs = _where(result, "retrieval", what="search")
    if not runs:
        return ""
    curves = {"Chroma, p50": "median_query_ms", "Chroma, p99": "p99_query_ms", "exact search, p50": "median_exact_query_ms"}
    sides = {label: next(iter(_sides(runs, "passages", key).values()), []) for label, key in curves.items()}
    columns: list[Column] = [
        ("passages", lambda r: f"{r.case['passages']:,}"), _metric("ingest passages/s", "ingest_throughput"),
        (f"query {P3}", lambda r: times(r, "query")), (f"exact search {P3}", lambda r: times(r, "exact_query")),
        _metric("recall_at_10", "recall_at_10"), ("on disk, MB", lambda r: megabytes(r.metrics.get("disk_bytes"))),
    ]  # fmt: skip
    texts: list[Column] = [
        _metric("embedding passages/s", "embed_throughput"),
        (f"one query's embedding {P3}", lambda r: times(r, "embed_query")),
    ]
    drawn = charts.lines(sides, "passages", "one query, ms", log_x=True, log_y=True)
    return drawn + _table(runs, columns) + _table(_where(result, "retrieval", what="embedding"), texts)


def judge(result: Result) -> str:
    rubrics = ("grounded", "safe", "helpful")
    variants = [r for r in result.of("quality") if r.metrics.get("judge/grounded_kappa") is not None]
    if not variants:
        return ""
    groups = {
        rubric: {
            r.model: (float(r.metrics.get(key) or 0), r.metrics.get(f"{key}/low"), r.metrics.get(f"{key}/high")) for r in variants
        }
        for rubric in rubrics
        for key in [f"judge/{rubric}_kappa"]
    }
    columns: list[Column] = [("variant", lambda r: r.model)]
    columns += [
        (f"{rubric} [95 % interval]", lambda r, key=f"judge/{rubric}_kappa": interval(r, key))  # type: ignore[misc]
        for rubric in rubrics
    ]
    columns.append(_metric("judged answers", "judge/grounded_kappa/n"))
    told = "Agreement with the labels beyond chance (Cohen's kappa; helpful: quadratic weights). 0 is chance, 1 is perfect."
    return paragraph(told) + charts.bars(groups, "kappa") + _table(variants, columns)


#: series -> label and factor
OVER_TIME = {
    "output_throughput": ("tokens/s", 1.0), "ram_bytes": ("RAM, MB", 1e-6), "cpu_mhz": ("CPU, MHz", 1.0),
    "cpu_celsius": ("CPU, °C", 1.0), "gpu_mhz": ("GPU, MHz", 1.0), "gpu_celsius": ("GPU, °C", 1.0),
}  # fmt: skip


def sustained(result: Result) -> str:
    """Throughput, memory and clocks over time; quantities the system does not tell are named."""
    run = next(iter(result.of("sustained")), None)
    if run is None:
        return ""
    seconds = [float(t or 0) for t in run.series["seconds"]]
    known, missing = {}, []
    for key, (label, factor) in OVER_TIME.items():
        values = [v for v in run.series.get(key, []) if v is not None]
        if len(values) == len(seconds):
            known[label] = [v * factor for v in values]
        else:
            missing.append(label.split(",")[0] + label.split(",")[-1])
    rows = [[f"{t:.0f}", *(f"{values[n]:.4g}" for values in known.values())] for n, t in enumerate(seconds)]
    told = f"Last tenth of the time over the first: {number(run.metrics.get('last_to_first'))}."
    untold = f" Not readable here: {', '.join(missing)}." if missing else ""
    drawn = charts.over_time({label: (seconds, values) for label, values in known.items()}, "seconds")
    return paragraph(told + untold) + drawn + table(["second", *known], rows[:: max(1, len(rows) // 20)])


def energy(result: Result) -> str:
    columns: list[Column] = [
        ("model", lambda r: r.model), _case("batch", "batch"), _metric("joules per token", "joules_per_token"),
        _metric("watts", "watts"), _metric("idle watts", "idle_watts"), ("meter", lambda r: r.note),
    ]  # fmt: skip
    return _table(result.of("energy"), columns) if result.of("energy") else ""


def peers(result: Result) -> str:
    columns: list[Column] = [
        SIDE, ("case", case_text), _metric("output tokens/s", "output_throughput"), TTFT, TPOT,
        _metric("trained or scored tokens/s", "tokens_per_second"), ("note", lambda r: r.note),
    ]  # fmt: skip
    return _table(result.of("peers"), columns) if result.of("peers") else ""


# --- how figures are written -----------------------------------------------------------------------------------------


def times(record: Record, name: str) -> str:
    values = [record.metrics.get(f"{kind}_{name}_ms") for kind in ("median", "p90", "p99")]
    return SLASH.join(number(v) for v in values) if any(v is not None for v in values) else NONE


def interval(record: Record, key: str) -> str:
    value, low, high = (record.metrics.get(key + end) for end in ("", "/low", "/high"))
    return f"{number(value)} [{number(low)}, {number(high)}]" if low is not None else number(value)


def number(value: float | str | None) -> str:
    """Three significant digits; whole numbers from 100 on."""
    if value is None or isinstance(value, str):
        return value or NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def megabytes(size: float | None) -> str:
    return NONE if size is None else f"{size / 1e6:,.1f}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else NONE


def case_text(record: Record) -> str:
    return " ".join(f"{key}={value}" for key, value in record.case.items())


def _where(result: Result, suite: str, **case: str | int) -> list[Record]:
    return [r for r in result.of(suite) if all(r.case.get(key) == value for key, value in case.items())]


def _table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    return table([head for head, _ in columns], [[cell(r) for _, cell in columns] for r in records])


def _metric(head: str, key: str) -> Column:
    return head, lambda r: number(r.metrics.get(key))


def _case(head: str, key: str) -> Column:
    return head, lambda r: number(r.case.get(key))


def _sides(records: Sequence[Record], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    """model -> points of a figure over a condition (or over another figure), null ones left out."""
    sides: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        place, value = r.case.get(x, r.metrics.get(x)), r.metrics.get(y)
        if value is not None and place is not None:
            sides.setdefault(r.model, []).append((float(place), value))
    return sides


def _notes(records: Sequence[Record]) -> str:
    return "".join(paragraph(note) for note in dict.fromkeys(r.note for r in records if r.note))
