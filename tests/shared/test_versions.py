"""The same data have the same name in whatever order they lie; a changed word gives another one."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import labels, versions
from shared.chat import PROMPT_VERSION
from shared.errors import UserError
from shared.feedback import Feedback, FeedbackStore, TurnSummary
from shared.library import DATASETS
from shared.versions import batch_version, datasets_version


def remark(answer_id: str, **fields: Any) -> Feedback:
    values: dict[str, Any] = {
        "kind": "thumbs_down", "question": "What helps?", "turn": TurnSummary(kind="answer", text="[1] Rest."), "passages": [],
        "model_version": "m-1", "index_version": "i-1", "prompt_version": PROMPT_VERSION,
    }  # fmt: skip
    return Feedback(answer_id=answer_id, **{**values, **fields})


# --- data folders ----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_order_of_rows_and_fields_does_not_matter(mini_datasets: Path, seed: int) -> None:
    before, rng = datasets_version(mini_datasets), random.Random(seed)
    for path in mini_datasets.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        rng.shuffle(rows)
        shuffled = [dict(rng.sample(list(row.items()), len(row))) for row in rows]
        path.write_text("\n\n".join(json.dumps(row, indent=None) for row in shuffled) + "\n", encoding="utf-8")
    assert datasets_version(mini_datasets) == before


def test_a_copy_elsewhere_has_the_same_name(mini_datasets: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mini_datasets, tmp_path / "elsewhere")
    (copy / "README.md").write_text("about", encoding="utf-8")
    assert datasets_version(copy) == datasets_version(mini_datasets)


@pytest.mark.parametrize("file", ["health_library/common-cold.md", "questions.jsonl", "harmful.jsonl"])
def test_a_changed_word_gives_another_name(mini_datasets: Path, file: str) -> None:
    before, path = datasets_version(mini_datasets), mini_datasets / file
    path.write_text(path.read_text(encoding="utf-8").replace("e", "E", 1), encoding="utf-8")
    assert datasets_version(mini_datasets) != before


def test_a_removed_row_a_renamed_leaflet_and_a_broken_line_give_other_names(mini_datasets: Path) -> None:
    names = [datasets_version(mini_datasets)]
    path = mini_datasets / "questions.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    names.append(datasets_version(mini_datasets))
    (mini_datasets / "health_library" / "sunburn.md").rename(mini_datasets / "health_library" / "sun-burn.md")
    names.append(datasets_version(mini_datasets))
    with path.open("ab") as stream:
        stream.write(b'{"torn": \xff\n')
    names.append(datasets_version(mini_datasets))
    assert len(set(names)) == 4


def test_a_folder_without_leaflets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no leaflets"):
        datasets_version(tmp_path)


# --- batches of records ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1), st.randoms(use_true_random=False))
def test_a_batch_has_one_name_in_any_order_and_with_repeats(numbers: list[int], rng: Any) -> None:
    batch = [remark(f"a-{n}") for n in numbers]
    again = [r.model_copy(update={"time": "2030-01-01T00:00:00+00:00"}) for r in batch + batch[:2]]
    rng.shuffle(again)
    assert batch_version(again) == batch_version(batch) == batch_version([remark(f"a-{n}") for n in set(numbers)])


@pytest.mark.parametrize("change", [{"reason": "wrong"}, {"question": "What helps"}, {"passages": ["gout/causes"]}])
def test_a_changed_record_gives_another_name(change: dict[str, Any]) -> None:
    assert batch_version([remark("a-1"), remark("a-2", **change)]) != batch_version([remark("a-1"), remark("a-2")])


def test_no_record_more_or_less_goes_unnoticed() -> None:
    names = {batch_version([remark(f"a-{n}") for n in range(size)]) for size in range(4)}
    assert len(names) == 4


def test_the_command_names_what_is_here(
    mini_datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("DATASETS", str(mini_datasets))
    FeedbackStore(tmp_path / "artifacts" / "feedback").add(remark("a-1"))
    report = tmp_path / "artifacts" / "data" / "d-1" / "report.json"
    report.parent.mkdir(parents=True)
    report.write_text('{"datasets": "ds-7"}', encoding="utf-8")
    assert versions.main([]) == 0
    said = capsys.readouterr().out
    assert datasets_version(mini_datasets) in said
    assert f"{batch_version([remark('a-1')])}  " in said
    assert labels.FILE in said
    assert "(from ds-7)" in said


def test_this_repositorys_data_have_a_name() -> None:
    assert datasets_version(DATASETS).startswith("ds-")
