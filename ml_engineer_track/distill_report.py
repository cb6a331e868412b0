"""The report of a distillation: lines in the terminal, `artifacts/reports/distill.json` for programs, `distill.html` for people.

    python -m ml_engineer_track distill      (its last step)

Whether a goal was reached is computed from the figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.distill import NO_TEACHER, STUDENT, Trained
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.publish import Published
from ml_engineer_track.report import QUALITY
from ml_engineer_track.student import LARGEST
from shared.files import write_json, write_text
from shared.metrics import Estimate
from shared.page import document, heading, paragraph, table
from shared.settings import Settings

#: What a student must keep of its teacher's scores, and how much faster it must be.
KEEP, FASTER = 0.92, 2.0
GOALS = (("evidence F1", "grounded/evidence_f1"), ("decision accuracy", "grounded/decision_accuracy"))
_NONE = Estimate(value=None, low=None, high=None, n=0)


@dataclass(frozen=True)
class Distillation:
    """Everything a finished run knows. `published` is None for a teacher that is no published version."""

    settings: Settings
    data: CuratedData
    trained: dict[str, Trained]
    scores: dict[str, Scores]
    figures: dict[str, Any]
    published: Published | None
    seconds: dict[str, float]


def write(run: Distillation) -> Path:
    """Write both files, print the figures, return the path of the page."""
    folder = run.settings.artifacts / "reports"
    write_json(folder / "distill.json", facts(run))
    write_text(folder / "distill.html", page(run))
    print(text(run.scores))
    for found in findings(run):
        print(f"  {'yes' if found['reached'] else 'NO ':3} {found['claim']}: {found['value']}")
    print(f"model:  {run.published.folder if run.published else 'not published: the teacher is no published version'}")
    print(f"report: {folder / 'distill.html'}  (figures: {folder / 'distill.json'})")
    return folder / "distill.html"


def text(scores: dict[str, Scores]) -> str:
    """The goals' figures of every model, one line a figure."""
    return "\n".join(
        f"  {label}: " + ", ".join(f"{name} {score.figures.get(key, _NONE)}" for name, score in scores.items())
        for label, key in GOALS
    )


def facts(run: Distillation) -> dict[str, Any]:
    """The report for programs."""
    return {
        "preset": run.settings.preset,
        "model": run.settings.model,
        "seed": run.settings.seed,
        "version": run.published.version if run.published else None,
        "hardware": run.figures["hardware"],
        "settings": run.settings.distill.model_dump(),
        "data": {"version": run.data.version, "counts": run.data.counts},
        "stage_seconds": run.seconds,
        "training": {name: asdict(side) for name, side in run.trained.items()},
        "quality": {name: {k: e.model_dump() for k, e in s.figures.items()} for name, s in run.scores.items()},
        "benchmark": run.figures,
        "findings": findings(run),
        "samples": run.scores[STUDENT].samples,
    }


def findings(run: Distillation) -> list[dict[str, Any]]:
    """What the run set out to show, with what came out."""
    teacher, student, alone = (run.scores[name].figures for name in ("teacher", STUDENT, NO_TEACHER))
    share = run.trained[STUDENT].share_of_teacher
    small = "the student has at most a third of its teacher's parameters"
    found: list[dict[str, Any]] = [{"claim": small, "value": f"{share:.1%}", "reached": share <= LARGEST}]
    for label, key in GOALS:
        kept = (student[key].value or 0.0) / max(teacher[key].value or 0.0, 1e-9)
        found.append({"claim": f"it keeps at least {KEEP:.0%} of {label}", "value": f"{kept:.1%}", "reached": kept >= KEEP})
    for label, key in GOALS:
        low, high = student[key].low, alone[key].high
        apart = low is not None and high is not None and low > high
        claim = f"it beats the same model without a teacher in {label}, intervals apart"
        found.append({"claim": claim, "value": f"{alone[key]} → {student[key]}", "reached": apart})
    tpot = [next(iter(run.figures["models"][name]["batch"].values()))["tpot"]["p50"] for name in ("teacher", STUDENT)]
    rates = [("transformers", tpot[0] / tpot[1])]
    if served := run.figures["served"]:
        rates.append(("the server's engine", served[STUDENT] / served["teacher"]))
    for where, rate in rates:
        claim = f"it decodes at least {FASTER:.0f} times as fast in {where}, one request"
        found.append({"claim": claim, "value": f"{rate:.2f}", "reached": rate >= FASTER})
    if draft := run.figures["speculative"]:
        value = f"{draft['speed_up']:.2f} times, {draft['acceptance_rate']:.0%} of {draft['draft_tokens']} proposals accepted"
        found.append({"claim": "as a draft it speeds its teacher up", "value": value, "reached": draft["speed_up"] > 1})
        same = "yes" if draft["same_replies"] else "no"
        found.append({"claim": "and changes no reply", "value": same, "reached": draft["same_replies"]})
    return found


