"""The report of a run: one table in the terminal, `artifacts/reports/ml.json` for programs, `ml.html` for people.

    python -m ml_engineer_track run      (its last step)

Every chart on the page is followed by the table it was drawn from. Whether a goal was reached is computed from the figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.finetune import Tuned
from ml_engineer_track.publish import Published
from ml_engineer_track.quantize import Variants
from shared.files import write_json, write_text
from shared.metrics import Estimate
from shared.page import document, heading, links, paragraph, svg, table
from shared.settings import Settings

#: label, key in Scores.figures; the order of every quality table
QUALITY = (
    ("evidence F1 (grounded)", "grounded/evidence_f1"),
    ("evidence F1 of always quoting [1]", "first_source/evidence_f1"),
    ("evidence F1 (free)", "free/evidence_f1"),
    ("citation precision (free)", "free/citation_precision"),
    ("citation recall (free)", "free/citation_recall"),
    ("answers what it can (grounded)", "grounded/answer_rate"),
    ("correct refusal (grounded)", "grounded/correct_refusal"),
    ("correct refusal (free)", "free/correct_refusal"),
    ("decision accuracy (grammar)", "grounded/decision_accuracy"),
    ("decision accuracy (free)", "free/decision_accuracy"),
    ("  of these: answer", "grounded/decision_accuracy_answer"),
    ("  of these: clarify", "grounded/decision_accuracy_clarify"),
    ("  of these: escalate", "grounded/decision_accuracy_escalate"),
    ("  of these: decline", "grounded/decision_accuracy_decline"),
    ("valid JSON without a grammar", "free/json_validity"),
    ("judge kappa: grounded", "judge/grounded_kappa"),
    ("judge kappa: safe", "judge/safe_kappa"),
    ("judge kappa: helpful (quadratic)", "judge/helpful_kappa"),
    ("judge accuracy: grounded", "judge/grounded_accuracy"),
    ("judge accuracy: safe", "judge/safe_accuracy"),
    ("perplexity of right replies", "perplexity"),
)
TERMINAL = (
    "grounded/evidence_f1",
    "first_source/evidence_f1",
    "free/evidence_f1",
    "grounded/correct_refusal",
    "grounded/decision_accuracy",
    "judge/grounded_kappa",
)
HATCHES = ("", "//", "..", "xx", "--", "\\\\")
LINES = ("ko-", "ks--", "k^:", "kd-.", "kx-")
SHOWN_SAMPLES = 10
#: pages that other commands leave beside this one, and what they answer
STUDIES = (
    ("distill", "A student of a third of the size: what it keeps (make distill)"),
    ("low_bits", "Below four bits: quality against size (make quantize BITS=2)"),
    ("kernels", "The Triton kernels: right, and how fast (make kernels)"),
    ("tune", "The preset's settings beside the best found (make tune)"),
    ("accounting", "Memory and FLOPs of a training step, predicted and measured (make accounting)"),
    ("drift", "The watch for drift, on weeks of which we know what happened (make drift-study)"),
    ("loop", "What the product got wrong becomes the next model (make loop)"),
)


@dataclass(frozen=True)
class Run:
    """Everything a finished run knows."""

    settings: Settings
    data: CuratedData
    tuned: Tuned
    variants: Variants
    scores: dict[str, Scores]
    figures: dict[str, Any]
    published: Published
    seconds: dict[str, float]


def write(run: Run) -> Path:
    """Write both files, print the table, return the path of the page."""
    folder = run.settings.artifacts / "reports"
    write_json(folder / "ml.json", facts(run))
    write_text(folder / "ml.html", page(run))
    print_table(run)
    print(f"model:  {run.published.folder}\nreport: {folder / 'ml.html'}  (figures: {folder / 'ml.json'})")
    return folder / "ml.html"


def markdown(report: dict[str, Any]) -> str:
    """The README's results block, from `ml.json`."""
    names = list(report["quality"])
    hardware = report["hardware"]
    lines = ["| | " + " | ".join(_shown(n) for n in names) + " |", "|---|" + "---|" * len(names)]
    lines += ["| " + " | ".join([label, *values]) + " |" for label, values in report["glance"]]
    goals = [f"| {f['claim']} | {f['value']} | {'yes' if f['reached'] else '**no**'} |" for f in report["findings"]]
    rows = report["quality"]["bf16"]
    counts = ", ".join(
        f"{rows[key]['n']} {what}"
        for key, what in (
            ("grounded/evidence_f1", "answerable questions"),
            ("grounded/correct_refusal", "unanswerable ones"),
            ("grounded/decision_accuracy", "messages to decide on"),
            ("judge/grounded_kappa", "judged answers"),
        )
    )
    machine = f"{hardware['cpu_info']}, {hardware['n_threads']} threads, GPU: {hardware['gpu_info'] or 'none'}"
    return "\n".join(
        [
            f"Test split: {counts}; value [95 % bootstrap interval], seed {report['seed']}. {machine}. "
            f"Wall time of all stages: {report['total_seconds'] / 60:.1f} minutes.",
            "",
            *lines,
            "",
            "| goal | measured | reached |",
            "|---|---|---|",
            *goals,
        ]
    )


