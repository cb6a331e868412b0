"""A rollout: which share of the people a candidate answers beside the current model, while it is on trial.

    artifacts/models/rollout.json      there only while a candidate is on trial

In `shadow` the current model answers and the candidate's answer to the same message is only recorded; in `canary` the candidate
answers its share. Whoever decides (the ML track) writes the file; whoever serves (the AI track) reads it. It is written aside
and renamed, so a reader sees no rollout, the old one, or the new one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import UserError
from shared.files import write_text

FILE = "rollout.json"
Mode = Literal["shadow", "canary"]


class Rollout(BaseModel):
    """`candidate` is a published version, `share` the part of the conversations it is tried on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    candidate: str = Field(pattern=r"^\w[\w.-]*$", max_length=100)
    mode: Mode
    share: float = Field(gt=0, le=1)
    since: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def read_rollout(models: Path) -> Rollout | None:
    """The rollout that is going on; None when there is none. UserError when the file is damaged or of a newer schema."""
    path = models / FILE
    try:
        return Rollout.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"the rollout cannot be read ({error.strerror})", str(path), "Check the file's permissions") from None
    except UnicodeDecodeError:
        raise UserError("the rollout is damaged (not UTF-8)", str(path), "Remove the file") from None
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        raise UserError(f"the rollout is damaged ({what})", str(path), "Remove the file") from None


def write_rollout(models: Path, rollout: Rollout) -> None:
    """Begin a rollout, or change it: one atomic rename."""
    write_text(models / FILE, rollout.model_dump_json(indent=2) + "\n")


def clear_rollout(models: Path) -> None:
    """End the rollout; nothing happens when there is none."""
    (models / FILE).unlink(missing_ok=True)
