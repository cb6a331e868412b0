"""The ranker learns what makes a passage right, from training rows only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ml_engineer_track import train_ranker as module
from ml_engineer_track.train_ranker import Asked, fit, fit_weights, out_of_fold, train_ranker
from shared.errors import UserError
from shared.library import Question
from shared.passages import embedder, unit_texts
from shared.ranking import ASSET, PASSAGE_FEATURES, Corpus, Ranker, read_ranker, words
from shared.settings import Settings, load_settings


@pytest.fixture
def settings(mini_datasets: Path, tmp_path: Path) -> Settings:
    return load_settings("tiny", datasets=mini_datasets, artifacts=tmp_path / "artifacts")


def test_a_ranker_is_written_and_reads_back(settings: Settings) -> None:
    trained = train_ranker(settings)
    ranker = read_ranker(Path(trained.path))
    assert Path(trained.path).name == ASSET
    assert ranker.embedder == embedder().id
    assert ranker.questions == trained.questions == 1
    assert set(ranker.passage) == set(PASSAGE_FEATURES)
    assert trained.figures["ranker/leaflet_recall@5"].n == 1


def test_training_is_repeatable(settings: Settings) -> None:
    first = Path(train_ranker(settings).path).read_text(encoding="utf-8")
    assert Path(train_ranker(settings).path).read_text(encoding="utf-8") == first


def test_test_rows_and_leaflets_are_never_read(settings: Settings, mini_datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    embed = embedder().embed

    def watching(texts: list[str], *rest: object) -> np.ndarray:
        seen.extend(texts)
        return embed(texts)

    monkeypatch.setattr(embedder(), "embed", watching)
    train_ranker(settings)
    assert any("Common cold" in text for text in seen)
    assert not any(word in text.lower() for text in seen for word in ("burns", "sunburn"))


def test_without_training_questions_it_says_so(settings: Settings, mini_datasets: Path) -> None:
    path = mini_datasets / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r["split"] != "train"), encoding="utf-8")
    with pytest.raises(UserError, match="no answerable training questions"):
        train_ranker(settings)


def test_weights_favour_the_feature_that_tells_and_ignore_noise() -> None:
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(200):
        right = np.zeros(6, dtype=bool)
        right[rng.integers(6)] = True
        told = right * 1.0 + rng.normal(0, 0.5, 6)
        groups.append((np.stack([told, rng.normal(0, 1, 6), -told * 100], axis=1).astype(np.float32), right))
    weights = fit_weights(groups)
    assert weights[0] > 0.5
    assert abs(weights[1]) < 0.3
    assert weights[2] < 0
    accuracy = np.mean([right[np.argmax(x @ weights)] for x, right in groups])
    assert accuracy > 0.6


def test_groups_without_a_right_competitor_teach_nothing() -> None:
    assert not fit_weights([(np.ones((3, 2), dtype=np.float32), np.zeros(3, dtype=bool))]).any()


def test_section_guesses_are_out_of_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [_asked(family, n, section) for family in "abcdef" for n, section in enumerate(("self-care", "causes"))]
    families = {f"leaf-{family}": family for family in "abcdef"}
    fitted: list[set[str]] = []
    real = module.fit_sections

    def watching(rows: list[Asked]) -> dict[str, list[float]]:
        fitted.append({families[a.row.leaflets[0]] for a in rows})
        return real(rows)

    monkeypatch.setattr(module, "fit_sections", watching)
    guesses = out_of_fold(asked, families, _blank(), seed=1)
    assert len(fitted) == module.FOLDS
    held_out = [set("abcdef") - seen for seen in fitted]
    assert set().union(*held_out) == set("abcdef")
    assert all(held_out)
    assert all(guesses)
    assert np.mean([max(g, key=lambda s: g[s]) in a.sections for g, a in zip(guesses, asked, strict=True)]) == 1.0


def test_a_fitted_ranker_puts_the_right_passage_first(mini_datasets: Path) -> None:
    from shared.library import load_library
    from shared.passages import leaflet_passages

    library = load_library(mini_datasets)
    passages = [p for leaf in library for p in leaflet_passages(leaf, "x.md")]
    corpus = Corpus(passages, embedder().embed([t for p in passages for t in unit_texts(p)]))
    asked = []
    for leaf in library:
        for section in ("self-care", "causes", "emergency"):
            text = f"{leaf.title} {section.replace('-', ' ')}?"
            row = _row(leaf.id, section, text)
            asked.append(Asked(row, embedder().embed([text])[0]))
    ranker = fit(corpus, asked, {leaf.id: leaf.family for leaf in library}, seed=1)
    right = 0
    for a in asked:
        everything = list(range(len(passages)))
        scores = ranker.passage_scores(corpus.passage_features(a.row.question, a.vector, everything, ranker.intent(a.vector)))
        right += passages[int(np.argmax(scores))].id in a.passages
    assert right >= 0.8 * len(asked)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"format": 2}'])
def test_a_file_that_is_no_ranker_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / ASSET).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="missing or malformed"):
        read_ranker(tmp_path / ASSET)


def test_a_ranker_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    broken = _blank().model_copy(update={"passage": {"meaning": 1.0}})
    (tmp_path / ASSET).write_text(broken.model_dump_json(), encoding="utf-8")
    with pytest.raises(UserError):
        read_ranker(tmp_path / ASSET)


def test_words_survive_spelling_and_endings() -> None:
    assert set(words("swelling")) & set(words("swells"))
    assert set(words("ectopik")) & set(words("ectopic"))
    assert words("the of and") == []
    assert words("Crohn’s") == words("crohns")


def _row(leaflet: str, section: str, text: str) -> Question:
    fields = {"id": f"q-{leaflet}-{section}", "split": "train", "question": text, "answerable": True, "register": "plain"}
    return Question.model_validate({**fields, "leaflets": [leaflet], "answer_sentences": [f"{leaflet}/{section}/1"]})


def _asked(family: str, n: int, section: str) -> Asked:
    """Vectors whose first coordinate says the section."""
    vector = np.zeros(384, dtype=np.float32)
    vector[n] = 1.0
    return Asked(_row(f"leaf-{family}", section, f"{family} {section}"), vector)


def _blank() -> Ranker:
    weights = dict.fromkeys(PASSAGE_FEATURES, 0.0)
    sentence = dict.fromkeys(("passage", "meaning", "words"), 0.0)
    return Ranker(embedder="x", passage=weights, sentence=sentence, sections={}, trained_on="x", questions=0)