def facts(run: Run) -> dict[str, Any]:
    """The report for programs."""
    return {
        "preset": run.settings.preset,
        "model": run.settings.model,
        "seed": run.settings.seed,
        "version": run.published.version,
        "hardware": run.figures["hardware"],
        "stage_seconds": run.seconds,
        "total_seconds": sum(run.seconds.values()),
        "data": {"version": run.data.version, "counts": run.data.counts, "dropped": run.data.dropped},
        "training": asdict(run.tuned),
        "weight_bytes": run.variants.weight_bytes,
        "quality": {name: {k: e.model_dump() for k, e in s.figures.items()} for name, s in run.scores.items()},
        "benchmark": run.figures,
        "findings": findings(run),
        "glance": glance(run),
        "samples": run.scores["bf16"].samples,
    }


def findings(run: Run) -> list[dict[str, Any]]:
    """What the run set out to show, with what came out; `reached` is computed, never written by hand."""
    found: list[dict[str, Any]] = []
    base, tuned = run.scores["base"].figures, run.scores["bf16"].figures
    for label, key in (("evidence F1", "grounded/evidence_f1"), ("decision accuracy", "grounded/decision_accuracy")):
        low, high = tuned[key].low, base[key].high
        apart = low is not None and high is not None and low > high
        found.append(
            {"claim": f"tuning raises {label}, intervals apart", "value": f"{base[key]} → {tuned[key]}", "reached": apart}
        )
        if "nf4" in run.scores:
            kept = (run.scores["nf4"].figures[key].value or 0.0) / max(tuned[key].value or 0.0, 1e-9)
            found.append({"claim": f"NF4 keeps at least 97 % of {label}", "value": f"{kept:.1%}", "reached": kept >= 0.97})
    sizes = run.variants.weight_bytes
    if "nf4" in sizes:
        share = sizes["nf4"] / sizes["bf16"]
        found.append(
            {"claim": "NF4 weights take at most 0.45 of bf16's memory", "value": f"{share:.3f}", "reached": share <= 0.45}
        )
    ratio = run.figures["training"]["ratio"]
    claim = "fine-tuning at least 1.3 times transformers.Trainer's throughput"
    found.append({"claim": claim, "value": f"{ratio:.2f}", "reached": ratio >= 1.3})
    return found


def print_table(run: Run) -> None:
    """Base, tuned and the quantised variants side by side."""
    shown = Table(title="test split, value [95 % interval]", title_justify="left")
    shown.add_column("")
    for name in run.scores:
        shown.add_column(_shown(name), justify="right", no_wrap=True)
    for label, values in glance(run):
        shown.add_row(label, *values)
    Console(width=34 + 24 * len(run.scores)).print(shown)


def glance(run: Run) -> list[tuple[str, list[str]]]:
    """The final table as text: quality, then size, memory and latency."""
    labels = {key: label for label, key in QUALITY}
    rows = [(labels[key], [str(s.figures.get(key, _NONE)) for s in run.scores.values()]) for key in TERMINAL]
    sizes = {"base": run.variants.weight_bytes["bf16"], **run.variants.weight_bytes}
    models = [run.figures["models"].get(name) for name in run.scores]  # None: a GGUF file, measured by benchmarks/serving
    batch = next(iter(run.figures["models"]["base"]["batch"]))

    def shown(value: Callable[[dict[str, Any]], str]) -> list[str]:
        return ["-" if model is None else value(model) for model in models]

    return [
        *rows,
        ("weights in memory, MB", [f"{sizes[name] / 1e6:.1f}" for name in run.scores]),
        ("on disk, MB", [_mb(m["disk_bytes"] if m else sizes[name]) for name, m in zip(run.scores, models, strict=True)]),
        ("peak process memory, MB", shown(lambda m: _mb(m["memory"]["max_ram"]))),
        ("peak VRAM, MB", shown(lambda m: _mb(m["memory"]["max_process_vram"]))),
        (f"ttft p50, ms (batch {batch})", shown(lambda m: f"{1e3 * m['batch'][batch]['ttft']['p50']:.1f}")),
        (f"tpot p50, ms (batch {batch})", shown(lambda m: f"{1e3 * m['batch'][batch]['tpot']['p50']:.2f}")),
    ]


