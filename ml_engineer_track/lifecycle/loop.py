"""The loop, whole: what came back -> a candidate -> the gate -> a trial on people -> promoted, or not. Read this first.

    make loop                                  the two demonstrations (demonstration.py)
    make loop WATCH=1                          looks every hour whether there is reason to retrain your own model
    python -m ml_engineer_track loop           one look

Why an ML engineer lets a machine decide this: the hundredth retraining is decided at night by nobody, or by somebody tired. What
is written down beforehand (margins, who may not get worse, how sure is sure) is decided once, by day, and every turn can be
audited: `artifacts/loop/turns/` has what it was given, what it read and why it decided so.

One loop at a time. A turn that was interrupted goes on at the stage it was in. Until the one rename of the promotion, people
are answered by the model they were answered by before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from ml_engineer_track.checkpoint import Diverged
from ml_engineer_track.lifecycle import drift, registry, report, tracking
from ml_engineer_track.lifecycle.collect import Collected, collect, reason_to_retrain
from ml_engineer_track.lifecycle.exam import Exam, Reading, keep, make_exam, read_once, take_exam
from ml_engineer_track.lifecycle.gate import Check, gate
from ml_engineer_track.lifecycle.retrain import Trained, loop_of, publish_candidate, retrain
from ml_engineer_track.lifecycle.sequential import Comparison, compare, score
from ml_engineer_track.lifecycle.turn import Begin, End, Turn, new_turn, open_turn, step, turns
from shared import handoff, outcomes
from shared.errors import UserError
from shared.files import locked
from shared.library import Question, load_library
from shared.outcomes import Outcome
from shared.rollout import Rollout, clear_rollout, read_rollout, write_rollout
from shared.settings import Settings

#: asked for more answers while a candidate is on trial; False: not now, the turn stays open
More = Callable[[], bool]


def watch(settings: Settings) -> None:
    """Look again and again until the process is ended. The lock is held all the time.

    What a person can put right (a full disk, a damaged file) is said in a line, and the next look goes on where this one was.
    """
    options = loop_of(settings)
    with only_one(settings):
        while True:
            try:
                look(settings)
            except (UserError, OSError) as error:
                print(f"loop: {' '.join(str(error).split())}; the next look is in {options.every_seconds:g} s", flush=True)
            time.sleep(options.every_seconds)


def only_one(settings: Settings) -> AbstractContextManager[None]:
    """UserError when another loop works on these artifacts."""
    return locked(settings.artifacts / "loop", "another loop is running")


def look(settings: Settings, more: More = lambda: False, extra: dict[str, list[Question]] | None = None) -> Turn | None:
    """Go on with the open turn, or begin one if there is reason to. None when there is nothing to do.

    `extra` questions are put to both models and reported; nothing is decided on them.
    """
    for ended in turns(folder(settings)):
        if ended.end:
            ended.tidy()  # power failed between its end and this
    turn = open_turn(folder(settings)) or begin(settings)
    if turn is None:
        return None
    go_on(settings, turn, more, extra or {})
    if turn.end:
        tracking.log(settings, turn)
        removed = registry.collect_garbage(models(settings), feedback(settings), loop_of(settings).keep)
        if removed:
            print(f"loop: removed {', '.join(removed)}, which nobody needs any more", flush=True)
    report.write(settings)
    return turn


def begin(settings: Settings) -> Turn | None:
    """A new turn with the labels it will use, if there is reason for one."""
    options, current = loop_of(settings), handoff.current(models(settings))
    done = turns(folder(settings))
    tried = {label.id for turn in done for label in _collected(turn).labels}
    collected = collect(feedback(settings), models(settings), load_library(settings.datasets), options, tried)
    for note in collected.notes[:10]:
        print(f"  {note}", flush=True)
    if len(collected.notes) > 10:
        print(f"  and {len(collected.notes) - 10} more", flush=True)
    reason = reason_to_retrain(collected, current, options, lambda: _drift(settings))
    if reason is None:
        print(f"loop: nothing to do; {len(collected.labels)} new labels of {options.enough_labels}", flush=True)
        return None
    print(f"loop: {current.name} is retrained: {reason}", flush=True)
    turn = new_turn(folder(settings), Begin(parent=current.name, reason=reason), collected)
    step("begun")
    return turn


def go_on(settings: Settings, turn: Turn, more: More, extra: dict[str, list[Question]]) -> None:
    """All stages of a turn that are not done yet; the turn has ended afterwards, or waits for people."""
    begun, parent = turn.get("begin", Begin), models(settings) / turn.get("begin", Begin).parent
    try:
        candidate = make_candidate(settings, turn, parent, begun, extra)
    except Diverged as error:  # anything else (a full disk, too little memory) may be put right: the turn stays open
        return end(turn, End(result="failed", why=str(error)))
    checks = turn.once("checks", list[Check], lambda: examine(settings, turn, parent, models(settings) / candidate))
    for check in checks:
        print(f"  {check}", flush=True)
    if failed := [check for check in checks if not check.passed]:
        why = "; ".join(f"{check.name}: {check.says}" for check in failed)
        return end(turn, End(result="refused", why=why, candidate=candidate))
    serving = handoff.current(models(settings)).name
    if serving not in (parent.name, candidate):
        why = f"{serving} was made current meanwhile, and the candidate was compared with {parent.name}"
        clear_rollout(models(settings))
        return end(turn, End(result="refused", why=why, candidate=candidate))
    comparison = on_trial(settings, turn, parent.name, candidate, more)
    if comparison is None:
        return None
    if comparison.verdict != "promote":
        clear_rollout(models(settings))
        step("rollout ended")
        return end(turn, End(result="rolled back", why=str(comparison), candidate=candidate))
    registry.promote(models(settings), candidate)
    step("promoted")
    clear_rollout(models(settings))
    step("rollout cleared")
    return end(turn, End(result="promoted", why=str(comparison), candidate=candidate))


def make_candidate(settings: Settings, turn: Turn, parent: Path, begun: Begin, extra: dict[str, list[Question]]) -> str:
    """Retrained, asked everything, published beside the others. Diverged when the training does."""
    collected, work = _collected(turn), turn.work
    before = [_collected(earlier) for earlier in turns(folder(settings)) if _was_promoted(earlier)]
    trained = turn.once("trained", Trained, lambda: retrain(settings, parent, collected, before, work))
    exam = turn.once("exam", Exam, lambda: make_exam(settings, Path(trained.ranker), collected, extra, work / "exam"))
    lineage = handoff.Lineage(
        parent=parent.name, reason=begun.reason, feedback=collected.id, labels=[label.id for label in collected.taught]
    )

    def published() -> str:
        paths = {name: Path(path) for name, path in trained.folders.items()}
        reading: Reading = take_exam(settings, exam, paths, Path(trained.ranker), "the candidate")
        figures = reading.figures(settings.evaluate.bootstrap, settings.seed)
        made = publish_candidate(settings, parent, trained, dict.fromkeys(trained.folders, figures), lineage)
        keep(settings, reading.model_copy(update={"version": made.name}))
        return made.name

    return turn.once("candidate", str, published)


def examine(settings: Settings, turn: Turn, parent: Path, candidate: Path) -> list[Check]:
    exam: Exam = turn.get("exam", Exam)
    return gate(settings, parent, candidate, exam, _collected(turn), lambda version: read_once(settings, exam, version))


def on_trial(settings: Settings, turn: Turn, parent: str, candidate: str, more: More) -> Comparison | None:
    """Shadow, then canary. None: there are not enough answers yet, and nobody could say when there will be."""
    trial = loop_of(settings).trial

    def shadow() -> Comparison | None:
        _roll_out(settings, candidate, "shadow", trial.share)
        while True:
            seen = list(_since(settings))
            own = {o.answer_id: score(o) for o in seen if o.arm == "current" and o.model_version.startswith(parent)}
            pairs = [(score(o), own[o.answer_id]) for o in seen if o.arm == "shadow" and o.answer_id in own]
            found = compare([a for a, _ in pairs], [b for _, b in pairs], trial.margin, trial.error, paired=True)
            if found.verdict == "roll back" or found.pairs >= trial.shadow_answers:
                return found
            if not more():
                print(f"loop: {candidate} in the shadow: {found.pairs} of {trial.shadow_answers} answers", flush=True)
                return None

    def canary() -> Comparison | None:
        _roll_out(settings, candidate, "canary", trial.share)
        while True:
            seen = list(_since(settings))
            arms = [
                [score(o) for o in seen if o.arm == arm and o.model_version.startswith(version)]
                for arm, version in (("candidate", candidate), ("current", parent))
            ]
            found = compare(arms[0], arms[1], trial.margin, trial.error)
            if found.verdict != "go on" or sum(map(len, arms)) >= trial.canary_answers:
                return found
            if not more():
                print(f"loop: {candidate} as canary: {found}", flush=True)
                return None

    for name, work in (("shadow", shadow), ("canary", canary)):
        found = turn.get(name, Comparison)
        if found is None and (found := work()) is None:
            return None
        turn.put(name, Comparison, found)
        step(f"{name}: written")
        if name == "shadow" and found.verdict == "roll back":
            return found
    return found


def end(turn: Turn, how: End) -> None:
    step("before the end")
    turn.put("end", End, how)
    step("ended")
    turn.tidy()
    print(f"loop: turn {turn.number} {how.result}{f' ({how.candidate})' if how.candidate else ''}: {how.why}", flush=True)


def models(settings: Settings) -> Path:
    return settings.artifacts / "models"


def feedback(settings: Settings) -> Path:
    return settings.artifacts / "feedback"


def folder(settings: Settings) -> Path:
    return settings.artifacts / "loop"


def _drift(settings: Settings) -> str | None:
    """What has changed in what people ask since Monday, in a sentence; None when nothing has, or too little was asked."""
    found = drift.check(settings, drift.monday(time.time()))
    return found.sentence if found.drifted else None


def _roll_out(settings: Settings, candidate: str, mode: str, share: float) -> None:
    """Begin this part of the trial unless it is going on already."""
    going_on = read_rollout(models(settings))
    if going_on is None or (going_on.candidate, going_on.mode) != (candidate, mode):
        write_rollout(models(settings), Rollout(candidate=candidate, mode=mode, share=share))  # type: ignore[arg-type]
        step(f"{mode}: begun")


def _since(settings: Settings) -> Iterable[Outcome]:
    """What happened since this part of the trial began."""
    rollout = read_rollout(models(settings))
    return (o for o in outcomes.read(feedback(settings))[0] if rollout and o.time >= rollout.since)


def _collected(turn: Turn) -> Collected:
    found: Collected = turn.get("collected", Collected)
    return found


def _was_promoted(turn: Turn) -> bool:
    return turn.end is not None and turn.end.result == "promoted"