def page(run: Distillation) -> str:
    """The report for people."""
    h, s, title = run.figures["hardware"], run.settings, "A student of a third of the size"
    machine = f"{h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}"
    lead = f"Preset {s.preset}, model {s.model}, seed {s.seed}, data {run.data.version}. {machine}."
    claims = [[f["claim"], f["value"], "yes" if f["reached"] else "no"] for f in findings(run)]
    known = [(label, key) for label, key in QUALITY if key in run.scores["teacher"].figures]
    quality = [[label, *(str(s.figures.get(key, _NONE)) for s in run.scores.values())] for label, key in known]
    sides = [
        [t.name, f"{t.parameters:,}", f"{t.share_of_teacher:.1%}", str(t.steps), str(t.on_policy_steps),
         f"{t.best_validation_loss:.4f}", f"{t.seconds:.0f}", f"{t.tokens_per_second:,.0f}"]
        for t in run.trained.values()
    ]  # fmt: skip
    looks = [[t.name, f"{look['step']:.0f}", f"{look['loss']:.4f}"] for t in run.trained.values() for look in t.validation]
    latency = [
        [name, size, *(f"{1e3 * m[key]['p50']:.1f}" for key in ("ttft", "tpot")), f"{m['decode_throughput']:,.0f}"]
        for name in ("teacher", STUDENT)
        for size, m in run.figures["models"][name]["batch"].items()
    ]
    samples = [[s["decoding"], s["question"], s["reply"], s["right"]] for s in run.scores[STUDENT].samples[:10]]
    return document(
        title,
        [
            heading(title, 1),
            paragraph(lead, lead=True),
            paragraph("A worked example made of health leaflets: education, not medical advice."),
            heading("What the run set out to show"),
            table(["claim", "measured", "reached"], claims),
            heading("Quality on the test split"),
            paragraph("Value with 95 % bootstrap interval over rows; the same prompts and decoding for all."),
            table(["metric", *run.scores], quality),
            heading("Training"),
            table(["side", "parameters", "of the teacher", "steps", "on-policy", "best validation loss", "s", "tokens/s"], sides),
            table(["side", "step", "validation loss (weighted mean, nats per reply token)"], looks),
            heading("Latency in transformers"),
            table(["model", "batch", "ttft p50, ms", "tpot p50, ms", "decode tokens/s"], latency),
            heading("In the server's engine"),
            *served(run.figures),
            heading("Answers as they came"),
            paragraph("The student's replies to the first test questions, neither picked nor edited."),
            table(["decoding", "question", "reply", "right answer"], samples),
        ],
    )


def served(figures: dict[str, Any]) -> list[str]:
    """Throughput of each alone, and of the teacher with the student as its draft."""
    if not figures["speculative"]:
        return [paragraph("Not measured: openvino-genai is not installed, or the student cannot be written as GGUF.")]
    d = figures["speculative"]
    rows = [
        *([name, f"{rate:,.0f}", ""] for name, rate in figures["served"].items()),
        ["teacher, its own replies", f"{d['plain_throughput']:,.0f}", ""],
        ["teacher with the student as draft", f"{d['draft_throughput']:,.0f}", f"{d['acceptance_rate']:.1%}"],
    ]
    story = (
        f"One request at a time, prompts cached, {d['prompts']} validation prompts; the first two lines decode a fixed number of "
        f"tokens, the others the {d['tokens']} tokens of the greedy replies, which are "
        f"{'the same' if d['same_replies'] else 'NOT the same'} with and without the draft."
    )
    return [paragraph(story), table(["", "decode tokens/s", "proposals accepted"], rows)]
