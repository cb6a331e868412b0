"""The report on fewer than four bits: lines in the terminal, `artifacts/reports/low_bits.json` and `low_bits.html`.

    python -m ml_engineer_track low-bits      (its last step)

Quality is drawn against the bytes of the whole model; what no other model beats in both is joined by a line (the Pareto front).
Whether a claim holds is computed from the figures.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ml_engineer_track.curate import CuratedData
from ml_engineer_track.evaluate import Scores
from ml_engineer_track.repair import Repaired
from ml_engineer_track.report import QUALITY
from ml_engineer_track.sensitivity import Sensitivity
from shared.files import write_json, write_text
from shared.metrics import Estimate
from shared.page import document, heading, paragraph, svg, table
from shared.settings import Settings

#: label, key, and whether more is better; the panels of the chart
PANELS = (
    ("evidence F1 (grounded)", "grounded/evidence_f1", True),
    ("decision accuracy (grammar)", "grounded/decision_accuracy", True),
    ("divergence from bf16, nats per reply token", "divergence", False),
)
SHOWN = (*((label, key) for label, key, _ in PANELS), ("perplexity of right replies", "perplexity"))
#: The share of bf16's scores that a quantised model is expected to keep, as in publish.py.
KEEP = 0.97
MARKERS = "os^vDP*X<>hpd8"
_NONE = Estimate(value=None, low=None, high=None, n=0)


@dataclass(frozen=True)
class Study:
    """Everything a finished run knows. `sizes` are bytes of weights in memory, adapters included; `chosen` was repaired."""

    settings: Settings
    data: CuratedData
    chosen: str
    sensitivity: Sensitivity
    bits: dict[str, dict[str, int]]
    bits_per_weight: dict[str, float]
    sizes: dict[str, int]
    scores: dict[str, Scores]
    speed: dict[str, Any]
    repaired: Repaired
    seconds: dict[str, float]


def write(study: Study) -> Path:
    """Write both files, print the table and what was found, return the path of the page."""
    folder = study.settings.artifacts / "reports"
    write_json(folder / "low_bits.json", facts(study))
    write_text(folder / "low_bits.html", page(study))
    head, rows = quality_rows(study)
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    for line in (head, *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for found in findings(study):
        print(f"  {'yes' if found['reached'] else 'NO ':3} {found['claim']}: {found['value']}")
    print(f"report: {folder / 'low_bits.html'}  (figures: {folder / 'low_bits.json'})")
    return folder / "low_bits.html"


def facts(study: Study) -> dict[str, Any]:
    """The report for programs."""
    return {
        "preset": study.settings.preset,
        "model": study.settings.model,
        "seed": study.settings.seed,
        "settings": study.settings.low_bits.model_dump(),
        "hardware": study.speed["hardware"],
        "data": {"version": study.data.version, "counts": study.data.counts},
        "stage_seconds": study.seconds,
        "weight_bytes": study.sizes,
        "bits_per_weight": study.bits_per_weight,
        "bits": study.bits,
        "sensitivity": study.sensitivity,
        "quality": {name: {k: e.model_dump() for k, e in s.figures.items()} for name, s in study.scores.items()},
        "pareto": {key: pareto(study, key, up) for _, key, up in PANELS},
        "repair": asdict(study.repaired),
        "speed": study.speed,
        "findings": findings(study),
    }


def findings(study: Study) -> list[dict[str, Any]]:
    """What the run set out to show, with what came out."""
    found: list[dict[str, Any]] = []

    def compare(claim: str, before: str, after: str, key: str, up: bool) -> None:
        a, b = study.scores[before].figures[key], study.scores[after].figures[key]
        better = (b.value or 0.0) > (a.value or 0.0) if up else (b.value or 0.0) < (a.value or 0.0)
        found.append({"claim": claim, "value": f"{a} → {b}", "reached": better})

    everywhere = next(name for name in study.scores if name.endswith("everywhere"))
    fits = study.sizes["mixed"] <= study.sizes[everywhere]
    value = f"{study.sizes['mixed']:,} and {study.sizes[everywhere]:,} bytes"
    found.append({"claim": f"the mixed model is not larger than {everywhere}", "value": value, "reached": fits})
    compare(f"it diverges less from bf16 than {everywhere}", everywhere, "mixed", "divergence", False)
    compare(f"its evidence F1 is higher than that of {everywhere}", everywhere, "mixed", "grounded/evidence_f1", True)
    repaired = f"{study.chosen} repaired"
    compare(f"the repair brings {study.chosen} closer to bf16", study.chosen, repaired, "divergence", False)
    compare(f"the repair raises evidence F1 of {study.chosen}", study.chosen, repaired, "grounded/evidence_f1", True)
    compare(f"the repair raises decision accuracy of {study.chosen}", study.chosen, repaired, "grounded/decision_accuracy", True)
    for label, key in (("evidence F1", "grounded/evidence_f1"), ("decision accuracy", "grounded/decision_accuracy")):
        kept = (study.scores[repaired].figures[key].value or 0.0) / max(study.scores["bf16"].figures[key].value or 0.0, 1e-9)
        claim = f"{repaired} keeps at least {KEEP:.0%} of bf16's {label}"
        found.append({"claim": claim, "value": f"{kept:.1%}", "reached": kept >= KEEP})
    return found


def pareto(study: Study, key: str, up: bool) -> list[str]:
    """The models that no other one beats in both size and a figure, the smallest first."""
    measured = {name: s.figures[key].value for name, s in study.scores.items() if key in s.figures}
    known = [(study.sizes[name], value if up else -value, name) for name, value in measured.items() if value is not None]
    front: list[tuple[int, float, str]] = []
    for size, value, name in sorted(known, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((size, value, name))
    return [name for _, _, name in front]


# --- the page --------------------------------------------------------------------------------------------------------


def page(study: Study) -> str:
    """The report for people."""
    h, s, title = study.speed["hardware"], study.settings, "Fewer than four bits"
    machine = f"{h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}"
    claims = [[f["claim"], f["value"], "yes" if f["reached"] else "no"] for f in findings(study)]
    known = [(label, key) for label, key in QUALITY if key in study.scores["bf16"].figures]
    every = [[label, *(str(x.figures.get(key, _NONE)) for x in study.scores.values())] for label, key in known]
    return document(
        title,
        [
            heading(title, 1),
            paragraph(f"Preset {s.preset}, model {s.model}, seed {s.seed}, data {study.data.version}. {machine}.", lead=True),
            paragraph("A worked example made of health leaflets: education, not medical advice."),
            heading("What the run set out to show"),
            table(["claim", "measured", "reached"], claims),
            paragraph("Differences are read off the figures; where the intervals below overlap, chance can have made them."),
            heading("Quality against size"),
            chart(study),
            paragraph(
                "Sizes are all weights in memory: codes, scales and offsets, LoRA matrices, and whatever stays in bf16. Models "
                "named by bits alone, nf4 and int8 keep their embedding in bf16; `everywhere` and `mixed` do not. The line joins "
                "models that no other beats in both. Divergence is the Kullback-Leibler divergence of the next-token "
                "distribution from bf16's on test rows, weighted as in training; q8_0 and q4_0 are read by an engine that does "
                "not tell it."
            ),
            table(*quality_rows(study)),
            heading("Every metric on the test split"),
            table(["metric", *study.scores], every),
            heading("Which matrix minds how much"),
            *sensitivity(study),
            heading("The repair"),
            *repaired(study),
            heading("Speed and memory"),
            *speed(study),
            heading("Time"),
            table(["stage", "seconds"], [[stage, f"{seconds:.1f}"] for stage, seconds in study.seconds.items()]),
        ],
    )


def quality_rows(study: Study) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the main table, the largest model first."""
    head = ["model", "MB", "of bf16", "bits a packed weight", *(label for label, _ in SHOWN)]
    order = sorted(study.scores, key=lambda name: -study.sizes[name])
    packed = study.bits_per_weight
    return head, [
        [name, f"{study.sizes[name] / 1e6:.2f}", f"{study.sizes[name] / study.sizes['bf16']:.0%}",
         f"{packed[name]:.2f}" if name in packed else "-",
         *(str(study.scores[name].figures.get(key, _NONE)) for _, key in SHOWN)]
        for name in order
    ]  # fmt: skip


