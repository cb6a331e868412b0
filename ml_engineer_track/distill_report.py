"""The report of a distillation: lines in the terminal, `artifacts/reports/distill.json` for programs, `distill.html` for people.

    python -m ml_engineer_track distill      (its last step)

Whether a goal was reached is computed from the figures, and on the side of doubt: models are compared row by row, speeds turn by
turn, and the whole 95 % interval of the ratio or difference must be on the right side of the goal. `on average` says that the
figure itself is and its interval is not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.distill import FROM_SCRATCH, NO_TEACHER, SERVED_STUDENT, STUDENT, Trained
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.publish import Published
from ml_engineer_track.report import QUALITY
from ml_engineer_track.student import LARGEST
from shared.files import write_json, write_text
from shared.metrics import Estimate, estimate_difference, estimate_ratio
from shared.page import document, heading, paragraph, table
from shared.settings import Settings

#: What a student must keep of its teacher's scores, and how much faster it must be.
KEEP, FASTER = 0.92, 2.0
#: What must reach the goals: the student as it was trained, and as the server has it.
STUDENTS = (STUDENT, SERVED_STUDENT)
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
        print(f"  {found['verdict']:10} {found['claim']}: {found['value']}")
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
        "worth": [{"part": part, "metric": label, **e.model_dump()} for part, label, e in worth(run)],
        "samples": run.scores[STUDENT].samples,
    }


def findings(run: Distillation) -> list[dict[str, Any]]:
    """What the run set out to show, with what came out."""
    alone, share = run.scores[NO_TEACHER].figures, run.trained[STUDENT].share_of_teacher
    small = "the student has at most a third of its teacher's parameters"
    found = [finding(small, f"{share:.1%}", "yes" if share <= LARGEST else "no")]
    students = [name for name in STUDENTS if name in run.scores]
    for name in students:
        for label, key in GOALS:
            kept = kept_of_teacher(run, name, key)
            found.append(finding(f"{name} keeps at least {KEEP:.0%} of its teacher's {label}", str(kept), verdict(kept, KEEP)))
    for name in students:
        for label, key in GOALS:
            gain, own, other = gained(run, name, NO_TEACHER, key), run.scores[name].figures[key], alone[key]
            above = verdict(gain, 0.0, strictly=True)
            found.append(finding(f"{name} beats the same student without a teacher in {label}, row by row", signed(gain), above))
            apart = own.low is not None and other.high is not None and own.low > other.high
            value = f"{other} → {own}"
            found.append(finding(f"{name} and {NO_TEACHER}: intervals of {label} apart", value, "yes" if apart else "no"))
    for name, where, measured in ((STUDENT, "transformers", "decoding"), (SERVED_STUDENT, "the server's engine", "served")):
        if figures := run.figures[measured]:
            ratio = Estimate.model_validate(figures["ratio"])
            claim = f"{name} decodes at least {FASTER:.0f} times as fast as its teacher in {where}, one request, no grammar"
            found.append(finding(claim, str(ratio), verdict(ratio, FASTER)))
    if draft := run.figures["speculative"]:
        faster = Estimate.model_validate(draft["speed_up"])
        value = f"{faster} times, {draft['acceptance_rate']:.0%} of {draft['draft_tokens']} proposals accepted"
        found.append(finding("as a draft it speeds its teacher up", value, verdict(faster, 1.0, strictly=True)))
        same = "yes" if draft["same_replies"] else "no"
        found.append(finding("and changes no reply", same, same))
    return found


def finding(claim: str, value: str, found: str) -> dict[str, Any]:
    return {"claim": claim, "value": value, "verdict": found, "reached": found == "yes"}


def verdict(measured: Estimate, goal: float, strictly: bool = False) -> str:
    """`yes` when the whole interval is at or above (`strictly`: above) the goal, `on average` when the figure is, else `no`."""
    above = [e is not None and (e > goal if strictly else e >= goal) for e in (measured.low, measured.value)]
    return "yes" if all(above) else "on average" if above[1] else "no"


def kept_of_teacher(run: Distillation, name: str, key: str) -> Estimate:
    """A model's score as a share of its teacher's, over the same rows."""
    ours, theirs = (run.scores[side].rows[key] for side in (name, "teacher"))
    return estimate_ratio(ours, theirs, run.settings.evaluate.bootstrap, run.settings.seed)


def gained(run: Distillation, name: str, other: str, key: str) -> Estimate:
    """What one model scores above another, over the same rows."""
    ours, theirs = (run.scores[side].rows[key] for side in (name, other))
    return estimate_difference(ours, theirs, run.settings.evaluate.bootstrap, run.settings.seed)


def signed(difference: Estimate) -> str:
    if difference.value is None or difference.low is None:
        return "-"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def worth(run: Distillation) -> list[tuple[str, str, Estimate]]:
    """What each part of the recipe added: (part, metric, paired difference)."""
    parts = (
        ("a start cut out of the teacher, beside random weights", NO_TEACHER, FROM_SCRATCH),
        ("the teacher's view, beside the task alone", STUDENT, NO_TEACHER),
        ("what the student lacks of its teacher", STUDENT, "teacher"),
        ("what 8 bits cost the student", SERVED_STUDENT, STUDENT),
    )
    there = [part for part in parts if part[1] in run.scores and part[2] in run.scores]
    return [(what, label, gained(run, name, other, key)) for what, name, other in there for label, key in GOALS]


def page(run: Distillation) -> str:
    """The report for people."""
    h, s, title = run.figures["hardware"], run.settings, "A student of a third of the size"
    machine = f"{h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}"
    lead = f"Preset {s.preset}, model {s.model}, seed {s.seed}, data {run.data.version}. {machine}."
    claims = [[f["claim"], f["value"], f["verdict"]] for f in findings(run)]
    parts = [[part, label, signed(e)] for part, label, e in worth(run)]
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
            paragraph(
                "Ratios and differences are paired: over the same rows, or over turns taken right after each other. yes: the "
                "whole 95 % interval reaches the goal; on average: the figure does, its interval does not."
            ),
            heading("What each part was worth"),
            paragraph(
                f"{STUDENT}, {NO_TEACHER} and {FROM_SCRATCH} have the same architecture, the same rows in the same order and at "
                f"most as many steps. {NO_TEACHER} starts where {STUDENT} starts and learns from the task alone; {FROM_SCRATCH} "
                "does so from random weights. Differences are paired, over the same test rows."
            ),
            table(["part", "metric", "difference"], parts),
            heading("Quality on the test split"),
            paragraph("Value with 95 % bootstrap interval over rows; the same prompts and decoding for all."),
            table(["metric", *run.scores], quality),
            heading("Training"),
            table(["side", "parameters", "of the teacher", "steps", "on-policy", "best validation loss", "s", "tokens/s"], sides),
            table(["side", "step", "validation loss (weighted mean, nats per reply token)"], looks),
            heading("Decoding speed"),
            *speeds(run.figures),
            heading("Latency in transformers"),
            paragraph("Each model by itself, after the other: for the effect of batching, not for the ratio."),
            table(["model", "batch", "ttft p50, ms", "tpot p50, ms", "decode tokens/s"], latency),
            heading("Answers as they came"),
            paragraph("The student's replies to the first test questions, neither picked nor edited."),
            table(["decoding", "question", "reply", "right answer"], samples),
        ],
    )


def speeds(figures: dict[str, Any]) -> list[str]:
    """Who decodes how fast, alone and with a draft, and by what ratio."""
    rows = [
        [where, name, f"{rate:,.0f}", "" if name == "teacher" else str(Estimate.model_validate(f["ratio"])), ""]
        for where, f in (("transformers", figures["decoding"]), ("the server's engine, q8_0", figures["served"]))
        if f
        for name, rate in f["throughput"].items()
    ]
    new = figures["decoding"]["new_tokens"]
    story = f"One request at a time, no grammar, exactly {new} new tokens, sides in turns; a ratio of 2 is twice as fast."
    if not (d := figures["speculative"]):
        story += " The server's engine is not measured: it is not installed, or the student cannot be written as GGUF."
    else:
        rows += [
            ["the server's engine, q8_0", "teacher, its own replies", f"{d['plain_throughput']:,.0f}", "", ""],
            ["the server's engine, q8_0", "teacher with the student as draft", f"{d['draft_throughput']:,.0f}",
             str(Estimate.model_validate(d["speed_up"])), f"{d['acceptance_rate']:.1%}"],
        ]  # fmt: skip
        story += (
            f" The last two lines decode the greedy replies to {d['prompts']} validation prompts to their ends, {d['tokens']} "
            f"tokens, which are {'the same' if d['same_replies'] else 'NOT the same'} with and without the draft."
        )
    return [paragraph(story), table(["engine", "model", "decode tokens/s", "ratio", "proposals accepted"], rows)]
