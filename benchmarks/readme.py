"""The figures of README.md, from one committed run of `make demo`: nobody types a number there.

Why: a table copied by hand is right on the day it is copied. The README's transcript and tables stand between marks; this fills
them from `benchmarks/results/demo/`, and a test compares the two.

    make demo 2>&1 | tee demo.log
    python -m benchmarks readme --log demo.log      # takes the run's reports and transcript over, and fills the README
    python -m benchmarks readme                     # fills the README from what is committed
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from ai_engineer_track import report as ai_report
from ml_engineer_track import report as ml_report
from shared.errors import UserError
from shared.files import write_text
from shared.settings import ROOT

DEMO = ROOT / "benchmarks" / "results" / "demo"
REPORTS = ("ml.json", "ai.json")
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
    DEMO.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:  # paths of this machine are nobody else's business
        write_text(DEMO / name, (reports / name).read_text(encoding="utf-8").replace(f"{ROOT}/", ""))
    write_text(DEMO / "transcript.txt", "\n".join(told) + "\n")


def blocks() -> dict[str, str]:
    """What stands between each pair of marks in README.md."""
    ml, ai = (json.loads((DEMO / name).read_text(encoding="utf-8")) for name in REPORTS)
    lines = (DEMO / "transcript.txt").read_text(encoding="utf-8").splitlines()
    wrapped = "\n".join(textwrap.fill(line, 118, subsequent_indent="      ") for line in lines)
    return {
        "transcript": f"```text\n$ make demo\n{wrapped}\n```",
        "ml results": ml_report.markdown(ml),
        "ai results": ai_report.markdown(ai),
    }


def fill(page: str, texts: dict[str, str] | None = None, name_of_page: str = "README.md") -> str:
    """The page with every block replaced (default: `blocks()`). UserError when it lacks the marks of one."""
    for name, text in (blocks() if texts is None else texts).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page or end not in page:
            raise UserError(f"the marks of {name!r} are missing", name_of_page, f"Put {begin} and {end} around its place")
        before, rest = page.split(begin, 1)
        page = f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"
    return page


def write() -> None:
    path = ROOT / "README.md"
    write_text(path, fill(path.read_text(encoding="utf-8")))