def chart(study: Study) -> str:
    """One panel a figure: a point with its interval for each model, and the front."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(14, 4.4))
    for axes, (label, key, up) in zip(panels, PANELS, strict=True):
        for marker, (name, scores) in zip(MARKERS, study.scores.items(), strict=False):
            e = scores.figures.get(key, _NONE)
            if e.value is None:
                continue
            low, high = e.low if e.low is not None else e.value, e.high if e.high is not None else e.value
            bars = [[max(0.0, e.value - low)], [max(0.0, high - e.value)]]
            axes.errorbar(
                study.sizes[name] / 1e6, e.value, yerr=bars, fmt=marker, color="black", ecolor="0.7", capsize=2, label=name,
                markerfacecolor="0.35" if "repaired" in name or name == "mixed" else "white",
            )  # fmt: skip
        front = pareto(study, key, up)
        axes.plot(
            [study.sizes[n] / 1e6 for n in front],
            [study.scores[n].figures[key].value for n in front],
            "k:",
            linewidth=1,
            zorder=0,
        )
        axes.set(xlabel="weights in memory, MB", title=label)
        axes.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=7, frameon=False, bbox_to_anchor=(0.5, -0.14))
    text = svg(figure)
    plt.close(figure)
    return text


def sensitivity(study: Study) -> list[str]:
    """Divergence of the model with one matrix quantised, and the bits each matrix then got."""
    choices = study.settings.low_bits.mixed_choices
    order = sorted(study.sensitivity, key=lambda name: -study.sensitivity[name][min(choices)])
    got = study.bits["mixed"]
    rows = [[name, *(f"{study.sensitivity[name][bits]:.2e}" for bits in choices), str(got[name])] for name in order]
    added = sum(study.sensitivity[name][bits] for name, bits in got.items())
    counts = ", ".join(f"{sum(b == bits for b in got.values())} in {bits}" for bits in sorted(set(got.values())))
    story = (
        f"Each matrix was quantised alone on {study.settings.low_bits.calibration_rows} training rows; divergence in nats per "
        f"reply token. With the bytes of {study.settings.low_bits.mixed_like} bits everywhere the mixed model has {counts} bits. "
        f"That the single divergences add up is an assumption: their sum is {added:.3f}, measured on test rows "
        f"are {study.scores['mixed'].figures['divergence']}."
    )
    return [paragraph(story), table(["matrix", *(f"{bits} bits, nats" for bits in choices), "bits in the mixed model"], rows)]


def repaired(study: Study) -> list[str]:
    r, name = study.repaired, f"{study.chosen} repaired"
    story = (
        f"{r.steps} steps of LoRA with rank {r.rank} beside the frozen packed weights of {study.chosen}, towards bf16's "
        f"distribution on the training rows; {r.seconds:.0f} s. The adapter adds {r.adapter_bytes / 1e6:.2f} MB, counted "
        f"above. On validation rows the divergence went from {r.validation_before:.3f} to {r.validation_after:.3f} nats."
    )
    rows = [
        [label, *(str(study.scores[side].figures.get(key, _NONE)) for side in ("bf16", study.chosen, name))]
        for label, key in SHOWN
    ]
    figure, axes = plt.subplots(figsize=(9, 2.8))
    axes.plot(range(1, len(r.loss) + 1), r.loss, color="0.3", linewidth=1)
    axes.set(xlabel="step", ylabel="divergence, nats")
    text = svg(figure)
    plt.close(figure)
    return [paragraph(story), text, table(["", "bf16", "before", "after"], rows)]


def speed(study: Study) -> list[str]:
    f, plain = study.speed, study.speed["plain"]
    rate = {name: m["decode_throughput"] for name, m in f["models"].items()}
    rows = [
        [
            name,
            f"{1e3 * m['ttft']['p50']:.1f}",
            f"{1e3 * m['tpot']['p50']:.2f}",
            f"{rate[name]:,.1f}",
            f"{rate[name] / rate[plain]:.2f}",
        ]
        for name, m in f["models"].items()
    ]
    memory = [
        [name, *("-" if m[key] is None else f"{m[key] / 1e6:.1f}" for key in ("max_ram", "model_ram", "max_allocated"))]
        for name, m in f["memory"].items()
    ]
    slowest = min(rate[name] / rate[plain] for name in rate if name != plain)
    return [
        paragraph(
            f"One request at a time. Packed layers unpack their whole matrix for every token, here down to {slowest:.2f} times "
            f"the speed of {plain}: without a kernel made for it, a packed weight is a slow one. Its place is quality at a "
            f"size, and memory. Other programs used {f['busy_share']:.0%} of the machine at the start."
        ),
        table(["model", "ttft p50, ms", "tpot p50, ms", "decode tokens/s", f"times {plain}"], rows),
        table(["model", "peak process memory, MB", "of it the model's, MB", "peak VRAM, MB"], memory),
    ]
