"""A thinned data set is one like any other, only smaller."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import library as lib
from shared.errors import UserError
from shared.thinned import thinned


def test_the_whole_is_itself(mini_datasets: Path, tmp_path: Path) -> None:
    assert thinned(mini_datasets, 1.0, tmp_path / "out") == mini_datasets
    assert not (tmp_path / "out").exists()


def test_a_quarter_of_the_shipped_data_is_sound_and_has_rows_of_every_kind_in_every_split(tmp_path: Path) -> None:
    made = thinned(lib.DATASETS, 0.25, tmp_path)
    assert lib.check(made) == []
    whole, part = lib.counts(lib.DATASETS), lib.counts(made)
    assert set(part) == set(whole)
    for file, by_split in whole.items():
        for split in lib.SPLITS:
            assert 0 < part[file][split] < 0.5 * by_split[split], (file, split)


def test_it_is_made_once_and_anew_when_the_data_changed(mini_datasets: Path, tmp_path: Path) -> None:
    first = thinned(mini_datasets, 0.5, tmp_path)
    (first / "mark").write_text("", encoding="utf-8")
    assert thinned(mini_datasets, 0.5, tmp_path) == first
    assert (first / "mark").exists()
    with (mini_datasets / "harmful.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert thinned(mini_datasets, 0.5, tmp_path) != first


def test_what_is_wrong_with_the_data_is_not_hidden(mini_datasets: Path, tmp_path: Path) -> None:
    questions = mini_datasets / "questions.jsonl"
    rows = questions.read_text(encoding="utf-8")
    questions.write_text(rows.replace("common-cold/self-care/1", "no-such-leaflet/self-care/1") + "{torn\n", encoding="utf-8")
    made = thinned(mini_datasets, 0.25, tmp_path)
    kept, bad = lib.read_rows(made, "questions.jsonl", lib.Question)
    assert [row.text for row in bad] == ["{torn"]
    assert any(lib.row_problems(row, lib.load_library(made)) for row in kept)


def test_a_missing_file_is_said_and_nothing_is_left(mini_datasets: Path, tmp_path: Path) -> None:
    (mini_datasets / "cases.jsonl").unlink()
    with pytest.raises(UserError, match=r"file is missing in .*cases\.jsonl"):
        thinned(mini_datasets, 0.5, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").iterdir() if not p.name.endswith(".part")]
