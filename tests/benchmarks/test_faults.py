"""What a trial counts, and that its damage is real damage."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import faults as f
from benchmarks.faults import FAULTS, Trial, faults, need_index, scribble, sentence, verbatim
from shared import library as lib
from shared.errors import UserError
from shared.files import write_text
from shared.settings import load_settings


def trial(**changed: object) -> Trial:
    values: dict[str, object] = {
        "fault": "x",
        "conversations": 20,
        "answered": 100,
        "gave_up": 0,
        "wrong_answers": 0,
        "feedback_acknowledged": 90,
        "feedback_lost": 0,
        "exchanges_lost": 0,
        "untold": 0,
        "told": {},
        "ready_again_s": 1.0,
        "longest_wait_s": 3.0,
    }
    return Trial(**(values | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["gave_up", "wrong_answers", "feedback_lost", "exchanges_lost", "untold"])
def test_one_loss_is_enough_not_to_hold(what: str) -> None:
    assert trial().held
    assert not trial(**{what: 1}).held
    assert not trial(ready_again_s=None).held


def test_a_changed_quote_is_a_wrong_answer(mini_datasets: Path) -> None:
    library = lib.load_library(mini_datasets)
    known = next(iter(library)).sentences()[0]
    right = {"sentence_id": known.id, "text": known.text}
    assert verbatim({"kind": "answer", "citations": [right]}, library)
    assert not verbatim({"kind": "answer", "citations": [right | {"text": known.text + "!"}]}, library)
    assert not verbatim({"kind": "answer", "citations": [right | {"sentence_id": "no/such/1"}]}, library)


def test_an_answer_without_a_quote_is_a_wrong_answer(mini_datasets: Path) -> None:
    library = lib.load_library(mini_datasets)
    assert not verbatim({"kind": "answer", "citations": []}, library)
    assert verbatim({"kind": "decline", "citations": []}, library)


def test_a_break_that_did_not_go_as_meant_does_not_hold_and_the_table_says_why() -> None:
    missed = trial(note="killed too late; index in use unchanged", as_meant=False)
    assert not missed.held
    (row,) = f.rows([asdict(missed) | {"held": missed.held}])
    assert len(row) == len(f.HEAD)
    assert row[1] == "NO"
    assert row[-1] == "killed too late; index in use unchanged"


@pytest.mark.parametrize(("late", "changed"), [(False, False), (True, False), (False, True)])
def test_a_killed_build_must_be_in_time_and_leave_the_index_in_use(
    late: bool, changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini_datasets: Path
) -> None:
    root = tmp_path / "index"
    root.mkdir()
    (root / "current").write_text("i-1", encoding="utf-8")

    @contextmanager
    def build(service: object, arguments: object, **environment: str) -> Iterator[SimpleNamespace]:
        (root / "i-2").mkdir()
        if changed:
            (root / "current").write_text("i-2", encoding="utf-8")
        yield SimpleNamespace(poll=lambda: 0 if late else None, kill=lambda: None)

    monkeypatch.setattr(f, "child", build)
    service = SimpleNamespace(artifacts=tmp_path)
    broke = f.kill_index_build(service, load_settings("tiny", datasets=mini_datasets))  # type: ignore[arg-type]
    assert broke.as_meant is not (late or changed)
    assert ("too late" in broke.note, "CHANGED" in broke.note) == (late, changed)


def test_a_damaged_model_after_a_killed_training_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def training(service: object, arguments: object, **environment: str) -> Iterator[SimpleNamespace]:
        (tmp_path / "runs" / "r" / "finetune" / "step").mkdir(parents=True)
        yield SimpleNamespace(poll=lambda: None, kill=lambda: None)

    def damaged(version: Path) -> None:
        raise UserError("a file changed", str(version))

    monkeypatch.setattr(f, "child", training)
    monkeypatch.setattr(f, "current", lambda models: models / "m-1")
    monkeypatch.setattr(f, "verify", damaged)
    broke = f.kill_training(SimpleNamespace(artifacts=tmp_path), load_settings("tiny"))  # type: ignore[arg-type]
    assert not broke.as_meant
    assert "DAMAGED (a file changed" in broke.note


def test_only_a_disk_that_cannot_be_mounted_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(settings: object, name: str) -> Trial:
        raise (f.CannotMountError if name == "full-disk" else UserError)("it failed")

    monkeypatch.setattr(f, "trial", fails)
    write_text(tmp_path / "index" / "current", "i-1\n")  # nothing is built
    found = faults(load_settings("tiny", artifacts=tmp_path), ["full-disk", "kill-training"])
    assert found["skipped"] == {"full-disk": "it failed"}
    (told,) = found["trials"]
    assert (told["fault"], told["held"], told["note"]) == ("kill-training", False, "failed: it failed")


def test_without_an_index_one_is_built_or_one_line_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 2, "", "much ado\nerror: no model. Run `make ml`\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match=r"no index, and none could be built \(error: no model. Run `make ml`\)"):
        need_index(tmp_path)
    done.returncode = 0
    need_index(tmp_path)


def test_the_sentence_of_an_error_is_found_and_anything_else_is_none() -> None:
    assert sentence('{"error": {"message": "Too many people are asking."}}') == "Too many people are asking."
    assert sentence("<html>Bad gateway</html>") == ""
    assert sentence("[]") == ""


def test_damage_leaves_size_and_first_page_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(60_000))
    assert scribble(path) == 20_000
    content = path.read_bytes()
    assert len(content) == 60_000
    assert content[:4096] == bytes(4096)
    assert content != bytes(60_000)
    assert scribble(tmp_path / "none") == 0


def test_an_unknown_fault_is_one_line() -> None:
    with pytest.raises(UserError, match="no such fault"):
        faults(load_settings("tiny"), ["meteor"])
    assert len(FAULTS) >= 8
