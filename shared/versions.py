"""Names for data by their content: the same data have the same name everywhere, and other data never do.

    ds-…   a data folder: its leaflets and rows, in whatever order its files hold them
    d-…    a curated set: the training rows made of it (`ml_engineer_track/curate.py`)
    fb-…   a batch of records of `artifacts/feedback/`, such as all labels up to now
    m-…, i-…   a published model, an index of the product

Order means nothing in a data folder or in a batch, and a record that is there twice counts once: two people who merge what
they collected get the same name whoever goes first. What a row or a sentence says means everything, down to a space in it.

    python -m shared.versions             the names of what is here
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel

from shared import feedback, labels, outcomes
from shared.errors import UserError
from shared.files import sha256_file, sha256_text
from shared.library import OPTIONAL_ROW_FILES, ROW_FILES
from shared.settings import load_settings


def datasets_version(datasets: Path) -> str:
    """The name of a data folder. Blank lines and the order of rows and of a row's fields do not matter; README.md is left out.

    A line that is no JSON counts as the text that it is. UserError when there are no leaflets.
    """
    leaflets = sorted((datasets / "health_library").glob("*.md"))
    if not leaflets:
        raise UserError("no leaflets (*.md) found", str(datasets), "Point DATASETS at a folder with health_library/*.md")
    parts = [f"{path.name} {sha256_file(path)}" for path in leaflets]
    for file in (*ROW_FILES, *OPTIONAL_ROW_FILES):
        path = datasets / file
        if path.exists():
            lines = {_canonical(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()}
            parts.append(f"{file} {sha256_text(chr(10).join(sorted(lines)))}")
    return "ds-" + sha256_text("\n".join(parts))[:12]


def batch_version(records: Iterable[BaseModel]) -> str:
    """The name of a batch of records. When a record was written does not matter: the same remark may be sent again later."""
    lines = {json.dumps(record.model_dump(mode="json", exclude={"time"}), sort_keys=True) for record in records}
    return "fb-" + sha256_text("\n".join(sorted(lines)))[:12]


def _canonical(line: str) -> str:
    try:
        return json.dumps(json.loads(line.strip("\ufeff")), sort_keys=True, ensure_ascii=False)
    except ValueError:
        return line


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m shared.versions", description="Names of the data that are here.").parse_args(argv)
    try:
        settings = load_settings()
        folder = settings.artifacts / "feedback"
        print(f"{datasets_version(settings.datasets)}  {settings.datasets}")
        kept: list[tuple[str, Sequence[BaseModel]]] = [
            (feedback.FILE, feedback.read(folder)[0]),
            (outcomes.FILE, outcomes.read(folder)[0]),
            (labels.FILE, labels.read(folder)[0]),
        ]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file, records in kept:
        print(f"{batch_version(records)}  {folder / file} ({len(records):,} records)")
    for path in sorted((settings.artifacts / "data").glob("d-*/report.json")):
        made_of = json.loads(path.read_text(encoding="utf-8")).get("datasets") or "data of an unrecorded version"
        print(f"{path.parent.name}  {path.parent} (from {made_of})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
