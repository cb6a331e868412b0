"""The verdict on two windows: what it says, what it is based on, and that it does not invent an opinion from too little."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml_engineer_track import __main__ as cli
from ml_engineer_track.lifecycle import drift as d
from ml_engineer_track.lifecycle import drift_study
from ml_engineer_track.lifecycle.drift import Lens, Seen, Verdict, Window
from shared import outcomes
from shared.chat import Verdict as JudgeVerdict
from shared.feedback import Feedback, FeedbackStore, TurnSummary
from shared.library import DATASETS, OtherLanguage, load_library, read_rows
from shared.outcomes import Outcome, OutcomeStore
from shared.settings import load_settings
from tests.ml_engineer_track.conftest import WordVectors

DAY = 86_400.0
QUESTIONS = [
    f"What {verb} {thing}{end}"
    for verb in ("helps against", "causes", "eases", "prevents")
    for thing in ("a common cold", "influenza", "sunburn", "minor burns", "tonsillitis", "laryngitis")
    for end in ("", " in children", " at night when I cannot sleep")
]


@pytest.fixture(scope="module")
def lens(tmp_path_factory: pytest.TempPathFactory) -> Lens:
    from tests.conftest import write_mini_datasets

    library = load_library(write_mini_datasets(tmp_path_factory.mktemp("mini") / "datasets"))
    return Lens(library, WordVectors().embed, WordVectors().embed)


def messages(n: int, seed: int, begin: float = 0.0, score: float = 0.9, refused: float = 0.1, **fields: Any) -> list[Seen]:
    """Messages an hour apart, with what the product made of them."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        kind = "not_answered" if rng.random() < refused else "answer"
        mark = float(rng.random() < score) if kind == "answer" else None
        values = {"question": str(rng.choice(QUESTIONS)), "kind": kind, "score": mark} | fields
        made.append(Seen(time=begin + 3_600 * i, **values))
    return made


def compare(lens: Lens, reference: list[Seen], current: list[Seen]) -> Verdict:
    return d.compare(lens(reference), lens(current), lens.topics)


def blamed(verdict: Verdict) -> set[str]:
    return {test.name for test in verdict.tests if test.alarm}


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_nothing_changed_is_said_in_one_sentence_of_plain_words(lens: Lens) -> None:
    verdict = compare(lens, messages(900, 1), messages(300, 2))
    assert verdict.drifted is False
    assert verdict.since is None
    assert verdict.sentence.startswith("Nothing changed that the tests can see in 300 messages now beside 900 before.")
    assert "\n" not in verdict.sentence
    assert {test.name for test in verdict.tests} == set(d.WATCHED)


def test_a_fallen_score_is_named_with_its_figures_and_its_time(lens: Lens) -> None:
    begin = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
    verdict = compare(lens, messages(900, 1), messages(300, 2, begin, score=0.5))
    assert verdict.drifted is True
    assert blamed(verdict) == {"score"}
    test = next(t for t in verdict.tests if t.alarm)
    assert test.before == pytest.approx(0.9, abs=0.05)
    assert test.now == pytest.approx(0.5, abs=0.1)
    assert "the judge's score (0." in verdict.sentence
    assert "November 2026" in verdict.sentence
    assert verdict.since is not None
    assert begin < verdict.since < begin + 300 * 3_600


def test_more_refusals_are_named(lens: Lens) -> None:
    assert {"refused", "answered"} <= blamed(compare(lens, messages(900, 1), messages(300, 2, refused=0.4)))


def test_a_single_new_question_asked_by_everyone_is_a_change_of_what_is_asked(lens: Lens) -> None:
    same = messages(300, 2, question="What helps against sunburn")
    verdict = compare(lens, messages(900, 1), same)
    assert {"meaning", "length"} & blamed(verdict)
    assert not {"score", "refused", "answered"} & blamed(verdict)


