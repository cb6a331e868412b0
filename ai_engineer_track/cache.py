"""Answers given before, for the same question or one that means the same.

Why an AI engineer is careful with this: a cached answer is the fastest and the only one that can be wrong for a reason no model
knows. So an answer is only reused under the same index, models and prompt contract; never for emergencies, refused requests,
questions back, or where something personal was used; and a similar question only counts as the same when its numbers,
negations and rare words are the same, because "for a child of 2" and "for a child of 12" mean nearly the same to an embedding.
"""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from pathlib import Path

import numpy as np

from ai_engineer_track.heads import Array
from ai_engineer_track.turn import Turn
from shared.files import private, sha256_text

log = logging.getLogger(__name__)
KEPT = 2000
BUSY_SECONDS = 5.0  # as long may another process be writing
#: the order of uses is counted, not dated: an answer kept while the clock was ahead would stay for ever
NEXT_USE = "(SELECT COALESCE(MAX(used), 0) + 1 FROM answers)"
CACHEABLE = ("answer", "not_answered")
TURNS_MEANING = re.compile(
    r"\d+|\b(no|not|never|without|can't|cannot|don't|isn't|avoid|stop|before|after|child|children|baby|babies|kid|kids|toddler|pregnant"
    r"|pregnancy|breastfeeding|adult|old|elderly|safe|dose|more|less|too)\b"
)


class AnswerCache:
    """One SQLite file. `version` names everything an answer depends on; other versions are never read, and removed at start.

    Several processes may share the file: what the others added is found at the next look.
    """

    def __init__(self, path: Path, version: str, threshold: float) -> None:
        self.version, self.threshold = version, threshold
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._meanings: dict[str, str] = {}
        self._vectors: dict[str, Array] = {}
        self._seen = 0
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError:  # a damaged cache is worth nothing: begin anew
            path.unlink(missing_ok=True)
            self._db = self._open(path)

    def _open(self, path: Path) -> sqlite3.Connection:
        """What people asked is not kept, only hashes of it: deleting a conversation must not leave its words here."""
        db = sqlite3.connect(private(path), check_same_thread=False, timeout=BUSY_SECONDS)
        columns = "key TEXT PRIMARY KEY, version TEXT, meaning TEXT, vector BLOB, turn TEXT, used REAL"
        db.execute(f"CREATE TABLE IF NOT EXISTS answers ({columns})")
        db.execute("DELETE FROM answers WHERE version <> ?", (self.version,))
        db.commit()
        self._catch_up(db)
        return db

    def _catch_up(self, db: sqlite3.Connection) -> None:
        """Learn the answers that were added since the last look, by whomever."""
        news = "SELECT rowid, key, meaning, vector FROM answers WHERE rowid > ? AND version = ? ORDER BY rowid"
        for number, key, means, vector in db.execute(news, (self._seen, self.version)):
            self._seen = number
            self._meanings[key], self._vectors[key] = means, np.frombuffer(vector, np.float32)

    def get(self, question: str, vector: Array) -> Turn | None:
        """The answer to this question or to one that means the same; None when there is none."""
        with self._lock:
            try:
                self._catch_up(self._db)
                exact = self._key(question)
                key = exact if exact in self._meanings else self._similar(question, vector)
                row = self._db.execute("SELECT turn FROM answers WHERE key = ?", (key,)).fetchone() if key else None
            except sqlite3.Error as error:
                log.warning("the cache could not be read: %s", error)
                return None
            if row is None:
                return None
            try:
                self._db.execute(f"UPDATE answers SET used = {NEXT_USE} WHERE key = ?", (key,))
                self._db.commit()
            except sqlite3.Error:
                self._db.rollback()
            return Turn.model_validate_json(row[0])

    def put(self, question: str, vector: Array, turn: Turn, personal: bool) -> None:
        """Keep an answer, unless it is of a kind that is never reused. A full disk costs the cache entry, not the answer."""
        if personal or turn.kind not in CACHEABLE or turn.cached:
            return
        key, means, stored = self._key(question), meaning(question), vector.astype(np.float32)
        kept = turn.model_copy(update={"trace": [], "cost": 0.0})
        with self._lock:
            try:
                row = (key, self.version, means, stored.tobytes(), kept.model_dump_json())
                self._db.execute(f"INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, {NEXT_USE})", row)
                oldest = "SELECT key FROM answers ORDER BY used DESC LIMIT -1 OFFSET ?"
                gone = self._db.execute(f"DELETE FROM answers WHERE key IN ({oldest}) RETURNING key", (KEPT,)).fetchall()
                self._db.commit()
                self._catch_up(self._db)
                for (old,) in gone:
                    self._meanings.pop(old, None), self._vectors.pop(old, None)
            except sqlite3.Error as error:
                self._db.rollback()
                log.warning("the answer could not be cached: %s", error)

    def close(self) -> None:
        self._db.close()

    def __len__(self) -> int:
        return len(self._meanings)

    def _similar(self, question: str, vector: Array) -> str | None:
        if not self._vectors:
            return None
        keys: list[str] = list(self._vectors)
        cosines = np.stack([self._vectors[key] for key in keys]) @ vector
        for i in np.argsort(-cosines)[:3]:
            if cosines[i] >= self.threshold and meaning(question) == self._meanings[keys[i]]:
                return str(keys[i])
        return None

    def _key(self, question: str) -> str:
        words = " ".join(re.findall(r"\w+", question.lower()))
        return sha256_text(f"{self.version}\0{words}")


def meaning(question: str) -> str:
    """A hash of the numbers and small words that turn the meaning of a question while its embedding hardly moves."""
    words = set(TURNS_MEANING.findall(question.lower().replace("’", "'"))) | set(re.findall(r"\d+", question))
    return sha256_text(" ".join(sorted(words)))
