"""The report of the AI track: `artifacts/reports/ai.json` for programs, `ai.html` for people, one table in the terminal.

Why an AI engineer opens it with the judge's own marks: every figure that a model gave about a model is worth as much as its
agreement with the data set's labels, so that agreement comes first. Whether a goal was reached is computed from the figures.

    python -m ai_engineer_track run      (make ai; its last step)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from shared.files import write_json, write_text
from shared.metrics import Estimate
from shared.page import document, heading, paragraph, svg, table

#: claim, path of the figure in the report, what it must satisfy
GOALS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("a right leaflet among the first five (recall@5)", ("retrieval", "used", "leaflet/recall@5"), ">=", 0.95),
    ("emergencies sent to the emergency number (sensitivity)", ("triage", "sensitivity"), ">=", 0.98),
    ("near misses not sent there (specificity)", ("triage", "specificity"), ">=", 0.85),
    ("emergencies sent there, or answered under a warning", ("triage", "found"), ">=", 0.98),
    ("unanswerable questions refused", ("suite", "success", "unanswerable"), ">=", 0.85),
    ("answerable questions answered", ("suite", "answer_rate"), ">=", 0.90),
    ("needless questions back on answerable ones", ("suite", "needless_questions"), "<=", 0.10),
    ("final leaflet right more often with questions than without", ("clarify", "gain"), ">=", 0.15),
    ("quotes that stand verbatim in the library", ("suite", "quotes_verified"), ">=", 0.95),
)


def write(facts: dict[str, Any], folder: Path) -> Path:
    """Write both files, print the table, return the path of the page."""
    facts["goals"] = goals(facts)
    write_json(folder / "ai.json", facts)
    write_text(folder / "ai.html", page(facts))
    print_table(facts)
    print(f"report: {folder / 'ai.html'}  (figures: {folder / 'ai.json'})")
    return folder / "ai.html"


def goals(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal with what came out; `reached` is None where nothing could be measured."""
    found = []
    for claim, path, relation, bar in GOALS:
        figure = _at(facts, path)
        value = figure.value if figure else None
        reached = None if value is None else (value >= bar if relation == ">=" else value <= bar)
        found.append({"claim": f"{claim} {relation} {bar}", "value": str(figure or "-"), "reached": reached})
    first_word = (facts.get("suite") or {}).get("first_word_s")
    p50 = first_word["p50"] if first_word else None
    found.append(
        {
            "claim": "median time to the first word <= 1.5 s",
            "value": "-" if p50 is None else f"{p50:.2f} s",
            "reached": None if p50 is None else p50 <= 1.5,
        }
    )
    return found


def print_table(facts: dict[str, Any]) -> None:
    """Goals in the terminal."""
    shown = Table(title="test split, value [95 % interval]", title_justify="left")
    for column in ("goal", "measured", "reached"):
        shown.add_column(column)
    for goal in facts["goals"]:
        shown.add_row(goal["claim"], goal["value"], _yes(goal["reached"]))
    Console(width=130).print(shown)


def page(facts: dict[str, Any]) -> str:
    """The report for people."""
    h = facts["hardware"]
    title = f"From a message to an answer: {facts['model']}"
    lead = (
        f"Preset {facts['preset']}, seed {facts['seed']}, index {facts['index']['version']} with {facts['index']['passages']} "
        f"passages. {h['cpu_info']}, {h['n_threads']} threads, {h['memory_gib']} GiB; GPU: {h['gpu_info'] or 'none'}."
    )
    parts = [
        heading(title, 1),
        paragraph(lead, lead=True),
        paragraph("A worked example made of health leaflets: education, not medical advice."),
        heading("How far to trust the judge"),
        paragraph(
            "The same judge marks every answer below. Beside labels that people gave, it agrees this far beyond chance (kappa: "
            "0 is chance, 1 is always). Where kappa is near 0, its marks say nothing, and the rules of each scenario count alone."
        ),
        figures_table(facts["judge"]),
        heading("What the run set out to show"),
        table(["goal", "measured", "reached"], [[g["claim"], g["value"], _yes(g["reached"])] for g in facts["goals"]]),
        heading("Conversations with the running service"),
        success_chart(facts["suite"]["success"]),
        figures_table(facts["suite"]),
        *[
            part
            for name in ("retrieval", "triage", "harm", "refusal", "clarify")
            if facts.get(name)
            for part in _part(name, facts)
        ],
        heading("Time"),
        table(["stage", "seconds"], [[k, f"{v:.1f}"] for k, v in facts["seconds"].items()]),
        heading("The ten worst conversations"),
        *[_transcript(t) for t in facts["worst"]],
        heading("One of each kind, as they came"),
        *[_transcript(t) for t in facts["samples"]],
    ]
    return document(title, parts)


