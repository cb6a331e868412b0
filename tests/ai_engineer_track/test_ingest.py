"""Ingest: everything readable is found again, nothing disappears silently, and an index is whole or refused."""

from __future__ import annotations

import fcntl
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from ai_engineer_track import ingest as module
from ai_engineer_track.documents import MAX_SENTENCE_WORDS, MAX_WORDS, read_corpus, split_sentences
from ai_engineer_track.ingest import ingest, open_index
from ai_engineer_track.settings import AiSettings, load_ai_settings
from shared.errors import UserError
from shared.library import DATASETS

LEAFLET = DATASETS / "health_library" / "ankle-sprain.md"


def a_pdf(path: Path, text: str) -> None:
    """The smallest PDF with one line of text on one page."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    packed = zlib.compress(stream)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for n, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (n, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"xref\n0 6\n0000000000 65535 f \n%strailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (table, len(out))
    path.write_bytes(out + end)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One document of every kind."""
    folder = tmp_path / "corpus"
    (folder / "notes").mkdir(parents=True)
    shutil.copy(LEAFLET, folder)
    (folder / "garden.md").write_text(
        "# Garden book\n\nA garden needs water.\n\n## Roses\n\nPrune roses in **March**, says [the club](http://x.org).\n\n"
        "### Pests\n\n- Greenfly suck sap.\n- Ants farm them.\n",
        encoding="utf-8",
    )
    (folder / "engine.html").write_text(
        "<html><head><title>Engine manual</title><style>p{}</style></head><body><nav>Home Shop</nav><h1>Engine manual</h1>"
        "<h2>Oil</h2><p>Change the oil every year.<script>steal()</script></p><p>Use grade 5W&#8209;30.</p></body></html>",
        encoding="utf-8",
    )
    (folder / "notes" / "boat.txt").write_text("Boats float.\n\nSails catch wind.\n", encoding="utf-8")
    a_pdf(folder / "tea.pdf", "Tea should steep for four minutes.")
    return folder


@pytest.fixture
def settings(tmp_path: Path, corpus: Path) -> AiSettings:
    return load_ai_settings("tiny", artifacts=tmp_path / "artifacts", corpus=corpus)


def refused(settings: AiSettings) -> str:
    with pytest.raises(UserError) as caught:
        open_index(settings)
    assert "python -m ai_engineer_track ingest" in str(caught.value)
    return str(caught.value)


# --- documents -------------------------------------------------------------------------------------------------------


def test_a_leaflet_keeps_its_sections_and_sentence_ids(corpus: Path) -> None:
    passages, _ = read_corpus(corpus)
    own = [p for p in passages if p.document == "ankle-sprain"]
    assert [p.section for p in own][:4] == ["overview", "symptoms", "causes", "self-care"]
    care = own[3]
    assert (care.id, care.heading, care.family) == ("ankle-sprain/self-care", "Ankle sprain: Self-care", "ankle-and-heel")
    assert care.sentences[1].id == "ankle-sprain/self-care/2"
    assert care.sentences[1].text.startswith("Hold an ice pack")
    assert "twisted ankle" in care.names
    assert care.source == "ankle-sprain.md"


def test_markdown_keeps_its_heading_path_and_loses_its_markup(corpus: Path) -> None:
    found = {p.heading: [s.text for s in p.sentences] for p in read_corpus(corpus)[0] if p.source == "garden.md"}
    assert found == {
        "Garden book": ["A garden needs water."],
        "Garden book: Roses": ["Prune roses in March, says the club."],
        "Garden book: Roses > Pests": ["Greenfly suck sap.", "Ants farm them."],
    }


def test_html_keeps_what_a_visitor_reads_and_nothing_else(corpus: Path) -> None:
    found = [p for p in read_corpus(corpus)[0] if p.source == "engine.html"]
    assert [p.heading for p in found] == ["Engine manual: Oil"]
    assert [s.text for s in found[0].sentences] == ["Change the oil every year.", "Use grade 5W\u201130."]


def test_pdf_and_plain_text_are_read(corpus: Path) -> None:
    found = {p.source: p for p in read_corpus(corpus)[0]}
    assert found["tea.pdf"].heading == "Tea: Page 1"
    assert found["tea.pdf"].text == "Tea should steep for four minutes."
    assert found["notes/boat.txt"].text == "Boats float. Sails catch wind."
    assert found["notes/boat.txt"].document == "notes-boat"


