"""The registry: every move leaves a whole model current, and nothing that somebody needs is removed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track import __main__ as cli
from ml_engineer_track.lifecycle import registry as r
from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.turn import DIE_AT, Begin, End, new_turn
from shared import handoff
from shared.errors import UserError
from shared.handoff import Lineage
from shared.labels import Label, LabelStore
from shared.rollout import Rollout, read_rollout, write_rollout


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Does something in a process of its own, in which power fails at a step."""

    def run(step: str | None, work: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            if step:
                patch.setenv(DIE_AT, step)
            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
            process.join(60)
        assert process.exitcode == -signal.SIGKILL

    return run


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    return tmp_path / "artifacts" / "feedback"


def test_back_and_forth(models: Path, publish_version: Callable[..., Path]) -> None:
    publish_version("m-1")
    publish_version("m-22", make_current=False)
    r.promote(models, "m-22")
    assert (handoff.current(models).name, r.previous(models)) == ("m-22", "m-1")
    assert r.roll_back(models) == "m-1"
    assert handoff.current(models).name == "m-1"


def test_whoever_moved_current_a_rollback_goes_to_the_one_before(models: Path, publish_version: Callable[..., Path]) -> None:
    """`make ml` and `make distill` publish, and another preset's version that is there is only pointed to."""
    for version in ("m-1", "m-22", "m-333"):
        publish_version(version)
    handoff.set_current(models, "m-22")
    handoff.set_current(models, "m-22")  # the same again is no move
    assert r.roll_back(models) == "m-333"


def test_a_second_rollback_goes_further_back_and_never_forth(models: Path, publish_version: Callable[..., Path]) -> None:
    for version in ("m-1", "m-22", "m-333"):
        publish_version(version)
    assert [r.roll_back(models), r.roll_back(models)] == ["m-22", "m-1"]
    with pytest.raises(UserError, match="no version to go back to"):
        r.roll_back(models)
    assert handoff.current(models).name == "m-1"
    publish_version("m-4444")  # and from there on it is the model that was put back
    assert r.roll_back(models) == "m-1"


def test_a_rollback_ends_the_trial_that_goes_on(models: Path, publish_version: Callable[..., Path]) -> None:
    publish_version("m-1")
    publish_version("m-22", make_current=False)
    r.promote(models, "m-22")
    write_rollout(models, Rollout(candidate="m-333", mode="canary", share=0.5))
    r.roll_back(models)
    assert read_rollout(models) is None


def test_power_fails_between_the_two_lines_of_a_promotion(models: Path, publish_version: Callable[..., Path]) -> None:
    publish_version("m-1")
    lineage = Lineage(parent="m-1", reason="labels", feedback="f-1")
    publish_version("m-22", lineage=lineage)
    (models / "previous").write_text("m-22\n", encoding="utf-8")  # written, and then nothing more happened
    assert r.roll_back(models) == "m-1"


def test_power_fails_between_remembering_the_old_version_and_pointing_to_the_new_one(
    models: Path, publish_version: Callable[..., Path], killed_at: Callable[..., None]
) -> None:
    publish_version("m-1")
    publish_version("m-22")
    publish_version("m-333", make_current=False)

    def half() -> None:
        write = handoff.write_text

        def dies(path: Path, text: str) -> None:
            if path.name == "current":
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, text)

        handoff.write_text = dies  # type: ignore[assignment]
        r.promote(models, "m-333")

    killed_at(None, half)
    assert (handoff.current(models).name, r.previous(models)) == ("m-22", "m-1")
    assert r.roll_back(models) == "m-1"


def test_power_fails_in_a_rollback(models: Path, publish_version: Callable[..., Path], killed_at: Callable[..., None]) -> None:
    """No trial may go on beside a model that it was not begun beside; the command is given again."""
    publish_version("m-1")
    publish_version("m-22")
    write_rollout(models, Rollout(candidate="m-333", mode="canary", share=0.5))
    killed_at("rollback: the trial has ended", lambda: r.roll_back(models))
    assert (handoff.current(models).name, read_rollout(models)) == ("m-22", None)
    assert r.roll_back(models) == "m-1"


def test_there_is_nothing_to_go_back_to(models: Path, publish_version: Callable[..., Path]) -> None:
    publish_version("m-1")
    with pytest.raises(UserError, match="no version to go back to"):
        r.roll_back(models)
    assert handoff.current(models).name == "m-1"


