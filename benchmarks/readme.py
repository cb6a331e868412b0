"""The figures of the pages, from committed results: nobody types a number there.

Why: a table copied by hand is right on the day it is copied. What comes from a result stands between marks; this fills them from
`benchmarks/results/`, and a test compares the two.

    make demo 2>&1 | tee demo.log
    python -m benchmarks readme --log demo.log            # takes the run's reports and transcript over, and fills the pages
    python -m benchmarks readme --take low_bits.json      # takes the report of a study over; studies.py lists them all
    python -m benchmarks readme                           # fills the pages from what is committed
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ai_engineer_track import report as ai_report
from benchmarks import lessons, replicas, resilience, scaling
from benchmarks.lessons import markdown_table
from benchmarks.studies import STUDIES
from ml_engineer_track import report as ml_report
from shared.errors import UserError
from shared.files import write_text
from shared.settings import ROOT

DEMO = ROOT / "benchmarks" / "results" / "demo"
REPORTS = ("ml.json", "ai.json")
#: page -> beginnings of the marks that must stand in it; every mark that stands in one is filled
PAGES = {
    "docs/cluster.md": ("scaling measured", "scaling predicted"),
    "docs/serving-at-scale.md": ("replicas",),
    "docs/resilience.md": ("attacks", "faults", "load", "soak", "drift"),
    "README.md": ("transcript", "results"),
    "WORKSHOP.md": ("workshop times",),
    "benchmarks/results/README.md": ("engine goals",),
    "docs/results.md": ("ml results", "ai results"),
    "docs/lessons.md": (
        "lesson four bits",
        "lesson lora",
        "lesson asking back",
        "lesson judge",
        "lesson engine",
        "lesson feedback",
    ),
}
MARK = re.compile(r"<!-- (?P<name>[\w ]+): begin -->\n.*?<!-- (?P=name): end -->", re.DOTALL)
#: what the pipelines print when a stage is done, and where they leave their reports
TOLD = re.compile(r"(\[\d+/\d+\] [\w-]+: |(model|ingest|converse|measure) {2,}\w|(model|report): +artifacts/).*")


def take_over(reports: Path, log: Path) -> None:
    """Keep a run: its two reports and the lines its stages printed. UserError when one of them is missing."""
    for path in (*(reports / name for name in REPORTS), log):
        if not path.is_file():
            raise UserError("no such file", str(path), "Run `make demo 2>&1 | tee demo.log` first")
    lines = log.read_text(encoding="utf-8").replace(f"{ROOT}/", "").replace("\r", "\n").splitlines()
    told = [match[0] for line in lines if (match := TOLD.match(line))]
    if not told:
        raise UserError("no line of a stage in it", str(log), "Run `make demo 2>&1 | tee demo.log` first")
    for name in REPORTS:
        keep(reports / name)
    write_text(DEMO / "transcript.txt", "\n".join(told) + "\n")


def take_study(reports: Path, names: Sequence[str]) -> None:
    """Keep the reports of studies. UserError for a name that no page knows, or a report that is not there."""
    for name in names:
        if name not in STUDIES:
            raise UserError(f"no page uses {name!r}", "--take", f"Use one of: {', '.join(STUDIES)}")
        if not (reports / name).is_file():
            raise UserError("no such report", str(reports / name), f"Run `{STUDIES[name]}` first")
        keep(reports / name)


def keep(report: Path) -> None:
    """Copy a report. Paths of this machine are nobody else's business."""
    write_text(DEMO / report.name, report.read_text(encoding="utf-8").replace(f"{ROOT}/", ""))


