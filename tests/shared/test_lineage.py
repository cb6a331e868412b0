"""From an answer back to model, rows and leaflets; what is missing on the way is said in one line."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ai_engineer_track.api.sessions import Exchange, SessionStore
from ai_engineer_track.turn import Citation, FoundPassage, Turn
from shared import exchanges, handoff, lineage
from shared.chat import Source, answer_messages, answer_text
from shared.errors import UserError
from shared.feedback import Feedback, FeedbackStore, TurnSummary
from shared.files import sha256_file, write_jsonl
from shared.library import load_library
from shared.outcomes import Outcome, OutcomeStore
from tests.shared.test_handoff import a_card, a_manifest

CITED = "common-cold/self-care/2"


@pytest.fixture
def place(tmp_path: Path, mini_datasets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts with a published version, the curated set it was trained on, and a remark on an answer it gave."""
    artifacts = tmp_path / "artifacts"
    monkeypatch.setenv("ARTIFACTS", str(artifacts))
    monkeypatch.setenv("DATASETS", str(mini_datasets))
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")
    handoff.publish(a_manifest(variants=("bf16",)), {"bf16": weights}, artifacts / "models", a_card)
    library = load_library(mini_datasets)
    shown = [Source(id=s.id, heading="Common cold: Self-care", text=s.text) for s in library.leaflets["common-cold"].sentences()]

    def answer_row(row_id: str, gold: int, sources: list[Source], question_id: str) -> dict[str, Any]:
        return {
            "id": row_id, "split": "train", "skill": "answer", "messages": answer_messages("What helps?", sources),
            "reply": answer_text([gold] if gold else [], sources), "sources": [s.id for s in sources], "made_from": [question_id],
        }  # fmt: skip

    care = [s for s in shown if "/self-care/" in s.id]
    other = [Source(id="influenza/causes/1", heading="Influenza: Causes", text="A virus.")]
    rows = [
        answer_row("about", 0, [s for s in shown if "/causes/" in s.id], "q-elsewhere-1"),
        answer_row("shows", 1, care, "q-elsewhere-2"),
        answer_row("stranger", 1, other, "q-elsewhere-3"),
        answer_row("quotes", 2, care, "q-colds-1"),
        {"id": "decides", "split": "train", "skill": "decide", "messages": [], "reply": "{}", "made_from": ["q-colds-1"]},
    ]
    (artifacts / "data" / "d-1").mkdir(parents=True)
    write_jsonl(artifacts / "data" / "d-1" / "train.jsonl", rows)
    FeedbackStore(artifacts / "feedback").add(remark(f"[1] {library.sentence(CITED).text}"))
    return artifacts


def remark(said: str, **fields: Any) -> Feedback:
    values: dict[str, Any] = {
        "answer_id": "a-1", "kind": "thumbs_down", "reason": "too short", "question": "What helps?",
        "turn": TurnSummary(kind="answer", text=said, leaflet="common-cold", cited=[CITED]),
        "passages": ["common-cold/self-care"], "model_version": "m-1:bf16", "index_version": "i-7", "prompt_version": 1,
    }  # fmt: skip
    return Feedback(**{**values, **fields})


def exchange(answer_id: str) -> Exchange:
    citation = Citation(number=1, sentence_id=CITED, leaflet="common-cold", title="t", section="s", text="x")
    passage = FoundPassage(id="common-cold/self-care", title="t", section="s", score=1.0)
    turn = Turn(kind="answer", text="[1] x", citations=[citation], passages=[passage])
    return Exchange(answer_id=answer_id, session_id="?", created=time.time(), message="My name is Ann Lee", seconds=1, turn=turn)


def keep(artifacts: Path, kept: Exchange) -> None:
    store = SessionStore(artifacts / exchanges.FILE)
    store.add(kept.model_copy(update={"session_id": store.begin("client")}))
    store.close()