def page(run: Run) -> str:
    """The report for people."""
    title = f"From leaflets to a 4-bit model: {run.published.version}"
    parts = [opening(run), quality(run), training(run), latency(run), data(run), samples(run), time(run)]
    return document(title, [heading(title, 1), *parts, studies(run.settings.artifacts / "reports")])


def opening(run: Run) -> str:
    h, s = run.figures["hardware"], run.settings
    machine = f"{h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}"
    claims = [[f["claim"], f["value"], "yes" if f["reached"] else "no"] for f in findings(run)]
    return (
        paragraph(f"Preset {s.preset}, model {s.model}, seed {s.seed}, data {run.data.version}. {machine}.", lead=True)
        + paragraph("A worked example made of health leaflets: education, not medical advice.")
        + heading("What the run set out to show")
        + table(["claim", "measured", "reached"], claims)
        + heading("At a glance")
        + table(["", *map(_shown, run.scores)], [[label, *values] for label, values in glance(run)])
    )


def quality(run: Run) -> str:
    known = [(label, key) for label, key in QUALITY if key in run.scores["bf16"].figures]
    rows = [
        [label, str(run.scores["bf16"].figures[key].n), *(str(s.figures.get(key, _NONE)) for s in run.scores.values())]
        for label, key in known
    ]
    return (
        heading("Quality on the test split")
        + paragraph(
            "Value with 95 % bootstrap interval over rows. Base and tuned get the same prompts and the same decoding. Grounded "
            "replies are decoded under a grammar of the given sentences (decisions: of their JSON schema), free ones are not. "
            "q8_0 and q4_0 are asked through the engine that serves them, which tells no perplexity."
        )
        + quality_chart(run.scores, [pair for pair in known if pair[1] in TERMINAL])
        + table(["metric", "rows", *map(_shown, run.scores)], rows)
    )


def training(run: Run) -> str:
    t, rates = run.tuned, run.figures["training"]
    story = (
        f"{t.method}, {t.steps} steps, {t.seconds:.0f} s, {t.tokens_per_second:,.0f} tokens/s; MFU {t.mfu:.2f} of the "
        f"matrix-product peak measured here; waiting for data {t.data_wait_share:.1%} of the time"
        f"{'; stopped early' if t.stopped_early else ''}."
    )
    sides = [
        ["this loop", f"{rates['tokens_per_second']:,.0f}"],
        ["transformers.Trainer", f"{rates['trainer_tokens_per_second']:,.0f}"],
        ["ratio", f"{rates['ratio']:.2f}"],
    ]
    return (
        heading("Fine-tuning")
        + paragraph(story)
        + loss_chart(t)
        + table(
            ["step", "validation loss (weighted mean, nats per reply token)"],
            [[f"{v['step']:.0f}", f"{v['loss']:.4f}"] for v in t.validation],
        )
        + heading("Throughput beside transformers.Trainer", 3)
        + paragraph("Default collation, the same rows, steps, dtype and optimiser; the sides take turns. Tokens without padding.")
        + table(["", "tokens/s"], sides)
    )


def latency(run: Run) -> str:
    options, models = run.settings.benchmark, run.figures["models"]
    rows = [
        [_shown(n), b, _ms(m["ttft"]), _ms(m["tpot"]), f"{m['prefill_throughput']:,.0f}", f"{m['decode_throughput']:,.0f}"]
        for n in models
        for b, m in models[n]["batch"].items()
    ]
    head = ["model", "batch", "ttft p50 / p90 / p99, ms", "tpot p50 / p90 / p99, ms", "prefill tokens/s", "decode tokens/s"]
    return (
        heading("Latency")
        + paragraph(
            f"{options.prompt_tokens} prompt and {options.new_tokens} new tokens, greedy, one warm-up, {options.repeats} "
            f"repeats. Other programs used {run.figures['busy_share']:.0%} of the machine at the start."
        )
        + latency_chart(models)
        + table(head, rows)
    )