def blocks() -> dict[str, str]:
    """What stands between each pair of marks, on whichever page."""
    ml, ai = (json.loads((DEMO / name).read_text(encoding="utf-8")) for name in REPORTS)
    lines = (DEMO / "transcript.txt").read_text(encoding="utf-8").splitlines()
    wrapped = "\n".join(textwrap.fill(line, 118, subsequent_indent="      ") for line in lines)
    return {
        "transcript": f"```text\n$ make demo\n{wrapped}\n```",
        "results": goals(ml, ai),
        "ml results": ml_report.markdown(ml),
        "ai results": ai_report.markdown(ai),
        "workshop times": workshop_times(),
        **lessons.blocks(),
        "engine goals": lessons.engine_goals(),
        **resilience.blocks(),
        **scaling.page_texts(),
        "replicas": replicas.page_text(),
    }


def goals(ml: dict[str, Any], ai: dict[str, Any]) -> str:
    """Every goal of both tracks with what came out, none left out."""
    yes = {True: "yes", False: "**no**", None: "not measured"}
    counts = {claim: str(n) for claim, n in (*ml_counts(ml), *ai_counts(ai))}
    rows = [
        [where, g["claim"], g["value"], counts.get(g["claim"], ""), yes[g["reached"]]]
        for where, found in (("model", ml["findings"]), ("product", ai["goals"]))
        for g in found
    ]
    minutes = (ml["total_seconds"] + sum(ai["seconds"].values())) / 60
    return (
        markdown_table(["", "goal", "measured [95 % interval]", "n", "reached"], rows)
        + f"\n\n{lessons.machine(ml['hardware'])}; seed {ml['seed']}; {minutes:.0f} minutes for both tracks. "
        "All figures: [docs/results.md](docs/results.md)."
    )


def ml_counts(ml: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Rows behind each claim of the ML track that is about a score."""
    for finding in ml["findings"]:
        for label, key in (("evidence F1", "grounded/evidence_f1"), ("decision accuracy", "grounded/decision_accuracy")):
            if label in finding["claim"]:
                yield finding["claim"], ml["quality"]["bf16"][key]["n"]


def ai_counts(ai: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Rows behind each goal of the AI track."""
    for claim, path, relation, bar in ai_report.GOALS:
        found: Any = ai
        for key in path:
            found = found[key]
        yield f"{claim} {relation} {bar}", found["n"]
    yield ai["goals"][-1]["claim"], ai["suite"]["conversations"]


def workshop_times() -> str:
    """Seconds of the machine for every exercise, from `python -m benchmarks.workshop walk`."""
    path = DEMO / "workshop.json"
    if not path.exists():
        return "Not measured yet: `python -m benchmarks.workshop walk --out benchmarks/results/demo/workshop.json`."
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            str(part["exercise"] or ""),
            part["title"],
            f"{part['commands_s']:.0f}",
            f"{part['solution_s']:.0f}" if part["exercise"] else "",
        ]
        for part in found["exercises"]
    ]
    total = sum(part["commands_s"] + part["solution_s"] for part in found["exercises"])
    return (
        markdown_table(["", "exercise", "its commands, s", "its solution's, s"], rows)
        + f"\n\n{lessons.machine(found['hardware'])}. All of it, one after the other: {total / 60:.0f} minutes."
    )


def fill(page: str, required: Sequence[str] = (), texts: dict[str, str] | None = None) -> str:
    """The page with every block between marks replaced (default: by `blocks()`).

    UserError for a mark that nothing fills, or a page that lacks one `required`.
    """
    known, found = blocks() if texts is None else texts, set()

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise UserError(f"nothing fills the marks of {name!r}", "a page", f"Use one of: {', '.join(known)}")
        found.add(name)
        return f"<!-- {name}: begin -->\n{known[name]}\n<!-- {name}: end -->"

    filled = MARK.sub(block, page)
    for name in required:
        if name not in found:
            begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
            raise UserError(f"the marks of {name!r} are missing", "a page", f"Put {begin} and {end} around its place")
    return filled


def write() -> None:
    for name, required in PAGES.items():
        path = ROOT / name
        write_text(path, fill(path.read_text(encoding="utf-8"), required))
