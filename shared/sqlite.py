"""A SQLite file that was damaged is set aside, and what can still be read of it goes into a new one.

Why: a disk that lies, a copy made while writing, a file somebody truncated: sooner or later a database is malformed. A service
that then answers everybody with an error until a person comes is the worse half of the damage. The damaged file stays beside
the new one (`<name>.damaged-<time>`), for whoever wants to recover more.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)
COMPANIONS = ("", "-wal", "-shm")


def is_damage(error: BaseException) -> bool:
    """True for a malformed file; False for a busy or full one, and for a mistake in a statement."""
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(
        error, sqlite3.OperationalError | sqlite3.IntegrityError | sqlite3.ProgrammingError
    )


def is_sound(path: Path) -> bool:
    """True for a file that SQLite's quick check passes, and for none at all."""
    if not path.exists() or not path.stat().st_size:
        return True
    try:
        with contextlib.closing(sqlite3.connect(path)) as db:
            return bool(db.execute("PRAGMA quick_check").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False


def mend(path: Path) -> int | None:
    """Set a damaged file aside and copy its readable rows into a new one. Rows saved; None when the file was sound.

    Nobody else may have the file open. OSError when the disk refuses.
    """
    if is_sound(path):
        return None
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 1_000_000}")
    for end in COMPANIONS:
        old = path.with_name(path.name + end)
        if old.exists():
            old.rename(aside.with_name(aside.name + end))
    saved = _salvage(aside, path)
    log.error("a database was damaged", extra={"facts": {"file": path.name, "aside": aside.name, "rows_saved": saved}})
    return saved


def _salvage(damaged: Path, into: Path) -> int:
    """Rows copied. Each table is read from both ends towards the damage; unreadable tables are left to whoever opens the file."""
    into.touch(mode=0o600)
    saved = 0
    with contextlib.closing(sqlite3.connect(damaged)) as old, contextlib.closing(sqlite3.connect(into)) as new:
        try:
            schema = old.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        except sqlite3.DatabaseError:
            return 0
        for kind, name, sql in schema:
            with contextlib.suppress(sqlite3.Error):
                new.execute(sql)
                if kind == "table":
                    saved += _copy(old, new, name)
        new.commit()
    return saved


def _copy(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> int:
    count = 0
    for order in ("ASC", "DESC"):
        for row in _readable(old, f'SELECT * FROM "{table}" ORDER BY rowid {order}'):
            with contextlib.suppress(sqlite3.Error):  # a row that both directions reached, or one that is half garbage
                marks = ", ".join("?" * len(row))
                count += new.execute(f'INSERT OR IGNORE INTO "{table}" VALUES ({marks})', row).rowcount
    return count


def _readable(db: sqlite3.Connection, sql: str) -> Iterator[tuple[object, ...]]:
    """The rows up to the first that cannot be read."""
    try:
        yield from db.execute(sql)
    except sqlite3.DatabaseError:
        return