def refused(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert lineage.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


def test_an_answer_leads_back_to_its_model_rows_and_leaflets(place: Path, mini_datasets: Path) -> None:
    found = lineage.lineage("a-1", place, mini_datasets)
    assert found.model
    assert (found.model.version, found.model.variant, found.model.data) == ("m-1", "bf16", "d-1")
    assert (found.answer.index_version, found.answer.remarks) == ("i-7", ["thumbs_down: too short"])
    relations = {row.id: row.relation for row in found.training_rows}
    assert relations == {"quotes": "quotes", "shows": "shows", "about": "about", "decides": "about"}
    assert found.training_rows[0].id == "quotes"
    assert found.training_rows[0].made_from == ["q-colds-1"]
    leaf = found.leaflets[0]
    assert leaf.sha256 == sha256_file(mini_datasets / "health_library" / "common-cold.md")
    assert leaf.sentences[0].unchanged is True


def test_a_sentence_that_was_rewritten_or_removed_is_noticed(place: Path, mini_datasets: Path) -> None:
    path = mini_datasets / "health_library" / "common-cold.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("self-care fact 2 helps", "self-care fact 2 hinders"), encoding="utf-8")
    assert lineage.lineage("a-1", place, mini_datasets).leaflets[0].sentences[0].unchanged is False
    path.unlink()
    gone = lineage.lineage("a-1", place, mini_datasets).leaflets[0]
    assert (gone.sha256, gone.split, gone.sentences[0].unchanged) == (None, None, None)


def test_a_person_and_a_program_can_read_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lineage.main(["a-1"]) == 0
    said = capsys.readouterr().out
    for part in ("m-1, variant bf16", "of 5 training rows 1 teach", "quotes quotes common-cold/self-care/2", "as quoted", "i-7"):
        assert part in said
    assert lineage.main(["a-1", "--json"]) == 0
    assert lineage.Lineage.model_validate(json.loads(capsys.readouterr().out)).answer.id == "a-1"


def test_a_conversation_and_its_outcome_are_enough(place: Path, mini_datasets: Path) -> None:
    keep(place, exchange("a-2"))
    assert lineage.lineage("a-2", place, mini_datasets).model is None
    OutcomeStore(place / "feedback").add(
        Outcome(answer_id="a-2", arm="current", model_version="m-1:bf16", kind="answer", seconds=1)
    )
    OutcomeStore(place / "feedback").add(
        Outcome(answer_id="a-2", arm="shadow", model_version="m-2:bf16", kind="answer", seconds=1)
    )
    found = lineage.lineage("a-2", place, mini_datasets)
    assert found.model
    assert found.model.version == "m-1"
    assert found.answer.question == "My name is [name]"
    assert found.training_rows[0].id == "quotes"


def test_a_conversation_that_names_its_model_is_enough(place: Path, mini_datasets: Path) -> None:
    keep(place, exchange("a-5"))
    with closing(sqlite3.connect(place / exchanges.FILE)) as db:
        body = json.loads(db.execute("SELECT body FROM exchanges").fetchone()[0])
        body["turn"] |= {"model_version": "m-1:bf16", "index_version": "i-9", "prompt_version": 1}
        db.execute("UPDATE exchanges SET body = ?", (json.dumps(body),))
        db.commit()
    found = lineage.lineage("a-5", place, mini_datasets)
    assert found.model
    assert (found.model.version, found.answer.index_version) == ("m-1", "i-9")


def test_an_outcome_alone_names_the_model(place: Path, mini_datasets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OutcomeStore(place / "feedback").add(Outcome(answer_id="a-3", arm="current", model_version="m-1", kind="decline", seconds=1))
    assert lineage.main(["a-3"]) == 0
    said = capsys.readouterr().out
    assert "asked      not kept" in said
    assert "no sentence was cited" in said


def test_an_unknown_answer_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no answer 'a-9' is on record" in refused("a-9", capsys=capsys)


def test_a_model_that_is_gone_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "models" / "m-1")
    assert "model version 'm-1' is not there" in refused("a-1", capsys=capsys)


@pytest.mark.parametrize("name", ["../../etc", "", "gpt-x"])
def test_a_model_from_elsewhere_is_one_line(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    FeedbackStore(place / "feedback").add(remark("[1] Rest.", answer_id="a-4", model_version=name))
    assert "is not there" in refused("a-4", capsys=capsys)


def test_a_data_set_that_is_gone_or_damaged_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = place / "data" / "d-1" / "train.jsonl"
    path.write_text("{", encoding="utf-8")
    assert "damaged" in refused("a-1", capsys=capsys)
    shutil.rmtree(path.parent)
    assert "data set d-1 is not there" in refused("a-1", capsys=capsys)


# --- conversations ---------------------------------------------------------------------------------------------------


def test_conversations_are_read_without_personal_data_and_gone_when_deleted(tmp_path: Path) -> None:
    path = tmp_path / exchanges.FILE
    assert exchanges.read(path) == []
    store = SessionStore(path)
    session = store.begin("client")
    store.add(exchange("a-1").model_copy(update={"session_id": session}))
    read = exchanges.read(path)
    assert [(e.answer_id, e.message) for e in read] == [("a-1", "My name is [name]")]
    assert exchanges.read(path, "a-2") == []
    store.delete(session)
    assert exchanges.read(path) == []
    store.close()


def test_a_damaged_file_of_conversations_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    path.write_bytes(b"no database, only bytes" * 50)
    with pytest.raises(UserError, match="conversations cannot be read"):
        exchanges.read(path)
