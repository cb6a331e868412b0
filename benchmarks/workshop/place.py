"""Where the workshop's files lie, and what a check may say.

artifacts/workshop/exN.py, ml.yaml, ...     scratch files: a participant's own, never overwritten
artifacts/workshop/exN.json                 every run of exercise N's script, the newest last
artifacts/workshop/answers.json             the answers given with `make check EX=n ANSWER=...`
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import write_json, write_text
from shared.settings import PRESETS, ROOT, load_settings
from shared.thinned import thinned

SCRATCH = Path(__file__).resolve().parent / "scratch"
#: scratch files that begin as a copy of the preset `smoke`, with what is replaced in each
COPIED = {
    "ml.yaml": {"# The whole path": "# Your own preset, edited in the exercises. The whole path"},
    "ex1.yaml": {
        "# The whole path": "# Exercise 1: your own data. The whole path",
        "families: 0.25            # share": "datasets: {datasets}\nfamilies: 1.0             # share",
    },
}


class NotYet(Exception):  # noqa: N818 (to be not done yet is no error)
    """The exercise is not done; the message is the hint."""


@dataclass(frozen=True)
class Expected:
    """The right answer, computed from the participant's own figures, and how one gets there.

    A number counts as right within `tolerance` (in the figure's own unit).
    """

    value: float | str
    how: str
    tolerance: float = 0.0

    def fits(self, given: str) -> bool:
        if isinstance(self.value, str):
            return given.strip().lower() == self.value.lower()
        try:
            return abs(float(given.strip().rstrip("%")) - self.value) <= self.tolerance + 1e-9
        except ValueError:
            return False

    def __str__(self) -> str:
        return self.value if isinstance(self.value, str) else f"{self.value:.3g}"


def script(main: Callable[[], None]) -> None:
    """Run a scratch file: a mistake that its reader can mend is one line, as everywhere in this project."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def need(condition: object, hint: str) -> None:
    """NotYet with the hint unless the condition holds."""
    if not condition:
        raise NotYet(hint)


def artifacts() -> Path:
    return load_settings("smoke").artifacts


def place() -> Path:
    """The folder of the scratch files."""
    return artifacts() / "workshop"


def lay_out() -> list[str]:
    """Copy what is not there yet into the scratch folder; the names of what was copied."""
    folder, made = place(), []
    for source in sorted(p for p in SCRATCH.iterdir() if p.name != "__pycache__"):
        if not (folder / source.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / source.name)
            made.append(source.name)
    smoke = (PRESETS / "smoke.yaml").read_text(encoding="utf-8")
    for name, changes in COPIED.items():
        if not (folder / name).exists():
            text = smoke
            for old, new in changes.items():
                text = text.replace(old, new.format(datasets=os.path.relpath(folder / "datasets")))
            write_text(folder / name, text)
            made.append(name)
    if not (folder / "datasets").exists():
        shutil.copytree(thinned(ROOT / "datasets", load_settings("smoke").families, artifacts()), folder / "datasets")
        made.append("datasets")
    return made


def keep_run(exercise: int, run: dict[str, Any]) -> None:
    """Add a run of an exercise's script to what its check will read."""
    path = place() / f"ex{exercise}.json"
    write_json(path, [*runs(exercise), run])


def runs(exercise: int) -> list[dict[str, Any]]:
    """Every kept run of an exercise, the newest last."""
    path = place() / f"ex{exercise}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []


def last_run(exercise: int) -> dict[str, Any]:
    """NotYet when there was none."""
    found = runs(exercise)
    need(found, f"Run `python artifacts/workshop/ex{exercise}.py` first.")
    return found[-1]


def read_json(path: Path, hint: str) -> Any:
    """What a command wrote. Lines before the JSON are skipped. NotYet(hint) when there is no such file, or no JSON in it."""
    need(path.exists(), hint)
    text = path.read_text(encoding="utf-8")
    need("{" in text, hint)
    try:
        return json.loads(text[text.index("{") :])
    except json.JSONDecodeError:
        raise NotYet(f"{path} is not whole. {hint}") from None
