"""Retraining: the labels are in the rows, nothing held back is, old skills are replayed; and one real turn of a tiny model."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ml_engineer_track import curate as c
from ml_engineer_track.finetune import finetune
from ml_engineer_track.lifecycle import loop as l
from ml_engineer_track.lifecycle.exam import Exam
from ml_engineer_track.lifecycle.gate import Check
from ml_engineer_track.lifecycle.retrain import (
    PREFIX,
    Trained,
    decision_rows,
    grown,
    loop_of,
    question_of,
    replay,
    replay_decisions,
)
from ml_engineer_track.quantize import quantize
from ml_engineer_track.train_ranker import train_ranker
from shared import chat, handoff
from shared import library as lib
from shared.errors import UserError
from shared.labels import Label, LabelStore
from shared.ranking import read_ranker
from shared.settings import Settings, load_settings


def a_row(number: int, skill: c.Skill = "answer", reply: str = "[1] Rest.") -> c.Row:
    return c.Row(id=f"r-{number}", split="train", skill=skill, messages=[{"role": "user", "content": f"{number}"}], reply=reply)


def on_colds(a_label: Callable[..., Label], number: int, **changes: Any) -> Label:
    given = {"question": f"What helps with a cold, number {number}?", "passages": ["common-cold/self-care"]}
    return a_label(number, **{**given, "answer_sentences": ["common-cold/self-care/1"], **changes})


def test_every_skill_has_its_share_and_refusals_one_of_their_own(settings: Settings) -> None:
    rows = [a_row(n) for n in range(2000)] + [a_row(n, reply=chat.NOT_ANSWERED) for n in range(50)]
    rows += [a_row(n, "decide", '{"action":"answer"}') for n in range(500)]
    chosen = replay(rows, loop_of(settings), random.Random(1))
    counted = Counter("not_answered" if row.reply == chat.NOT_ANSWERED else row.skill for row in chosen)
    wanted = loop_of(settings).replay
    assert counted == {"answer": wanted["answer"], "not_answered": 50}  # fifty are all there are; decisions are chosen below
    assert chosen == replay(rows, loop_of(settings), random.Random(1))


@pytest.mark.parametrize(("labels", "emergencies"), [(0, 1.0), (60, 1.0), (300, 1.0), (60, 3.0)])
def test_labels_do_not_make_emergencies_rarer(settings: Settings, labels: int, emergencies: float) -> None:
    answer, escalate = (chat.to_json(chat.Decision(action=name)) for name in ("answer", "escalate"))
    old = [a_row(n, "decide", answer if n % 4 else escalate) for n in range(1000)]
    new = [a_row(n, "decide", answer) for n in range(5000, 5000 + labels)]  # 300 are more than the share of a small replay
    options = loop_of(settings).model_copy(update={"replay": {"decide": 200}, "emergencies": emergencies})
    chosen = replay_decisions(old, new, options, random.Random(1))
    counted = Counter(row.reply for row in [*chosen, *new])
    assert emergencies * counted[answer] == pytest.approx(3 * counted[escalate], abs=4 * emergencies)
    assert sum(counted.values()) >= 199
    assert chosen == replay_decisions(old, new, options, random.Random(1))


def test_a_label_becomes_a_question_and_replaces_the_old_one(
    mini_datasets: Path, tmp_path: Path, a_label: Callable[..., Label]
) -> None:
    old = lib.read_rows(mini_datasets, "questions.jsonl", lib.Question)[0]
    same = next(q for q in old if q.split == "train")
    labels = [on_colds(a_label, 1), on_colds(a_label, 2, question=same.question.upper())]
    made = grown(mini_datasets, labels, tmp_path / "grown")
    rows, bad = lib.read_rows(made, "questions.jsonl", lib.Question)
    assert not bad
    assert same.id not in {row.id for row in rows}
    assert {row.id for row in rows if row.id.startswith(PREFIX)} == {label.id for label in labels}
    library = lib.load_library(made)
    assert not [problem for row in rows for problem in lib.row_problems(row, library)]


def test_a_decision_is_laid_out_as_the_product_asks_for_it(mini_datasets: Path, a_label: Callable[..., Label]) -> None:
    library = lib.load_library(mini_datasets)
    label = on_colds(a_label, 1, action="escalate", answer_sentences=[], passages=["influenza/symptoms", "common-cold/causes"])
    assert question_of(label, library) is None
    (row,) = decision_rows(label, library, 1)
    titles = [library.leaflets[slug].title for slug in ("influenza", "common-cold")]
    assert row.messages == chat.decide_messages(label.question, titles)
    assert json.loads(row.reply) == {"action": "escalate"}


def test_a_preset_without_the_group_is_named() -> None:
    with pytest.raises(UserError, match="preset tiny"):
        loop_of(load_settings("tiny"))


@pytest.fixture
def first(make_settings: Callable[..., Settings], publish_version: Callable[..., Path]) -> Settings:
    """Settings of a loop on the micro model, whose first version is trained and published."""
    made = make_settings(quantize={"variants": ["q8_0"]}).model_copy(
        update={"loop": load_settings("loop").loop, "preset": "loop"}
    )
    ranker = train_ranker(made)
    variants = quantize(made, finetune(made, c.curate(made, read_ranker(Path(ranker.path)))))
    from tests.ml_engineer_track.lifecycle.conftest import a_manifest

    folders = {name: Path(folder) for name, folder in variants.folders.items()}
    handoff.publish(a_manifest("m-old"), folders, l.models(made), lambda aside: None, [Path(ranker.path)])
    return made


@pytest.mark.slow
def test_a_real_turn_of_a_tiny_model(first: Settings, a_label: Callable[..., Label]) -> None:
    """Everything is done: rows, ranker, training, quantising, the exam, publishing, all checks. A random model is refused."""
    store = LabelStore(l.feedback(first))
    for number in range(60):
        store.add(on_colds(a_label, number))
    turn = l.look(first)
    assert turn is not None
    trained, exam = turn.get("trained", Trained), turn.get("exam", Exam)
    rows = c.load_curated(Path(trained.data)).rows("train")
    collected = turn.get("collected", l.Collected)
    taught, held = ({label.id for label in side} for side in (collected.taught, collected.examined))
    assert not [row for row in rows if row.skill == "decide" and row.id.split("#")[0] in taught]  # nothing else was to be done
    assert any(row.id.split("#")[0] in taught for row in rows)
    assert not [row for row in rows if row.id.split("#")[0] in held]
    assert not [row for row in rows if any(label.question in json.dumps(row.messages) for label in collected.examined)]
    assert {item.part for item in exam.items} >= {"test", "failures"}
    candidate = l.models(first) / turn.get("candidate", str)
    manifest = handoff.verify(candidate)
    assert manifest.lineage is not None
    assert (manifest.lineage.parent, manifest.lineage.feedback) == ("m-old", collected.id)
    assert set(manifest.variants) == {"bf16", "q8_0"}
    names = [check.name for check in turn.get("checks", list[Check])]
    assert names[0] == "variants"
    assert {"evidence", "failures", "refusals", "parity", "latency"} <= set(names)
    assert handoff.current(l.models(first)).name == "m-old"
