"""One turn of the loop on disk: which stages are done, what each found, where a crash left it.

Why an ML engineer writes this down instead of keeping it in a process: a turn takes minutes of training and hours of trial, and
machines restart. Each stage leaves one file, written aside and renamed; a stage whose file is there is never done twice, and
the turn goes on at the first one that is missing. What the stages made on the way (`work/`: data, checkpoints, unpublished
weights) is several times the size of a model and goes with the turn's end.

    artifacts/loop/turns/0003/collected.json, trained.json, candidate.json, checks.json, shadow.json, canary.json, end.json
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ml_engineer_track.lifecycle.collect import Collected
from shared.errors import UserError
from shared.files import write_text

T = TypeVar("T")
Result = Literal["promoted", "refused", "rolled back", "failed"]
#: names the step at which a test kills this process; never set otherwise
DIE_AT = "LOOP_DIE_AT"


class Begin(BaseModel):
    """Why the turn was begun, and from which version."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parent: str
    reason: str
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class End(BaseModel):
    """How the turn ended, in a word and in a sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    result: Result
    why: str
    candidate: str | None = None
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


class Turn:
    """The folder of one turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def number(self) -> int:
        return int(self.folder.name)

    @property
    def end(self) -> End | None:
        return self.get("end", End)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def tidy(self) -> None:
        """Remove what only an unfinished turn needs. A file that cannot be removed is left to the next time."""
        shutil.rmtree(self.work, ignore_errors=True)

    def once(self, name: str, kind: Any, work: Callable[[], T]) -> T:
        """What the stage `name` found: read when it is done, else done now and kept."""
        known: T | None = self.get(name, kind)
        if known is not None:
            return known
        step(f"{name}: begin")
        result = work()
        step(f"{name}: done, not written")
        self.put(name, kind, result)
        step(f"{name}: written")
        return result

    def get(self, name: str, kind: Any) -> Any:
        """UserError when the file is there and damaged, which no crash can do."""
        path = self.folder / f"{name}.json"
        try:
            return TypeAdapter(kind).validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise UserError("the record of a stage is damaged", str(path), "Remove it: the stage is then done again") from None

    def put(self, name: str, kind: Any, result: Any) -> None:
        write_text(self.folder / f"{name}.json", TypeAdapter(kind).dump_json(result, indent=1).decode() + "\n")


def turns(loop: Path) -> list[Turn]:
    """All turns, the oldest first."""
    return [Turn(path) for path in sorted(loop.glob("turns/[0-9]*")) if (path / "begin.json").exists()]


def open_turn(loop: Path) -> Turn | None:
    """The turn that has not ended, if there is one."""
    return next((turn for turn in turns(loop) if turn.end is None), None)


def new_turn(loop: Path, begin: Begin, collected: Collected) -> Turn:
    """A turn exists once its beginning is written, and that comes last. One that is there is never written over."""
    number = 1 + max((turn.number for turn in turns(loop)), default=0)
    turn = Turn(loop / "turns" / f"{number:04d}")
    turn.put("collected", Collected, collected)
    step("collected")
    turn.put("begin", Begin, begin)
    return turn


def step(name: str) -> None:
    """A place where power may fail. A test names one in LOOP_DIE_AT to have it fail there."""
    if os.environ.get(DIE_AT) == name:
        os.kill(os.getpid(), signal.SIGKILL)
