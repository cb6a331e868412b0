"""Writing that cannot leave half a file behind, and content hashes that make "did anything change?" a comparison."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def private(path: Path) -> Path:
    """`path`, there and readable by its owner alone: what people say here is nobody else's business on this machine.

    What SQLite writes beside a database gets the same mode as the database.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    return path


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold `folder` for this process. UserError(busy) when another one has it; a killed holder lets go by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy, str(folder), "Wait for it, or set ARTIFACTS") from None
        yield


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder aside and swap it in; a kill at any moment leaves the old or the new one whole.

    Between the two renames the old one lies beside it as `<name>.old`.
    """
    aside, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_tree(paths: Iterable[Path]) -> str:
    """One hash over the names and contents of files, and of all files below folders; missing paths count as such."""
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            digest.update(f"{number}\0{name}\0{sha256_file(file) if file.exists() else 'missing'}\n".encode())
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def need_disk(folder: Path, size: int) -> None:
    """UserError when `folder`'s disk has less than `size` bytes free."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise UserError(
            f"not enough disk space: {free / 1e6:.0f} MB free, {size / 1e6:.0f} MB needed",
            str(folder),
            "Free some or set ARTIFACTS",
        )
