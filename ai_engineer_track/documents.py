"""Reads a folder of Markdown, HTML, PDF and plain text into passages.

Why an AI engineer cares: what is lost here is lost for good. A passage must know where it stands (its heading path), what it
was cut from (its file), and the id of every sentence, or no answer can cite it. A file that cannot be read is reported with
its reason; a product that silently knows less than its owner believes is the worst kind of stale.

Leaflets of the project's own format keep their sections and sentence ids. Of any other document, runs of sentences under
one heading become passages of at most `MAX_WORDS` words. Their ids hash the text, so that a citation made last month
either still means the same words or no longer resolves.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from markdown_it import MarkdownIt
from pypdf import PdfReader

from shared.chat import Source
from shared.errors import UserError
from shared.files import sha256_text
from shared.library import parse_leaflet
from shared.passages import Passage, leaflet_passages

#: words of a passage of an ordinary document; the embedding model reads 256 tokens
MAX_WORDS = 120
#: a "sentence" longer than this is a table or a list without full stops, and is cut
MAX_SENTENCE_WORDS = 60
#: to its end, or, as in a browser, to that of the page; Python's parser looks for the end of every unclosed one anew
COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
#: a tag that the page ends in, and all behind it; the parser would look for its end from every `<` in it
UNFINISHED = re.compile(r"<[a-zA-Z/!?].*", re.DOTALL)
MARK = re.compile(r"\[(\d{1,3})\]")
MAX_BYTES = 50_000_000
#: what one document may give: a page of a PDF holds about 3,000 characters, and a small file can unpack to gigabytes of them
MAX_CHARACTERS = 20_000_000
MAX_PAGES = 5_000

#: heading path below the title, and the sentences that stand there
Block = tuple[tuple[str, ...], list[str]]


class UnreadableError(Exception):
    """A file that gives no text, with the reason in a few words."""


def read_corpus(folder: Path) -> tuple[list[Passage], list[tuple[str, str]]]:
    """All passages of the files below `folder`, by path; and the files that were skipped, each with the reason.

    UserError when there is no such folder. Hidden files and folders are left alone, and links that lead out of the folder are not
    followed: whoever may add a document must not be able to publish any file of this machine.
    """
    if not folder.is_dir():
        raise UserError("no folder of documents", str(folder), "Point CORPUS at a folder of Markdown, HTML, PDF or text files")
    passages: list[Passage] = []
    skipped: list[tuple[str, str]] = []
    slugs: Counter[str] = Counter()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        slug = _slug(relative.with_suffix("").as_posix())
        slugs[slug] += 1
        if slugs[slug] > 1:  # a/b.md beside a-b.md
            slug = f"{slug}-{slugs[slug]}"
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UnreadableError("a link that leads out of the folder")
            found = _read(path, relative.as_posix(), slug)
            if not found:
                raise UnreadableError("no text in it" + (" (a scan?)" if path.suffix.lower() == ".pdf" else ""))
            passages += found
        except UnreadableError as error:
            skipped.append((relative.as_posix(), str(error)))
        except UserError as error:  # a leaflet that breaks the leaflets' rules
            skipped.append((relative.as_posix(), error.what))
        except OSError as error:
            skipped.append((relative.as_posix(), error.strerror or str(error)))
    return passages, skipped


def split_sentences(text: str) -> list[str]:
    """Sentences of running text: cut after . ! ? where a new sentence can begin, and never after an abbreviation."""
    found: list[str] = []
    for piece in re.split(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9])", _clean(text)):
        if found and re.search(r"(?:\b(?:Dr|Mr|Mrs|Ms|Prof|St|No|vs|e\.g|i\.e|approx|Fig)|\b[A-Z])\.$", found[-1]):
            found[-1] += f" {piece}"
        elif piece:
            found.append(piece)
    return [part for sentence in found for part in _cut(sentence)]


# --- the kinds of file -----------------------------------------------------------------------------------------------


def _read(path: Path, source: str, slug: str) -> list[Passage]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UnreadableError(f"{path.suffix or 'a file without an ending'} is not Markdown, HTML, PDF or plain text")
    if path.stat().st_size > MAX_BYTES:
        raise UnreadableError(f"larger than {MAX_BYTES // 1_000_000} MB")
    if path.suffix.lower() in MARKDOWN and _is_leaflet(_text(path)):
        leaflet = leaflet_passages(parse_leaflet(path), source)
        if any(MARK.search(s.text) for passage in leaflet for s in passage.sentences):
            raise UnreadableError("a sentence holds a mark like [3], which only citations have")
        return leaflet
    title, blocks = reader(path)
    return _passages(title or path.stem.replace("-", " ").replace("_", " ").strip().capitalize(), blocks, source, slug)


def _is_leaflet(text: str) -> bool:
    front = re.match(r"\A---\n(.*?)\n---\n", text, flags=re.DOTALL)
    return front is not None and all(re.search(rf"^{key}:", front[1], flags=re.MULTILINE) for key in ("look_alikes", "synonyms"))


def _markdown(path: Path) -> tuple[str, list[Block]]:
    text = re.sub(r"\A---\n.*?\n---\n", "", _text(path), count=1, flags=re.DOTALL)
    return _blocks_of_html(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def _html(path: Path) -> tuple[str, list[Block]]:
    return _blocks_of_html(_text(path))


def _plain(path: Path) -> tuple[str, list[Block]]:
    return "", [((), split_sentences(part)) for part in re.split(r"\n\s*\n", _text(path))]


def _pdf(path: Path) -> tuple[str, list[Block]]:
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("needs a password")
        if len(reader.pages) > MAX_PAGES:
            raise UnreadableError(f"more than {MAX_PAGES:,} pages")
        pages: list[str] = []
        for page in reader.pages:
            pages.append(page.extract_text())
            if sum(map(len, pages)) > MAX_CHARACTERS:
                raise UnreadableError(f"more than {MAX_CHARACTERS:,} characters")
        title = _clean(str((reader.metadata and reader.metadata.title) or ""))
    except UnreadableError:
        raise
    except Exception as error:  # pypdf raises many kinds of error for files that are no PDF
        raise UnreadableError(f"not a readable PDF ({_clean(str(error))[:80] or type(error).__name__})") from None
    joined = [re.sub(r"(?<=[a-z])-\n(?=[a-z])", "", page) for page in pages]  # words broken at the end of a line
    return title, [((f"Page {n}",), split_sentences(page)) for n, page in enumerate(joined, start=1)]


MARKDOWN = (".md", ".markdown")
READERS: dict[str, Callable[[Path], tuple[str, list[Block]]]] = {
    **dict.fromkeys(MARKDOWN, _markdown), ".html": _html, ".htm": _html, ".pdf": _pdf, ".txt": _plain, ".text": _plain,
}  # fmt: skip


class _Page(HTMLParser):
    """Collects text under its headings. What is never read aloud to a visitor (scripts, menus, templates) is left out."""

    HIDDEN = frozenset({"script", "style", "template", "noscript", "svg", "nav", "iframe", "select", "textarea"})
    INLINE = frozenset(
        "a abbr b bdi bdo cite code data em font i img kbd label mark q s samp small span strong sub sup u var".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title, self.blocks = "", list[Block]()
        self._path: list[tuple[int, str]] = []
        self._open: str | None = None  # the heading or title being read
        self._hidden: list[str] = []
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self._hidden.append(tag)
        elif tag not in self.INLINE:
            self._flush()
            self._open = tag if tag == "title" or re.fullmatch(r"h[1-6]", tag) else None

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
        elif tag not in self.INLINE and tag not in self.HIDDEN:
            self._flush()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.INLINE:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        text, self._text = _clean("".join(self._text)), []
        kind, self._open = self._open, None
        if not text:
            return
        if kind == "title":
            self.title = self.title or text
        elif kind:
            level = int(kind[1])
            self._path = [(n, name) for n, name in self._path if n < level] + [(level, text)]
        else:
            self.blocks.append((tuple(name for _, name in self._path), split_sentences(text)))


def _blocks_of_html(text: str) -> tuple[str, list[Block]]:
    """Title and blocks. A first-level heading over everything is the title, and no longer part of the paths."""
    page = _Page()
    text = COMMENT.sub("", text)
    end = text.rfind(">") + 1
    page.feed(text[:end] + UNFINISHED.sub("", text[end:]))
    page.close()
    tops = {path[0] if path else "" for path, _ in page.blocks}
    if len(tops) == 1 and (top := tops.pop()):
        return top, [(path[1:], sentences) for path, sentences in page.blocks]
    return page.title, page.blocks


# --- from blocks to passages -----------------------------------------------------------------------------------------


def _passages(title: str, blocks: list[Block], source: str, slug: str) -> list[Passage]:
    made: list[Passage] = []
    seen: Counter[str] = Counter()
    for path, sentences in _runs(blocks):
        heading = f"{title}: {' > '.join(path)}" if path else title
        digest = sha256_text("\n".join([heading, *sentences]))[:8]
        seen[digest] += 1
        key = f"{slug}/{digest}-{seen[digest]}"
        made.append(
            Passage(
                id=key, document=slug, title=title, section=path[-1] if path else "", heading=heading, source=source,
                sentences=[Source(id=f"{key}/{n}", heading=heading, text=text) for n, text in enumerate(sentences, start=1)],
            )
        )  # fmt: skip
    return made


def _runs(blocks: list[Block]) -> Iterator[Block]:
    """Neighbouring sentences under one heading, as many as fit a passage."""
    path: tuple[str, ...] = ()
    run: list[str] = []
    for here, sentences in blocks:
        for sentence in sentences:
            if run and (here != path or sum(len(s.split()) for s in [*run, sentence]) > MAX_WORDS):
                yield path, run
                run = []
            path = here
            run.append(sentence)
    if run:
        yield path, run


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise UnreadableError("binary, not text")
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise UnreadableError("not UTF-8 text") from None


def _clean(text: str) -> str:
    """NFC, one line, single spaces; control characters part words, invisible ones (soft hyphens, marks of direction) go.

    A footnote mark [3] becomes (3): in an answer it would look like the citation of another source.
    """
    text = MARK.sub(r"(\1)", text)
    kinds = ((c, unicodedata.category(c)) for c in unicodedata.normalize("NFC", text))
    return " ".join("".join(" " if kind == "Cc" else c for c, kind in kinds if kind[0] != "C" or kind == "Cc").split())


def _cut(sentence: str) -> Iterator[str]:
    words = sentence.split()
    for start in range(0, len(words), MAX_SENTENCE_WORDS):
        yield " ".join(words[start : start + MAX_SENTENCE_WORDS])


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:80] or sha256_text(name)[:8]