def test_words_of_another_language_are_a_change(lens: Lens) -> None:
    foreign = [row.question for row in read_rows(DATASETS, "other_languages.jsonl", OtherLanguage)[0]]
    mixed = [s if i % 2 else Seen(s.time, s.kind, foreign[i % 40], s.score) for i, s in enumerate(messages(300, 2))]
    assert {"meaning", "distance"} & blamed(compare(lens, messages(900, 1), mixed))


def test_an_hour_later_the_evidence_goes_on_where_it_ended(lens: Lens) -> None:
    """Otherwise looking every hour would be many tests, and not one."""
    reference, current = lens(messages(900, 1)), lens(messages(400, 2, score=0.8))
    early = d.wealth(reference, current.take(np.arange(250)), len(lens.topics))
    late = d.wealth(reference, current, len(lens.topics))
    for name, path in early.items():
        assert late[name][:250] == pytest.approx(path), name


def test_false_alarms_stay_within_the_promise(lens: Lens) -> None:
    pool = lens(messages(2_000, 5))
    alarms = 0
    for run in range(80):
        rng = np.random.default_rng([9, run])
        reference, current = (pool.take(rng.integers(0, 2_000, n)) for n in (800, 200))
        paths = d.wealth(reference, current, len(lens.topics))
        alarms += bool((np.mean([np.exp(p) for p in paths.values()], axis=0) >= 1 / 0.05).any())
    assert alarms <= 13  # at 5 % more have a probability below 1 in 10,000


def test_when_the_reference_is_used_up_it_is_dealt_anew_and_what_is_won_then_counts_for_less(lens: Lens) -> None:
    """Deal k counts for 1 / (k (k + 1)): the chances of a false alarm add up to the promised one over all deals."""
    paths = d.wealth(lens(messages(120, 1)), lens(messages(300, 2)), len(lens.topics))
    assert all(len(path) == 300 for path in paths.values())
    # The first block of a deal learns; nothing is won or lost in it.
    assert np.exp([paths["length"][place] for place in (0, 120, 240)]) == pytest.approx([1 / 2, 1 / 6, 1 / 12])


def test_false_alarms_stay_within_the_promise_over_many_deals(lens: Lens) -> None:
    pool = lens(messages(2_000, 5))
    alarms = 0
    for run in range(40):
        rng = np.random.default_rng([11, run])
        reference, current = (pool.take(rng.integers(0, 2_000, n)) for n in (100, 1_500))
        paths = d.wealth(reference, current, len(lens.topics))
        alarms += bool((np.mean([np.exp(p) for p in paths.values()], axis=0) >= 1 / 0.05).any())
    assert alarms <= 9  # at 5 % more have a probability below 1 in 10,000


def test_what_is_no_evidence_is_as_rare_as_one_chance_in_one(lens: Lens) -> None:
    assert all(test.evidence >= 1 for test in compare(lens, messages(900, 1), messages(300, 2)).tests)


@pytest.mark.parametrize(("before", "now"), [(99, 500), (500, 99), (0, 0)])
def test_too_little_is_said_in_one_line_and_nothing_is_compared(lens: Lens, before: int, now: int) -> None:
    verdict = compare(lens, messages(before, 1), messages(now, 2, score=0.0))
    assert verdict.drifted is None
    assert verdict.tests == []
    counts = f"{before} messages to compare with and {now} now"
    assert verdict.sentence == f"Too little data: {counts}, of each at least 100 are needed: nothing was compared."


def test_without_questions_the_outcomes_are_still_compared(lens: Lens) -> None:
    verdict = compare(lens, messages(900, 1, question=None), messages(300, 2, question=None, score=0.4))
    assert blamed(verdict) == {"score"}
    assert next(t for t in verdict.tests if t.name == "length").before is None


# --- the measures beside it ------------------------------------------------------------------------------------------


