"""Files are written whole or not at all, and hashes change exactly when names or contents do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import files
from shared.errors import UserError
from shared.files import locked


@pytest.fixture
def disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_text_is_written_as_it_is_and_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_text(path, "naïve\n☃")
    assert path.read_bytes() == "naïve\n☃".encode()
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


def test_the_old_file_stays_when_writing_fails(tmp_path: Path, disk_full: None) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old", encoding="utf-8")
    with path.open(encoding="utf-8") as reader:
        files.write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text(encoding="utf-8") == "new"


def test_no_file_appears_when_the_first_writing_fails(tmp_path: Path, disk_full: None) -> None:
    with pytest.raises(OSError, match="No space left"):
        files.write_json(tmp_path / "note.json", {"new": True})
    assert not (tmp_path / "note.json").exists()


def test_a_failed_writing_leaves_no_half_file_aside(tmp_path: Path, disk_full: None) -> None:
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "note.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_when_the_rows_run_into_an_error(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"row": 1}
        raise RuntimeError("stage failed")

    path = tmp_path / "rows.jsonl"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError, match="stage failed"):
        files.write_jsonl(path, rows())
    assert path.read_text(encoding="utf-8") == "old"


def test_a_left_over_part_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "note.txt.part").write_text("half a wo", encoding="utf-8")
    files.write_text(tmp_path / "note.txt", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "whole"


def test_json_is_readable_and_paths_become_text(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"name": "Ménière", "at": Path("x/y")})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "Ménière", "at": "x/y"}
    assert "Ménière" in text
    assert text.endswith("}\n")


# --- JSON lines ------------------------------------------------------------------------------------------------------

#: among them the characters at which str.splitlines breaks a line although JSON does not escape them
TEXTS = st.one_of(st.text(), st.text("\x85\u2028\u2029a"))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXTS, inner)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows") / "rows.jsonl"


@given(st.lists(VALUES))
@example([{"text": "Rest.\u2028Drink."}])
def test_rows_are_read_back_as_they_were_written(scratch: Path, rows: list[Any]) -> None:
    files.write_jsonl(scratch, rows)
    assert files.read_jsonl(scratch) == rows


def test_every_row_is_one_line(tmp_path: Path) -> None:
    files.write_jsonl(tmp_path / "rows.jsonl", [{"text": "a\nb"}, {"text": "c"}])
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2


# --- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes_are_the_published_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes("naïve".encode())
    assert files.sha256_file(tmp_path / "note.txt") == hashlib.sha256("naïve".encode()).hexdigest() == files.sha256_text("naïve")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a", encoding="utf-8")
    (folder / "deep" / "b.txt").write_text("b", encoding="utf-8")
    return folder


CHANGES: dict[str, Callable[[Path], Any]] = {
    "content": lambda tree: (tree / "deep" / "b.txt").write_text("B", encoding="utf-8"),
    "name": lambda tree: (tree / "a.txt").rename(tree / "A.txt"),
    "folder": lambda tree: (tree / "deep").rename(tree / "deeper"),
    "place": lambda tree: (tree / "deep" / "b.txt").rename(tree / "b.txt"),
    "one file more": lambda tree: (tree / "empty").touch(),
    "one file less": lambda tree: (tree / "a.txt").unlink(),
    "contents swapped": lambda tree: [
        (tree / n).write_text(t, encoding="utf-8") for n, t in (("a.txt", "b"), ("deep/b.txt", "a"))
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_of_a_tree_changes_with(tree: Path, change: str) -> None:
    before = files.sha256_tree([tree])
    CHANGES[change](tree)
    assert files.sha256_tree([tree]) != before


def test_the_hash_of_two_trees_changes_when_a_file_moves_from_one_to_the_other(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    (a / "note.txt").write_text("note", encoding="utf-8")
    before = files.sha256_tree([a, b])
    (a / "note.txt").rename(b / "note.txt")
    assert files.sha256_tree([a, b]) != before


def test_the_hash_of_a_tree_depends_neither_on_its_place_nor_on_times(tree: Path, tmp_path: Path) -> None:
    before = files.sha256_tree([tree])
    moved = shutil.copytree(tree, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    os.utime(moved / "a.txt", (1, 1))
    assert files.sha256_tree([moved]) == before


def test_a_missing_path_has_a_hash_that_changes_when_it_appears(tmp_path: Path) -> None:
    path = tmp_path / "later.txt"
    before = files.sha256_tree([path])
    assert files.sha256_tree([path]) == before
    path.touch()
    assert files.sha256_tree([path]) != before


# --- disk space ------------------------------------------------------------------------------------------------------


def test_too_little_disk_space_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        files.need_disk(tmp_path / "not" / "yet", 10**18)
    message = str(caught.value)
    assert "\n" not in message
    assert "not enough disk space" in message
    assert "1000000000000 MB needed" in message
    assert str(tmp_path / "not" / "yet") in message
    assert "ARTIFACTS" in message


@pytest.mark.parametrize("folder", [Path("not/yet"), Path("/not/yet")])
def test_enough_disk_space_is_no_error_even_for_a_folder_still_to_be_made(folder: Path) -> None:
    files.need_disk(folder, 1)


def test_a_folder_is_held_by_one_at_a_time_and_free_afterwards(tmp_path: Path) -> None:
    held, again = locked(tmp_path / "work", "somebody is at work"), locked(tmp_path / "work", "somebody is at work")
    with held, pytest.raises(UserError, match="somebody is at work"), again:
        pass
    with locked(tmp_path / "work", "somebody is at work"):
        pass
