"""The loop: whatever happens, and wherever power fails, people are answered by a whole model that was promoted at some time."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track.checkpoint import Diverged
from ml_engineer_track.lifecycle import loop as l
from ml_engineer_track.lifecycle import turn as t
from ml_engineer_track.lifecycle.collect import Collected
from ml_engineer_track.lifecycle.exam import Exam, Reading
from ml_engineer_track.lifecycle.gate import Check
from ml_engineer_track.lifecycle.retrain import Trained
from shared import handoff
from shared.errors import UserError
from shared.labels import Label, LabelStore
from shared.outcomes import Outcome, OutcomeStore
from shared.rollout import read_rollout
from shared.settings import Settings

PASSED = Check(name="evidence", passed=True, says="as good")
EXAM = Exam(items=[], decisions=[])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, publish_version: Callable[..., Path]) -> Callable[..., None]:
    """The stages that take time leave what they leave, at once; a test says what the gate finds."""

    def trained(settings: Settings, current: Path, collected: Any, before: Any, work: Path) -> Trained:
        return Trained(
            folders={"bf16": "", "q8_0": ""}, weight_bytes={}, ranker="", data="", steps=1, validation_loss=1.0,
            seconds=1.0,
        )  # fmt: skip

    def candidate(settings: Settings, current: Path, trained: Trained, quality: Any, lineage: handoff.Lineage) -> Path:
        return publish_version("m-new", make_current=False, lineage=lineage)

    reading = Reading(version="m-new", exam=EXAM.id, scores={}, log_probability={}, decided={}, samples=[])
    monkeypatch.setattr(l, "retrain", trained)
    monkeypatch.setattr(l, "make_exam", lambda *given: EXAM)
    monkeypatch.setattr(l, "take_exam", lambda *given: reading)
    monkeypatch.setattr(l, "read_once", lambda *given: reading)
    monkeypatch.setattr(l, "publish_candidate", candidate)
    monkeypatch.setattr(l, "gate", lambda *given: [PASSED])

    def change(**stages: Any) -> None:
        for name, work in stages.items():
            monkeypatch.setattr(l, name, work)

    return change


@pytest.fixture
def begun(settings: Settings, publish_version: Callable[..., Path], a_label: Callable[..., Label]) -> Settings:
    """A served model, and labels enough to change it."""
    publish_version("m-old")
    store = LabelStore(l.feedback(settings))
    for number in range(60):
        store.add(a_label(number))
    return settings


@pytest.fixture
def people(begun: Settings) -> Callable[..., l.More]:
    """Answers to people: each call is twenty conversations, a share of the candidate's and of the current model's good ones."""
    store = OutcomeStore(l.feedback(begun))
    count = iter(range(10**6))

    def crowd(good: float = 1.0) -> l.More:
        def more() -> bool:
            rollout = read_rollout(l.models(begun))
            assert rollout is not None
            for _ in range(20):
                number = next(count)
                arm = "current" if rollout.mode == "shadow" or number % 2 else "candidate"
                fine = arm == "current" or number % 100 < 100 * good
                say(store, number, arm, fine)
                if rollout.mode == "shadow":
                    say(store, number, "shadow", number % 100 < 100 * good)
            return True

        return more

    return crowd


def say(store: OutcomeStore, number: int, arm: Any, fine: bool) -> None:
    version = "m-old:q8_0" if arm == "current" else "m-new:q8_0"
    kind = "answer" if fine else "not_answered"
    store.add(Outcome(answer_id=f"o-{number}", arm=arm, model_version=version, kind=kind, seconds=0.1))


def served(settings: Settings) -> str:
    """Who answers people now; it must be whole."""
    folder = handoff.current(l.models(settings))
    handoff.verify(folder)
    return folder.name


@pytest.mark.usefixtures("quick")
def test_a_good_candidate_is_tried_in_the_shadow_then_on_people_then_promoted(
    begun: Settings, people: Callable[..., l.More]
) -> None:
    modes = []
    more = people()

    def watched() -> bool:
        rollout = read_rollout(l.models(begun))
        modes.append(rollout.mode if rollout else None)
        assert served(begun) == "m-old"  # nobody else answers before the trial is over
        return more()

    turn = l.look(begun, watched)
    assert turn is not None
    assert turn.end is not None
    assert turn.end.result == "promoted"
    assert served(begun) == "m-new"
    assert list(dict.fromkeys(modes)) == ["shadow", "canary"]
    assert read_rollout(l.models(begun)) is None
    lineage = handoff.read_manifest(l.models(begun) / "m-new").lineage
    assert lineage is not None
    assert lineage.parent == "m-old"
    assert (begun.artifacts / "reports" / "loop.html").exists()


@pytest.mark.usefixtures("quick")
def test_a_candidate_that_people_get_nothing_from_is_rolled_back(begun: Settings, people: Callable[..., l.More]) -> None:
    turn = l.look(begun, people(good=0.2))
    assert turn is not None
    assert turn.end is not None
    assert turn.end.result == "rolled back"
    assert served(begun) == "m-old"
    assert read_rollout(l.models(begun)) is None


def test_what_the_gate_refuses_nobody_sees(begun: Settings, quick: Callable[..., None]) -> None:
    bad = Check(name="emergencies", passed=False, says="fewer of them are escalated")
    quick(gate=lambda *given: [PASSED, bad])
    turn = l.look(begun, lambda: pytest.fail("there is no trial"))
    assert turn is not None
    assert turn.end is not None
    assert (turn.end.result, turn.end.why) == ("refused", "emergencies: fewer of them are escalated")
    assert served(begun) == "m-old"
    assert l.look(begun) is None  # the same labels are not tried again


def test_a_training_that_diverges_ends_the_turn_with_a_line(
    begun: Settings, quick: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def diverges(*given: Any) -> Trained:
        raise Diverged("training diverged (validation loss nan)", "step 125", "Lower finetune.learning_rate")

    quick(retrain=diverges)
    turn = l.look(begun)
    assert turn is not None
    assert turn.end is not None
    assert turn.end.result == "failed"
    assert "training diverged" in capsys.readouterr().out.splitlines()[-1]
    assert served(begun) == "m-old"


@pytest.mark.parametrize("stage", ["retrain", "take_exam", "publish_candidate"])
def test_what_can_be_put_right_leaves_the_turn_open_and_its_labels_untried(
    begun: Settings, quick: Callable[..., None], people: Callable[..., l.More], stage: str
) -> None:
    works = getattr(l, stage)

    def fails(*given: Any) -> Any:
        raise UserError("not enough memory", stage, "Set VRAM_GB")

    quick(**{stage: fails})
    with pytest.raises(UserError, match="not enough memory"):
        l.look(begun)
    (turn,) = t.turns(l.folder(begun))
    assert turn.end is None
    quick(**{stage: works})
    again = l.look(begun, people())
    assert again is not None
    assert (again.number, again.end and again.end.result) == (1, "promoted")


@pytest.mark.usefixtures("quick")
def test_without_people_the_turn_waits_and_goes_on_later(begun: Settings, people: Callable[..., l.More]) -> None:
    first = l.look(begun)
    assert first is not None
    assert first.end is None
    assert read_rollout(l.models(begun)) is not None
    assert served(begun) == "m-old"
    second = l.look(begun, people())
    assert second is not None
    assert (second.number, second.end and second.end.result) == (1, "promoted")


@pytest.mark.usefixtures("quick")
def test_somebody_else_changed_the_model_meanwhile(begun: Settings, publish_version: Callable[..., Path]) -> None:
    l.look(begun)
    publish_version("m-other")
    turn = l.look(begun)
    assert turn is not None
    assert turn.end is not None
    assert turn.end.result == "refused"
    assert served(begun) == "m-other"
    assert read_rollout(l.models(begun)) is None


def test_two_loops_at_once(begun: Settings) -> None:
    with l.only_one(begun), pytest.raises(UserError, match="another loop is running") as caught, l.only_one(begun):
        pass
    assert "\n" not in str(caught.value)


def test_nothing_to_do(settings: Settings, publish_version: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    publish_version("m-old")
    assert l.look(settings) is None
    assert "nothing to do" in capsys.readouterr().out


# --- the watch -------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """How the tests end a watch."""


@pytest.fixture
def naps(begun: Settings, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds a watch was to sleep. It does not, nobody else gets its lock meanwhile, and the third time it is stopped."""
    asked: list[float] = []

    def sleep(seconds: float) -> None:
        with pytest.raises(UserError, match="another loop is running"), l.only_one(begun):
            pass
        asked.append(seconds)
        if len(asked) == 3:
            raise StoppedError

    monkeypatch.setattr(l.time, "sleep", sleep)
    return asked