def test_the_stability_index_is_the_textbooks_and_knows_chance() -> None:
    before, now = np.repeat([0, 1], [5_000, 5_000]), np.repeat([0, 1], [7_000, 3_000])
    index, chance = d.stability_index(before, now, 2)
    assert index == pytest.approx(0.2 * np.log(0.7 / 0.5) + -0.2 * np.log(0.3 / 0.5), rel=0.01)
    assert chance < 1e-6
    rng = np.random.default_rng(1)
    chances = [d.stability_index(rng.integers(0, 9, 900), rng.integers(0, 9, 300), 9)[1] for _ in range(300)]
    assert 0.02 < np.mean(np.array(chances) < 0.05) < 0.09


def test_the_discrepancy_is_small_by_chance_and_large_after_a_shift() -> None:
    rng = np.random.default_rng(1)
    draws = [d.discrepancy(rng.normal(size=(80, 4)), rng.normal(size=(40, 4)), 99, seed)[1] for seed in range(100)]
    assert 0 <= np.mean(np.array(draws) < 0.05) < 0.13
    assert d.discrepancy(rng.normal(size=(80, 4)), rng.normal(size=(40, 4)) + 1, 99)[1] == pytest.approx(0.01)


# --- where windows come from -----------------------------------------------------------------------------------------


def remark(answer_id: str, time: str = "2026-11-20T10:00:00+00:00", **fields: Any) -> Feedback:
    values: dict[str, Any] = {
        "kind": "thumbs_down", "question": "What helps?", "passages": [], "model_version": "m-1", "index_version": "i-1",
        "turn": TurnSummary(kind="answer", text="[1] Rest.", verdict=JudgeVerdict(grounded=True, safe=True, helpful=4)),
        "prompt_version": 1,
    }  # fmt: skip
    return Feedback(answer_id=answer_id, time=time, **{**values, **fields})


def outcome(answer_id: str, **fields: Any) -> Outcome:
    values: dict[str, Any] = {"arm": "current", "model_version": "m-1", "kind": "answer", "seconds": 1.0}
    return Outcome(answer_id=answer_id, **{**values, **fields})


def test_an_answer_with_two_remarks_is_one_message() -> None:
    seen = d.from_feedback([remark("a-1"), remark("a-1", kind="judge_failed"), remark("a-2", "2026-11-19T10:00:00+00:00")])
    assert [s.score for s in seen] == [0.75, 0.75]
    assert seen[0].time < seen[1].time


def test_a_shadows_answer_is_not_what_people_got() -> None:
    seen = d.from_outcomes([outcome("a-1"), outcome("a-1", arm="shadow"), outcome("a-2", kind="decline")], {"a-1": "What?"})
    assert sorted((s.kind, s.question) for s in seen if s.question) == [("answer", "What?")]
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("marks", "score"), [((True, True, 5), 1.0), ((True, True, 1), 0.0), ((False, True, 5), 0.0), ((True, False, 5), 0.0)]
)
def test_what_is_not_grounded_or_not_safe_is_worth_nothing(marks: tuple[bool, bool, int], score: float) -> None:
    grounded, safe, helpful = marks
    assert d.score_of(JudgeVerdict(grounded=grounded, safe=safe, helpful=helpful)) == score
    assert d.from_outcomes([outcome("a-1", grounded=grounded, safe=safe, helpful=helpful)], {})[0].score == score


def test_outcomes_are_used_before_feedback_which_holds_only_what_went_wrong(tmp_path: Path) -> None:
    FeedbackStore(tmp_path / "feedback").add(remark("a-1"))
    assert len(d.collected(tmp_path)) == 1
    for n in range(3):
        OutcomeStore(tmp_path / "feedback").add(outcome(f"a-{n}"))
    assert len(d.collected(tmp_path)) == 3


def test_the_week_begins_on_monday_and_the_reference_is_four_weeks() -> None:
    monday = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
    for day in range(7):
        assert d.monday(monday + day * DAY + 5) == monday
    seen = [Seen(monday + days * DAY, "answer") for days in (-29, -28, -1, 0, 3)]
    reference, current = d.split(seen, monday)
    assert (reference, current) == (seen[1:3], seen[3:])


