"""Files of records that are only ever appended to: one JSON line a record, each once, none lost to a crash.

Feedback, outcomes and labels all outlive the process that wrote them and are written by several at once, so they share one way
of writing: lock, look whether the record is there already, append, flush to the disk. A torn last line (power loss) stays alone
on its line and is reported by `read`; a disk that refuses leaves the file as it was.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from pydantic import ValidationError

from shared.errors import UserError
from shared.files import private
from shared.library import BadRow


class Record(Protocol):
    """What a pydantic model needs to be kept so: an id that is the same for the same thing, however often it is offered."""

    @property
    def id(self) -> str: ...

    def model_dump_json(self) -> str: ...

    @classmethod
    def model_validate_json(cls, json_data: str) -> Self: ...


R = TypeVar("R", bound=Record)


class RecordStore(Generic[R]):
    """Appends records of one type to a file. Several threads and processes may do so at once."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind
        self._known: set[str] = set()
        self._known_to = 0

    def add(self, record: R) -> bool:
        """Append and flush to disk; False when the record is already there.

        A torn last line (power loss) stays alone on its line, to be reported by `read`. UserError when the disk refuses: the
        file is then as it was before.
        """
        line = record.model_dump_json().encode() + b"\n"
        try:
            with private(self.path).open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                size = stream.seek(0, os.SEEK_END)
                self._catch_up(stream.fileno(), size)
                if record.id in self._known:
                    return False
                torn = size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n"
                try:
                    stream.write(b"\n" + line if torn else line)
                    stream.flush()
                    os.fsync(stream.fileno())
                except OSError:
                    os.truncate(self.path, size)
                    raise
        except OSError as error:
            what = f"{self.path.stem} cannot be saved ({error.strerror})"
            raise UserError(what, str(self.path), "Free some disk space") from None
        return True

    def _catch_up(self, descriptor: int, size: int) -> None:
        """Learn the ids of whole lines that were appended since the last look, by whomever."""
        if size < self._known_to:  # somebody replaced the file
            self._known, self._known_to = set(), 0
        new = os.pread(descriptor, size - self._known_to, self._known_to)
        whole = new[: new.rfind(b"\n") + 1]
        self._known_to += len(whole)
        parsed = (_parse(line, self.kind) for line in whole.split(b"\n"))
        self._known |= {record.id for record in parsed if not isinstance(record, str)}


def read_records(path: Path, kind: type[R]) -> tuple[list[R], list[BadRow]]:
    """All records in the order they were written, each once, and the lines that are none. No file: two empty lists."""
    records: dict[str, R] = {}
    bad: list[BadRow] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise UserError(f"{path.stem} cannot be read ({error.strerror})", str(path), "Check the file's permissions") from None
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            record = _parse(raw, kind)
            if isinstance(record, str):
                bad.append(BadRow(path.name, number, raw.decode("utf-8", "replace"), record))
            else:
                records.setdefault(record.id, record)
    return list(records.values()), bad


def _parse(line: bytes, kind: type[R]) -> R | str:
    """The record, or why there is none."""
    try:
        return kind.model_validate_json(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