@pytest.mark.parametrize("error", [UserError("a record is damaged", "x.json", "Remove it"), OSError(28, "No space\nleft")])
def test_a_watch_goes_on_after_what_can_be_put_right_and_is_the_only_one(
    begun: Settings, naps: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def look(settings: Settings) -> None:
        if len(naps) == 1:
            raise error

    monkeypatch.setattr(l, "look", look)
    with pytest.raises(StoppedError):
        l.watch(begun)
    assert begun.loop is not None
    assert naps == [begun.loop.every_seconds] * 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("loop: ")
    with l.only_one(begun):
        pass  # it let go


@pytest.mark.usefixtures("naps")
def test_a_disk_that_was_full_for_an_hour_costs_a_watch_one_look(begun: Settings, quick: Callable[..., None]) -> None:
    works, calls = l.retrain, iter(range(9))

    def full_once(*given: Any) -> Any:
        if next(calls) == 0:
            raise OSError(28, "No space left on device")
        return works(*given)

    quick(retrain=full_once)
    with pytest.raises(StoppedError):
        l.watch(begun)
    (turn,) = t.turns(l.folder(begun))
    assert turn.end is None
    rollout = read_rollout(l.models(begun))
    assert rollout is not None
    assert rollout.candidate == "m-new"


# --- where power fails -----------------------------------------------------------------------------------------------

STEPS = [
    "collected", "begun", *(f"{stage}: {when}" for stage in ("trained", "exam", "candidate", "checks")
                            for when in ("begin", "done, not written", "written")),
    "shadow: begun", "shadow: written", "canary: begun", "canary: written", "promoted", "rollout cleared", "before the end",
]  # fmt: skip


@pytest.fixture
def fork() -> Any:
    return multiprocessing.get_context("fork")


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_power_fails_at_every_step_of_a_promotion(begun: Settings, people: Callable[..., l.More], fork: Any) -> None:
    """The process is killed at each step, one after the other; each time the turn goes on where it was."""
    more = people()
    seen = []

    def crowd() -> bool:  # in the process that will be killed: its conversations must not begin anew
        return more()

    for step in STEPS:

        def work(step: str = step) -> None:
            os.environ[t.DIE_AT] = step
            l.look(begun, crowd)

        process = fork.Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == -9, f"not killed at {step!r}"
        seen.append(served(begun))
    assert seen == ["m-old"] * STEPS.index("promoted") + ["m-new"] * (len(STEPS) - STEPS.index("promoted"))
    turn = l.look(begun, lambda: pytest.fail("the trial is over"))
    assert turn is not None
    assert (turn.number, turn.end and turn.end.result) == (1, "promoted")
    assert served(begun) == "m-new"
    assert read_rollout(l.models(begun)) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_power_fails_while_a_rollback_is_written(begun: Settings, people: Callable[..., l.More], fork: Any) -> None:
    for step in ("canary: written", "rollout ended", "before the end"):

        def work(step: str = step) -> None:
            os.environ[t.DIE_AT] = step
            l.look(begun, people(good=0.6))

        process = fork.Process(target=work)
        process.start()
        process.join(60)
        assert process.exitcode == -9, f"not killed at {step!r}"
        assert served(begun) == "m-old"
    turn = l.look(begun)
    assert turn is not None
    assert turn.end is not None
    assert turn.end.result == "rolled back"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_what_a_turn_worked_on_goes_with_its_end(
    begun: Settings, quick: Callable[..., None], people: Callable[..., l.More], fork: Any
) -> None:
    """Also when power fails between the two."""
    trains = l.retrain

    def leaves_files(settings: Settings, current: Path, collected: Any, before: Any, work: Path) -> Trained:
        (work / "finetune").mkdir(parents=True)
        (work / "finetune" / "optimizer.pt").write_bytes(b"much")
        return trains(settings, current, collected, before, work)

    quick(retrain=leaves_files)
    turn = l.look(begun)
    assert turn is not None
    assert (turn.work / "finetune" / "optimizer.pt").exists()  # the trial goes on

    def work() -> None:
        os.environ[t.DIE_AT] = "ended"
        l.look(begun, people())

    process = fork.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -9
    assert turn.end is not None
    assert turn.work.exists()
    assert l.look(begun) is None
    assert not turn.work.exists()
    assert {path.name for path in turn.folder.iterdir()} >= {"begin.json", "exam.json", "candidate.json", "end.json"}


@pytest.mark.usefixtures("quick")
def test_a_turn_leaves_no_work_behind(begun: Settings, people: Callable[..., l.More]) -> None:
    waiting = l.look(begun)
    assert waiting is not None
    waiting.work.mkdir(exist_ok=True)
    ended = l.look(begun, people())
    assert ended is not None
    assert ended.end is not None
    assert not ended.work.exists()


def test_no_turn_is_written_over(tmp_path: Path) -> None:
    """The first was removed by hand: the next one is the fourth, and not the third once more."""
    nothing = Collected(id="fb-1", taught=[], examined=[], decided=[], counts={}, notes=[])
    begin = t.Begin(parent="m-old", reason="60 new labels")
    made = [t.new_turn(tmp_path, begin, nothing) for _ in range(3)]
    shutil.rmtree(made[0].folder)
    assert t.new_turn(tmp_path, begin, nothing).number == 4


def test_a_damaged_record_of_a_stage_is_named(tmp_path: Path) -> None:
    turn = t.Turn(tmp_path)
    (tmp_path / "candidate.json").write_text('{"half', encoding="utf-8")
    with pytest.raises(UserError, match=r"candidate\.json"):
        turn.get("candidate", str)