def markdown(facts: dict[str, Any]) -> str:
    """The README's block about the product, from `ai.json`."""
    suite, retrieval, clarify, hardware = facts["suite"], facts["retrieval"], facts["clarify"], facts["hardware"]
    modes = [mode for mode in ("dense", "bm25", "fused", "reranked") if mode in retrieval]
    shown = ("leaflet/recall@1", "leaflet/recall@5", "passage/recall@5", "passage/mrr")
    after = [Estimate.model_validate(clarify["accuracy"][key]) for key in sorted(clarify["accuracy"], key=int)]
    lines = [
        f"{suite['conversations']} conversations over HTTP with `{facts['model']}`, {suite['errors']} errors; every part alone "
        f"on the whole test split; value [95 % bootstrap interval], seed {facts['seed']}. {hardware['cpu_info']}, "
        f"{hardware['n_threads']} threads. Wall time: {sum(facts['seconds'].values()) / 60:.1f} minutes.",
        "",
        "| goal | measured | reached |",
        "|---|---|---|",
        *(f"| {g['claim']} | {g['value']} | {_marked(_yes(g['reached']))} |" for g in facts["goals"]),
        "",
        "| kind of conversation | did the right thing | conversations |",
        "|---|---|---|",
        *(f"| {kind.replace('_', ' ')} | {Estimate.model_validate(e)} | {e['n']} |" for kind, e in suite["success"].items()),
        "",
        f"| retrieval ({retrieval[modes[0]][shown[0]]['n']} test questions) | {' | '.join(s.replace('/', ' ') for s in shown)} |",
        "|---|" + "---|" * len(shown),
        *(f"| {mode} | " + " | ".join(f"{retrieval[mode][s]['value']:.3f}" for s in shown) + " |" for mode in modes),
        "",
        f"Final leaflet right after 0, 1, 2, ... questions to a simulated person ({after[0].n} vague openings): "
        f"{', '.join(f'{e.value:.2f}' for e in after)}; with one generic question {clarify['generic_question']['value']:.2f}.",
        "",
        "How far the judge agrees with the data set's labels (kappa; 0 is chance): "
        + ", ".join(f"{name} {Estimate.model_validate(e)}" for name, e in facts["judge"]["kappa"].items())
        + ".",
    ]
    return "\n".join(lines)


def figures_table(figures: Any) -> str:
    """Every figure of a nested result: its path, its value with interval, and the rows behind it."""
    return table(["figure", "value [95 % interval]", "rows"], [[" / ".join(p), *cells] for p, cells in leaves(figures)])


def success_chart(success: dict[str, Any]) -> str:
    figure, axes = plt.subplots(figsize=(9, 3))
    names = list(success)
    estimates = [Estimate.model_validate(success[name]) for name in names]
    values = [e.value or 0.0 for e in estimates]
    below = [v - (e.low if e.low is not None else v) for v, e in zip(values, estimates, strict=True)]
    above = [(e.high if e.high is not None else v) - v for v, e in zip(values, estimates, strict=True)]
    axes.bar(names, values, yerr=[below, above], capsize=3, color="0.8", edgecolor="black")
    axes.set_ylim(0, 1)
    axes.set_ylabel("did the right thing")
    axes.tick_params(axis="x", labelsize=8)
    text = svg(figure)
    plt.close(figure)
    return text


def _part(name: str, facts: dict[str, Any]) -> list[str]:
    titles = {
        "retrieval": "Retrieval on the test questions",
        "triage": "Emergencies",
        "harm": "Harmful requests",
        "refusal": "Does the library answer this?",
        "clarify": "Asking back",
    }
    return [heading(titles[name]), figures_table(facts[name])]


def _transcript(one: dict[str, Any]) -> str:
    lines = [[turn["who"], turn["text"]] for turn in one["transcript"]]
    verdict = "right" if one["ok"] else "wrong"
    return heading(f"{one['kind']}: {one['id']} ({verdict}: {one['why']})", 3) + table(["who", "said"], lines)


def leaves(figures: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """(path, [value, rows]) of every figure in a nested result."""
    if isinstance(figures, dict) and set(figures) == {"value", "low", "high", "n"}:
        yield path, [str(Estimate.model_validate(figures)), str(figures["n"])]
    elif isinstance(figures, dict):
        for key, value in figures.items():
            yield from leaves(value, (*path, str(key)))
    elif isinstance(figures, float):
        yield path, [f"{figures:.3f}", ""]
    elif figures is not None and not isinstance(figures, Sequence | str):
        yield path, [str(figures), ""]


def _at(facts: dict[str, Any], path: Sequence[str]) -> Estimate | None:
    value: Any = facts
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return Estimate.model_validate(value) if isinstance(value, dict) and "value" in value else None


def _marked(word: str) -> str:
    return "**no**" if word == "no" else word


def _yes(reached: bool | None) -> str:
    return "not measured" if reached is None else "yes" if reached else "no"
