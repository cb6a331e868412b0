"""Retrieval: what fits is found in every mode, filters hold, long messages are cut to their core, figures are right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ai_engineer_track.ingest import ingest, open_index
from ai_engineer_track.retrieve import CORE_WORDS, MODES, Retriever, _figures, measure, measure_sentences, published_ranker
from ai_engineer_track.settings import AiSettings, load_ai_settings
from shared.errors import UserError
from shared.files import sha256_file
from shared.library import DATASETS, Question, read_rows
from shared.passages import embedder
from shared.ranking import ASSET, PASSAGE_FEATURES, SENTENCE_FEATURES, Ranker

LEAFLETS = ("ankle-sprain", "ankle-fracture", "plantar-fasciitis", "migraine")


def a_ranker(**changes: object) -> Ranker:
    """Weights of the size training gives them, without a section classifier."""
    fields = {
        "embedder": embedder().id,
        "passage": dict(zip(PASSAGE_FEATURES, (6.0, 16.0, 1.7, 1.6, 0.8), strict=True)),
        "sentence": dict(zip(SENTENCE_FEATURES, (0.65, 14.0, 0.4), strict=True)),
        "sections": {},
        "trained_on": "x",
        "questions": 1,
    }
    return Ranker.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> AiSettings:
    """Four leaflets, indexed."""
    folder = tmp_path_factory.mktemp("retrieve")
    (folder / "corpus").mkdir()
    for slug in LEAFLETS:
        shutil.copy(DATASETS / "health_library" / f"{slug}.md", folder / "corpus")
    loaded = load_ai_settings("tiny", artifacts=folder / "artifacts", corpus=folder / "corpus")
    ingest(loaded)
    return loaded


@pytest.fixture(scope="module")
def retriever(settings: AiSettings) -> Iterator[Retriever]:
    index = open_index(settings)
    made = Retriever(index, settings)
    made.ranker = a_ranker()
    yield made
    index.close()


# --- searching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_finds_the_passage_and_ranks_best_first(retriever: Retriever, mode: str) -> None:
    hits = retriever.search("how long should I hold the ice pack on my twisted ankle", 5, mode)  # type: ignore[arg-type]
    assert hits[0].passage.document == "ankle-sprain"
    assert "ankle-sprain/self-care" in [hit.passage.id for hit in hits[:2]]
    assert len(hits) == 5
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert len({h.passage.id for h in hits}) == 5


def test_ranks_and_cosine_say_where_a_hit_came_from(retriever: Retriever) -> None:
    for hit in retriever.search("ankle", 40, "fused"):
        rrf = sum(1 / (retriever.settings.rrf_k + rank) for rank in (hit.dense_rank, hit.bm25_rank) if rank)
        assert hit.score == pytest.approx(rrf)
        assert (hit.dense_score is None) == (hit.dense_rank is None)
    first = {h.dense_rank for h in retriever.search("ankle", 3, "dense")}
    assert first == {1, 2, 3}


def test_misspelt_words_are_still_found_by_words(retriever: Retriever) -> None:
    assert retriever.search("migrane", 1, "bm25")[0].passage.document == "migraine"
    assert retriever.search("fasciitus", 1, "bm25")[0].passage.document == "plantar-fasciitis"


@pytest.mark.parametrize("mode", MODES)
def test_a_filter_holds_in_every_mode(retriever: Retriever, mode: str) -> None:
    hits = retriever.search("pain", 10, mode, {"section": "emergency"})  # type: ignore[arg-type]
    assert hits
    assert {h.passage.section for h in hits} == {"emergency"}
    assert retriever.search("pain", 10, mode, {"document": "nothing"}) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("query", ["", "  \n", "?!", "the of and", "日本語の質問", "x" * 5000, "<b>ankle</b>", "\u200b"])
def test_odd_queries_never_raise(retriever: Retriever, query: str) -> None:
    for mode in MODES:
        retriever.best_sentences(query, retriever.search(query, 3, mode), 4)
    assert retriever.search("", 3) == []


def test_more_than_there_is_gives_all_there_is(retriever: Retriever) -> None:
    assert len(retriever.search("ankle", 1000, "dense")) == 8 * len(LEAFLETS)
    assert retriever.search("ankle", 0) == []


def test_many_threads_get_what_one_gets(retriever: Retriever) -> None:
    queries = ["ice on ankle", "throbbing head", "heel pain in the morning", "broken bone"] * 5

    def ids(query: str) -> list[str]:
        return [h.passage.id for h in retriever.search(query)]

    alone = [ids(q) for q in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ids, queries)) == alone


# --- sentences and long messages -------------------------------------------------------------------------------------


def test_the_best_sentences_hold_the_answer_and_the_likeliest_comes_first(retriever: Retriever) -> None:
    question = "how long can the ice stay on a twisted ankle?"
    hits = retriever.search(question, 5)
    ids = [s.id for s in retriever.best_sentences(question, hits, 8)]
    assert "ankle-sprain/self-care/2" in ids[:2]
    assert len(set(ids)) == 8
    assert {sid.rsplit("/", 1)[0] for sid in ids} <= {h.passage.id for h in hits}
    assert [s.id for s in retriever.best_sentences(question, hits, 3)] == ids[:3]
    assert len(retriever.best_sentences(question, hits, 1000)) == sum(len(h.passage.sentences) for h in hits)
    assert retriever.best_sentences(question, [], 8) == []


def test_a_short_message_is_searched_as_it_is_but_for_greetings(retriever: Retriever) -> None:
    assert retriever.condense("Hello there! My ankle hurts. Thanks!") == "My ankle hurts."
    assert retriever.condense("Hello!") == "Hello!"
    assert retriever.condense("my   ankle\nhurts") == "my ankle hurts"


def test_a_long_story_is_cut_to_the_part_the_library_knows(retriever: Retriever) -> None:
    story = "My neighbour keeps nine parrots and plays the tuba in a brass band by the sea. " * 20
    question = "On Sunday I rolled my ankle on the kerb and it swelled up. How long should I keep ice on it?"
    for message in (story + question, question + " " + story, story + question + " " + story):
        core = retriever.condense(message)
        assert len(core.split()) <= CORE_WORDS
        assert "How long should I keep ice on it?" in core
        assert "rolled my ankle" in core
        assert retriever.search(message, 1)[0].passage.document == "ankle-sprain"


def test_an_enormous_message_is_bounded(retriever: Retriever) -> None:
    core = retriever.condense("blah " * 50_000)
    assert 0 < len(core.split()) <= CORE_WORDS


# --- the ranker in the handoff ---------------------------------------------------------------------------------------


def a_published(models: Path, ranker: Ranker | None, version: str = "m-1") -> Path:
    """A current version as the handoff lays it out, as far as the retriever looks."""
    folder = models / version
    assets = {}
    folder.mkdir(parents=True)
    if ranker:
        path = folder / "assets" / ASSET
        path.parent.mkdir()
        path.write_text(ranker.model_dump_json(), encoding="utf-8")
        assets = {f"assets/{ASSET}": {"sha256": sha256_file(path), "size": path.stat().st_size}}
    manifest = {
        "model_id": "x", "version": version, "created": "", "commit": None, "base_model": {"id": "b", "licence": "l"},
        "data": {"version": "d", "counts": {}}, "training": {}, "seed": 1, "prompt_version": 1, "chat_template_sha256": "",
        "tokenizer_sha256": "", "context_window": 8, "stop_tokens": [], "stop_token_ids": [], "use": {}, "hardware": {},
        "variants": {}, "assets": assets,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    (models / "current").write_text(f"{version}\n", encoding="utf-8")
    return folder


def test_the_published_ranker_is_used_and_without_one_fused_is(settings: AiSettings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"artifacts": tmp_path})
    assert published_ranker(elsewhere) is None
    a_published(tmp_path / "models", None)
    assert published_ranker(elsewhere) is None
    shutil.rmtree(tmp_path / "models")
    a_published(tmp_path / "models", a_ranker())
    assert published_ranker(elsewhere) == a_ranker()
    index = open_index(settings)
    assert Retriever(index, elsewhere).default_mode == "reranked"
    plain = Retriever(index, settings)
    assert plain.default_mode == "fused"
    assert plain.search("ankle", 2) == plain.search("ankle", 2, "fused")
    assert plain.best_sentences("ice on a twisted ankle", plain.search("ankle", 5), 3)
    with pytest.raises(UserError, match="carries no ranker"):
        plain.search("ankle", 2, "reranked")
    index.close()


def test_the_ranker_is_that_of_the_model_that_is_asked(settings: AiSettings, tmp_path: Path) -> None:
    a_published(tmp_path / "models", a_ranker(trained_on="old"), "m-1")
    a_published(tmp_path / "models", a_ranker(trained_on="new"), "m-2")
    for asked, expected in (("m-1", "old"), ("m-2", "new"), (None, "new"), ("gone", "new")):
        llm = settings.llm.model_copy(update={"published": asked})
        found = published_ranker(settings.model_copy(update={"artifacts": tmp_path, "llm": llm}))
        assert found is not None
        assert found.trained_on == expected


def test_a_damaged_or_foreign_ranker_is_refused(settings: AiSettings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"artifacts": tmp_path})
    folder = a_published(tmp_path / "models", a_ranker(embedder="other/1"))
    with pytest.raises(UserError, match="another embedding model"):
        published_ranker(elsewhere)
    (folder / "assets" / ASSET).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="not what was published"):
        published_ranker(elsewhere)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_of_a_ranking_are_what_the_formulas_say() -> None:
    found = _figures(["a", "b", "c", "d"], {"b", "d"})
    assert (found["recall@1"], found["recall@3"]) == (0.0, 1.0)
    assert found["mrr"] == 0.5
    assert found["ndcg@10"] == pytest.approx((1 / 1.584963 + 1 / 2.321928) / (1 + 1 / 1.584963), abs=1e-5)
    assert set(_figures(["a"], {"z"}).values()) == {0.0}
    assert set(_figures(["z"], {"z"}).values()) == {1.0}


def test_measuring_reports_every_mode_with_intervals(retriever: Retriever) -> None:
    rows, _ = read_rows(DATASETS, "questions.jsonl", Question)
    asked = [q for q in rows if set(q.leaflets) and set(q.leaflets) <= set(LEAFLETS)][::12]
    answerable = sum(q.answerable for q in asked)
    figures = measure(retriever, asked, resamples=100)
    assert set(figures) == set(MODES)
    for found in figures.values():
        assert len(found) == 12
        for figure in found.values():
            assert figure.n == answerable
            assert 0 <= figure.low <= figure.value <= figure.high <= 1
        assert found["leaflet/recall@1"].value <= found["leaflet/recall@5"].value
        assert found["passage/recall@5"].value <= found["leaflet/recall@5"].value
    assert figures["reranked"]["leaflet/recall@5"].value > 0.9
    coverage = measure_sentences(retriever, asked, resamples=100)
    assert coverage["coverage@8"].value <= coverage["coverage@12"].value
    assert coverage["coverage@12"].value > 0.7