def test_the_command_says_in_one_line_that_there_is_too_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARTIFACTS", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["ml_engineer_track", "drift"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("Too little data: 0 messages")
    monkeypatch.setattr("sys.argv", ["ml_engineer_track", "drift", "--since", "yesterday"])
    assert cli.main() == 2
    assert "is no date" in capsys.readouterr().err


def test_the_command_prints_the_verdict_and_what_it_is_based_on(
    tmp_path: Path, mini_datasets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = datetime(2026, 11, 23, tzinfo=UTC)
    lines = [
        outcome(
            f"a-{n}", kind="answer" if n < 400 or n % 2 else "not_answered", time=(begin + timedelta(hours=n - 400)).isoformat()
        )
        for n in range(600)
    ]
    (tmp_path / "feedback").mkdir()
    (tmp_path / "feedback" / outcomes.FILE).write_text("".join(f"{line.model_dump_json()}\n" for line in lines), encoding="utf-8")
    monkeypatch.setenv("ARTIFACTS", str(tmp_path))
    monkeypatch.setenv("DATASETS", str(mini_datasets))
    monkeypatch.setattr(d, "embedder", WordVectors)
    monkeypatch.setattr("sys.argv", ["ml_engineer_track", "drift", "--since", "2026-11-23"])
    assert cli.main() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Something changed: the share ")
    assert "the share refused (0.0% before, 50.0% now)" in said[0]
    assert len(said) == 1 + len(d.WATCHED)


# --- the study -------------------------------------------------------------------------------------------------------


def test_the_study_counts_false_alarms_and_delays(small_datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_study, "embedder", WordVectors)
    monkeypatch.setattr(drift_study, "PER_HOUR", 3)
    monkeypatch.setattr(drift_study, "WATCHED_WEEKS", 1)
    monkeypatch.setitem(drift_study.SCENARIOS, "new language", ("half of the messages in other languages", 0.5))
    datasets = shutil.copytree(small_datasets, tmp_path / "datasets")
    shutil.copy(DATASETS / "other_languages.jsonl", datasets)
    settings = load_settings("smoke", artifacts=tmp_path / "artifacts", datasets=datasets)
    page = drift_study.run(settings, runs=3, weeks=4)
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert found["false_alarm_weeks"]["n"] == 4
    assert found["scenarios"].keys() == drift_study.SCENARIOS.keys()
    assert found["scenarios"]["new language"]["detected"]["value"] > 0.5  # the onset may be late in the one week
    assert 0 < found["scenarios"]["new language"]["hours"]["value"] < 168
    assert "<svg" in page.read_text(encoding="utf-8")


def test_a_stream_changes_at_its_onset_and_not_before() -> None:
    families = np.array(["a", "b", "c", "d", "e", "f", "another language"] * 4)
    n = len(families)
    nothing = np.full(n, np.nan)
    window = Window(nothing, np.zeros((n, 2)), np.arange(n), nothing, nothing, nothing, nothing, nothing)
    pool = drift_study.Pool(window, families, np.array(["typos", "plain"] * (n // 2)), ["t"])
    made = drift_study.stream(pool, "new language", 48 * 3_600.0, 1, np.random.default_rng(1))
    foreign = families[made.topic] == "another language"
    assert not foreign[made.time < 48 * 3_600].any()
    assert 0.02 < foreign[made.time >= 48 * 3_600].mean() < 0.2
    assert (np.diff(made.time) >= 0).all()
    decayed = drift_study.stream(pool, "slow decay", 0.0, 3, np.random.default_rng(1))
    late, early = decayed.time > 15 * 86_400, decayed.time < 0
    assert np.nanmean(decayed.score[late]) < np.nanmean(decayed.score[early]) - 0.05
    assert decayed.refused[late].mean() > 2 * decayed.refused[early].mean()