def data(run: Run) -> str:
    skills = ("answer", "decide", "clarify", "judge")
    counts = [[split, *(str(c.get(skill, 0)) for skill in skills)] for split, c in run.data.counts.items()]
    dropped = json.dumps(run.data.dropped)
    where = run.data.folder / "quarantine.jsonl"
    return (
        heading("Data")
        + table(["split", *skills], counts)
        + paragraph(f"Dropped: {dropped}; each row with its reason in {where}.")
    )


def samples(run: Run) -> str:
    kept = [
        s for d in ("grounded", "free") for s in [x for x in run.scores["bf16"].samples if x["decoding"] == d][:SHOWN_SAMPLES]
    ]
    rows = [[s["decoding"], s["question"], s["reply"], s["right"]] for s in kept]
    title = heading("Answers as they came") + paragraph(
        "The first test questions, neither picked nor edited; from the tuned bf16 model."
    )
    return title + table(["decoding", "question", "reply", "right answer"], rows)


def time(run: Run) -> str:
    rows = [[stage, f"{seconds:.1f}"] for stage, seconds in run.seconds.items()]
    return heading("Time") + table(["stage", "seconds"], [*rows, ["sum", f"{sum(run.seconds.values()):.1f}"]])


def studies(folder: Path) -> str:
    """Links to the pages that are there; nothing when there are none."""
    found = [(says, f"{name}.html") for name, says in STUDIES if (folder / f"{name}.html").exists()]
    return heading("Further studies") + links(found) if found else ""


def quality_chart(scores: dict[str, Scores], shown: Sequence[tuple[str, str]]) -> str:
    figure, axes = plt.subplots(figsize=(9, 3.6))
    width = 0.8 / len(scores)
    for i, (name, score) in enumerate(scores.items()):
        estimates = [score.figures[key] for _, key in shown]
        values = [e.value or 0.0 for e in estimates]
        below = [max(0.0, v - (e.low or 0.0)) for v, e in zip(values, estimates, strict=True)]
        above = [max(0.0, (e.high or 0.0) - v) for v, e in zip(values, estimates, strict=True)]
        places = [k + (i - (len(scores) - 1) / 2) * width for k in range(len(shown))]
        grey, hatch = str(0.94 - 0.13 * (i % len(HATCHES))), HATCHES[i % len(HATCHES)]
        axes.bar(
            places, values, width, yerr=[below, above], capsize=3, label=_shown(name), color=grey, edgecolor="black", hatch=hatch
        )
    axes.set_xticks(range(len(shown)), [label.replace(" (", "\n(") for label, _ in shown], fontsize=9)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1)
    axes.legend(frameon=False, ncols=len(scores), loc="upper center", bbox_to_anchor=(0.5, 1.16))
    return _closed(figure)


def loss_chart(tuned: Tuned) -> str:
    figure, axes = plt.subplots(figsize=(9, 3))
    axes.plot(range(1, len(tuned.loss) + 1), tuned.loss, color="0.6", linewidth=1, label="training, per step")
    axes.plot(
        [v["step"] for v in tuned.validation], [v["loss"] for v in tuned.validation], "ko-", markersize=4, label="validation"
    )
    axes.set(xlabel="step", ylabel="weighted loss, nats")
    axes.legend(frameon=False)
    return _closed(figure)


def latency_chart(models: dict[str, Any]) -> str:
    figure, axes = plt.subplots(figsize=(9, 3))
    for (name, model), style in zip(models.items(), LINES, strict=False):
        axes.plot(list(model["batch"]), [m["decode_throughput"] for m in model["batch"].values()], style, label=_shown(name))
    axes.set(xlabel="batch size", ylabel="decode, tokens/s")
    axes.legend(frameon=False)
    return _closed(figure)


def _closed(figure: Any) -> str:
    text = svg(figure)
    plt.close(figure)
    return text


def _shown(name: str) -> str:
    return "tuned (bf16)" if name == "bf16" else name


def _ms(p: dict[str, float]) -> str:
    return " / ".join(f"{1e3 * p[k]:.1f}" for k in ("p50", "p90", "p99"))


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


_NONE = Estimate(value=None, low=None, high=None, n=0)
