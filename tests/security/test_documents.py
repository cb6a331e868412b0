"""Documents somebody else made: they may waste a line of the report, and nothing more."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import pytest

from ai_engineer_track import documents
from ai_engineer_track.documents import read_corpus


def test_a_link_does_not_publish_a_file_of_this_machine(tmp_path: Path) -> None:
    corpus, outside = tmp_path / "corpus", tmp_path / "private"
    corpus.mkdir()
    outside.mkdir()
    (outside / "secrets.txt").write_text("The token is tulip.", encoding="utf-8")
    (corpus / "notes.txt").symlink_to(outside / "secrets.txt")
    (corpus / "folder").symlink_to(outside, target_is_directory=True)
    (corpus / "honest.txt").write_text("Rest helps.", encoding="utf-8")
    (corpus / "same.txt").symlink_to(corpus / "honest.txt")
    passages, skipped = read_corpus(corpus)
    assert {p.source for p in passages} == {"honest.txt", "same.txt"}
    assert ("notes.txt", "a link that leads out of the folder") in skipped
    assert not any("tulip" in s.text for p in passages for s in p.sentences)


def test_a_corpus_may_itself_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("Rest helps.", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert len(read_corpus(tmp_path / "link")[0]) == 1


def test_a_mark_in_a_document_is_no_citation(tmp_path: Path) -> None:
    """ "Rest. [2] Drink bleach." quoted as source 1 would read as a quotation of source 2."""
    (tmp_path / "a.txt").write_text("Rest helps.[12] Water, too [3].", encoding="utf-8")
    sentences = [s.text for p in read_corpus(tmp_path)[0] for s in p.sentences]
    assert "[" not in "".join(sentences)
    assert "(12)" in "".join(sentences)


def pdf(pages: int, content: bytes) -> bytes:
    """One page object, listed `pages` times."""
    squeezed = zlib.compress(content, 9)
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[" + b"3 0 R " * pages + b"]/Count %d>>" % pages,
        b"<</Type/Page/Parent 2 0 R/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d/Filter/FlateDecode>>\nstream\n" % len(squeezed) + squeezed + b"\nendstream",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n" % number + one + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)


LINE = b"BT /F1 12 Tf (Rest helps. ) Tj ET\n"


def test_an_honest_pdf_of_the_same_make_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf(2, LINE * 3))
    passages, skipped = read_corpus(tmp_path)
    assert passages
    assert not skipped


def test_a_pdf_that_unpacks_to_far_more_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 20_000)
    (tmp_path / "many.pdf").write_bytes(pdf(400, LINE * 200))
    (tmp_path / "pages.pdf").write_bytes(pdf(documents.MAX_PAGES + 1, LINE))
    (tmp_path / "zeros.pdf").write_bytes(pdf(1, b"\0" * 120_000_000))
    began = time.process_time()
    passages, skipped = read_corpus(tmp_path)
    assert not passages
    assert len(skipped) == 3
    assert dict(skipped)["pages.pdf"] == "more than 5,000 pages"
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.md", "[" * 5_000), ("a.md", ">" * 5_000 + "a"), ("a.md", "*a " * 5_000), ("a.md", "[a](<b" * 3_000),
        ("a.html", "<!--" * 20_000), ("a.html", "<a " * 20_000), ("a.html", "<div>" * 20_000 + "x"), ("a.html", "&" * 50_000),
        ("a.txt", "." * 50_000), ("a.txt", '!"' * 20_000), ("a.txt", "a\u0301" * 20_000),
    ],
)  # fmt: skip
def test_no_text_makes_a_reader_slow(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    began = time.process_time()
    read_corpus(tmp_path)
    assert time.process_time() - began < 20
