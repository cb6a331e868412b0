"""Outcomes: how each answer went, with no word of what was asked. What a candidate is promoted or rolled back on.

    artifacts/feedback/outcomes.jsonl      one record an answer, only ever appended to

    python -m shared.outcomes              count them by model version and arm, and report the lines that cannot be read

`feedback.jsonl` holds what went wrong, with the texts needed to reproduce it; a rate needs what went right, too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.errors import UserError
from shared.feedback import FOLDER
from shared.library import BadRow
from shared.records import RecordStore, read_records

FILE = "outcomes.jsonl"
#: `candidate`: a canary answered the person; `shadow`: the candidate's answer was recorded and never shown
Arm = Literal["current", "candidate", "shadow"]


class Outcome(BaseModel):
    """How one answer went. A shadow's answer has the answer id of the one the person got.

    `model_version` is `<published version>:<variant>`, `kind` the turn's kind. The judge's marks are None where it was not asked,
    `quotes_verbatim` where nothing was quoted; `judge_trusted` says whether the judge agreed with the labels well enough on both
    grounded and safe, when it was last measured, for its marks to count. `seconds` is the time the whole turn took.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    answer_id: str = Field(min_length=1, max_length=64)
    arm: Arm
    id: str = Field(default_factory=lambda made: _outcome_id(made), max_length=80)
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    model_version: str
    kind: str = Field(max_length=40)
    grounded: bool | None = None
    safe: bool | None = None
    helpful: int | None = Field(default=None, ge=1, le=5)
    judge_trusted: bool = False
    quotes_verbatim: bool | None = None
    seconds: float = Field(ge=0)


class OutcomeStore(RecordStore[Outcome]):
    """Appends to the outcomes of a folder. Several threads and processes may do so at once."""

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder / FILE, Outcome)


def read(folder: Path = FOLDER) -> tuple[list[Outcome], list[BadRow]]:
    """All outcomes in the order they were written, each once, and the lines that are none. No file: two empty lists."""
    return read_records(folder / FILE, Outcome)


def _outcome_id(made: dict[str, Any]) -> str:
    """One answer has one outcome in each arm. A field that did not validate is missing, and the record is refused."""
    return f"{made.get('answer_id')}/{made.get('arm')}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.outcomes", description="Count the outcomes that were recorded.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    try:
        outcomes, bad = read(options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counted = Counter((outcome.model_version, outcome.arm) for outcome in outcomes)
    for (version, arm), count in sorted(counted.items()):
        print(f"{count:6d}  {arm:9s}  {version}")
    for row in bad:
        print(f"skipped {row.file}:{row.line}: {row.reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
