"""A damaged database is set aside, and what can be read of it goes on."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from shared.sqlite import is_damage, is_sound, mend

ROWS = 400


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "sessions.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE said (id TEXT PRIMARY KEY, body TEXT NOT NULL)")
        db.executemany("INSERT INTO said VALUES (?, ?)", [(f"a-{n}", "x" * 500) for n in range(ROWS)])
        db.commit()
    return path


def ids(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {row[0] for row in db.execute("SELECT id FROM said")}


def scribble(path: Path, at: int, length: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(b"\xa5" * length)


def test_a_sound_file_and_none_at_all_are_left_alone(database: Path, tmp_path: Path) -> None:
    before = database.read_bytes()
    assert mend(database) is None
    assert mend(tmp_path / "none.sqlite") is None
    assert database.read_bytes() == before


def test_rows_on_both_sides_of_the_damage_are_saved(database: Path) -> None:
    scribble(database, database.stat().st_size // 2 // 4096 * 4096, 8192)
    assert not is_sound(database)
    saved = mend(database)
    assert saved is not None
    assert is_sound(database)
    assert len(ids(database)) > ROWS // 2
    (aside,) = database.parent.glob("sessions.sqlite.damaged-*")
    assert aside.stat().st_size > 8192


@pytest.mark.parametrize("content", [b"", b"this is not a database at all, but long enough to look at" * 100])
def test_a_file_that_is_no_database_makes_room_for_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sessions.sqlite"
    path.write_bytes(content)
    assert mend(path) == (0 if content else None)
    assert is_sound(path)
    assert not content or next(tmp_path.glob("*.damaged-*")).read_bytes() == content


def test_a_full_or_busy_file_is_no_damage() -> None:
    assert is_damage(sqlite3.DatabaseError("database disk image is malformed"))
    assert not is_damage(sqlite3.OperationalError("database or disk is full"))
    assert not is_damage(sqlite3.IntegrityError("UNIQUE constraint failed"))
    assert not is_damage(OSError("disk"))
