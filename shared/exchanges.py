"""What was asked and answered, as far as people have not deleted it: read from the product's own conversations.

Questions are kept in one place, where deleting a conversation deletes them; nothing copies them elsewhere. Whoever needs them
(the watch for drift, the lineage of an answer) reads them here, for as long as it takes to compute with them, without personal
data. The file belongs to the product (`ai_engineer_track/api/sessions.py`); this module only ever reads it, and only the fields
below.

    artifacts/service/sessions.sqlite
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.chat import Verdict
from shared.errors import UserError
from shared.feedback import Scrubbed

FILE = "service/sessions.sqlite"


class _Part(BaseModel):
    """A part of what the product stores; its other fields are its own affair."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Cited(_Part):
    sentence_id: str
    text: str


class Found(_Part):
    id: str


class Turn(_Part):
    kind: str
    text: Scrubbed
    citations: list[Cited] = []
    verdict: Verdict | None = None
    passages: list[Found] = []
    #: `<published version>:<variant>`, or a provider's name for its model; empty where the product did not note it
    model_version: str = ""
    index_version: str = ""
    prompt_version: int | None = None


class Exchange(_Part):
    """One message and what came of it. `created` is in seconds since 1970."""

    answer_id: str
    created: float
    message: Scrubbed
    turn: Turn


def read(path: Path, answer_id: str | None = None) -> list[Exchange]:
    """The exchanges, oldest first, or the one with this answer; none without the file. UserError when it cannot be read."""
    if not path.exists():
        return []
    where, values = ("WHERE answer_id = ?", (answer_id,)) if answer_id else ("", ())
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            rows = db.execute(f"SELECT body FROM exchanges {where} ORDER BY created", values).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"conversations cannot be read ({error})", str(path), "Remove the file if nobody needs it") from None
    found = []
    for (body,) in rows:
        try:
            found.append(Exchange.model_validate_json(body))
        except ValidationError as error:
            what = f"a conversation cannot be read ({error.errors()[0]['msg']})"
            raise UserError(what, str(path), "Update the code") from None
    return found