def test_a_damaged_version_is_neither_promoted_nor_gone_back_to(models: Path, publish_version: Callable[..., Path]) -> None:
    publish_version("m-1")
    publish_version("m-22", make_current=False)
    (models / "m-22" / "q8_0" / "model.safetensors").write_bytes(b"other bytes")
    with pytest.raises(UserError, match="checksum"):
        r.promote(models, "m-22")
    assert handoff.current(models).name == "m-1"
    (models / "previous").write_text("m-22\n", encoding="utf-8")
    with pytest.raises(UserError, match="checksum"):
        r.roll_back(models)
    assert handoff.current(models).name == "m-1"


def test_garbage_is_what_nobody_needs(
    models: Path, feedback: Path, publish_version: Callable[..., Path], a_label: Callable[..., Label]
) -> None:
    for number in range(1, 9):
        publish_version("m-" + str(number) * number)
    r.promote(models, "m-1")
    r.promote(models, "m-22")
    r.pin(models, "m-333")
    write_rollout(models, Rollout(candidate="m-4444", mode="shadow", share=0.5))
    LabelStore(feedback).add(a_label(model_version="m-55555:q8_0"))
    removed = r.collect_garbage(models, feedback, keep=1)
    assert removed == ["m-7777777", "m-666666"]
    left = {path.parent.name for path in models.glob("*/manifest.json")}
    assert left == {"m-1", "m-22", "m-333", "m-4444", "m-55555", "m-88888888"}
    assert not list(models.glob(".*"))
    r.pin(models, "m-333", pinned=False)
    assert r.collect_garbage(models, feedback, keep=0) == ["m-88888888", "m-333"]


def test_what_a_kept_version_was_trained_on_from_is_kept(
    models: Path, feedback: Path, publish_version: Callable[..., Path]
) -> None:
    """Without its ancestors nobody can say what a version was trained on (`python -m shared.lineage`)."""

    def child(version: str, parent: str, **more: Any) -> None:
        publish_version(version, lineage=Lineage(parent=parent, reason="labels", feedback="f-1"), **more)

    publish_version("m-1")
    child("m-22", "m-1")
    publish_version("m-333")
    publish_version("m-4444")
    child("m-55555", "m-22")
    child("m-666666", "m-333", make_current=False)
    publish_version("m-7777777", make_current=False)
    child("m-88888888", "m-7777777", make_current=False)
    kept = {v.manifest.version: v.roles for v in r.versions(models, feedback) if v.roles}
    assert kept == {"m-55555": ["current"], "m-4444": ["previous"], "m-22": ["ancestor"], "m-1": ["ancestor"]}
    assert r.collect_garbage(models, feedback, keep=1) == ["m-666666", "m-333"]


def test_an_open_turn_keeps_its_candidate_and_the_version_it_began_from(
    models: Path, feedback: Path, publish_version: Callable[..., Path]
) -> None:
    for version in ("m-1", "m-22", "m-333", "m-4444"):
        publish_version(version)
    nothing = Collected(id="fb-1", taught=[], examined=[], decided=[], counts={}, notes=[])
    turn = new_turn(models.parent / "loop", Begin(parent="m-1", reason="60 new labels"), nothing)
    turn.put("candidate", str, "m-22")
    assert r.collect_garbage(models, feedback, keep=0) == []
    roles = {v.manifest.version: v.roles for v in r.versions(models, feedback)}
    assert (roles["m-1"], roles["m-22"]) == (["ancestor"], ["candidate"])
    turn.put("end", End, End(result="refused", why="it is worse", candidate="m-22"))
    assert r.collect_garbage(models, feedback, keep=0) == ["m-22", "m-1"]


def test_the_list_says_who_is_what(models: Path, feedback: Path, publish_version: Callable[..., Path], capsys) -> None:  # type: ignore[no-untyped-def]
    publish_version("m-1")
    publish_version("m-22", lineage=Lineage(parent="m-1", reason="60 new labels", feedback="f-1"), make_current=False)
    r.promote(models, "m-22")
    roles = {v.manifest.version: v.roles for v in r.versions(models, feedback)}
    assert roles == {"m-1": ["previous", "ancestor"], "m-22": ["current"]}
    r.show(r.versions(models, feedback))
    assert "60 new labels" in " ".join(capsys.readouterr().out.split())


def test_a_version_that_is_not_there_cannot_be_pinned(models: Path) -> None:
    with pytest.raises(UserError, match="no version 'm-9'"):
        r.pin(models, "m-9")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models", "rollback"], "no model has been published"),
        (["models", "pin"], "which version?"),
        (["models", "pin", "m-9"], "no version 'm-9'"),
        (["models", "sell"], "unknown action 'sell'"),
        (["loop", "--preset", "tiny"], "no `loop:` group"),
        (["loop"], "no model has been published"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setenv("ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr("sys.argv", ["ml_engineer_track", *arguments])
    assert cli.main() == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
