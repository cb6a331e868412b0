"""The registry: every move leaves a whole model current, and nothing that somebody needs is removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ml_engineer_track import __main__ as cli
from ml_engineer_track.lifecycle import registry as r
from shared import handoff
from shared.errors import UserError
from shared.handoff import Lineage
from shared.labels import Label, LabelStore
from shared.rollout import Rollout, read_rollout, write_rollout


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


def test_the_list_says_who_is_what(models: Path, feedback: Path, publish_version: Callable[..., Path], capsys) -> None:  # type: ignore[no-untyped-def]
    publish_version("m-1")
    publish_version("m-22", lineage=Lineage(parent="m-1", reason="60 new labels", feedback="f-1"), make_current=False)
    r.promote(models, "m-22")
    roles = {v.manifest.version: v.roles for v in r.versions(models, feedback)}
    assert roles == {"m-1": ["previous"], "m-22": ["current"]}
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