def test_every_id_is_unique_and_sentences_stand_below_their_passage(corpus: Path) -> None:
    (corpus / "notes-boat.txt").write_text("Boats float.\n\nSails catch wind.\n", encoding="utf-8")  # the same slug and text
    passages, _ = read_corpus(corpus)
    ids = [p.id for p in passages] + [s.id for p in passages for s in p.sentences]
    assert len(set(ids)) == len(ids)
    assert all(s.id.rsplit("/", 1)[0] == p.id and p.id.split("/")[0] == p.document for p in passages for s in p.sentences)


def test_an_unreadable_file_is_skipped_with_a_reason(corpus: Path) -> None:
    (corpus / "photo.png").write_bytes(b"\x89PNG")
    (corpus / "binary.txt").write_bytes(b"a\0b")
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    (corpus / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (corpus / "empty.md").write_text("\n", encoding="utf-8")
    (corpus / "half.md").write_text(LEAFLET.read_text(encoding="utf-8").split("## Self-care")[0], encoding="utf-8")
    (corpus / ".hidden.txt").write_text("Nobody reads this.", encoding="utf-8")
    (corpus / "gone.txt").symlink_to(corpus / "nowhere.txt")
    passages, skipped = read_corpus(corpus)
    reasons = dict(skipped)
    assert set(reasons) == {"photo.png", "binary.txt", "latin.txt", "broken.pdf", "empty.md", "half.md"}
    assert "not Markdown, HTML, PDF or plain text" in reasons["photo.png"]
    assert reasons["binary.txt"] == "binary, not text"
    assert reasons["latin.txt"] == "not UTF-8 text"
    assert "not a readable PDF" in reasons["broken.pdf"]
    assert reasons["empty.md"] == "no text in it"
    assert "Self-care" in reasons["half.md"]
    assert {p.source for p in passages} == {"ankle-sprain.md", "garden.md", "engine.html", "notes/boat.txt", "tea.pdf"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? four", ["One.", "Two!", "Three? four"]),
        ("Ask Dr. Smith. He knows.", ["Ask Dr. Smith.", "He knows."]),
        ("Take 2.5 ml, e.g. With food.", ["Take 2.5 ml, e.g. With food."]),
        ("soft\u00adhyphen\u200b and\ttabs\n", ["softhyphen and tabs"]),
        (" \n ", []),
    ],
)
def test_sentences_are_cut_where_they_end(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_text_without_full_stops_is_cut_to_readable_pieces(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 1000, encoding="utf-8")
    passages, _ = read_corpus(tmp_path)
    assert all(len(s.text.split()) <= MAX_SENTENCE_WORDS for p in passages for s in p.sentences)
    assert all(len(p.text.split()) <= MAX_WORDS for p in passages)
    assert sum(len(p.text.split()) for p in passages) == 1000


# --- the index -------------------------------------------------------------------------------------------------------


def test_every_kind_of_document_is_found_by_meaning(settings: AiSettings) -> None:
    report = ingest(settings)
    index = open_index(settings)
    assert report.passages == len(index.passages) == report.added
    assert index.version == report.version
    for question, source in {
        "when should I cut back my rose bushes?": "garden.md",
        "how often must the lubricant be replaced": "engine.html",
        "how long do I brew a cuppa": "tea.pdf",
        "sailing": "notes/boat.txt",
        "ice on a rolled ankle": "ankle-sprain.md",
    }.items():
        (best, cosine), *_ = index.dense(index.embed_query(question), 3)
        assert index.passages[best].source == source
        assert 0.2 < cosine <= 1.0
    index.close()


def test_cosines_are_exact_and_every_passage_is_reached(settings: AiSettings) -> None:
    ingest(settings)
    index = open_index(settings)
    vector = index.embed_query("ankle")
    found = index.dense(vector, 1000)
    assert {key for key, _ in found} == set(index.passages)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert found[0][1] == pytest.approx(float((index.vectors @ vector).max()), abs=1e-4)
    np.testing.assert_allclose(np.linalg.norm(index.vectors, axis=1), 1.0, atol=1e-3)
    index.close()


def test_filters_narrow_the_search_and_a_wrong_filter_is_explained(settings: AiSettings) -> None:
    ingest(settings)
    index = open_index(settings)
    vector = index.embed_query("ankle")
    assert [key for key, _ in index.dense(vector, 5, {"section": "self-care"})] == ["ankle-sprain/self-care"]
    assert index.dense(vector, 5, {"document": "nothing"}) == []
    assert index.matching({"source": "tea.pdf"}) == {key for key, p in index.passages.items() if p.source == "tea.pdf"}
    with pytest.raises(UserError, match="filter not understood"):
        index.dense(vector, 5, {"section": {"$nonsense": 1}})
    index.close()


def test_a_second_ingest_embeds_only_what_changed(settings: AiSettings, corpus: Path) -> None:
    first = ingest(settings)
    assert first.embedded > 0
    again = ingest(settings)
    assert (again.version, again.embedded, again.added, again.removed) == (first.version, 0, 0, 0)
    (corpus / "notes" / "boat.txt").write_text("Boats float.\n\nKeels stop drift.\n", encoding="utf-8")
    (corpus / "tea.pdf").unlink()
    third = ingest(settings)
    assert third.version != first.version
    assert third.embedded == 2  # the passage and the new sentence; "Boats float." is known
    assert (third.added, third.removed, third.unchanged) == (1, 2, first.passages - 2)
    index = open_index(settings)
    assert "tea.pdf" not in {p.source for p in index.passages.values()}
    assert all(key in index.passages for key, _ in index.dense(index.embed_query("brewing tea"), 50))
    index.close()


def test_old_versions_go_but_the_last_one_stays_for_a_running_service(settings: AiSettings, corpus: Path) -> None:
    versions = []
    for n in range(3):
        (corpus / "notes" / "boat.txt").write_text(f"Boat number {n}.", encoding="utf-8")
        versions.append(ingest(settings).version)
    root = settings.artifacts / "index"
    assert {p.name for p in root.iterdir() if p.is_dir()} == set(versions[1:])


def test_a_failed_build_leaves_the_old_index_in_use(settings: AiSettings, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ingest(settings)
    (corpus / "new.txt").write_text("Something new.", encoding="utf-8")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_fill_chroma", fails)
    with pytest.raises(OSError, match="No space"):
        ingest(settings)
    index = open_index(settings)
    assert index.version == first.version
    assert {p.name for p in (settings.artifacts / "index").iterdir() if p.is_dir()} == {first.version}
    index.close()


def test_a_second_ingest_at_the_same_time_is_refused(settings: AiSettings) -> None:
    root = settings.artifacts / "index"
    root.mkdir(parents=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another ingest is at work") as caught:
            ingest(settings)
    assert "\n" not in str(caught.value)
    assert ingest(settings).passages > 0


def test_a_missing_index_says_what_to_run(settings: AiSettings) -> None:
    assert "there is no index yet" in refused(settings)


def test_a_damaged_index_is_refused_and_mended_by_the_next_ingest(settings: AiSettings, corpus: Path) -> None:
    (corpus / "ankle-sprain.md").unlink()  # fewer texts to embed again
    version = ingest(settings).version
    folder = settings.artifacts / "index" / version

    def cut(name: str) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-20])

    for harm in (
        lambda: cut("vectors.npy"),
        lambda: cut("passages.json"),
        lambda: (folder / "index.json").unlink(),
        lambda: shutil.rmtree(folder / "chroma"),
        lambda: (folder / "chroma" / "chroma.sqlite3").write_bytes(b"no database"),
    ):
        harm()
        assert "damaged" in refused(settings)
        assert ingest(settings).version == version
        open_index(settings).close()
    (settings.artifacts / "index" / "current").write_text("i-000000000000\n", encoding="utf-8")
    assert "does not exist" in refused(settings)


@pytest.mark.parametrize(
    ("field", "value", "words"), [("embedder", "other/1", "another embedding model"), ("format", 99, "format 99")]
)
def test_an_index_of_another_make_is_refused(settings: AiSettings, field: str, value: object, words: str) -> None:
    path = settings.artifacts / "index" / ingest(settings).version / "index.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**info, field: value}), encoding="utf-8")
    assert words in refused(settings)


def test_a_corpus_without_text_is_refused(settings: AiSettings, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match="no folder of documents"):
        ingest(settings.model_copy(update={"corpus": empty}))
    empty.mkdir()
    (empty / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"no document could be read.*photo\.png"):
        ingest(settings.model_copy(update={"corpus": empty}))
